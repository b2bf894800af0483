"""The judge, against a loop that a reader can check by eye, and with models that it must refuse."""

import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
from cheats import Answer, Peeking, next_token, noisy
from conftest import give_guesses

import prepare
import train

pytestmark = pytest.mark.usefixtures("small_tables")


class Causal(nn.Module):
    """A tiny honest model: embedding, a running mean over what came before, head."""

    def __init__(self, vocab_size, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + x.cumsum(1) / torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]
        return self.head(x)


@pytest.fixture
def short(corpus, tokenizer, monkeypatch):
    """11 pieces of 65 tokens of the validation rows, with a BOS among the targets: a loop over all is quick."""
    bos, pieces = tokenizer.get_bos_token_id(), []
    for row in prepare.read_val_rows(corpus):
        for at in np.flatnonzero(row[1:] == bos)[:1]:
            begin = min(max(at - 10, 0), len(row) - 65)
            pieces.append(row[begin : begin + 65])
    rows = np.stack(pieces[:11])
    assert rows.shape == (11, 65)
    monkeypatch.setattr(prepare, "read_val_rows", lambda corpus: rows)
    return rows


def bits_per_byte_by_hand(model, tokenizer, rows):
    nats, size = 0.0, 0
    for row in rows.tolist():
        logits = model(torch.tensor([row[:-1]]))[0].double()
        for position, target in enumerate(row[1:]):
            if target < tokenizer.get_bos_token_id():
                scores = [math.exp(z) for z in logits[position].tolist()]
                nats -= math.log(scores[target] / sum(scores))
                size += len(tokenizer.encoding.decode_single_token_bytes(target))
    return nats / math.log(2) / size


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 11, 16])
def test_val_bpb_is_that_of_a_plain_loop_at_any_batch_size(short, tokenizer, batch_size):
    model = Causal(tokenizer.get_vocab_size())
    with torch.no_grad():
        expected = bits_per_byte_by_hand(model, tokenizer, short)
    assert prepare.evaluate_bpb(model, tokenizer, batch_size) == pytest.approx(expected, abs=1e-6)


def test_a_model_that_knows_nothing_needs_the_bits_of_a_uniform_guess(short, tokenizer):
    model = Causal(tokenizer.get_vocab_size())
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    counted = torch.tensor([len(token) for token in tokenizer.tokens()])[torch.from_numpy(short[:, 1:].astype(int))]
    expected = math.log2(tokenizer.get_vocab_size()) * (counted > 0).sum().item() / counted.sum().item()
    assert prepare.evaluate_bpb(model, tokenizer, 4) == pytest.approx(expected, rel=1e-6)


def test_the_model_is_given_back_in_the_mode_it_came(short, tokenizer):
    model = Causal(tokenizer.get_vocab_size()).train()
    model.head.eval()
    prepare.evaluate_bpb(model, tokenizer, 4)
    assert (model.training, model.embedding.training, model.head.training) == (True, True, False)


def test_a_batch_that_does_not_fit_memory_is_halved(short, tokenizer):
    model, sizes = Causal(tokenizer.get_vocab_size()), []

    class Tight(nn.Module):
        def forward(self, ids):
            sizes.append(len(ids))
            if len(ids) > 3:
                raise torch.OutOfMemoryError("8 rows do not fit")
            return model(ids)

    assert prepare.evaluate_bpb(Tight(), tokenizer, 8) == pytest.approx(
        prepare.evaluate_bpb(model, tokenizer, 8), abs=1e-6
    )
    assert sizes[:3] == [8, 4, 2]


def test_a_model_that_reuses_its_output_is_judged_as_one_that_does_not(short, tokenizer):
    model, buffer = Causal(tokenizer.get_vocab_size()), {}

    class Reusing(nn.Module):
        def __init__(self, leak):
            super().__init__()
            self.leak = leak

        def forward(self, ids):
            logits = model(ids) + self.leak * nn.functional.one_hot(ids.roll(-1, 1), tokenizer.get_vocab_size())
            return buffer.setdefault(ids.shape, torch.empty_like(logits)).copy_(logits)

    expected = prepare.evaluate_bpb(model, tokenizer, 4)
    assert prepare.evaluate_bpb(Reusing(0.0), tokenizer, 4) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="sees what it has to predict"):
        prepare.evaluate_bpb(Reusing(5.0), tokenizer, 4)


