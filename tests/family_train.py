"""A train script of the family with a clock of its own: it knows only prepare.py's public names."""

import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, evaluate_bpb, make_dataloader

WIDTH, HEADS, DEPTH, ROWS, SECONDS = 64, 2, 2, 4, 4
device = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.tokens, self.positions = (
            nn.Embedding(vocab_size, WIDTH),
            nn.Embedding(MAX_SEQ_LEN, WIDTH),
        )
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)

    def forward(self, ids, targets=None):
        logits = self.head(self.blocks(self.tokens(ids) + self.positions.weight[: ids.shape[1]]))
        return (
            logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        )


tokenizer = Tokenizer.from_directory()
model = Model(tokenizer.get_vocab_size()).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loader = make_dataloader(tokenizer, ROWS, MAX_SEQ_LEN, "train")
x, y, epoch = next(loader)
begin, steps = time.time(), 0
while (elapsed := time.time() - begin) < min(TIME_BUDGET, SECONDS):
    for group in optimizer.param_groups:
        group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * elapsed / SECONDS))
    model(x, y).backward()
    x, y, epoch = next(loader)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    steps += 1
model.eval()
print(f"val_bpb:          {evaluate_bpb(model, tokenizer, 64):.6f}")
text = tokenizer.decode(x[0, :8].tolist())
print(f"steps:            {steps} of {TIME_BUDGET} s, epoch {epoch}, {text!r}")
