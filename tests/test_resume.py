"""A preparation that is killed, stopped or doubled: the next one ends as if nothing had been."""

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import urllib3
from conftest import ROOT, environ
from hub import Hub

import prepare

BLOCK = 2**17  # bytes of a shard that may come twice for each kill
VAL, FIRST, SECOND = "shard_06542.parquet", "shard_00000.parquet", "shard_00001.parquet"

# Its children are forks of a process that has imported this module, but never prepared anything.
context = multiprocessing.get_context("forkserver")


def work(choice, log, variables, at, number):
    """Prepare a corpus; get a signal before (at=0.5) or after (at=1) the first renaming, …"""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.dump_traceback_later(60, exit=True, file=2)  # rather than hang
    os.environ.update(variables)
    little = (socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)  # of a shard is under way at any moment
    urllib3.connection.HTTPConnection.default_socket_options.append(little)
    step, rename = itertools.count(0.5, 0.5), os.replace

    def replace(*paths):
        if next(step) == at:
            os.kill(os.getpid(), number)
        rename(*paths)
        if next(step) == at:
            os.kill(os.getpid(), number)

    os.replace = replace
    prepare.prepare(prepare.choose_corpus(*choice))


@dataclass
class Scene:
    """A corpus, and its files and their seconds as an undisturbed preparation leaves them."""

    path: Path
    choice: tuple
    hub: Hub | None = None
    whole: dict[str, bytes] | None = None
    seconds: float = 0.0
    started: list = field(default_factory=list)

    def start(self, cache, at=0.0, number=signal.SIGKILL):
        variables = {"AUTORESEARCH_CACHE": str(cache)}
        if self.hub:
            variables["HF_ENDPOINT"] = self.hub.endpoint
        log = cache.with_suffix(f".{len(self.started)}.log")
        arguments = (self.choice, log, variables, at, number)
        process = context.Process(target=work, args=arguments)
        process.log = log
        process.start()
        self.started.append(process)
        return process

    def finish(self, cache):
        """The next preparation: it ends as an undisturbed one, and repeats nothing."""
        done = identities(cache)
        process = self.start(cache)
        assert run(process) == 0, process.log.read_text()
        assert content(cache) == self.whole
        now = identities(cache)
        assert {name: now[name] for name in done} == done


def run(process):
    process.join()
    return process.exitcode


def wait_for(process, line):
    """Wait until a process has printed a line that begins so."""
    while not (process.log.exists() and re.search(f"^{line}", process.log.read_text(), re.M)):
        assert process.is_alive(), process.log.read_text()
        time.sleep(0.005)


def files(cache):
    return [path for path in cache.glob("*/**/*") if path.is_file() and path.suffix != ".lock"]


def content(cache):
    return {str(path.relative_to(cache)): path.read_bytes() for path in files(cache)}


def identities(cache):
    """What changes if a finished file is made again."""
    kept = [path for path in files(cache) if path.suffix != ".part"]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept}


@pytest.fixture(scope="module")
def scenes(folder, tmp_path_factory):
    """A folder of text, and two shards of a hub that sends a MB in 70 ms or so."""
    path = tmp_path_factory.mktemp("resume")
    (path / "text").mkdir()
    for file in sorted((folder / "algorithms" / "tests").glob("*.py"))[:40]:
        shutil.copy(file, path / "text")
    places = sorted((folder / "algorithms").rglob("*.py"))
    texts = (text for place in places if (text := place.read_text()))
    shards = {}
    for name in (FIRST, SECOND, VAL):
        table = pa.table({"text": list(itertools.islice(texts, 75))})
        pq.write_table(table, path / name, compression="none")
        shards[name] = (path / name).read_bytes()
    with pytest.MonkeyPatch.context() as patch, Hub(shards) as hub:
        patch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")  # of the first process
        context.set_forkserver_preload(["test_resume"])
        for server in hub.servers:
            server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**12)
        hub.fail(times=float("inf"), pace=0.001)
        yield {
            "climbmix": Scene(path / "climbmix", ("climbmix", 2), hub),
            "folder": Scene(path / "folder", (str(path / "text"),)),
        }


def prepared(scene):
    """A scene that was prepared undisturbed once."""
    if scene.whole is None:
        assert run(scene.start(scene.path / "warm-up")) == 0
        begin = time.perf_counter()
        assert run(scene.start(scene.path / "whole")) == 0
        scene.seconds = time.perf_counter() - begin
        scene.whole = content(scene.path / "whole")
    return scene


@pytest.fixture
def scene(request, scenes):
    scenes[request.param].path.mkdir(exist_ok=True)
    yield prepared(scenes[request.param])
    for process in scenes[request.param].started:
        process.kill()  # if the test failed
    scenes[request.param].started.clear()


