"""A preparation that is killed, interrupted, doubled or damaged: the next one goes on, and ends as if nothing had been.

KILLS=20 uv run pytest tests/test_resume.py      20 random moments in each phase instead of 3
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sympy
from conftest import ROOT, environ
from hub import Hub

import prepare

KILLS = int(os.environ.get("KILLS", "3"))
BLOCK = 2**16  # bytes that may come twice for each kill
VAL, FIRST, SECOND = f"shard_{prepare.CLIMBMIX_TRAIN_SHARDS:05d}.parquet", "shard_00000.parquet", "shard_00001.parquet"

# Imports prepare once and runs no thread of its own: it is safe to fork, unlike a process that has prepared something.
# For each line of JSON a child prepares, tells what it begins and ends, and stays a zombie until the next line.
NURSERY = """
import functools, json, os, signal, socket, sys, traceback
import prepare, urllib3

wire = os.dup(1)
urllib3.connection.HTTPConnection.default_socket_options += [(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)]

def tell(*words):
    os.write(wire, (" ".join(map(str, words)) + "\\n").encode())

def ensure(corpus, name, make, ensure=prepare.ensure):
    if name == job["stop_before"]:
        os._exit(0)
    tell("begin", name)
    entry = ensure(corpus, name, make)
    tell("end", name)
    return entry

