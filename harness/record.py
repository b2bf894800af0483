"""A folder for every run, and which runs compare. Locked, and free of torch, which takes seconds.

runs/<id>/train.py       the file as it ran
runs/<id>/run.json       when, what, on what device, how it ended, and its row in the ledger
runs/<id>/traceback.txt  its stack when the time limit ended it; its process locks this file
"""

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
SEED = 42  # of every experiment; other seeds only confirm one

JUDGE = ("prepare.py", "harness/run.py")  # what decides a val_bpb
BOOKS = [f"harness/{name}.py" for name in ("__init__", "record", "ledger", "audit")]
LOCKED = (*JUDGE, *BOOKS)

# Files ------------------------------------------------------------------------------------------


def cache_root() -> Path:
    """Return $AUTORESEARCH_CACHE, else $XDG_CACHE_HOME/autoresearch, else ~/.cache/autoresearch."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get("AUTORESEARCH_CACHE") or f"{home}/autoresearch"
    return Path(chosen).expanduser().resolve()


def digest(*parts: object) -> str:
    """Return the sha256, in hex, of the JSON of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, text: str) -> None:
    """Write a file so that it is whole or not there, whatever happens."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def file_lock(path: Path, advice: str, wait: bool = True) -> Iterator[None]:
    """Hold a lock file that names its holder; the system releases it when the process ends.

    Raises SystemExit with the holder's pid if another process has it and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+" if path.exists() else "a+") as file:
        with contextlib.suppress(PermissionError):
            path.chmod(0o666)  # other users of this machine lock it, too
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{path} is held by process {path.read_text().strip()}: {advice}"
            if not wait:
                raise SystemExit(message) from None
            print(message, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        os.pwrite(file.fileno(), str(os.getpid()).encode(), 0)
        yield


def strip_comments(source: str) -> str:
    """Return Python source without its comments and blank lines, the same under every Python."""
    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def judge_sources() -> list[str]:
    """Return the source that decides a val_bpb, without its comments."""
    return [strip_comments((ROOT / name).read_text("utf-8")) for name in JUDGE]


def git(*arguments: str, default: str | None = None, stdin: str = "") -> str:
    """Return what a git command prints here. If it fails: `default`, else SystemExit with why."""
    # at night nobody types a passphrase; `env` says by its exit status that there is no git
    settings = ["-c", "core.quotepath=off", "-c", "commit.gpgSign=false"]
    command = ["env", "git", "-C", ROOT, *settings, *arguments]
    options = {"input": stdin, "capture_output": True, "encoding": "utf-8", "errors": "replace"}
    result = subprocess.run(command, **options)
    if result.returncode and default is None:
        raise SystemExit(f"`git {' '.join(arguments[:2])}` failed: {result.stderr.strip()}")
    return default if result.returncode else result.stdout.strip()


# Runs -------------------------------------------------------------------------------------------


def new_id() -> str:
    """Return a name for a run; names sort by time."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{os.getpid()}"


def folder_of(run: dict) -> Path:
    """Return the folder of a run."""
    return cache_root() / "runs" / run["id"]


def create_run(run: dict, source: bytes) -> TextIO:
    """Make the folder of a run by one rename; return its traceback.txt, locked and open."""
    folder = folder_of(run)
    part = folder.with_name(f"part-{folder.name}")
    part.mkdir(parents=True)
    (part / "train.py").write_bytes(source)
    (part / "run.json").write_text(json.dumps(run, indent=1))
    file = (part / "traceback.txt").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    os.replace(part, folder)
    return file


def write_run(run: dict) -> None:
    """Replace the record of a run."""
    write_file(folder_of(run) / "run.json", json.dumps(run, indent=1))


def is_running(folder: Path) -> bool:
    """Return whether the process of a run lives."""
    with (folder / "traceback.txt").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_run(folder: Path) -> dict:
    """Return the record of a run; one whose process is gone was killed, or ran out of time."""
    path = folder / "run.json"
    run = json.loads(path.read_text())
    if run["status"] == "running" and not is_running(folder):
        run = json.loads(path.read_text())  # it may have ended in between
        if run["status"] == "running":
            stack = (folder / "traceback.txt").read_text(errors="replace").splitlines()
            run["status"] = "timeout" if stack else "killed"
            run["traceback"] = stack[-20:]
    return run


def read_runs() -> list[dict]:
    """Return the records of all runs, the oldest first."""
    runs = []
    for path in sorted(cache_root().glob("runs/[0-9]*/run.json")):
        try:
            runs.append(read_run(path.parent))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{path} can't be read and is skipped: {error!r}", file=sys.stderr)
    return runs


def own_runs(runs: list[dict]) -> list[dict]:
    """Return the runs of this folder that git knows here; others are of a clone that is gone."""
    own = [run for run in runs if run["repository"] == str(ROOT)]
    commits = {(run["log"] or run)["commit"] for run in own}
    known = git("rev-list", "--no-walk", "--ignore-missing", *filter(None, commits), default="")
    return [run for run in own if (run["log"] or run)["commit"] in known]


def print_runs(runs: list[dict]) -> None:
    """Print a table of runs, the newest last."""
    names = ("id", "commit", "seed", "status", "val_bpb", "num_steps", "lost_percent")
    print(*names, "row", sep="\t")
    for run in runs:
        shown = run | {"commit": run["commit"][:7]}
        row = run["log"].get("row", "").split("\t")[3:]
        cells = [shown.get(name, "") for name in names]
        cells = [f"{cell:.7g}" if isinstance(cell, float) else cell for cell in cells]
        print(*cells, *row, sep="\t")
    print(f"train.py and run.json of each: {cache_root() / 'runs'}")


# Comparison -------------------------------------------------------------------------------------


class Value(NamedTuple):
    """What a version of train.py is worth."""

    mean: float  # val_bpb over its seeds
    seeds: int


class UnfitError(SystemExit):
    """The machine or the settings are at fault, not train.py."""


def is_disturbed(run: dict) -> bool:
    """Return whether other work took too much of a run's time, or of its GPU."""
    return run.get("disturbed", False)


def comparable(run: dict, other: dict) -> bool:
    """Return whether the val_bpb of two runs compare."""
    same_harness = run["harness"] == other["harness"]
    return same_harness and run["device"] == other["device"]


def find_comparable(run: dict, runs: list[dict]) -> list[dict]:
    """Return the finished runs that compare with a run."""
    return [other for other in runs if other["status"] == "finished" and comparable(run, other)]


def find_kept(runs: list[dict], branch: str) -> list[dict]:
    """Return the runs that a branch kept, in the order of their rows."""
    kept = []
    for run in runs:
        entry = run["log"]
        if entry.get("branch") == branch and entry["status"] == "keep":
            kept.append(run)
    return sorted(kept, key=lambda run: run["log"]["time"])


def refuse_incomparable(run: dict, kept: list[dict]) -> None:
    """Raise UnfitError if a run does not compare with the last one that its branch kept."""
    if kept and not comparable(run, kept[-1]):
        best = f"{kept[-1]['harness']} on {kept[-1]['device']}"
        seen = f"{run['harness']} on {run['device']}, kept: {best}"
        advice = "take the same corpus and device and undo what changed, or stop and report it"
        raise UnfitError(f"this run does not compare with what was kept ({seen}): {advice}")


def group_by_version(runs: list[dict]) -> dict[str, dict]:
    """Return {train_sha256: {seed: val_bpb}}; of several runs of one seed the mean counts.

    A disturbed run counts only while its seed has none that is less disturbed.
    """
    values = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: (is_disturbed(run), run.get("lost_percent", 0))):
        each = values[run["train_sha256"]][run["seed"]]
        if not each or not is_disturbed(run):
            each.append(run["val_bpb"])
    return {
        version: {seed: statistics.fmean(each) for seed, each in seeds.items()}
        for version, seeds in values.items()
    }


