"""One small real corpus, prepared once for all tests in a cache folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import networkx
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("AUTORESEARCH_CORPUS", None)

import prepare  # noqa: E402  found through the lines above

# The tests speak of the CPU configuration, also on a machine with a GPU; those marked gpu name their device.
prepare.get_device = lambda: torch.device("cpu")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The cache folder of this test session, instead of the user's."""
    os.environ["AUTORESEARCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return prepare.cache_root()


@pytest.fixture(scope="session")
def folder():
    """6 MB of real text: the source of an installed package."""
    return Path(networkx.__file__).parent


@pytest.fixture(scope="session")
def corpus(cache, folder):
    corpus, _ = prepare.choose_corpus(str(folder))
    prepare.prepare(corpus)
    return corpus


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return prepare.Tokenizer(corpus)


@pytest.fixture
def small_tables(monkeypatch):
    """Tables of guesses that take no time to make."""
    monkeypatch.setattr("train.COUNT_ROWS", 10_007)


def give_guesses(model, ids):
    """Fill the rows of all contexts in ids (B, T) with random guesses; of those with one row the last stays."""
    import train

    for table, context in zip(model.table, train.CONTEXTS, strict=True):
        mixed = train.hash_contexts(ids, context).flatten()
        packed = torch.randint(model.config.vocab_size * 2**16, (len(mixed), train.GUESSES))
        rows = torch.cat([mixed[:, None] // train.COUNT_ROWS + 1, packed], 1)
        table.numpy()[(mixed % train.COUNT_ROWS).numpy()] = rows.numpy()


def environ(**more):
    """Environment of a command: no GPU, and a place for device locks apart from those of real runs."""
    own = {"CUDA_VISIBLE_DEVICES": "", "LOCKS": os.environ["AUTORESEARCH_CACHE"]}
    return os.environ | own | {name: str(value) for name, value in more.items()}


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
