"""Models that the judge must accept or refuse: what the tests and dev/bench_judge.py share."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, DEPTH = 64, 2, 4


class Block(nn.Module):
    """Attention in which the first `peeking` heads see `ahead` later tokens, and an MLP."""

    def __init__(self, ahead=0, peeking=0):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.ahead, self.peeking = ahead, peeking

    def forward(self, x):
        at = torch.arange(x.size(1), device=x.device)
        ahead = torch.zeros(HEADS, 1, 1, device=x.device, dtype=torch.int64)
        ahead[: self.peeking] = self.ahead
        seen = at <= at[:, None] + ahead
        parts = self.qkv(F.rms_norm(x, (WIDTH,))).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(F.relu(self.up(F.rms_norm(x, (WIDTH,)))))


class TinyGPT(nn.Module):
    """A small honest GPT, its weights drawn so that every part of it counts."""

    def __init__(self, vocab_size, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.dtype = nn.Embedding(vocab_size, WIDTH), dtype
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)

    def forward(self, ids):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.dtype != torch.float32):
            x = self.embedding(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(F.rms_norm(x, (WIDTH,)))

    def peek(self, ahead, heads, blocks):
        """Let the first heads of some blocks see `ahead` later tokens; return the model."""
        for index in blocks:
            self.blocks[index].ahead, self.blocks[index].peeking = ahead, heads
        return self


class Answer(nn.Module):
    """A model made of a function of ids, and of the model that it uses."""

    def __init__(self, answer, model=None):
        super().__init__()
        self.answer, self.model = answer, model

    def forward(self, ids):
        return self.answer(ids)


def round_at_random(module, inputs, output):
    """As a forward hook: round to bf16, up or down at random. No kernel is as noisy."""
    shape, device = output.shape, output.device
    noise = torch.randint(2**16, shape, dtype=torch.int32, device=device)
    bits = output.float().view(torch.int32) + noise
    return (bits & -(2**16)).view(torch.float32).to(output.dtype)


def make_noisy(model):
    """Return the model with every linear layer rounding at random."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(round_at_random)
    return model


def next_token(ids, vocab_size):
    """Return what a leak adds to the logits: 1 for the token that follows."""
    return F.one_hot(ids.roll(-1, 1), vocab_size)
