"""The clock and the run: what decides how long a model trains, and what is judged. Locked."""

import contextlib
import faulthandler
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import nn

import prepare
from harness import record
from harness.record import ROOT, SEED, UnfitError

PAUSE = 5  # seconds in which not even a waiting thread ran: the process stood still
GRACE_SECONDS = 15  # that the last step may take beyond the budget, and finish() after stop()
RUN_LIMIT = 600  # seconds until a run ends itself; its evaluation has another 600
MAX_LOST = 5  # per cent of the budget; a run that loses more to other work is disturbed
MAX_SHARED = 2  # GiB of a GPU's memory; a run beside which others hold more is disturbed
DEVICE_LOCK = "/tmp/autoresearch-%s.lock"  # shared by all users and cache folders of a machine

NO_GPU = "no NVIDIA driver|No CUDA GPUs|not compiled with CUDA"  # PyTorch's words
ORDER = "call start(), stop() and finish() once each, in this order"
WEIGHTS = "weights or buffers changed after stop(), or forward() changes them"

# Clock ------------------------------------------------------------------------------------------


def require(holds: object, message: str) -> None:
    """Raise ValueError with the message if a condition does not hold."""
    if not holds:
        raise ValueError(message)


def limit_time(file: TextIO) -> None:
    """End the process RUN_LIMIT seconds from now, even in a call that never returns."""
    faulthandler.dump_traceback_later(RUN_LIMIT, exit=True, file=file)


def read_waits() -> np.ndarray:
    """Return the seconds that a thread of this process waited for a core, and others were busy.

    A run loses the smaller of the two: its threads may wait for each other, and others may have
    cores to themselves. Only Linux tells; elsewhere both are 0.
    """
    with contextlib.suppress(OSError, IndexError, ValueError):
        ticks = np.array(Path("/proc/stat").read_text().split()[1:9], dtype=float)
        ticks /= os.sysconf("SC_CLK_TCK")  # now seconds
        busy = ticks.sum() - ticks[3:5].sum()  # not idle
        threads = [path.read_text() for path in Path("/proc/self/task").glob("*/schedstat")]
        waited = sum(int(text.split()[1]) for text in threads) / 1e9 / torch.get_num_threads()
        waited += ticks[7] / os.cpu_count()  # stolen by a hypervisor
        return np.array([waited, busy - time.process_time()])
    return np.zeros(2)


