"""Documents, tokenizer, token cache and dataloader, each against something independent."""

import hashlib
import itertools
import json
import shutil
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rustbpe
import torch

import prepare

MULTILINGUAL = """The quick brown fox. Größe, façade, señor, Łódź, İstanbul.
Привет, мир! Καλημέρα κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया। 你好，世界。
こんにちは世界。안녕하세요 세계. สวัสดีชาวโลก 👩‍👩‍👧‍👦 🇺🇳 𝔘𝔫𝔦𝔠𝔬𝔡𝔢
e\u0301 \u200d\u200b\ufeff\t\r\n \0 1234567890 <|reserved_0|> <|endoftext|> it's WE'LL\n\n\n"""


def every_plane():
    """A character in 97 of every plane, and all that have a name in the planes that have few."""
    points = [*range(0, 0x110000, 97), *range(0x1F000, 0x20000), *range(0xE0000, 0xE01F0)]
    return "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)


def choose(folder):
    return prepare.choose_corpus(str(folder))


def splits_of(corpus):
    """The documents of the train and of the validation split, before duplicates are dropped."""
    sources = prepare.find_sources(corpus)
    return [list(prepare.local_documents(sources, corpus, split)) for split in ("train", "val")]


def first_epoch(corpus, seed=1, part=(0, 1)):
    """The ids of each document of the first epoch."""
    documents = prepare.train_documents(corpus, seed, part)
    return [ids for ids, _ in itertools.takewhile(lambda item: item[1] == 1, documents)]


def trained_texts(corpus):
    tokenizer = prepare.Tokenizer(corpus)
    return [tokenizer.decode(ids[1:].tolist()) for ids in first_epoch(corpus)]


# Documents --------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path, newline):
    paragraphs = [newline.join(f"line {i}.{j}" for j in range(i % 7 + 1)) for i in range(100)]
    (tmp_path / "a.txt").write_bytes((newline * 2).join(paragraphs).encode())
    documents = list(prepare.read_documents(tmp_path / "a.txt", 200))
    assert max(map(len, documents)) <= 200
    together = [part.strip() for text in documents for part in text.split(newline * 2)]
    assert together == paragraphs


