"""Train a GPT for five minutes and print its val_bpb. The agent's file: everything in it may change.

uv run train.py                        # the corpus that this machine prefers, seed 42
uv run train.py --corpus FOLDER        # your own text
"""

import gc
import logging
import math
import os
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from multiprocessing.pool import ThreadPool

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: on a CPU page faults take a tenth of a step

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from prepare import Run, choose_precision, get_device, load_kernel, make_dataloader, peak_flops, training_run

# Knobs ----------------------------------------------------------------------------------------------------------------

# model
DEPTH = 9  # blocks; with width 640 instead of 8 and 512: val_bpb -0.0043, published like all figures of this kind here
ASPECT_RATIO = 57  # width per block; the width is DEPTH * ASPECT_RATIO rounded up to whole heads
HEAD_DIM = 128  # width of an attention head
WINDOW_PATTERN = "SSSSL"  # repeated over the blocks: S sees SHORT_WINDOW, L all of the context; the last block is L
SHORT_WINDOW = 1 / 8  # of the context, instead of a half of it in SSSL: -0.0012
ROTARY_BASE = 200_000  # instead of 10,000: -0.0012
SHIFT = (0.25, 0.0)  # of attention's and the MLP's channels, from the position before; -0.0070 in 100 s of an H200
SOFT_CAP = 15.0  # logits are squeezed into ±SOFT_CAP; 0: they are not
CONTEXTS = ()  # numbers of tokens: what follows so many last ones in a text that is only counted; unmeasured on a GPU
GUESSES = 6  # of the next token for each of CONTEXTS: those that followed it most often
COUNTED = 0.5  # part of each shard that is counted, not trained on: there the guesses would be too good
COUNTED_TOKENS = (2**22, 2**25)  # of fewer no counts are made; more are not counted
COUNT_ROWS = 2**23  # contexts in a table of guesses, of those with the same row the one seen most often

# batch
TOTAL_BATCH_SIZE = 2**18  # tokens a step; instead of 2**19: -0.0119
DEVICE_BATCH_SIZE = 128  # rows a micro-batch; halved by itself if it does not fit memory
HEAD_CHUNK = 2**15  # tokens whose logits are in memory at a time

# optimizer: AdamW for embeddings, head and scalars, Muon for the matrices of the blocks
TRUST_LR = 0.00035  # of what the guesses add to the logits; at width 768, like the next two
EMBEDDING_LR, EMBEDDING_DECAY = 0.9, 0.001  # scaled by (width / 768)^-½. Not 0.6 and 0: -0.0038
VALUE_DECAY = 0.003  # of the value embeddings: -0.0016
HEAD_LR, HEAD_DECAY = 0.005, 0.01  # likewise scaled. Not 0.004 and 0: -0.0011
SCALAR_LR = 0.5  # of the first embedding's scalars; the residual ones get a hundredth
ADAM_BETAS, ADAM_EPS = (0.8, 0.95), 1e-10  # short memories, for a run of few steps; eps only keeps from 0/0
MATRIX_LR = 0.04  # times √(rows/cols) for a tall matrix
MUON_MOMENTUM = (0.85, 0.95, 200)  # from, to, over so many steps; instead of 300, with the two below: -0.0017
FIRST_SCALE = 0.05  # of the input of the first block, added before each, at the start; instead of 0.1
MATRIX_INIT = 0.68  # of ±√3/√width, the bounds of a block's matrices at the start
MUON_BETA2 = 0.95  # of the variance that NorMuon evens out
WEIGHT_DECAY = 0.2  # of the matrices, falls linearly to 0
WARMDOWN, FINAL_LR = 0.75, 0.05  # part of the budget in which all rates fall, to what part; not 0.5 and 0: -0.0015

# A CPU gets through less than a hundredth of the tokens, so it gets a smaller model and batch.
if get_device().type == "cpu":
    DEPTH, ASPECT_RATIO, HEAD_DIM = 4, 48, 64
    WINDOW_PATTERN, SHORT_WINDOW, WARMDOWN, FINAL_LR = "SSSL", 1 / 2, 0.5, 0.0  # WARMDOWN 0.75: +0.011 in 190 steps
    SHIFT, SOFT_CAP, CONTEXTS = (0.5, 0.5), 0.0, (2, 3, 4)  # without the cap a micro-batch takes 0.93 of the time
    TOTAL_BATCH_SIZE, DEVICE_BATCH_SIZE, HEAD_CHUNK = 2**12, 16, 2**10
    EMBEDDING_LR, HEAD_LR, MATRIX_LR = 0.63, 0.0035, 0.028  # √½ of a GPU's

