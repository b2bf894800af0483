"""Train a GPT for five minutes and print its val_bpb. The agent's file: everything in it may change.

uv run train.py                        # the corpus that this machine prefers, seed 42
uv run train.py --corpus FOLDER        # your own text
uv run train.py --help
"""

import gc
import logging
import math
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._triton import has_triton

from harness.run import Run, training_run
from prepare import get_device, make_dataloader, train_documents

# ----------------------------------------------------------------------------------------------------------------------
# Knobs

# model
DEPTH = 8  # blocks
ASPECT_RATIO = 64  # width per block; the width is DEPTH * ASPECT_RATIO rounded up to whole heads
HEAD_DIM = 128  # width of an attention head
WINDOW_PATTERN = "SSSL"  # repeated over the blocks: S sees half of the context, L all of it; the last block is L
SMEAR = 0.5  # part of the channels that attention and MLP read from the position before
SOFT_CAP = 9.0  # logits are squeezed into ±SOFT_CAP

# n-gram tables
NGRAM_CONTEXTS = (2, 3, 4, 6, 8)  # lengths in tokens, each with its table
NGRAM_MATCHES = 3  # longest matching contexts that give candidates
NGRAM_CANDIDATES = 6  # most frequent next tokens kept for a context
NGRAM_PART = 0.5  # part of each shard that is counted; the model trains on the rest
NGRAM_MAX_TOKENS = 2**27  # no more tokens are counted
NGRAM_ROWS = 2**22  # rows of a table; each holds one context
NGRAM_SLICES = 8  # a table is filled in so many slices, to save memory

# batch
TOTAL_BATCH_SIZE = 2**19  # tokens a step
DEVICE_BATCH_SIZE = 128  # rows a micro-batch; halved by itself if it does not fit memory
HEAD_CHUNK = 2**15  # tokens whose logits are in memory at a time

# optimizer: AdamW for embeddings, head and scalars, Muon for the matrices of the blocks
EMBEDDING_LR = 0.6  # at width 768; scaled by (width / 768)^-½
HEAD_LR = 0.004  # likewise
SCALAR_LR = 0.5  # of the first embedding's scalars; the residual ones get a hundredth
ADAM_BETAS = (0.8, 0.95)
ADAM_EPS = 1e-10
NGRAM_LR = 0.0005  # of the gate of the n-gram candidates, scaled likewise
MATRIX_LR = 0.04  # times √(rows/cols) for a tall matrix
MUON_MOMENTUM = (0.85, 0.95, 300)  # from, to, over so many steps
MUON_BETA2 = 0.95  # of the variance that NorMuon evens out
WEIGHT_DECAY = 0.2  # of the matrices, falls linearly to 0

# schedule, as parts of the budget
WARMUP = 0.0
WARMDOWN = 0.5
FINAL_LR = 0.0  # at the end, as a part of the full rate

# A CPU gets through less than a hundredth of the tokens, so it gets a smaller model and batch.
if get_device().type == "cpu":
    DEPTH = 4
    TOTAL_BATCH_SIZE = 2**14
    DEVICE_BATCH_SIZE = 16
    HEAD_CHUNK = 2**10

# ----------------------------------------------------------------------------------------------------------------------
# Attention: softmax(q·k / √d) v over each position and the `window` positions before it, by the fastest way there is

FLASH_KERNEL = {"repo_id": "kernels-community/flash-attn3", "revision": "v1"}  # on the kernel hub
BACKENDS = ("flash3", "flex", "sdpa", "matmul")
FORCED_BACKEND = os.environ.get("AUTORESEARCH_ATTENTION")  # one of them


def choose_attention(device: torch.device, compiled: bool) -> tuple[str, str]:
    """Return one of BACKENDS, and why. Raises SystemExit if the one that is forced does not work."""
    if FORCED_BACKEND:
        try:
            try_attention(FORCED_BACKEND, device)
        except Exception as error:
            raise SystemExit(f"AUTORESEARCH_ATTENTION={FORCED_BACKEND} does not work: {in_a_line(error)}") from None
        return FORCED_BACKEND, "AUTORESEARCH_ATTENTION says so"
    if device.type == "cpu":
        return "matmul", "on a CPU it takes less time than scaled_dot_product_attention, half the time when compiled"
    if not compiled:
        return "sdpa", "FlexAttention has to be compiled"
    if torch.cuda.get_device_capability() != (9, 0):
        return "flex", "flash-attention 3 is made for Hopper GPUs alone"
    try:
        try_attention("flash3", device)
    except Exception as error:  # no network, no build for this PyTorch, a broken file: the run goes on without it
        return "flex", f"flash-attention 3 does not work: {in_a_line(error)}"
    return "flash3", "its kernel loaded and computes what it should"


