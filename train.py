"""Train a GPT for five minutes and print its val_bpb. An agent may change everything in this file.

uv run train.py                        # the default corpus of this machine, seed 42
uv run train.py --corpus FOLDER        # your own text
"""

import atexit
import gc
import logging
import math
import os
import re
import shlex
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import repeat
from multiprocessing.pool import ThreadPool
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages save page faults on a CPU

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from harness.run import Run, training_run
from prepare import get_device, make_dataloader, train_documents

# Knobs --------------------------------------------------------------------------------------------

CUDA = get_device().type == "cuda"  # a CPU sees far fewer tokens and needs other values

# model
DEPTH = 9 if CUDA else 4  # blocks
ASPECT_RATIO = 57 if CUDA else 48  # width per block; the width is rounded up to whole heads
HEAD_DIM = 128 if CUDA else 64  # width of an attention head
WINDOW_PATTERN = "SSSSL" if CUDA else "SSSL"  # S: short window, L: all the context; last block: L
SHORT_WINDOW = 1 / 8 if CUDA else 1 / 2  # short window, as a part of the context
ROTARY_BASE = 200_000  # base of the rotary frequencies
SMEAR = (0.25, 0.0) if CUDA else (0.5, 0.5)  # part of (attention, MLP) input from one token back
SOFT_CAP = 15.0 if CUDA else 9.0  # bound of the logits; 0: none
X0_LAMBDA = 0.05  # initial weight of the embedding in the input of each block
QK_SCALE = 1.0  # factor of the attention's logits
VALUE_EVERY = 2  # value embeddings in every n-th block, counted back from the last
GATE_CHANNELS = 32  # channels that decide how much of the value embeddings a head takes
GATE_SCALE = 2.0  # most that a head takes
MATRIX_INIT = 0.68  # bound of the blocks' initial weights, times √(3 / width)

# n-gram tables
NGRAM_CONTEXTS = () if CUDA else (2, 3, 4, 6, 8)  # lengths in tokens; (): no tables
NGRAM_MATCHES = 3  # longest matching contexts that give candidates
NGRAM_CANDIDATES = 6  # most frequent next tokens kept for a context
NGRAM_PART = 0.3  # part of each shard that is counted; the model trains on the rest
NGRAM_MAX_TOKENS = 2**27 if CUDA else 2**25  # no more tokens are counted
NGRAM_ROWS = 2**22  # rows of a table; each holds one context

# batch
TOTAL_BATCH_SIZE = 2**18 if CUDA else 2**12  # tokens a step
DEVICE_BATCH_SIZE = 128 if CUDA else 16  # rows a micro-batch; fewer if memory is short
HEAD_CHUNK = 2**15 if CUDA else 2**10  # tokens whose logits are in memory at a time

# optimizer: Muon for the matrices of the blocks
MATRIX_LR = 0.04 if CUDA else 0.028  # times √(rows / columns) for a tall matrix
WEIGHT_DECAY = 0.2  # times (1 - progress)^DECAY_POWER
DECAY_POWER = 1
MUON_MOMENTUM = (0.85, 0.95)  # at the start and after the warm-up
MUON_WARMUP = 0.15 if CUDA else 0.4  # first part of the budget, in which momentum rises
MUON_BETA2 = 0.95  # decay rate of NorMuon's variance; 0: no variance reduction

# optimizer: AdamW for the rest; ° scales a rate by (width / 768)^-½
HEAD_LR = 0.005 if CUDA else 0.0035  # °
HEAD_DECAY = 0.01  # weight decay of the head
EMBEDDING_LR = 0.9 if CUDA else 0.3  # ° of token and value embeddings
EMBEDDING_DECAY = 0.001  # weight decay of the token embedding
VALUE_DECAY = 0.003  # weight decay of the value embeddings
NGRAM_GATE_LR = 0.00035  # ° of the gate of the n-gram candidates
SCALAR_LR = 0.5  # of x0_lambdas; resid_lambdas get a hundredth
ADAM_BETAS = (0.8, 0.95)  # decay rates of the gradient's mean and mean square
ADAM_EPS = 1e-10  # keeps from dividing by 0

# schedule
WARMDOWN = 0.75 if CUDA else 0.5  # last part of the budget, in which the learning rates fall
FINAL_LR = 0.05 if CUDA else 0.0  # part of the learning rates that remains at the end

# torch.compile: "cpp.vec_isa_ok" skips a slow test of a CPU's vector instructions
COMPILE_OPTIONS = {} if CUDA else {"cpp.vec_isa_ok": True}

# Device -------------------------------------------------------------------------------------------

# Dense bf16 TFLOP/s with float32 sums, by a pattern of the device's name. Sources: NVIDIA's
# datasheets, and its whitepapers on GA102, Ada and Blackwell.
PEAK_TFLOPS = {
    r"A100\b": 312,
    r"H100 PCIe": 756,
    r"H[12]00 NVL": 835.5,
    r"(G?H200|H100)\b": 989.5,
    r"B200\b": 2250,
    r"L4$": 121,
    r"L40S$": 362,
    r"RTX 3090$": 71,
    r"RTX 4090$": 165.2,
    r"RTX 5090$": 209.5,
    r"RTX PRO 6000 Blackwell Workstation": 503.8,
}


