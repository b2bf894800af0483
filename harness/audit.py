"""What in ledger, git and records does not fit together. Locked, and free of torch."""

from dataclasses import dataclass

from harness import record
from harness.record import ROOT, Value, git


@dataclass
class Row:
    """A row of a ledger, its run and the runs that its value is the mean of, if on record here."""

    number: int
    commit: str
    status: str
    text: str
    value: Value
    run: dict | None
    seeds: list[dict]


def read_rows(name: str, runs: list) -> tuple[list, list]:
    """Return the rows of a ledger, a file or a branch, and what can't be read, a sentence each."""
    rows, faults = [], []
    path = ROOT / name
    text = path.read_text() if path.is_file() else git("show", f"{name}:./results.tsv")
    logged = {run["log"].get("row"): run for run in runs}
    for number, line in enumerate(text.splitlines()[1:], 1):
        try:
            commit, val_bpb, _, status, _ = line.split("\t")
            run = logged.get(line)
            ids = run["log"]["runs"] if run else []
            seeds = [other for other in runs if other["id"] in ids]
            num_seeds = len({other["seed"] for other in seeds})
            value = Value(float(val_bpb), num_seeds or 1)
            rows.append(Row(number, commit, status, line, value, run, seeds))
        except ValueError:
            faults.append(f"row {number} can't be read: {line[:80]!r}")
    return rows, faults


def check_run(row: Row, before: list[Row]) -> list[str]:
    """Compare a row with its run, and with those of the rows before it."""
    if not row.run:
        return ["no run on record was logged with these words and values"]
    faults, others = [], [other.run for other in before if other.run]
    for value in record.average(row.seeds).values():
        if abs(value.mean - row.value.mean) > 1e-6:
            seen = f"its val_bpb is {row.value.mean:.6f}"
            faults.append(f"{seen}, the mean of its runs {value.mean:.6f}")
    for name in ("harness", "device"):
        if others and row.run[name] != others[-1][name]:
            faults.append(f"its {name} is {row.run[name]}, before it {others[-1][name]}")
    versions = [other["train_sha256"] for other in others]
    if row.run["train_sha256"] in versions:
        faults.append("its train.py has a row already")
    return faults


def check_keep(row: Row, best: Row, noise: float) -> list[str]:
    """Compare a keep with the best one before it: less than the noise worse may be simpler."""
    difference = row.value.mean - best.value.mean
    limit = record.noise_of_difference(noise, row.value, best.value)
    if difference <= limit or not noise:
        return []
    seen = f"kept with {row.value.mean:.6f} after {best.value.mean:.6f}"
    return [f"{seen}, worse by {difference / limit:.2f} x the noise of the difference"]


def find_missing(rows: list[Row], runs: list) -> list[str]:
    """Find rows that were logged and are not there, and runs that have none."""
    found = [row.run for row in rows if row.run]
    if not found:
        return []
    branch, repository = found[-1]["log"]["branch"], found[-1]["repository"]
    texts, faults = {row.text for row in rows}, []
    versions = {run["train_sha256"] for run in found}
    ids = sorted(run["id"] for run in found)
    for run in (run for run in runs if run["repository"] == repository):
        if run["log"].get("branch") == branch and run["log"]["row"] not in texts:
            faults.append(f"logged, but not in the ledger: {run['log']['row']!r}")
        unlogged = run["status"] == "finished" and not run["log"]
        within = ids[0] <= run["id"] <= ids[-1]
        if unlogged and within and run["train_sha256"] not in versions:
            faults.append(f"a run has no row: {run['val_bpb']:.6f}, begun {run['time']}")
    return faults


def audit(name: str) -> list[str]:
    """Return what does not fit together in a ledger, a file or a branch, a sentence each."""
    runs, best = record.read_runs(), None
    rows, faults = read_rows(name, runs)
    recorded = [row.run for row in rows if row.run]
    alike = record.find_comparable(recorded[-1], runs) if recorded else []
    noise = record.estimate_noise(alike)
    for index, row in enumerate(rows):
        wrong = check_run(row, rows[:index]) if recorded else []
        if not git("rev-parse", f"{row.commit}^0", default=""):
            wrong.append("git does not have its commit")
        if row.status == "keep":
            wrong += check_keep(row, best or row, noise)
            best = best if best and best.value <= row.value else row
        faults += [f"row {row.number} ({row.commit}, {row.status}): {each}" for each in wrong]
    return faults + find_missing(rows, runs)


def print_audit(names: list[str]) -> bool:
    """Print the audit of ledgers; return whether something does not fit together."""
    found = {name: audit(name) for name in names}
    for name, faults in found.items():
        summary = f"{name}: {len(faults) or 'no'} faults"
        print(*faults, summary, sep="\n")
    return any(found.values())