def test_running_out_of_memory_in_a_probe_counts_no_row_twice(short, tokenizer):
    model, calls = Causal(tokenizer.get_vocab_size()), []

    class Tight(nn.Module):
        def forward(self, ids):
            calls.append(len(ids))
            if len(calls) == 2:  # the first probe
                raise torch.OutOfMemoryError("no room for another forward pass")
            return model(ids)

    expected = prepare.evaluate_bpb(model, tokenizer, 4)
    assert prepare.evaluate_bpb(Tight(), tokenizer, 8) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("returns a loss", r"must return floating-point logits \(4, 64, \d+\); it returned torch.float32 \(\)"),
        ("returns a tuple", "it returned tuple"),
        ("wrong vocabulary", "it returned torch.float32"),
        ("wrong length", r"it returned torch.float32 \(4, 63"),
        ("whole numbers", "it returned torch.int64"),
        ("an array", "it returned ndarray"),
        ("float64 too large", r"batch 0: logits of up to \S+ are too large for float32"),
        ("nan", r"a logit is not finite: nan at batch 1, row 2, position 5, token \d+"),
        ("infinite", "a logit is not finite: inf at batch 1, row 2, position 5"),
    ],
)
def test_what_are_no_logits_is_refused(short, tokenizer, name, message):
    honest, seventh = Causal(tokenizer.get_vocab_size()), torch.from_numpy(short[6, :-1].astype(int))

    def spoiled(ids, value):
        here = (ids == seventh).all(1)[:, None] & (torch.arange(64) == 5)
        return honest(ids).masked_fill(here[..., None], value)

    answers = {
        "returns a loss": lambda ids: honest(ids).sum(),
        "returns a tuple": lambda ids: (honest(ids), None),
        "wrong vocabulary": lambda ids: honest(ids)[..., :-1],
        "wrong length": lambda ids: honest(ids)[:, :-1],
        "whole numbers": lambda ids: honest(ids).long(),
        "an array": lambda ids: honest(ids).numpy(),
        "float64 too large": lambda ids: honest(ids).double() * 1e300,
        "nan": lambda ids: spoiled(ids, math.nan),
        "infinite": lambda ids: spoiled(ids, math.inf),
    }
    with pytest.raises(ValueError, match=message):
        prepare.evaluate_bpb(Answer(answers[name]), tokenizer, 4)


# the model of train.py, its weights drawn so that every part of it counts, honest and not


def gpt(tokenizer, dtype=torch.float32, depth=4):
    torch.manual_seed(0)
    config = train.Config(tokenizer.get_vocab_size(), 64, depth, head_dim=32, aspect_ratio=16, window_pattern="SSSL")
    model = train.GPT(config, train.Attention("matmul", 64, set(config.windows), torch.device("cpu")), dtype)
    with torch.no_grad():
        for weight in (*model.blocks.parameters(), model.head.weight):
            weight.normal_(std=weight.shape[-1] ** -0.5)
        model.trust.normal_(std=0.1)
    give_guesses(model, torch.from_numpy(prepare.read_val_rows(tokenizer.corpus)[:, :64].astype(np.int64)))
    return model


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16 with other bits every time"])
def test_an_honest_model_is_never_refused(short, tokenizer, kind, batch_size):
    model = gpt(tokenizer, torch.float32 if kind == "float32" else torch.bfloat16)
    if kind == "bfloat16 with other bits every time":
        model = noisy(model)
    for _ in range(3):
        assert 1 < prepare.evaluate_bpb(model, tokenizer, batch_size) < 10


