"""results.tsv: a row for every experiment. Locked, and free of torch.

The truth is the record of each run, where no `git reset` reaches. results.tsv is a view of it,
written and committed by every `log`.
"""

import shlex
from dataclasses import dataclass

from harness import record
from harness.record import LOCKED, ROOT, SEED, git

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"

# Reading ----------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """The rows of a branch, and the runs that they came from."""

    branch: str
    base: str  # the commit where the branch left main
    runs: list[dict]  # all of this folder, the oldest first
    logged: list[dict]  # those with a row on this branch, in the order of their rows
    rows: list[str]


def read_rows(ref: str) -> list[str]:
    """Return the rows of results.tsv in a commit; none if there is no such commit."""
    lines = git("show", f"{ref}:./results.tsv", default="").splitlines()
    return [line for line in lines[1:] if line.count("\t") == 4]


def train_py(ref: str) -> str:
    """Return train.py in a commit, without white space around it."""
    return git("show", f"{ref}:./train.py", default="")


def is_of(run: dict, text: str) -> bool:
    """Return whether a run was of this train.py."""
    path = record.folder_of(run) / "train.py"
    return path.read_text(errors="replace").strip() == text


def find_branch() -> tuple:
    """Return the branch that is checked out, and the commit where it left main.

    Raises SystemExit if it is not a branch for experiments.
    """
    branch = git("branch", "--show-current")
    if not branch.startswith("autoresearch/"):
        advice = "`git checkout -b autoresearch/<tag> main`"
        raise SystemExit(f"nothing is logged on {branch or 'no branch'}: {advice}")
    for name in ("main", "master", "origin/main", "origin/master"):
        if base := git("merge-base", "HEAD", name, default=""):
            return branch, base
    raise SystemExit("git has no main to compare with: ask the person where the work began")


def read_ledger() -> Ledger:
    """Read the ledger of the branch that is checked out.

    First the rows that only git has, as in a clone: those of the last `log` that it knows of.
    """
    branch, base = find_branch()
    runs = record.own_runs(record.read_runs())
    logged = [run for run in runs if run["log"].get("branch") == branch]
    logged.sort(key=lambda run: run["log"]["time"])
    rows = [run["log"]["row"] for run in logged]
    log_commits = ("-E", "--grep=^log (keep|discard|crash): ", f"{base}..HEAD", "--", "results.tsv")
    last_log = git("log", "-1", "--format=%H", *log_commits) or "none"
    in_git = read_rows(f"refs/{branch}/ledger")
    in_git += [row for row in read_rows(last_log) if row not in in_git]
    heads = git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads/").splitlines()
    recorded = [run["log"]["row"] for run in runs if run["log"].get("branch") in heads]
    only_in_git = [row for row in in_git if row not in recorded]
    return Ledger(branch, base, runs, logged, [*only_in_git, *rows])


def last_run(ledger: Ledger) -> dict:
    """Return the newest run of this folder. SystemExit if there is none, or it is still running."""
    if not ledger.runs:
        raise SystemExit("nothing to log, no run here yet: `uv run train.py`")
    run = ledger.runs[-1]
    if run["status"] == "running":
        raise SystemExit(f"process {run['pid']} still runs train.py: wait for its end, then log it")
    return run


def find_row(run: dict, ledger: Ledger) -> str:
    """Return the row that a run has, or its train.py, if that was kept."""
    for other in record.find_kept(ledger.logged, ledger.branch):
        if other["train_sha256"] == run["train_sha256"]:
            return other["log"]["row"]
    return run["log"].get("row")


def finished_seeds(run: dict, ledger: Ledger) -> list[dict]:
    """Return the finished runs of the same train.py that compare with a run."""
    alike = record.find_comparable(run, ledger.runs)
    return [other for other in alike if other["train_sha256"] == run["train_sha256"]]


def kept_commit(ledger: Ledger) -> str:
    """Return the commit that was kept last; where the branch began, if there is none."""
    for row in reversed(ledger.rows):
        commit, _, _, status, _ = row.split("\t")
        if status == "keep" and git("rev-parse", f"{commit}^0", default=""):
            return commit
    return ledger.base


# Refusing ---------------------------------------------------------------------------------------


def refuse_files(base: str) -> None:
    """Raise SystemExit if anything but train.py changed on the branch."""
    others = ("--", ".", ":!results.tsv", ":!train.py")
    committed = git("diff", "--name-only", base, "HEAD", *others).splitlines()
    edited = git("diff", "--name-only", base, *others, ":!uv.lock").splitlines()  # uv edits its own
    changed = {*committed, *edited}
    if changed:
        names = shlex.join(sorted(changed))
        amend = "`git commit --amend --no-edit --allow-empty`, " if committed else ""
        undo = f"`git restore -s {base[:7]} -SW {names}`, {amend}log again"
        raise SystemExit(f"only train.py may change, but {names} did: {undo}")
    for name in LOCKED:  # git may have been told to overlook a change
        in_base = git("rev-parse", f"{base}:./{name}", default="")
        if git("hash-object", name) != in_base:
            raise SystemExit(f"{name} is not that of {base[:7]}, though git shows no change in it")
    if stray := git("ls-files", "--others", "--exclude-standard", "--", "*.py"):
        raise SystemExit(f"{stray!r} is not in git: move what it does into train.py")


