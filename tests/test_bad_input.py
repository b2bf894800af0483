"""What a user can get wrong: one message that says what was seen and what to do, exit 1, nothing half-written."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare


@pytest.fixture
def text_folder(tmp_path, folder):
    """A little real text in a folder that a test may spoil."""
    return shutil.copytree(folder / "algorithms" / "tests", tmp_path / "text")


def write_bad_folder(kind, path):
    if kind == "binary":
        (path / "a.txt").write_bytes(bytes(range(256)) * 100)
        (path / "b.md").write_bytes(b"\xff\xfe latin \xe4\xf6\xfc" * 100)
    elif kind == "parquet without text":
        pq.write_table(pa.table({"body": ["a"], "id": [1]}), path / "a.parquet")
    elif kind == "parquet of bytes":
        pq.write_table(pa.table({"text": [b"\xff\xfe"]}), path / "a.parquet")
    elif kind == "parquet of broken UTF-8":
        broken = pa.array([b"\xff\xfe" * 10]).view(pa.string())
        pq.write_table(pa.table({"text": broken}), path / "a.parquet")
    elif kind == "damaged parquet":
        (path / "a.parquet").write_bytes(b"PAR1" + b"\0" * 500)
    elif kind == "jsonl without text":
        (path / "a.jsonl").write_text('{"text": "fine"}\n{"body": "not"}\n')
    elif kind == "jsonl of brackets":
        (path / "a.jsonl").write_text("[" * 200_000 + "]" * 200_000)
    elif kind == "jsonl that is none":
        (path / "a.jsonl").write_text("hello\n")
    elif kind == "too small":
        (path / "a.txt").write_text("a few words\n\n" * 50)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", r"no text in it\. Read are, at any depth: .*\.jsonl"),
        ("binary", "there is no text that could be read"),
        ("parquet without text", r"a\.parquet: no column text; its columns are body, id"),
        ("parquet of bytes", r"a\.parquet: its column text is of the type binary, not string"),
        ("parquet of broken UTF-8", r"a\.parquet: not a readable parquet file"),
        ("damaged parquet", r"a\.parquet: not a readable parquet file"),
        ("jsonl without text", r'a\.jsonl:2: expected a JSON object with a text under "text"'),
        ("jsonl of brackets", r"a\.jsonl:1: expected a JSON object"),
        ("jsonl that is none", r"a\.jsonl:1: expected a JSON object"),
        ("too small", "too small: a few hundred KB are the least"),
    ],
)
def test_a_folder_that_can_not_be_a_corpus_is_refused(tmp_path, cache, kind, message):
    write_bad_folder(kind, tmp_path)
    corpus, _ = prepare.choose_corpus(str(tmp_path))
    with pytest.raises(SystemExit, match=message):
        prepare.prepare(corpus)
    left = {path.name for path in corpus.directory.glob("*")} if corpus.directory.exists() else set()
    assert not {name for name in left if name.endswith((".part", ".tokens", "val_rows.bin"))}


def test_binary_files_among_text_are_skipped_and_said(text_folder, cache, capsys):
    write_bad_folder("binary", text_folder)
    corpus, _ = prepare.choose_corpus(str(text_folder))
    prepare.prepare(corpus)
    assert "files that are not UTF-8 text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "/nowhere"], "corpus /nowhere: not climbmix, not python, and not a folder: /nowhere"),
        (["--shards", "3", "--corpus", "python"], "--shards 3 with python: only climbmix has shards"),
        (["--shards", "0", "--corpus", "climbmix"], "--shards 0 with climbmix: only climbmix has shards, 1 to 6542"),
        (["--shards", "many"], "invalid int value: 'many'"),
        (["frobnicate"], "frobnicate: expected nothing to prepare, check, log, or log keep|discard|crash"),
        (["log", "kept", "a run"], "log kept a run: expected nothing to prepare, check, log, or"),
    ],
)
def test_wrong_arguments_are_explained(command, arguments, message):
    result = command("prepare.py", *arguments)
    assert result.returncode in (1, 2)
    assert message in result.stdout
    assert "Traceback" not in result.stdout


def test_help_shows_every_command(command):
    result = command("prepare.py", "--help")
    assert result.returncode == 0
    for word in ("--corpus", "--shards", "check", "log"):
        assert word in result.stdout


@pytest.mark.parametrize("where", ["a file", "a place of the kernel's"])
def test_a_cache_folder_that_can_not_be_written_is_said(command, tmp_path, text_folder, where):
    (tmp_path / "file").touch()
    cache = {"a file": tmp_path / "file" / "cache", "a place of the kernel's": "/proc/autoresearch"}[where]
    own_lock = "prepare.DEVICE_LOCK = os.environ['LOCKS'] + '/%s.lock'"
    for script in (["prepare.py"], ["-c", f"import os, prepare; {own_lock}; import train; train.main()"]):
        result = command(*script, "--corpus", text_folder, AUTORESEARCH_CACHE=cache, LOCKS=tmp_path)
        assert result.returncode == 1
        assert "can't write to" in result.stdout
        assert "set AUTORESEARCH_CACHE to a folder that can be written" in result.stdout
        assert "Traceback" not in result.stdout


def test_a_full_disk_is_said_and_leaves_nothing_half_written(command, tmp_path, text_folder):
    script = "import resource, prepare; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); prepare.main()"
    result = command("-c", script, "--corpus", text_folder, AUTORESEARCH_CACHE=tmp_path / "cache")
    assert result.returncode == 1
    assert "can't write to" in result.stdout
    assert "Free some space" in result.stdout
    assert "Traceback" not in result.stdout
    (directory,) = (tmp_path / "cache").iterdir()
    names = {path.name for path in directory.iterdir()}
    assert (
        {"lock", "manifest.json", "tokenizer.json"}
        <= names
        <= {"lock", "manifest.json", "tokenizer.json", "val_rows.bin"}
    )
    assert command("prepare.py", "--corpus", text_folder, AUTORESEARCH_CACHE=tmp_path / "cache").returncode == 0


# a cache that was damaged: check names the file, prepare.py mends it, train.py what it sees without reading all of it


def spoil(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-10] if how == "truncated" else data[:40] + bytes([data[40] ^ 4]) + data[41:])


def use(corpus):
    """What train.py does with a corpus before it trains."""
    prepare.prepare(corpus)
    prepare.Tokenizer(corpus)
    prepare.read_val_rows(corpus)


@pytest.mark.parametrize("name", ["tokenizer.json", "val_rows.bin", "train_00000.tokens"])
@pytest.mark.parametrize("how", ["missing", "truncated", "one flipped bit"])
def test_a_damaged_cache_is_found_and_mended(tmp_path, text_folder, monkeypatch, name, how, capsys):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    corpus, _ = prepare.choose_corpus(str(text_folder))
    prepare.prepare(corpus)
    whole = (corpus.directory / prepare.MANIFEST).read_text()
    spoil(corpus.directory / name, how)
    found = f"{corpus.directory / name} is {'missing' if how == 'missing' else 'damaged'}(.|\n)*uv run prepare.py"
    for arguments in (["check", "--corpus", str(text_folder)], ["--corpus", str(text_folder), "check"]):
        monkeypatch.setattr("sys.argv", ["prepare.py", *arguments])
        with pytest.raises(SystemExit, match=found):
            prepare.main()
    if how == "one flipped bit" and name != "train_00000.tokens":  # a bit of 80 MB is what check is for
        with pytest.raises(SystemExit, match=f"{name} is damaged"):
            use(corpus)
    else:
        use(corpus)  # what is missing or too short is made again without a word from the user
    prepare.prepare(corpus, thorough=True)
    assert json.loads((corpus.directory / prepare.MANIFEST).read_text()) == json.loads(whole)
    prepare.main()
    assert prepare.harness_fingerprint(corpus) in capsys.readouterr().out


def test_a_damaged_manifest_is_said(tmp_path, text_folder, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    corpus, _ = prepare.choose_corpus(str(text_folder))
    prepare.prepare(corpus)
    spoil(corpus.directory / prepare.MANIFEST, "truncated")
    with pytest.raises(SystemExit, match=r"manifest\.json is damaged .* Delete it"):
        prepare.prepare(corpus)


def test_check_before_anything_is_prepared_says_so(command, tmp_path, text_folder):
    result = command("prepare.py", "check", "--corpus", text_folder, AUTORESEARCH_CACHE=tmp_path / "none")
    assert result.returncode == 1
    assert "val_rows.bin is missing" in result.stdout


def test_files_of_the_user_in_the_cache_folder_stay(tmp_path, text_folder, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    corpus, _ = prepare.choose_corpus(str(text_folder))
    corpus.directory.mkdir(parents=True)
    (corpus.directory / "thesis.txt").write_text("mine")
    (corpus.directory / "train_00007.tokens").write_text("of another prepare.py")
    prepare.prepare(corpus)
    assert (corpus.directory / "thesis.txt").read_text() == "mine"
    assert not (corpus.directory / "train_00007.tokens").exists()


def test_a_cache_in_the_folder_is_no_text_of_it(text_folder, monkeypatch):
    corpus, _ = prepare.choose_corpus(str(text_folder))
    before = prepare.find_sources(corpus)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(text_folder / "cache"))
    (text_folder / "cache").mkdir()
    (text_folder / "cache" / "runs.jsonl").write_text("{}\n")
    assert prepare.find_sources(corpus) == before


def test_a_file_that_can_not_be_read_is_not_skipped(text_folder, monkeypatch):
    corpus, _ = prepare.choose_corpus(str(text_folder))
    sources = prepare.find_sources(corpus)
    sources[0].path.unlink()  # as if it were another user's, which root would not notice
    monkeypatch.setattr(prepare, "find_sources", lambda corpus: sources)
    with pytest.raises(SystemExit, match=rf"{sources[0].path}: No such file.* Make it readable, or take it away"):
        prepare.prepare(corpus)


def test_text_that_is_all_held_out_is_ready_neither_for_prepare_nor_for_check(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    text = json.dumps({"text": "the same words again " * 3000}) + "\n"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "all.jsonl").write_text(text * 60)
    corpus, _ = prepare.choose_corpus(str(tmp_path / "text"))
    for use in (prepare.prepare, prepare.check):
        with pytest.raises(SystemExit, match="no text to train on"):
            use(corpus)


@pytest.mark.parametrize("setting", ["--corpus", "AUTORESEARCH_CACHE"])
@pytest.mark.parametrize("value", ["~nobody-here/x", "loop"])
def test_a_path_that_leads_nowhere_is_said(tmp_path, text_folder, monkeypatch, setting, value):
    (tmp_path / "loop").symlink_to("loop")
    value = str(tmp_path / value) if value == "loop" else value
    monkeypatch.chdir(tmp_path)
    if setting == "--corpus":
        with pytest.raises(SystemExit, match="not climbmix, not python, and not a folder"):
            prepare.choose_corpus(value)
    else:
        monkeypatch.setenv(setting, value)
        corpus, _ = prepare.choose_corpus(str(text_folder))
        if value.endswith("loop"):
            with pytest.raises(SystemExit, match="can't write to"):
                prepare.prepare(corpus)
        else:
            prepare.prepare(corpus)  # a folder of this name
            assert corpus.directory.is_relative_to(tmp_path)
