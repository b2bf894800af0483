"""What a user can get wrong: one message with what was seen and what to do, nothing lost."""

import contextlib
import json
import os
import re
import resource
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare

NOBODY = 65534


@pytest.fixture
def text_folder(tmp_path, folder):
    """A little real text in a folder that a test may spoil."""
    return shutil.copytree(folder / "algorithms" / "tests", tmp_path / "text")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def choose(folder):
    return prepare.choose_corpus(str(folder))


def refusal(use, *arguments):
    """The message that a command ends with."""
    with pytest.raises(SystemExit) as stopped:
        use(*arguments)
    return str(stopped.value)


# Text that is none ------------------------------------------------------------------------------


def parquet_of(**columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


BROKEN_UTF8 = pa.array([b"\xff\xfe" * 10]).view(pa.string())
CATEGORIES = pa.array(["a", "b"]).dictionary_encode()
NO_PARQUET, NO_JSON = 'expected a parquet file with strings in a column "text"', "expected a JSON"
BAD_FILES = {
    "parquet without the column": ("a.parquet", parquet_of(body=["a"]), f"{NO_PARQUET}.*text"),
    "parquet of bytes": ("a.parquet", parquet_of(text=[b"\xff\xfe"]), f"{NO_PARQUET}.*binary"),
    "parquet of integers": ("a.parquet", parquet_of(text=[1, 2]), f"{NO_PARQUET}.*int64"),
    "parquet of categories": ("a.parquet", parquet_of(text=CATEGORIES), NO_PARQUET),
    "parquet of broken UTF-8": ("a.parquet", parquet_of(text=BROKEN_UTF8), NO_PARQUET),
    "damaged parquet": ("a.parquet", b"PAR1" + b"\0" * 500, NO_PARQUET),
    "empty parquet": ("a.parquet", b"", NO_PARQUET),
    "jsonl without the key": ("a.jsonl", b'{"text": "fine"}\n{"body": "not"}\n', f":2: {NO_JSON}"),
    "jsonl of a list": ("a.jsonl", b'["text"]\n', f":1: {NO_JSON}"),
    "jsonl of a string": ("a.jsonl", b'"text"\n', f":1: {NO_JSON}"),
    "jsonl of no text": ("a.jsonl", b'{"text": null}\n', f":1: {NO_JSON}"),
    "jsonl of a number": ("a.jsonl", b'{"text": 5}\n', f":1: {NO_JSON}"),
    "jsonl of brackets": ("a.jsonl", b"[" * 200_000, f":1: {NO_JSON}"),
    "jsonl of broken UTF-8": ("a.jsonl", b'{"text": "\xff"}\n', f":1: {NO_JSON}"),
    "jsonl that is none": ("a.jsonl", b"hello\n", f":1: {NO_JSON}"),
    "nothing": (".hidden", b"", r"no text in it\..*read: .*\.jsonl"),
    "pictures": ("a.png", b"\x89PNG", r"no text in it\..*read: .*\.jsonl"),
    "an empty file": ("a.txt", b"", "too small: it takes a few hundred KB"),
    "a few words": ("a.txt", b"a few words\n\n" * 50, "too small: it takes a few hundred KB"),
    "only binary files": ("a.txt", bytes(range(256)) * 100, "too small: it takes a few hundred KB"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_folder_that_can_not_be_a_corpus_is_refused(tmp_path, empty_cache, kind):
    name, data, message = BAD_FILES[kind]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(data)
    assert re.search(message, refusal(prepare.prepare, choose(tmp_path / "text")))
    assert not list(empty_cache.rglob("manifest.json"))


def test_text_that_is_all_held_out_can_not_be_trained_on(tmp_path, empty_cache):
    line = json.dumps({"text": "the same words again " * 3000}) + "\n"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "all.jsonl").write_text(line * 60)
    assert "nothing is left to train on" in refusal(prepare.prepare, choose(tmp_path / "text"))


@pytest.mark.parametrize("data", [b"nul \0 in it", b"\xff\xfe latin \xe4", b"cut \xf0\x9f\x98"])
def test_a_binary_file_among_text_is_skipped_and_said(text_folder, empty_cache, capsys, data):
    sources = prepare.find_sources(choose(text_folder))
    sources[0].path.write_bytes(data)
    prepare.prepare(choose(text_folder))
    seen = rf"skipped 1 files that are not UTF-8 text, the first is {sources[0].path} \("
    assert re.search(seen, capsys.readouterr().out)


def test_a_cache_in_the_folder_is_no_text_of_it(text_folder, monkeypatch):
    before = prepare.find_sources(choose(text_folder))
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(text_folder / "cache"))
    prepare.prepare(choose(text_folder))
    assert (text_folder / "cache" / "tokens").exists()
    assert prepare.find_sources(choose(text_folder)) == before


# Arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "/nowhere"], "corpus /nowhere: not climbmix, not python, and no folder"),
        (["--corpus", "~nobody-here/x"], "not climbmix, not python, and no folder"),
        (["--corpus", "python", "--shards", "3"], "--shards 3 with python: only climbmix has"),
        (["--corpus", "climbmix", "--shards", "0"], "--shards 0 with climbmix: .* 1 to 6542"),
        (["--corpus", "climbmix", "--shards", "many"], "invalid int value: 'many'"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["check", "everything"], r"unexpected: \['everything'\]"),
    ],
)
def test_wrong_arguments_are_explained(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["prepare.py", *arguments])
    assert re.search(message, refusal(prepare.main) + capsys.readouterr().err)


