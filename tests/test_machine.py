"""Odd machines: each either works, or says in one line what is wrong before time is spent."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environ, replace
from night import BASELINE, COMMIT, CRASH, KEEP, RESET, RUN, SEEDS, Night

# A real process, unlike those of Night: its streams, signals and user are its own.
PYTHON = [sys.executable, "train.py"]
TEXT = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
TRAINS = """
from harness.run import Run
Run.progress = lambda run, progress=Run.progress: print("here", flush=True) or progress(run)"""


@pytest.fixture
def night(tmp_path, cache):
    """A clone and a cache folder without a run."""
    return Night(tmp_path, cache / "tokens")


def start(night, **options):
    """Start a run as a process of its own."""
    environment = environ(**night.environ)
    return subprocess.Popen(PYTHON, cwd=night.clone, env=environment, **TEXT, **options)


# what a run lost, and what counts


def strict(night):
    """Let the clock decide as it is shipped."""
    replace(night.clone / "harness/run.py", "MAX_LOST = 1e9", "MAX_LOST = 5")


def test_a_run_that_shares_its_core_is_disturbed_and_says_by_how_much(night):
    strict(night)
    core = min(os.sched_getaffinity(0))
    pin = {"preexec_fn": lambda: os.sched_setaffinity(0, [core])}
    with subprocess.Popen([sys.executable, "-c", "while True: pass"], **pin) as other:
        text, _ = start(night, **pin).communicate()
        other.kill()
    (run,) = night.runs()
    assert run["disturbed"]
    assert run["lost_percent"] > 5
    assert (
        f"disturbed:        other work took {run['lost_percent']} % of its time, 0.0 GiB of its GPU"
        in text
    )


@pytest.mark.parametrize("grace", [4, 60])
def test_a_run_that_stood_still_is_disturbed_or_ends_without_blame(night, grace):
    strict(night)
    replace(night.clone / "prepare.py", "TIME_BUDGET = 0.2", "TIME_BUDGET = 1")
    replace(night.clone / "harness/run.py", "GRACE_SECONDS = 15", f"GRACE_SECONDS = {grace}")
    night.edit(TRAINS)
    process = start(night)
    while "here" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGSTOP)
    time.sleep(7)
    process.send_signal(signal.SIGCONT)
    text, _ = process.communicate()
    (run,) = night.runs()
    if grace == 4:
        assert run["status"] == "stopped"
        assert "for the process stood still: run it again" in text
    else:
        assert run["status"] == "finished"
        assert run["disturbed"]


# fallbacks


FALLS_BACK = """
from harness.run import Run
Run.start = lambda run, model, start=Run.start: run.fallbacks.update(slow="no g++") or start(
    run, model
)"""


def test_a_fallback_is_said_last_before_the_five_minutes_and_is_part_of_the_device(night):
    night.edit(FALLS_BACK)
    text = night.must(RUN)
    assert "FALLBACK, which makes this run slower: slow (no g++)\n---\n" in text
    (run,) = night.runs()
    assert run["device"].endswith(", slow")


def test_a_run_that_falls_back_is_refused_beside_one_that_does_not(night):
    night.must(RUN, SEEDS[0], BASELINE)
    night.edit(FALLS_BACK + "\nRun.progress = None")  # does not come so far
    night.must(COMMIT)
    status, text = night.do(RUN)
    assert status == 1
    assert re.search(r"does not compare with what was kept \(.*, slow, kept: .*\): take the", text)
    assert night.statuses()[-1] == ("stopped", 42)
    night.must(RESET)
    night.refused(CRASH, "has no val_bpb .*stop and report it")  # it is not the idea's fault
    night.edit()
    night.must(COMMIT, RUN, KEEP)
    night.verify()


# output that nobody reads, a parent that is gone


def test_a_run_goes_on_when_nobody_reads_its_output(night):
    night.edit(TRAINS)
    process = start(night)
    process.stdout.readline()  # device: …
    process.stdout.close()
    assert process.wait() == 0
    assert night.statuses() == [("finished", 42)]


def test_a_run_needs_no_output_at_all(night):
    command = "exec " + " ".join([sys.executable, "train.py", ">&-", "2>&-"])
    subprocess.run(command, shell=True, cwd=night.clone, env=environ(**night.environ), check=True)
    assert night.statuses() == [("finished", 42)]


def test_a_run_goes_on_when_its_terminal_is_gone(night):
    replace(night.clone / "prepare.py", "TIME_BUDGET = 0.2", "TIME_BUDGET = 2")
    night.edit(TRAINS)
    process = start(night)
    while "here" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGHUP)
    process.communicate()
    assert night.statuses() == [("finished", 42)]


# users, git


def test_a_user_without_a_name_and_a_home_can_train(night):
    stranger = ["unshare", "--user", "--map-user=12345"]
    if subprocess.run([*stranger, "true"]).returncode:
        pytest.skip("this machine has no user namespaces")
    environment = night.environ | {"PATH": os.environ["PATH"], "HOME": "/nowhere"}
    result = subprocess.run([*stranger, *PYTHON], cwd=night.clone, env=environment, **TEXT)
    assert result.returncode == 0, result.stdout
    assert night.statuses() == [("finished", 42)]


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a folder away")
def test_a_repository_that_git_does_not_trust_is_refused_before_anything(night):
    os.chown(night.clone, 12345, 12345)
    os.chown(night.clone / ".git", 12345, 12345)
    status, text = night.do(RUN)
    assert status == 1
    assert "dubious ownership" in text
    assert "safe.directory" in text
    assert not (night.cache / "runs").exists()


# the compiler and the GPU

COMPILES = """
import os, signal, sys, torch, train
torch.cpu._is_avx512_bf16_supported = lambda: True  # any CPU can compile
for _ in train.choose_precision(torch.device("cpu")):
    print(_)