# Killed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", ["climbmix", "folder"], indirect=True)
def test_killed_at_any_moment_the_next_preparation_ends_the_same(scene, tmp_path, thorough):
    """Finished files keep inode and time; a shard resumes at the byte where its .part ended."""
    for kill in range(30 if thorough else 4):
        cache = tmp_path / str(kill)
        if scene.hub:
            scene.hub.requests.clear()
        process = scene.start(cache)
        time.sleep(random.Random(kill).uniform(0, scene.seconds) if kill else scene.seconds / 2)
        process.kill()
        assert run(process) in (0, -signal.SIGKILL)
        parts = {part.stem: part.stat().st_size for part in cache.glob("climbmix/*.part")}
        asked = len(scene.hub.requests) if scene.hub else 0
        scene.finish(cache)
        for name, size in parts.items():
            again = [request for request in scene.hub.requests[asked:] if request.name == name]
            assert {request.range for request in again} == {f"bytes={size}-"}
        if scene.hub:
            assert all(scene.hub.sent(n) <= len(d) + BLOCK for n, d in scene.hub.files.items())
        shutil.rmtree(cache, ignore_errors=True)


@pytest.mark.parametrize(
    "scene", ["folder", pytest.param("climbmix", marks=pytest.mark.slow)], indirect=True
)
def test_killed_before_or_after_any_renaming_the_next_preparation_ends_the_same(scene, tmp_path):
    for at in itertools.count(0.5, 0.5):
        cache = tmp_path / str(int(2 * at))
        if run(scene.start(cache, at)) == 0:
            break
        scene.finish(cache)
    assert at / 0.5 - 1 == 2 * len(scene.whole)  # each file is renamed once, the manifest too


@pytest.mark.parametrize("scene", ["folder"], indirect=True)
def test_a_file_that_was_half_written_is_never_taken_for_whole(scene, tmp_path):
    cache = tmp_path / "cache"
    assert run(scene.start(cache, at=2.5)) == -signal.SIGKILL
    (part,) = (path for path in files(cache) if path.suffix == ".part")
    part.write_bytes(part.read_bytes()[:1000])
    scene.finish(cache)


# Stopped ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["making tokenizer", "making val_rows", "making train"])
@pytest.mark.parametrize("scene", ["climbmix", "folder"], indirect=True)
def test_stopped_in_any_phase_it_says_so_and_resumes_the_next_time(scene, tmp_path, phase):
    for attempt in itertools.count():
        cache = tmp_path / str(attempt)
        process = scene.start(cache)
        with contextlib.suppress(AssertionError):  # it was faster than this test
            wait_for(process, phase)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)
        if run(process) != 0:
            break
    said = process.log.read_text()
    assert process.exitcode == 1
    assert said.splitlines()[-1].startswith("stopped. `uv run prepare.py --corpus")
    assert "Traceback" not in said
    scene.finish(cache)


@pytest.mark.parametrize("scene", ["folder"], indirect=True)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_the_command_that_a_signal_ends_resumes_the_next_time(scene, tmp_path, number):
    returncode = 0
    while returncode == 0:  # it was faster than this test
        cache = Path(tempfile.mkdtemp(dir=tmp_path))
        with subprocess.Popen(
            [sys.executable, "prepare.py", "--corpus", scene.choice[0]],
            cwd=ROOT,
            env=environ(AUTORESEARCH_CACHE=cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process:
            for line in process.stdout:
                if line.startswith("making val_rows.bin"):
                    break
            process.send_signal(number)
            rest, returncode = process.communicate()[0], process.returncode
    is_stopped = number == signal.SIGINT
    assert returncode == (1 if is_stopped else -signal.SIGKILL)
    assert is_stopped == ("stopped. `uv run prepare.py --corpus" in rest)
    assert "Traceback" not in rest
    assert "tokenizer.json" in identities(cache)
    scene.finish(cache)


# Doubled ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", ["folder"], indirect=True)
def test_of_commands_at_once_one_works_and_the_others_wait_and_can_be_stopped(scene, tmp_path):
    cache = tmp_path / "cache"
    first = scene.start(cache, 0.5, signal.SIGSTOP)  # so that the others come in time
    wait_for(first, "making tokenizer")
    others = [scene.start(cache) for _ in range(2)]
    for process in others:
        wait_for(process, f"{cache}/prepare.lock is held by process {first.pid}: waiting")
    os.kill(others[1].pid, signal.SIGINT)
    assert run(others[1]) == 1
    while first.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(first.pid, signal.SIGCONT)
        time.sleep(0.01)
    assert [run(first), run(others[0])] == [0, 0]
    said = [process.log.read_text() for process in (first, *others)]
    assert [text.count("making") for text in said] == [3, 0, 0]
    assert [text.count("stopped.") for text in said] == [0, 0, 1]
    assert content(cache) == scene.whole