def peak_flops(device: torch.device) -> float:
    """Return the device's dense bf16 peak in FLOP/s, 0 if it is unknown."""
    if device.type == "cpu":
        return 0.0
    name = torch.cuda.get_device_name()
    if re.search(r"MIG|-\d+[CQ]$", name):  # a slice of a GPU
        return 0.0
    for pattern, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{pattern}", name):
            return tflops * 1e12
    return 0.0


def set_up_compiler(device: torch.device) -> None:
    """Give torch.compile a folder, and discard what a killed process left in it."""
    name = torch.cuda.get_device_properties(device).uuid if CUDA else "cpu"
    folder = Path(tempfile.gettempdir(), f"autoresearch-{os.getuid()}-{name}")
    in_use = folder / "in_use"
    if in_use.exists():
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    in_use.touch()
    atexit.register(in_use.unlink, missing_ok=True)
    # PyTorch keeps its precompiled headers in the folder for temporary files, so that moves, too.
    tempfile.tempdir = os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)

    from torch.utils import cpp_extension

    # PyTorch 2.11 quotes only one of the two paths that it hands to the compiler.
    cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)


def choose_precision(device: torch.device) -> tuple[torch.dtype, bool, str]:
    """Return the dtype to compute in, whether to compile, and why not, if it should."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cpu" and not has_bf16:
        return torch.float32, False, ""
    try:
        set_up_compiler(device)
        torch.compile(torch.exp)(torch.ones(8, device=device))
        return torch.bfloat16, True, ""
    except Exception as error:  # no compiler, or one that can't write, link or load
        # What the compiler put out, if anything, else the error itself.
        *_, reason = re.findall(r"Output:\n(.+)", f"Output:\n{type(error).__name__}: {error}")
        return torch.bfloat16, False, f"torch.compile does not work: {reason:.200}"


# Attention ----------------------------------------------------------------------------------------

FLASH_KERNEL = {"repo_id": "kernels-community/flash-attn3", "revision": "v1"}  # on the kernel hub


@cache
def load_flash3() -> Callable:
    """Return flash-attention 3, downloaded at its first use. Raises whatever is in the way."""
    import requests
    from huggingface_hub import constants, utils
    from kernels import get_local_kernel, install_kernel

    def download():
        requests.head(constants.ENDPOINT, timeout=3)  # fails sooner than the hub's client
        print(f"downloading {FLASH_KERNEL['repo_id']}, once", flush=True)
        utils.disable_progress_bars()
        return install_kernel(**FLASH_KERNEL)

    logging.getLogger("kernels").setLevel(logging.ERROR)
    try:
        path = install_kernel(**FLASH_KERNEL, local_files_only=True)
    except Exception:
        if constants.HF_HUB_OFFLINE:
            raise
        path = ThreadPool(1).apply_async(download).get(60)  # a hub that hangs must not hang the run
    return get_local_kernel(path).flash_attn_func


def allow_window(window: int) -> Callable:
    """Return FlexAttention's mask_mod that shows a query itself and `window` keys before it."""
    # A closure, because torch.compile does not guard default arguments.
    return lambda batch, head, query, key: (key <= query) & (key >= query - window)


class Attention:
    """softmax(q·k / √d) v over each position and the `window` positions before it."""

    def __init__(self, backend: str, length: int, windows: set[int], device: torch.device):
        self.backend = backend
        self.masks = {}
        if backend == "flash3":
            self.flash3 = load_flash3()
            return
        positions = torch.arange(length, device=device)
        for window in windows:
            allowed = allow_window(window)
            if backend == "flex":
                mask = create_block_mask(allowed, None, None, length, length, device=device)
            else:  # a term added to the scores
                visible = allowed(0, 0, positions[:, None], positions)
                mask = torch.where(visible, 0.0, -math.inf)
            self.masks[window] = mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """q, k, v and the result: (B, T, H, D). Only sdpa and matmul take a T below `length`."""
        if self.backend == "flash3":
            y = self.flash3(q, k, v, causal=True, window_size=(window, 0))
            return y[0] if isinstance(y, tuple) else y

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = self.masks[window]
        if self.backend == "flex":
            return flex_attention(q, k, v, block_mask=mask).transpose(1, 2)

        mask = mask[: q.size(2), : q.size(2)]
        if self.backend == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        else:
            scores = (q @ k.mT).float() * q.size(-1) ** -0.5 + mask
            y = scores.softmax(-1).to(v.dtype) @ v
        return y.transpose(1, 2)


def probe_attention(backend: str, device: torch.device, compiled: bool) -> None:
    """Raise an error unless a backend gives the outputs and gradients of matmul."""
    length, window = 256, 100
    generator = torch.Generator(device).manual_seed(0)  # keeps the run's random state
    shape = (4, 2, length, 2, HEAD_DIM)
    *inputs, grad = torch.randn(shape, device=device, generator=generator).bfloat16()
    for x in inputs:
        x.requires_grad_()

    results = []
    for name in (backend, "matmul"):
        attention = Attention(name, length, {window}, device)
        if compiled and not results:
            attention = torch.compile(attention, dynamic=False)
        y = attention(*inputs, window)
        results.append([y, *torch.autograd.grad(y, inputs, grad)])

    for seen, expected in zip(*results, strict=True):
        error = (seen - expected).norm() / expected.norm()
        if not error < 0.02:
            raise RuntimeError(f"its results are wrong by {error:.0%}")


