"""Model, n-gram tables, optimizer and loop of train.py, each against something independent."""

import importlib.util
import math
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import prepare
import train

CPU = torch.device("cpu")

KNOBS = {
    "SHORT_WINDOW": 1 / 2,
    "ROTARY_BASE": 10_000,
    "SMEAR": (0.5, 0.5),
    "SOFT_CAP": 15.0,
    "X0_LAMBDA": 0.05,
    "MATRIX_INIT": 0.68,
    "NGRAM_CONTEXTS": (2, 3, 4),
    "NGRAM_MATCHES": 2,
    "NGRAM_CANDIDATES": 6,
    "NGRAM_PART": 0.5,
    "NGRAM_MAX_TOKENS": 2**16,
    "NGRAM_ROWS": 10_007,
    "NGRAM_GATE_LR": 0.0004,
    "TOTAL_BATCH_SIZE": 2**12,
    "DEVICE_BATCH_SIZE": 16,
    "HEAD_CHUNK": 2**10,
    "HEAD_DIM": 32,
    "MATRIX_LR": 0.04,
    "WEIGHT_DECAY": 0.2,
    "MUON_MOMENTUM": (0.85, 0.95),
    "MUON_WARMUP": 0.4,
    "DECAY_POWER": 1,
    "QK_SCALE": 1.0,
    "VALUE_EVERY": 2,
    "GATE_CHANNELS": 32,
    "GATE_SCALE": 2.0,
    "COMPILE_OPTIONS": {},
    "MUON_BETA2": 0.95,
    "HEAD_LR": 0.005,
    "HEAD_DECAY": 0.01,
    "EMBEDDING_LR": 0.9,
    "EMBEDDING_DECAY": 0.001,
    "VALUE_DECAY": 0.003,
    "SCALAR_LR": 0.5,
    "ADAM_BETAS": (0.8, 0.95),
    "ADAM_EPS": 1e-10,
    "WARMDOWN": 0.5,
    "FINAL_LR": 0.0,
}


@pytest.fixture(autouse=True)
def knobs(monkeypatch):
    """The tests' own values, whatever train.py ships with."""
    for name, value in KNOBS.items():
        monkeypatch.setattr(train, name, value)


@pytest.fixture
def no_ngrams(monkeypatch):
    monkeypatch.setattr(train, "NGRAM_CONTEXTS", ())


def small_model(vocab_size=256, length=64, depth=4, dtype=torch.float32):
    torch.manual_seed(0)
    config = train.Config(vocab_size, length, depth, 32, aspect_ratio=16, window_pattern="SSSL")
    attention = train.Attention("matmul", length, set(config.windows), CPU)
    ngrams = None
    if train.NGRAM_CONTEXTS:
        ngrams = train.NgramTables(vocab_size, config.width, dtype, CPU)
    return train.GPT(config, attention, dtype, ngrams)


def random_ids(model, rows=3):
    return torch.randint(model.config.vocab_size, (rows, model.config.seq_len))