def test_a_text_without_blank_lines_is_cut_at_lines(tmp_path):
    lines = [f"line {i} " + "word " * (i % 40) for i in range(5000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    documents = list(prepare.read_documents(tmp_path / "a.txt", 1000))
    assert max(map(len, documents)) <= 1000
    assert [line for text in documents for line in text.split("\n")] == lines


def test_a_text_without_any_line_is_cut_at_the_limit(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 25)
    assert list(prepare.read_documents(tmp_path / "a.txt", 10)) == ["x" * 10, "x" * 10, "x" * 5]


def test_every_kind_of_file_is_read_and_hidden_ones_are_not(tmp_path):
    lines = ["\ufeff" + json.dumps({"text": "from jsonl", "id": 1}), "", '{"text": ""}']
    (tmp_path / "a.TXT").write_text("from txt")
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    table = pa.table({"text": ["from parquet", None, ""], "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "c.parquet")
    large = pa.table({"text": pa.array(["from large_string"], pa.large_string())})
    pq.write_table(large, tmp_path / "d.parquet")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "e.txt").write_text("hidden")
    (tmp_path / ".f.txt").write_text("hidden")
    (tmp_path / "g.png").write_bytes(b"\x89PNG")
    train, val = splits_of(choose(tmp_path))
    assert sorted(train + val) == ["from jsonl", "from large_string", "from parquet", "from txt"]


def test_a_surrogate_without_its_pair_in_jsonl_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b \ud83d\ude00 nul\u0000"}')
    assert list(prepare.read_documents(tmp_path / "a.jsonl")) == ["a?b 😀 nul\0"]


# Splits -----------------------------------------------------------------------------------------


def make_folder(path, files=200, lines=40):
    """Text files in which every line names its file."""
    for i in range(files):
        where = path / f"part{i % 3}" / f"{i:03d}.txt"
        where.parent.mkdir(parents=True, exist_ok=True)
        lines_of_file = (f"file {i:03d} line {j} " + "word " * 60 for j in range(lines))
        where.write_text("\n\n".join(lines_of_file))
    return path


def test_whole_files_are_held_out_and_none_is_in_both_splits(tmp_path):
    splits = splits_of(choose(make_folder(tmp_path)))
    train, val = ({text.split()[1] for text in split} for split in splits)
    assert len(train | val) == 200
    assert not train & val
    assert 0.02 <= len(val) / 200 <= 0.05


def test_of_a_single_large_file_a_few_documents_are_held_out(tmp_path):
    paragraphs = (f"paragraph {i} " + "word " * 180 for i in range(1000))
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    train, val = splits_of(choose(tmp_path))
    assert not set(train) & set(val)
    assert 0.02 <= len(val) / (len(train) + len(val)) <= 0.05


def test_at_most_a_twentieth_of_the_text_is_held_out_wherever_large_files_stand(tmp_path):
    names = sorted((f"{i}.txt" for i in range(1280)), key=prepare.digest)
    for position, name in enumerate(names):
        size = 6_000 if position % 32 == 31 else 400
        (tmp_path / name).write_text("word " * (size // 5))
    train, val = splits_of(choose(tmp_path))
    assert 0 < sum(map(len, val)) <= 0.05 * sum(map(len, train + val))


@pytest.mark.parametrize("files", [1, 5, 31, 101, 110])
def test_a_few_files_are_enough_for_validation_text(tmp_path, files):
    assert all(splits_of(choose(make_folder(tmp_path, files, lines=300))))


def test_the_python_corpus_holds_only_files_that_are_the_same_on_every_platform():
    sources = prepare.find_sources(prepare.choose_corpus("python"))
    assert len(sources) > 5000
    names = {source.name for source in sources}
    assert "torch/nn/functional.py" in names
    assert not names & {"torch/version.py", "numpy/__config__.py"}
    assert all(source.path.is_file() and source.path.suffix == ".py" for source in sources)


def test_the_python_corpus_holds_out_whole_files_however_large_they_are():
    corpus = prepare.choose_corpus("python")
    sources = prepare.find_sources(corpus)[:96]
    held_out = sources[31::32]
    limit = 4 * corpus.seq_len
    documents = [t for source in held_out for t in prepare.read_documents(source.path, limit)]
    assert list(prepare.local_documents(sources, corpus, "val")) == documents
    alone = list(prepare.local_documents(sources[:1] * 32, corpus, "val"))
    assert alone == list(prepare.read_documents(sources[0].path, limit))


def test_a_document_that_stands_in_both_splits_is_dropped_from_train(tmp_path):
    texts = [f"text {i} " + "word " * 200 for i in range(2000)]
    for i in range(0, 2000, 2):
        texts[i + 1] = texts[i]
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "all.jsonl").write_text("".join(lines))
    corpus = choose(tmp_path)
    prepare.prepare(corpus)
    train, val = splits_of(corpus)
    assert set(train) & set(val)
    assert sorted(trained_texts(corpus)) == sorted(t for t in train if t not in set(val))


@pytest.mark.slow
def test_no_document_of_the_python_corpus_stands_in_both_splits():
    corpus = prepare.choose_corpus("python")
    prepare.prepare(corpus)
    train, val = splits_of(corpus)
    assert set(trained_texts(corpus)) == set(train) - set(val)


# Tokenizer --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [MULTILINGUAL, every_plane(), unicodedata.normalize("NFD", MULTILINGUAL), ""],
    ids=["multilingual", "every plane", "NFD", "empty"],
)
def test_a_text_comes_back_and_its_tokens_have_as_many_bytes_as_it(tokenizer, text):
    ids, tokens = tokenizer.encode(text), tokenizer.tokens()
    assert tokenizer.decode(ids) == text
    assert b"".join(tokens[i] for i in ids) == text.encode()


def test_special_tokens_have_no_bytes_and_do_not_come_from_text(tokenizer):
    assert tokenizer.get_vocab_size() == tokenizer.corpus.vocab_size
    assert tokenizer.tokens()[-4:] == [b""] * 4
    assert all(tokenizer.tokens()[:-4])
    spelled = tokenizer.encode("".join(prepare.SPECIAL_TOKENS))
    assert max(spelled) < tokenizer.get_bos_token_id()


def test_tiktoken_encodes_as_the_library_that_trained_the_merges(tokenizer, corpus, folder):
    train, _ = splits_of(corpus)
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(train, corpus.vocab_size - 4, pattern=prepare.SPLIT_PATTERN)
    for text in (MULTILINGUAL, every_plane(), (folder / "convert.py").read_text()):
        assert tokenizer.encode(text) == bpe.encode(text)


# Token cache ------------------------------------------------------------------------------------


def test_the_manifest_has_the_settings_and_the_size_and_sha256_of_every_file(corpus):
    manifest = json.loads((corpus.directory / "manifest.json").read_text())
    assert manifest["settings"]["vocab_size"] == corpus.vocab_size
    assert set(manifest["files"]) == {"tokenizer.json", "val_rows.bin", "train_00000.tokens"}
    for name, entry in manifest["files"].items():
        data = (corpus.directory / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_preparing_again_changes_nothing_and_elsewhere_it_makes_the_same_bytes(
    folder, tmp_path, monkeypatch
):
    text = shutil.copytree(folder / "algorithms" / "tests", tmp_path / "text")
    made = []
    for place in ("one", "other"):
        monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / place))
        corpus = choose(text)
        prepare.prepare(corpus)
        made.append({path.name: path.read_bytes() for path in corpus.directory.iterdir()})
    stamps = [path.stat().st_mtime_ns for path in corpus.directory.iterdir()]
    prepare.prepare(corpus, thorough=True)
    assert [path.stat().st_mtime_ns for path in corpus.directory.iterdir()] == stamps
    assert made[0] == made[1]


def test_the_cached_tokens_are_the_text(corpus, tokenizer):
    train, val = splits_of(corpus)
    expected = [text for text in train if text not in set(val)]
    assert sorted(trained_texts(corpus)) == sorted(expected)
    assert {ids[0] for ids in first_epoch(corpus)} == {tokenizer.get_bos_token_id()}


@pytest.mark.parametrize(
    "texts",
    [
        [MULTILINGUAL, "b\n\n", " a", "<|reserved_1|>", "<|reserved_0", "|>"],
        [f"it says {prepare.BOS} here", prepare.BOS, "<|reserved_0|><|reserved_0|>"],
    ],
    ids=["ordinary", "BOS spelled out"],
)
def test_documents_encoded_together_are_those_encoded_alone(tokenizer, texts):
    bos = tokenizer.get_bos_token_id()
    together = list(prepare.encode_documents(iter(texts * 3), tokenizer.encoding))
    assert [ids.tolist() for ids in together] == [[bos, *tokenizer.encode(t)] for t in texts * 3]
    assert [tokenizer.decode(ids[1:].tolist()) for ids in together] == texts * 3
    assert sum((ids == bos).sum() for ids in together) == len(together)


def test_a_million_spaces_and_a_word_without_an_end_are_encoded(tokenizer):
    for text in (" " * 1_000_000 + "b", "c" * 200_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# Dataloader -------------------------------------------------------------------------------------


def naive_best_fit(documents, length, rows):
    """Packing as one would write it down: lists, a linear scan, no thought for speed."""
    waiting, packed = [], []
    documents = iter(documents)
    while len(packed) < rows:
        row = []
        while len(row) < length:
            while len(waiting) < 1000 and (document := next(documents, None)) is not None:
                waiting.append(list(document))
            if not waiting:
                return packed
            room, best = length - len(row), None
            for i, document in enumerate(waiting):
                fits = len(document) <= room
                if fits and (best is None or len(document) > len(waiting[best])):
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
    documents = (ids for ids, _ in prepare.train_documents(corpus, 5, (0, 1)))
    expected = naive_best_fit(documents, 129, 200)
    assert take_rows(prepare.make_dataloader(tokenizer, 10, 128, "train", seed=5), 200) == expected


def test_long_tailed_documents_are_packed_like_naively_to_the_last():
    rng = np.random.default_rng(0)
    sizes = (rng.lognormal(4, 1.5, 2000) + 1).astype(int)
    documents = [rng.integers(0, 5000, size).astype(np.uint16) for size in sizes]
    packed = prepare.pack_rows(((ids, 1) for ids in documents), 257)
    assert [row.tolist() for row, _ in packed] == naive_best_fit(documents, 257, 10**6)


def test_rows_depend_on_the_seed_but_not_on_the_batch_size(tokenizer):
    one = take_rows(prepare.make_dataloader(tokenizer, 1, 256, "train"), 60)
    seven = take_rows(prepare.make_dataloader(tokenizer, 7, 256, "train"), 60)
    other = take_rows(prepare.make_dataloader(tokenizer, 7, 256, "train", seed=43), 60)
    assert one == seven
    assert one != other
    assert {row[0] for row in one} == {tokenizer.get_bos_token_id()}


def test_parts_of_the_text_share_no_document_and_are_all_of_it(corpus):
    parts = [(0, 1), (0, 0.3), (0.3, 1)]
    whole, first, second = ([i.tobytes() for i in first_epoch(corpus, 7, p)] for p in parts)
    assert sorted(first + second) == sorted(whole)
    assert len(first) == round(0.3 * len(whole))


def test_a_part_without_documents_is_refused(tokenizer):
    with pytest.raises(SystemExit, match=r"part \(0.5, 0.5\) of .* has no document"):
        next(prepare.make_dataloader(tokenizer, 4, 256, "train", part=(0.5, 0.5)))


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_on_a_cpu(tokenizer, monkeypatch):
    here = take_rows(prepare.make_dataloader(tokenizer, 8, 256, "train"), 200)
    monkeypatch.setattr(prepare, "get_device", lambda: torch.device("cuda"))
    batch, _, _ = next(prepare.make_dataloader(tokenizer, 8, 256, "train"))
    assert batch.is_cuda
    assert take_rows(prepare.make_dataloader(tokenizer, 8, 256, "train"), 200) == here


def test_the_epoch_counts_passes_over_the_text(tmp_path):
    corpus = choose(make_folder(tmp_path, files=60, lines=100))
    prepare.prepare(corpus)
    tokens = (corpus.directory / "train_00000.tokens").stat().st_size // 2
    loader = prepare.make_dataloader(prepare.Tokenizer(corpus), 16, 256, "train")
    batches = itertools.islice(loader, 2 * tokens // (16 * 257) + 50)
    epochs = [epoch for _, _, epoch in batches]
    loader.close()
    assert epochs == sorted(epochs)
    assert {1, 2, 3} <= set(epochs)


def test_the_validation_split_gives_the_fixed_rows_over_and_over(corpus, tokenizer):
    rows = prepare.read_val_rows(corpus).tolist()
    loader = prepare.make_dataloader(tokenizer, 64, corpus.seq_len, "val")
    assert take_rows(loader, len(rows) + 9) == rows + rows[:9]


@pytest.mark.parametrize(("split", "length"), [("test", 128), ("val", 257)])
def test_a_split_that_does_not_exist_is_refused(tokenizer, split, length):
    with pytest.raises(ValueError, match=rf"split '{split}', T {length}: expected"):
        next(prepare.make_dataloader(tokenizer, 4, length, split))
