"""A train.py that is done in seconds: what a clone in a test runs.

Tests of the judge and the ledger use it instead of the shipped train.py, which an agent may change.
"""

import math
import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from torch import nn

from harness.run import training_run
from prepare import make_dataloader

LR = 3e-3


class Bigram(nn.Module):
    """Predicts the next token from the last one."""

    def __init__(self, vocab_size, width=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, ids):
        return self.head(self.embedding(ids))


def main():
    with training_run(__doc__) as run:
        torch.set_num_threads(1)
        model = Bigram(run.tokenizer.get_vocab_size())
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        loader = make_dataloader(run.tokenizer, 4, 64, "train", run.seed)
        steps, run.status = 0, "training"
        run.start(model)
        while run.progress() < 1:
            x, y, _ = next(loader)
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            if not math.isfinite(loss.item()):
                raise SystemExit(f"the loss of step {steps} is {loss.item()}")
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        run.stop(model)
        run.status = "evaluating"
        run.finish(model, 64, steps, steps * 256, depth=1, mfu=0.0)


if __name__ == "__main__":
    main()
