"""The judge of autoresearch. Locked: an experiment changes train.py, never this file.

uv run prepare.py                      prepare the default corpus: climbmix with CUDA, else python
uv run prepare.py --corpus FOLDER      prepare your own text
uv run prepare.py check                verify all that is prepared, print the harness digest
uv run prepare.py log                  show the ledger of this branch and where the night stands
uv run prepare.py log keep "what"      log the last run in results.tsv; or discard, or crash
uv run prepare.py runs                 list the runs of this folder (--all: of every folder, --json)
uv run prepare.py audit                say what does not fit together in the ledger
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from harness import audit, ledger, record

# Command line -----------------------------------------------------------------------------------


def add_corpus_arguments(parser: ArgumentParser) -> None:
    """Add --corpus and --shards."""
    default = "$AUTORESEARCH_CORPUS, else climbmix with CUDA, python without"
    corpus_help = f"climbmix, python or a folder of text (default: {default})"
    parser.add_argument("--corpus", metavar="NAME", help=corpus_help)
    shards_help = "of climbmix, to train on (default: 10; -1: all)"
    parser.add_argument("--shards", metavar="N", type=int, help=shards_help)


def parse_arguments() -> Namespace:
    """Parse the command line."""
    commands = ["check", "log", "runs", "audit"]
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=commands, help="default: prepare a corpus")
    parser.add_argument("words", nargs="*", help="log: keep|discard|crash WHAT; audit: ledgers")
    add_corpus_arguments(parser)
    parser.add_argument("--all", action="store_true", help="of runs: those of every folder")
    parser.add_argument("--json", action="store_true", help="of runs: whole records, for programs")
    arguments = parser.parse_args()
    if arguments.words and arguments.command in ("check", "runs"):
        parser.error(f"unexpected: {arguments.words}")
    return arguments


def keep_books() -> int | None:
    """Run log, runs or audit, which need no torch; return the exit status."""
    arguments = parse_arguments()
    if arguments.command == "audit":
        return audit.print_audit(arguments.words or ["results.tsv"])
    if arguments.command == "runs":
        runs = record.read_runs()
        runs = runs if arguments.all else record.own_runs(runs)
        return print(json.dumps(runs)) if arguments.json else record.print_runs(runs)
    return ledger.log(*arguments.words) if arguments.words else ledger.show()


if __name__ == "__main__" and parse_arguments().command in ("log", "runs", "audit"):
    sys.exit(keep_books())

import base64
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import math
import os
import random
import re
import shlex
import time
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import rustbpe
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from harness.record import SEED, cache_root, digest, sha256_file

TIME_BUDGET = 300  # seconds of training in every run
Documents = Iterator[tuple[np.ndarray, int]]  # ids, uint16 (tokens,), and the epoch

# Corpora ----------------------------------------------------------------------------------------

CLIMBMIX_REPO = "karpathy/climbmix-400b-shuffle"
CLIMBMIX_TRAIN_SHARDS = 6542  # shard_00000 to shard_06541; shard_06542 is the validation shard

# Two files differ between the wheels for Linux and macOS, x86-64 and Arm.
PYTHON_PACKAGES = """torch sympy pandas numpy matplotlib networkx fonttools huggingface_hub
    setuptools pyarrow mpmath pillow fsspec jinja2 requests"""
PYTHON_LEFT_OUT = {"torch/version.py", "numpy/__config__.py"}

LARGE = {"vocab_size": 8192, "seq_len": 2048, "eval_tokens": 40 * 2**19}
SMALL = {"vocab_size": 4096, "seq_len": 256, "eval_tokens": 2**19}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a model is trained on and judged by: climbmix, python, or the user's folder."""

    name: str
    vocab_size: int
    seq_len: int  # tokens
    eval_tokens: int  # at most
    num_shards: int = 0  # climbmix: training shards
    folder: str = ""  # a user's text

    @property
    def command(self) -> str:
        """The command that prepares it."""
        shards = f" --shards {self.num_shards}" if self.num_shards else ""
        return f"uv run prepare.py --corpus {shlex.quote(self.folder or self.name)}{shards}"

    @functools.cached_property
    def directory(self) -> Path:
        """The folder of its tokens; another for other settings, text, or code that makes them."""
        stem = re.sub(r"\W", "_", Path(self.folder or self.name).name)
        return cache_root() / "tokens" / f"{stem}-{tokens_key(self)[:12]}"


