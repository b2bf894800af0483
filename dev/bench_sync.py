"""What a device synchronize after every step costs: uv run tests/bench_sync.py [--steps 30]. Needs a CUDA device.

Steps of train.py on one batch, in turns of a few with a synchronize after each step and a few with one at the end.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import prepare
import train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=30, help="of each kind (default 30)")
parser.add_argument("--corpus", help="as for train.py")
arguments = parser.parse_args()
if not torch.cuda.is_available():
    raise SystemExit(
        "there is no CUDA device: on a CPU a step has ended when it returns, and nothing is to be measured"
    )

corpus, _ = prepare.choose_corpus(arguments.corpus)
prepare.prepare(corpus)
run = prepare.Run(corpus, prepare.Tokenizer(corpus), prepare.get_device(), prepare.SEED)
dtype, compiled, _ = train.choose_precision(run.device)
backend, _ = train.choose_attention(run.device, compiled)
config = train.Config(
    corpus.vocab_size, corpus.seq_len, train.DEPTH, train.HEAD_DIM, train.ASPECT_RATIO, train.WINDOW_PATTERN
)
attention = train.Attention(backend, corpus.seq_len, set(config.windows), run.device)
model = train.GPT(config, attention, dtype).to(run.device)
forward, optimizer, rows = train.fit(run, model, compiled)
batch = next(prepare.make_dataloader(run.tokenizer, rows, corpus.seq_len, "train"))[:2]
batches = [batch] * (train.TOTAL_BATCH_SIZE // (rows * corpus.seq_len))
seconds = {True: 0.0, False: 0.0}
for _ in range(-(-arguments.steps // 5)):
    for every_step in seconds:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(5):
            train.train_step(forward, optimizer, batches)
            if every_step:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        seconds[every_step] += time.perf_counter() - begin
ratio = seconds[True] / seconds[False]
print(f"{torch.cuda.get_device_name()}: with a synchronize after every step they take {ratio:.4f} times as long")