def average(runs: list[dict]) -> dict[str, Value]:
    """Return {train_sha256: Value} of finished runs."""
    values = {}
    for version, seeds in group_by_version(runs).items():
        values[version] = Value(statistics.fmean(seeds.values()), len(seeds))
    return values


def estimate_deviation(groups: Iterable) -> float:
    """Return the standard deviation of values within groups; 0 if no group has several.

    It is that of a normal distribution with the median difference of two values: one bad value does
    not spoil it. Of a single group of three it is a third too large on average.
    """
    pairs = [pair for group in groups for pair in combinations(group, 2)]
    return statistics.median(abs(a - b) for a, b in pairs) / 0.9539 if pairs else 0.0


def estimate_noise(runs: list[dict]) -> float:
    """Return the standard deviation between seeds of one train.py; 0 if none has several.

    Disturbed runs count only if there are no others.
    """
    clean = [run for run in runs if not is_disturbed(run)]
    noises = []
    for chosen in (clean, runs):
        versions = group_by_version(chosen).values()
        noises.append(estimate_deviation(seeds.values() for seeds in versions))
    return noises[0] or noises[1]


def noise_of_difference(noise: float, one: Value, other: Value) -> float:
    """Return the standard deviation of the difference of two means."""
    return noise * math.sqrt(1 / one.seeds + 1 / other.seeds)


def describe_value(run: dict) -> dict[str, str]:
    """Return the summary's lines that help to decide: noise, best kept, difference to it.

    The noise is that of all runs that compare; values are those of this folder's own runs.
    """
    runs, branch = read_runs(), git("branch", "--show-current", default="")
    own, this = own_runs(runs), run["train_sha256"]
    values, lines = average(find_comparable(run, own)), {}
    kept = {other["train_sha256"]: other["log"]["commit"][:7] for other in find_kept(own, branch)}
    if is_disturbed(run):
        seen = f"{run['lost_percent']} % of its time, {run['shared_gib']} GiB of its GPU"
        lines["disturbed"] = f"other work took {seen}: run it again"
    if noise := estimate_noise(find_comparable(run, runs)):
        lines["noise"] = f"{noise:.6f} (standard deviation between seeds)"
    best = min(kept.keys() & values.keys(), key=values.get, default=None)
    if not best or this not in values:  # a full disk may have kept this run off the record
        return lines
    lines["best_kept"] = f"{values[best].mean:.6f} ({kept[best]}, seeds: {values[best].seeds})"
    if this != best:
        difference = values[this].mean - values[best].mean
        scale = noise_of_difference(noise, values[this], values[best])
        times = f"{difference / scale:+.2f} x its noise, " if scale else ""
        lines["difference"] = f"{difference:+.6f} ({times}seeds: {values[this].seeds})"
    return lines