def get_device() -> torch.device:
    """Return the device that every run on this machine uses."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_corpus(choice: str | None = None, num_shards: int | None = None) -> Corpus:
    """Return the corpus of --corpus, else of $AUTORESEARCH_CORPUS, else of the device; print it."""
    cuda, why = get_device().type == "cuda", ""
    choice = choice or os.environ.get("AUTORESEARCH_CORPUS")
    if not choice:
        choice = "climbmix" if cuda else "python"
        why = f" (the default {'with' if cuda else 'without'} CUDA; --corpus chooses another)"
    shards = CLIMBMIX_TRAIN_SHARDS if num_shards == -1 else num_shards
    if shards is not None and not (choice == "climbmix" and 0 < shards <= CLIMBMIX_TRAIN_SHARDS):
        expected = f"only climbmix has shards, 1 to {CLIMBMIX_TRAIN_SHARDS} (-1: all)"
        raise SystemExit(f"--shards {shards} with {choice}: {expected}")
    if choice == "climbmix":
        corpus = Corpus(choice, **LARGE, num_shards=shards or 10)
    elif choice == "python":
        corpus = Corpus(choice, **SMALL)
    else:
        folder = Path(os.path.realpath(os.path.expanduser(choice)))
        if not folder.is_dir():
            raise SystemExit(f"corpus {choice}: not climbmix, not python, and no folder: {folder}")
        corpus = Corpus("folder", **LARGE if cuda else SMALL, folder=str(folder))
    say(f"corpus: {corpus.folder or corpus.name}{why}")
    return corpus


def say(line: str) -> None:
    """Print a line at once, whatever characters the name of a file may hold."""
    print(line.encode("utf-8", "replace").decode(), flush=True)


SMALL_HERE = os.environ.get("AUTORESEARCH_CORPUS") == "python" or get_device().type == "cpu"
MAX_SEQ_LEN = (SMALL if SMALL_HERE else LARGE)["seq_len"]  # tokens, for scripts that import it

# Download ---------------------------------------------------------------------------------------

RETRY_SECONDS = (1, 2, 4, 8, 16, 32)  # between tries that bring nothing: outlasts a minute
STREAM = {"stream": True, "timeout": 30}  # seconds
FAILED = (requests.RequestException, ValueError, KeyError)  # no URL at all; a hub without size
BYTES = {"unit": "B", "unit_scale": True, "disable": None}  # no bar but on a terminal


def shard_url(name: str) -> str:
    """Return where the hub, or the mirror that $HF_ENDPOINT names, has a shard of climbmix."""
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{hub.rstrip('/')}/datasets/{CLIMBMIX_REPO}/resolve/main/{name}"


def file_size(path: Path) -> int:
    """Return the bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def fetch(part: Path, url: str) -> None:
    """Append what `part` lacks of a shard. Raises one of FAILED unless it then is the hub's."""
    token, done = os.environ.get("HF_TOKEN", "").strip(), file_size(part)
    if not re.fullmatch("[!-~]*", token):
        raise SystemExit("HF_TOKEN holds a character that no token has: copy it again, or unset it")
    headers = {"Range": f"bytes={done}-", "Accept-Encoding": "identity"}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}  # not sent on to another host
    os.environ["NETRC"] = os.devnull  # requests would send its passwords instead
    with requests.get(url, headers=headers, **STREAM) as answer:
        linked = [r.headers for r in (*answer.history, answer) if "X-Linked-ETag" in r.headers]
        if not linked and (answer.ok or answer.status_code in (401, 403, 404, 416)):
            seen = f"{url} answered {answer.status_code} without size and sha256 of a shard"
            raise SystemExit(f"{seen}: is HF_ENDPOINT right, if set, and HF_TOKEN?")
        if answer.status_code != 416:  # then `part` is complete, or longer than the shard
            answer.raise_for_status()
        size, sha256 = int(linked[0]["X-Linked-Size"]), linked[0]["X-Linked-ETag"].strip('"')
        if answer.status_code != 416:
            resumed = answer.status_code == 206  # else everything is sent
            bar = tqdm(desc=part.stem, total=size, initial=done * resumed, **BYTES)
            with part.open("ab" if resumed else "wb") as file, bar:
                for block in answer.iter_content(2**16):
                    bar.update(file.write(block))
    if file_size(part) < size and answer.status_code != 416:
        raise requests.RequestException(f"{file_size(part)} of {size} bytes came")
    if file_size(part) != size or sha256_file(part) != sha256:
        part.unlink(missing_ok=True)
        raise requests.RequestException("its sha256 was not the hub's, so it was deleted")


