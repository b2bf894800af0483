"""What in ledger, git and records does not fit together. Locked, and free of torch."""

from harness import record
from harness.record import ROOT, Value, git


def read_lines(name: str) -> list[str]:
    """Return the lines of a ledger, which is a file, a branch or a commit."""
    path = ROOT / name
    if path.is_file():
        text = path.read_text("utf-8-sig", "replace")
    else:
        text = git("show", f"{name}:./results.tsv")
    return text.splitlines()


def find_seeds(run: dict, runs: list[dict]) -> list[dict]:
    """Return the runs that the row of a run is the mean of."""
    return [other for other in runs if other["id"] in run["log"]["runs"]]


def check_run(run: dict, seeds: list[dict], value: Value | None, before: list[dict]) -> list[str]:
    """Compare a row with its runs and their value, and with the runs of the rows before it."""
    faults = []
    _, val_bpb, *_ = run["log"]["row"].split("\t")
    if value and abs(value.mean - float(val_bpb)) > 1e-6:
        faults.append(f"its val_bpb is {val_bpb}, the mean of its runs {value.mean:.6f}")
    if any(other["repository"] != run["repository"] for other in seeds):
        faults.append("its value has runs of another folder")
    scored = [other for other in before if other["log"]["status"] != "crash"]
    if value and scored and not record.comparable(run, scored[-1]):
        faults.append("it does not compare with the row before: another harness, or device")
    if run["train_sha256"] in [other["train_sha256"] for other in scored]:
        faults.append("its train.py has a row already")
    return faults


def check_keep(value: Value, best: Value, noise: float) -> list[str]:
    """Compare a keep with the best one before it.

    Less than the noise worse may be simpler. Noise and values move later, so twice that is a fault.
    """
    difference = value.mean - best.mean
    scale = record.noise_of_difference(noise, value, best)
    if difference <= 2 * scale or not noise:
        return []
    seen = f"kept with {value.mean:.6f} after {best.mean:.6f}"
    return [f"{seen}, worse by {difference / scale:.2f} x the noise of the difference"]


def find_missing(rows: list[str], logged: list[dict], runs: list[dict]) -> list[str]:
    """Find rows that were logged and are not there, and runs that have none."""
    if not logged:
        return []
    faults = []
    last = logged[-1]
    versions = {run["train_sha256"] for run in logged}
    ids = sorted(run["id"] for run in logged)
    for run in runs:
        entry = run["log"]
        if run["repository"] != last["repository"]:
            continue
        if entry.get("branch") == last["log"]["branch"] and entry["row"] not in rows:
            faults.append(f"logged, but not in the ledger: {entry['row']!r}")
        is_unlogged = run["status"] == "finished" and not entry
        is_within = ids[0] <= run["id"] <= ids[-1]
        if is_unlogged and is_within and run["train_sha256"] not in versions:
            faults.append(f"a run has no row: {run['val_bpb']:.6f}, run {run['id']}")
    return faults


def audit(name: str) -> list[str]:
    """Return what does not fit together in a ledger, a sentence each."""
    rows = read_lines(name)[1:]
    runs = record.read_runs()
    by_row = {run["log"].get("row"): run for run in runs}
    logged = [by_row[row] for row in rows if row in by_row]
    alike = record.find_comparable(logged[-1], runs) if logged else []
    noise = record.estimate_noise(alike)
    faults = []
    before, best = [], None
    for number, row in enumerate(rows, 1):
        wrong = []
        if run := by_row.get(row):
            seeds = find_seeds(run, runs)
            value = record.average(seeds).get(run["train_sha256"])
            wrong += check_run(run, seeds, value, before)
            before.append(run)
            if value and run["log"]["status"] == "keep":
                wrong += check_keep(value, best or value, noise)
                best = min(best or value, value)
        elif logged:
            wrong.append("no run on record was logged with these words and values")
        commit, *_ = row.split("\t")
        if not git("rev-parse", f"{commit}^0", default=""):
            wrong.append("git does not have its commit")
        faults += [f"row {number} ({commit[:80]}): {each}" for each in wrong]
    return faults + find_missing(rows, logged, runs)


def print_audit(names: list[str]) -> bool:
    """Print the audit of ledgers; return whether something does not fit together."""
    found = {name: audit(name) for name in names}
    for name, faults in found.items():
        print(*faults, f"{name}: {len(faults) or 'no'} faults", sep="\n")
    return any(found.values())
