"""Models that the judge must refuse, and one that it must not: what tests and bench_judge.py share."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import train


class Answer(nn.Module):
    """A model made of a function of ids, and of the model that it uses."""

    def __init__(self, answer, model=None):
        super().__init__()
        self.answer, self.model = answer, model

    def forward(self, ids):
        return self.answer(ids)


class Peeking(train.Attention):
    """Attention in which some heads of some blocks see `ahead` later tokens."""

    def __init__(self, model, ahead, heads, blocks):
        device = model.head.weight.device
        super().__init__("sdpa", model.config.seq_len, set(model.config.windows), device)
        self.ahead, self.heads, self.peeks = ahead, heads, False
        for index, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda *_, here=index in blocks: setattr(self, "peeks", here))

    def __call__(self, q, k, v, window):
        y = super().__call__(q, k, v, window)
        if not self.peeks:
            return y
        at = torch.arange(q.shape[1], device=q.device)
        seen = (at <= at[:, None] + self.ahead) & (at >= at[:, None] - window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        peeked = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
        return torch.where((torch.arange(y.shape[2], device=y.device) < self.heads)[:, None], peeked, y)


def round_at_random(module, inputs, output):
    """As a forward hook: round to bf16, up or down at random. No kernel whose sums come in any order is as noisy."""
    bits = output.float().view(torch.int32) + torch.randint(
        2**16, output.shape, dtype=torch.int32, device=output.device
    )
    return (bits & -(2**16)).view(torch.float32).to(output.dtype)


def noisy(model):
    """The model with every linear layer rounding at random."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(round_at_random)
    return model


def next_token(ids, vocab):
    """What a leak adds to the logits: 1 for the token that follows."""
    return F.one_hot(ids.roll(-1, 1), vocab)
