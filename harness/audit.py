"""What in ledger, git and records does not fit together. Locked, and free of torch."""

from collections import Counter
from dataclasses import dataclass

from harness import record
from harness.record import ROOT, Value, git


@dataclass
class Row:
    """A row of a ledger, its run and the runs that its value is the mean of, if on record here."""

    number: int
    commit: str
    val_bpb: float
    status: str
    text: str
    run: dict | None
    seeds: list[dict]

    @property
    def value(self) -> Value:
        return Value(self.val_bpb, len({run["seed"] for run in self.seeds}) or 1)


def read_text(name: str) -> str:
    """Return a ledger: a file, or results.tsv of a branch or commit."""
    if (ROOT / name).is_file():
        return (ROOT / name).read_text(errors="replace")
    for ref in (name, f"origin/{name}"):
        if text := git("show", f"{ref}:./results.tsv", default=""):
            return text
    raise SystemExit(f"{name}: no such file here, and no branch or commit with a results.tsv")


def read_rows(text: str, runs: list[dict]) -> tuple[list[Row], list[str]]:
    """Return the rows of a ledger, and a sentence for each line that is none."""
    logged = {run["log"]["row"]: run for run in runs if "log" in run}
    by_id = {run["id"]: run for run in runs}
    rows, faults = [], []
    for number, line in enumerate(text.splitlines()[1:], 1):
        try:
            commit, val_bpb, _, status, _ = line.split("\t")
            run = logged.get(line)
            seeds = [by_id[name] for name in run["log"]["runs"] if name in by_id] if run else []
            rows.append(Row(number, commit, float(val_bpb), status, line, run, seeds))
        except ValueError:
            faults.append(f"row {number} can't be read: {line[:80]!r}")
    return rows, faults


def check_run(row: Row, before: list[Row]) -> list[str]:
    """Compare a row with its run, and with those of the rows before it."""
    if not row.run:
        return ["no run on record was logged with these words and values"]
    faults, last = [], next((other.run for other in before[::-1] if other.run), row.run)
    mean = record.average(row.seeds)[row.run["train_sha256"]].mean if row.seeds else 0.0
    if f"{mean:.6f}" != f"{row.val_bpb:.6f}":
        faults.append(f"its val_bpb is {row.val_bpb:.6f}, the mean of its runs {mean:.6f}")
    for name in ("harness", "device"):
        if row.run[name] != last[name]:
            faults.append(f"its {name} is {row.run[name]}, that of the row before {last[name]}")
    for other in before:
        if other.run and other.run["train_sha256"] == row.run["train_sha256"]:
            faults.append(f"its train.py is that of row {other.number}")
    return faults


def check_keep(row: Row, best: Row, noise: float) -> tuple[list[str], list[str]]:
    """Return what is wrong with a keep, given the best one before it, and what may be."""
    difference = row.val_bpb - best.val_bpb
    said = f"kept with {row.val_bpb:.6f} where {best.val_bpb:.6f} was kept before"
    if not noise:
        return [], [f"{said}, with no noise known"] * (difference >= 0)
    times = difference / record.noise_of_difference(noise, row.value, best.value)
    said = f"{said}, {times:+.2f} x the noise of the difference"
    if times >= 1:
        return [said], []
    return [], [f"{said}: right only if it is simpler"] * (times > -1)


def check_commit(row: Row, before: Row) -> list[str]:
    """Compare the commit of a kept row with the one that was kept before it."""
    for commit in (row.commit, before.commit):
        if not git("rev-parse", "-q", "--verify", f"{commit}^0", default=""):
            return [f"git does not have its commit {commit}"] * (commit == row.commit)
    others = ("--", ".", ":!train.py", ":!results.tsv")
    changed = git("diff", "--name-only", before.commit, row.commit, *others).split("\n")
    return [f"its commit changed {', '.join(changed)[:100]}, not train.py alone"] * (
        changed != [""]
    )


def find_missing(rows: list[Row], runs: list[dict]) -> list[str]:
    """Find rows that were logged and are not there, and runs that have none."""
    found = [row.run for row in rows if row.run]
    if not found:
        return []
    places = Counter((run["repository"], run["log"]["branch"]) for run in found)
    repository, branch = places.most_common(1)[0][0]
    texts, versions = {row.text for row in rows}, {run["train_sha256"] for run in found}
    faults, last = [], max(run["id"] for run in found)
    for run in runs:
        entry = run.get("log", {})
        if run["repository"] != repository:
            continue
        if entry.get("branch") == branch and entry["row"] not in texts:
            faults.append(f"logged on {branch}, but not in the ledger: {entry['row']!r}")
        within = found[0]["id"] <= run["id"] <= last and run["train_sha256"] not in versions
        if within and run["status"] == "finished" and not entry:
            faults.append(f"a run has no row: {run['val_bpb']:.6f}, begun {run['time']}")
    return faults


def audit(name: str = "results.tsv") -> tuple[list[str], list[str]]:
    """Return what does not fit together in a ledger, and what a person may want to judge."""
    runs = record.read_runs()
    rows, faults = read_rows(read_text(name), runs)
    recorded = [row.run for row in rows if row.run]
    finished = [run for run in runs if recorded and record.comparable(recorded[-1], run)]
    noise, best, remarks = record.estimate_noise(finished), None, []
    if rows and not recorded:
        remarks.append("no run of these rows is on record on this machine: values not checked")
    for index, row in enumerate(rows):
        wrong = check_run(row, rows[:index]) if recorded else []
        doubtful = []
        if row.status == "keep" and best:
            wrong += check_commit(row, best)
            worse, doubtful = check_keep(row, best, noise)
            wrong += worse
        if row.status == "keep" and (not best or row.val_bpb < best.val_bpb):
            best = row
        faults += [f"row {row.number} ({row.commit}, {row.status}): {fault}" for fault in wrong]
        remarks += [f"row {row.number} ({row.commit}, {row.status}): {each}" for each in doubtful]
    return faults + find_missing(rows, runs), remarks


def print_audit(names: list[str]) -> int:
    """Print the audit of ledgers; return 1 if something does not fit together."""
    status = 0
    for name in names:
        faults, remarks = audit(name)
        print(*faults, *remarks, sep="\n", end="\n" if faults or remarks else "")
        print(f"{name}: {len(faults) or 'no'} faults, {len(remarks)} remarks")
        status |= bool(faults)
    return status