def test_help_shows_every_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prepare.py", "--help"])
    assert refusal(prepare.main) == "0"
    shown = capsys.readouterr().out
    assert all(f"uv run prepare.py {word}" in shown for word in ("check", "log", "runs", "audit"))
    assert "--corpus" in shown
    assert "--shards" in shown


# A cache that can't be written ------------------------------------------------------------------

ADVICE = "give access, free some space, or set AUTORESEARCH_CACHE"


@contextlib.contextmanager
def unprivileged():
    """Be a user whom the modes of files bind, unlike root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture
def own_folder(folder, monkeypatch):
    """A folder of text and an empty cache that `unprivileged` may read and write."""
    path = Path(tempfile.mkdtemp())
    shutil.copytree(folder / "algorithms" / "tests", path / "text")
    (path / "cache").mkdir()
    if os.geteuid() == 0:
        for place in (path, *path.rglob("*")):
            os.chown(place, NOBODY, NOBODY)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(path / "cache"))
    yield path
    shutil.rmtree(path)


def test_the_command_that_can_not_write_its_cache_exits_with_1(command, tmp_path, text_folder):
    (tmp_path / "file").touch()
    result = command("prepare.py", "--corpus", text_folder, AUTORESEARCH_CACHE=tmp_path / "file")
    assert result.returncode == 1
    assert ADVICE in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize("kind", ["in a file", "of the kernel"])
def test_a_cache_folder_that_can_not_be_made_is_said(tmp_path, text_folder, monkeypatch, kind):
    (tmp_path / "file").touch()
    places = {"in a file": tmp_path / "file" / "x"}
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(places.get(kind, "/proc/autoresearch")))
    assert ADVICE in refusal(lambda: prepare.prepare(choose(text_folder)))


def test_a_cache_that_may_only_be_read_is_said_and_serves_while_it_is_whole(own_folder):
    (own_folder / "cache").chmod(0o500)
    with unprivileged():
        assert ADVICE in refusal(prepare.prepare, choose(own_folder / "text"))
    (own_folder / "cache").chmod(0o700)
    prepare.prepare(choose(own_folder / "text"))
    for place in (own_folder / "cache").rglob("*"):
        place.chmod(0o555 if place.is_dir() else 0o444)
    with unprivileged():
        prepare.prepare(choose(own_folder / "text"))
        assert prepare.Tokenizer(choose(own_folder / "text")).get_vocab_size() == 4096


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_text_that_may_not_be_read_is_named_and_not_left_out(own_folder, kind):
    (own_folder / "text" / "more").mkdir()
    locked = {"folder": own_folder / "text" / "more", "file": own_folder / "text" / "secret.txt"}
    (own_folder / "text" / "secret.txt").write_text("a secret")
    locked[kind].chmod(0)
    with unprivileged():
        message = refusal(lambda: prepare.prepare(choose(own_folder / "text")))
    locked[kind].chmod(0o700)
    assert str(locked[kind]) in message
    assert ADVICE in message


def test_a_full_disk_is_said_and_what_is_finished_is_kept(text_folder, empty_cache):
    corpus, limits = choose(text_folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = refusal(prepare.prepare, corpus)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ADVICE in message
    names = {path.name for path in corpus.directory.iterdir() if path.suffix != ".part"}
    assert {"tokenizer.json"} <= names <= {"tokenizer.json", "val_rows.bin"}
    stamp = (corpus.directory / "tokenizer.json").stat().st_mtime_ns
    prepare.prepare(corpus, thorough=True)
    assert (corpus.directory / "tokenizer.json").stat().st_mtime_ns == stamp
    assert not list(corpus.directory.glob("*.part"))


# A cache that was damaged -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A folder of text and its cache, which no test changes."""
    path = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder / "algorithms" / "tests", path / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(path / "cache"))
        prepare.prepare(choose(path / "text"))
    return path


