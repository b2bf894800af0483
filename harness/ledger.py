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
    return git("show", f"{ref}:./results.tsv", default="").splitlines()[1:]


def train_py(ref: str) -> str:
    """Return train.py in a commit, without white space around it."""
    return git("show", f"{ref}:./train.py", default="")


def is_of(run: dict, text: str) -> bool:
    """Return whether a run was of this train.py."""
    path = record.folder_of(run) / "train.py"
    return path.read_text(errors="replace").strip() == text


def current_branch() -> str:
    """Return the branch that is checked out. Raises SystemExit if it is not for experiments."""
    branch = git("branch", "--show-current")
    if not branch.startswith("autoresearch/"):
        advice = "`git checkout -b autoresearch/<tag> main`"
        raise SystemExit(f"nothing is logged on {branch or 'no branch'}: {advice}")
    return branch


def find_base() -> str:
    """Return the commit where the branch left main."""
    for name in ("main", "master", "origin/main", "origin/master"):
        if base := git("merge-base", "HEAD", name, default=""):
            return base
    raise SystemExit("git has no main to compare with: `git branch main <where your work began>`")


def read_ledger() -> Ledger:
    """Read the ledger of the branch that is checked out.

    First the rows that only git has, as in a clone: those of the last `log` that it knows of.
    """
    branch, base = current_branch(), find_base()
    runs = record.own_runs(record.read_runs())
    commits = {entry["commit"] for run in runs for entry in (run, run.get("log", run))}
    known = git("rev-list", "--no-walk", "--ignore-missing", "HEAD", *filter(None, commits))
    runs = [run for run in runs if run["commit"] in known]  # others are of a clone that is gone
    logged = [run for run in runs if run.get("log", {}).get("branch") == branch]
    logged.sort(key=lambda run: run["log"]["time"])
    rows = [run["log"]["row"] for run in logged]
    last_log = git("log", "-1", "--format=%H", "--grep=^log ", f"{base}..HEAD", "--", "results.tsv")
    in_git = [*read_rows(f"refs/{branch}/ledger"), *(read_rows(last_log) if last_log else [])]
    only_in_git = [row for row in dict.fromkeys(in_git) if row not in rows]
    return Ledger(branch, base, runs, logged, [*only_in_git, *rows])


def last_run(ledger: Ledger) -> dict:
    """Return the newest run of this folder. Raises SystemExit if there is none, or it goes on."""
    if not ledger.runs:
        raise SystemExit("nothing to log, as nothing was run here: `uv run train.py`")
    run = ledger.runs[-1]
    if run["status"] == "running":
        raise SystemExit("a run is going on: wait for its summary, then log it")
    return run


def kept_commit(ledger: Ledger) -> str:
    """Return the commit that was kept last; where the branch began, if there is none."""
    for row in reversed(ledger.rows):
        commit, _, _, status, _ = row.split("\t")
        if status == "keep" and git("rev-parse", "-q", "--verify", f"{commit}^0", default=""):
            return commit
    return ledger.base


def way_back(ledger: Ledger) -> str:
    """Return the command that takes the branch to what was kept last."""
    kept = kept_commit(ledger)
    tip = git("rev-parse", "-q", "--verify", f"refs/{ledger.branch}/ledger", default="")
    return f"git reset --hard {(tip if train_py(tip) == train_py(kept) else kept)[:7]}"


# Writing ----------------------------------------------------------------------------------------


def write_ledger(ledger: Ledger) -> None:
    """Write and commit results.tsv, and keep the commit of every row under refs/."""
    refs, text = f"refs/{ledger.branch}", "\n".join([HEADER, *ledger.rows])
    try:
        known = git("for-each-ref", "--format=%(refname)", refs).splitlines()
        for commit in {run["log"]["commit"] for run in ledger.logged}:
            if f"{refs}/{commit[:7]}" not in known:
                git("update-ref", f"{refs}/{commit[:7]}", commit)
        record.write_file(ROOT / "results.tsv", f"{text}\n")
        if git("show", "HEAD:./results.tsv", default="") != text:
            _, _, _, status, description = ledger.rows[-1].split("\t")
            git("add", "-f", "results.tsv")
            message = f"log {status}: {description}"
            git("commit", "-q", "--no-verify", "-m", message, "--", "results.tsv")
        git("update-ref", f"{refs}/ledger", "HEAD")
    except (OSError, SystemExit) as error:
        advice = "The row is safe: fix that, and the same command commits it"
        raise SystemExit(f"results.tsv was not committed: {error}. {advice}") from None


def finished_seeds(run: dict, ledger: Ledger) -> list[dict]:
    """Return the finished runs of the same train.py that compare with a run."""
    return [
        other
        for other in ledger.runs
        if record.comparable(run, other) and other["train_sha256"] == run["train_sha256"]
    ]


def refuse_files(run: dict, ledger: Ledger) -> None:
    """Raise SystemExit if something else than train.py decided the value of a run."""
    base, others = ledger.base, ("--", ".", ":!results.tsv", ":!train.py")
    committed = git("diff", "--name-only", base, "HEAD", *others).splitlines()
    changed = {*committed, *git("diff", "--name-only", base, *others).splitlines()}
    if changed:
        undo = f"`git restore -s {base[:7]} -SW {shlex.join(sorted(changed))}`, "
        amend = "`git commit -a --amend --no-edit --allow-empty`, " if committed else ""
        seen = f"only train.py may change, but {', '.join(sorted(changed))} did"
        raise SystemExit(f"{seen}: {undo}{amend}log again")
    for name in LOCKED:  # git may have been told to overlook a change
        if git("hash-object", name, default="") != git("rev-parse", f"{base}:./{name}"):
            flags = ("--no-skip-worktree", "--no-assume-unchanged")
            shown = ", ".join(f"`git update-index {flag} {name}`" for flag in flags)
            raise SystemExit(f"{name} is not that of {base[:7]}: {shown}, log again")
    if stray := git("ls-files", "--others", "--exclude-standard", "--", "*.py"):
        raise SystemExit(f"no commit has {stray!r}: move what it does into train.py")
    if run["judge"] != record.judge_digest():
        raise SystemExit("the last run was judged by other code than this: `uv run train.py`")


