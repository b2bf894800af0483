"""Make the most of half an hour of a GPU: compare variants of train.py's knobs, and profile them.

It needs the packages of pyproject.toml; without a network, bring rustbpe and kernels as wheels.
The plan, in pieces of ten minutes; ... stands for --corpus FOLDER --out OUT:

  0. python3 dev/gpu_sitting.py collect FOLDER    (a corpus from the machine's own source and prose)
  1. python3 -m pytest -m gpu tests/test_train.py tests/test_data.py tests/test_evaluator.py
     python3 dev/gpu_sitting.py profile ...
  2. python3 dev/gpu_sitting.py compare ... --variants reference recipe published
     python3 dev/gpu_sitting.py compare ... --variants smear ngrams ngrams-8
  3. python3 dev/gpu_sitting.py compare ... --variants tuned-smear uncapped averaged
  4. python3 dev/gpu_sitting.py compare ... --seconds 300 --variants reference
     and BEST, then both with --seeds 43

Half an hour is enough for 0 to 2 and the first pair of 4. Each variant trains for --seconds in a
process of its own and is judged as in a run; with several seeds the variants are interleaved.
Results are written as they come, and nothing is started that would not end within --limit. The
table shows every result in OUT that trained for the same number of seconds. --set makes a variant
of your own, its value a literal, without operators; --train takes another file.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "dev")]

REFERENCE = {
    "DEPTH": 8,
    "ASPECT_RATIO": 64,
    "HEAD_DIM": 128,
    "WINDOW_PATTERN": "SSSL",
    "SHORT_WINDOW": 1 / 2,
    "ROTARY_BASE": 10_000,
    "SMEAR": (0.0, 0.0),
    "SOFT_CAP": 15.0,
    "X0_LAMBDA": 0.1,
    "MATRIX_INIT": 1.0,
    "QK_SCALE": 1.0,
    "VALUE_EVERY": 2,
    "GATE_CHANNELS": 32,
    "GATE_SCALE": 2.0,
    "NGRAM_CONTEXTS": (),
    "TOTAL_BATCH_SIZE": 2**19,
    "DEVICE_BATCH_SIZE": 128,
    "HEAD_CHUNK": 2**15,
    "MATRIX_LR": 0.04,
    "WEIGHT_DECAY": 0.2,
    "DECAY_POWER": 1,
    "MUON_MOMENTUM": (0.85, 0.95),
    "MUON_WARMUP": 0.32,  # 300 of 947 steps
    "MUON_BETA2": 0.95,
    "HEAD_LR": 0.004,
    "HEAD_DECAY": 0.0,
    "EMBEDDING_LR": 0.6,
    "EMBEDDING_DECAY": 0.0,
    "VALUE_DECAY": 0.0,
    "SCALAR_LR": 0.5,
    "WARMDOWN": 0.5,
    "FINAL_LR": 0.0,
    "COMPILE_OPTIONS": {},
}

TUNED = {"coordinate_descent_tuning": True, "max_autotune_pointwise": True, "shape_padding": True}

# The best published run on Hopper, but for its compiler options.
PUBLISHED = REFERENCE | {
    "ASPECT_RATIO": 96,
    "SHORT_WINDOW": 1 / 8,
    "ROTARY_BASE": 200_000,
    "X0_LAMBDA": 0.05,
    "MATRIX_INIT": 0.68,
    "QK_SCALE": 1.3,
    "VALUE_EVERY": 3,
    "GATE_CHANNELS": 128,
    "GATE_SCALE": 1.8,
    "TOTAL_BATCH_SIZE": 2**17,
    "DEVICE_BATCH_SIZE": 64,
    "MATRIX_LR": 0.042,
    "WEIGHT_DECAY": 0.125,
    "DECAY_POWER": 2,
    "MUON_MOMENTUM": (0.85, 0.92),
    "MUON_WARMUP": 0.04,  # 100 of 2478 steps
    "MUON_BETA2": 0.0,
    "HEAD_LR": 0.01,
    "HEAD_DECAY": 0.01,
    "EMBEDDING_LR": 0.74,
    "EMBEDDING_DECAY": 0.001,
    "VALUE_DECAY": 0.004,
    "WARMDOWN": 0.925,
    "FINAL_LR": 0.025,
}
SMEAR = PUBLISHED | {"SMEAR": (0.25, 0.0)}

VARIANTS = {
    "reference": REFERENCE,
    "recipe": {},  # train.py as it is
    "published": PUBLISHED,
    "smear": SMEAR,
    "ngrams": SMEAR | {"NGRAM_CONTEXTS": (2, 3, 4), "NGRAM_PART": 0.5},
    "ngrams-8": SMEAR | {"NGRAM_CONTEXTS": (1, 2, 3, 4, 5, 6, 8), "NGRAM_PART": 0.5},
    "ngrams-8-most": SMEAR | {"NGRAM_CONTEXTS": (1, 2, 3, 4, 5, 6, 8), "NGRAM_PART": 0.75},
    "tuned": PUBLISHED | {"COMPILE_OPTIONS": TUNED},
    "tuned-smear": SMEAR | {"COMPILE_OPTIONS": TUNED},
    "uncapped": PUBLISHED | {"SOFT_CAP": 0.0},
    "averaged": PUBLISHED | {"AVERAGED_PART": 0.1},
    "smear-mlp": PUBLISHED | {"SMEAR": (0.25, 0.25)},
}

# For trying a variant without a GPU: these values replace its own.
SMALL = {
    "DEPTH": 3,
    "ASPECT_RATIO": 16,
    "HEAD_DIM": 32,
    "GATE_CHANNELS": 32,
    "TOTAL_BATCH_SIZE": 2**11,
    "DEVICE_BATCH_SIZE": 4,
    "HEAD_CHUNK": 2**9,
    "NGRAM_ROWS": 2**12,
    "COMPILE_OPTIONS": {},
}

SUFFIXES = ".py .pyi .h .hpp .cpp .cu .c .cc .md .rst .txt .js .ts .css .html".split()


def collect(folder: Path, roots: list[str]) -> None:
    """Copy the distinct texts below some folders to FOLDER, and prepare them as a corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    size = 0
    for root in roots:
        for place, _, names in os.walk(root):
            for path in (Path(place, name) for name in names if Path(name).suffix in SUFFIXES):
                try:
                    text = path.read_bytes()
                    text.decode()
                except (OSError, UnicodeDecodeError):
                    continue
                if b"\0" not in text:
                    (folder / f"{hashlib.sha256(text).hexdigest()[:24]}.txt").write_bytes(text)
                    size += len(text)
    print(f"{folder}: {len(list(folder.iterdir()))} files, from {size / 1e6:.0f} MB", flush=True)