def test_an_honest_compiled_model_is_never_refused(short, tokenizer):
    model = gpt(tokenizer, depth=2)
    compiled = prepare.evaluate_bpb(torch.compile(model, dynamic=False), tokenizer, 4)
    assert compiled == pytest.approx(prepare.evaluate_bpb(model, tokenizer, 4), abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_an_honest_model_is_never_refused_on_a_gpu(short, tokenizer, backend, batch_size):
    model, device = gpt(tokenizer, torch.bfloat16).cuda(), torch.device("cuda")
    model.attention = train.Attention(backend, 64, set(model.config.windows), device)
    for _ in range(3):
        assert 1 < prepare.evaluate_bpb(torch.compile(model, dynamic=False), tokenizer, batch_size) < 10


def cheat(name, tokenizer, full_batch, first=None):
    """A model that is not judged by what it can predict."""
    model, vocab = gpt(tokenizer), tokenizer.get_vocab_size()
    if name in ("window off by one", "bidirectional", "one head of one layer"):
        ahead, heads, blocks = {
            "window off by one": (1, 2, range(4)),
            "bidirectional": (64, 2, range(4)),
            "one head of one layer": (1, 1, [1]),
        }[name]
        model.attention = Peeking(model, ahead, heads, blocks)
        return model
    if name == "convolution with padding on the wrong side":
        conv = nn.Conv1d(64, 64, 3)
        embed = nn.Sequential(nn.Embedding(vocab, 64), nn.Linear(64, 64))
        return Answer(lambda ids: model.head(conv(nn.functional.pad(embed(ids).mT, (1, 1))).mT))
    if name == "shifted embedding":
        model.embedding.register_forward_hook(lambda _module, _ids, x: x + x.roll(-1, 1))
        return model
    if name == "statistics of the batch":
        model.head.register_forward_pre_hook(lambda _module, inputs: (inputs[0] - inputs[0].mean(0),))
        return model
    calls, counts = [], torch.zeros(vocab, vocab)

    def leak(ids):
        return 0.1 * next_token(ids, vocab)

    def pairs_seen(ids):
        calls.append(len(ids))
        logits = model(ids) + 2 * (counts[ids] + 1).log()
        counts.index_put_((ids[:, :-1], ids[:, 1:]), torch.ones(()), accumulate=True)
        return logits

    def learn(ids):
        with torch.enable_grad():
            nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight.sub_(0.01 * weight.grad)
                weight.grad = None
        return model(ids)

    return {
        "pairs of tokens seen in validation": Answer(pairs_seen),
        "parameters that learn": Answer(learn, model),
        "not in the first batch": Answer(lambda ids: model(ids) + (not (ids[:, 1] == first).any()) * leak(ids)),
        "at the full batch size": Answer(lambda ids: model(ids) + (len(ids) == full_batch) * leak(ids)),
    }[name]


SEEN = r"batch \d+, row \d+, position \d+: the loss moves by \S+ nats"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("window off by one", f"{SEEN} when tokens after position \\d+ change: the model sees what it has to predict"),
        ("bidirectional", f"{SEEN} when tokens after position"),
        ("convolution with padding on the wrong side", f"{SEEN} when tokens after position"),
        ("shifted embedding", f"{SEEN} when tokens after position"),
        ("one head of one layer", f"{SEEN} when tokens after position"),
        ("statistics of the batch", f"{SEEN} when other rows of the batch change"),
        (
            "pairs of tokens seen in validation",
            f"{SEEN} .* when the batch comes again: the answer depends on earlier batches",
        ),
        (
            "parameters that learn",
            f"{SEEN} .* when the batch comes again: the answer depends on earlier batches|parameters changed",
        ),
        ("not in the first batch", f"{SEEN} when tokens after position"),
        ("at the full batch size", f"{SEEN} when tokens after position"),
    ],
)
def test_a_model_that_cheats_is_refused(short, tokenizer, name, message):
    with pytest.raises(ValueError, match=message):
        prepare.evaluate_bpb(cheat(name, tokenizer, full_batch=4, first=int(short[0, 1])), tokenizer, 4)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_leak_is_found_among_many_batches_by_chance_alone(corpus, tokenizer, monkeypatch, batch_size):
    rows = prepare.read_val_rows(corpus)[:, :65]
    rows = np.concatenate([rows] * 6)[:320]
    monkeypatch.setattr(prepare, "read_val_rows", lambda corpus: rows)
    model = cheat("not in the first batch", tokenizer, full_batch=0, first=int(rows[0, 1]))
    for _ in range(3):
        with pytest.raises(ValueError, match="when tokens after position"):
            prepare.evaluate_bpb(model, tokenizer, batch_size)


