"""What a step of train.py costs: uv run dev/bench_step.py [--against REVISION] [--profile]

Trains with train.py itself, loop included, for a number of steps instead of five minutes, in
processes of their own, interleaved with the train.py of a git revision (or a file), each turn with
another seed. Prints the median step time of each turn, the ratio, and the mean loss of the last
quarter of the steps. --profile shows where the time of one more run goes: the parts of a step, the
operations or kernels that take longest, and how long the GPU was idle.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_sitting import ROOT, load_train, parse_knob, pass_on

PROFILED = 4  # steps


def device_idle(events: list) -> float:
    """Part of the time between the first and the last kernel in which none ran."""
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, until = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return 1 - busy / (until - spans[0][0])


class Marks:
    """Points of time within the steps, on the device's own clock if it is a GPU."""

    def __init__(self, torch, cuda: bool):
        self.torch, self.cuda, self.points = torch, cuda, []

    def add(self, part: str) -> None:
        """Mark that a part of the step begins."""
        point = time.perf_counter()
        if self.cuda:
            point = self.torch.cuda.Event(enable_timing=True)
            point.record()
        self.points.append((part, point))

    def wrap(self, function, before: str, after: str):
        """Return the function with a mark on either side."""

        def call(*arguments, **options):
            self.add(before)
            result = function(*arguments, **options)
            self.add(after)
            return result

        return call

    def milliseconds(self) -> dict[str, float]:
        """Return the median time of each part."""
        if self.cuda:
            self.torch.cuda.synchronize()
        parts = {}
        for (part, begin), (_, end) in itertools.pairwise(self.points):
            spent = begin.elapsed_time(end) if self.cuda else 1e3 * (end - begin)
            parts.setdefault(part, []).append(spent)
        return {part: statistics.median(times) for part, times in parts.items()}