def mortal(function):
    @functools.wraps(function)
    def call(*arguments, **options):
        job["die"] -= 0.5
        if job["die"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        job["die"] -= 0.5
        if job["die"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

for line in sys.stdin:
    job = json.loads(line)
    if pid := os.fork():
        sys.stdin.readline()
        tell("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        continue
    signal.alarm(120)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    tell("pid", os.getpid())
    os.environ |= job["environ"]
    prepare.ensure, prepare.PIECE = ensure, job["piece"]
    prepare.SOURCE_SHA256 = job["source"] or prepare.SOURCE_SHA256
    os.replace, os.unlink = mortal(os.replace), mortal(os.unlink)
    try:
        prepare.prepare(prepare.choose_corpus(*job["choice"])[0])
    except SystemExit as problem:
        print(problem, flush=True)
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(2)
    os._exit(0)
"""


class Child:
    """A preparation in a process of its own."""

    def __init__(self, nursery, job):
        self.nursery, self.log = nursery, Path(job["log"])
        self.began, self.ended, self.status = {}, {}, None  # when, by the name of the file
        nursery.stdin.write(json.dumps(job) + "\n")
        nursery.stdin.flush()
        self.pid = int(self.read()[1])

    def read(self):
        what, name = self.nursery.stdout.readline().split()
        if what in ("begin", "end"):
            {"begin": self.began, "end": self.ended}[what][name] = time.perf_counter()
        return what, name

    def until_it_begins(self, name):
        while name not in self.began:
            self.read()

    def finish(self):
        """Wait for its end; returns the exit status, negative for a signal."""
        self.nursery.stdin.write("\n")
        self.nursery.stdin.flush()
        while True:
            what, status = self.read()
            if what == "ended":
                return int(status)


@dataclass(eq=False)
class Scene:
    """A corpus, its cache as an undisturbed preparation leaves it, and as it is at the beginning of each phase."""

    nursery: subprocess.Popen
    path: Path
    choice: tuple
    piece: float
    hub: Hub | None = None
    whole: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)  # in the order in which they are made

    def start(self, cache, stop_before=None, die=0, source=None):
        variables = {"AUTORESEARCH_CACHE": str(cache), "HF_ENDPOINT": self.hub.endpoint if self.hub else ""}
        job = {"choice": self.choice, "piece": self.piece, "log": str(self.path / "log"), "environ": variables}
        self.path.joinpath("log").unlink(missing_ok=True)
        return Child(self.nursery, job | {"stop_before": stop_before, "die": die, "source": source})

    def run(self, cache, **how):
        child = self.start(cache, **how)
        child.status = child.finish()
        return child

    def finish(self, cache):
        """The next preparation: it works, ends as an undisturbed one, and does nothing that was done before."""
        done = identities(cache)
        child = self.run(cache)
        assert child.status == 0, child.log.read_text()
        assert digests(cache) == self.whole
        now = identities(cache)
        assert {name: now[name] for name in done} == done
        assert list(child.began) == [name for name in self.names if name not in done]
        return child

    def begin(self):
        """Prepare undisturbed."""
        child = self.run(self.path / "whole")
        assert child.status == 0, child.log.read_text()
        self.whole, self.names = digests(self.path / "whole"), list(child.began)
        return self

    @functools.cache  # noqa: B019  a scene lives as long as the module
    def phase(self, name):
        """The cache before a phase, the files that are made in it, and how long it takes."""
        files = [file for file in self.names if file.startswith(name)]
        before = self.path / f"before {name}"
        before.mkdir(exist_ok=True)
        assert self.run(before, stop_before=files[0]).status == 0
        child = self.run(shutil.copytree(before, self.path / f"measured {name}"))
        seconds = child.ended[files[-1]] - child.began[files[0]]
        print(f"{seconds:.3f} s")
        return before, files, seconds


def entries(cache):
    return [path for path in cache.glob("*/*") if path.name != "lock"]


def digests(cache):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in entries(cache)}


def identities(cache):
    """What changes if a finished file is made again. The manifest grows with each, and a .part is none."""
    kept = [path for path in entries(cache) if not path.name.startswith("manifest") and path.suffix != ".part"]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept}


@pytest.fixture(scope="module")
def nursery():
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        cwd=ROOT,
        env=environ(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        yield process
        process.stdin.close()


@contextlib.contextmanager
def slow_hub(path, texts, sizes):
    """A hub of shards of real text that sends a MB in 70 ms or so, and has little under way when a client dies."""
    files = {}
    for name, size in sizes.items():
        pq.write_table(pa.table({"text": [next(texts) for _ in range(size)]}), path / name, compression="none")
        files[name] = (path / name).read_bytes()
    with Hub(files) as hub:
        for server in hub.servers:
            server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**12)
        hub.fail(times=10**9, pace=0.001)
        yield hub


def both_scenes(nursery, path, hub, piece):
    """A climbmix of the hub's two training shards, and the folder `text`, whose token files hold `piece` bytes each."""
    return {
        "climbmix": Scene(nursery, path / "climbmix", ("climbmix", 2), prepare.PIECE, hub),
        "folder": Scene(nursery, path / "folder", (str(path / "text"),), piece),
    }


def begun(scene):
    """The scene, prepared undisturbed once."""
    if not scene.whole:
        scene.path.mkdir()
        scene.begin()
    return scene


@pytest.fixture(scope="module")
def scenes(nursery, folder, tmp_path_factory):
    """Corpora of which every phase takes at least 50 ms."""
    path = tmp_path_factory.mktemp("resume")
    shutil.copytree(folder, path / "text", ignore=shutil.ignore_patterns("__pycache__"))
    local, _ = prepare.choose_corpus(str(path / "text"))
    more = sorted(Path(sympy.__file__).parent.rglob("*.py"), key=lambda file: file.stat().st_size)
    for source, file in zip(prepare.find_sources(local)[24::25], more[-100:], strict=False):  # what is held out
        shutil.copy(file, source.path)
    texts = itertools.cycle(file.read_text() for file in sorted(folder.rglob("*.py")))
    with slow_hub(path, texts, {VAL: 150, FIRST: 200, SECOND: 200}) as hub:
        yield both_scenes(nursery, path, hub, 2**19)


@pytest.fixture(scope="module")
def scene(request, scenes):
    return begun(scenes[request.param])


PHASES = [
    ("climbmix", "shard"),
    *itertools.product(("climbmix", "folder"), ("tokenizer.json", "val_rows.bin", "train")),
]


@pytest.mark.parametrize(("scene", "phase"), PHASES, indirect=["scene"])
def test_killed_at_any_moment_the_next_preparation_ends_the_same_and_repeats_nothing(scene, phase, tmp_path):
    """Proved for KILLS random moments of each phase, all of them between its first file's begin and its last one's end:

    the next preparation succeeds; every file but `lock` is byte for byte that of an undisturbed one, the manifest too,
    and none is left over; files that were finished keep inode and time, and no work on them is begun; each shard is
    gone on with at the byte where its .part ended, and at most 64 KiB of it are sent twice.
    """
    before, files, seconds = scene.phase(phase)
    rng, kills, hub = random.Random(phase), 0, scene.hub
    for attempt in range(10 * KILLS):
        cache = shutil.copytree(before, tmp_path / str(attempt))
        if hub:
            hub.requests.clear()
        child = scene.start(cache)
        child.until_it_begins(files[0])
        time.sleep(rng.uniform(0, seconds))
        os.kill(child.pid, signal.SIGKILL)
        status = child.finish()
        assert status in (0, -signal.SIGKILL)
        if files[-1] not in child.ended:
            kills += 1
            parts = {part.stem: part.stat().st_size for part in cache.glob("*/*.parquet.part")}
            asked = hub and len(hub.asked("cdn"))
            scene.finish(cache)
            if phase == "shard":
                first = {request.name: request for request in reversed(hub.asked("cdn")[asked:])}
                for name, size in parts.items():
                    if 0 < size < len(hub.files[name]):
                        assert first[name].range == f"bytes={size}-"
                assert all(hub.sent(name) <= len(data) + BLOCK for name, data in hub.files.items())
                assert sum(map(hub.sent, hub.files)) <= sum(map(len, hub.files.values())) + BLOCK
            elif hub:
                assert not hub.requests
        shutil.rmtree(cache)
        if kills == KILLS:
            break
    assert kills == KILLS


@pytest.mark.parametrize(("scene", "phase"), PHASES, indirect=["scene"])
def test_interrupted_in_any_phase_it_says_so_and_goes_on_the_next_time(scene, phase, tmp_path):
    before, files, seconds = scene.phase(phase)
    for attempt in range(10):
        cache = shutil.copytree(before, tmp_path / str(attempt))
        child = scene.start(cache)
        child.until_it_begins(files[0])
        time.sleep(seconds / 3)
        os.kill(child.pid, signal.SIGINT)
        if (status := child.finish()) != 0:
            break
    assert status == 1
    said = child.log.read_text()
    assert len(re.findall(r"^stopped\. What is finished is kept, and `uv run .*` goes on from there$", said, re.M)) == 1
    assert "Traceback" not in said
    scene.finish(cache)


# Between two steps ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_scenes(nursery, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("steps")
    shutil.copytree(folder / "algorithms" / "tests", path / "text", ignore=shutil.ignore_patterns("__pycache__"))
    texts = itertools.cycle(file.read_text() for file in sorted((path / "text").glob("*.py")))
    with slow_hub(path, texts, {VAL: 10, FIRST: 10, SECOND: 10}) as hub:
        yield both_scenes(nursery, path, hub, 2**18)


@pytest.fixture(scope="module")
def small_scene(request, small_scenes):
    return begun(small_scenes[request.param])


def entered_parts(cache):
    """The .part files that are whole by the manifest, and so have only to be renamed."""
    (directory,) = cache.iterdir()
    manifest = prepare.read_manifest(directory)["files"]
    parts = [part for part in directory.glob("*.part") if prepare.is_whole(part, manifest.get(part.stem))]
    return {part.stem: (part.stat().st_ino, part.stat().st_mtime_ns) for part in parts}


def steps():
    """Before the first renaming or deletion, after it, before the second, …"""
    return itertools.count(0.5, 0.5)


@pytest.mark.parametrize("small_scene", ["climbmix", "folder"], indirect=True)
def test_killed_before_or_after_any_renaming_the_next_preparation_ends_the_same(small_scene, tmp_path):
    """Every state between two renamings of a whole preparation, so also that between manifest and file."""
    waiting = 0
    for step in steps():
        cache = tmp_path / str(step)
        child = small_scene.run(cache, die=step)
        if child.status == 0:
            break
        assert child.status == -signal.SIGKILL
        entered = entered_parts(cache)
        waiting += len(entered)
        small_scene.finish(cache)
        now = identities(cache)
        assert {name: now[name] for name in entered} == entered
    assert step / 0.5 - 1 == 2 * (2 * len(small_scene.names) + 1)  # each file's and its manifest's, and the first one's
    assert waiting >= len(small_scene.names)


@pytest.mark.parametrize("small_scene", ["climbmix", "folder"], indirect=True)
def test_killed_at_any_step_of_making_all_again_the_next_preparation_ends_the_same(small_scene, tmp_path):
    """After another prepare.py: shards stay, whatever happens, and the hub is not even asked."""
    small_scene.run(tmp_path / "before", source="another")
    assert digests(tmp_path / "before") != small_scene.whole
    if hub := small_scene.hub:
        hub.requests.clear()
    for step in steps():
        cache = shutil.copytree(tmp_path / "before", tmp_path / str(step))
        shards = {name: where for name, where in identities(cache).items() if name.endswith(".parquet")}
        status = small_scene.run(cache, die=step).status
        child = small_scene.run(cache)
        assert child.status == 0, child.log.read_text()
        assert digests(cache) == small_scene.whole
        now = identities(cache)
        assert {name: now[name] for name in shards} == shards
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert not hub or not hub.requests


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(scenes):
    """Start the command on the folder, with the cache given."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell: a child would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(cache):
        return subprocess.Popen(
            [sys.executable, "prepare.py", "--corpus", scenes["folder"].choice[0]],
            cwd=ROOT,
            env=environ(AUTORESEARCH_CACHE=cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def undisturbed(nursery, scenes, tmp_path_factory):
    """The cache that it leaves, as digests."""
    path = tmp_path_factory.mktemp("undisturbed")
    return Scene(nursery, path, scenes["folder"].choice, prepare.PIECE).begin().whole


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGKILL, -signal.SIGKILL, r"\A\Z"),
        (signal.SIGINT, 1, r"\Astopped\. What is finished is kept, and `uv run prepare.py .*` goes on from there\n\Z"),
    ],
    ids=["SIGKILL", "SIGINT"],
)
def test_a_command_that_is_ended_by_a_signal_goes_on_the_next_time(
    started, undisturbed, tmp_path, number, status, message
):
    with started(tmp_path) as process:
        for line in process.stdout:
            if line.startswith("tokenizer.json"):
                break
        process.send_signal(number)
        assert re.search(message, process.communicate()[0])
    assert process.returncode == status
    before = identities(tmp_path)
    assert list(before) == ["tokenizer.json"]
    with started(tmp_path) as process:
        output = process.communicate()[0]
    assert process.returncode == 0
    assert "tokenizer.json" not in output
    assert digests(tmp_path) == undisturbed
    assert identities(tmp_path)["tokenizer.json"] == before["tokenizer.json"]


def test_of_commands_at_once_one_works_the_others_say_that_they_wait_and_can_be_stopped(started, undisturbed, tmp_path):
    with started(tmp_path) as first:
        for line in first.stdout:
            if line.startswith("tokenizer.json"):
                break
        first.send_signal(signal.SIGSTOP)  # so that the others come in time
        with started(tmp_path) as second, started(tmp_path) as third:
            for process in (second, third):
                corpus, held = process.stdout.readline(), process.stdout.readline()
                assert corpus.startswith("corpus: ")
                assert held == f"{next(tmp_path.iterdir())}/lock is held by process {first.pid}: waiting for it\n"
            third.send_signal(signal.SIGINT)
            stopped = third.communicate()[0]
            assert list(identities(tmp_path)) == ["tokenizer.json"]
            first.send_signal(signal.SIGCONT)
            worked, waited = first.communicate()[0], second.communicate()[0]
    assert [first.returncode, second.returncode, third.returncode] == [0, 0, 1]
    assert re.fullmatch(r"stopped\. What is finished is kept, and `.*` goes on from there\n", stopped)
    assert "train_00000.tokens: " in worked
    assert ".tokens: " not in waited
    assert worked.splitlines()[-2:] == waited.splitlines()[-2:]  # ready, harness
    assert digests(tmp_path) == undisturbed


# A cache that was damaged ---------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(request, small_scenes, tmp_path, monkeypatch):
    """A small corpus, prepared in a cache of its own, and the command that mends it."""
    kind = small_scenes[request.param]
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", kind.hub.endpoint if kind.hub else "")
    monkeypatch.setattr(prepare, "PIECE", kind.piece)
    if not kind.hub:
        copy = shutil.copytree(kind.choice[0], tmp_path / "text")
    corpus, _ = prepare.choose_corpus(*(kind.choice if kind.hub else (str(copy),)))
    prepare.prepare(corpus)
    prepare.check(corpus)
    return corpus


@pytest.mark.parametrize("prepared", ["climbmix", "folder"], indirect=True)
def test_every_single_flipped_bit_of_the_manifest_is_found(prepared):
    path = prepared.directory / prepare.MANIFEST
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(SystemExit, match=r"manifest\.json is damaged .*Delete it, then `uv run prepare.py"):
            prepare.check(prepared)


@pytest.mark.parametrize("prepared", ["climbmix", "folder"], indirect=True)
def test_a_flipped_bit_anywhere_in_any_file_is_found(prepared):
    rng, names = random.Random(1), list(prepare.read_manifest(prepared.directory)["files"])
    assert len(names) >= 4
    for name in names:
        path = prepared.directory / name
        whole = path.read_bytes()
        for at in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(8))}:
            flipped = bytearray(whole)
            flipped[at] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(SystemExit) as problem:
                prepare.check(prepared)
            assert str(problem.value) == f"{path} is damaged. `{prepared.command}` mends it"
        path.write_bytes(whole)
    prepare.check(prepared)


@pytest.mark.parametrize("prepared", ["climbmix", "folder"], indirect=True)
def test_missing_files_are_all_named(prepared):
    paths = [prepared.directory / name for name in prepare.read_manifest(prepared.directory)["files"]]
    for path in paths:
        path.rename(path.with_suffix(".away"))
        with pytest.raises(SystemExit) as problem:
            prepare.check(prepared)
        assert str(problem.value) == f"{path} is missing. `{prepared.command}` mends it"
        path.with_suffix(".away").rename(path)
    for path in paths:
        path.unlink()
    with pytest.raises(SystemExit) as problem:
        prepare.check(prepared)
    lines = [f"{path} is missing. `{prepared.command}` mends it" for path in paths]
    assert sorted(str(problem.value).splitlines()) == sorted(lines)


@pytest.mark.parametrize("prepared", ["climbmix", "folder"], indirect=True)
def test_a_cache_of_another_prepare_is_told_and_made_again(prepared, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "SOURCE_SHA256", "0" * 64)
    with pytest.raises(SystemExit) as problem:
        prepare.check(prepared)
    assert str(problem.value) == f"{prepared.directory} is of another prepare.py. `{prepared.command}` makes it again"
    prepare.prepare(prepared)
    assert "was made by another prepare.py or from other text: making it again" in capsys.readouterr().out
    prepare.check(prepared)


@pytest.mark.parametrize("prepared", ["folder"], indirect=True)
@pytest.mark.parametrize("change", ["touched", "added", "removed", "renamed"])
def test_a_cache_of_other_text_is_told_and_made_again(prepared, change):
    file = next(Path(prepared.folder).glob("*.py"))
    if change == "touched":
        file.touch()
    elif change == "added":
        file.with_name("more.txt").write_text("more")
    elif change == "removed":
        file.unlink()
    else:
        file.rename(file.with_name("another name.py"))
    with pytest.raises(SystemExit) as problem:
        prepare.check(prepared)
    assert str(problem.value) == f"{prepared.directory} is of another text. `{prepared.command}` makes it again"
    prepare.prepare(prepared)
    prepare.check(prepared)