@pytest.fixture
def corpus(whole, empty_cache):
    """A prepared corpus that a test may damage."""
    shutil.copytree(whole / "cache", empty_cache)
    return choose(whole / "text")


def check(corpus, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prepare.py", "check", "--corpus", corpus.folder])
    prepare.main()


def train(corpus):
    """What a run does with a corpus before it trains."""
    prepare.prepare(corpus)
    prepare.Tokenizer(corpus)
    prepare.read_val_rows(corpus)


def content(corpus):
    """All files; the manifest may name them in any order."""
    files = {path.name: path.read_bytes() for path in corpus.directory.iterdir()}
    return files | {"manifest.json": json.loads(files["manifest.json"])}


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-10])
    else:
        path.write_bytes(data[:40] + bytes([data[40] ^ 4]) + data[41:])


@pytest.mark.parametrize("name", ["tokenizer.json", "val_rows.bin", "train_00000.tokens"])
@pytest.mark.parametrize("how", ["missing", "truncated", "one flipped bit"])
def test_a_damaged_cache_is_found_and_fixed(corpus, monkeypatch, name, how):
    before = content(corpus)
    damage(corpus.directory / name, how)
    message = f"missing or damaged in {corpus.directory}: {name}. `{corpus.command}`"
    assert message in refusal(check, corpus, monkeypatch)
    if how != "one flipped bit":
        train(corpus)  # what is missing or too short is made again without a word from the user
    elif name != "train_00000.tokens":  # a bit of those is what check is for
        assert f"{name} is missing or damaged: `{corpus.command}`" in refusal(train, corpus)
    prepare.prepare(corpus, thorough=True)
    assert content(corpus) == before
    check(corpus, monkeypatch)


@pytest.mark.parametrize("name", ["tokenizer.json", "val_rows.bin", "train_00000.tokens"])
def test_a_flipped_bit_anywhere_in_a_file_is_found(corpus, name):
    path, data = corpus.directory / name, (corpus.directory / name).read_bytes()
    for bit in (0, 8 * len(data) - 1, *range(0, 8 * len(data), len(data) // 2 + 1)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert prepare.find_damaged(corpus, thorough=True) == [name]


def test_a_flipped_bit_in_the_manifest_is_found_and_said(corpus, thorough):
    step = 1 if thorough else 37
    path = corpus.directory / "manifest.json"
    data = path.read_bytes()
    for bit in range(8 * data.index(b'"files"'), 8 * len(data), step):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with contextlib.suppress(SystemExit):
            assert prepare.find_damaged(corpus, thorough=True), bytes(flipped)


def test_a_manifest_that_can_not_be_read_is_said(corpus, monkeypatch):
    path = corpus.directory / "manifest.json"
    damage(path, "truncated")
    seen = rf"{path} is damaged .*: delete it, then `{corpus.command}`"
    for use in (train, lambda corpus: check(corpus, monkeypatch)):
        assert re.search(seen, refusal(use, corpus))


def test_a_manifest_that_was_deleted_is_made_again_and_nothing_else(corpus):
    before, manifest = content(corpus), corpus.directory / "manifest.json"
    stamps = {path: path.stat().st_mtime_ns for path in corpus.directory.iterdir()}
    manifest.unlink()
    prepare.prepare(corpus)
    assert content(corpus) == before
    again = {path: path.stat().st_mtime_ns for path in corpus.directory.iterdir()}
    assert {path for path in again if again[path] != stamps[path]} == {manifest}


def test_check_before_anything_is_prepared_says_so(text_folder, empty_cache, monkeypatch):
    message = refusal(check, choose(text_folder), monkeypatch)
    assert "tokenizer.json, val_rows.bin, train_00000.tokens. `uv run prepare.py" in message
    assert not empty_cache.exists()


def test_files_of_the_user_in_the_cache_folder_stay(corpus):
    (corpus.directory / "thesis.txt").write_text("mine")
    (corpus.directory / "tokenizer.json").unlink()
    prepare.prepare(corpus, thorough=True)
    assert (corpus.directory / "thesis.txt").read_text() == "mine"
