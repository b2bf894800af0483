"""What a step of train.py costs: uv run dev/bench_step.py [--against REVISION] [--profile]

Trains with train.py itself, loop included, for a number of steps instead of five minutes, in
processes of their own, interleaved with the train.py of a git revision (or a file), each turn with
another seed. Prints the median step time of each turn, the ratio, and the mean loss of the last
quarter of the steps; with --profile also the operations or kernels that take longest, and how long
the GPU was idle.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROFILED = 4  # steps


def device_idle(events: list) -> float:
    """Part of the time between the first and the last kernel in which none ran."""
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, until = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return 1 - busy / (until - spans[0][0])


def train_some(path: str, steps: int, seed: int, corpus: str | None, profiled: bool) -> dict:
    """Run train() of a file for some steps; return seconds and losses of each, peak in MiB."""
    import resource

    import torch

    import harness.run
    import prepare

    if profiled:
        torch._inductor.config.cpp.enable_kernel_profile = True
    spec = importlib.util.spec_from_file_location("train", path)
    train = sys.modules["train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    cuda = torch.cuda.is_available()
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        *[torch.profiler.ProfilerActivity.CUDA] * cuda,
    ]
    profile, times, losses, result = torch.profiler.profile(activities=activities), [], [], {}

    class Steps(harness.run.Run):
        """A run of a number of steps that is not judged."""

        def start(self, model):
            self.started, self.before = time.perf_counter(), len(losses)

        def progress(self):  # also asked after the counts, before the first step
            done = len(losses) - self.before
            times[done:] = [time.perf_counter()]
            if profiled and done == steps - PROFILED - 1:
                profile.start()
            return done / steps

        def stop(self, model):
            if profiled:
                profile.stop()
            self.seconds = time.perf_counter() - self.started

        def finish(self, model, batch_size, steps, tokens, depth, mfu):
            result.update(rows=batch_size, tokens=tokens // steps, mfu=mfu)

    step = train.train_step
    train.train_step = lambda *arguments: losses.append(step(*arguments)) or losses[-1]
    corpus = prepare.choose_corpus(corpus)
    prepare.prepare(corpus)
    torch.manual_seed(seed)
    run = Steps(corpus, prepare.Tokenizer(corpus), prepare.get_device(), seed, None)
    train.train(run)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident
    if profiled:
        sort = "self_device_time_total" if cuda else "self_cpu_time_total"
        print(
            profile.key_averages().table(sort_by=sort, row_limit=20, max_name_column_width=60),
            file=sys.stderr,
        )
        kernels = [
            event
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        if kernels:
            print(
                f"the GPU was idle for {device_idle(kernels):.2%} of {PROFILED} steps",
                file=sys.stderr,
            )
    seconds = [b - a for a, b in itertools.pairwise(times)]
    return result | {
        "seconds": seconds,
        "losses": [loss.item() for loss in losses[-steps:]],
        "peak": peak,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", help="a git revision, or a file, to compare with")
    parser.add_argument("--steps", type=int, default=40, help="of each run (default 40)")
    parser.add_argument("--turns", type=int, default=2, help="runs of each version (default 2)")
    parser.add_argument("--corpus", help="as for train.py")
    parser.add_argument(
        "--profile", action="store_true", help="profile the last steps of one more run"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the first turn (default 42)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 8 or arguments.turns < 1:
        parser.error("expected --steps of 8 or more and --turns of 1 or more")
    if arguments.child:
        result = train_some(
            arguments.child, arguments.steps, arguments.seed, arguments.corpus, arguments.profile
        )
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        versions = {"train.py": ROOT / "train.py"}
        if arguments.against and Path(arguments.against).exists():
            versions[arguments.against] = Path(arguments.against)
        elif arguments.against:
            source = subprocess.check_output(
                ["git", "-C", ROOT, "show", f"{arguments.against}:./train.py"]
            )
            versions[arguments.against] = Path(folder, "train.py")
            versions[arguments.against].write_bytes(source)

        def run(path: Path, seed: int, *options: str) -> dict:
            command = [
                sys.executable,
                __file__,
                "--child",
                path,
                "--steps",
                str(arguments.steps),
                "--seed",
                str(seed),
            ]
            command += [*options, *["--corpus", arguments.corpus] * bool(arguments.corpus)]
            return json.loads(subprocess.check_output(command).splitlines()[-1])

        medians, losses = {name: [] for name in versions}, {name: [] for name in versions}
        for turn in range(arguments.turns):
            for name, path in versions.items():
                result = run(path, arguments.seed + turn)
                median = statistics.median(result["seconds"][2:])
                medians[name].append(median)
                losses[name].append(
                    statistics.mean(result["losses"][-(arguments.steps + 3) // 4 :])
                )
                speed = (
                    f"{1e3 * median:.1f} ms a step, {result['tokens'] / median:.0f} tokens a second"
                )
                rest = f"MFU {result['mfu']:.2f} %, peak {result['peak']:.0f} MiB"
                print(
                    f"seed {arguments.seed + turn}, {name}: {speed}, {result['rows']} rows, {rest}"
                )
                print(f"    loss {losses[name][-1]:.4f}", flush=True)
        if len(versions) == 2:
            (ours, theirs), (loss, other) = medians.values(), losses.values()
            ratios = ", ".join(f"{a / b:.3f}" for a, b in zip(ours, theirs, strict=True))
            ratio = statistics.mean(ours) / statistics.mean(theirs)
            print(f"time of a step, ratio: {ratio:.3f} ({ratios})")
            print(f"loss, difference: {statistics.mean(loss) - statistics.mean(other):+.4f}")
        if arguments.profile:
            run(ROOT / "train.py", arguments.seed, "--profile")


if __name__ == "__main__":
    main()
