"""Model and optimizer of train.py, each against something independent."""

import importlib.util
import math
import random
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import give_guesses

import prepare
import train

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("small_tables")


def small_model(vocab_size=256, length=64, depth=4, backend="matmul", dtype=torch.float32):
    torch.manual_seed(0)
    config = train.Config(vocab_size, length, depth, head_dim=32, aspect_ratio=16, window_pattern="SSSL")
    return train.GPT(config, train.Attention(backend, length, set(config.windows), CPU), dtype)


def random_ids(model, rows=3):
    return torch.randint(model.config.vocab_size, (rows, model.config.seq_len))


# model


def test_the_reference_size_is_the_published_one():
    config = train.Config(8192, 2048, depth=8, head_dim=128, aspect_ratio=64, window_pattern="SSSL")
    assert config.width == 512
    assert config.windows == [1024, 1024, 1024, 2048, 1024, 1024, 1024, 2048]
    with torch.device("meta"):
        model = train.GPT(config, None, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(50.3e6, rel=0.001)


def test_the_width_is_rounded_up_to_whole_heads():
    assert train.Config(8192, 2048, depth=9, head_dim=128, aspect_ratio=57, window_pattern="L").width == 640


def test_the_last_block_sees_the_whole_context():
    assert train.Config(8192, 2048, depth=5, head_dim=128, aspect_ratio=64, window_pattern="S").windows == [
        1024
    ] * 4 + [2048]


def test_weights_start_as_the_recipe_says():
    model = small_model(vocab_size=4096, length=64, depth=8)
    bound = math.sqrt(3 / model.config.width)
    assert [name for name, _ in model.value_embeddings.named_children()] == ["1", "3", "5", "7"]
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.01)
    assert model.head.weight.std().item() == pytest.approx(0.001, rel=0.01)
    assert model.residual_scales.tolist() == [1.0] * 8
    assert model.first_scales.tolist() == pytest.approx([0.05] * 8)
    for block in model.blocks:
        assert not any(layer.weight.any() for layer in (block.attention_out, block.mlp_out))
        for weight in (*block.qkv, block.mlp_in.weight):
            assert weight.abs().max() <= 0.68 * bound
            assert weight.std().item() == pytest.approx(0.68 * bound / math.sqrt(3), rel=0.05)
    assert not model.blocks[7].gate.weight.any()
    assert model.value_embeddings["7"].weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_an_untrained_model_guesses_uniformly():
    model = small_model()
    ids = random_ids(model)
    assert model(ids, ids).item() == pytest.approx(math.log(256), rel=1e-3)


@pytest.mark.parametrize(("cap", "most"), [(15.0, 15), (0.0, 70)])
def test_logits_stay_within_the_soft_cap_and_are_float32(monkeypatch, cap, most):
    monkeypatch.setattr(train, "SOFT_CAP", cap)
    model = small_model(dtype=torch.bfloat16)
    torch.nn.init.normal_(model.head.weight, std=100.0)
    logits = model(random_ids(model))
    assert logits.dtype == torch.float32
    assert 0.999 * most < logits.abs().max() <= most