def refuse_row(run: dict, status: str, ledger: Ledger) -> None:
    """Raise SystemExit, with what to do, if a run can't have a row of this status."""
    seeds, kept, head = finished_seeds(run, ledger), train_py(kept_commit(ledger)), train_py("HEAD")
    on_disk = (ROOT / "train.py").read_text(errors="replace").strip()
    again = f"git reset --hard {run['commit'][:7]}"
    if status == "crash" and seeds:
        value = seeds[0]["val_bpb"]
        raise SystemExit(f"this train.py has a val_bpb, {value:.6f}: log keep or discard instead")
    if status != "crash" and not seeds:
        advice = "log crash instead"
        if run["status"] in ("killed", "stopped"):
            advice = "`uv run train.py`" if is_of(run, on_disk) else f"`{again}`, `uv run train.py`"
        raise SystemExit(f"the last run has no val_bpb ({run['status']}): {advice}")
    if status != "keep" and not is_of(run, kept) and (head != kept or is_of(run, on_disk)):
        raise SystemExit(f"the experiment is still in the branch: `{way_back(ledger)}`, log again")
    refuse_files(run, ledger)
    best = next((other for other in ledger.logged[::-1] if other["log"]["status"] == "keep"), run)
    if status != "crash" and not record.comparable(best, seeds[0]):
        raise SystemExit(
            f"the last run ({run['harness']}, {run['device']}) does not compare with what was kept "
            f"({best['harness']}, {best['device']}): run it as that was, or begin a new branch, "
            "`git checkout -b autoresearch/<tag> main`"
        )
    if status == "keep" and not is_of(run, head):
        back = 'git commit -am "<idea>"' if is_of(run, on_disk) else again
        raise SystemExit(f"HEAD has another train.py than the last run: `{back}`, log again")
    if status == "keep" and all(other["seed"] != SEED for other in seeds):
        raise SystemExit(f"a row needs the run with seed {SEED}: `uv run train.py`")


def find_row(run: dict, ledger: Ledger) -> str | None:
    """Return the row that a run, or its train.py, has already."""
    kept = [
        other["log"]["row"]
        for other in ledger.logged
        if other["log"]["status"] == "keep" and other["train_sha256"] == run["train_sha256"]
    ]
    return run["log"]["row"] if "log" in run else next(iter(kept), None)


def log(status: str, *words: str) -> None:
    """Log the last run. Its record has the row before git has: a killed call loses nothing."""
    description = "".join(c for c in " ".join(" ".join(words).split()) if c.isprintable())
    if status not in ("keep", "discard", "crash") or not description:
        raise SystemExit('expected: log keep|discard|crash "what was tried"')
    with record.file_lock(record.cache_root() / "ledger.lock", "it writes a ledger"):
        ledger = read_ledger()
        run = last_run(ledger)
        if row := find_row(run, ledger):
            write_ledger(ledger)
            is_there = git("merge-base", "--is-ancestor", kept_commit(ledger), "HEAD", default="no")
            then = (
                f"`{way_back(ledger)}`" if is_there == "no" else "the next idea, `uv run train.py`"
            )
            raise SystemExit(f"nothing to log: the last run has its row, {row!r}. Next: {then}")
        refuse_row(run, status, ledger)
        run["log"] = new_entry(run, status, description, ledger)
        record.write_run(run)
        write_ledger(read_ledger())
        print(run["log"]["row"])


def new_entry(run: dict, status: str, description: str, ledger: Ledger) -> dict:
    """Return what the record of a run says of its row: the value is the mean over seeds."""
    seeds, value, memory = finished_seeds(run, ledger), record.Value(0.0, 0), 0.0
    if status != "crash":
        value = record.average(seeds)[run["train_sha256"]]
        memory = max(other["peak_vram_mb"] for other in seeds) / 1024
    commit = git("rev-parse", "HEAD") if status == "keep" else run["commit"]
    description += f" ({value.seeds} seeds)" if value.seeds > 1 else ""
    return {
        "time": record.new_id(),
        "branch": ledger.branch,
        "commit": commit,
        "status": status,
        "row": f"{commit[:7]}\t{value.mean:.6f}\t{memory:.1f}\t{status}\t{description}",
        "runs": [other["id"] for other in seeds],
    }


def show() -> None:
    """Print the last rows of this branch, and whether the last run has one."""
    ledger = read_ledger()
    print(HEADER, *ledger.rows[-20:], f"--- {len(ledger.rows)} rows", sep="\n")
    run = last_run(ledger)
    began = f"{run['status']}, seed {run['seed']}, of {run['commit'][:7]}, begun {run['time']}"
    lines = {"last_run": began}
    if run["status"] == "finished":
        lines["val_bpb"] = f"{run['val_bpb']:.6f}"
        lines |= record.describe_value(run, record.read_runs(), ledger.branch)
    lines["its_row"] = find_row(run, ledger) or "none yet: log it, or run what else it needs"
    print(*(f"{name + ':':<18}{value}" for name, value in lines.items()), sep="\n")