def download(path: Path, corpus: Corpus) -> None:
    """Download a shard, resuming a partial one. Raises SystemExit with what to do if it fails."""
    part, waits = path.with_name(f"{path.name}.part"), iter(RETRY_SECONDS)
    most = file_size(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            fetch(part, shard_url(path.name))
            return os.replace(part, path)
        except FAILED as error:
            problem = f"{type(error).__name__}: {error}".split("?")[0]  # a signed URL stays secret
        if file_size(part) > most:
            waits, most = iter(RETRY_SECONDS), file_size(part)
        if (wait := next(waits, None)) is None:
            raise SystemExit(
                f"{path.name} did not arrive ({problem}). `{corpus.command}` resumes it. "
                "No network? --corpus python needs none. A mirror? HF_ENDPOINT=https://..."
            )
        say(f"{path.name}: {problem}; next try in {wait} s")
        time.sleep(wait)


def shard_names(corpus: Corpus) -> list[str]:
    """Return the names of climbmix's shards: that for validation, then those to train on."""
    numbers = (CLIMBMIX_TRAIN_SHARDS, *range(corpus.num_shards))
    return [f"shard_{number:05d}.parquet" for number in numbers]


def read_shard(corpus: Corpus, name: str) -> Iterator[str]:
    """Yield the documents of a shard, which is downloaded if need be."""
    path = cache_root() / "climbmix" / name
    if not path.exists():
        download(path, corpus)
    return read_documents(path)


# Documents --------------------------------------------------------------------------------------

TEXT_SUFFIXES = """.txt .md .py .rst .tex .org .html .htm .xml .pyi .c .h .cc .cpp .hpp .cu .rs .go
    .java .kt .swift .js .ts .jsx .tsx .css .sh .rb .pl .php .lua .r .jl .sql .hs .ml .scala .yaml
    .yml .toml .ini .cfg .parquet .jsonl""".split()
HOLDOUT = 32  # one file in 32 is validation text; of a file above 1 % of all, one document in 32
TOO_SMALL = "The corpus is too small: it takes a few hundred KB to train and to be judged"


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of a local corpus. Nothing but its name decides its place, and so its split."""

    path: Path
    name: str
    size: int  # bytes
    stamp: str  # changes with the content: the sha256 that a package records, or the file's mtime


def find_sources(corpus: Corpus) -> list[Source]:
    """List the files of a local corpus in a fixed shuffled order. SystemExit if there are none."""
    sources = []
    for package in PYTHON_PACKAGES.split() if corpus.name == "python" else ():
        for file in importlib.metadata.files(package):
            name = str(file)
            is_source = file.suffix == ".py" and file.hash and ".." not in file.parts
            if is_source and name not in PYTHON_LEFT_OUT:
                sources.append(Source(Path(file.locate()), name, file.size, file.hash.value))
    for path in walk(corpus.folder) if corpus.folder else ():
        name, stat = path.relative_to(corpus.folder).as_posix(), path.stat()
        sources.append(Source(path, name, stat.st_size, str(stat.st_mtime_ns)))
    if not sources and corpus.name != "climbmix":
        raise SystemExit(
            f"{corpus.folder}: no text in it. These are read: {' '.join(TEXT_SUFFIXES)}"
        )
    return sorted(sources, key=lambda source: digest(source.name))


def fail(error: OSError) -> None:
    """Raise an error that would be passed over."""
    raise error


def walk(folder: str) -> Iterator[Path]:
    """Yield the text files in a folder, at any depth, but nothing hidden and not the cache."""
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            is_text = path.suffix.lower() in TEXT_SUFFIXES and path.is_file()
            if is_text and cache_root() not in path.parents:
                yield path


def split_text(path: Path, limit: int) -> Iterator[str]:
    """Cut a text into documents of at most `limit` characters, at blank lines, else at lines.

    Raises ValueError for what is binary, or not UTF-8.
    """
    text = path.read_bytes().decode()
    if "\0" in text:
        raise ValueError("binary")
    ends = (r"(?=\r?\n\r?\n|\Z)", r"(?=\r?\n|\Z)", "")
    pattern = "|".join(f".{{1,{limit}}}{end}" for end in ends)
    for match in re.finditer(pattern, text, re.DOTALL):
        yield match[0].strip("\r\n")


def read_jsonl(path: Path) -> Iterator[str]:
    """Yield what stands under "text" in each line. Raises SystemExit for a line without it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"] if line.strip() else ""
                yield text.encode("utf-8", "replace").decode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                seen = f'{path}:{number}: expected a JSON object with a string under "text"'
                raise SystemExit(f"{seen}, not {line[:40]!r}") from None


def read_parquet(path: Path) -> Iterator[str]:
    """Yield the column "text". Raises SystemExit if the file has none, or can't be read."""
    try:
        with pq.ParquetFile(path) as file:
            kind = file.schema_arrow.field("text").type
            if kind not in (pa.string(), pa.large_string()):
                raise TypeError(f"its type is {kind}")
            for batch in file.iter_batches(1024, columns=["text"]):
                yield from batch.column("text").to_pylist()
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        advice = 'expected a parquet file with strings in a column "text"'
        raise SystemExit(f"{path}: {advice} ({error})") from None


def read_documents(path: Path, limit: int = 0) -> Iterator[str]:
    """Yield the documents of a file; those of plain text have at most `limit` characters.

    Raises ValueError if it is not text, SystemExit for other than the format's documents.
    """
    if path.suffix.lower() == ".parquet":
        documents = read_parquet(path)
    elif path.suffix.lower() == ".jsonl":
        documents = read_jsonl(path)
    else:
        documents = split_text(path, limit)
    return filter(None, documents)


def local_documents(sources: list[Source], corpus: Corpus, split: str) -> Iterator[str]:
    """Yield the documents of one split of a local corpus.

    One file in HOLDOUT is validation text, but of a large file one document in HOLDOUT. Files that
    are not UTF-8 text are skipped with a message.
    """
    total, held_out, skipped = sum(source.size for source in sources), 0, []
    for position, source in enumerate(sources):
        whole = corpus.name == "python" or source.size <= total / 100
        is_val = position % HOLDOUT == HOLDOUT - 1 and held_out + source.size <= total / 20
        held_out += source.size * (whole and is_val)
        if whole and is_val != (split == "val"):
            continue
        try:
            for index, text in enumerate(read_documents(source.path, 4 * corpus.seq_len)):
                if whole or (index % HOLDOUT == HOLDOUT - 1) == (split == "val"):
                    yield text
        except ValueError as error:  # UnicodeDecodeError is one
            skipped.append(f"{source.path} ({error})")
    if skipped:
        say(f"skipped {len(skipped)} files that are not UTF-8 text, the first is {skipped[0]}")


# Tokenizer --------------------------------------------------------------------------------------

SPLIT_PATTERN = (  # GPT-4's, but with at most two digits in a token: a small vocabulary needs that
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]
BOS = SPECIAL_TOKENS[0]


def encode_text(encoding: tiktoken.Encoding, text: str, bos: Iterable[int] = ()) -> np.ndarray:
    """Return ids, uint16 (tokens,), `bos` first; special tokens in the text are plain text.

    It is cut into pieces, as a million spaces are too many for the split pattern.
    """
    pieces = re.findall("(?s).{1,65536}", text)
    ids = [encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([bos, *ids]).astype(np.uint16)


def build_encoding(saved: bytes) -> tiktoken.Encoding:
    """Build the encoding that tokenizer.json describes: ids of special tokens come last."""
    rules = json.loads(saved)
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(rules["tokens"])}
    special = {token: len(ranks) + i for i, token in enumerate(rules["special"])}
    options = {"mergeable_ranks": ranks, "special_tokens": special, "pat_str": rules["pattern"]}
    return tiktoken.Encoding("autoresearch", **options)


class Tokenizer:
    """Byte-pair encoding of a prepared corpus. SystemExit if its file is not the manifest's."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self.encoding = build_encoding(read_verified(corpus, "tokenizer.json"))

    @classmethod
    def from_directory(cls) -> "Tokenizer":
        """Load the tokenizer of the corpus that a run would take; it is prepared if need be."""
        corpus = choose_corpus()
        prepare(corpus)
        return cls(corpus)

    def get_vocab_size(self) -> int:
        """Return the number of token ids, special ones included."""
        return self.encoding.n_vocab

    def get_bos_token_id(self) -> int:
        """Return the id that every document and every row begins with."""
        return self.encoding.encode_single_token(BOS)

    def encode(self, text: str) -> list[int]:
        """Encode a text; special tokens in it are plain text."""
        return encode_text(self.encoding, text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids."""
        return self.encoding.decode(list(ids))

    def tokens(self) -> list[bytes]:
        """Return the raw bytes of each id, none for special ones: lengths add up to a text's."""
        ordinary = range(self.encoding.n_vocab - len(SPECIAL_TOKENS))
        decoded = map(self.encoding.decode_single_token_bytes, ordinary)
        return [*decoded, *[b""] * len(SPECIAL_TOKENS)]


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> str:
    """Train byte-pair merges on the first 10,000 characters of each document; return the JSON."""
    bpe, texts = rustbpe.Tokenizer(), (text[:10_000] for text in documents)
    num_ordinary = vocab_size - len(SPECIAL_TOKENS)
    bpe.train_from_iterator(texts, num_ordinary, pattern=SPLIT_PATTERN)
    merges = sorted(bpe.get_mergeable_ranks(), key=lambda merge: merge[1])
    tokens = [base64.b64encode(bytes(token)).decode() for token, _ in merges]
    saved = {"pattern": SPLIT_PATTERN, "special": SPECIAL_TOKENS, "tokens": tokens}
    return json.dumps(saved, indent=0)


# Token cache ------------------------------------------------------------------------------------


def make_files(corpus: Corpus) -> None:
    """Make the files that a corpus lacks, and that alone: a killed call is resumed by the next."""
    names, sources = iter(file_names(corpus)), find_sources(corpus)
    read, splits = functools.partial(local_documents, sources, corpus), ["val", "train"]
    if corpus.name == "climbmix":
        read, splits = functools.partial(read_shard, corpus), shard_names(corpus)
    val, *train = [functools.partial(read, split) for split in splits]
    with make_file(corpus, next(names)) as part:
        if part:  # the first training shard alone
            sample = itertools.islice(train[0](), 100_000 if corpus.num_shards else 2**15)
            part.write_text(train_tokenizer(sample, corpus.vocab_size))
    encoding = build_encoding((corpus.directory / "tokenizer.json").read_bytes())
    with make_file(corpus, next(names)) as part:
        if part:
            documents = ((ids, 1) for ids in encode_documents(val(), encoding))
            rows = (row for row, _ in pack_rows(documents, corpus.seq_len + 1))
            rows = list(itertools.islice(rows, corpus.eval_tokens // corpus.seq_len))
            if not rows:
                raise SystemExit(f"the validation split does not fill a row. {TOO_SMALL}")
            part.write_bytes(np.stack(rows).tobytes())
    val_hashes = None
    for name, documents in zip(names, train, strict=True):
        with make_file(corpus, name) as part:
            if part:
                val_hashes = val_hashes or {document_hash(text) for text in val()}
                texts = (text for text in documents() if document_hash(text) not in val_hashes)
                bar = tqdm(texts, desc=name, unit=" documents", disable=None)
                with part.open("wb") as file:
                    file.writelines(encode_documents(iter(bar), encoding))
                    if not file.tell():
                        raise SystemExit(f"nothing is left to train on. {TOO_SMALL}")


@contextlib.contextmanager
def make_file(corpus: Corpus, name: str) -> Iterator[Path | None]:
    """Yield where to write a file, None if it is there; it gets its name when it is whole."""
    path = corpus.directory / name
    if path.exists():
        yield None
        return
    say(f"making {name}")
    part = path.with_name(f"{name}.part")
    yield part
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def document_hash(text: str) -> bytes:
    """Return what stands for a document where many are remembered."""
    return hashlib.sha256(text.encode()).digest()


def encode_documents(texts: Iterator[str], encoding: tiktoken.Encoding) -> Iterator[np.ndarray]:
    """Yield the ids of each document, BOS first, uint16 (tokens,); on all cores."""
    bos = [encoding.encode_single_token(BOS)]
    encode = functools.partial(encode_text, encoding, bos=bos)
    with ThreadPoolExecutor() as pool:
        while batch := list(itertools.islice(texts, 2**12)):
            yield from pool.map(encode, batch)


def pack_rows(documents: Documents, length: int) -> Documents:
    """Pack (ids, epoch) into rows, uint16 (length,), without padding; yield (row, epoch).

    Best fit: of the next 1000 documents the longest that fits the room left, the earliest among
    equals; where none fits, the shortest is cropped. Documents begin with BOS, so every row does.
    """
    order, epoch = itertools.count(), 1
    buffer: list[tuple[int, int, np.ndarray]] = []  # sorted by length, then by order of arrival
    while True:
        row, room = np.empty(length, dtype=np.uint16), length
        while room:
            while len(buffer) < 1000 and (item := next(documents, None)):
                ids, epoch = item
                insort(buffer, (len(ids), next(order), ids[:length].copy()))  # no slice of its file
            if not buffer:
                return
            fits = bisect_left(buffer, (room + 1,))
            best = bisect_left(buffer, (buffer[fits - 1][0],)) if fits else 0
            ids = buffer.pop(best)[2][:room]
            row[length - room :][: len(ids)] = ids
            room -= len(ids)
        yield row, epoch


# Prepared files ---------------------------------------------------------------------------------

TOKEN_SECTIONS = ("Documents", "Tokenizer", "Token cache")
JUDGE_SOURCES = record.judge_sources()  # as they are when this process starts


def tokens_key(corpus: Corpus) -> str:
    """Return a digest of all that decides the tokens: this code, the settings, the source files."""
    parts = re.split(r"^# ([A-Z][\w ]+) -+$", Path(__file__).read_text("utf-8"), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    code = [record.strip_comments(sections[name]) for name in TOKEN_SECTIONS]
    text = [(source.name, source.size, source.stamp) for source in find_sources(corpus)]
    settings = (corpus.name, corpus.vocab_size, corpus.seq_len, corpus.eval_tokens)
    return digest(code, settings, text, CLIMBMIX_REPO, CLIMBMIX_TRAIN_SHARDS)


def read_manifest(corpus: Corpus) -> dict[str, dict]:
    """Return {name: {"size": bytes, "sha256": hex}} of what is prepared; {} if unfinished."""
    path = corpus.directory / "manifest.json"
    try:
        return json.loads(path.read_text())["files"] if path.exists() else {}
    except (ValueError, KeyError, TypeError) as error:
        advice = f"delete it, then `{corpus.command}`"
        raise SystemExit(f"{path} is damaged ({error!r}): {advice}") from None


def file_names(corpus: Corpus) -> list[str]:
    """Return the names of the files that a corpus consists of; a local one has one of tokens."""
    train = [f"train_{number:05d}.tokens" for number in range(corpus.num_shards or 1)]
    return ["tokenizer.json", "val_rows.bin", *train]


def find_damaged(corpus: Corpus, thorough: bool) -> list:
    """Return the files without the manifest's size or, if `thorough`, without its sha256."""
    manifest, names = read_manifest(corpus), file_names(corpus)

    def is_damaged(name: str) -> bool:
        path, entry = corpus.directory / name, manifest.get(name)
        if not entry or file_size(path) != entry.get("size"):
            return True
        return thorough and sha256_file(path) != entry.get("sha256")

    return [name for name in names if is_damaged(name)]


def read_verified(corpus: Corpus, name: str) -> bytes:
    """Return a prepared file's content. SystemExit if it is not what the manifest says."""
    path = corpus.directory / name
    data, entry = path.read_bytes() if path.exists() else b"", read_manifest(corpus).get(name, {})
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise SystemExit(f"{path} is missing or damaged: `{corpus.command}` rebuilds it")
    return data


def prepare(corpus: Corpus, thorough: bool = False) -> None:
    """Make the missing files; if `thorough`, the damaged ones. Safe to kill, or to run twice."""
    try:
        if not find_damaged(corpus, thorough):
            return
        with record.file_lock(cache_root() / "prepare.lock", "waiting for it"):
            corpus.directory.mkdir(parents=True, exist_ok=True)
            files = read_manifest(corpus)
            for name in find_damaged(corpus, thorough):
                if files.pop(name, None):  # else it is missing, or the manifest was not yet written
                    (corpus.directory / name).unlink(missing_ok=True)
            make_files(corpus)
            write_manifest(corpus, files)
    except OSError as error:
        advice = "give access, free some space, or set AUTORESEARCH_CACHE to another folder"
        raise SystemExit(f"{error}: {advice}. What is finished is kept") from None
    except KeyboardInterrupt:
        raise SystemExit(f"stopped. `{corpus.command}` resumes") from None


def write_manifest(corpus: Corpus, files: dict[str, dict]) -> None:
    """Enter all files that are not in it, and the settings, in the manifest."""
    for name in file_names(corpus):
        path = corpus.directory / name
        if name not in files:
            files[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    text = json.dumps({"settings": dataclasses.asdict(corpus), "files": files}, indent=1)
    record.write_file(corpus.directory / "manifest.json", text)


def harness_digest(corpus: Corpus) -> str:
    """Return 12 hex digits over the judge's code, corpus, tokenizer and validation rows.

    Two val_bpb compare only where it is equal.
    """
    files = read_manifest(corpus)
    made = [files[name]["sha256"] for name in file_names(corpus)]
    settings = corpus.name, corpus.vocab_size, corpus.seq_len, torch.__version__
    return digest(JUDGE_SOURCES, settings, made)[:12]


# Dataloader -------------------------------------------------------------------------------------


def train_documents(corpus: Corpus, seed: int, part: tuple[float, float]) -> Documents:
    """Yield (ids, epoch) for ever, slices of the memory map: files and documents are shuffled.

    `part`: from where to where of each file. In a local corpus documents of a file stand together.
    """
    bos, names = Tokenizer(corpus).get_bos_token_id(), file_names(corpus)[2:]
    for epoch in itertools.count(1):
        rng = np.random.default_rng([seed, epoch])
        for name in rng.permutation(names):
            tokens = np.asarray(np.memmap(corpus.directory / name, dtype=np.uint16, mode="r"))
            starts = np.append(np.flatnonzero(tokens == bos), len(tokens))
            first, end = (round(bound * (len(starts) - 1)) for bound in part)
            if first == end:
                raise SystemExit(f"part {part} of {name} has no document. {TOO_SMALL}")
            for i in first + rng.permutation(end - first):
                yield tokens[starts[i] : starts[i + 1]], epoch


def read_val_rows(corpus: Corpus) -> np.ndarray:
    """Return the rows that every run is judged by, uint16 (rows, seq_len + 1)."""
    data = read_verified(corpus, "val_rows.bin")
    return np.frombuffer(data, dtype=np.uint16).reshape(-1, corpus.seq_len + 1)


def make_dataloader(
    tokenizer: Tokenizer, B: int, T: int, split: str, seed: int = SEED, part: tuple = (0, 1)
) -> Iterator[tuple]:
    """Yield (x, y, epoch) for ever: inputs and targets, int64 (B, T), on the device.

    split: train, or val for the fixed rows over and over. Rows depend on corpus, T and seed alone.
    part: (0.5, 1) is the second half of each shard; parts that do not overlap share no document.
    """
    device, corpus = get_device(), tokenizer.corpus
    if split == "train":
        rows = pack_rows(train_documents(corpus, seed, part), T + 1)
    elif split == "val" and corpus.seq_len >= T:
        epochs = itertools.count(1)
        rows = ((row[: T + 1], epoch) for epoch in epochs for row in read_val_rows(corpus))
    else:
        expected = f"train, or val with T up to {corpus.seq_len}"
        raise ValueError(f"split {split!r}, T {T}: expected {expected}")

    def next_batch() -> tuple:
        picked, epochs = zip(*itertools.islice(rows, B), strict=True)
        batch = torch.from_numpy(np.stack(picked).view(np.int16))  # ids are below 2^15
        return batch.pin_memory() if device.type == "cuda" else batch, epochs[-1]

    worker = ThreadPoolExecutor(1, "dataloader")
    ready = [worker.submit(next_batch) for _ in range(4)]
    try:
        while True:
            batch, epoch = ready.pop(0).result()
            ready.append(worker.submit(next_batch))
            batch = batch.to(device, non_blocking=True)  # two bytes a token, eight below
            yield batch[:, :-1].long(), batch[:, 1:].long(), epoch
    finally:
        worker.shutdown(wait=False, cancel_futures=True)


# Evaluator --------------------------------------------------------------------------------------

PROBES = 8  # batches that are probed besides the first; more of small ones

# How far a probe may move losses, in nats: dev/LOG.md has what honest and leaking models moved.
MAX_LEAK = 0.003  # plus twice what moves when the same batch comes again
MAX_LOSS_NOISE = 0.5  # of a single loss when the same batch comes again
MAX_MEAN_NOISE = 0.003  # of their mean


@dataclasses.dataclass
class Probe:
    """A batch on which the model runs as it is, with later tokens changed, and once more."""

    batch: int  # its number
    x: Tensor  # (B, T)
    y: Tensor  # (B, T)
    last: Tensor  # (B, 1): the last position that stays
    changed: Tensor  # (B, T): x with other tokens after it
    losses: Tensor | None = None  # (B, T), of x
    moved: Tensor | None = None  # (B, T), of changed


@torch.no_grad()
def evaluate_bpb(model: nn.Module, tokenizer: Tokenizer, batch_size: int) -> float:
    """Return the bits per byte of a model on the validation rows; any vocabulary compares.

    `model(x)` gets ids, int64 (B, T), never targets, and returns logits (B, T, vocab). A batch that
    does not fit memory is halved. Raises ValueError for a model that can't be judged.
    """
    tokens = Tokenizer(tokenizer.corpus).tokens()  # not those that the caller may have changed
    rows, val_bpb = read_val_rows(tokenizer.corpus), None
    with evaluating(model):
        while val_bpb is None:
            try:
                val_bpb = judge(model, rows, tokens, batch_size)
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
            batch_size = (batch_size + 1) // 2
    return val_bpb


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each module afterwards into the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def judge(model: nn.Module, rows: np.ndarray, tokens: list[bytes], batch_size: int) -> float:
    """Return nats, summed in float64, over ln 2 and bytes; special tokens are in neither sum."""
    vocab_size, secret = len(tokens), random.SystemRandom()  # nobody knows what is drawn
    draw = torch.Generator().manual_seed(secret.getrandbits(63))
    chosen = secret.sample(range(len(rows)), min(PROBES + 64 // batch_size, len(rows)))
    probed = {0, *(row // batch_size for row in chosen)}
    sizes = torch.tensor([len(token) for token in tokens])
    nats, num_bytes, probes = 0.0, 0, []
    for number in range(math.ceil(len(rows) / batch_size)):
        numbers = np.arange(number * batch_size, (number + 1) * batch_size)
        batch = torch.from_numpy(rows[numbers % len(rows)].astype(np.int64))  # always one shape
        x, y = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        ask = functools.partial(compute_losses, model, y=y, vocab_size=vocab_size, batch=number)
        if number in probed:
            probe = make_probe(number, x, y, vocab_size, draw)
            for name, ids in secret.sample([("losses", x), ("moved", probe.changed)], 2):
                setattr(probe, name, ask(ids))  # in either order
            probes.append(probe)
        losses = probe.losses if number in probed else ask(x)
        lengths = sizes[y] * torch.from_numpy(numbers < len(rows))[:, None]  # 0 for a repeated row
        nats += losses[lengths > 0].sum(dtype=torch.float64).item()
        num_bytes += lengths.sum().item()
    noise = refuse_unrepeatable(model, probes, vocab_size)
    refuse_leaks(probes, noise)
    return nats / math.log(2) / num_bytes


def make_probe(number: int, x: Tensor, y: Tensor, vocab_size: int, draw: torch.Generator) -> Probe:
    """Draw a position for each row, and other tokens for all after it."""
    B, T = x.shape
    last = torch.randint(T - 1, (B, 1), generator=draw)
    shift = torch.randint(1, vocab_size, x.shape, generator=draw)
    changed = torch.where(torch.arange(T) > last, (x + shift) % vocab_size, x)
    return Probe(number, x, y, last, changed)


def compute_losses(model: nn.Module, x: Tensor, y: Tensor, vocab_size: int, batch: int) -> Tensor:
    """Return the nats of each target, float32 (B, T), on the CPU. ValueError for no logits."""
    device = next((p.device for p in model.parameters()), get_device())
    logits, expected = model(x.to(device)), (*x.shape, vocab_size)
    is_tensor = isinstance(logits, Tensor)
    if not is_tensor or logits.shape != expected or not logits.is_floating_point():
        seen = f"{logits.dtype} {tuple(logits.shape)}" if is_tensor else type(logits).__name__
        raise ValueError(f"model(x) must return float logits {expected}; it returned {seen}")
    pairs = zip(logits, y.to(device), strict=True)  # all logits in float32 may not fit memory
    rows = [F.cross_entropy(row.float(), targets, reduction="none") for row, targets in pairs]
    losses = torch.stack(rows).cpu()
    is_finite = logits.sum().isfinite() or logits.isfinite().all()  # the sum alone may overflow
    if not (is_finite and losses.isfinite().all()):
        seen = f"batch {batch}: logits from {logits.min():.3g} to {logits.max():.3g}"
        raise ValueError(f"{seen} are not finite in float32. To rule a token out, take -1e4")
    return losses


def describe_worst(moved: Tensor, probes: list[Probe]) -> str:
    """Say where losses, (probes, B, T), moved most, and by how much."""
    probe, row, position = torch.unravel_index(moved.argmax(), moved.shape)
    where = f"batch {probes[probe].batch}, row {row}, position {position}"
    return f"{where}: a loss moves by {moved.max():.3g} nats"


def refuse_unrepeatable(model: nn.Module, probes: list[Probe], vocab_size: int) -> Tensor:
    """Ask every probe again, its rows in another order; return how far losses move.

    That is (probes, B, T). Raises ValueError if it is too far.
    """
    again = []
    for probe in probes:
        order = torch.randperm(len(probe.x))
        losses = compute_losses(model, probe.x[order], probe.y[order], vocab_size, probe.batch)
        again.append(losses[order.argsort()])
    drift = torch.stack(again) - torch.stack([probe.losses for probe in probes])
    if drift.abs().max() > MAX_LOSS_NOISE or drift.mean().abs() > MAX_MEAN_NOISE:
        seen = describe_worst(drift.abs(), probes)
        raise ValueError(
            f"{seen} (the mean by {drift.mean():.3g}) when the batch comes again: the answer "
            "depends on earlier batches, or on chance as with dropout"
        )
    return drift.abs()


def refuse_leaks(probes: list[Probe], noise: Tensor) -> None:
    """Raise ValueError if losses depend on later tokens, or on other rows of the batch."""
    last = torch.stack([probe.last for probe in probes])
    moved = torch.stack([probe.moved - probe.losses for probe in probes]).abs()
    at = torch.arange(noise.size(2))
    leaks = moved[at <= last].max() > MAX_LEAK + 2 * noise.max()
    for seen in (at == last, at <= last):  # many small ones, those just before the change above all
        leaks |= moved[seen].mean() > MAX_LEAK + 2 * noise[seen].mean()
    if leaks:
        raise ValueError(
            f"{describe_worst(moved * (at <= last), probes)} when later tokens of all rows change: "
            "the model sees what it has to predict, or one row sees another. Fix its mask, window, "
            "shift or padding"
        )


# Main -------------------------------------------------------------------------------------------


def main() -> None:
    """Prepare a corpus, or check one."""
    arguments = parse_arguments()
    corpus = choose_corpus(arguments.corpus, arguments.shards)
    if not arguments.command:
        prepare(corpus, thorough=True)
    elif damaged := find_damaged(corpus, thorough=True):
        seen = f"missing or damaged in {corpus.directory}: {', '.join(damaged)}"
        raise SystemExit(f"{seen}. `{corpus.command}` rebuilds them")
    print(f"ready: {corpus.directory}\nharness: {harness_digest(corpus)}")


if __name__ == "__main__":
    main()
