"""How fast make_dataloader is, and whether a training loop waits for it: uv run tests/bench_loader.py [--help]

Documents with the lengths of web text (median about 500 tokens, long tail), made of the Python corpus, are prepared in
a temporary cache. Then the same rows come from make_dataloader and from a plain reference: tiktoken as it goes, a
linear scan of 1000 documents for the best fit, Python lists. Last, train.py trains on the corpus that this machine
prefers, and the time in which it waits for batches is taken.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare
import train

B, T = 128, 2048


def write_web_like(path, megabytes):
    """A parquet file of texts with log-normal lengths: median 1700 bytes, some of 100 KB."""
    rng, (corpus, _) = np.random.default_rng(0), prepare.choose_corpus("python")
    pieces = prepare.local_documents(prepare.find_sources(corpus), "train", corpus, prepare.make_meter())
    pieces = itertools.cycle(pieces)
    texts, size = [], 0
    while size < megabytes * 1e6:
        text, length = "", int(rng.lognormal(np.log(1700), 1.1)) + 20
        while len(text) < length:
            text += next(pieces) + "\n\n"
        texts.append(text[:length])
        size += length
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")


def reference_batches(texts, tokenizer):
    """Batches as scripts of this kind usually make them: tokenize 128 texts at a time, scan the buffer, fill lists."""
    bos, buffer, encode = tokenizer.get_bos_token_id(), [], tokenizer.encoding.encode_ordinary_batch
    documents = ([bos, *ids] for batch in texts for ids in encode(batch, num_threads=os.cpu_count()))
    while True:
        rows = []
        for _ in range(B):
            row = []
            while len(row) < T + 1:
                while len(buffer) < 1000:
                    buffer.append(next(documents))
                room, best, best_length = T + 1 - len(row), -1, 0
                for i, ids in enumerate(buffer):
                    if best_length < len(ids) <= room:
                        best, best_length = i, len(ids)
                if best < 0:
                    best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
                row.extend(buffer.pop(best)[:room])
            rows.append(row)
        batch = torch.tensor(rows, dtype=torch.long)
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


MEMORY = """
import itertools, prepare, sys
resident = lambda: int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) / 1024
tokenizer = prepare.Tokenizer(prepare.choose_corpus(sys.argv[1])[0])
before = resident()
for _ in itertools.islice(prepare.make_dataloader(tokenizer, 128, 2048, "train"), 300):
    pass
print(f"memory of the loader: {resident() - before:.0f} MiB more after 300 batches than before")
"""


def timed(loader, waits):
    """The loader's batches, with the seconds that each was waited for."""
    while True:
        begin = time.perf_counter()
        batch = next(loader)
        waits.append(time.perf_counter() - begin)
        yield batch


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--megabytes", type=int, default=100, help="of text (default 100)")
parser.add_argument("--batches", type=int, default=30, help="of the reference; ten times as many of ours (default 30)")
parser.add_argument("--seconds", type=float, default=60, help="of training (default 60; 0: none)")
parser.add_argument("--corpus", help="to train on, as for train.py")
arguments = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    os.environ["AUTORESEARCH_CACHE"] = f"{folder}/cache"
    Path(folder, "text").mkdir()
    write_web_like(Path(folder, "text", "web.parquet"), arguments.megabytes)
    corpus, _ = prepare.choose_corpus(f"{folder}/text")
    prepare.prepare(corpus)
    tokenizer = prepare.Tokenizer(corpus)
    files = prepare.read_manifest(corpus.directory)["files"]

    documents = [ids for ids, _ in itertools.takewhile(lambda d: d[1] == 1, prepare.train_documents(corpus, 42))]
    lengths = np.array([len(ids) for ids in documents])
    print(
        f"{len(lengths)} documents of {np.median(lengths):.0f} tokens in the median, {lengths.mean():.0f} in the mean"
    )
    texts = [tokenizer.decode(ids[1:].tolist()) for ids in documents]

    for cold in (True, False):
        if cold:
            for name in files:
                with (corpus.directory / name).open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        next(prepare.make_dataloader(tokenizer, B, T, "train"))
        seconds = time.perf_counter() - begin
        print(f"first batch after {seconds:.3f} s, {'not ' * cold}in the page cache", flush=True)

    subprocess.run([sys.executable, "-c", MEMORY, f"{folder}/text"], cwd=prepare.ROOT, check=True)
    ours = prepare.make_dataloader(tokenizer, B, T, "train")
    reference = reference_batches((texts[i : i + 128] for i in itertools.cycle(range(0, len(texts), 128))), tokenizer)
    same = all(
        torch.equal(x, x_reference) and torch.equal(y, y_reference)
        for (x, y, _), (x_reference, y_reference) in itertools.islice(
            zip(ours, reference, strict=False), min(arguments.batches, int(lengths.sum() // (2 * B * T)))
        )
    )
    print(f"rows identical to the reference's: {same}", flush=True)
    speeds = {}
    for name, batches, count in (
        ("reference", reference, arguments.batches),
        ("ours", ours, 10 * arguments.batches),
        ("reference again", reference, arguments.batches),
        ("ours again", ours, 10 * arguments.batches),
    ):
        begin = time.perf_counter()
        for _ in itertools.islice(batches, count):
            pass
        speeds[name] = count * B * T / (time.perf_counter() - begin)
        print(f"{name:<16}{speeds[name] / 1e6:>8.2f}M tokens a second", flush=True)
    print(f"ratio {speeds['ours'] / speeds['reference']:.1f}, {speeds['ours again'] / speeds['reference again']:.1f}")
    ours.close()

    if arguments.seconds:
        waits, make = [], prepare.make_dataloader
        prepare.TIME_BUDGET, sys.argv = arguments.seconds, ["train.py"]
        if arguments.corpus:
            sys.argv += ["--corpus", arguments.corpus]
        train.make_dataloader = lambda *options: timed(make(*options), waits)
        train.main()
        share = 100 * sum(waits[1:]) / arguments.seconds
        print(f"waited for batches: {share:.3f} % of {arguments.seconds:.0f} s of training")
