"""What a general compressor makes of the validation text, in the unit of val_bpb: uv run tests/bench_xz.py [--corpus …]

The text is that of the validation rows, in their order, without the specials: the very bytes that val_bpb is over.
xz -9e sees all of it, with a window of 64 MiB, and nothing of the training text.
"""

import argparse
import lzma
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--corpus")
corpus, _ = prepare.choose_corpus(parser.parse_args().corpus)
prepare.prepare(corpus)
tokenizer = prepare.Tokenizer(corpus)
tokens = tokenizer.tokens()
text = b"".join(tokens[i] for i in prepare.read_val_rows(corpus)[:, 1:].flatten())
packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
print(f"xz -9e: {len(text)} bytes of validation text to {packed}: {8 * packed / len(text):.6f} bits per byte")