def choose_attention(device: torch.device, compiled: bool) -> tuple[str, str]:
    """Return the best backend that works, and why no better one does."""
    if device.type == "cpu":
        return "matmul", ""

    candidates = ["flex"] if compiled else []
    if torch.cuda.get_device_capability() == (9, 0):  # Hopper
        candidates.insert(0, "flash3")
    problems = []
    for backend in candidates:
        try:
            probe_attention(backend, device, compiled)
            return backend, "; ".join(problems)
        except Exception as error:  # no network, no build for this PyTorch, a broken file
            problems.append(f"{backend} does not work: {error!r:.200}")
    return "sdpa", "; ".join(problems) or "FlexAttention needs torch.compile"


# Model --------------------------------------------------------------------------------------------


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
        """Channels, a multiple of head_dim."""
        return math.ceil(self.depth * self.aspect_ratio / self.head_dim) * self.head_dim

    @property
    def windows(self) -> list[int]:
        """How many earlier positions each block sees."""
        sizes = {"S": int(self.seq_len * SHORT_WINDOW), "L": self.seq_len}
        pattern = self.window_pattern * self.depth
        return [sizes[letter] for letter in pattern[: self.depth - 1] + "L"]

    @property
    def value_blocks(self) -> range:
        """Blocks with value embeddings, the last included."""
        return range((self.depth - 1) % VALUE_EVERY, self.depth, VALUE_EVERY)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without weights."""
    return F.rms_norm(x, (x.size(-1),))


def smear(x: Tensor, part: float) -> Tensor:
    """Take the first part of the channels of x (B, T, width) from the position before."""
    size = int(part * x.size(-1))
    if size == 0:
        return x
    before = F.pad(x[:, :-1, :size], (0, 0, 1, 0))
    return torch.cat([before, x[..., size:]], dim=-1)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Apply the rotary position embedding to x (B, T, H, D); rotary: (2, T, 1, D/2)."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    left = a * cos + b * sin
    right = b * cos - a * sin
    return torch.cat([left, right], dim=-1)


class Block(nn.Module):
    """Attention and MLP. Value embeddings join v through a gate for each head."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        width = config.width
        self.head_dim = config.head_dim
        self.window = config.windows[index]
        self.qkv = nn.Parameter(torch.empty(3, width, width))  # three matrices for Muon
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        if index in config.value_blocks:
            self.gate = nn.Linear(GATE_CHANNELS, width // self.head_dim, bias=False)

    def forward(
        self, x: Tensor, values: Tensor | None, rotary: Tensor, attention: Attention
    ) -> Tensor:
        """x, values and the result: (B, T, width)."""
        y = smear(norm(x), SMEAR[0])
        qkv = F.linear(y, self.qkv.flatten(0, 1))
        qkv = qkv.unflatten(-1, (3, -1, self.head_dim))
        q, k, v = qkv.unbind(-3)
        if values is not None:
            gate = GATE_SCALE * torch.sigmoid(self.gate(y[..., :GATE_CHANNELS]))
            values = values.unflatten(-1, (-1, self.head_dim))
            v = v + gate.unsqueeze(-1) * values
        q = norm(rotate(q, rotary)) * QK_SCALE
        k = norm(rotate(k, rotary))
        y = attention(q, k, v, self.window)
        x = x + self.attention_out(y.flatten(-2))

        y = smear(norm(x), SMEAR[1])
        return x + self.mlp_out(F.relu(self.mlp_in(y)).square())


class GPT(nn.Module):
    """The model. Its attention may be replaced by another one with the same windows."""

    def __init__(self, config: Config, attention: Attention, dtype: torch.dtype, ngrams=None):
        super().__init__()
        self.config = config
        self.attention = attention
        self.dtype = dtype
        self.ngrams = ngrams
        vocab_size, width, depth = config.vocab_size, config.width, config.depth
        self.embedding = nn.Embedding(vocab_size, width)
        values = len(config.value_blocks) * width
        self.value_embeddings = nn.Embedding(vocab_size, values)  # of all blocks in one look-up
        self.blocks = nn.ModuleList(Block(config, i) for i in range(depth))
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(depth))
        self.x0_lambdas = nn.Parameter(torch.full((depth,), X0_LAMBDA))

        exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        positions = torch.arange(config.seq_len).float()
        angle = torch.outer(positions, ROTARY_BASE**-exponent)[:, None]
        rotary = torch.stack([angle.cos(), angle.sin()]).to(dtype)
        self.register_buffer("rotary", rotary, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Start output projections and gates at zero, so that every block is the identity."""
        bound = math.sqrt(3 / self.config.width)
        nn.init.normal_(self.embedding.weight, std=1.0)
        nn.init.normal_(self.head.weight, std=0.001)
        nn.init.uniform_(self.value_embeddings.weight, -bound, bound)
        self.value_embeddings.to(self.dtype)
        self.embedding.to(self.dtype)

        zero = ("attention_out", "mlp_out", "gate")
        for name, weight in self.blocks.named_parameters():
            size = 0.0 if name.split(".")[1] in zero else MATRIX_INIT * bound
            nn.init.uniform_(weight, -size, size)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits, float32 (B, T, vocab), of ids (B, T); with targets the mean loss."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            x = norm(self.embedding(ids))
            if self.ngrams:
                embedding, candidates, weights = self.ngrams(ids)
                x = x + embedding.to(x.dtype)
            x0 = x
            rotary = self.rotary[:, : ids.size(1)]
            values = iter(self.value_embeddings(ids).split(self.config.width, -1))
            for i, block in enumerate(self.blocks):
                own_values = next(values) if i in self.config.value_blocks else None
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
                x = block(x, own_values, rotary, self.attention)
            x = norm(x)
            bonus = []
            if self.ngrams:
                bonus = [candidates, weights * F.linear(x, self.ngrams.gate).float()]
            if targets is None:
                return cap_logits(self.head(x), *bonus)

        x = x.flatten(0, 1).to(self.dtype)
        weight = self.head.weight.to(self.dtype)
        bonus = [tensor.flatten(0, 1) for tensor in bonus]
        return ChunkedLoss.apply(x, weight, targets.flatten(), *bonus)

    def flops_per_token(self) -> int:
        """Count the FLOPs of forward and backward; all of a window counts, as in PaLM.

        Source: appendix B of https://arxiv.org/abs/2204.02311.
        """
        weights = 0
        for name, p in self.named_parameters():
            if name.startswith(("blocks", "head", "ngrams")):
                weights += p.numel()
        return 6 * weights + 12 * self.config.width * sum(self.config.windows)


def cap_logits(logits: Tensor, *bonus: Tensor) -> Tensor:
    """Add the bonus, then return SOFT_CAP · tanh(logits / SOFT_CAP), float32 (..., vocab).

    bonus: nothing, or candidates, int64 (..., n), and what to add to their logits, float32.
    """
    logits = logits.float()
    if bonus:
        logits = logits.scatter_add(-1, *bonus)
    if not SOFT_CAP:
        return logits.clamp(-70, 70)  # float32 holds sums of e^70
    return 2 * SOFT_CAP * torch.sigmoid(logits * (2 / SOFT_CAP)) - SOFT_CAP


def chunk_loss(x: Tensor, weight: Tensor, targets: Tensor, *bonus: Tensor) -> Tensor:
    """Return the summed cross-entropy of some tokens; autograd differentiates it.

    x: (N, width). weight: (vocab, width). targets: (N,). bonus: as for cap_logits.
    """
    logits = cap_logits(x @ weight.T, *bonus)
    exp_sum = torch.exp2(logits * math.log2(math.e)).sum(-1)  # faster than exp on a CPU
    tokens = torch.arange(len(weight), device=x.device, dtype=torch.int32)
    is_target = targets[:, None].int() == tokens
    return exp_sum.log().sum() - (logits * is_target).sum()


class ChunkedLoss(torch.autograd.Function):
    """Mean of chunk_loss, HEAD_CHUNK tokens at a time. It keeps gradients instead of logits."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, *bonus: Tensor) -> Tensor:
        total, weight_grad, grads = 0.0, 0.0, []
        inputs = (0, 1, 4) if bonus else (0, 1)  # x, weight, and what is added to the logits
        compute = torch.func.grad_and_value(chunk_loss, argnums=inputs)
        tensors = (tensor.split(HEAD_CHUNK) for tensor in (x, targets, *bonus))
        for part, *rest in zip(*tensors, strict=True):
            (x_grad, part_grad, *bonus_grad), loss = compute(part, weight, *rest)
            weight_grad = weight_grad + part_grad.float()
            grads.append((x_grad, *bonus_grad))
            total = total + loss
        x_grad, *bonus_grad = (torch.cat(parts) for parts in zip(*grads, strict=True))
        ctx.save_for_backward(x_grad, weight_grad, *bonus_grad)
        ctx.tokens = len(x)
        return total / len(x)

    @staticmethod
    def backward(ctx, factor: Tensor) -> tuple:
        grads = (grad * (factor / ctx.tokens) for grad in ctx.saved_tensors)
        x_grad, weight_grad, *bonus_grad = grads
        return x_grad, weight_grad, None, *([None, *bonus_grad] if bonus_grad else [])


# N-gram tables ------------------------------------------------------------------------------------


def hash_contexts(ids: Tensor, context: int) -> Tensor:
    """Hash the last `context` tokens at each position of ids (B, T): int64, below 2^39.

    Zeros stand before the first token.
    """
    hashes = ids
    for back in range(1, context):
        hashes = hashes * 26544357 & (2**38 - 1)  # the factor is odd and below 2^25
        hashes[:, back:] += ids[:, :-back]
    return hashes


def sort(values: Tensor) -> Tensor:
    """Return values (n,) in ascending order, on a CPU in place: NumPy sorts faster there."""
    if values.is_cuda:
        return values.sort().values
    values.numpy().sort()
    return values


def fill_table(table: Tensor, context: int, ids: Tensor) -> None:
    """Fill a table of NgramTables with what follows each context of one length in ids (N, T)."""
    contexts = hash_contexts(ids, context)[:, :-1]
    pairs = sort(torch.add(ids[:, 1:], contexts, alpha=2**15).flatten())
    pairs, counts = pairs.unique_consecutive(return_counts=True)
    contexts, index, sizes = (pairs >> 15).unique_consecutive(True, True)  # inverse and counts
    totals = torch.zeros_like(contexts).index_add_(0, index, counts)

    # A row belongs to the most frequent of its contexts.
    row = contexts % NGRAM_ROWS
    claim = totals * 2**32 + torch.arange(len(row), device=row.device)
    best = claim.new_zeros(NGRAM_ROWS).scatter_reduce_(0, row, claim, "amax")
    wins = best[row] == claim
    table[row[wins], 0] = (contexts[wins] // NGRAM_ROWS + 1).int()

    # Within a context the most frequent token comes first.
    order = index * 2**20 + 2**20 - counts.clamp(max=0xFFFFF)
    order = sort(order * 2**15 + (pairs & 0x7FFF))
    place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[index]
    kept = wins[index] & (place < NGRAM_CANDIDATES)
    order, index, place = order[kept], index[kept], place[kept]
    count = 2**20 - (order >> 15 & 0xFFFFF)
    weight = (count / (totals[index] + 1)).sqrt()  # less for rare contexts
    packed = (order & 0x7FFF) * 2**16 + (weight * 2**16).long()
    table[row[index], 1 + place] = packed.int()


class NgramTables(nn.Module):
    """Candidates for the next token: those that most often followed the last few tokens.

    Of all context lengths the longest that match give candidates.
    """

    def __init__(self, vocab_size: int, width: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(NGRAM_MATCHES * NGRAM_CANDIDATES, width))
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        self.projection = draw(vocab_size, math.ceil(width / NGRAM_MATCHES)).to(device, dtype)
        self.level_projection = draw(1 + len(NGRAM_CONTEXTS), width).to(device, dtype)

        # A row: its context's hash // NGRAM_ROWS + 1, or 0 if it is empty, then the candidates,
        # each as token · 2^16 + weight · 2^16. Not a buffer: its digest would take seconds.
        shape = (len(NGRAM_CONTEXTS), NGRAM_ROWS, 1 + NGRAM_CANDIDATES)
        self.tables = torch.zeros(shape, dtype=torch.int32, device=device)
        self.final_tables = None  # of all training text

    def fit(self, ids: Tensor) -> Tensor:
        """Return tables for rows of text, int64 (N, T)."""
        tables = torch.zeros_like(self.tables)
        with ThreadPool(1 if CUDA else 2) as pool:
            pool.starmap(fill_table, zip(tables, NGRAM_CONTEXTS, repeat(ids)))
        return tables

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the n-gram embedding of ids (B, T), and candidates with their weights.

        Candidates, int64, and weights, float32: (B, T, NGRAM_MATCHES · NGRAM_CANDIDATES), those of
        the longest match first; a weight is 0 where nothing matches. Embedding: (B, T, width).
        """
        hashes = torch.stack([hash_contexts(ids, context) for context in NGRAM_CONTEXTS], dim=-1)
        number = torch.arange(len(NGRAM_CONTEXTS), device=ids.device)
        rows = hashes % NGRAM_ROWS
        known = self.tables[number, rows, 0] == hashes // NGRAM_ROWS + 1
        level = (known * (number + 1)).topk(NGRAM_MATCHES).values  # (B, T, matches), 0 if none
        number = (level - 1).clamp(min=0)
        packed = self.tables[number, rows.gather(-1, number), 1:]
        candidates = (packed >> 16).long()
        weights = (packed & 0xFFFF) * (level > 0)[..., None] / 2**16

        projected = weights[..., None] * self.projection[candidates]
        embedding = projected.sum(-2).flatten(2)[..., : self.gate.size(1)]
        embedding = embedding + self.level_projection[level[..., 0]]
        return embedding, candidates.flatten(2), weights.flatten(2)


# Optimizer ----------------------------------------------------------------------------------------

# The polynomials of Polar Express, https://arxiv.org/abs/2505.16932, for a safety margin of 2 %.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the nearest matrices with singular values of about 1 to a stack (n, rows, cols)."""
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    size = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (size * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon_update(
    p: Tensor, g: Tensor, velocity: Tensor, variance: Tensor, settings: dict, dtype: torch.dtype
) -> None:
    """Update the stack p (n, rows, cols), float32, in place, orthogonalizing in `dtype`.

    Muon (https://kellerjordan.github.io/posts/muon) with Nesterov momentum, NorMuon's variance
    reduction (https://arxiv.org/abs/2510.05491) and cautious weight decay
    (https://arxiv.org/abs/2510.12402). variance: (n, rows, 1), or (n, 1, cols) if wide.
    """
    momentum = settings["momentum"]
    velocity.lerp_(g, 1 - momentum)
    step = orthogonalize(g.lerp(velocity, momentum), dtype).float()

    size = step.norm(dim=(-2, -1), keepdim=True)
    neuron_dim = -1 if variance.size(-1) == 1 else -2
    mean_square = step.square().mean(neuron_dim, keepdim=True)
    if MUON_BETA2:
        variance.lerp_(mean_square, 1 - settings["beta2"])
        step = step * variance.clamp(min=1e-10).rsqrt()
    new_size = step.norm(dim=(-2, -1), keepdim=True)
    step = step * (size / new_size.clamp(min=1e-10))

    lr = settings["lr"] * max(1.0, p.size(1) / p.size(2)) ** 0.5
    agrees = step * p >= 0
    p.sub_(lr * (step + settings["weight_decay"] * agrees * p))


def adamw_update(
    p: Tensor, g: Tensor, mean: Tensor, square: Tensor, step: Tensor, settings: dict
) -> None:
    """Update p, of any dtype, in place as AdamW (https://arxiv.org/abs/1711.05101) in float32."""
    lr, beta1, beta2 = settings["lr"], settings["beta1"], settings["beta2"]
    g = g.float()
    mean.lerp_(g, 1 - beta1)
    square.lerp_(g.square(), 1 - beta2)
    denominator = (square / (1 - beta2**step)).sqrt() + settings["eps"]
    decayed = p.float() * (1 - lr * settings["weight_decay"])
    p.copy_(decayed - lr / (1 - beta1**step) * mean / denominator)


def stack_matrices(tensors: list[Tensor]) -> Tensor:
    """Copy matrices and stacks of them, all of one shape, into one stack (n, rows, cols)."""
    shape = tensors[0].shape[-2:]
    return torch.cat([tensor.reshape(-1, *shape) for tensor in tensors])


class MuonAdamW(torch.optim.Optimizer):
    """Updates groups of `kind` adamw or muon; the matrices of a muon group have one shape."""

    def __init__(self, groups: list[dict], compiled: bool, dtype: torch.dtype):
        super().__init__(groups, {"lr": 0.0})
        self.dtype = dtype
        self.adamw, self.muon, self.number = adamw_update, muon_update, float
        if compiled:
            self.adamw = torch.compile(adamw_update, dynamic=False, fullgraph=True)
            self.muon = torch.compile(muon_update, dynamic=False, fullgraph=True)
            self.number = torch.tensor  # a new float would compile again
        self.steps = torch.zeros(())
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient."""
        self.steps += 1
        for group in self.param_groups:
            settings = {}
            for name, value in group.items():
                if isinstance(value, int | float):
                    settings[name] = self.number(float(value))
            if group["kind"] == "muon":
                self.step_muon(group["params"], settings)
                continue
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p, dtype=torch.float32)
                    state["square"] = state["mean"].clone()
                self.adamw(p, p.grad, **state, step=self.steps, settings=settings)

    def step_muon(self, params: list[Tensor], settings: dict) -> None:
        """Update the matrices of a group as one stack."""
        stack = stack_matrices(params)
        grads = stack_matrices([p.grad for p in params])
        state = self.state[params[0]]
        if not state:
            neuron_dim = -1 if stack.size(1) >= stack.size(2) else -2
            state["velocity"] = torch.zeros_like(stack)
            state["variance"] = state["velocity"].mean(neuron_dim, keepdim=True)
        self.muon(stack, grads, **state, settings=settings, dtype=self.dtype)

        sizes = [p.numel() // stack[0].numel() for p in params]
        parts = stack.split(sizes)
        updated = [part.view_as(p) for p, part in zip(params, parts, strict=True)]
        torch._foreach_copy_(params, updated)


def adamw_group(params: list[Tensor], lr: float, decay: float = 0.0) -> dict:
    """Return a group of parameters for AdamW."""
    return {
        "kind": "adamw",
        "params": params,
        "lr": lr,
        "weight_decay": decay,
        "beta1": ADAM_BETAS[0],
        "beta2": ADAM_BETAS[1],
        "eps": ADAM_EPS,
    }


def build_optimizer(model: GPT, compiled: bool) -> MuonAdamW:
    """Sort the parameters into groups."""
    scale = (model.config.width / 768) ** -0.5
    groups = [
        adamw_group([model.head.weight], HEAD_LR * scale, HEAD_DECAY),
        adamw_group([model.embedding.weight], EMBEDDING_LR * scale, EMBEDDING_DECAY),
        adamw_group([model.value_embeddings.weight], EMBEDDING_LR * scale, VALUE_DECAY),
        adamw_group([model.resid_lambdas], SCALAR_LR / 100),
        adamw_group([model.x0_lambdas], SCALAR_LR),
    ]
    if model.ngrams:
        groups.append(adamw_group([model.ngrams.gate], NGRAM_GATE_LR * scale))

    muon = {"kind": "muon", "lr": MATRIX_LR, "momentum": MUON_MOMENTUM[0]}
    muon |= {"beta2": MUON_BETA2, "weight_decay": WEIGHT_DECAY}
    by_shape = defaultdict(list)
    for p in model.blocks.parameters():
        by_shape[p.shape[-2:]].append(p)
    groups += [muon | {"params": params} for params in by_shape.values()]
    return MuonAdamW(groups, compiled, model.dtype)


# Schedules ----------------------------------------------------------------------------------------


def set_schedule(optimizer: MuonAdamW, progress: float) -> None:
    """Set rates, momentum and weight decay. progress: the part of the budget that is used."""
    lr_factor = 1.0
    if progress > 1 - WARMDOWN:
        lr_factor = FINAL_LR + (1 - FINAL_LR) * (1 - progress) / WARMDOWN
    start, end = MUON_MOMENTUM
    momentum = start + (end - start) * min(progress / MUON_WARMUP, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_factor
        if group["kind"] == "muon":
            group["momentum"] = momentum
            group["weight_decay"] = WEIGHT_DECAY * (1 - progress) ** DECAY_POWER


# Training loop ------------------------------------------------------------------------------------


def require(works: bool, message: str) -> None:
    """Raise SystemExit with the message unless a setting works."""
    if not works:
        raise SystemExit(message)


def check_knobs(length: int) -> None:
    """Refuse settings that cannot work with rows of `length` tokens."""
    require(DEPTH >= 1, f"{DEPTH=} must be at least 1")
    require(HEAD_DIM >= 32 and HEAD_DIM % 2 == 0, f"{HEAD_DIM=} must be even, and at least 32")
    letters = set(WINDOW_PATTERN or " ")
    require(letters <= set("SL"), f"{WINDOW_PATTERN=} must consist of S and L")
    require(0 <= SOFT_CAP <= 70, f"{SOFT_CAP=} must be from 0 to 70: float32 holds sums of e^70")

    require(sorted({0, *NGRAM_CONTEXTS}) == [0, *NGRAM_CONTEXTS], f"{NGRAM_CONTEXTS=} must ascend")
    matches = f"{NGRAM_MATCHES=} must be from 1 to the {len(NGRAM_CONTEXTS)} NGRAM_CONTEXTS"
    require(not NGRAM_CONTEXTS or 1 <= NGRAM_MATCHES <= len(NGRAM_CONTEXTS), matches)
    require(0 < NGRAM_PART < 1, f"{NGRAM_PART=} must be above 0 and below 1")
    require(MUON_WARMUP > 0, f"{MUON_WARMUP=} must be above 0")

    require(DEVICE_BATCH_SIZE >= 1, f"{DEVICE_BATCH_SIZE=} must be at least 1")
    require(HEAD_CHUNK >= 1, f"{HEAD_CHUNK=} must be at least 1")
    tokens = DEVICE_BATCH_SIZE * length
    divides = TOTAL_BATCH_SIZE > 0 and TOTAL_BATCH_SIZE % tokens == 0
    rows = f"{DEVICE_BATCH_SIZE=} rows x {length} = {tokens} tokens"
    require(divides, f"{TOTAL_BATCH_SIZE=} must be a multiple of {rows}")


def train_step(model: nn.Module, optimizer: MuonAdamW, batches: list) -> Tensor:
    """Take one step on micro-batches (x, y, ...); return their mean loss, a scalar tensor."""
    total = 0.0
    for x, y, *_ in batches:
        loss = model(x, y) / len(batches)
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return total


def warm_up(run: Run, model: GPT, rows: int, compiled: bool) -> tuple[nn.Module, MuonAdamW]:
    """Compile and allocate on two throw-away steps; return the model to call and its optimizer.

    Weights, optimizer and PyTorch's random state are then as if the steps had never happened.
    """
    length = run.corpus.seq_len
    optimizer = build_optimizer(model, compiled and run.device.type == "cuda")
    forward = model
    if compiled:
        forward = torch.compile(model, dynamic=False, options=COMPILE_OPTIONS)

    loader = make_dataloader(run.tokenizer, rows, length, "train", run.seed)
    batches = [next(loader)]
    if rows * length < TOTAL_BATCH_SIZE:  # more micro-batches add to the gradients of the first
        batches *= 2

    tensors = list(model.parameters())
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            for _ in range(2):
                train_step(forward, optimizer, batches)
    finally:
        optimizer.zero_grad()
        optimizer.state.clear()
        optimizer.steps.zero_()
        with torch.no_grad():
            torch._foreach_copy_(tensors, saved)
    return forward, optimizer


def is_out_of_memory(error: Exception) -> bool:
    """Return whether CUDA, cuBLAS or a CPU ran out of memory, also if a compiler says so."""
    text = f"{type(error)}: {error}"
    words = ("OutOfMemory", "out of memory", "ALLOC_FAILED", "can't allocate memory")
    return any(word in text for word in words)


def fit_memory(run: Run, model: GPT, compiled: bool) -> tuple[nn.Module, MuonAdamW, int]:
    """Warm up with the most rows that fit memory; return the model to call, optimizer, and rows."""
    rows = DEVICE_BATCH_SIZE
    while True:
        run.status = f"warm-up{' and compile' * compiled}, micro-batches of {rows} rows"
        try:
            return *warm_up(run, model, rows, compiled), rows
        except Exception as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
        rows //= 2
        while TOTAL_BATCH_SIZE % (rows * run.corpus.seq_len):
            rows -= 1
        print(f"out of memory: micro-batches of {rows} rows instead", flush=True)
        torch.compiler.reset()  # or each attempt counts towards the limit of recompilations
        gc.collect()
        torch.cuda.empty_cache()


def read_text(run: Run, part: tuple[float, float]) -> Tensor:
    """Return the documents of a part of each shard in one row, int64 (1, N), on the device.

    These are at most NGRAM_MAX_TOKENS tokens, and one document.
    """
    text, size = [], 0
    for ids, epoch in train_documents(run.corpus, run.seed, part):
        if epoch > 1 or size > NGRAM_MAX_TOKENS:
            break
        text.append(ids)
        size += len(ids)
    return torch.from_numpy(np.concatenate(text).astype(np.int64))[None].to(run.device)


def count_ngrams(run: Run, ngrams: NgramTables) -> None:
    """Make the tables for training, and those of all training text for the end.

    Tables of the text that a model trains on are right too often, and it would trust them too much.
    """
    run.status = "counting n-grams"
    ngrams.tables.copy_(ngrams.fit(read_text(run, (0, NGRAM_PART))))
    ngrams.final_tables = ngrams.fit(read_text(run, (0, 1)))
    print(f"n-grams: counting took {run.progress():.1%} of the time", flush=True)


def build_model(run: Run) -> tuple[GPT, bool]:
    """Return a model that suits the device, and whether to compile it; print what was chosen."""
    length = run.corpus.seq_len
    dtype, compiled, problem = choose_precision(run.device)
    if problem:
        run.fallbacks["not compiled"] = problem
    backend, problem = choose_attention(run.device, compiled)
    if problem:
        run.fallbacks[f"attention {backend}"] = problem
    print(f"precision: {dtype}, {'' if compiled else 'not '}compiled; attention: {backend}")

    vocab_size = run.tokenizer.get_vocab_size()
    config = Config(vocab_size, length, DEPTH, HEAD_DIM, ASPECT_RATIO, WINDOW_PATTERN)
    attention = Attention(backend, length, set(config.windows), run.device)
    ngrams = None
    if NGRAM_CONTEXTS:
        ngrams = NgramTables(vocab_size, config.width, dtype, run.device)
    model = GPT(config, attention, dtype, ngrams).to(run.device)
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
    if ngrams:
        size += f", n-gram tables of {2 * ngrams.tables.nbytes / 2**20:.0f} MB"
    print(f"model: {DEPTH} blocks of width {config.width}, {size}", flush=True)
    return model, compiled


def train(run: Run) -> None:
    """Build, warm up, train for the budget, evaluate."""
    length = run.corpus.seq_len
    check_knobs(length)
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", "flex_attention called without")  # as run.start calls it
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # misses CUDA on a CPU

    model, compiled = build_model(run)
    peak = peak_flops(run.device)
    if not peak:
        print("mfu_percent: will be 0.00, as the peak of this device is unknown", flush=True)
    forward, optimizer, rows = fit_memory(run, model, compiled)
    micro_batches = TOTAL_BATCH_SIZE // (rows * length)
    print(f"step: {micro_batches} micro-batches of {rows} rows of {length} tokens", flush=True)

    gc.collect()
    gc.disable()  # a collection takes longer than it is worth in five minutes
    run.start(model)

    if model.ngrams:
        count_ngrams(run, model.ngrams)
    part = (NGRAM_PART if model.ngrams else 0, 1)  # of each shard, to train on
    loader = make_dataloader(run.tokenizer, rows, length, "train", run.seed, part)

    run.status = "training"
    step, mean_loss, previous = 0, 0.0, None
    while (progress := run.progress()) < 1:
        set_schedule(optimizer, progress)
        batches = [next(loader) for _ in range(micro_batches)]
        loss = train_step(forward, optimizer, batches)

        if previous is not None:  # read a step late, so that the device is never kept waiting
            value = previous.item()
            diverged = f"the loss of step {step} is {value}: lower the learning rates"
            require(value < 3 * math.log(model.config.vocab_size), diverged)
            mean_loss += (value - mean_loss) / min(step, 10)
            epoch = batches[-1][2]
            run.status = (
                f"step {step}, {progress:.0%} of the time, loss {mean_loss:.4f}, epoch {epoch}"
            )
        previous = loss
        step += 1

    if model.ngrams:
        model.ngrams.tables.copy_(model.ngrams.final_tables)
    run.stop(forward)
    loader.close()

    run.status = f"evaluating after {step} steps"
    tokens = step * TOTAL_BATCH_SIZE
    flops = model.flops_per_token() * tokens / run.seconds
    mfu = 100 * flops / peak if peak else 0.0
    run.finish(forward, rows, step, tokens, model.config.depth, mfu)


def main() -> None:
    """Run the command line."""
    with training_run(__doc__) as run:
        train(run)


if __name__ == "__main__":
    main()