sys.stdout.flush()
if "kill" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def compile_in(folder, *arguments, **environment):
    """Compile in a process of its own; return its exit status and what it printed."""
    command = [sys.executable, "-c", COMPILES, *arguments]
    environment = environ(TMPDIR=folder, **environment)
    result = subprocess.run(command, cwd=ROOT, env=environment, **TEXT)
    return result.returncode, result.stdout


@pytest.mark.slow
def test_what_a_killed_compiler_leaves_is_thrown_away(tmp_path):
    status, text = compile_in(tmp_path, "kill")
    assert (status, text.splitlines()[-2:]) == (-signal.SIGKILL, ["True", ""])
    libraries = list(tmp_path.rglob("*.so"))
    assert libraries
    for library in libraries:
        os.truncate(library, 4096)
    for _ in range(2):
        status, text = compile_in(tmp_path)
        assert (status, text.splitlines()[-2:]) == (0, ["True", ""])
        stamps = {library: library.stat().st_mtime for library in libraries}
    assert stamps == {library: library.stat().st_mtime for library in libraries}  # kept


@pytest.mark.slow
def test_a_checkout_below_a_path_with_a_space_compiles(tmp_path):
    (tmp_path / "a b").mkdir()
    packages = tmp_path / "a b" / "site-packages"
    packages.symlink_to(Path(torch.__file__).parent.parent)
    status, text = compile_in(tmp_path, PYTHONPATH=packages)
    assert (status, text.splitlines()[-2:]) == (0, ["True", ""])


def test_a_machine_without_a_compiler_says_so(tmp_path):
    status, text = compile_in(tmp_path, PATH="/nowhere")
    assert status == 0
    assert "torch.compile does not work: InductorError: InvalidCxxCompiler: No working C++" in text


OLD_DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs gcc")
def test_a_gpu_whose_driver_is_too_old_ends_a_command_with_what_to_do(night):
    (night.path / "driver.c").write_text(OLD_DRIVER)
    library = [night.path / "libcuda.so.1", night.path / "driver.c"]
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", *library], check=True)
    environment = environ(**night.environ, LD_LIBRARY_PATH=night.path)
    del environment["CUDA_VISIBLE_DEVICES"]
    result = subprocess.run(PYTHON, cwd=night.clone, env=environment, **TEXT)
    assert result.returncode == 1
    assert "driver on your system is too old (found version 12040)" in result.stdout
    assert "or set CUDA_VISIBLE_DEVICES= for the CPU" in result.stdout
    environment["CUDA_VISIBLE_DEVICES"] = ""
    assert subprocess.run(PYTHON, cwd=night.clone, env=environment, **TEXT).returncode == 0
    assert night.statuses() == [("finished", 42)]