def refuse_row(run: dict, status: str, ledger: Ledger) -> None:
    """Raise SystemExit, with what to do, if a run can't have a row of this status."""
    seeds = finished_seeds(run, ledger)
    kept = kept_commit(ledger)
    head = train_py("HEAD")
    train_kept = train_py(kept)
    on_disk = (ROOT / "train.py").read_text().strip()
    back = f"`git reset --hard {run['commit'][:7]}`"
    if status == "crash" and seeds:
        raise SystemExit(f"its val_bpb is {seeds[0]['val_bpb']:.6f}: log keep or discard instead")
    if not seeds and (status != "crash" or run["status"] == "stopped"):
        advice = "`uv run train.py`" if is_of(run, on_disk) else f"{back}, `uv run train.py`"
        if run["status"] in ("crash", "timeout"):
            advice = "log crash instead"
        ended = run["status"].replace("killed", "killed from outside, or out of memory")
        seen = f"the last run has no val_bpb ({ended}): {advice}"
        raise SystemExit(". ".join([seen, *run.get("traceback", [])[-1:]]))
    is_left = head != train_kept or is_of(run, on_disk)
    if status != "keep" and is_left and not is_of(run, train_kept):
        advice = f"`git reset --hard {kept[:7]}`, log again"
        raise SystemExit(f"the experiment is still in the branch: {advice}")
    refuse_files(ledger.base)
    if run["judge"] != record.digest(record.judge_sources()):
        raise SystemExit("the last run was judged by other code: `uv run train.py`")
    if status != "crash":
        kept_runs = record.find_kept(ledger.logged, ledger.branch)
        record.refuse_incomparable(run, kept_runs)
    if status == "keep" and not is_of(run, head):
        back = '`git commit train.py -m "<idea>"`' if is_of(run, on_disk) else back
        raise SystemExit(f"HEAD has another train.py than the last run: {back}, log again")
    if status == "keep" and all(other["seed"] != SEED for other in seeds):
        raise SystemExit(f"a row needs the run with seed {SEED}: `uv run train.py`")


# Writing ----------------------------------------------------------------------------------------


def write_ledger(ledger: Ledger) -> None:
    """Write and commit results.tsv, and keep the commit of every row under refs/."""
    refs, text = f"refs/{ledger.branch}", "\n".join([HEADER, *ledger.rows])
    commits = {run["log"]["commit"] for run in ledger.logged}
    keep = "".join(f"update {refs}/{commit[:7]} {commit}\n" for commit in commits)
    try:
        git("update-ref", "--stdin", stdin=keep)
        record.write_file(ROOT / "results.tsv", f"{text}\n")
        if git("show", "HEAD:./results.tsv", default="") != text:
            _, _, _, status, description = ledger.rows[-1].split("\t")
            message = f"log {status}: {description}"
            git("add", "-f", "results.tsv")
            git("commit", "-q", "--no-verify", "-m", message, "--", "results.tsv")
        git("update-ref", f"{refs}/ledger", "HEAD")
    except (OSError, SystemExit) as error:
        advice = "The row is safe: fix that, and the same command commits it"
        raise SystemExit(f"results.tsv was not committed: {error}. {advice}") from None


def new_entry(run: dict, status: str, description: str, ledger: Ledger) -> dict:
    """Return what the record of a run says of its row: the value is the mean over seeds."""
    seeds, value, memory = finished_seeds(run, ledger), record.Value(0.0, 0), 0.0
    if status != "crash":
        value = record.average(seeds)[run["train_sha256"]]
        memory = max(other["peak_vram_mb"] for other in seeds) / 1024
    commit = git("rev-parse", "HEAD") if status == "keep" else run["commit"]
    description += f" ({value.seeds} seeds)" if value.seeds > 1 else ""
    row = f"{commit[:7]}\t{value.mean:.6f}\t{memory:.1f}\t{status}\t{description}"
    entry = {"time": record.new_id(), "branch": ledger.branch, "commit": commit, "status": status}
    return entry | {"row": row, "runs": [other["id"] for other in seeds]}


def log(status: str, *words: str) -> None:
    """Log the last run. Its record has the row before git has: a killed call loses nothing."""
    printable = filter(str.isprintable, " ".join(" ".join(words).split()))
    description = " ".join("".join(printable).split())
    if status not in ("keep", "discard", "crash") or not description:
        raise SystemExit('expected: log keep|discard|crash "what was tried"')
    with record.file_lock(record.cache_root() / "ledger.lock", "it writes a ledger"):
        ledger = read_ledger()
        run = last_run(ledger)
        if row := find_row(run, ledger):
            where = "here" if row in ledger.rows else "on another branch (here `uv run train.py`)"
            if row in ledger.rows:
                write_ledger(ledger)  # completes what a killed call began
            raise SystemExit(f"nothing to log: the last run has its row {where}: {row!r}")
        refuse_row(run, status, ledger)
        run["log"] = new_entry(run, status, description, ledger)
        record.write_run(run)
        write_ledger(read_ledger())
        print(run["log"]["row"])


def show() -> None:
    """Print the last rows of this branch, and whether the last run has one."""
    ledger = read_ledger()
    print(HEADER, *ledger.rows[-20:], f"--- {len(ledger.rows)} rows; the last run:", sep="\n")
    run, lines = last_run(ledger), {}
    record.print_runs([run])
    if run["status"] == "finished":
        lines = record.describe_value(run)
    lines["its_row"] = find_row(run, ledger) or "none yet: log it, or run what else it needs"
    print(*(f"{name + ':':<18}{value}" for name, value in lines.items()), sep="\n")
