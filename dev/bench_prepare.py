"""Speed and memory of prepare.py on much text: uv run dev/bench_prepare.py [--gigabytes 2]

Makes a .jsonl of documents as long as those of the web out of the sources of installed packages,
prepares it with the command, then checks it.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = Path(torch.__file__).parent.parent


def make_documents(size: int) -> Iterator[str]:
    """Yield documents of `size` bytes together: real text with a number in it, so none repeats."""
    paths = sorted(PACKAGES.glob("*/**/*.py"))[:4000]
    text, rng, done = (
        "\n".join(path.read_text(errors="ignore") for path in paths),
        random.Random(0),
        0,
    )
    for number in itertools.count():
        length = int(min(rng.lognormvariate(6.2, 1.2), 100_000) * 3.5)
        at = rng.randrange(len(text) - length)
        document = f"{text[at : at + length // 2]} {number} {text[at + length // 2 : at + length]}"
        yield document
        done += len(document.encode())
        if done >= size:
            return


def run(*arguments: str) -> float:
    """Run prepare.py; return the seconds it takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "prepare.py", *arguments], cwd=ROOT, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Print MB of text a second, peak memory, and MB checked a second."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--gigabytes", type=float, default=2, help="of text (default: 2)")
    gigabytes = parser.parse_args().gigabytes
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTORESEARCH_CACHE"] = f"{folder}/cache"
        Path(folder, "text").mkdir()
        with Path(folder, "text", "text.jsonl").open("w") as file:
            for text in make_documents(int(gigabytes * 1e9)):
                file.write(json.dumps({"text": text}) + "\n")
        seconds = run("--corpus", f"{folder}/text")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"prepare: {seconds:.1f} s, {gigabytes * 1e3 / seconds:.1f} MB/s, peak {peak:.0f} MB")
        checked = run("check", "--corpus", f"{folder}/text")
        files = Path(folder, "cache", "tokens").glob("*/*")
        size = sum(path.stat().st_size for path in files) / 1e6
        print(f"check: {size:.0f} MB in {checked:.1f} s with the start of Python")


if __name__ == "__main__":
    main()
