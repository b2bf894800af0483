"""Speed and memory of prepare.py on much text: uv run tests/bench_prepare.py [--gigabytes 2] [--format jsonl]

Makes a corpus of documents as long as those of the web (median about 500 tokens, a long tail) out of the sources of the
installed packages, prepares it with the command, looks at the memory of that process once a second, then checks it.
"""

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = Path(torch.__file__).parent.parent
CHARACTERS_PER_TOKEN = 3.5  # of these sources, about
CHECK = """import sys, time, prepare
corpus, _ = prepare.choose_corpus(sys.argv[1])
begin = time.perf_counter()
prepare.check(corpus)
print(time.perf_counter() - begin)"""


def documents(size: int) -> Iterator[str]:
    """Documents of `size` bytes together, each unlike all others: pieces of real text with a number in between."""
    text = "\n".join(path.read_text(errors="ignore") for path in sorted(PACKAGES.glob("*/**/*.py"))[:4000])
    text, rng, done = re.sub(r"\n{2,}", "\n", text.replace("\r", "").replace("\0", "")), random.Random(0), 0
    for number in itertools.count():
        length = int(min(rng.lognormvariate(6.2, 1.2), 100_000) * CHARACTERS_PER_TOKEN)
        at = rng.randrange(len(text) - length)
        document = f"{text[at : at + length // 2]} {number} {text[at + length // 2 : at + length]}"
        yield document
        if (done := done + len(document.encode())) >= size:
            return


def write_corpus(folder: Path, size: int, kind: str) -> None:
    """Write documents as one file."""
    path, texts = folder / f"corpus.{kind}", documents(size)
    if kind == "parquet":
        schema = pa.schema([("text", pa.string())])
        with pq.ParquetWriter(path, schema) as file:
            while batch := list(itertools.islice(texts, 10_000)):
                file.write_table(pa.table({"text": batch}, schema=schema))
    else:
        with path.open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" if kind == "jsonl" else f"{text}\n\n" for text in texts)


def memory(pid: int) -> dict[str, float]:
    """MB of a process: all, what is its own, and what the system can take back."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon", "RssFile") if name in lines}


def timed(command: list[str], folder: Path) -> tuple[float, float, list[tuple[float, int, dict[str, float]]]]:
    """Run a command; returns seconds, seconds of all cores, and (seconds, bytes of tokens, memory) once a second."""
    begin, before, samples = time.perf_counter(), os.times(), []
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while process.poll() is None:
            seen = memory(process.pid)
            if "VmRSS" in seen:
                size = sum(path.stat().st_size for path in folder.glob("cache/*/train_*.tokens*"))
                samples.append((time.perf_counter() - begin, size, seen))
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                continue
    seconds, after = time.perf_counter() - begin, os.times()
    if process.returncode:
        sys.exit((folder / "log").read_text())
    return seconds, sum(after[2:4]) - sum(before[2:4]), samples


def read_all(paths: list[Path]) -> float:
    """Seconds that cat takes."""
    begin = time.perf_counter()
    subprocess.run(["cat", *paths], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--format", choices=("jsonl", "txt", "parquet"), default="jsonl")
    parser.add_argument("--verbose", action="store_true", help="every sample")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, text = Path(name), Path(name) / "text"
        text.mkdir()
        write_corpus(text, int(arguments.gigabytes * 1e9), arguments.format)
        megabytes = sum(path.stat().st_size for path in text.iterdir()) / 1e6
        print(f"{arguments.format}: {arguments.gigabytes} GB of text, {megabytes:.0f} MB on disk", flush=True)
        os.environ |= {"AUTORESEARCH_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "prepare.py", "--corpus", str(text)]
        seconds, cpu, samples = timed(command, folder)
        tokens = sum(path.stat().st_size for path in folder.glob("cache/*/train_*.tokens")) / 2e6
        used = f"{cpu / seconds / os.cpu_count():.0%} of {os.cpu_count()} cores"
        print(f"prepare: {seconds:.1f} s, {arguments.gigabytes * 1e3 / seconds:.1f} MB/s of text, {used}")
        writing = [sample for sample in samples if sample[1]]
        if len(writing) > 1:
            (begin, first, _), (end, last, _) = writing[0], writing[-1]
            speed = (last - first) / 2e6 / (end - begin)
            print(f"{tokens:.1f} M tokens, {speed:.2f} M/s from {begin:.0f} s on, when the first were written")
        for what in samples[-1][2]:
            quarters = [[m[what] for at, _, m in samples if q <= 4 * at / seconds < q + 1] for q in range(4)]
            peaks = ", ".join(f"{max(quarter):.0f}" for quarter in quarters if quarter)
            print(f"{what}: peak {max(m[what] for *_, m in samples):.0f} MB; in each quarter of the time {peaks}")
        for at, size, seen in samples if arguments.verbose else ():
            print(f"{at:7.1f} s {size / 2e6:8.1f} M tokens", *(f"{k} {v:.0f}" for k, v in seen.items()))
        files = [path for path in folder.glob("cache/*/*") if path.name != "lock"]
        size = sum(path.stat().st_size for path in files) / 1e6
        read_all(files)
        cat = read_all(files)
        took = timed([*command, "check"], folder)[0]
        timed([sys.executable, "-c", CHECK, str(text)], folder)
        checked = float((folder / "log").read_text())
        print(f"check: {size:.0f} MB in {checked:.2f} s, {took:.1f} s with Python's start: {size / checked:.0f} MB/s")
        print(f"cat: {size / cat:.0f} MB/s")


if __name__ == "__main__":
    main()