def give_candidates(model, ids):
    """Fill the table rows of all contexts in ids (B, T) with random candidates and weights."""
    for table, context in zip(model.ngrams.tables, train.NGRAM_CONTEXTS, strict=True):
        hashes = train.hash_contexts(ids, context).flatten()
        shape = (len(hashes), train.NGRAM_CANDIDATES)
        packed = torch.randint(model.config.vocab_size * 2**16, shape)
        rows = torch.cat([hashes[:, None] // train.NGRAM_ROWS + 1, packed], 1)
        table.numpy()[(hashes % train.NGRAM_ROWS).numpy()] = rows.numpy()  # the last one stays


def perturb(model, *ids):
    """Move every weight from its initial value, and give candidates to all contexts in ids."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for batch in ids:
        give_candidates(model, batch)


def batches_of(tokenizer, length, steps, rows=16):
    loader = prepare.make_dataloader(tokenizer, rows, length, "train")
    taken = [next(loader)[:2] for _ in range(steps)]
    loader.close()
    return taken


# model


def test_the_reference_has_the_published_size(no_ngrams):
    config = train.Config(8192, 2048, depth=8, head_dim=128, aspect_ratio=64, window_pattern="SSSL")
    assert config.width == 512
    assert config.windows == [1024, 1024, 1024, 2048, 1024, 1024, 1024, 2048]
    with torch.device("meta"):
        model = train.GPT(config, None, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(50.3e6, rel=0.001)
    flops = model.flops_per_token() * 499.6e6 / 300.1  # tokens and seconds
    assert flops / 989.5e12 == pytest.approx(0.398, abs=0.005)  # the published MFU on an H100


def test_the_width_is_rounded_up_to_whole_heads():
    config = train.Config(8192, 2048, depth=9, head_dim=128, aspect_ratio=57, window_pattern="L")
    assert config.width == 640


def test_the_last_block_sees_the_whole_context():
    config = train.Config(8192, 2048, depth=5, head_dim=128, aspect_ratio=64, window_pattern="S")
    assert config.windows == [1024, 1024, 1024, 1024, 2048]


def test_weights_start_at_their_documented_distributions():
    model = small_model(vocab_size=4096, length=64, depth=8)
    bound = math.sqrt(3 / model.config.width)
    values = model.value_embeddings.weight
    assert values.shape == (4096, 4 * model.config.width)
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.01)
    assert model.head.weight.std().item() == pytest.approx(0.001, rel=0.01)
    assert model.resid_lambdas.tolist() == [1.0] * 8
    assert model.x0_lambdas.tolist() == pytest.approx([0.05] * 8)
    assert not model.blocks[7].gate.weight.any()
    for block in model.blocks:
        assert not block.attention_out.weight.any()
        assert not block.mlp_out.weight.any()
        for weight in (*block.qkv, block.mlp_in.weight):
            assert weight.abs().max() <= 0.68 * bound
            assert weight.std().item() == pytest.approx(0.68 * bound / math.sqrt(3), rel=0.05)


def test_an_untrained_model_predicts_uniformly():
    model = small_model()
    ids = random_ids(model)
    assert model(ids, ids).item() == pytest.approx(math.log(256), rel=1e-3)


@pytest.mark.parametrize(("cap", "bound"), [(15.0, 15), (0.0, 70)])
def test_logits_stay_within_the_soft_cap_and_are_float32(monkeypatch, cap, bound):
    monkeypatch.setattr(train, "SOFT_CAP", cap)
    model = small_model(dtype=torch.bfloat16)
    torch.nn.init.normal_(model.head.weight, std=100.0)
    logits = model(random_ids(model))
    assert logits.dtype == torch.float32
    assert 0.999 * bound < logits.abs().max() <= bound


def test_a_token_changes_the_logits_at_its_position_and_later_ones_only():
    model = small_model()
    ids = random_ids(model, rows=1)
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 1) % 256
    perturb(model, ids, changed)
    moved = (model(ids) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert not moved[:20].any()
    assert moved[20:].all()


def test_every_parameter_gets_a_gradient():
    model = small_model()
    ids = random_ids(model)
    perturb(model, ids)
    model(ids[:, :-1], ids[:, 1:]).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


def test_rotary_positions_make_scores_depend_on_distance_alone():
    rotary = small_model().rotary
    q, k = (torch.randn(32).expand(1, 64, 1, 32) for _ in range(2))
    q, k = train.rotate(q, rotary)[0, :, 0], train.rotate(k, rotary)[0, :, 0]
    scores = q @ k.T
    for distance in (0, 1, 17):
        assert scores.diagonal(-distance).std() < 1e-4
    assert torch.allclose(q.norm(dim=-1), q[0].norm().expand(64), rtol=1e-5)


@pytest.mark.parametrize("part", [0.0, 0.25, 1.0])
def test_smeared_channels_come_from_the_previous_position(part):
    x = torch.randn(2, 5, 8)
    size = int(8 * part)
    smeared = train.smear(x, part)
    assert torch.equal(smeared[..., size:], x[..., size:])
    assert torch.equal(smeared[:, 1:, :size], x[:, :-1, :size])
    assert not smeared[:, 0, :size].any()


@pytest.mark.parametrize("parts", [(0.5, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_attention_and_mlp_are_smeared_each_by_its_own_part(monkeypatch, parts):
    monkeypatch.setattr(train, "SMEAR", parts)
    x = torch.randn(1, 5, 64)
    changed = x.index_add(1, torch.tensor([2]), torch.ones(1, 1, 64))
    for part, other in zip(parts, ("mlp_out", "attention_out"), strict=True):
        model = small_model()
        perturb(model)
        block = model.blocks[0]
        torch.nn.init.zeros_(getattr(block, other).weight)
        rotary = model.rotary[:, :5]
        before, after = (
            block(inputs, None, rotary, lambda q, k, v, window: v) for inputs in (x, changed)
        )
        moved = (before != after).any(-1)[0]
        assert moved.tolist() == [False, False, True, part > 0, False]


def attend_to_window(q, k, v, window):
    """Attention of each query to exactly `window` keys, zeros before the first, as FLOPs count."""
    padding = (0, 0, 0, 0, window - 1, 0)
    keys, values = (F.pad(x, padding).unfold(1, window, 1) for x in (k, v))  # (B, T, H, D, window)
    scores = q.unsqueeze(-2) @ keys
    return (scores.softmax(-1) @ values.mT).squeeze(-2)


@pytest.mark.parametrize("pattern", ["L", "SSSL", "S"])
def test_flops_are_those_that_pytorch_counts(pattern):
    torch.manual_seed(0)
    config = train.Config(256, 64, depth=4, head_dim=32, aspect_ratio=16, window_pattern=pattern)
    model = train.GPT(config, attend_to_window, torch.float32)
    ids = random_ids(model, rows=2)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    assert model.flops_per_token() * ids.numel() == counter.get_total_flops()


# loss


def reference_loss(x, weight, targets, candidates=None, bonus=None):
    logits = x.double() @ weight.double().T
    if candidates is not None:
        chosen = F.one_hot(candidates, len(weight))
        logits = logits + (chosen * bonus[..., None].double()).sum(1)
    if train.SOFT_CAP:
        logits = train.SOFT_CAP * torch.tanh(logits / train.SOFT_CAP)
    return F.cross_entropy(logits, targets)


@pytest.mark.parametrize("cap", [15.0, 0.0])
@pytest.mark.parametrize("tokens", [64, 100, 7])  # whole chunks of 32, a rest, less than one
@pytest.mark.parametrize("with_bonus", [False, True])
def test_the_loss_and_its_gradients_are_those_of_pytorch(monkeypatch, tokens, cap, with_bonus):
    monkeypatch.setattr(train, "SOFT_CAP", cap)
    monkeypatch.setattr(train, "HEAD_CHUNK", 32)
    torch.manual_seed(0)
    x = torch.randn(tokens, 16, requires_grad=True)
    weight = torch.randn(50, 16).mul(5 if cap else 2).requires_grad_()  # many logits near the cap
    targets = torch.randint(50, (tokens,))
    inputs, extra = [x, weight], []
    if with_bonus:
        bonus = torch.randn(tokens, 4, requires_grad=True)
        extra = [torch.randint(50, (tokens, 4)), bonus]  # some token is a candidate twice
        inputs.append(bonus)

    loss = train.ChunkedLoss.apply(x, weight, targets, *extra)
    expected = reference_loss(x, weight, targets, *extra)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.autograd.grad(3 * loss, inputs)
    theirs = torch.autograd.grad(3 * expected, inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("cap", [15.0, 1.0, 0.0])
def test_the_loss_of_huge_logits_has_finite_gradients(monkeypatch, cap):
    monkeypatch.setattr(train, "SOFT_CAP", cap)
    x = torch.full((4, 16), 30.0).requires_grad_()
    weight = torch.randn(50, 16).mul(30.0).requires_grad_()
    loss = train.ChunkedLoss.apply(x, weight, torch.arange(4))
    for grad in torch.autograd.grad(loss, (x, weight)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("cap", [15.0, 0.0])
def test_the_gradients_of_the_loss_are_as_good_as_bf16_allows(monkeypatch, cap):
    monkeypatch.setattr(train, "SOFT_CAP", cap)
    monkeypatch.setattr(train, "HEAD_CHUNK", 64)
    torch.manual_seed(0)
    x = torch.randn(4096, 16).bfloat16().requires_grad_()
    weight = torch.randn(50, 16).bfloat16().requires_grad_()
    targets = torch.randint(50, (4096,))
    loss = train.ChunkedLoss.apply(x, weight, targets)
    expected = reference_loss(x, weight, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    ours = torch.autograd.grad(loss, (x, weight))
    theirs = torch.autograd.grad(expected, (x, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b.float()).norm() <= 0.005 * b.float().norm()


def test_the_loss_of_the_model_is_the_cross_entropy_of_its_logits():
    model = small_model()
    ids = random_ids(model)
    perturb(model, ids)
    expected = F.cross_entropy(model(ids).double().flatten(0, 1), ids.flatten())
    assert model(ids, ids).item() == pytest.approx(expected.item(), rel=1e-5)


# n-gram tables


def contexts_of(ids, context):
    """The last tokens at each position, zeros before the first."""
    windows = F.pad(ids, (context - 1, 0)).unfold(1, context, 1)
    return [tuple(last) for last in windows.flatten(0, 1).tolist()]


def check_hashes(hash_contexts, context):
    ids = torch.randint(32768, (4, 32), generator=torch.Generator().manual_seed(0))
    hashes = hash_contexts(ids, context).flatten().tolist()
    for last, seen in zip(contexts_of(ids, context), hashes, strict=True):
        polynomial = sum(token * 26544357**back for back, token in enumerate(last))
        assert seen == polynomial % 2**38


@pytest.mark.parametrize("context", [1, 2, 3, 4, 6])
def test_the_hash_of_a_context_is_a_polynomial_of_its_tokens(context):
    check_hashes(train.hash_contexts, context)


@pytest.mark.slow
def test_the_hash_of_a_context_is_the_same_when_compiled():
    check_hashes(torch.compile(train.hash_contexts), 4)


def test_contexts_of_real_text_share_no_hash(tokenizer):
    ((x, _),) = batches_of(tokenizer, 256, 1, rows=256)
    for context in (2, 3, 4, 6):
        distinct = len(set(contexts_of(x, context)))
        assert len(train.hash_contexts(x, context).unique()) == distinct


def whole_rows(x, y):
    """The rows that a batch of inputs and targets came from."""
    return torch.cat([x, y[:, -1:]], dim=1)


def count_by_hand(ids, context):
    """What followed each context, and the totals of all contexts of each row of the table."""
    follows, rows = defaultdict(Counter), {}
    x, y = ids[:, :-1], ids[:, 1:]
    hashes = train.hash_contexts(x, context) % train.NGRAM_ROWS
    positions = (contexts_of(x, context), y.flatten().tolist(), hashes.flatten().tolist())
    for last, token, row in zip(*positions, strict=True):
        follows[last][token] += 1
        rows[last] = row
    totals = defaultdict(list)
    for last, tokens in follows.items():
        totals[rows[last]].append(tokens.total())
    return follows, totals


@pytest.mark.parametrize(("rows", "found"), [(2**18, 0.9), (2**9, 0.02)])  # the second too few
def test_a_table_holds_what_followed_each_context_most_often(tokenizer, monkeypatch, rows, found):
    monkeypatch.setattr(train, "NGRAM_ROWS", rows)
    monkeypatch.setattr(train, "NGRAM_MATCHES", 1)
    ((x, y),) = batches_of(tokenizer, 256, 1, rows=128)
    asked = torch.cat([x[:16], torch.randint(tokenizer.get_vocab_size(), (4, 256))])
    for context in (1, 2, 3, 4):
        monkeypatch.setattr(train, "NGRAM_CONTEXTS", (context,))
        ngrams = train.NgramTables(tokenizer.get_vocab_size(), 64, torch.float32, CPU)
        ngrams.tables = ngrams.fit(whole_rows(x, y))
        _, candidates, weights = ngrams(asked)
        follows, totals = count_by_hand(whole_rows(x, y), context)
        positions = (
            contexts_of(asked, context),
            (train.hash_contexts(asked, context) % rows).flatten().tolist(),
            candidates.flatten(0, 1).tolist(),
            weights.flatten(0, 1).tolist(),
        )
        known = 0
        for last, row, tokens, seen in zip(*positions, strict=True):
            total = follows[last].total() if last in follows else 0
            if not any(seen):  # not in the text, or another as frequent context has its row
                assert total == 0 or sum(n >= total for n in totals[row]) > 1
                continue
            known += 1
            assert total == max(totals[row])
            counts = [n for _, n in follows[last].most_common(train.NGRAM_CANDIDATES)]
            tokens, rest = tokens[: len(counts)], seen[len(counts) :]
            assert [follows[last][token] for token in tokens] == counts
            assert len(set(tokens)) == len(tokens)
            expected = [math.sqrt(n / (total + 1)) for n in counts]
            assert seen[: len(counts)] == pytest.approx(expected, abs=2**-15)
            assert not any(rest)
        assert known > found * 16 * 256


def test_the_longest_contexts_that_match_give_the_candidates(tokenizer, monkeypatch):
    contexts = (1, 2, 3, 5)
    monkeypatch.setattr(train, "NGRAM_ROWS", 2**18)
    monkeypatch.setattr(train, "NGRAM_CONTEXTS", contexts)
    ((x, y),) = batches_of(tokenizer, 256, 1, rows=128)
    vocab_size = tokenizer.get_vocab_size()
    ngrams = train.NgramTables(vocab_size, 64, torch.float32, CPU)
    ngrams.tables = ngrams.fit(whole_rows(x, y))
    asked = torch.cat([x[:8], torch.randint(vocab_size, (8, 256))])
    _, candidates, weights = ngrams(asked)
    levels = Counter()

    single = []
    for context, table in zip(contexts, ngrams.tables, strict=True):
        monkeypatch.setattr(train, "NGRAM_CONTEXTS", (context,))
        monkeypatch.setattr(train, "NGRAM_MATCHES", 1)
        alone = train.NgramTables(vocab_size, 64, torch.float32, CPU)
        alone.tables = table[None]
        single.append(alone(asked)[1:])
    for row, position in ((row, position) for row in range(16) for position in range(0, 256, 5)):
        seen = candidates[row, position].split(6), weights[row, position].split(6)
        known = [i for i in range(4) if single[i][1][row, position].any()]
        levels[len(known)] += 1
        for slot in range(2):
            if slot >= len(known):
                assert not seen[1][slot].any()
                continue
            expected = single[known[-1 - slot]]
            assert torch.equal(seen[0][slot], expected[0][row, position])
            assert torch.equal(seen[1][slot], expected[1][row, position])
    assert len(levels) >= 4


def make_run(tokenizer, device=CPU):
    """As much of a run as what is tested here needs."""
    return SimpleNamespace(
        corpus=tokenizer.corpus,
        tokenizer=tokenizer,
        device=device,
        seed=7,
        status="",
        progress=lambda: 0.02,
    )


def test_all_text_of_a_part_is_read_once_as_far_as_the_limit_goes(tokenizer, monkeypatch):
    run = make_run(tokenizer)
    some = train.read_text(run, (0, 1))
    assert train.NGRAM_MAX_TOKENS < some.numel() < train.NGRAM_MAX_TOKENS + 2048
    monkeypatch.setattr(train, "NGRAM_MAX_TOKENS", 2**30)
    size = (tokenizer.corpus.directory / "train_00000.tokens").stat().st_size // 2
    assert train.read_text(run, (0, 1)).numel() == size
    halves = [train.read_text(run, part) for part in ((0, 0.5), (0.5, 1))]
    assert sum(half.numel() for half in halves) == size


def test_very_frequent_contexts_keep_their_order_and_weights(monkeypatch):
    monkeypatch.setattr(train, "NGRAM_CONTEXTS", (1,))
    monkeypatch.setattr(train, "NGRAM_MATCHES", 1)
    ngrams = train.NgramTables(256, 64, torch.float32, CPU)
    followers = torch.tensor([5] * 1 + [6] * 2 + [7] * 4 + [8] * 3)
    text = torch.stack([torch.ones(200_000, dtype=torch.long), followers.repeat(20_000)], 1)
    ngrams.tables = ngrams.fit(text.flatten()[None])
    _, candidates, weights = ngrams(torch.tensor([[1]]))
    assert candidates[0, 0, :4].tolist() == [7, 8, 6, 5]
    expected = [math.sqrt(part) for part in (0.4, 0.3, 0.2, 0.1)]
    assert weights[0, 0, :4].tolist() == pytest.approx(expected, abs=1e-3)


def test_training_counts_one_part_of_the_text_and_the_judged_model_all(tokenizer, capsys):
    run = make_run(tokenizer)
    model = small_model(tokenizer.get_vocab_size(), length=256)
    train.count_ngrams(run, model.ngrams)
    assert model.ngrams.tables.any()
    assert torch.equal(model.ngrams.tables, model.ngrams.fit(train.read_text(run, (0, 0.5))))
    assert torch.equal(model.ngrams.final_tables, model.ngrams.fit(train.read_text(run, (0, 1))))
    assert capsys.readouterr().out == "n-grams: counting took 2.0% of the time\n"


def test_nothing_of_the_validation_text_reaches_a_table(tokenizer, monkeypatch):
    monkeypatch.setattr(train, "NGRAM_CONTEXTS", (4,))
    monkeypatch.setattr(train, "NGRAM_MATCHES", 1)
    monkeypatch.setattr(train, "NGRAM_ROWS", 2**20)
    monkeypatch.setattr(train, "NGRAM_MAX_TOKENS", 2**30)
    run = make_run(tokenizer)
    model = small_model(tokenizer.get_vocab_size(), length=256)
    train.count_ngrams(run, model.ngrams)
    in_training = set()
    for part in ((0, 0.5), (0, 1)):  # documents follow one another in another order
        in_training.update(contexts_of(train.read_text(run, part), 4))
    rows = torch.from_numpy(prepare.read_val_rows(tokenizer.corpus).astype(np.int64))
    unseen = torch.tensor([last not in in_training for last in contexts_of(rows, 4)])
    assert unseen.sum() > 1000
    for tables in (model.ngrams.tables, model.ngrams.final_tables):
        model.ngrams.tables = tables
        known = model.ngrams(rows)[2].any(-1).flatten()
        assert known.sum() > 1000
        assert (known & unseen).sum() <= 3  # two contexts may share a hash


def test_a_model_that_counts_what_it_is_judged_on_is_refused(tokenizer):
    model = small_model(tokenizer.get_vocab_size(), length=tokenizer.corpus.seq_len)
    train.count_ngrams(make_run(tokenizer), model.ngrams)
    with torch.no_grad():
        model.ngrams.gate.add_(torch.randn_like(model.ngrams.gate))
    prepare.evaluate_bpb(model, tokenizer, 16)
    forward = model.forward

    def remember(ids):
        logits = forward(ids)
        model.ngrams.tables.copy_(model.ngrams.fit(ids))
        return logits

    model.forward = remember
    with pytest.raises(ValueError, match="when the batch comes again"):
        prepare.evaluate_bpb(model, tokenizer, 16)


@pytest.mark.gpu
def test_the_tables_on_a_gpu_are_those_on_a_cpu(tokenizer):
    ((x, y),) = batches_of(tokenizer, 256, 1, rows=128)
    ngrams = train.NgramTables(tokenizer.get_vocab_size(), 64, torch.float32, CPU)
    ngrams.tables = ngrams.fit(whole_rows(x, y))
    device = torch.device("cuda")
    on_gpu = train.NgramTables(tokenizer.get_vocab_size(), 64, torch.float32, device)
    on_gpu.tables = on_gpu.fit(whole_rows(x, y).cuda())
    assert torch.equal(on_gpu.tables.cpu(), ngrams.tables)
    for seen, right in zip(on_gpu(x.cuda()), ngrams(x), strict=True):
        assert torch.allclose(seen.cpu(), right, atol=1e-5)


def test_candidates_change_their_own_logits_through_the_gate_alone(monkeypatch):
    monkeypatch.setattr(train, "SOFT_CAP", 0.0)
    model = small_model()
    ids = random_ids(model)
    perturb(model, ids)
    with torch.no_grad():
        _, candidates, weights = model.ngrams(ids)
        assert (weights > 0).float().mean() > 0.9
        logits = model(ids)
        model.ngrams.gate.zero_()
        changed = (logits - model(ids)).abs() > 1e-6
    are_candidates = F.one_hot(candidates, 256).any(2)
    assert not (changed & ~are_candidates).any()
    assert changed.sum() > 0.9 * are_candidates.sum()


def test_candidates_reach_the_blocks_as_an_embedding():
    model = small_model()
    ids = random_ids(model)
    perturb(model, ids)
    with torch.no_grad():
        model.ngrams.gate.zero_()
        with_tables = model(ids)
        model.ngrams.tables.zero_()
        assert not torch.allclose(model(ids), with_tables)


def test_unknown_contexts_differ_by_nothing_but_their_level():
    model = small_model()
    perturb(model)  # the tables stay empty
    ids = random_ids(model)
    embedding, _, weights = model.ngrams(ids)
    assert not weights.any()
    assert torch.equal(embedding, model.ngrams.level_projection[0].expand_as(embedding))


# optimizer


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 128, 32), (3, 32, 128), (2, 4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_gives_what_an_svd_gives(shape, dtype):
    torch.manual_seed(0)
    g = torch.randn(shape)
    u, singular, vt = torch.linalg.svd(g.double(), full_matrices=False)
    seen = u.mT @ train.orthogonalize(g, dtype).double() @ vt.mT  # about the identity
    diagonal = seen.diagonal(dim1=-2, dim2=-1)
    large = singular > 0.01 * singular.norm(dim=-1, keepdim=True)  # the smallest stay below 1
    assert large.sum() >= 0.9 * large.numel()
    assert diagonal[large].min() > 0.7
    assert diagonal.max() < 1.3
    rest = seen - torch.diag_embed(diagonal)
    assert rest.abs().max() < (1e-3 if dtype == torch.float32 else 0.1)


@pytest.fixture
def exact_svd(monkeypatch):
    """Muon with an exact SVD instead of polynomials, to compare the rest of it closely."""

    def exact(g, dtype):
        u, _, vt = torch.linalg.svd(g, full_matrices=False)
        return u @ vt

    monkeypatch.setattr(train, "orthogonalize", exact)


def muon_by_hand(p, gradients, lr, momentum, decay, beta2):
    """Muon, NorMuon and cautious decay for one matrix, in float64, neuron by neuron."""
    p, velocity, variance = p.copy(), np.zeros_like(p), np.zeros(max(p.shape))
    tall = p.shape[0] >= p.shape[1]
    for g in gradients:
        velocity = momentum * velocity + (1 - momentum) * g
        nesterov = (1 - momentum) * g + momentum * velocity
        u, _, vt = np.linalg.svd(nesterov, full_matrices=False)
        step = u @ vt
        neurons = step if tall else step.T
        mean_square = np.array([np.mean(neuron**2) for neuron in neurons])
        variance = beta2 * variance + (1 - beta2) * mean_square
        even = np.stack([neuron / np.sqrt(v) for neuron, v in zip(neurons, variance, strict=True)])
        even = even if tall else even.T
        step = even * np.linalg.norm(step) / np.linalg.norm(even)
        p -= lr * step + lr * decay * np.where(step * p >= 0, p, 0.0)
    return p


@pytest.mark.parametrize("number", [float, torch.tensor])
@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_a_step_updates_all_matrices_of_a_shape_as_the_papers_of_muon_say(shape, number, exact_svd):
    rng = np.random.default_rng(1)
    matrices, gradients = rng.normal(size=(3, *shape)), rng.normal(size=(4, 3, *shape))
    start = torch.from_numpy(matrices).float()
    params = [torch.nn.Parameter(start[:2].clone()), torch.nn.Parameter(start[2].clone())]
    group = {"kind": "muon", "params": params, "lr": 0.02}
    group |= {"momentum": 0.9, "beta2": 0.95, "weight_decay": 0.1}
    optimizer = train.MuonAdamW([group], False, torch.float32)
    optimizer.number = number
    for step in gradients:
        grads = torch.from_numpy(step).float()
        params[0].grad, params[1].grad = grads[:2], grads[2]
        optimizer.step()
    lr = 0.02 * math.sqrt(max(1, shape[0] / shape[1]))
    for i, p in enumerate((*params[0], params[1])):
        expected = muon_by_hand(matrices[i], gradients[:, i], lr, 0.9, 0.1, 0.95)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_adamw_is_that_of_pytorch():
    torch.manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(40, 8))
    ours = torch.nn.Parameter(theirs.detach().clone())
    reference = torch.optim.AdamW(
        [theirs], lr=0.01, betas=train.ADAM_BETAS, eps=train.ADAM_EPS, weight_decay=0.1
    )
    optimizer = train.MuonAdamW([train.adamw_group([ours], 0.01, 0.1)], False, torch.float32)
    for _ in range(30):
        theirs.grad = torch.randn(40, 8)
        ours.grad = theirs.grad.clone()
        reference.step()
        optimizer.step()
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_every_parameter_is_in_one_group_with_its_own_rate():
    model = small_model()
    groups = train.build_optimizer(model, compiled=False).param_groups
    group_of = {p: group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scale = (64 / 768) ** -0.5
    for p, lr in (
        (model.embedding.weight, 0.9 * scale),
        (model.value_embeddings.weight, 0.9 * scale),
        (model.head.weight, 0.005 * scale),
        (model.ngrams.gate, 0.0004 * scale),
        (model.resid_lambdas, 0.005),
        (model.x0_lambdas, 0.5),
    ):
        assert group_of[p]["kind"] == "adamw"
        assert group_of[p]["lr"] == pytest.approx(lr)
    assert {group_of[p]["kind"] for p in model.blocks.parameters()} == {"muon"}


@pytest.mark.parametrize("knob", ["WEIGHT_DECAY", "MATRIX_LR", "SCALAR_LR", "MUON_BETA2"])
def test_a_knob_may_be_a_whole_number(monkeypatch, knob):
    monkeypatch.setattr(train, knob, 0 if knob in ("WEIGHT_DECAY", "MUON_BETA2") else 1)
    model = small_model(depth=2)
    ids = random_ids(model)
    train.train_step(model, train.build_optimizer(model, compiled=False), [(ids, ids)])


def test_the_rates_are_constant_and_then_fall_linearly(monkeypatch):
    optimizer = train.build_optimizer(small_model(), compiled=False)
    for progress, part in ((0.0, 1.0), (0.3, 1.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0)):
        train.set_schedule(optimizer, progress)
        for group in optimizer.param_groups:
            assert group["lr"] == part * group["initial_lr"]
    train.set_schedule(optimizer, 0.2)
    muon = next(group for group in optimizer.param_groups if group["kind"] == "muon")
    assert muon["momentum"] == pytest.approx(0.9)
    assert muon["weight_decay"] == pytest.approx(0.16)
    monkeypatch.setattr(train, "DECAY_POWER", 2)
    train.set_schedule(optimizer, 0.75)
    assert muon["weight_decay"] == pytest.approx(0.0125)
    assert muon["momentum"] == pytest.approx(0.95)


# training


def train_small(tokenizer, module=train, untrained=None, steps=30):
    """Loss on the last ten of `steps` batches; groups of kind `untrained` are left alone."""
    torch.manual_seed(0)
    config = module.Config(tokenizer.get_vocab_size(), 64, 2, 32, 16, module.WINDOW_PATTERN)
    attention = module.Attention("matmul", 64, set(config.windows), CPU)
    model = module.GPT(config, attention, torch.float32)
    optimizer = module.build_optimizer(model, compiled=False)
    losses = []
    for step, batch in enumerate(batches_of(tokenizer, 64, steps)):
        module.set_schedule(optimizer, step / steps)
        for group in optimizer.param_groups:
            group["lr"] *= group["kind"] != untrained
        losses.append(module.train_step(model, optimizer, [batch]).item())
    return sum(losses[-10:]) / 10


def unigram_entropy(tokenizer):
    """Loss of a model that knows the frequency of each token and nothing else."""
    tokens = torch.cat([y.flatten() for _, y in batches_of(tokenizer, 64, 60)])
    counts = torch.bincount(tokens)
    p = counts[counts > 0] / counts.sum()
    return -(p * p.log()).sum().item()


def test_a_small_model_learns_and_each_optimizer_does_its_part(tokenizer, monkeypatch, no_ngrams):
    monkeypatch.setattr(train, "MUON_MOMENTUM", (0.85, 0.85))  # 30 steps are few
    learned = train_small(tokenizer)
    assert learned < unigram_entropy(tokenizer) - 0.5
    assert train_small(tokenizer, untrained="muon") > learned + 0.05
    assert train_small(tokenizer, untrained="adamw") > learned + 0.5


def load_for_cuda(monkeypatch):
    """train.py with the knobs of a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "get_device", lambda: torch.device("cuda"))
        spec = importlib.util.spec_from_file_location("train_for_cuda", train.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_the_knobs_of_a_gpu_work_at_reduced_size(tokenizer, monkeypatch):
    module = load_for_cuda(monkeypatch)
    assert module.CUDA
    module.check_knobs(2048)
    monkeypatch.setattr(module, "NGRAM_ROWS", 10_007)
    assert train_small(tokenizer, module) < unigram_entropy(tokenizer)


def test_two_half_batches_make_the_same_step_as_the_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(train, "ADAM_EPS", 1.0)  # a step is proportional to the gradient
    ((x, y),) = batches_of(tokenizer, 64, 1)
    start = small_model(tokenizer.get_vocab_size(), depth=2).head.weight
    steps = []
    for batches in ([(x, y)], [(x[:8], y[:8]), (x[8:], y[8:])]):
        model = small_model(tokenizer.get_vocab_size(), depth=2)
        optimizer = train.build_optimizer(model, compiled=False)
        loss = train.train_step(model, optimizer, batches)
        assert loss.item() == pytest.approx(math.log(tokenizer.get_vocab_size()), rel=1e-3)
        steps.append(model.head.weight - start)
    assert (steps[0] - steps[1]).norm() < 1e-3 * steps[0].norm()


@pytest.mark.gpu
def test_a_compiled_model_learns_on_a_gpu(tokenizer):
    device = torch.device("cuda")
    config = train.Config(tokenizer.get_vocab_size(), 256, 2, 64, 64, "SL")
    backend, _ = train.choose_attention(device, compiled=True)
    attention = train.Attention(backend, 256, set(config.windows), device)
    model = train.GPT(config, attention, torch.bfloat16).to(device)
    optimizer = train.build_optimizer(model, compiled=True)
    forward = torch.compile(model, dynamic=False)
    losses = []
    for step, batch in enumerate(batches_of(tokenizer, 256, 40)):
        train.set_schedule(optimizer, step / 40)
        batch = [tensor.cuda() for tensor in batch]
        losses.append(train.train_step(forward, optimizer, [batch]).item())
    assert losses[-1] < losses[0] - 2.0


# warm-up


def test_a_warm_up_leaves_no_trace(tokenizer, monkeypatch):
    model = small_model(tokenizer.get_vocab_size(), tokenizer.corpus.seq_len, depth=2)
    perturb(model)
    tensors = [*model.parameters(), *model.buffers()]
    before, randomness = [tensor.clone() for tensor in tensors], torch.get_rng_state()
    losses, train_step = [], train.train_step

    def watched(*arguments):
        torch.rand(3)
        losses.append(train_step(*arguments).item())

    monkeypatch.setattr(train, "train_step", watched)
    _, optimizer = train.warm_up(make_run(tokenizer), model, 4, compiled=False)
    assert losses[0] != losses[1]  # it did train
    for seen, expected in zip(tensors, before, strict=True):
        assert torch.equal(seen, expected)
    assert torch.equal(torch.get_rng_state(), randomness)
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.steps == 0
    assert not optimizer.state


@pytest.mark.parametrize(("total", "micro_batches"), [(16, 1), (64, 2)])
def test_a_warm_up_adds_to_gradients_if_training_will(
    tokenizer, monkeypatch, total, micro_batches, no_ngrams
):
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", total * tokenizer.corpus.seq_len)
    seen = []
    monkeypatch.setattr(train, "train_step", lambda *arguments: seen.append(len(arguments[2])))
    model = small_model(tokenizer.get_vocab_size(), tokenizer.corpus.seq_len, depth=2)
    train.warm_up(make_run(tokenizer), model, 16, compiled=False)
    assert seen == [micro_batches] * 2


class Failing(torch.nn.Module):
    """A part of a model that raises an error for micro-batches of more than `rows` rows."""

    def __init__(self, part, error, rows):
        super().__init__()
        self.part, self.error, self.rows = part, error, rows
        self.weight = part.weight

    def forward(self, ids):
        if len(ids) > self.rows:
            raise self.error
        return self.part(ids)


@pytest.fixture
def fit(tokenizer, monkeypatch, no_ngrams):
    """Fit a model to memory whose embedding fails; return the rows, and the model."""

    def run(error, rows, total=64):
        length = tokenizer.corpus.seq_len
        monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", total * length)
        model = small_model(tokenizer.get_vocab_size(), length, depth=2)
        model.embedding = Failing(model.embedding, error, rows)
        return train.fit_memory(make_run(tokenizer), model, compiled=False)[2], model

    return run


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("2.00 GiB"),
        RuntimeError("InductorError: CUDA out of memory. Tried to allocate"),
    ],
)
def test_micro_batches_are_halved_until_they_fit_memory(fit, capsys, error):
    rows, model = fit(error, rows=4)
    assert rows == 4
    assert capsys.readouterr().out.splitlines() == [
        "out of memory: micro-batches of 8 rows instead",
        "out of memory: micro-batches of 4 rows instead",
    ]
    expected = small_model(model.config.vocab_size, model.config.seq_len, depth=2)
    for p, start in zip(model.blocks.parameters(), expected.blocks.parameters(), strict=True):
        assert torch.equal(p, start)
        assert p.grad is None


