"""Documents, tokenizer, token cache and dataloader, each against something independent."""

import itertools
import json
import os
import subprocess
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rustbpe
import torch

import prepare

MULTILINGUAL = """The quick brown fox. Größe, façade, señor, Łódź, İstanbul. Привет, мир! Καλημέρα κόσμε.
שלום עולם. مرحبا بالعالم. नमस्ते दुनिया। 你好，世界。こんにちは世界。안녕하세요 세계. สวัสดีชาวโลก 👩‍👩‍👧‍👦 🇺🇳 𝔘𝔫𝔦𝔠𝔬𝔡𝔢
e\u0301 \u200d\u200b\ufeff\t\r\n   1234567890 <|reserved_0|> <|endoftext|> it's WE'LL\n\n\n"""


def every_plane():
    """A character in 97 of every plane, and all that have a name in the planes that have few."""
    points = [*range(0, 0x110000, 97), *range(0x1F000, 0x20000), *range(0xE0000, 0xE01F0)]
    return "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)


# documents


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(newline):
    paragraphs = [newline.join(f"line {i}.{j}" for j in range(i % 7 + 1)) for i in range(100)]
    documents = list(prepare.split_text([(newline * 2).join(paragraphs)], 200))
    assert max(map(len, documents)) <= 200
    together = [part.strip() for document in documents for part in document.split(newline * 2)]
    assert together == paragraphs


def test_a_text_without_any_line_is_cut_at_the_limit():
    assert list(prepare.split_text(["x" * 25], 10)) == ["x" * 10, "x" * 10, "x" * 5]


def make_folder(path, files=200, lines=40):
    """Text files in which every line names its file."""
    for i in range(files):
        where = path / f"part{i % 3}" / f"{i:03d}.txt"
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text("\n\n".join(f"file {i:03d} line {j} " + "word " * 60 for j in range(lines)))
    return path


def splits_of(folder):
    corpus, _ = prepare.choose_corpus(str(folder))
    sources = prepare.find_sources(corpus)
    return [list(prepare.local_documents(sources, split, corpus, prepare.make_meter())) for split in ("train", "val")]


def test_whole_files_are_held_out_and_none_is_in_both_splits(tmp_path):
    train, val = splits_of(make_folder(tmp_path))
    files = [
        {word for text in split for word in text.split() if word.isdigit() and len(word) == 3} for split in (train, val)
    ]
    assert len(files[0] | files[1]) == 200
    assert not files[0] & files[1]
    assert 0.03 <= len(files[1]) / 200 <= 0.05


def test_of_a_single_large_file_one_document_in_25_is_held_out(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(f"paragraph {i} " + "word " * 180 for i in range(1000)))
    train, val = splits_of(tmp_path)
    assert not set(train) & set(val)
    assert 0.03 <= len(val) / (len(train) + len(val)) <= 0.05


def test_every_kind_of_file_is_read_and_hidden_ones_are_not(tmp_path):
    (tmp_path / "a.txt").write_text("from txt")
    (tmp_path / "b.jsonl").write_text(
        "\ufeff" + json.dumps({"text": "from jsonl", "id": 1}) + "\n\n" + '{"text": ""}\n'
    )
    pq.write_table(pa.table({"text": ["from parquet", None, ""], "n": [1, 2, 3]}), tmp_path / "c.parquet")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "d.txt").write_text("hidden")
    (tmp_path / "e.png").write_bytes(b"\x89PNG")
    train, val = splits_of(tmp_path)
    assert sorted(train + val) == ["from jsonl", "from parquet", "from txt"]


def test_a_document_that_stands_in_both_splits_is_dropped_from_train(tmp_path, cache):
    texts = [f"text {i} " + "word " * 2000 for i in range(2000)]
    for at in range(24, 2000, 25):  # those are held out
        texts[at + 1 if at + 1 < 2000 else 0] = texts[at]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus, _ = prepare.choose_corpus(str(tmp_path))
    prepare.prepare(corpus)
    tokenizer = prepare.Tokenizer(corpus)
    documents, first = prepare.train_documents(corpus, seed=1), []
    for ids, epoch in documents:
        if epoch == 2:
            break
        first.append(tokenizer.decode(ids[1:].tolist()))
    assert len(first) == 2000 - 2 * 80
    assert not set(first) & set(texts[24::25])