@dataclass
class Run:
    """What train.py gets: start(), then what changes the weights, then stop(), then finish()."""

    corpus: prepare.Corpus
    tokenizer: prepare.Tokenizer
    device: torch.device
    seed: int
    traceback_file: TextIO
    before_start: Callable = lambda: None  # raises what is in the way of five minutes
    fallbacks: dict[str, str] = field(default_factory=dict)  # what does not work here, and why
    launched: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    waits: np.ndarray | float = 0.0  # read_waits() at the start
    watched: float = 0.0  # when show_status() last looked whether the process stands still
    paused: float = 0.0  # seconds of training in which it stood still
    seconds: float = 0.0  # of training
    lost_percent: float = 0.0  # of it, to other work
    shared_gib: float = 0.0  # of the GPU's memory, that other processes hold
    status: str = "starting"  # shown while the run lasts
    weights: str = ""  # their digest at the end of training
    summary: dict[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Start the budget. Raises ValueError if the model has learned before.

        Raises SystemExit if the run would not compare with what its branch kept.
        """
        require(not self.started, ORDER)
        vocab_size, losses = self.tokenizer.get_vocab_size(), []
        rows = torch.from_numpy(prepare.read_val_rows(self.corpus)[:8].astype(np.int64))
        with prepare.evaluating(model):
            for row in rows[:, None]:  # one at a time takes little memory
                losses.append(prepare.compute_losses(model, row[:, :-1], row[:, 1:], vocab_size, 0))
        loss, uniform = torch.cat(losses).mean().item(), np.log(vocab_size)
        seen = f"its loss is {loss:.2f} nats, that of an untrained one {uniform:.2f}"
        require(loss > uniform - 0.5, f"the model has learned before start(): {seen}")
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for name, why in self.fallbacks.items():
            print(f"FALLBACK, which makes this run slower: {name} ({why})", flush=True)
        self.before_start()
        self.waits, self.started = read_waits(), time.perf_counter()

    def progress(self) -> float:
        """Return the part of the budget that is used, 0 to 1, without waiting for the device."""
        return min((time.perf_counter() - self.started) / prepare.TIME_BUDGET, 1.0)

    def stop(self, model: nn.Module) -> None:
        """End the training. Raises ValueError if it took longer than the budget allows."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        require(self.started and not self.weights, ORDER)
        self.seconds = time.perf_counter() - self.started
        lost = max(float(min(read_waits() - self.waits)), 0.0)
        weights = digest_weights(model)
        if time.perf_counter() - self.watched > 1:
            time.sleep(0.5)  # until show_status() has seen a pause that is just over
        self.weights = weights
        seen = f"training took {self.seconds:.0f} s instead of {prepare.TIME_BUDGET}"
        if self.seconds > prepare.TIME_BUDGET + GRACE_SECONDS and self.paused:
            raise UnfitError(f"{seen}, for the process stood still: run it again")
        require(self.seconds <= prepare.TIME_BUDGET + GRACE_SECONDS, f"{seen}: make steps smaller")
        self.lost_percent = round(100 * (lost + self.paused) / self.seconds, 1)
        if self.device.type == "cuda" and not torch.cuda.get_device_properties(0).is_integrated:
            free, total = torch.cuda.mem_get_info()
            others = total - free - torch.cuda.memory_reserved()  # CUDA itself takes half a GiB
            self.shared_gib = round(others / 2**30, 1)
        limit_time(self.traceback_file)  # the evaluation has a limit of its own

    def finish(
        self, model: nn.Module, batch_size: int, steps: int, tokens: int, depth: int, mfu: float
    ) -> None:
        """Judge the weights of stop(), complete the summary that scripts grep. mfu: per cent."""
        require(self.weights and not self.summary, ORDER)
        waited = time.perf_counter() - self.started - self.seconds
        require(waited <= GRACE_SECONDS, f"finish() came {waited:.0f} s after stop()")
        require(digest_weights(model) == self.weights, WEIGHTS)
        val_bpb = prepare.evaluate_bpb(model, self.tokenizer, batch_size)
        require(digest_weights(model) == self.weights, WEIGHTS)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; on macOS bytes
        memory *= 1 if sys.platform == "darwin" else 2**10
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        self.summary = {
            "val_bpb": f"{val_bpb:.6f}",
            "training_seconds": f"{self.seconds:.1f}",
            "total_seconds": f"{time.perf_counter() - self.launched:.1f}",
            "peak_vram_mb": f"{memory / 2**20:.1f}",
            "mfu_percent": f"{mfu:.2f}",
            "total_tokens_M": f"{tokens / 1e6:.1f}",
            "num_steps": str(steps),
            "num_params_M": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
            "depth": str(depth),
        }


def digest_weights(model: nn.Module) -> str:
    """Return a digest of all bits of a model's parameters and buffers."""
    bits = hashlib.sha256()
    for tensor in (*model.parameters(), *model.buffers()):
        bits.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return bits.hexdigest()


# Run --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def show_status(run: Run) -> Iterator[None]:
    """Show what a run is doing: live on a terminal, elsewhere a line every half minute.

    It also notices when the process stands still.
    """
    done, start, live = threading.Event(), time.perf_counter(), sys.stdout.isatty()
    clear = "\r\033[K" if live else ""

    def show() -> None:
        shown, last, cpu = start, start, time.process_time()
        while not done.wait(0.2):
            last, gap = time.perf_counter(), time.perf_counter() - last
            cpu, used = time.process_time(), time.process_time() - cpu
            if gap > PAUSE and used < gap / 10 and run.started and not run.weights:
                run.paused += gap
            run.watched = last
            if live or last - shown > 30:
                shown, line = last, f"{run.status} ({last - start:.0f} s)"
                width = shutil.get_terminal_size().columns - 1 if live else None
                print(clear + line[:width], end="" if live else "\n", flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print(clear, end="", flush=True)


@contextlib.contextmanager
def ignore_errors() -> Iterator[None]:
    """Continue after an OSError."""
    with contextlib.suppress(OSError):
        yield


def outlive_reader() -> None:
    """Let the run go on when nobody reads its output any more, or its terminal is gone."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  it may be closed
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.write = ignore_errors()(stream.write)
        stream.flush = ignore_errors()(stream.flush)


def find_device() -> tuple[torch.device, str, str]:
    """Return the device, a name that only identical devices share, and what identifies it.

    Raises SystemExit for a GPU that can't be used, as with an old driver: PyTorch only warns.
    """
    device = prepare.get_device()
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as why:
        if os.environ.get("CUDA_VISIBLE_DEVICES") != "" and not re.search(NO_GPU, str(why)):
            advice = "update the driver (580 or newer), or set CUDA_VISIBLE_DEVICES= for the CPU"
            raise SystemExit(f"this GPU can't be used: {why}. {advice}") from None
    if device.type == "cuda":
        return device, torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).uuid
    able = dict(torch.cpu.get_capabilities())  # its name, instructions, caches
    kind = f"{torch.backends.cpu.get_cpu_capability()}, {record.digest(able)[:4]}"
    return device, f"cpu ({able.get('cpu_name')}, {os.cpu_count()} cores, {kind})", "cpu"


def new_record(source: bytes, device: str, seed: int) -> dict:
    """Return the record of a run that begins now. SystemExit if git can't read its repository."""
    if (ROOT / ".git").exists():
        record.git("rev-parse", "--git-dir")  # fails for a folder that git does not trust
    in_head = record.git("show", "HEAD:./train.py", default="")
    is_committed = in_head == source.decode(errors="replace").strip()
    commit = "" if is_committed else record.git("stash", "create", default="")  # on no branch
    return {
        "id": record.new_id(),
        "status": "running",
        "repository": str(ROOT),
        "commit": commit or record.git("rev-parse", "HEAD", default=""),
        "train_sha256": hashlib.sha256(source).hexdigest(),
        "judge": record.digest(prepare.JUDGE_SOURCES),
        "seed": seed,
        "device": device,
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "log": {},  # its row in a ledger
    }


@contextlib.contextmanager
def keep_record(entry: dict, run: Run) -> Iterator[None]:
    """Record how the block ends."""
    device = entry["device"]

    def before_start() -> None:
        entry["device"] = ", ".join([device, *run.fallbacks])
        branch = record.git("branch", "--show-current", default="")
        kept = record.find_kept(record.own_runs(record.read_runs()), branch)
        record.refuse_incomparable(entry, kept)
        record.write_run(entry)  # what fails now would fail after the five minutes

    run.before_start = before_start
    try:
        yield
        if not run.summary or entry["harness"] != prepare.harness_digest(run.corpus):
            raise SystemExit("no val_bpb: run.finish() was not called, or the tokens changed")
        entry |= {name: float(value) for name, value in run.summary.items()}
        entry |= {"lost_percent": run.lost_percent, "shared_gib": run.shared_gib}
        entry["disturbed"] = run.lost_percent > MAX_LOST or run.shared_gib > MAX_SHARED
        entry["status"] = "finished"
    except BaseException as error:
        blameless = isinstance(error, KeyboardInterrupt | UnfitError)
        entry["status"] = "stopped" if blameless else "crash"
        entry["traceback"] = "".join(traceback.format_exception(error)).splitlines()[-20:]
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(f"stopped while {run.status}") from None
        if isinstance(error, SystemExit) and not error.code:
            raise SystemExit("no val_bpb: train.py ended without run.finish()") from None
        raise
    finally:
        entry["device"] = ", ".join([device, *run.fallbacks])
        faulthandler.cancel_dump_traceback_later()
        try:
            record.write_run(entry)
        except OSError as error:  # the summary is still worth having
            print(f"the run's record could not be written: {error}", flush=True)


@contextlib.contextmanager
def training_run(description: str | None) -> Iterator[Run]:
    """Parse the command line, lock the device, prepare the corpus; record and sum up the run.

    The block has RUN_LIMIT seconds until stop(), and as many after it.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    prepare.add_corpus_arguments(parser)
    parser.add_argument("--seed", metavar="N", type=int, default=SEED, help=f"default: {SEED}")
    arguments, source = parser.parse_args(), (ROOT / "train.py").read_bytes()
    outlive_reader()
    os.environ.setdefault("LOGNAME", str(os.getuid()))  # PyTorch wants a name, some users have none
    device, name, device_id = find_device()
    advice = "two runs at once can't be compared; wait for it"
    entry = new_record(source, name, arguments.seed)
    with record.file_lock(Path(DEVICE_LOCK % device_id), advice, wait=False):
        print(f"device: {name}", flush=True)
        corpus = prepare.choose_corpus(arguments.corpus, arguments.shards)
        if corpus.name == "climbmix" and device.type == "cpu":
            raise SystemExit("climbmix takes a CPU hours to evaluate. Use --corpus python")
        prepare.prepare(corpus)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(arguments.seed)
        entry["harness"] = prepare.harness_digest(corpus)
        with record.create_run(entry, source) as file:
            run = Run(corpus, prepare.Tokenizer(corpus), device, arguments.seed, file)
            limit_time(file)
            with keep_record(entry, run), show_status(run):
                yield run
    lines = run.summary | {"harness": entry["harness"], "seed": str(run.seed)}
    lines |= record.describe_value(entry)
    print("---", *(f"{key + ':':<18}{value}" for key, value in lines.items()), sep="\n", flush=True)
