"""Which change makes values incomparable, and which makes tokens anew: one for each meaning."""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from conftest import ROOT, replace

import prepare
from harness import record


@pytest.fixture(scope="module")
def text(folder, tmp_path_factory):
    """A folder of text that no test changes."""
    path = tmp_path_factory.mktemp("text")
    for file in sorted((folder / "algorithms" / "tests").glob("*.py"))[:30]:
        shutil.copy2(file, path)
    return path


@pytest.fixture
def copy(tmp_path):
    """A copy of the judge that a test may change."""
    shutil.copytree(ROOT / "harness", tmp_path / "copy" / "harness")
    shutil.copy(ROOT / "prepare.py", tmp_path / "copy")
    return tmp_path / "copy"


def forget_modules():
    names = [name for name in sys.modules if name.split(".")[0] in ("prepare", "harness")]
    return {name: sys.modules.pop(name) for name in names}


@contextlib.contextmanager
def imported(folder):
    """The prepare.py of another folder."""
    saved = forget_modules()
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("prepare")
        assert Path(module.__file__).parent == folder
        module.get_device = lambda: torch.device("cpu")
        yield module
    finally:
        sys.path.remove(str(folder))
        forget_modules()
        sys.modules.update(saved)


def digests_of(folder, text):
    """The harness digest of a judge for a text that it prepares, and the folder of the tokens."""
    with imported(folder) as judge:
        corpus = judge.choose_corpus(str(text))
        judge.prepare(corpus)
        return judge.harness_digest(corpus), corpus.directory


def content(directory):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


# The code ---------------------------------------------------------------------------------------


def add_comments(source):
    """A comment at the end of every statement, and a blank line and a comment after it."""
    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            lines[token.end[0] - 1] += "  # changed: 'so\n\n        # and \"so"
    return "\n".join(lines)


@pytest.mark.parametrize("name", ["prepare.py", "harness/run.py"])
def test_comments_and_blank_lines_change_neither_digest(copy, text, name):
    before, path = digests_of(copy, text), copy / name
    path.write_text(add_comments(path.read_text()))
    assert path.read_text().count("# changed") > 100
    assert digests_of(copy, text) == before


@pytest.mark.parametrize("name", ["ledger", "audit", "record"])
def test_the_books_are_in_neither_digest(copy, text, name):
    before, path = digests_of(copy, text), copy / "harness" / f"{name}.py"
    path.write_text(f'{path.read_text()}\nMESSAGE = "another"\n')
    assert digests_of(copy, text) == before


@pytest.mark.parametrize(
    ("name", "pattern", "after"),
    [
        ("prepare.py", r"^MAX_LEAK = .*", "MAX_LEAK = 1"),
        ("prepare.py", r"^RETRY_SECONDS = .*", "RETRY_SECONDS = (9,)"),
        ("harness/run.py", r"^GRACE_SECONDS = .*", "GRACE_SECONDS = 99"),
    ],
    ids=["evaluator", "download", "clock"],
)
def test_what_makes_no_tokens_changes_harness_and_keeps_them(copy, text, name, pattern, after):
    harness, directory = digests_of(copy, text)
    before, path = content(directory), copy / name
    changed, number = re.subn(pattern, after, path.read_text(), flags=re.MULTILINE)
    assert number == 1
    path.write_text(changed)
    now, same_directory = digests_of(copy, text)
    assert now != harness
    assert same_directory == directory
    assert content(directory) == before


def test_another_split_pattern_changes_both_and_leaves_the_old_tokens(copy, text):
    harness, directory = digests_of(copy, text)
    before = content(directory)
    replace(copy / "prepare.py", r"\p{N}{1,2}", r"\p{N}{1,3}")
    now, other_directory = digests_of(copy, text)
    assert now != harness
    assert other_directory != directory
    assert content(directory) == before


# Every Python -----------------------------------------------------------------------------------

TRICKY = '''"""Docstring with a # in it."""
x = f"{1:#>10} # {'é#'} {2}"  # comment with 'quotes'
é = f"ü{x!r}ü" + "#" + rf'\\d{{#}}'  # ü comment
y = f"""
# no comment {x}

   # nor this {
    é
}
"""  # but this


def f(a,  # one
      b):  # two
    # indented
    return (a,  # three
            b)
'''
STRIP = """
import io, sys, tokenize
exec(sys.argv[1])
for path in sys.argv[2:]:
    text = strip_comments(open(path, encoding="utf-8").read())
    print(path, ascii(text))
"""