def test_the_python_corpus_holds_only_files_that_are_the_same_on_every_platform():
    corpus, _ = prepare.choose_corpus("python")
    sources = prepare.find_sources(corpus)
    assert len(sources) > 5000
    names = {source.name for source in sources}
    assert "torch/nn/functional.py" in names
    assert not names & {"torch/version.py", "numpy/__config__.py"}
    assert all(source.path.is_file() and source.path.suffix == ".py" for source in sources)
    # whole files are held out, also where one is over 1 % of the text
    same = [max(sources, key=lambda source: source.size)] * 25
    assert list(prepare.local_documents(same, "val", corpus, prepare.make_meter())) == list(
        prepare.read_documents(same[0].path, prepare.make_meter(), 4 * corpus.seq_len)
    )


def test_a_corpus_of_fewer_files_than_one_in_so_many_still_has_validation_text(tmp_path):
    corpus, _ = prepare.choose_corpus(str(make_folder(tmp_path, files=110, lines=3)))
    sources = [prepare.Source(s.path, s.name, 5_000_000, s.stamp) for s in prepare.find_sources(corpus)]
    assert list(prepare.local_documents(sources, "val", corpus, prepare.make_meter()))


# tokenizer


@pytest.mark.parametrize("text", [MULTILINGUAL, every_plane(), unicodedata.normalize("NFD", MULTILINGUAL)])
def test_a_text_comes_back_and_its_tokens_have_as_many_bytes_as_it(tokenizer, text):
    ids, tokens = tokenizer.encode(text), tokenizer.tokens()
    assert tokenizer.decode(ids) == text
    assert b"".join(tokens[i] for i in ids) == text.encode()


def test_real_source_code_has_as_many_bytes_as_its_tokens(tokenizer, folder):
    tokens = tokenizer.tokens()
    for path in sorted(folder.rglob("*.py"))[:50]:
        text = path.read_text()
        assert b"".join(tokens[i] for i in tokenizer.encode(text)) == text.encode()


def test_specials_have_no_bytes_and_do_not_come_from_text(tokenizer):
    assert tokenizer.get_vocab_size() == tokenizer.corpus.vocab_size
    assert tokenizer.tokens()[-4:] == [b""] * 4
    assert all(tokenizer.tokens()[:-4])
    assert max(tokenizer.encode("".join(prepare.SPECIAL_TOKENS))) < tokenizer.get_bos_token_id()


def test_tiktoken_encodes_as_the_library_that_trained_the_merges(tokenizer, corpus, folder):
    documents = prepare.local_documents(prepare.find_sources(corpus), "train", corpus, prepare.make_meter())
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(documents, corpus.vocab_size - 4, pattern=prepare.SPLIT_PATTERN)
    for text in (MULTILINGUAL, every_plane(), (folder / "convert.py").read_text()):
        assert tokenizer.encode(text) == bpe.encode(text)


# token cache


def test_the_manifest_has_the_size_and_sha256_of_every_file(corpus):
    files = prepare.read_manifest(corpus.directory)["files"]
    assert set(files) == {"tokenizer.json", "val_rows.bin", "train_00000.tokens"}
    for name, entry in files.items():
        printed = subprocess.run(["sha256sum", corpus.directory / name], capture_output=True, text=True, check=True)
        assert printed.stdout.split()[0] == entry["sha256"]
        assert os.path.getsize(corpus.directory / name) == entry["size"]


def test_preparing_again_changes_nothing_and_preparing_anew_makes_the_same_bytes(corpus, folder, tmp_path, monkeypatch):
    before = (corpus.directory / prepare.MANIFEST).read_text()
    stamp = (corpus.directory / "val_rows.bin").stat().st_mtime_ns
    prepare.prepare(corpus, thorough=True)
    assert (corpus.directory / "val_rows.bin").stat().st_mtime_ns == stamp
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    anew, _ = prepare.choose_corpus(str(folder))
    prepare.prepare(anew)
    assert (anew.directory / prepare.MANIFEST).read_text() == before
    assert prepare.harness_fingerprint(anew) == prepare.harness_fingerprint(corpus)


