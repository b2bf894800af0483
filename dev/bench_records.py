"""How long the books take when the cache folder holds many runs.

uv run dev/bench_records.py               # 100, 1000 and 10,000 runs
uv run dev/bench_records.py --runs 5000

A clone of this repository gets a branch with a baseline; the other runs are those of other folders
on the same device. Timed are commands as an agent gives them.
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from harness import record

JUDGE = record.digest(record.judge_sources())
DESCRIBE = """
import json, sys, time
from harness import record
run = record.own_runs(record.read_runs())[-1]
start = time.perf_counter()
record.describe_value(run)
print(time.perf_counter() - start)
"""


def git(clone: Path, *words: str) -> str:
    """Return what git prints in a clone."""
    command = ["git", "-C", clone, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write_run(number: int, repository: str, commit: str, source: bytes) -> None:
    """Write the folder of a finished run."""
    run = {
        "id": f"20261101-{number // 3600:06d}-{number:06d}-1",
        "status": "finished",
        "repository": repository,
        "commit": commit,
        "train_sha256": hashlib.sha256(source).hexdigest(),
        "judge": JUDGE,
        "harness": "0123456789ab",
        "device": "NVIDIA H100 80GB HBM3",
        "seed": 42 + number % 3,
        "host": "node",
        "pid": 1,
        "val_bpb": 1 + random.gauss(0, 0.01),
        "peak_vram_mb": 45000.0,
        "num_steps": 950.0,
        "log": {},
    }
    record.create_run(run, source).close()


def measure(folder: Path, runs: int) -> dict[str, float]:
    """Return the seconds that commands take beside so many runs."""
    clone, cache = folder / "clone", folder / "cache"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    git(clone, "checkout", "-qB", "main")
    git(clone, "checkout", "-qb", "autoresearch/bench")
    os.environ["AUTORESEARCH_CACHE"] = str(cache)
    commit = git(clone, "rev-parse", "HEAD")
    source = (clone / "train.py").read_bytes()
    for number in range(runs):
        idea = source + f"\n# idea {number // 3}\n".encode()
        write_run(number, f"/home/night-{number % 16}", commit, idea)
    own = 3 * (runs // 3 + 1)  # of seed 42
    write_run(own, str(clone), commit, source)
    seconds = {}

    def time_command(name: str, *words: str) -> str:
        command = [sys.executable, *words]
        start = time.perf_counter()
        result = subprocess.run(command, cwd=clone, capture_output=True, text=True)
        seconds[name] = time.perf_counter() - start
        if result.returncode:
            raise SystemExit(f"{name} failed: {result.stdout}{result.stderr}")
        return result.stdout

    time_command("log keep", "prepare.py", "log", "keep", "baseline")
    time_command("log", "prepare.py", "log")
    time_command("runs", "prepare.py", "runs")
    time_command("audit", "prepare.py", "audit")
    seconds["summary"] = float(time_command("Python and git", "-c", DESCRIBE))
    del seconds["Python and git"]
    return seconds


def main() -> None:
    """Print a row for each number of runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 1000, 10_000])
    for runs in parser.parse_args().runs:
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(Path(folder), runs)
        cells = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        print(f"{runs} runs: {cells}", flush=True)


if __name__ == "__main__":
    main()