def test_micro_batches_divide_the_batch(fit):
    assert fit(torch.OutOfMemoryError(), rows=7, total=48)[0] == 4
    assert fit(torch.OutOfMemoryError(), rows=7, total=36)[0] == 6


def test_a_single_row_that_does_not_fit_memory_ends_the_run(fit):
    with pytest.raises(torch.OutOfMemoryError):
        fit(torch.OutOfMemoryError(), rows=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_shape_mistake_in_the_model_surfaces_after_one_attempt(
    tokenizer, monkeypatch, capsys, no_ngrams, compiled
):
    attempts, warm_up = [], train.warm_up
    monkeypatch.setattr(
        train, "warm_up", lambda *arguments: attempts.append(arguments) or warm_up(*arguments)
    )
    model = small_model(tokenizer.get_vocab_size(), tokenizer.corpus.seq_len, depth=2)
    model.blocks[1].mlp_in = torch.nn.Linear(63, 256)
    with pytest.raises(RuntimeError, match=r"4096.*63x256|size of tensor|reduction dim"):
        train.fit_memory(make_run(tokenizer), model, compiled)
    assert len(attempts) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mistake_in_the_optimizer_surfaces_after_one_attempt(
    tokenizer, monkeypatch, capsys, no_ngrams, compiled
):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(train, "adamw_update", lambda *_, **state: {}["beta3"])
    model = small_model(tokenizer.get_vocab_size(), tokenizer.corpus.seq_len, depth=2)
    with pytest.raises(KeyError, match="beta3"):
        train.fit_memory(make_run(tokenizer), model, compiled)
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
def test_a_gpu_with_too_little_memory_gets_smaller_micro_batches(tokenizer, monkeypatch, no_ngrams):
    device, length = torch.device("cuda"), tokenizer.corpus.seq_len
    monkeypatch.setattr(prepare, "get_device", lambda: device)
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 4096)
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", 4096 * length)
    config = train.Config(tokenizer.get_vocab_size(), length, 4, 64, 64, "L")
    attention = train.Attention("sdpa", length, {length}, device)
    model = train.GPT(config, attention, torch.bfloat16).to(device)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total)
    try:
        rows = train.fit_memory(make_run(tokenizer, device), model, compiled=False)[2]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert rows < 4096
    assert 4096 % rows == 0