def test_the_cached_tokens_are_the_text(corpus, tokenizer, folder):
    sources = prepare.find_sources(corpus)
    texts = set(prepare.local_documents(sources, "train", corpus, prepare.make_meter())) - set(
        prepare.local_documents(sources, "val", corpus, prepare.make_meter())
    )
    documents = itertools.takewhile(lambda item: item[1] == 1, prepare.train_documents(corpus, seed=7))
    decoded = set()
    for ids, _ in documents:
        assert ids[0] == tokenizer.get_bos_token_id()
        decoded.add(tokenizer.decode(ids[1:].tolist()))
    assert decoded == texts


@pytest.mark.parametrize(
    "texts",
    [
        [MULTILINGUAL, "b\n\n", " a", "<|reserved_1|>", "<|reserved_0", "|>"],
        [f"it says {prepare.BOS} here", MULTILINGUAL, prepare.BOS, "<|reserved_0|><|reserved_0|>"],
        ["a", " " * 1_000_000 + "b", "c" * 2_000_000],
    ],
    ids=["ordinary", "specials spelled out", "more spaces than tiktoken can take"],
)
def test_documents_encoded_together_are_those_encoded_alone(tokenizer, texts):
    bos = tokenizer.get_bos_token_id()
    together = np.concatenate(list(prepare.encode_documents(iter(texts * 3), tokenizer.encoding)))
    starts = np.flatnonzero(together == bos)
    assert [tokenizer.decode(ids[1:].tolist()) for ids in np.split(together, starts[1:])] == texts * 3
    if max(map(len, texts)) < 2**16:
        assert together.tolist() == [i for text in texts * 3 for i in (bos, *tokenizer.encode(text))]


def test_a_long_text_is_cut_alike_whatever_blocks_it_comes_in_and_nothing_is_lost(tmp_path):
    lines = [f"line {i} " + "word " * (i % 40) for i in range(150_000)]
    (tmp_path / "long.txt").write_text("\n".join(line + "\n" * (i % 9 == 0) for i, line in enumerate(lines)))
    assert (tmp_path / "long.txt").stat().st_size > 3 * 2**22
    documents = list(prepare.read_documents(tmp_path / "long.txt", prepare.make_meter(), 1000))
    assert max(map(len, documents)) <= 1000
    assert [line for document in documents for line in document.split("\n") if line] == lines


def test_a_folder_of_several_token_files_gives_every_document_once(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(prepare, "PIECE", 2**18)
    corpus, _ = prepare.choose_corpus(str(folder))
    prepare.prepare(corpus)
    files = [name for name in prepare.read_manifest(corpus.directory)["files"] if name.endswith(".tokens")]
    assert len(files) > 10
    sources, tokenizer, meter = prepare.find_sources(corpus), prepare.Tokenizer(corpus), prepare.make_meter()
    held_out = set(prepare.local_documents(sources, "val", corpus, meter))
    expected = [text for text in prepare.local_documents(sources, "train", corpus, meter) if text not in held_out]
    documents = itertools.takewhile(lambda item: item[1] == 1, prepare.train_documents(corpus, seed=7))
    assert sorted(tokenizer.decode(ids[1:].tolist()) for ids, _ in documents) == sorted(expected)


def test_text_that_was_added_to_the_folder_is_noticed(tmp_path, capsys):
    make_folder(tmp_path, files=60, lines=100)
    corpus, _ = prepare.choose_corpus(str(tmp_path))
    prepare.prepare(corpus)
    before = prepare.harness_fingerprint(corpus)
    make_folder(tmp_path / "more", files=100, lines=100)
    prepare.prepare(corpus)
    assert "from other text: making it again" in capsys.readouterr().out
    assert prepare.harness_fingerprint(corpus) != before


# dataloader


def naive_best_fit(documents, length, rows):
    """Packing as one would write it down: lists, a linear scan, no thought for speed."""
    waiting, packed = [], []
    documents = iter(documents)
    while len(packed) < rows:
        row = []
        while len(row) < length:
            while len(waiting) < 1000:
                waiting.append(list(next(documents)))
            room, best = length - len(row), None
            for i, document in enumerate(waiting):
                if len(document) <= room and (best is None or len(document) > len(waiting[best])):
                    best = i
            if best is None:
                best = min(range(len(waiting)), key=lambda i: len(waiting[i]))
            row += waiting.pop(best)[:room]
        packed.append(row)
    return packed


def take_rows(loader, rows):
    """The first rows that a loader gives: inputs with the last target."""
    taken = []
    for x, y, _ in loader:
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        taken += torch.cat([x, y[:, -1:]], dim=1).tolist()
        if len(taken) >= rows:
            loader.close()
            return taken[:rows]


def test_rows_are_those_of_a_naive_best_fit_packer(corpus, tokenizer):
    documents = (ids for ids, _ in prepare.train_documents(corpus, seed=5))
    expected = naive_best_fit(documents, 129, 300)
    assert take_rows(prepare.make_dataloader(tokenizer, 10, 128, "train", seed=5), 300) == expected


def test_long_tailed_documents_are_packed_like_naively_too():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 5000, int(size)).astype(np.uint16) for size in rng.lognormal(5, 1.2, 5000) + 1]
    rows = [row.tolist() for row, _ in itertools.islice(prepare.pack_rows(((d, 1) for d in documents), 257), 400)]
    assert rows == naive_best_fit(documents, 257, 400)