def load_train(path: Path, knobs: dict):
    """Import a train.py, and set knobs of it. Raises SystemExit for one that it does not have."""
    spec = importlib.util.spec_from_file_location("train", path)
    train = sys.modules["train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    for name, value in knobs.items():
        if not hasattr(train, name):
            raise SystemExit(f"{path} has no knob {name}")
        setattr(train, name, value)
    return train


def choose_knobs(arguments: argparse.Namespace, name: str) -> dict:
    """Return the knobs of a variant, with --small and --set in force."""
    return VARIANTS[name] | (SMALL if arguments.small else {}) | dict(arguments.set)


def pass_on(corpus: str | None, knobs: dict) -> list[str]:
    """Return the options that give a child process its corpus and knobs."""
    options = [f"--set={name}={value!r}" for name, value in knobs.items()]
    return options + [f"--corpus={corpus}"] * bool(corpus)


def train_variant(arguments: argparse.Namespace, knobs: dict) -> dict:
    """Train one variant in this process; return its results."""
    import torch

    import harness.run
    import prepare

    averaged_part, average, count = knobs.pop("AVERAGED_PART", 0), [], 0
    train = load_train(arguments.train, knobs)
    if arguments.small:
        train.choose_precision = lambda device: (torch.float32, False, "")
    prepare.TIME_BUDGET, result = arguments.seconds, {}

    class Sitting(harness.run.Run):
        """A run without a record, with a budget of its own."""

        def start(self, model):
            result["warm_up_seconds"] = time.perf_counter() - self.launched
            self.parameters = [p.detach() for p in model.parameters()]
            super().start(model)

        def progress(self):  # with AVERAGED_PART, the mean of the last weights is judged
            nonlocal count
            progress = super().progress()
            if progress > 1 - averaged_part:
                average[:] = average or [p.to(torch.float32, copy=True) for p in self.parameters]
                count += 1
                for mean, p in zip(average, self.parameters, strict=True):
                    mean.lerp_(p.float(), 1 / count)
            return progress

        def stop(self, model):
            for mean, p in zip(average, self.parameters if average else [], strict=True):
                p.copy_(mean)
            super().stop(model)

        def finish(self, model, batch_size, steps, tokens, depth, mfu):
            super().finish(model, batch_size, steps, tokens, depth, mfu)
            result.update({name: float(value) for name, value in self.summary.items()})
            result.update(rows=batch_size, epochs=tokens / count_tokens(self.corpus))

    corpus = prepare.choose_corpus(arguments.corpus)
    prepare.prepare(corpus)
    torch.manual_seed(arguments.seeds[0])
    device, tokenizer = prepare.get_device(), prepare.Tokenizer(corpus)
    with (arguments.out / "traceback.txt").open("w") as file:
        run = Sitting(corpus, tokenizer, device, arguments.seeds[0], file)
        train.train(run)
    result["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    if train.NGRAM_CONTEXTS:
        result["epochs"] /= 1 - train.NGRAM_PART
    return result


def count_tokens(corpus) -> int:
    """Return the training tokens of a prepared corpus."""
    return sum(path.stat().st_size for path in corpus.directory.glob("train_*.tokens")) // 2


def print_table(results: list[dict]) -> None:
    """Print the mean of each variant over its runs, and how far its val_bpb is from the first's."""
    columns = "num_steps total_tokens_M epochs mfu_percent peak_vram_mb warm_up_seconds".split()
    print(f"\n{'variant':<16}runs   val_bpb    diff", *columns, sep="  ")
    by_variant, first = {}, None
    for result in results:
        by_variant.setdefault(result["variant"], []).append(result)
    for name, runs in by_variant.items():
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in ("val_bpb", *columns)}
        first = first or mean["val_bpb"]
        cells = [f"{mean[key]:>{len(key)}.1f}" for key in columns]
        difference = f"{mean['val_bpb'] / first - 1:+7.2%}"
        print(f"{name:<16}{len(runs):>4}  {mean['val_bpb']:.6f}", difference, *cells, sep="  ")
    print(flush=True)


def compare(arguments: argparse.Namespace) -> None:
    """Train every variant with every seed, each in a process of its own, as long as time allows."""
    began, longest, missing = time.monotonic(), float(arguments.seconds), []
    log = arguments.out / "results.jsonl"
    for seed in arguments.seeds:
        for name in arguments.variants:
            left = arguments.limit - (time.monotonic() - began)
            if left < longest:
                missing.append(f"{name}, seed {seed}: not started for lack of time")
                continue
            start = time.monotonic()
            command = [sys.executable, __file__, "child", "--variants", name, "--seeds", str(seed)]
            command += ["--seconds", str(arguments.seconds), "--out", arguments.out]
            command += ["--train", arguments.train, *["--small"] * arguments.small]
            command += pass_on(arguments.corpus, dict(arguments.set))
            print(f"{name}, seed {seed}", flush=True)
            with (arguments.out / "log.txt").open("a") as output:
                print(f"\n{name}, seed {seed}", file=output, flush=True)
                try:
                    subprocess.run(command, stdout=output, stderr=output, timeout=left, check=True)
                except subprocess.SubprocessError as error:
                    last = Path(output.name).read_text().rstrip().splitlines()[-1]
                    missing.append(f"{name}, seed {seed}: {type(error).__name__}, {last}")
                    print(f"failed, see {output.name}: {last}", flush=True)
                    continue
            longest = max(longest, time.monotonic() - start)
            results = [json.loads(line) for line in log.read_text().splitlines()]
            print_table([entry for entry in results if entry["seconds"] == arguments.seconds])
    if missing:
        raise SystemExit("\n".join(["without a result:", *missing]))


def profile(arguments: argparse.Namespace) -> None:
    """Write a profile of each variant, with its compile time, to a file."""
    for name in arguments.variants:
        knobs = choose_knobs(arguments, name)
        knobs.pop("AVERAGED_PART", None)
        with (arguments.out / f"profile-{name}.txt").open("w") as file:
            command = [sys.executable, ROOT / "dev/bench_step.py", "--steps", "16", "--turns", "0"]
            command += ["--profile", "--train", arguments.train]
            command += pass_on(arguments.corpus, knobs)
            status = subprocess.run(command, stdout=file, stderr=file).returncode
        text = Path(file.name).read_text().splitlines()
        print(f"{name}: {'failed' * bool(status)} {file.name}", *text[-24:], sep="\n", flush=True)
        if status:
            raise SystemExit(status)


def parse_knob(text: str) -> tuple[str, object]:
    """Read KNOB=value, the value as Python writes it."""
    name, _, value = text.partition("=")
    return name, ast.literal_eval(value)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("piece", choices=["collect", "profile", "compare", "child"])
    parser.add_argument("folder", nargs="?", type=Path, help="collect: where to write the corpus")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["reference", "recipe"])
    parser.add_argument("--seconds", type=int, default=100, help="of training (default 100)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="default 42")
    parser.add_argument("--limit", type=float, default=590, help="seconds in all (default 590)")
    parser.add_argument("--corpus", help="as for train.py")
    parser.add_argument("--out", type=Path, default=Path("sitting"), help="default: ./sitting")
    parser.add_argument("--set", action="append", type=parse_knob, default=[], metavar="KNOB=VALUE")
    parser.add_argument("--train", type=Path, default=ROOT / "train.py", help="another train.py")
    parser.add_argument("--small", action="store_true", help="a tiny model, for a try on a CPU")
    arguments = parser.parse_args()
    if arguments.piece == "collect":
        if not arguments.folder:
            parser.error("collect needs a FOLDER to write to")
        import prepare

        collect(arguments.folder, [sysconfig.get_paths()["purelib"], "/usr"])
        prepare.prepare(prepare.choose_corpus(str(arguments.folder)))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.piece == "child":
        name = arguments.variants[0]
        result = {"variant": name, "seed": arguments.seeds[0], "seconds": arguments.seconds}
        result |= train_variant(arguments, choose_knobs(arguments, name))
        with (arguments.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
    elif arguments.piece == "profile":
        profile(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