# knobs and device


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("DEPTH", 0, "DEPTH=0 must be at least 1"),
        ("DEVICE_BATCH_SIZE", 7, "TOTAL_BATCH_SIZE=4096 must be .* DEVICE_BATCH_SIZE=7 rows x 256"),
        ("TOTAL_BATCH_SIZE", 0, "TOTAL_BATCH_SIZE=0 must be a multiple"),
        ("WINDOW_PATTERN", "SXL", "WINDOW_PATTERN='SXL' must consist of S and L"),
        ("WINDOW_PATTERN", "", "WINDOW_PATTERN='' must consist of S and L"),
        ("HEAD_DIM", 33, "HEAD_DIM=33 must be even"),
        ("SOFT_CAP", -1, "SOFT_CAP=-1 must be from 0 to 70"),
        ("NGRAM_CONTEXTS", (0, 2), r"NGRAM_CONTEXTS=\(0, 2\) must ascend"),
        ("NGRAM_PART", 1.0, "NGRAM_PART=1.0 must be above 0 and below 1"),
        ("NGRAM_MATCHES", 4, "NGRAM_MATCHES=4 must be from 1 to the 3 NGRAM_CONTEXTS"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_name(monkeypatch, knob, value, message):
    train.check_knobs(256)
    monkeypatch.setattr(train, knob, value)
    with pytest.raises(SystemExit, match=message):
        train.check_knobs(256)


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
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 0),
    ],
)
def test_a_device_is_known_by_its_name_or_has_no_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert train.peak_flops(torch.device("cuda")) == peak * 1e12
    assert train.peak_flops(CPU) == 0