def test_rows_depend_on_the_seed_but_not_on_the_batch_size(tokenizer):
    one = take_rows(prepare.make_dataloader(tokenizer, 1, 256, "train"), 60)
    seven = take_rows(prepare.make_dataloader(tokenizer, 7, 256, "train"), 60)
    other = take_rows(prepare.make_dataloader(tokenizer, 7, 256, "train", seed=43), 60)
    assert one == seven
    assert one != other
    assert {row[0] for row in one} == {tokenizer.get_bos_token_id()}


def test_parts_of_the_text_have_no_document_in_common_and_are_all_of_it(corpus):
    def documents(part):
        items = prepare.train_documents(corpus, 7, part)
        return [ids.tobytes() for ids, _ in itertools.takewhile(lambda item: item[1] == 1, items)]

    whole, first, second = documents((0, 1)), documents((0, 0.3)), documents((0.3, 1))
    assert sorted(first + second) == sorted(whole)
    assert len(first) == round(0.3 * len(whole))


def test_a_part_without_documents_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"part \(0.5, 0.5\) of .* holds no document"):
        next(prepare.make_dataloader(tokenizer, 4, 256, "train", part=(0.5, 0.5)))


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_on_a_cpu(tokenizer, monkeypatch):
    here = take_rows(prepare.make_dataloader(tokenizer, 8, 256, "train"), 200)
    monkeypatch.setattr(prepare, "get_device", lambda: torch.device("cuda"))
    batch, _, _ = next(prepare.make_dataloader(tokenizer, 8, 256, "train"))
    assert batch.is_cuda
    assert take_rows(prepare.make_dataloader(tokenizer, 8, 256, "train"), 200) == here


def test_the_epoch_counts_passes_over_the_text(tmp_path):
    make_folder(tmp_path, files=60, lines=100)
    corpus, _ = prepare.choose_corpus(str(tmp_path))
    prepare.prepare(corpus)
    tokens = (corpus.directory / "train_00000.tokens").stat().st_size // 2
    loader = prepare.make_dataloader(prepare.Tokenizer(corpus), 16, 256, "train")
    epochs = [epoch for _, _, epoch in itertools.islice(loader, 2 * tokens // (16 * 257) + 50)]
    loader.close()
    assert epochs == sorted(epochs)
    assert {1, 2, 3} <= set(epochs)


def test_the_validation_split_gives_the_fixed_rows(corpus, tokenizer):
    rows = prepare.read_val_rows(corpus)
    assert take_rows(prepare.make_dataloader(tokenizer, 4, corpus.seq_len, "val"), 12) == rows[:12].tolist()


def test_an_unknown_split_is_refused(tokenizer):
    with pytest.raises(ValueError, match="split must be train or val"):
        next(prepare.make_dataloader(tokenizer, 4, 128, "test"))
