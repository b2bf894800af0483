"""The judge, against a loop that a reader can check by eye, and with models that it must refuse."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn

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
    counted = tokenizer.token_bytes()[torch.from_numpy(short[:, 1:].astype(int))]
    expected = math.log2(tokenizer.get_vocab_size()) * (counted > 0).sum().item() / counted.sum().item()
    assert prepare.evaluate_bpb(model, tokenizer, 4) == pytest.approx(expected, rel=1e-6)


def test_the_model_is_given_back_in_the_mode_it_came(short, tokenizer):
    model = Causal(tokenizer.get_vocab_size()).train()
    prepare.evaluate_bpb(model, tokenizer, 4)
    assert model.training


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


def cheat(name, vocab_size):
    honest = Causal(vocab_size)
    shapes = {
        "returns a loss": lambda ids: honest(ids).sum(),
        "returns a tuple": lambda ids: (honest(ids), None),
        "wrong vocabulary": lambda ids: honest(ids)[..., :-1],
        "wrong length": lambda ids: honest(ids)[:, :-1],
        "whole numbers": lambda ids: honest(ids).long(),
        "nan": lambda ids: honest(ids).masked_fill(ids[..., None] == ids[0, 5], math.nan),
        "infinite": lambda ids: honest(ids).masked_fill(ids[..., None] == ids[0, 5], math.inf),
        "sees the next token": lambda ids: honest(ids) + 0.1 * nn.functional.one_hot(ids.roll(-1, 1), vocab_size),
        "sees the next token now and then": lambda ids: (
            honest(ids) + 0.1 * nn.functional.one_hot(ids.roll(-1, 1), vocab_size) * (torch.arange(64)[:, None] % 2)
        ),
        "sees the whole row": lambda ids: honest(ids) + honest.head(honest.embedding(ids).mean(1, keepdim=True)),
        "sees other rows": lambda ids: honest(ids) + honest.head(honest.embedding(ids).mean(0, keepdim=True)),
    }

    class Cheat(nn.Module):
        def forward(self, ids):
            return shapes[name](ids)

    return Cheat()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("returns a loss", r"must return floating-point logits \(4, 64, \d+\); it returned torch.float32 \(\)"),
        ("returns a tuple", "it returned tuple"),
        ("wrong vocabulary", "it returned torch.float32"),
        ("wrong length", r"it returned torch.float32 \(4, 63"),
        ("whole numbers", "it returned torch.int64"),
        ("nan", "not finite: nan at validation row 0, position"),
        ("infinite", "not finite: inf at validation row 0, position"),
        ("sees the next token", "the model sees what it has to predict"),
        ("sees the next token now and then", "the model sees what it has to predict"),
        ("sees the whole row", "the model sees what it has to predict"),
        ("sees other rows", "the model sees what it has to predict"),
    ],
)
def test_logits_that_a_language_model_can_not_have_are_refused(short, tokenizer, name, message):
    with pytest.raises(ValueError, match=message):
        prepare.evaluate_bpb(cheat(name, tokenizer.get_vocab_size()), tokenizer, 4)


def test_validation_rows_that_were_changed_are_refused(corpus, tokenizer):
    path = corpus.directory / "val_rows.bin"
    original = path.read_bytes()
    try:
        path.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        with pytest.raises(SystemExit, match=r"val_rows.bin is damaged.*uv run prepare.py"):
            prepare.evaluate_bpb(Causal(tokenizer.get_vocab_size()), tokenizer, 4)
    finally:
        path.write_bytes(original)