@cache
def flash_attention() -> Callable:
    """Load flash-attention 3, without asking the hub where it was downloaded before. Raises whatever is in the way."""
    import requests
    from huggingface_hub import constants, utils
    from kernels import get_kernel, get_local_kernel, install_kernel

    logging.getLogger("kernels").setLevel(logging.ERROR)
    if FLASH_KERNEL["repo_id"] in os.environ.get("LOCAL_KERNELS", ""):  # repository=folder, a build of your own
        return get_kernel(**FLASH_KERNEL).flash_attn_func
    try:
        path = install_kernel(**FLASH_KERNEL, local_files_only=True)
    except Exception:
        if constants.HF_HUB_OFFLINE:
            raise
        pool, url = ThreadPool(2), f"{constants.ENDPOINT}/api/organizations/kernels-community/overview"
        pool.apply_async(requests.get, [url], {"timeout": 2}).get(3).raise_for_status()  # looking up a name may hang
        print(f"downloading {FLASH_KERNEL['repo_id']}, once", flush=True)
        utils.disable_progress_bars()
        path = pool.apply_async(install_kernel, kwds=FLASH_KERNEL).get(60)
    return get_local_kernel(path).flash_attn_func


def in_a_line(error: BaseException) -> str:
    """The first line of an error, or of its cause: those of the compiler say more in it."""
    error = error.__cause__ or error
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")  # a TimeoutError says no more


def try_attention(backend: str, device: torch.device) -> None:
    """Raise RuntimeError if outputs or gradients of a small input are not those of `matmul`."""
    draw = torch.Generator(device).manual_seed(0)  # the run's own random state stays as it was
    q, k, v, direction = torch.randn(4, 2, 256, 2, HEAD_DIM, device=device, generator=draw).bfloat16()
    inputs, results = [x.requires_grad_() for x in (q, k, v)], []
    for name in (backend, "matmul"):
        y = Attention(name, 256, {100}, device)(*inputs, 100)
        results.append([y, *torch.autograd.grad(y, inputs, direction)])
    for seen, expected in zip(*results, strict=True):
        if not (seen - expected).norm() < 0.02 * expected.norm():
            raise RuntimeError(f"its results are wrong by {(seen - expected).norm() / expected.norm():.0%}")


def visible(window: int) -> Callable:
    """Whether a query may see a key, as FlexAttention asks. A closure: torch.compile guards no default arguments."""
    return lambda batch, head, query, key: (key <= query) & (key >= query - window)


class Attention:
    """The chosen backend, with what it needs for rows of `length` tokens. q, k, v and the result: (B, T, H, D)."""

    def __init__(self, backend: str, length: int, windows: set[int], device: torch.device):
        self.backend = backend
        positions = torch.arange(length, device=device)
        if backend == "flash3":
            self.flash = flash_attention()
        elif backend == "flex":
            block_mask = partial(create_block_mask, B=None, H=None, Q_LEN=length, KV_LEN=length, device=device)
            self.masks = {w: block_mask(visible(w)) for w in windows}
        else:
            masks = {w: visible(w)(0, 0, positions[:, None], positions) for w in windows}
            self.masks = {w: torch.where(mask, 0.0, -math.inf) for w, mask in masks.items()}  # added to the scores

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        if self.backend == "flash3":
            y = self.flash(q, k, v, causal=True, window_size=(window, 0))
            return y[0] if isinstance(y, tuple) else y
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        seen = slice(q.size(2))  # a row may be shorter than `length`, but not for flex
        if self.backend == "flex":
            y = flex_attention(q, k, v, block_mask=self.masks[window])
        elif self.backend == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.masks[window][seen, seen].to(q.dtype))
        else:
            scores = (q @ k.mT).float() * q.size(-1) ** -0.5 + self.masks[window][seen, seen]
            y = scores.softmax(-1).to(v.dtype) @ v
        return y.transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Model