# Attention ------------------------------------------------------------------------------------------------------------

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
    """softmax(q·k / √d) v over each position and the `window` before it. q, k, v and the result: (B, T, H, D)."""

    def __init__(self, backend: str, length: int, windows: set[int], device: torch.device):
        self.backend = backend
        positions = torch.arange(length, device=device)
        if backend == "flash3":
            self.flash = load_kernel(**FLASH_KERNEL).flash_attn_func
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


# Model ----------------------------------------------------------------------------------------------------------------


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
        sizes = {"S": int(self.seq_len * SHORT_WINDOW), "L": self.seq_len}
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.depth - 1)]
        return [sizes[letter] for letter in [*pattern, "L"]]

    @property
    def value_blocks(self) -> range:
        """Blocks with value embeddings: every other one, the last among them."""
        return range((self.depth - 1) % 2, self.depth, 2)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without weights."""
    return F.rms_norm(x, (x.size(-1),))


def shifted(x: Tensor, part: float) -> Tensor:
    """x (B, T, width) with the first part of its channels from the position before."""
    size = int(part * x.size(-1))
    return torch.cat([F.pad(x[:, :-1, :size], (0, 0, 1, 0)), x[..., size:]], dim=-1) if size else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, T, H, D); cos and sin: (T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def hash_contexts(ids: Tensor, context: int) -> Tensor:
    """Hash the last `context` tokens at each position of ids (B, T), 0 before the first: int64, below 2^38."""
    mixed = ids
    for back in range(1, context):
        mixed = (mixed * 26544357 + F.pad(ids, (back, 0))[:, : ids.size(1)]) & (2**38 - 1)  # odd, and below 2^25
    return mixed


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
        y = shifted(norm(x), SHIFT[0])
        q, k, v = F.linear(y, self.qkv.flatten(0, 1)).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        if values is not None:
            gate = 2 * torch.sigmoid(self.gate(y[..., :32]))
            v = v + gate.unsqueeze(-1) * values.unflatten(-1, (-1, self.head_dim))
        q, k = norm(rotate(q, *rotary)), norm(rotate(k, *rotary))
        x = x + self.attention_out(attention(q, k, v, self.window).flatten(-2))
        return x + self.mlp_out(F.relu(self.mlp_in(shifted(norm(x), SHIFT[1]))).square())


def soft_cap(logits: Tensor, *extra: Tensor) -> Tensor:
    """SOFT_CAP · tanh(logits / SOFT_CAP), float32. extra: guesses, int64, and the bonus of each, float32, (..., G)."""
    logits = logits.float().scatter_add(-1, *extra) if extra else logits.float()
    if not SOFT_CAP:
        return logits.clamp(-70, 70)  # sums of e^70 fit float32
    return SOFT_CAP - 2 * SOFT_CAP / (1 + torch.exp(logits * (2 / SOFT_CAP)))  # tanh takes three times as long on a CPU


class CappedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the soft-capped logits x @ weight.T, HEAD_CHUNK tokens at a time.

    The gradients come with the loss: no logits are kept. x (N, width), weight (vocab, width), targets (N,); extra as
    for soft_cap, or none: guesses and bonus (N, G). A token that is guessed twice gets both.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, *extra: Tensor) -> Tensor:
        total, x_grads, weight_grad, bonus_grads = 0.0, [], 0.0, []
        inputs = [tensor.split(HEAD_CHUNK) for tensor in (x, targets[:, None], *extra)]
        for part, target, *more in zip(*inputs, strict=True):
            logits = soft_cap(part @ weight.T, *more)
            exp = torch.exp2(logits * (1 / math.log(2)))  # not exp, and int32 below: each 0.95 of the time on a CPU
            exp_sum = exp.sum(-1, keepdim=True)
            total = total + (exp_sum.log() - logits.gather(1, target)).sum()
            hit = (target.int() == torch.arange(logits.size(1), device=x.device, dtype=torch.int32)).float()
            grad = ((exp / exp_sum - hit) * (1 - (logits / SOFT_CAP).square() if SOFT_CAP else 1) / len(x)).to(x.dtype)
            x_grads.append(grad @ weight)
            bonus_grads += [grad.gather(1, guesses).float() for guesses in more[:1]]
            weight_grad = weight_grad + (grad.T @ part).float()
        ctx.save_for_backward(torch.cat(x_grads), weight_grad, *([torch.cat(bonus_grads)] if extra else []))
        return total / len(x)

    @staticmethod
    def backward(ctx, factor: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *bonus = (grad * factor for grad in ctx.saved_tensors)
        return (x, weight, None, None, *bonus) if bonus else (x, weight, None)


class GPT(nn.Module):
    """Called with ids (B, T) it returns logits, float32 (B, T, vocab); with targets too, the mean cross-entropy."""

    def __init__(self, config: Config, attention: Attention, dtype: torch.dtype):
        super().__init__()
        self.config, self.attention, self.dtype = config, attention, dtype
        vocab, width, depth = config.vocab_size, config.width, config.depth
        self.embedding = nn.Embedding(vocab, width)
        self.value_embeddings = nn.ModuleDict({str(i): nn.Embedding(vocab, width) for i in config.value_blocks})
        self.blocks = nn.ModuleList(Block(config, i) for i in range(depth))
        self.head = nn.Linear(width, vocab, bias=False)
        if CONTEXTS:
            self.trust = nn.Parameter(torch.zeros(len(CONTEXTS) * GUESSES, width))
            codes = torch.randn(vocab, -(-width // len(CONTEXTS)), generator=torch.Generator().manual_seed(0))
            self.register_buffer("codes", codes.to(dtype), persistent=False)  # those of CONTEXTS: as wide as the model
            table = torch.zeros(len(CONTEXTS), COUNT_ROWS, 1 + GUESSES, dtype=torch.int32)
            # a row: its context's hash // COUNT_ROWS + 1, 0 for none; then GUESSES times token · 2^16 + weight · 2^16
            self.register_buffer("table", table, persistent=False)
        self.residual_scales = nn.Parameter(torch.ones(depth))
        self.first_scales = nn.Parameter(torch.full((depth,), FIRST_SCALE))
        frequency = ROTARY_BASE ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
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
            size = 0.0 if name.split(".")[1] in ("attention_out", "mlp_out", "gate") else MATRIX_INIT * bound
            nn.init.uniform_(weight, -size, size)
        for embedding in (self.embedding, *self.value_embeddings.values()):
            embedding.to(self.dtype)

    def look_up(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Guesses for ids (B, T), int64, and their weights, float32, 0 if unseen: both (B, T, contexts, GUESSES)."""
        mixed = torch.stack([hash_contexts(ids, context) for context in CONTEXTS], -1)
        rows = self.table[torch.arange(len(CONTEXTS), device=ids.device), mixed % COUNT_ROWS]
        seen, packed = rows[..., :1] == mixed[..., None] // COUNT_ROWS + 1, rows[..., 1:]
        return (packed >> 16).long(), (packed & 0xFFFF) * seen / 2**16

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            rotary = self.cos[: ids.size(1)], self.sin[: ids.size(1)]
            x = first = norm(self.embedding(ids))
            if CONTEXTS:
                guesses, weights = self.look_up(ids)
                hints = (weights[..., None] * self.codes[guesses]).sum(-2).flatten(2)
                x = first = x + hints[..., : x.size(-1)].to(x.dtype)
            for i, block in enumerate(self.blocks):
                values = self.value_embeddings[str(i)](ids) if i in self.config.value_blocks else None
                x = self.residual_scales[i] * x + self.first_scales[i] * first
                x = block(x, values, rotary, self.attention)
            x = norm(x)
            extra = (guesses.flatten(2), weights.flatten(2) * F.linear(x, self.trust).float()) if CONTEXTS else ()
            if targets is None:
                return soft_cap(self.head(x), *extra)
        x, weight = x.flatten(0, 1).to(self.dtype), self.head.weight.to(self.dtype)
        return CappedCrossEntropy.apply(x, weight, targets.flatten(), *(tensor.flatten(0, 1) for tensor in extra))

    def flops_per_token(self) -> int:
        """Forward and backward, as in PaLM (https://arxiv.org/abs/2204.02311, appendix B): all of the window counts."""
        matrices = sum(p.numel() for name, p in self.named_parameters() if name.startswith(("blocks", "head", "trust")))
        return 6 * matrices + 12 * self.config.width * sum(self.config.windows)


