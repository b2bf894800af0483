"""One small real corpus, prepared once for all tests, and clones in which a run takes a second."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import networkx
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for name in ("AUTORESEARCH_CORPUS", "HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(name, None)

import prepare  # noqa: E402  found through the lines above

# The tests use a CPU's settings, also on a machine with a GPU; those marked gpu name their device.
prepare.get_device = lambda: torch.device("cpu")
torch.set_num_threads(
    1
)  # small tensors: threads that wait for each other cost more than they bring

SHIPPED = ("prepare.py", "program.md", ".gitignore", ".python-version", "pyproject.toml", "uv.lock")
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too, as CI does")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="slow: --all runs it"))


@pytest.fixture
def thorough(request):
    """Whether the slow tests run, too: then some tests try more."""
    return request.config.getoption("--all")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The cache folder of this test session, instead of the user's."""
    os.environ["AUTORESEARCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))  # of the compilers that tests start
    return prepare.cache_root()


@pytest.fixture(scope="session")
def folder():
    """6 MB of real text: the source of an installed package."""
    return Path(networkx.__file__).parent


@pytest.fixture(scope="session")
def corpus(cache, folder):
    corpus = prepare.choose_corpus(str(folder))
    prepare.prepare(corpus)
    return corpus


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return prepare.Tokenizer(corpus)


def environ(**more):
    """Environment of a command: no GPU, and the cache folder of this session."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": ""} | {key: str(more[key]) for key in more}


@pytest.fixture
def command():
    """Run a command as a user would and return its result, output and errors together."""

    def run(*arguments, cwd=ROOT, timeout=300, **environment):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env=environ(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    return run


def git(clone, *arguments):
    command = ["git", "-C", str(clone), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def replace(path, before, after):
    """Replace a text that a file has once."""
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, after))


def make_clone(path, train="tests/tiny_train.py", seconds=0.5, limit=60):
    """What a user has after git clone; a run trains for `seconds`, and has locks of its own."""
    path.mkdir(parents=True)
    shutil.copytree(
        ROOT / "harness", path / "harness", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in SHIPPED:
        shutil.copy(ROOT / name, path)
    shutil.copy(ROOT / train, path / "train.py")
    (path / "results.tsv").write_text(f"{HEADER}\n")
    replace(path / "prepare.py", "TIME_BUDGET = 300", f"TIME_BUDGET = {seconds}")
    replace(path / "harness/run.py", "RUN_LIMIT = 600", f"RUN_LIMIT = {limit}")
    replace(path / "harness/run.py", "MAX_LOST = 5", "MAX_LOST = 1e9")  # other tests take time, too
    replace(path / "harness/run.py", '"/tmp/autoresearch-%s.lock"', f'"{path.parent}/%s.lock"')
    git(path, "init", "-q", "-b", "main")
    git(path, "config", "user.name", "test")
    git(path, "config", "user.email", "test@example.invalid")
    git(path, "add", "-A")
    git(path, "commit", "-qm", "start")
    return path


@pytest.fixture
def clone(tmp_path):
    """A clone on a branch for experiments."""
    path = make_clone(tmp_path / "clone")
    git(path, "checkout", "-q", "-b", "autoresearch/test")
    return path
