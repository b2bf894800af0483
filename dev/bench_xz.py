"""What a general compressor makes of the validation text: uv run dev/bench_xz.py

The text is that of the validation rows, in their order, without special tokens: the bytes that
val_bpb counts. xz -9e is given all of it, and nothing of the training text.
"""

import argparse
import lzma
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--corpus", help="as for train.py")
corpus = prepare.choose_corpus(parser.parse_args().corpus)
prepare.prepare(corpus)
tokens = prepare.Tokenizer(corpus).tokens()
text = b"".join(tokens[i] for i in prepare.read_val_rows(corpus)[:, 1:].flatten())
packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
print(f"xz -9e: {len(text)} bytes to {packed}: {8 * packed / len(text):.6f} bits per byte")