def shake(model, *ids):
    """Give every weight that starts at zero a value, and guesses to all contexts in ids: all parts take part."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for batch in ids:
        give_guesses(model, batch)


def test_later_tokens_do_not_change_earlier_logits_and_earlier_ones_change_later():
    model = small_model()
    ids = random_ids(model, rows=1)
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 1) % 256
    shake(model, ids, changed)
    moved = (model(ids) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert not moved[:20].any()
    assert moved[20:].all()


def test_every_parameter_gets_a_gradient():
    model = small_model()
    ids = random_ids(model)
    shake(model, ids)
    model(ids[:, :-1], ids[:, 1:]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_rotary_positions_make_scores_depend_on_distance_alone():
    model = small_model()
    cos, sin = model.cos, model.sin
    q, k = torch.randn(32).expand(1, 64, 1, 32), torch.randn(32).expand(1, 64, 1, 32)
    q, k = train.rotate(q, cos, sin)[0, :, 0], train.rotate(k, cos, sin)[0, :, 0]
    scores = q @ k.T
    for distance in (0, 1, 17):
        assert scores.diagonal(-distance).std() < 1e-4
    assert torch.allclose(q.norm(dim=-1), q[0].norm().expand(64), rtol=1e-5)


# optimizer


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 128, 32), (3, 32, 128), (2, 4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_gives_what_an_svd_gives(shape, dtype):
    torch.manual_seed(0)
    g = torch.randn(shape)
    u, singular, vt = torch.linalg.svd(g.double(), full_matrices=False)
    seen = u.mT @ train.orthogonalize(g, dtype).double() @ vt.mT  # in the exact singular vectors: about the identity
    diagonal = seen.diagonal(dim1=-2, dim2=-1)
    large = singular > 0.01 * singular.norm(dim=-1, keepdim=True)  # five iterations do not lift the very smallest to 1
    assert large.sum() >= 0.9 * large.numel()
    assert diagonal[large].min() > 0.7
    assert diagonal.max() < 1.3
    assert (seen - torch.diag_embed(diagonal)).abs().max() < (1e-3 if dtype == torch.float32 else 0.1)


@pytest.fixture
def exact_svd(monkeypatch):
    """Muon with an exact SVD in place of the polynomials, so that all the rest of it can be compared closely."""

    def exact(g, dtype):
        u, _, vt = torch.linalg.svd(g, full_matrices=False)
        return u @ vt

    monkeypatch.setattr(train, "orthogonalize", exact)


def muon_by_hand(p, gradients, lr, momentum, decay, beta2):
    """Muon, NorMuon and cautious decay for one matrix, in float64, neuron by neuron, with an exact SVD."""
    p, velocity, variance = p.copy(), np.zeros_like(p), np.zeros(max(p.shape))
    tall = p.shape[0] >= p.shape[1]
    for g in gradients:
        velocity = momentum * velocity + (1 - momentum) * g
        u, _, vt = np.linalg.svd((1 - momentum) * g + momentum * velocity, full_matrices=False)
        step = u @ vt
        neurons = step if tall else step.T
        mean_square = np.array([np.mean(neuron**2) for neuron in neurons])
        variance = beta2 * variance + (1 - beta2) * mean_square
        even = np.stack([neuron / np.sqrt(v) for neuron, v in zip(neurons, variance, strict=True)])
        even = even if tall else even.T
        step = even * np.linalg.norm(step) / np.linalg.norm(even)
        p -= lr * step + lr * decay * np.where(step * p >= 0, p, 0.0)
    return p


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_muon_is_what_its_papers_say(shape, exact_svd):
    rng = np.random.default_rng(0)
    matrices, gradients = rng.normal(size=(2, *shape)), rng.normal(size=(5, 2, *shape))
    stack, velocity = torch.from_numpy(matrices).float(), torch.zeros(2, *shape)
    variance = torch.zeros((2, shape[0], 1) if shape[0] >= shape[1] else (2, 1, shape[1]))
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "beta2": 0.95}
    for g in gradients:
        train.muon_update(stack, torch.from_numpy(g).float(), velocity, variance, settings, torch.float32)
    lr = 0.02 * max(1, shape[0] / shape[1]) ** 0.5
    for i in range(2):
        expected = muon_by_hand(matrices[i], gradients[:, i], lr, 0.9, 0.1, 0.95)
        np.testing.assert_allclose(stack[i].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [float, torch.tensor])
def test_a_step_of_the_optimizer_updates_every_matrix_of_a_shape_as_muon_does(number, exact_svd):
    rng = np.random.default_rng(1)
    matrices, gradients = rng.normal(size=(3, 48, 16)), rng.normal(size=(4, 3, 48, 16))
    before = torch.from_numpy(matrices).float()
    params = [torch.nn.Parameter(before[:2].clone()), torch.nn.Parameter(before[2].clone())]  # two in a stack, and one
    muon = {"lr": 0.02, "momentum": 0.9, "beta2": 0.95, "weight_decay": 0.1}
    optimizer = train.MuonAdamW([{"kind": "muon", "params": params, **muon}], False, torch.float32)
    optimizer.scalar = number
    for step in gradients:
        params[0].grad, params[1].grad = torch.from_numpy(step[:2]).float(), torch.from_numpy(step[2]).float()
        optimizer.step()
    for i, p in enumerate((*params[0], params[1])):
        expected = muon_by_hand(matrices[i], gradients[:, i], 0.02 * math.sqrt(48 / 16), 0.9, 0.1, 0.95)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_adamw_is_that_of_pytorch():
    torch.manual_seed(0)
    ours, theirs = torch.randn(40, 8), torch.nn.Parameter(torch.empty(40, 8))
    theirs.data.copy_(ours)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    mean, square = torch.zeros_like(ours), torch.zeros_like(ours)
    settings = {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}
    for step in range(1, 30):
        g = torch.randn(40, 8)
        theirs.grad = g.clone()
        reference.step()
        train.adamw_update(ours, g, mean, square, step, settings)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture
def rates(monkeypatch):
    for name, rate in {"EMBEDDING_LR": 0.9, "HEAD_LR": 0.005, "MATRIX_LR": 0.04, "TRUST_LR": 0.0004}.items():
        monkeypatch.setattr(train, name, rate)


def test_groups_have_the_rates_of_the_recipe(rates):
    model = small_model()
    groups = train.build_optimizer(model, compiled=False).param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in model.parameters())
    rate = {id(p): group for group in groups for p in group["params"]}
    scale = (64 / 768) ** -0.5
    assert rate[id(model.embedding.weight)]["lr"] == pytest.approx(0.9 * scale)
    assert rate[id(model.value_embeddings["3"].weight)]["lr"] == pytest.approx(0.9 * scale)
    assert rate[id(model.head.weight)]["lr"] == pytest.approx(0.005 * scale)
    assert rate[id(model.trust)]["lr"] == pytest.approx(0.0004 * scale)
    assert rate[id(model.residual_scales)]["lr"] == pytest.approx(0.005)
    assert rate[id(model.first_scales)]["lr"] == pytest.approx(0.5)
    assert {rate[id(p)]["kind"] for p in model.blocks.parameters()} == {"muon"}


def test_the_schedule_is_constant_then_falls_linearly_to_zero(rates):
    optimizer = train.build_optimizer(small_model(), compiled=False)
    for progress, part in ((0.0, 1.0), (0.3, 1.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0)):
        train.set_schedule(optimizer, progress, step=0)
        assert all(group["lr"] == part * group["initial_lr"] for group in optimizer.param_groups)
    train.set_schedule(optimizer, 0.75, 100)
    muon = next(group for group in optimizer.param_groups if group["kind"] == "muon")
    assert muon["momentum"] == pytest.approx(0.9)
    assert muon["weight_decay"] == pytest.approx(0.05)
    assert muon["lr"] == pytest.approx(0.02)


# training


def batches_of(tokenizer, length, steps, rows=16):
    loader = prepare.make_dataloader(tokenizer, rows, length, "train")
    taken = [next(loader)[:2] for _ in range(steps)]
    loader.close()
    return taken


def train_small(tokenizer, without=None, steps=90):
    """Loss on the last ten of `steps` batches of real text; groups of kind `without` are left untrained."""
    model = small_model(tokenizer.get_vocab_size(), length=128, depth=2)
    optimizer = train.build_optimizer(model, compiled=False)
    losses = []
    for step, batch in enumerate(batches_of(tokenizer, 128, steps)):
        train.set_schedule(optimizer, step / steps, step)
        for group in optimizer.param_groups:
            group["lr"] *= group["kind"] != without
        losses.append(train.train_step(model, optimizer, [batch]).item())
    return sum(losses[-10:]) / 10


def unigram_entropy(tokenizer):
    """Loss of a model that knows how often each token comes and nothing else, on the same text."""
    counts = torch.bincount(torch.cat([y.flatten() for _, y in batches_of(tokenizer, 128, 60)]))
    p = counts[counts > 0] / counts.sum()
    return -(p * p.log()).sum().item()


def test_a_tiny_model_learns_what_a_broken_optimizer_would_not(tokenizer):
    learned = train_small(tokenizer)
    assert learned < unigram_entropy(tokenizer) - 1.0
    assert train_small(tokenizer, without="muon") > learned + 0.1
    assert train_small(tokenizer, without="adamw") > learned + 0.5


def test_two_half_batches_are_one_step_of_the_whole(tokenizer):
    ((x, y),) = batches_of(tokenizer, 64, 1)
    weights = []
    for batches in ([(x, y)], [(x[:8], y[:8]), (x[8:], y[8:])]):
        model = small_model(tokenizer.get_vocab_size())
        optimizer = train.build_optimizer(model, compiled=False)
        loss = train.train_step(model, optimizer, batches)
        weights.append(model.head.weight)
        assert loss.item() == pytest.approx(math.log(tokenizer.get_vocab_size()), rel=1e-3)
    assert torch.allclose(*weights, atol=1e-4)


def test_warm_up_leaves_no_trace(tokenizer):
    model = small_model(tokenizer.get_vocab_size())
    shake(model)
    optimizer = train.build_optimizer(model, compiled=False)
    (batch,) = batches_of(tokenizer, 64, 1)
    train.train_step(model, optimizer, [batch])
    tensors = [*model.parameters(), *model.buffers(), *optimizer.tensors()]
    before = [tensor.clone() for tensor in tensors]
    random_states, seen = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()), []

    def step():
        random.random(), np.random.rand(), torch.rand(3)
        seen.append(train.train_step(model, optimizer, [batch]).item())

    train.warm_up(model, optimizer, step)
    assert seen[0] != seen[1]  # it did train
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert random_states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("DEVICE_BATCH_SIZE", 7, "TOTAL_BATCH_SIZE .* must be a multiple of DEVICE_BATCH_SIZE 7"),
        ("WINDOW_PATTERN", "SXL", "WINDOW_PATTERN"),
        ("HEAD_DIM", 33, "HEAD_DIM 33 must be even"),
        ("CONTEXTS", (0, 2), r"CONTEXTS \(0, 2\) must be numbers of tokens"),
        ("COUNTED", 1.0, "COUNTED 1.0 must be more than 0 and less than 1"),
        ("COUNT_ROWS", 100, "COUNT_ROWS 100 must be at least 256"),
        ("GUESSES", 0, "GUESSES 0 must be at least 1"),
    ],
)
def test_settings_that_can_not_work_are_named(monkeypatch, knob, value, message):
    monkeypatch.setattr(train, knob, value)
    with pytest.raises(SystemExit, match=message):
        train.check_knobs(256)


def attention_of_a_window(q, k, v, window=0, causal=True, window_size=(0, 0)):
    """Each query against exactly `window` keys and no more, those before the row's first being zeros."""
    window = window or window_size[0]
    keys, values = (F.pad(x, (0, 0, 0, 0, window - 1, 0)).unfold(1, window, 1) for x in (k, v))  # (B, T, H, D, window)
    scores = q.unsqueeze(-2) @ keys
    return (scores.softmax(-1) @ values.mT).squeeze(-2)