@dataclass
class Config:
    """The size of a model."""

    vocab_size: int
    seq_len: int
    depth: int
    head_dim: int
    aspect_ratio: int
    window_pattern: str

    @property
    def width(self) -> int:
        return -(-self.depth * self.aspect_ratio // self.head_dim) * self.head_dim

    @property
    def windows(self) -> list[int]:
        """How many positions before its own each block sees."""
        sizes = {"S": self.seq_len // 2, "L": self.seq_len}
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.depth - 1)]
        return [sizes[letter] for letter in [*pattern, "L"]]

    @property
    def value_blocks(self) -> range:
        """Blocks with value embeddings: every other one, the last among them."""
        return range((self.depth - 1) % 2, self.depth, 2)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without weights."""
    return F.rms_norm(x, (x.size(-1),))


def smear(x: Tensor) -> Tensor:
    """Take the first SMEAR of the channels of x (B, T, width) from the position before, zeros at the start."""
    size = int(SMEAR * x.size(-1))
    return torch.cat([F.pad(x[:, :-1, :size], (0, 0, 1, 0)), x[..., size:]], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, T, H, D); cos and sin: (T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class Block(nn.Module):
    """Attention and MLP. A block with value embeddings mixes them into v through a gate for each head."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        width, self.head_dim, self.window = config.width, config.head_dim, config.windows[index]
        self.qkv = nn.Parameter(torch.empty(3, width, width))  # one product; three matrices for Muon
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        if index in config.value_blocks:
            self.gate = nn.Linear(32, width // self.head_dim, bias=False)

    def forward(self, x: Tensor, values: Tensor | None, rotary: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        y = smear(norm(x))
        q, k, v = F.linear(y, self.qkv.flatten(0, 1)).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        if values is not None:
            gate = 2 * torch.sigmoid(self.gate(y[..., :32]))
            v = v + gate.unsqueeze(-1) * values.unflatten(-1, (-1, self.head_dim))
        q, k = norm(rotate(q, *rotary)), norm(rotate(k, *rotary))
        x = x + self.attention_out(attention(q, k, v, self.window).flatten(-2))
        return x + self.mlp_out(F.relu(self.mlp_in(smear(norm(x)))).square())


def soft_cap(logits: Tensor) -> Tensor:
    """SOFT_CAP · tanh(logits / SOFT_CAP) in float32, by exp: on a CPU tanh takes three times as long."""
    return SOFT_CAP - 2 * SOFT_CAP / (1 + torch.exp(logits.float() * (2 / SOFT_CAP)))


class CappedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the soft-capped logits x @ weight.T plus bonus, HEAD_CHUNK tokens at a time.

    The gradients come with the loss, so no logits are kept for a backward pass. x (N, width), weight (vocab, width),
    targets (N,), bonus (N, n) for the tokens of candidates (N, n). Capped logits need no maximum taken off before exp.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, candidates: Tensor, bonus: Tensor) -> Tensor:
        total, x_grads, bonus_grads, weight_grad = 0.0, [], [], 0.0
        tensors = (tensor.split(HEAD_CHUNK) for tensor in (x, targets, candidates, bonus))
        for part, target, tokens, extra in zip(*tensors, strict=True):
            logits, target = (part @ weight.T).float().scatter_add(1, tokens, extra), target[:, None]
            logits = soft_cap(logits)
            exp = logits.exp()
            exp_sum = exp.sum(-1, keepdim=True)
            total = total + (exp_sum.log() - logits.gather(1, target)).sum()
            hit = (target == torch.arange(logits.size(1), device=logits.device)).float()
            grad = (exp / exp_sum - hit) * (1 - (logits / SOFT_CAP).square()) / len(x)
            bonus_grads.append(grad.gather(1, tokens))
            grad = grad.to(x.dtype)
            x_grads.append(grad @ weight)
            weight_grad = weight_grad + (grad.T @ part).float()
        ctx.save_for_backward(torch.cat(x_grads), weight_grad, torch.cat(bonus_grads))
        return total / len(x)

    @staticmethod
    def backward(ctx, factor: Tensor) -> tuple[Tensor, Tensor, None, None, Tensor]:
        x_grad, weight_grad, bonus_grad = ctx.saved_tensors
        return x_grad * factor, weight_grad * factor, None, None, bonus_grad * factor


def hash_contexts(ids: Tensor, context: int) -> Tensor:
    """Hash the last `context` tokens at each position of ids (B, T): int64, below 2^38. Zeros stand before the first."""
    hashes = ids.to(torch.int64, copy=True)
    for back in range(1, context + 1):
        hashes *= 26544357  # odd and below 2^25
        hashes &= 2**38 - 1
        if back < context:
            hashes[:, back:] += ids[:, :-back]
    return hashes


def fill_rows(table: Tensor, pairs: Tensor) -> None:
    """Fill a slice of a table with what follows its contexts. pairs: sorted, context * 2^15 + next token."""
    pairs, counts = pairs.unique_consecutive(return_counts=True)
    contexts, index, sizes = (pairs >> 15).unique_consecutive(True, True)  # inverse and counts
    totals = torch.zeros_like(contexts).index_add_(0, index, counts)
    width = 2**38 // NGRAM_ROWS

    # A row belongs to the most frequent of its contexts.
    row = contexts // width % len(table)
    claim = totals * 2**32 + torch.arange(len(row))
    wins = claim.new_zeros(len(table)).scatter_reduce_(0, row, claim, "amax")[row] == claim
    table[row[wins], 0] = (contexts[wins] % width + 1).int()

    # Within a context the most frequent token comes first.
    order = index * 2**20 + 2**20 - counts.clamp(max=0xFFFFF)
    order = order * 2**15 + (pairs & 0x7FFF)
    order.numpy().sort()
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[index]
    kept = wins[index] & (place < NGRAM_CANDIDATES)
    order, index, place = order[kept], index[kept], place[kept]
    count = 2**20 - (order >> 15 & 0xFFFFF)
    weight = (count / (totals[index] + 1)).sqrt()  # less for rare contexts
    table[row[index], 1 + place] = ((order & 0x7FFF) * 2**16 + (weight * 2**16).long()).int()


class NgramTables(nn.Module):
    """Candidates for the next token: those that most often followed the last few tokens, by the longest matches."""

    def __init__(self, vocab_size: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(NGRAM_MATCHES * NGRAM_CANDIDATES, width))
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        self.projection = draw(vocab_size, -(-width // NGRAM_MATCHES)).to(dtype)
        self.level_projection = draw(1 + len(NGRAM_CONTEXTS), width).to(dtype)
        # A row: what tells its context from others + 1, or 0 if it is empty, then the candidates, each as
        # token * 2^16 + weight * 2^16. Not a buffer: its digest would take seconds.
        self.tables = self.empty()
        self.final_tables = None  # of all training text

    def empty(self) -> Tensor:
        return torch.zeros(len(NGRAM_CONTEXTS), NGRAM_ROWS, 1 + NGRAM_CANDIDATES, dtype=torch.int32)

    def count(self, ids: Tensor) -> Tensor:
        """Return tables for one row of text, int32 (1, N)."""
        tables = self.empty()
        bounds = torch.arange(1, NGRAM_SLICES) * (2**53 // NGRAM_SLICES)
        for table, context in zip(tables, NGRAM_CONTEXTS, strict=True):
            pairs = hash_contexts(ids, context)[0, :-1]
            pairs *= 2**15
            pairs += ids[0, 1:]
            pairs.numpy().sort()  # several times as fast as PyTorch
            parts = pairs.tensor_split(torch.searchsorted(pairs, bounds))
            for rows, part in zip(table.chunk(NGRAM_SLICES), parts, strict=True):
                if len(part):
                    fill_rows(rows, part)
        return tables

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the n-gram embedding of ids (B, T), and candidates with their weights, 0 where nothing matches.

        Candidates and weights: (B, T, NGRAM_MATCHES * NGRAM_CANDIDATES), those of the longest match first.
        """
        hashes = torch.stack([hash_contexts(ids, context) for context in NGRAM_CONTEXTS], dim=-1)
        width = 2**38 // NGRAM_ROWS
        number, rows = torch.arange(len(NGRAM_CONTEXTS)), hashes // width
        known = self.tables[number, rows, 0] == hashes % width + 1
        level = (known * (number + 1)).topk(NGRAM_MATCHES).values  # (B, T, matches), 0 if none
        number = (level - 1).clamp(min=0)
        packed = self.tables[number, rows.gather(-1, number), 1:]
        candidates = (packed >> 16).long()
        weights = (packed & 0xFFFF) * (level > 0)[..., None] / 2**16
        embedding = (weights[..., None] * self.projection[candidates]).sum(-2).flatten(2)[..., : self.gate.size(1)]
        return embedding + self.level_projection[level[..., 0]], candidates.flatten(2), weights.flatten(2)


class GPT(nn.Module):
    """Called with ids (B, T) it returns logits, float32 (B, T, vocab); with targets too, the mean cross-entropy."""

    def __init__(self, config: Config, attention: Attention, dtype: torch.dtype):
        super().__init__()
        self.config, self.attention, self.dtype = config, attention, dtype
        width, depth = config.width, config.depth
        self.embedding = nn.Embedding(config.vocab_size, width)
        tables = {str(i): nn.Embedding(config.vocab_size, width) for i in config.value_blocks}
        self.value_embeddings = nn.ModuleDict(tables)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(depth))
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.ngrams = NgramTables(config.vocab_size, width, dtype)
        self.residual_scales = nn.Parameter(torch.ones(depth))
        self.first_scales = nn.Parameter(torch.full((depth,), 0.1))
        frequency = 10_000 ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angle = torch.outer(torch.arange(config.seq_len).float(), frequency)[:, None]
        self.register_buffer("cos", angle.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(dtype), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Output projections and gates start at zero, so that every block begins as the identity."""
        bound = math.sqrt(3 / self.config.width)
        nn.init.normal_(self.embedding.weight, std=1.0)
        nn.init.normal_(self.head.weight, std=0.001)
        for embedding in self.value_embeddings.values():
            nn.init.uniform_(embedding.weight, -bound, bound)
        for name, weight in self.blocks.named_parameters():
            if name.split(".")[1] in ("attention_out", "mlp_out", "gate"):
                nn.init.zeros_(weight)
            else:
                nn.init.uniform_(weight, -bound, bound)
        for embedding in (self.embedding, *self.value_embeddings.values()):
            embedding.to(self.dtype)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            rotary = self.cos[: ids.size(1)], self.sin[: ids.size(1)]
            embedding, candidates, weights = self.ngrams(ids)
            x = first = norm(self.embedding(ids)) + embedding.to(self.dtype)
            for i, block in enumerate(self.blocks):
                values = self.value_embeddings[str(i)](ids) if i in self.config.value_blocks else None
                x = self.residual_scales[i] * x + self.first_scales[i] * first
                x = block(x, values, rotary, self.attention)
            x = norm(x)
            bonus = weights * F.linear(x, self.ngrams.gate).float()
            if targets is None:
                return soft_cap(self.head(x).float().scatter_add(-1, candidates, bonus))
        x, weight = x.flatten(0, 1).to(self.dtype), self.head.weight.to(self.dtype)
        return CappedCrossEntropy.apply(x, weight, targets.flatten(), candidates.flatten(0, 1), bonus.flatten(0, 1))

    def flops_per_token(self) -> int:
        """Forward and backward: 6 per weight of a matrix, 12 per channel of attention and position of the window.

        What the causal mask saves is not taken off, as in PaLM (https://arxiv.org/abs/2204.02311, appendix B).
        """
        matrices = sum(w.numel() for w in self.blocks.parameters()) + self.head.weight.numel()
        return 6 * matrices + 12 * self.config.width * sum(self.config.windows)


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer and schedules

# Polar Express: the five polynomials of https://arxiv.org/abs/2505.16932 (Amsel et al., 2025) for a 2 % safety margin.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearest matrix with all singular values about 1, for a stack (n, rows, cols) of them."""
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon_update(p: Tensor, g: Tensor, velocity: Tensor, variance: Tensor, settings: dict, dtype: torch.dtype) -> None:
    """Update the stack p (n, rows, cols), float32, in place; orthogonalize in `dtype`. settings: the group's.

    Muon (https://kellerjordan.github.io/posts/muon) with Nesterov momentum, the variance of each neuron evened out
    (NorMuon, https://arxiv.org/abs/2510.05491), and decay only where it agrees with the step (cautious weight decay,
    https://arxiv.org/abs/2510.12402). variance: (n, rows, 1), or (n, 1, cols) for wide matrices.
    """
    lr, momentum = settings["lr"] * max(1.0, p.size(1) / p.size(2)) ** 0.5, settings["momentum"]
    velocity.lerp_(g, 1 - momentum)
    step = orthogonalize(g.lerp(velocity, momentum), dtype).float()
    size = step.norm(dim=(-2, -1), keepdim=True)
    variance.lerp_(step.square().mean(-1 if variance.size(-1) == 1 else -2, keepdim=True), 1 - settings["beta2"])
    step = step * variance.clamp(min=1e-10).rsqrt()
    step = step * (size / step.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))
    agree = (step * p >= 0).to(p.dtype)
    p.sub_(lr * (step + settings["weight_decay"] * agree * p))


def adamw_update(p: Tensor, g: Tensor, mean: Tensor, square: Tensor, step: Tensor | int, settings: dict) -> None:
    """Update p in place as AdamW (https://arxiv.org/abs/1711.05101), in float32 whatever p's dtype is."""
    lr, beta1, beta2 = settings["lr"], settings["beta1"], settings["beta2"]
    g = g.float()
    mean.lerp_(g, 1 - beta1)
    square.lerp_(g.square(), 1 - beta2)
    denominator = (square / (1 - beta2**step)).sqrt() + settings["eps"]
    p.copy_(p.float() * (1 - lr * settings["weight_decay"]) - lr / (1 - beta1**step) * mean / denominator)


def stacked(matrices: list[Tensor]) -> Tensor:
    """A copy of matrices and stacks of them, all of one size, as one stack (n, rows, cols)."""
    return torch.cat([matrix.reshape(-1, *matrix.shape[-2:]) for matrix in matrices])


class MuonAdamW(torch.optim.Optimizer):
    """Groups of kind adamw or muon; a muon group holds matrices of one shape, updated as one stack.

    Rates change at every step: they reach the compiled updates as tensors, so that nothing is compiled again.
    """

    def __init__(self, groups: list[dict], compiled: bool, dtype: torch.dtype):
        super().__init__(groups, {"lr": 0.0})
        wrap = partial(torch.compile, dynamic=False, fullgraph=True) if compiled else (lambda function: function)
        self.adamw, self.muon, self.dtype = wrap(adamw_update), wrap(muon_update), dtype
        self.scalar = torch.tensor if compiled else float
        self.steps = torch.zeros(())
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            if group["kind"] == "adamw":
                for p in group["params"]:
                    self.state[p] = {"mean": torch.zeros_like(p, dtype=torch.float32)}
                    self.state[p]["square"] = torch.zeros_like(p, dtype=torch.float32)
            else:
                velocity = torch.zeros_like(stacked(group["params"]))
                n, rows, cols = velocity.shape
                variance = velocity.new_zeros((n, rows, 1) if rows >= cols else (n, 1, cols))
                self.state[group["params"][0]] = {"velocity": velocity, "variance": variance}

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes besides the parameters."""
        return [self.steps, *(tensor for state in self.state.values() for tensor in state.values())]

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient."""
        self.steps += 1
        for group in self.param_groups:
            settings = {k: self.scalar(float(value)) for k, value in group.items() if isinstance(value, int | float)}
            params = group["params"]
            if group["kind"] == "adamw":
                for p in params:
                    self.adamw(p, p.grad, self.state[p]["mean"], self.state[p]["square"], self.steps, settings)
            else:
                stack, grads, state = stacked(params), stacked([p.grad for p in params]), self.state[params[0]]
                self.muon(stack, grads, state["velocity"], state["variance"], settings, self.dtype)
                parts = stack.split([p.numel() // stack[0].numel() for p in params])
                torch._foreach_copy_(params, [part.view_as(p) for part, p in zip(parts, params, strict=True)])


def build_optimizer(model: GPT, compiled: bool) -> MuonAdamW:
    """Sort the parameters into their groups."""
    scale = (model.config.width / 768) ** -0.5
    adam = {"kind": "adamw", "beta1": ADAM_BETAS[0], "beta2": ADAM_BETAS[1], "eps": ADAM_EPS, "weight_decay": 0.0}
    embeddings = [model.embedding.weight, *(e.weight for e in model.value_embeddings.values())]
    groups = [
        adam | {"params": [model.head.weight], "lr": HEAD_LR * scale},
        adam | {"params": [model.ngrams.gate], "lr": NGRAM_LR * scale},
        adam | {"params": embeddings, "lr": EMBEDDING_LR * scale},
        adam | {"params": [model.residual_scales], "lr": SCALAR_LR / 100},
        adam | {"params": [model.first_scales], "lr": SCALAR_LR},
    ]
    matrices = list(model.blocks.parameters())
    for shape in sorted({tuple(p.shape[-2:]) for p in matrices}):
        params = [p for p in matrices if p.shape[-2:] == shape]
        muon = {"momentum": MUON_MOMENTUM[0], "beta2": MUON_BETA2, "weight_decay": WEIGHT_DECAY}
        groups.append({"kind": "muon", "params": params, "lr": MATRIX_LR, **muon})
    return MuonAdamW(groups, compiled, model.dtype)


def lr_factor(progress: float) -> float:
    """Part of the full learning rate, by the part of the budget that is used."""
    if progress < WARMUP:
        return progress / WARMUP
    if progress <= 1 - WARMDOWN:
        return 1.0
    return FINAL_LR + (1 - FINAL_LR) * (1 - progress) / WARMDOWN


def set_schedule(optimizer: MuonAdamW, progress: float, step: int) -> None:
    """Set rates, momentum and decay for this step."""
    begin, end, steps = MUON_MOMENTUM
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_factor(progress)
        if group["kind"] == "muon":
            group["momentum"] = begin + (end - begin) * min(step / steps, 1.0)
            group["weight_decay"] = WEIGHT_DECAY * (1 - progress)


# ----------------------------------------------------------------------------------------------------------------------
# Training loop

# Dense bf16 TFLOP/s with float32 sums, by a pattern for the device's name: datasheets of NVIDIA and AMD, for RTX cards
# NVIDIA's whitepapers of the architectures (GA102, Ada, Blackwell).
PEAK_TFLOPS = {
    r"A100\b": 312, r"H100 PCIe": 756, r"H[12]00 NVL": 835.5, r"(G?H200|H100)\b": 989.5, r"B200\b": 2250,
    r"A10$": 125, r"L4$": 121, r"L40S$": 362, r"RTX 3090$": 71, r"RTX 4090$": 165.2, r"RTX 5090$": 209.5,
    r"RTX 6000 Ada": 364.2, r"RTX PRO 6000 Blackwell Max-Q": 438.9, r"RTX PRO 6000 Blackwell Workstation": 503.8,
    r"MI250X$": 191.5, r"MI300X": 1307.4,  # an MI250X is two devices
}  # fmt: skip


def peak_flops(device: torch.device) -> float:
    """The device's dense bf16 peak in FLOP/s, 0 if it is not known: no figure is better than a wrong one."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peaks = (peak * 1e12 for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}", name))
    return 0.0 if re.search(r"MIG|-\d+[CQ]$", name) else next(peaks, 0.0)  # MIG and vGPU: a slice of a GPU


def choose_precision(device: torch.device) -> tuple[torch.dtype, bool, str]:
    """Return the dtype to compute in, whether to compile, and why."""
    compiler = any(map(shutil.which, ("gcc", "g++", "clang", "clang++")))
    if device.type == "cuda":
        works = compiler and has_triton()
        return torch.bfloat16, works, "a GPU" if works else "torch.compile needs Triton and a C compiler (gcc)"
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.float32, False, "this CPU has no AVX512-BF16 or AMX"
    lack = "" if compiler else ", but torch.compile needs a C++ compiler (g++)"
    return torch.bfloat16, compiler, f"the CPU has bf16 instructions{lack}"


def check_knobs(length: int) -> None:
    """Refuse what can't work before anything is compiled."""
    tokens = DEVICE_BATCH_SIZE * length
    whole = f"a multiple of DEVICE_BATCH_SIZE {DEVICE_BATCH_SIZE} rows × {length} = {tokens} tokens"
    for name, works, must in (
        ("DEPTH", DEPTH >= 1, "at least 1"),
        ("HEAD_DIM", HEAD_DIM >= 32 and HEAD_DIM % 2 == 0, "even, and 32 or more"),
        ("WINDOW_PATTERN", set(WINDOW_PATTERN or "-") <= set("SL"), "of the letters S and L"),
        ("SOFT_CAP", 0 < SOFT_CAP <= 70, "more than 0 and at most 70, so that sums of e^70 fit float32"),
        ("HEAD_CHUNK", HEAD_CHUNK >= 1, "at least 1"),
        ("FORCED_BACKEND", FORCED_BACKEND in (None, "", *BACKENDS), f"one of {BACKENDS} (AUTORESEARCH_ATTENTION)"),
        ("DEVICE_BATCH_SIZE", DEVICE_BATCH_SIZE >= 1, "at least 1"),
        ("TOTAL_BATCH_SIZE", 0 < tokens <= TOTAL_BATCH_SIZE and TOTAL_BATCH_SIZE % tokens == 0, whole),
    ):
        if not works:
            raise SystemExit(f"{name} {globals()[name]!r} must be {must}")


def train_step(model: nn.Module, optimizer: MuonAdamW, batches: list) -> Tensor:
    """One step over a list of micro-batches (x, y); return the loss, averaged over them, as a tensor."""
    total = 0.0
    for x, y in batches:
        loss = model(x, y) / len(batches)
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return total


def warm_up(model: GPT, optimizer: MuonAdamW, step: Callable[[], Tensor]) -> None:
    """Compile and allocate on throw-away steps; afterwards weights, optimizer and random state are as before."""
    tensors = [*model.parameters(), *model.buffers(), *optimizer.tensors()]
    before = [tensor.detach().clone() for tensor in tensors]
    random_states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()
    try:
        for _ in range(2):
            step()
    finally:
        optimizer.zero_grad()
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        restore = random.setstate, np.random.set_state, torch.set_rng_state, torch.cuda.set_rng_state_all
        for put_back, state in zip(restore, random_states, strict=True):
            put_back(state)


def fit(run: Run, model: GPT, compiled: bool) -> tuple[nn.Module, MuonAdamW, int]:
    """Warm up, with less memory or another way where need be; return the model to call, its optimizer, and the rows."""
    rows, length = DEVICE_BATCH_SIZE, run.corpus.seq_len
    while True:
        optimizer = build_optimizer(model, compiled and run.device.type == "cuda")
        options = {"cpp.vec_isa_ok": True}  # else it tries out what the CPU's flags say, for 6 s of every run
        forward = torch.compile(model, dynamic=False, options=options) if compiled else model
        batch = next(make_dataloader(run.tokenizer, rows, length, "train", run.seed))[:2]
        batches = [batch] * min(2, TOTAL_BATCH_SIZE // (rows * length))  # the second comes on top of gradients
        tried = model.attention.backend
        run.status = f"warm-up{' and compile' * compiled}, micro-batches of {rows} rows, attention {tried}"
        try:
            warm_up(model, optimizer, partial(train_step, forward, optimizer, batches))
            return forward, optimizer, rows
        except Exception as error:
            words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # of CUDA, cuBLAS, the CPU, also wrapped
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
            if out_of_memory and rows > 1:
                rows = next(r for r in range(rows // 2, 0, -1) if TOTAL_BATCH_SIZE % (r * length) == 0)
                change = f"out of memory: micro-batches of {rows} rows instead"
            elif compiled and isinstance(error, RuntimeError | OSError):  # others are mistakes in this file
                others = {} if FORCED_BACKEND else {"flash3": "flex", "flex": "sdpa"}
                backend = others.get(tried, tried)
                compiled = backend != tried
                change = f"attention {backend} instead" if compiled else "not compiled after all"
                change = f"{in_a_line(error)}: {change}"
                model.attention = Attention(backend, length, set(model.config.windows), run.device)
            else:
                raise
        del forward, optimizer, batch, batches
        torch.compiler.reset()  # else every attempt counts towards the limit of recompilations
        gc.collect()
        torch.cuda.empty_cache()
        print(change, flush=True)


def read_text(run: Run, part: tuple[float, float]) -> Tensor:
    """Return the documents of a part of each shard in one row, int32 (1, N), N at most NGRAM_MAX_TOKENS and one more."""
    text, size = [], 0
    for ids, epoch in train_documents(run.corpus, run.seed, part):
        if epoch > 1 or size > NGRAM_MAX_TOKENS:
            break
        text.append(ids)
        size += len(ids)
    return torch.from_numpy(np.concatenate(text).astype(np.int32))[None]


def count_ngrams(run: Run, ngrams: NgramTables) -> None:
    """Make the tables for training, and those of all training text for the end.

    Tables of the text that a model trains on are right too often, and it would trust them too much.
    """
    run.status = "counting n-grams"
    ngrams.tables.copy_(ngrams.count(read_text(run, (0, NGRAM_PART))))
    ngrams.final_tables = ngrams.count(read_text(run, (0, 1)))
    print(f"n-grams: counting took {run.progress():.1%} of the time", flush=True)


def main() -> None:
    """Run the command line."""
    with training_run(__doc__) as run:
        train(run)


def train(run: Run) -> None:
    """Build, warm up, train for the budget, evaluate, report."""
    device, length = run.device, run.corpus.seq_len
    check_knobs(length)
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", "flex_attention called without")  # start() looks at a few rows uncompiled
    if device.type == "cpu":
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA
    dtype, compiled, why = choose_precision(device)
    backend, attention_why = choose_attention(device, compiled)
    config = Config(run.tokenizer.get_vocab_size(), length, DEPTH, HEAD_DIM, ASPECT_RATIO, WINDOW_PATTERN)
    model = GPT(config, Attention(backend, length, set(config.windows), device), dtype).to(device)
    num_params, peak = sum(p.numel() for p in model.parameters()), peak_flops(device)
    print(f"precision: {str(dtype)[6:]}, {'compiled' if compiled else 'not compiled'} ({why})")
    print(f"attention: {backend} ({attention_why})")
    print(f"model: {config.depth} blocks of width {config.width}, {num_params / 1e6:.1f}M parameters", flush=True)
    if not peak:
        print("mfu_percent: will be 0.00, the peak of this device is not known", flush=True)
    forward, optimizer, rows = fit(run, model, compiled)
    micro_batches = TOTAL_BATCH_SIZE // (rows * length)
    print(f"step: {TOTAL_BATCH_SIZE} tokens in {micro_batches} micro-batches of {rows} rows of {length}", flush=True)

    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the middle of a step costs more than the garbage of five minutes
    step, mean, previous, run.status = 0, 0.0, None, "counting"
    run.start(model)
    count_ngrams(run, model.ngrams)
    loader = make_dataloader(run.tokenizer, rows, length, "train", run.seed, (NGRAM_PART, 1))
    run.status = "training"
    while (progress := run.progress()) < 1:
        set_schedule(optimizer, progress, step)
        batches = [next(loader) for _ in range(micro_batches)]
        loss = train_step(forward, optimizer, [(x, y) for x, y, _ in batches])
        if previous is not None:  # read a step late: the device has the next one to work on and is not kept waiting
            value = previous.item()
            if not value < 3 * math.log(config.vocab_size):
                raise SystemExit(f"the loss of step {step} is {value}: no use going on. Lower the learning rates?")
            mean += (value - mean) / min(step, 10)
            run.status = f"step {step}, {progress:.0%} of the time, loss {mean:.4f}, epoch {batches[-1][2]}"
        step, previous = step + 1, loss
    model.ngrams.tables.copy_(model.ngrams.final_tables)
    run.stop(forward)
    loader.close()

    run.status = f"evaluating after {step} steps"
    tokens = step * TOTAL_BATCH_SIZE
    mfu = 100 * model.flops_per_token() * tokens / run.seconds / peak if peak else 0.0
    run.finish(forward, rows, step, tokens, config.depth, mfu)


if __name__ == "__main__":
    main()
