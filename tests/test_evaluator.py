"""The judge, against a loop that a reader can check by eye, and with models that it must refuse."""

import math

import numpy as np
import pytest
import torch
from cheats import DEPTH, Answer, TinyGPT, make_noisy, next_token
from torch import nn

import prepare


class Causal(nn.Module):
    """A tiny honest model: embedding, a running mean over what came before, head."""

    def __init__(self, vocab_size, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids):
        x = self.embedding(ids)
        positions = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        return self.head(x + x.cumsum(1) / positions[:, None])


@pytest.fixture
def short(corpus, tokenizer, monkeypatch):
    """11 pieces of 65 tokens of the validation rows, each with a BOS among its targets."""
    bos, pieces = tokenizer.get_bos_token_id(), []
    for row in prepare.read_val_rows(corpus):
        for at in np.flatnonzero(row[1:] == bos)[:1]:
            start = min(max(at - 10, 0), len(row) - 65)
            pieces.append(row[start : start + 65])
    rows = np.stack(pieces[:11])
    assert rows.shape == (11, 65)
    monkeypatch.setattr(prepare, "read_val_rows", lambda corpus: rows)
    return rows


def bits_per_byte_by_hand(model, tokenizer, rows):
    nats, num_bytes = 0.0, 0
    for row in rows.tolist():
        logits = model(torch.tensor([row[:-1]]))[0].double()
        for position, target in enumerate(row[1:]):
            if target < tokenizer.get_bos_token_id():
                scores = [math.exp(z) for z in logits[position].tolist()]
                nats -= math.log(scores[target] / sum(scores))
                num_bytes += len(tokenizer.encoding.decode_single_token_bytes(target))
    return nats / math.log(2) / num_bytes


@pytest.mark.parametrize("batch_size", [1, 3, 7, 11, 16])
def test_val_bpb_is_that_of_a_plain_loop_at_any_batch_size(short, tokenizer, batch_size):
    model = Causal(tokenizer.get_vocab_size())
    with torch.no_grad():
        expected = bits_per_byte_by_hand(model, tokenizer, short)
    val_bpb = prepare.evaluate_bpb(model, tokenizer, batch_size)
    assert val_bpb == pytest.approx(expected, abs=1e-6)


def test_a_model_that_knows_nothing_needs_the_bits_of_a_uniform_distribution(short, tokenizer):
    model = Causal(tokenizer.get_vocab_size())
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    lengths = np.array([len(token) for token in tokenizer.tokens()])[short[:, 1:]]
    expected = math.log2(tokenizer.get_vocab_size()) * (lengths > 0).sum() / lengths.sum()
    assert prepare.evaluate_bpb(model, tokenizer, 4) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_given_back_in_the_mode_it_had(short, tokenizer, training):
    model = Causal(tokenizer.get_vocab_size()).train(training)
    prepare.evaluate_bpb(model, tokenizer, 4)
    assert model.training == model.head.training == training


def test_a_batch_that_does_not_fit_memory_is_halved(short, tokenizer):
    model, sizes = Causal(tokenizer.get_vocab_size()), []

    class Tight(nn.Module):
        def forward(self, ids):
            sizes.append(len(ids))
            if len(ids) > 3:
                raise torch.OutOfMemoryError("8 rows do not fit")
            return model(ids)

    expected = prepare.evaluate_bpb(model, tokenizer, 8)
    assert prepare.evaluate_bpb(Tight(), tokenizer, 8) == pytest.approx(expected, abs=1e-6)
    assert sizes[:3] == [8, 4, 2]


def test_running_out_of_memory_halfway_counts_no_row_twice(short, tokenizer):
    model, calls = Causal(tokenizer.get_vocab_size()), []

    class Tight(nn.Module):
        def forward(self, ids):
            calls.append(len(ids))
            if len(calls) == 2:
                raise torch.OutOfMemoryError("no room for another forward pass")
            return model(ids)

    expected = prepare.evaluate_bpb(model, tokenizer, 4)
    assert prepare.evaluate_bpb(Tight(), tokenizer, 8) == pytest.approx(expected, abs=1e-6)


