"""How fast make_dataloader is: uv run dev/bench_loader.py

It is compared with a plain loader that has the same rows. Documents as long as those of the web
(median 1700 bytes, a long tail), made of the corpus python, are prepared in a temporary cache. The
plain loader tokenizes as it goes, scans 1000 documents for the best fit and fills Python lists.
"""

import argparse
import itertools
import os
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

B, T = 128, 2048


def write_web_like(path: Path, megabytes: int) -> None:
    """Write a parquet file of texts with log-normal lengths."""
    corpus, rng = prepare.choose_corpus("python"), np.random.default_rng(0)
    sources = prepare.find_sources(corpus)
    pieces = itertools.cycle(prepare.local_documents(sources, corpus, "train"))
    texts, size = [], 0
    while size < megabytes * 1e6:
        text, length = "", int(rng.lognormal(np.log(1700), 1.1)) + 20
        while len(text) < length:
            text += next(pieces) + "\n\n"
        texts.append(text[:length])
        size += length
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")


def make_plain_loader(texts: list[str], tokenizer: prepare.Tokenizer):
    """Yield batches as scripts of this kind usually make them."""
    bos, buffer, encode = (
        [tokenizer.get_bos_token_id()],
        [],
        tokenizer.encoding.encode_ordinary_batch,
    )
    batches = (texts[at : at + 128] for at in itertools.cycle(range(0, len(texts), 128)))
    documents = (
        bos + ids for batch in batches for ids in encode(batch, num_threads=os.cpu_count())
    )
    while True:
        rows = []
        for _ in range(B):
            row = []
            while len(row) < T + 1:
                buffer.extend(itertools.islice(documents, 1000 - len(buffer)))
                room = T + 1 - len(row)
                fitting = [i for i, ids in enumerate(buffer) if len(ids) <= room]
                best = max(fitting, key=lambda i: len(buffer[i]), default=None)
                if best is None:
                    best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
                row.extend(buffer.pop(best)[:room])
            rows.append(row)
        batch = torch.tensor(rows)
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def main() -> None:
    """Print tokens a second of both, interleaved."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--megabytes", type=int, default=100, help="of text (default: 100)")
    parser.add_argument("--batches", type=int, default=30, help="of the plain loader (default: 30)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTORESEARCH_CACHE"] = f"{folder}/cache"
        Path(folder, "text").mkdir()
        write_web_like(Path(folder, "text", "web.parquet"), arguments.megabytes)
        corpus = prepare.choose_corpus(f"{folder}/text")
        prepare.prepare(corpus)
        tokenizer = prepare.Tokenizer(corpus)
        documents = prepare.train_documents(corpus, prepare.SEED, (0, 1))
        once = itertools.takewhile(lambda document: document[1] == 1, documents)
        texts = [tokenizer.decode(ids[1:].tolist()) for ids, _ in once]
        ours = prepare.make_dataloader(tokenizer, B, T, "train")
        plain = make_plain_loader(texts, tokenizer)
        pairs = itertools.islice(zip(ours, plain, strict=False), 5)
        same = all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)
        print(f"{len(texts)} documents; rows identical to the plain loader's: {same}")
        for _ in range(2):
            seconds = {}
            for name, loader, count in (("plain", plain, 1), ("ours", ours, 10)):
                start = time.perf_counter()
                for _ in itertools.islice(loader, count * arguments.batches):
                    pass
                seconds[name] = (time.perf_counter() - start) / count
                speed = arguments.batches * B * T / seconds[name] / 1e6
                print(f"{name:<8}{speed:>8.2f}M tokens a second", flush=True)
            print(f"ratio {seconds['plain'] / seconds['ours']:.1f}")
        ours.close()


if __name__ == "__main__":
    main()
