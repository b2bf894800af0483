"""How far the judge's limits are from honest models and from leaks.

uv run dev/bench_judge.py [--seconds 300]

This is the table behind prepare.MAX_LEAK. A small GPT is trained on the corpus python and judged
on 128 validation rows: as it is, with noise, with leaks. Printed are nats: the most by which a loss
moves when the same batch comes again, the mean of that, and the most by which a loss moves when
later tokens change; then by how much val_bpb changes, and the verdict.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cheats import DEPTH, Answer, TinyGPT, make_noisy, next_token

import prepare


def train(tokenizer: prepare.Tokenizer, seconds: float) -> dict:
    """Train the model for so many seconds; return its weights."""
    model = TinyGPT(tokenizer.get_vocab_size())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader, start, steps = prepare.make_dataloader(tokenizer, 16, 256, "train"), time.time(), 0
    while time.time() - start < seconds:
        x, y, _ = next(loader)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    print(f"{steps} steps of 4096 tokens, loss {loss.item():.3f}")
    return model.state_dict()


@torch.no_grad()
def measure(
    name: str, model: torch.nn.Module, rows, tokens, batch_size: int, honest: float
) -> float:
    """Judge a model, print a line of the table, return its val_bpb."""
    seen, refuse_leaks = [], prepare.refuse_leaks
    prepare.refuse_leaks = lambda probes, noise: seen.extend([probes, noise])
    val_bpb = prepare.judge(model.eval(), rows, tokens, batch_size)
    prepare.refuse_leaks = refuse_leaks
    probes, noise = seen
    before = [torch.arange(probe.x.size(1)) <= probe.last for probe in probes]
    moved = [(p.moved - p.losses)[b].abs().max() for p, b in zip(probes, before, strict=True)]
    verdict = "passes"
    try:
        refuse_leaks(probes, noise)
    except ValueError:
        verdict = "refused"
    values = f"{noise.max():>9.2g}{noise.mean():>9.2g}{max(moved):>9.2g}{val_bpb - honest:>+9.4f}"
    print(f"{name:<56}{batch_size:>4}{values}  {verdict}", flush=True)
    return val_bpb


def main() -> None:
    """Print the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seconds", type=float, default=300, help="of training (default: 300)")
    corpus = prepare.choose_corpus("python")
    seconds = parser.parse_args().seconds
    prepare.prepare(corpus)
    tokenizer = prepare.Tokenizer(corpus)
    tokens, rows = tokenizer.tokens(), prepare.read_val_rows(corpus)
    rows, vocab_size, weights = (
        rows[:: len(rows) // 128][:128],
        len(tokens),
        train(tokenizer, seconds),
    )

    def trained(dtype: torch.dtype = torch.float32) -> TinyGPT:
        model = TinyGPT(vocab_size, dtype)
        model.load_state_dict(weights)
        return model

    model = trained()
    models = {("honest, float32 (its val_bpb)", 16): model}
    models |= {("honest, float32", size): model for size in (1, 5, 64)}
    models["honest, float32, compiled", 16] = torch.compile(trained(), dynamic=False)
    models["honest, bfloat16", 16] = trained(torch.bfloat16)
    noisy = "honest, every layer rounds to bfloat16 at random"
    models |= {(noisy, size): make_noisy(trained()) for size in (1, 16)}
    for block in range(DEPTH):
        models[f"one head of block {block} sees 1 token ahead", 16] = trained().peek(1, 1, [block])
    models["one head of block 0 sees the whole row", 16] = trained().peek(256, 1, [0])
    for size in (0.1, 0.01, 0.004):
        leak = Answer(lambda ids, size=size: model(ids) + size * next_token(ids, vocab_size))
        models[f"{size} added to the logit of the next token", 16] = leak
    for size in (0.1, 0.01, 0.003):
        mix = Answer(lambda ids, size=size: (z := model(ids)).lerp(z.mean(0, keepdim=True), size))
        models[f"logits drawn to the mean of the batch by {size}", 16] = mix
    print(f"{'model':<60}{'repeat':>9}{'mean':>9}{'moved':>9}{'val_bpb':>9}  verdict")
    honest = 0.0
    for (name, size), judged in models.items():
        honest = honest or measure(name, judged, rows, tokens, size, 0.0)
        measure(name, judged, rows, tokens, size, honest)


if __name__ == "__main__":
    main()