def train_some(arguments: argparse.Namespace) -> dict:
    """Run train() of a file for some steps; return seconds and losses of each, peak in MiB."""
    import resource

    import torch

    import harness.run
    import prepare

    steps, profiled = arguments.steps, arguments.profile
    if profiled:
        torch._inductor.config.cpp.enable_kernel_profile = True
    train = load_train(arguments.child, dict(arguments.set))
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * cuda
    profile, times, losses, result = torch.profiler.profile(activities=activities), [], [], {}
    marks = Marks(torch, cuda)

    class Steps(harness.run.Run):
        """A run of a number of steps that is not judged."""

        def start(self, model):
            self.started, self.before = time.perf_counter(), len(losses)
            result["warm_up_seconds"] = self.started - self.launched
            marks.points.clear()

        def progress(self):  # also asked after the counts, before the first step
            done = len(losses) - self.before
            times[done:] = [time.perf_counter()]
            if profiled and done == steps - PROFILED:
                result["parts"] = marks.milliseconds()  # the profiler would slow them down
                profile.start()
            return done / steps

        def stop(self, model):
            if profiled:
                profile.stop()
            self.seconds = time.perf_counter() - self.started

        def finish(self, model, batch_size, steps, tokens, depth, mfu):
            result.update(rows=batch_size, tokens=tokens // steps, mfu=mfu)

    step = train.train_step

    def train_step(model, *given):
        losses.append(step(marks.wrap(model, "forward", "rest"), *given))
        return losses[-1]

    train.train_step = train_step
    if profiled:
        torch.Tensor.backward = marks.wrap(torch.Tensor.backward, "backward", "rest")
        optimizer = train.MuonAdamW
        optimizer.step = marks.wrap(optimizer.step, "optimizer", "rest")
    corpus = prepare.choose_corpus(arguments.corpus)
    prepare.prepare(corpus)
    torch.manual_seed(arguments.seed)
    train.train(
        Steps(corpus, prepare.Tokenizer(corpus), prepare.get_device(), arguments.seed, None)
    )
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    result["peak"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident
    if profiled:
        sort = "self_device_time_total" if cuda else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=sort, row_limit=20, max_name_column_width=60)
        print(table, file=sys.stderr)
        on_gpu = torch.autograd.DeviceType.CUDA
        kernels = [event for event in profile.events() if event.device_type == on_gpu]
        if kernels:
            idle = f"the GPU was idle for {device_idle(kernels):.2%} of {PROFILED} steps"
            print(idle, file=sys.stderr)
        parts = (f"{part} {spent:.1f} ms" for part, spent in result["parts"].items())
        warm_up = f"warm-up and compile {result['warm_up_seconds']:.0f} s"
        of = f"of a step of {result['tokens']} tokens"
        print(f"{warm_up}; {of}: {', '.join(parts)}", file=sys.stderr)
    result["seconds"] = [b - a for a, b in itertools.pairwise(times)]
    result["losses"] = [loss.item() for loss in losses[-steps:]]
    return result


def run_child(arguments: argparse.Namespace, path: Path, seed: int, *options: str) -> dict:
    """Train in a process of its own."""
    command = [sys.executable, __file__, "--child", path, *options]
    command += ["--steps", str(arguments.steps), "--seed", str(seed)]
    command += pass_on(arguments.corpus, dict(arguments.set))
    return json.loads(subprocess.check_output(command).splitlines()[-1])


def compare(arguments: argparse.Namespace, versions: dict[str, Path]) -> None:
    """Print what a step of each version costs, turn by turn, and the ratio of two."""
    medians, losses = {name: [] for name in versions}, {name: [] for name in versions}
    for turn in range(arguments.turns):
        for name, path in versions.items():
            seed = arguments.seed + turn
            result = run_child(arguments, path, seed)
            median = statistics.median(result["seconds"][2:])
            medians[name].append(median)
            last = result["losses"][-(arguments.steps + 3) // 4 :]
            losses[name].append(statistics.mean(last))
            speed = f"{1e3 * median:.1f} ms a step, {result['tokens'] / median:.0f} tokens a second"
            rest = f"MFU {result['mfu']:.2f} %, peak {result['peak']:.0f} MiB"
            print(f"seed {seed}, {name}: {speed}, {result['rows']} rows, {rest}")
            print(f"    loss {losses[name][-1]:.4f}", flush=True)
    if len(versions) == 2:
        (ours, theirs), (loss, other) = medians.values(), losses.values()
        ratios = ", ".join(f"{a / b:.3f}" for a, b in zip(ours, theirs, strict=True))
        ratio = statistics.mean(ours) / statistics.mean(theirs)
        print(f"time of a step, ratio: {ratio:.3f} ({ratios})")
        print(f"loss, difference: {statistics.mean(loss) - statistics.mean(other):+.4f}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", help="a git revision, or a file, to compare with")
    parser.add_argument("--steps", type=int, default=40, help="of each run (default 40)")
    parser.add_argument("--turns", type=int, default=2, help="runs of each version (default 2)")
    parser.add_argument("--corpus", help="as for train.py")
    parser.add_argument("--profile", action="store_true", help="profile one more run")
    parser.add_argument("--seed", type=int, default=42, help="of the first turn (default 42)")
    parser.add_argument("--set", action="append", type=parse_knob, default=[], metavar="KNOB=VALUE")
    parser.add_argument("--train", type=Path, default=ROOT / "train.py", help="another train.py")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 8 or arguments.turns < 0:
        parser.error("expected --steps of 8 or more and --turns of 0 or more")
    if arguments.child:
        print(json.dumps(train_some(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        versions = {"train.py": arguments.train}
        if arguments.against and Path(arguments.against).exists():
            versions[arguments.against] = Path(arguments.against)
        elif arguments.against:
            source = subprocess.check_output(
                ["git", "-C", ROOT, "show", f"{arguments.against}:./train.py"]
            )
            versions[arguments.against] = Path(folder, "train.py")
            versions[arguments.against].write_bytes(source)
        compare(arguments, versions)
    if arguments.profile:
        run_child(arguments, arguments.train, arguments.seed, "--profile")


if __name__ == "__main__":
    main()