@pytest.mark.parametrize("pattern", ["L", "SSSL", "S"])
def test_flops_are_those_that_pytorch_counts(pattern):
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    config = train.Config(256, 64, depth=4, head_dim=32, aspect_ratio=16, window_pattern=pattern)
    model = train.GPT(config, attention_of_a_window, torch.float32)
    ids = random_ids(model, rows=2)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    assert model.flops_per_token() * ids.numel() == counter.get_total_flops()


def test_the_published_figures_give_the_published_mfu():
    config = train.Config(8192, 2048, depth=8, head_dim=128, aspect_ratio=64, window_pattern="SSSL")
    with torch.device("meta"):
        model = train.GPT(config, None, torch.bfloat16)
    assert model.flops_per_token() * 499.6e6 / 300.1 / 989.5e12 == pytest.approx(0.398, abs=0.005)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 0),
        ("GRID A100-10C", 0),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 0),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 0),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 0),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", 0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 0),
        ("AMD Instinct MI250X", 191.5),
        ("AMD Instinct MI250X/MI250", 0),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_a_device_is_known_by_its_name_or_has_no_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert train.peak_flops(torch.device("cuda")) == peak * 1e12
    assert train.peak_flops(CPU) == 0


@pytest.mark.gpu
def test_a_compiled_model_learns_on_a_gpu(tokenizer):
    device = torch.device("cuda")
    config = train.Config(tokenizer.get_vocab_size(), 256, depth=2, head_dim=64, aspect_ratio=64, window_pattern="SL")
    backend, _ = train.choose_attention(device, compiled=True)
    model = train.GPT(config, train.Attention(backend, 256, set(config.windows), device), torch.bfloat16).to(device)
    optimizer, forward = train.build_optimizer(model, compiled=True), torch.compile(model, dynamic=False)
    losses = []
    for step, batch in enumerate(batches_of(tokenizer, 256, 40)):
        train.set_schedule(optimizer, step / 40, step)
        losses.append(train.train_step(forward, optimizer, [[tensor.cuda() for tensor in batch]]).item())
    assert losses[-1] < losses[0] - 2.0