def test_a_model_that_reuses_its_output_is_judged_as_one_that_does_not(short, tokenizer):
    model, outputs = Causal(tokenizer.get_vocab_size()), {}

    class Reusing(nn.Module):
        def __init__(self, leak):
            super().__init__()
            self.leak = leak

        def forward(self, ids):
            logits = model(ids) + self.leak * next_token(ids, tokenizer.get_vocab_size())
            return outputs.setdefault(ids.shape, torch.empty_like(logits)).copy_(logits)

    expected = prepare.evaluate_bpb(model, tokenizer, 4)
    assert prepare.evaluate_bpb(Reusing(0.0), tokenizer, 4) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="sees what it has to predict"):
        prepare.evaluate_bpb(Reusing(5.0), tokenizer, 4)


EXPECTED = r"model\(x\) must return float logits \(4, 64, \d+\); it returned "
NOT_LOGITS = {
    "a loss": (lambda logits: logits.sum(), r"torch.float32 \(\)"),
    "a tuple": (lambda logits: (logits, None), "tuple"),
    "an array": (lambda logits: logits.numpy(), "ndarray"),
    "another vocabulary": (lambda logits: logits[..., :-1], "torch.float32"),
    "another length": (lambda logits: logits[:, :-1], r"torch.float32 \(4, 63"),
    "integers": (lambda logits: logits.long(), "torch.int64"),
}