def find_interpreters():
    """One interpreter of every Python that the project allows, as far as there are any here."""
    found = {}
    versions = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for minor in (11, 12, 13):
        names = [*versions.glob(f"3.{minor}.*/bin/python3"), shutil.which(f"python3.{minor}")]
        for name in filter(None, names):
            call = [name, "-c", "import sys; print(sys.version_info[1])"]
            answer = subprocess.run(call, capture_output=True, text=True)
            if answer.stdout.strip() == str(minor):
                found[minor] = name
    return found


def test_every_python_strips_the_same_comments(tmp_path):
    interpreters = find_interpreters()
    if len(interpreters) < 2:
        pytest.skip("there is only one Python here")
    (tmp_path / "tricky.py").write_text(TRICKY)
    files = [tmp_path / "tricky.py", *(ROOT / name for name in record.LOCKED)]
    strip = inspect.getsource(record.strip_comments)
    results = {}
    for minor, interpreter in interpreters.items():
        call = [interpreter, "-c", STRIP, strip, *files]
        results[minor] = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert len(set(results.values())) == 1
    assert "comment with" not in results.popitem()[1]


def test_stripped_source_is_the_same_program():
    for name in record.JUDGE:
        source = (ROOT / name).read_text()
        stripped = record.strip_comments(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(stripped).readline))
        assert tokenize.COMMENT not in [token.type for token in tokens]
        tree, stripped_tree = ast.parse(source), ast.parse(stripped)
        lines = re.compile(r"(\s*\\n)+")  # blank lines in docstrings go too
        assert lines.sub("\n", ast.dump(stripped_tree)) == lines.sub("\n", ast.dump(tree))


# The text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["touched", "added", "removed", "renamed"])
def test_other_text_is_another_corpus_and_leaves_the_old_one(text, tmp_path, change):
    folder = shutil.copytree(text, tmp_path / "text")
    corpus = prepare.choose_corpus(str(folder))
    prepare.prepare(corpus)
    before, file = content(corpus.directory), next(folder.iterdir())
    if change == "touched":
        os.utime(file, (1, 1))
    elif change == "added":
        file.with_name("more.txt").write_text("more")
    elif change == "removed":
        file.unlink()
    else:
        file.rename(file.with_name("another name.py"))
    other = prepare.choose_corpus(str(folder))
    assert other.directory != corpus.directory
    prepare.prepare(other)
    assert content(corpus.directory) == before


def test_other_text_to_train_on_changes_harness_though_nothing_else_does(text, tmp_path):
    folder = shutil.copytree(text, tmp_path / "text")
    corpus = prepare.choose_corpus(str(folder))
    path = prepare.find_sources(corpus)[0].path  # the first is trained on
    made = []
    for words in ("12 34", "34 12"):
        path.write_text(f"the numbers are {words} and no others")
        corpus = prepare.choose_corpus(str(folder))
        prepare.prepare(corpus)
        files = [(corpus.directory / name).read_bytes() for name in prepare.file_names(corpus)]
        made.append((*files, prepare.harness_digest(corpus)))
    (tokenizer, val, train, digest), (*judged_by, other_train, other_digest) = made
    assert judged_by == [tokenizer, val]
    assert other_train != train
    assert other_digest != digest


def test_neither_digest_depends_on_where_the_text_and_the_cache_are(text, tmp_path, monkeypatch):
    made = []
    for place in ("one", "other"):
        monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / place / "cache"))
        folder = shutil.copytree(text, tmp_path / place / "text")
        corpus = prepare.choose_corpus(str(folder))
        prepare.prepare(corpus)
        made.append((corpus.directory.name, prepare.harness_digest(corpus)))
    assert made[0] == made[1]


@pytest.mark.parametrize("name", ["python", "climbmix"])
def test_the_number_of_shards_does_not_decide_where_tokens_are(name):
    corpus = prepare.choose_corpus(name)
    assert dataclasses.replace(corpus, num_shards=3).directory == corpus.directory


@pytest.mark.parametrize("setting", ["vocab_size", "seq_len", "eval_tokens"])
def test_other_settings_give_other_tokens(setting):
    corpus = prepare.choose_corpus("climbmix")
    assert dataclasses.replace(corpus, **{setting: 512}).directory != corpus.directory


@pytest.mark.parametrize("constant", ["CLIMBMIX_REPO", "CLIMBMIX_TRAIN_SHARDS"])
def test_another_validation_shard_gives_other_tokens(monkeypatch, constant):
    before = prepare.choose_corpus("climbmix").directory
    monkeypatch.setattr(prepare, constant, 99)
    assert prepare.choose_corpus("climbmix").directory != before