# Optimizer and schedules ----------------------------------------------------------------------------------------------

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
    p.sub_(lr * (step + settings["weight_decay"] * (step * p >= 0) * p))


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
    """Groups of kind adamw or muon; a muon group holds matrices of one shape, updated as one stack."""

    def __init__(self, groups: list[dict], compiled: bool, dtype: torch.dtype):
        super().__init__(groups, {"lr": 0.0})
        wrap = partial(torch.compile, dynamic=False, fullgraph=True) if compiled else (lambda function: function)
        self.adamw, self.muon, self.dtype = wrap(adamw_update), wrap(muon_update), dtype
        self.scalar = torch.tensor if compiled else float  # as tensors, rates that change compile nothing again
        self.steps = torch.zeros(())
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            if group["kind"] == "adamw":
                for p in group["params"]:
                    self.state[p] = {name: torch.zeros_like(p, dtype=torch.float32) for name in ("mean", "square")}
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
    values, rate = [e.weight for e in model.value_embeddings.values()], EMBEDDING_LR * scale
    groups = [
        adam | {"params": [model.head.weight], "lr": HEAD_LR * scale, "weight_decay": HEAD_DECAY},
        *([adam | {"params": [model.trust], "lr": TRUST_LR * scale}] if CONTEXTS else []),
        adam | {"params": [model.embedding.weight], "lr": rate, "weight_decay": EMBEDDING_DECAY},
        adam | {"params": values, "lr": rate, "weight_decay": VALUE_DECAY},
        adam | {"params": [model.residual_scales], "lr": SCALAR_LR / 100},
        adam | {"params": [model.first_scales], "lr": SCALAR_LR},
    ]
    matrices = list(model.blocks.parameters())
    for shape in sorted({tuple(p.shape[-2:]) for p in matrices}):
        params = [p for p in matrices if p.shape[-2:] == shape]
        muon = {"momentum": MUON_MOMENTUM[0], "beta2": MUON_BETA2, "weight_decay": WEIGHT_DECAY}
        groups.append({"kind": "muon", "params": params, "lr": MATRIX_LR, **muon})
    return MuonAdamW(groups, compiled, model.dtype)