@pytest.mark.parametrize("name", NOT_LOGITS)
def test_what_are_no_logits_is_refused(short, tokenizer, name):
    model = Causal(tokenizer.get_vocab_size())
    change, seen = NOT_LOGITS[name]
    with pytest.raises(ValueError, match=EXPECTED + seen):
        prepare.evaluate_bpb(Answer(lambda ids: change(model(ids))), tokenizer, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_a_logit_that_is_not_finite_is_refused(short, tokenizer, value):
    model, seventh = Causal(tokenizer.get_vocab_size()), torch.from_numpy(short[6, :-1].astype(int))

    def spoil(ids):
        here = (ids == seventh).all(1)[:, None] & (torch.arange(64) == 5)
        return model(ids).double().masked_fill(here[..., None], value)

    with pytest.raises(ValueError, match=r"batch 1: logits from \S+ to \S+ are not finite"):
        prepare.evaluate_bpb(Answer(spoil), tokenizer, 4)


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16, other bits every time"])
def test_an_honest_model_is_never_refused(short, tokenizer, kind, batch_size):
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = TinyGPT(tokenizer.get_vocab_size(), dtype)
    if kind == "bfloat16, other bits every time":
        model = make_noisy(model)
    for _ in range(3):
        assert 1 < prepare.evaluate_bpb(model, tokenizer, batch_size) < 10


@pytest.mark.slow
def test_an_honest_compiled_model_is_never_refused(short, tokenizer):
    model = TinyGPT(tokenizer.get_vocab_size())
    compiled = prepare.evaluate_bpb(torch.compile(model, dynamic=False), tokenizer, 4)
    assert compiled == pytest.approx(prepare.evaluate_bpb(model, tokenizer, 4), abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_an_honest_model_is_never_refused_on_a_gpu(short, tokenizer, batch_size):
    model = TinyGPT(tokenizer.get_vocab_size(), torch.bfloat16).cuda()
    for _ in range(3):
        compiled = torch.compile(model, dynamic=False)
        assert 1 < prepare.evaluate_bpb(compiled, tokenizer, batch_size) < 10


LEAKS = r"batch \d+, row \d+, position \d+: a loss moves by \S+ nats when later tokens"
REPEATS = r"batch \d+, row \d+, position \d+: a loss moves by .* when the batch comes again"
CHEATS = {
    "a window off by one": LEAKS,
    "the whole row seen": LEAKS,
    "one head of one layer": LEAKS,
    "a convolution with padding on the wrong side": LEAKS,
    "a shifted embedding": LEAKS,
    "statistics of the batch": LEAKS,
    "a leak anywhere but in the first batch": LEAKS,
    "a leak at the full batch size": LEAKS,
    "pairs of tokens seen in validation": REPEATS,
    "parameters that learn": REPEATS,
}


def make_cheat(name, vocab_size, rows):
    """A model that is not judged by what it can predict; evaluated with 4 rows a batch."""
    model, first = TinyGPT(vocab_size), torch.from_numpy(rows[0, :16].astype(int))
    counts = torch.zeros(vocab_size, vocab_size)

    def leak(ids):
        return 0.1 * next_token(ids, vocab_size)

    def pad_wrongly(ids):
        x = model.embedding(ids).mT
        return model.head(convolve(nn.functional.pad(x, (1, 1))).mT)

    def count_pairs(ids):
        logits = model(ids) + 2 * (counts[ids] + 1).log()
        counts.index_put_((ids[:, :-1], ids[:, 1:]), torch.ones(()), accumulate=True)
        return logits

    def learn(ids):
        with torch.enable_grad():
            logits = model(ids)[:, :-1].flatten(0, 1)
            nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight.sub_(0.01 * weight.grad)
                weight.grad = None
        return model(ids)

    convolve = nn.Conv1d(64, 64, 3)
    if name == "a shifted embedding":
        model.embedding.register_forward_hook(lambda _module, _ids, x: x + x.roll(-1, 1))
    if name == "statistics of the batch":
        model.head.register_forward_pre_hook(lambda _module, xs: (xs[0] - xs[0].mean(0),))
    return {
        "a window off by one": lambda: model.peek(1, 2, range(DEPTH)),
        "the whole row seen": lambda: model.peek(64, 2, range(DEPTH)),
        "one head of one layer": lambda: model.peek(1, 1, [1]),
        "a convolution with padding on the wrong side": lambda: Answer(pad_wrongly),
        "a leak anywhere but in the first batch": lambda: Answer(
            lambda ids: model(ids) + (not (ids[:, :16] == first).all(1).any()) * leak(ids)
        ),
        "a leak at the full batch size": lambda: Answer(
            lambda ids: model(ids) + (len(ids) == 4) * leak(ids)
        ),
        "pairs of tokens seen in validation": lambda: Answer(count_pairs),
        "parameters that learn": lambda: Answer(learn, model),
    }.get(name, lambda: model)()


@pytest.mark.parametrize("name", CHEATS)
def test_a_model_that_cheats_is_refused(short, tokenizer, name):
    model = make_cheat(name, tokenizer.get_vocab_size(), short)
    with pytest.raises(ValueError, match=CHEATS[name]):
        prepare.evaluate_bpb(model, tokenizer, 4)


@pytest.mark.parametrize("batch_size", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_a_leak_is_found_among_many_batches_by_chance_alone(
    corpus, tokenizer, monkeypatch, batch_size
):
    rows = np.concatenate([prepare.read_val_rows(corpus)[:, :65]] * 6)[:320]
    monkeypatch.setattr(prepare, "read_val_rows", lambda corpus: rows)
    name = "a leak anywhere but in the first batch"
    model = make_cheat(name, tokenizer.get_vocab_size(), rows)
    for _ in range(3):
        with pytest.raises(ValueError, match="when later tokens"):
            prepare.evaluate_bpb(model, tokenizer, batch_size)


def test_noise_does_not_hide_a_leak(short, tokenizer):
    """A single loss that differs every time must not buy a leak of its size everywhere else."""
    vocab_size = tokenizer.get_vocab_size()
    model = TinyGPT(vocab_size)

    def answer(ids):
        logits = model(ids) + 0.15 * next_token(ids, vocab_size)
        logits[0, 7, ids[0, 8]] += 0.15 * torch.rand(())
        return logits

    for _ in range(5):
        with pytest.raises(ValueError, match="when later tokens"):
            prepare.evaluate_bpb(Answer(answer), tokenizer, 4)


@pytest.mark.parametrize("name", ["val_rows.bin", "tokenizer.json"])
@pytest.mark.parametrize("how", ["a bit is flipped", "it is cut short"])
def test_files_that_are_not_the_manifests_are_refused(corpus, tokenizer, name, how):
    path = corpus.directory / name
    original = path.read_bytes()
    flipped = bytes([original[0] ^ 1]) + original[1:]
    try:
        path.write_bytes(flipped if how == "a bit is flipped" else original[:514])
        with pytest.raises(SystemExit, match=f"{name} is missing or damaged: `uv run prepare.py"):
            prepare.evaluate_bpb(Causal(tokenizer.get_vocab_size()), tokenizer, 4)
    finally:
        path.write_bytes(original)


def test_a_tokenizer_with_longer_tokens_makes_no_val_bpb_lower(short, corpus, tokenizer):
    class Longer(prepare.Tokenizer):
        def tokens(self):
            return [token * 2 for token in super().tokens()]

    model = Causal(tokenizer.get_vocab_size())
    honest = prepare.evaluate_bpb(model, tokenizer, 4)
    assert prepare.evaluate_bpb(model, Longer(corpus), 4) == honest