def test_noise_does_not_hide_a_leak(short, tokenizer):
    """A single loss that differs every time must not buy a leak of its size everywhere else."""
    model, vocab = gpt(tokenizer), tokenizer.get_vocab_size()

    def answer(ids):
        logits = model(ids) + 0.15 * next_token(ids, vocab)
        logits[0, 7, ids[0, 8]] += 0.15 * torch.rand(())
        return logits

    for _ in range(5):
        with pytest.raises(ValueError, match="when tokens after position"):
            prepare.evaluate_bpb(Answer(answer), tokenizer, 4)


def test_a_leak_in_one_head_of_one_layer_that_is_refused_hardly_moves_val_bpb(short, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "refuse_leaks", lambda *_: None)
    honest, peeking = gpt(tokenizer), cheat("one head of one layer", tokenizer, full_batch=4)
    difference = prepare.evaluate_bpb(peeking, tokenizer, 4) - prepare.evaluate_bpb(honest, tokenizer, 4)
    assert 0 < abs(difference) < 0.01


def test_parameters_that_change_during_the_evaluation_are_refused_even_if_no_loss_moves(short, tokenizer):
    model = gpt(tokenizer)
    answer = Answer(lambda ids: model.head.weight.mul_(1.0 + 2**-23) is None or model(ids), model)
    with pytest.raises(ValueError, match="parameters changed during the evaluation"):
        prepare.evaluate_bpb(answer, tokenizer, 4)


@pytest.mark.parametrize("name", ["val_rows.bin", "tokenizer.json"])
def test_files_that_were_changed_are_refused(corpus, tokenizer, name):
    path = corpus.directory / name
    original = path.read_bytes()
    try:
        path.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        with pytest.raises(SystemExit, match=f"{name} is damaged.*uv run prepare.py"):
            prepare.evaluate_bpb(Causal(tokenizer.get_vocab_size()), tokenizer, 4)
    finally:
        path.write_bytes(original)


def test_a_tokenizer_whose_tokens_are_longer_is_refused(short, corpus):
    class Longer(prepare.Tokenizer):
        def tokens(self):
            return [token * 2 for token in super().tokens()]

    with pytest.raises(ValueError, match=r"the tokenizer handed over is not that of .*folder-networkx"):
        prepare.evaluate_bpb(Causal(corpus.vocab_size), Longer(corpus), 4)


def test_the_tokenizer_of_another_corpus_is_refused(short, corpus, tmp_path, folder):
    text = shutil.copytree(folder / "algorithms", tmp_path / "text")
    other, _ = prepare.choose_corpus(str(text))
    prepare.prepare(other)
    tokenizer = prepare.Tokenizer(other)
    tokenizer.corpus = corpus
    with pytest.raises(ValueError, match="the tokenizer handed over is not that of"):
        prepare.evaluate_bpb(Causal(corpus.vocab_size), tokenizer, 4)


def test_rows_that_are_fewer_than_the_manifest_says_are_refused(corpus, tokenizer):
    path = corpus.directory / "val_rows.bin"
    original = path.read_bytes()
    try:
        path.write_bytes(original[: 2 * (corpus.seq_len + 1)])
        with pytest.raises(SystemExit, match=r"val_rows\.bin is damaged"):
            prepare.evaluate_bpb(Causal(tokenizer.get_vocab_size()), tokenizer, 4)
    finally:
        path.write_bytes(original)


def test_the_model_of_train_py_has_one_val_bpb_at_any_batch_size(short, tokenizer):
    figures = [prepare.evaluate_bpb(gpt(tokenizer), tokenizer, batch_size) for batch_size in (1, 2, 5, 11, 32)]
    assert max(figures) - min(figures) < 1e-6
