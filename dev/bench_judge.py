"""How far the judge's tolerance is from honest models and from leaks: the table behind prepare.TOLERANCE.

    uv run tests/bench_judge.py [--seconds 300]

Trains the model of train.py, small, on the corpus python, then audits it on 128 validation rows: as it is, with noise,
and with leaks. Printed are nats: the most by which a loss moves when the same batch comes again, by how much the mean
does, and the most by which a loss moves when only later tokens change; then the change of val_bpb, and the verdict.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare
import train
from tests.cheats import Answer, Peeking, next_token, noisy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seconds", type=float, default=300, help="of training (default 300)")
seconds = parser.parse_args().seconds

device, (corpus, _) = prepare.get_device(), prepare.choose_corpus("python")
prepare.prepare(corpus)
tokenizer = prepare.Tokenizer(corpus)
tokens, rows = tokenizer.tokens(), prepare.read_val_rows(corpus)
rows, vocab = rows[:: len(rows) // 128][:128], len(tokens)
sizes = vocab, corpus.seq_len, train.DEPTH, train.HEAD_DIM, train.ASPECT_RATIO, train.WINDOW_PATTERN


def build(dtype=torch.float32):
    config = train.Config(*sizes)
    attention = train.Attention("sdpa", corpus.seq_len, set(config.windows), device)
    return train.GPT(config, attention, dtype).to(device)


torch.manual_seed(prepare.SEED)
model = build()
optimizer, loader = train.build_optimizer(model, compiled=False), prepare.make_dataloader(tokenizer, 16, 256, "train")
begin, steps, loss = time.perf_counter(), 0, None
while (progress := (time.perf_counter() - begin) / seconds) < 1:
    train.set_schedule(optimizer, progress, steps)
    loss, steps = train.train_step(model, optimizer, [next(loader)[:2]]), steps + 1
loader.close()
weights = model.state_dict()


def trained(dtype=torch.float32, peek=None):
    model = build(dtype)
    model.load_state_dict(weights)
    if peek:
        model.attention = Peeking(model, *peek)
    return model.eval()


@torch.no_grad()
def measure(name, model, batch_size=16):
    """Print a line of the table; return val_bpb."""
    captured = []
    prepare.refuse_leaks, refuse_leaks = lambda *arguments: captured.append(arguments), prepare.refuse_leaks
    val_bpb = prepare.judge(model, rows, tokens, batch_size)
    prepare.refuse_leaks = refuse_leaks
    audits = captured[0][2]
    repeat, change, verdict = [], [], "passes"
    for number, x, y, last, _, losses, moved in audits:
        again = prepare.token_losses(model, x.roll(1, 0), y.roll(1, 0), vocab, number).roll(-1, 0)
        repeat.append(again - losses)
        change.append((moved - losses)[torch.arange(x.shape[1]) <= last].abs().max())
    try:
        refuse_leaks(*captured[0])
    except ValueError:
        verdict = "refused"
    repeat = torch.stack(repeat)
    figures = f"{repeat.abs().max():>9.2g}{repeat.mean().abs():>9.2g}{max(change):>9.2g}{val_bpb - honest_bpb:>+9.4f}"
    print(f"{name:<56}{batch_size:>4}{figures}  {verdict}", flush=True)
    return val_bpb


honest_bpb = 0.0
print(f"{steps} steps of 4096 tokens, loss {loss:.2f}, on {device}; rows a batch, then:")
print(f"{'model':<60}{'repeat':>9}{'mean':>9}{'change':>9}{'val_bpb':>9}  verdict")
honest_bpb = measure("honest, float32 (its val_bpb)", trained())
for batch_size in (1, 5, 64):
    measure("honest, float32", trained(), batch_size)
measure("honest, float32, compiled", torch.compile(trained(), dynamic=False))
measure("honest, bfloat16", trained(torch.bfloat16))
for batch_size in (1, 16):
    measure("honest, every layer rounds to bfloat16 at random", noisy(trained()), batch_size)
for block in range(train.DEPTH):
    measure(f"one head of block {block} sees 1 token ahead", trained(peek=(1, 1, [block])))
measure("one head of block 0 sees the whole row", trained(peek=(256, 1, [0])))
measure("all heads see 1 token ahead", trained(peek=(1, model.config.width // train.HEAD_DIM, range(train.DEPTH))))
honest = trained()
for size in (0.1, 0.01, 0.004):
    leak = Answer(lambda ids, size=size: honest(ids) + size * next_token(ids, vocab), honest)
    measure(f"{size} added to the logit of the next token", leak)
for size in (0.1, 0.01, 0.003):
    mixed = Answer(lambda ids, size=size: torch.lerp(z := honest(ids), z.mean(0, keepdim=True), size), honest)
    measure(f"logits drawn to the mean of the batch by {size}", mixed)