def reference_loss(x, weight, targets, guesses=None, bonus=None):
    logits = x.double() @ weight.double().T
    if guesses is not None:
        logits = logits + (F.one_hot(guesses, len(weight)) * bonus[..., None].double()).sum(1)
    cap = train.SOFT_CAP
    return F.cross_entropy(cap * torch.tanh(logits / cap) if cap else logits, targets)


@pytest.mark.parametrize("cap", [15.0, 0.0])
def test_the_loss_in_bf16_has_gradients_as_good_as_bf16_allows(monkeypatch, cap):
    monkeypatch.setattr(train, "SOFT_CAP", cap)
    monkeypatch.setattr(train, "HEAD_CHUNK", 64)
    torch.manual_seed(0)
    x, weight = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((4096, 16), (50, 16)))
    targets = torch.randint(50, (4096,))
    seen, expected = train.CappedCrossEntropy.apply(x, weight, targets), reference_loss(x, weight, targets)
    assert seen.item() == pytest.approx(expected.item(), rel=1e-3)
    ours, theirs = (torch.autograd.grad(loss, (x, weight)) for loss in (seen, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b.float()).norm() <= 0.005 * b.float().norm()


@pytest.mark.parametrize("cap", [15.0, 0.0])
@pytest.mark.parametrize("tokens", [64, 100, 7])  # in chunks of 32: whole ones, a rest, less than one
@pytest.mark.parametrize("with_guesses", [False, True])
def test_the_loss_in_chunks_and_its_gradients_are_those_of_pytorch(monkeypatch, tokens, cap, with_guesses):
    monkeypatch.setattr(train, "SOFT_CAP", cap)
    monkeypatch.setattr(train, "HEAD_CHUNK", 32)
    torch.manual_seed(0)
    x = torch.randn(tokens, 16, requires_grad=True)
    weight = torch.randn(50, 16).mul(5 if cap else 2).requires_grad_()  # most logits are near the cap
    targets, inputs, extra = torch.randint(50, (tokens,)), [x, weight], []
    if with_guesses:
        extra = [torch.randint(50, (tokens, 4)), torch.randn(tokens, 4, requires_grad=True)]  # some token twice
        inputs.append(extra[1])
    seen, expected = (
        train.CappedCrossEntropy.apply(x, weight, targets, *extra),
        reference_loss(*inputs[:2], targets, *extra),
    )
    assert seen.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(3 * loss, inputs) for loss in (seen, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_cross_entropy_of_the_model_is_that_of_its_logits():
    model = small_model()
    shake(model)
    ids = random_ids(model)
    expected = F.cross_entropy(model(ids).double().flatten(0, 1), ids.flatten())
    assert model(ids, ids).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_recipe_for_a_gpu_learns_at_reduced_size(tokenizer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "get_device", lambda: torch.device("cuda"))
        spec = importlib.util.spec_from_file_location("train_on_a_gpu", train.__file__)
        gpu = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(gpu)
    gpu.check_knobs(2048)
    config = gpu.Config(8192, 2048, gpu.DEPTH, gpu.HEAD_DIM, gpu.ASPECT_RATIO, gpu.WINDOW_PATTERN)
    assert (config.width, config.windows) == (640, [256] * 4 + [2048] + [256] * 3 + [2048])
    torch.manual_seed(0)
    config = gpu.Config(tokenizer.get_vocab_size(), 128, 3, 32, 16, gpu.WINDOW_PATTERN)
    model = gpu.GPT(config, gpu.Attention("matmul", 128, set(config.windows), CPU), torch.float32)
    optimizer, losses = gpu.build_optimizer(model, compiled=False), []
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    scale = (64 / 768) ** -0.5
    assert rates[id(model.embedding.weight)] == pytest.approx((0.9 * scale, 0.001))
    assert rates[id(model.value_embeddings["0"].weight)] == pytest.approx((0.9 * scale, 0.003))
    assert rates[id(model.head.weight)] == pytest.approx((0.005 * scale, 0.01))
    for step, batch in enumerate(batches_of(tokenizer, 128, 60)):
        gpu.set_schedule(optimizer, step / 60, step)
        losses.append(gpu.train_step(model, optimizer, [batch]).item())
    assert sum(losses[-10:]) / 10 < unigram_entropy(tokenizer) - 0.5


@pytest.mark.parametrize("part", [0.0, 0.25, 1.0])
def test_shifted_channels_are_those_of_the_position_before(part):
    x = torch.randn(2, 5, 8)
    size = int(8 * part)
    seen = train.shifted(x, part)
    assert torch.equal(seen[..., size:], x[..., size:])
    assert torch.equal(seen[:, 1:, :size], x[:, :-1, :size])
    assert not seen[:, 0, :size].any()


@pytest.mark.parametrize("shift", [(0.5, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_attention_and_mlp_see_each_its_own_part_of_the_position_before(monkeypatch, shift):
    monkeypatch.setattr(train, "SHIFT", shift)
    x = torch.randn(1, 5, 64)
    changed = x.index_add(1, torch.tensor([2]), torch.ones(1, 1, 64))
    for part, other in zip(shift, ("mlp_out", "attention_out"), strict=True):
        model = small_model()
        shake(model)
        block = model.blocks[0]
        torch.nn.init.zeros_(getattr(block, other).weight)
        rotary, itself = (model.cos[:5], model.sin[:5]), lambda q, k, v, window: v
        moved = block(x, None, rotary, itself) != block(changed, None, rotary, itself)
        assert moved.any(-1).tolist() == [[False, False, True, part > 0, False]]


# guesses


def counting_run(tokenizer):
    return prepare.Run(tokenizer.corpus, tokenizer, CPU, seed=7)


def counted_batch(tokenizer, rows=2**18 // 256):
    loader = prepare.make_dataloader(tokenizer, rows, 256, "train", 7, (0, 0.5))
    x, y, _ = next(loader)
    loader.close()
    return x, y


def contexts_of(ids, context):
    """The last tokens at each position, zeros before the first."""
    return [tuple(last) for last in F.pad(ids, (context - 1, 0)).unfold(1, context, 1).flatten(0, 1).tolist()]


@pytest.mark.parametrize("rows", [2**20, 2**10])
def test_guesses_are_what_followed_most_often_in_the_part_that_is_counted(tokenizer, monkeypatch, rows):
    monkeypatch.setattr(train, "COUNTED_TOKENS", (2**14, 2**18))
    monkeypatch.setattr(train, "COUNT_ROWS", rows)
    model = small_model(tokenizer.get_vocab_size(), length=256)
    assert train.count(counting_run(tokenizer), model, (0, 0.5), 2**18) == 2**18
    x, y = counted_batch(tokenizer)
    other = torch.randint(tokenizer.get_vocab_size(), (8, 256))
    guesses, weights = model.look_up(torch.cat([x[:32], other]))
    assert guesses.shape == weights.shape == (40, 256, len(train.CONTEXTS), train.GUESSES)
    for i, context in enumerate(train.CONTEXTS):
        follows, totals = defaultdict(Counter), defaultdict(list)
        for last, token in zip(contexts_of(x, context), y.flatten().tolist(), strict=True):
            follows[last][token] += 1
        for last, seen in follows.items():
            row = train.hash_contexts(torch.tensor([last]), context)[0, -1].item() % rows
            totals[row].append(seen.total())
        found, here = 0, contexts_of(torch.cat([x[:32], other]), context)
        seen_here = zip(
            guesses[..., i, :].flatten(0, 1).tolist(), weights[..., i, :].flatten(0, 1).tolist(), strict=True
        )
        for last, (tokens, shares) in zip(here, seen_here, strict=True):
            row, total = train.hash_contexts(torch.tensor([last]), context)[0, -1].item() % rows, follows[last].total()
            if not any(shares):  # not in the text, or another context that was seen as often has its row
                assert total == 0 or sum(n >= total for n in totals[row]) > 1
                continue
            assert total == max(totals[row])
            found += 1
            best = [n for _, n in follows[last].most_common(train.GUESSES)]
            expected = [math.sqrt(n / (follows[last].total() + 1)) for n in best]
            assert shares == pytest.approx([*expected, *[0.0] * (train.GUESSES - len(best))], abs=2**-15)
            assert [follows[last][token] for token in tokens[: len(best)]] == best
            assert len(set(tokens[: len(best)])) == len(best)
        assert found > (0.9 if rows == 2**20 else 0.02) * 32 * 256


@pytest.mark.gpu
def test_guesses_on_a_gpu_are_those_on_a_cpu(tokenizer, monkeypatch):
    monkeypatch.setattr(train, "COUNTED_TOKENS", (2**14, 2**18))
    run, model = counting_run(tokenizer), small_model(tokenizer.get_vocab_size(), length=256)
    assert train.count(run, model, (0, 0.5), 2**18)
    x, _ = counted_batch(tokenizer, 4)
    expected, table = model.look_up(x), model.table.clone()
    monkeypatch.setattr(prepare, "get_device", lambda: torch.device("cuda"))
    run.device = torch.device("cuda")
    assert train.count(run, model.to("cuda"), (0, 0.5), 2**18)
    assert torch.equal(model.table.cpu(), table)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(model.look_up(x.cuda()), expected, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("context", [1, 2, 3, 4, 6])
def test_a_context_is_known_by_a_hash_of_its_tokens(context, compiled):
    ids = torch.randint(32768, (4, 32), generator=torch.Generator().manual_seed(0))
    seen = (torch.compile(train.hash_contexts) if compiled else train.hash_contexts)(ids, context)
    for last, mixed in zip(contexts_of(ids, context), seen.flatten().tolist(), strict=True):
        assert mixed == sum(x * 26544357**back for back, x in enumerate(last)) % 2 ** (38 if context > 1 else 64)


def test_contexts_of_real_text_share_no_hash(tokenizer):
    x, _ = counted_batch(tokenizer)
    for context in (2, 3, 4, 6):
        assert len(train.hash_contexts(x, context).unique()) == len(set(contexts_of(x, context)))


def test_guesses_add_to_their_logits_and_change_what_the_blocks_see(monkeypatch):
    monkeypatch.setattr(train, "SOFT_CAP", 0.0)
    model = small_model()
    ids = random_ids(model)
    shake(model, ids)
    with torch.no_grad():
        logits = model(ids)
        guesses, weights = model.look_up(ids)
        assert weights.any(-1).float().mean() > 0.9
        trust = model.trust.clone()
        model.trust.zero_()
        without = model(ids)
        model.table.zero_()
        blind = model(ids)
        assert not torch.allclose(blind, without)
        model.trust.copy_(trust)
        assert torch.equal(model(ids), blind)  # where nothing is guessed nothing is added
    guessed = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, guesses.flatten(2), weights.flatten(2) > 0)
    changed = (logits - without).abs() > 1e-6
    assert not (changed & ~F.one_hot(guesses.flatten(2), 256).any(2)).any()
    assert (changed & guessed).sum() > 0.9 * guessed.sum()


def test_too_little_text_is_not_counted_but_trained_on(tokenizer):
    model = small_model(tokenizer.get_vocab_size(), length=256)
    assert not train.count(counting_run(tokenizer), model, (0, 0.5), 2**30)
    assert not model.table.any()


# memory and failures


class Failing(torch.nn.Module):
    """A part of a model that raises an error as long as micro-batches have more than so many rows."""

    def __init__(self, part, error, rows):
        super().__init__()
        self.part, self.error, self.rows = part, error, rows

    def forward(self, ids):
        if len(ids) > self.rows:
            raise self.error
        return self.part(ids)


def fit(tokenizer, monkeypatch, error, rows, total=64, compiled=False):
    """Fit a model that fails so; return what fit returned, and the weights before and after."""
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 16)
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", total * tokenizer.corpus.seq_len)
    model = small_model(tokenizer.get_vocab_size(), tokenizer.corpus.seq_len, depth=2)
    model.embedding = Failing(model.embedding, error, rows)
    model.embedding.weight = model.embedding.part.weight
    before = [p.clone() for p in model.parameters()]
    run = prepare.Run(tokenizer.corpus, tokenizer, CPU, 42)
    return train.fit(run, model, compiled), before, list(model.parameters())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("2.00 GiB"), RuntimeError("InductorError: CUDA out of memory. Tried to allocate")]
)
def test_micro_batches_are_halved_until_they_fit_memory(tokenizer, monkeypatch, capsys, error):
    (_, _, rows), before, after = fit(tokenizer, monkeypatch, error, rows=4)
    assert rows == 4
    assert capsys.readouterr().out.splitlines() == [
        "out of memory: micro-batches of 8 rows instead",
        "out of memory: micro-batches of 4 rows instead",
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)


def test_micro_batches_divide_the_batch(tokenizer, monkeypatch):
    assert fit(tokenizer, monkeypatch, torch.OutOfMemoryError(), rows=7, total=36)[0][2] == 6


def test_what_does_not_fit_memory_with_one_row_ends_the_run(tokenizer, monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        fit(tokenizer, monkeypatch, torch.OutOfMemoryError(), rows=0)


def test_a_mistake_in_the_model_ends_the_run_with_its_own_error(tokenizer, monkeypatch):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(tokenizer, monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), rows=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mistake_in_the_optimizer_is_not_taken_for_one_of_the_compiler(tokenizer, monkeypatch, capsys, compiled):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(train, "adamw_update", lambda *arguments: {}["beta3"])
    with pytest.raises(KeyError, match="beta3"):
        fit(tokenizer, monkeypatch, None, rows=16, compiled=compiled)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("knob", ["WEIGHT_DECAY", "MATRIX_LR", "SCALAR_LR", "MUON_BETA2", "ADAM_EPS"])
def test_a_knob_may_be_a_whole_number(monkeypatch, knob):
    monkeypatch.setattr(train, knob, 0 if knob in ("WEIGHT_DECAY", "MUON_BETA2") else 1)
    model = small_model()
    ids = random_ids(model)
    train.train_step(model, train.build_optimizer(model, compiled=False), [(ids, ids)])


@pytest.mark.parametrize(("total", "micro_batches"), [(16, 1), (64, 2)])
def test_the_warm_up_adds_to_gradients_as_training_will(tokenizer, monkeypatch, total, micro_batches):
    seen, train_step = [], train.train_step
    monkeypatch.setattr(
        train, "train_step", lambda *arguments: seen.append(len(arguments[2])) or train_step(*arguments)
    )
    fit(tokenizer, monkeypatch, None, rows=16, total=total)
    assert seen == [micro_batches] * 2


@pytest.mark.parametrize(
    ("backend", "forced", "tried"), [("flash3", None, ["flex", "sdpa"]), ("flash3", "flash3", []), ("matmul", None, [])]
)
def test_what_does_not_compile_is_done_another_way(tokenizer, monkeypatch, capsys, backend, forced, tried):
    """Every compiled call fails, as when a compiler is broken."""
    seen = []

    def broken(model, **options):
        def call(*arguments):
            seen.append(model.attention.backend)
            raise RuntimeError("backend='inductor' raised:") from OSError("no such compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(train, "FORCED_BACKEND", forced)
    kernel = SimpleNamespace(flash_attn_func=attention_of_a_window)
    monkeypatch.setattr(train, "load_kernel", lambda repo_id, revision: kernel)
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 16)
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", 16 * tokenizer.corpus.seq_len)
    model = small_model(tokenizer.get_vocab_size(), tokenizer.corpus.seq_len, depth=2)
    model.attention = train.Attention(backend, tokenizer.corpus.seq_len, set(model.config.windows), CPU)
    forward, _, rows = train.fit(prepare.Run(tokenizer.corpus, tokenizer, CPU, 42), model, compiled=True)
    assert (forward, rows, seen) == (model, 16, [backend, *tried])
    lines = capsys.readouterr().out.splitlines()
    assert all("no such compiler" in line for line in lines)
    assert [line.split(": ")[-1] for line in lines] == [
        *(f"attention {b} instead" for b in tried),
        "not compiled after all",
    ]


@pytest.mark.gpu
def test_a_gpu_with_too_little_memory_gets_smaller_micro_batches(tokenizer, monkeypatch):
    device, length = torch.device("cuda"), tokenizer.corpus.seq_len
    total = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(prepare, "get_device", lambda: device)
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 4096)
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", 4096 * length)
    config = train.Config(tokenizer.get_vocab_size(), length, depth=4, head_dim=64, aspect_ratio=64, window_pattern="L")
    model = train.GPT(config, train.Attention("sdpa", length, {length}, device), torch.bfloat16).to(device)
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total)
    try:
        run = prepare.Run(tokenizer.corpus, tokenizer, device, 42)
        rows = train.fit(run, model, compiled=False)[2]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert rows < 4096
    assert 4096 % rows == 0