def set_schedule(optimizer: MuonAdamW, progress: float, step: int) -> None:
    """Set rates, momentum and decay for this step, by the part of the budget that is used."""
    begin, end, steps = MUON_MOMENTUM
    factor = min(1.0, FINAL_LR + (1 - FINAL_LR) * (1 - progress) / WARMDOWN) if WARMDOWN else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        if group["kind"] == "muon":
            group["momentum"] = begin + (end - begin) * min(step / steps, 1.0)
            group["weight_decay"] = WEIGHT_DECAY * (1 - progress)


# Training loop --------------------------------------------------------------------------------------------------------


def check_knobs(length: int) -> None:
    """Refuse what can't work before anything is compiled."""
    tokens = DEVICE_BATCH_SIZE * length
    whole = f"a multiple of DEVICE_BATCH_SIZE {DEVICE_BATCH_SIZE} rows × {length} = {tokens} tokens"
    for name, works, must in (
        *((key, globals()[key] >= 1, "at least 1") for key in ("DEPTH", "HEAD_CHUNK", "DEVICE_BATCH_SIZE", "GUESSES")),
        ("HEAD_DIM", HEAD_DIM >= 32 and HEAD_DIM % 2 == 0, "even, and 32 or more"),
        ("WINDOW_PATTERN", set(WINDOW_PATTERN or "-") <= set("SL"), "of the letters S and L"),
        ("SOFT_CAP", 0 <= SOFT_CAP <= 70, "0, or more and at most 70, so that sums of e^70 fit float32"),
        ("CONTEXTS", min(CONTEXTS, default=1) >= 1, "numbers of tokens, each at least 1"),
        ("COUNTED", 0 < COUNTED < 1, "more than 0 and less than 1"),
        ("COUNT_ROWS", COUNT_ROWS >= 2**8, "at least 256: the rest of a hash of 38 bits has to fit int32"),
        ("FORCED_BACKEND", FORCED_BACKEND in (None, "", *BACKENDS), f"one of {BACKENDS} (AUTORESEARCH_ATTENTION)"),
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
    """Compile and allocate on throw-away steps that leave weights, optimizer and random state as they were."""
    tensors = [*model.parameters(), *model.buffers(), *optimizer.tensors()]
    before, states = [tensor.detach().clone() for tensor in tensors], (random.getstate(), np.random.get_state())
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            for _ in range(2):
                step()
    finally:
        optimizer.zero_grad()
        random.setstate(states[0])
        np.random.set_state(states[1])
        with torch.no_grad():
            torch._foreach_copy_(tensors, before)


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


@torch.no_grad()
def count(run: Run, model: GPT, part: tuple[float, float], most: int) -> int:
    """Fill the tables of guesses from at most so many tokens of a part of the text; return how many, 0 if too few."""
    run.status, length, vocab = "counting", run.corpus.seq_len, model.config.vocab_size
    loader = make_dataloader(run.tokenizer, 64, length, "train", run.seed, part)
    once = takewhile(lambda batch: batch[2] == 1, islice(loader, most // (64 * length)))
    batches = [(x.short(), y.short()) for x, y, _ in once]
    if not batches or len(batches) * 64 * length < COUNTED_TOKENS[0]:
        return 0
    ids, targets = (torch.cat(tensors).cpu().long() for tensors in zip(*batches, strict=True))

    def fill_table(i: int) -> None:
        pairs, counts = np.unique((hash_contexts(ids, CONTEXTS[i]) * vocab + targets).numpy(), return_counts=True)
        hashes, first, size = np.unique(pairs // vocab, return_index=True, return_counts=True)
        total, scores = np.add.reduceat(counts, first), counts * vocab + pairs % vocab
        order, winner = np.minimum(total, 65535).astype(np.uint16).argsort(kind="stable"), np.full(COUNT_ROWS, -1)
        winner[hashes[order] % COUNT_ROWS] = order  # of contexts with one row the last stays
        rows = np.zeros((COUNT_ROWS, 1 + GUESSES), dtype=np.int32)
        rows[:, 0] = np.append(hashes // COUNT_ROWS + 1, 0)[winner]
        for k in range(GUESSES):
            best = np.maximum.reduceat(scores, first)
            scores[scores == np.repeat(best, size)] = 0
            weight = np.sqrt(best // vocab / (total + 1))  # the root of the share; + 1: less if it was seen seldom
            rows[:, 1 + k] = (best % vocab * 2**16 + (weight * 2**16).astype(int))[winner]
        model.table[i] = torch.from_numpy(rows)

    with ThreadPool(2) as pool:
        pool.map(fill_table, range(len(CONTEXTS)))
    return ids.numel()


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
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # on a CPU it misses CUDA
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
    gc.disable()  # a collection in the middle of a step costs more than the garbage of five minutes
    run.start(model)
    counted = count(run, model, (0, COUNTED), COUNTED_TOKENS[1]) if CONTEXTS else 0
    most = min(COUNTED_TOKENS[1], int(counted / COUNTED))  # to count again, in the time that is kept for it
    reserve = 1.2 * run.progress() * most / counted if counted else 0.0  # more tokens take more than their part
    loader = make_dataloader(run.tokenizer, rows, length, "train", run.seed, (COUNTED if counted else 0, 1))
    step, mean, previous, run.status = 0, 0.0, None, "training"
    while (progress := run.progress() + reserve) < 1:
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
    if counted:  # from all of the text, no step will be misled any more
        count(run, model, (0, 1), most)
    run.stop(forward)
    loader.close()

    run.status, tokens = f"evaluating after {step} steps", step * TOTAL_BATCH_SIZE
    mfu = 100 * model.flops_per_token() * tokens / run.seconds / peak if peak else 0.0
    run.finish(forward, rows, step, tokens, config.depth, mfu)


if __name__ == "__main__":
    main()
