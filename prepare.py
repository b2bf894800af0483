"""The judge of autoresearch. Locked: an experiment changes train.py, never this file.

uv run prepare.py                      prepare the default corpus: climbmix with CUDA, python without
uv run prepare.py --corpus FOLDER      prepare your own text
uv run prepare.py check                verify everything on disk, print the harness fingerprint
uv run prepare.py log                  print what was logged on this branch, and whether the last run has a row
uv run prepare.py log keep "what"      write the last run into results.tsv and commit that file; or discard, crash
"""

import argparse
import base64
import contextlib
import faulthandler
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
import types
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import rustbpe
import tiktoken
import torch
import torch.nn.functional as F
from torch.utils._triton import has_triton
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
TIME_BUDGET = 300  # seconds of training in every run
LATE = 15  # seconds that the last step may take beyond them
RUN_LIMIT = 600  # seconds after which a run ends itself, whatever it is doing
SEED = 42
LIVE_END = "\r\033[K" if sys.stdout.isatty() else ""  # wipes out the live line of a terminal
Result = TypeVar("Result")
DEVICE_LOCK = "/tmp/autoresearch-%s.lock"  # one for all users and cache folders of this machine

# Corpora --------------------------------------------------------------------------------------------------------------

CLIMBMIX_REPO = "karpathy/climbmix-400b-shuffle"
CLIMBMIX_REVISION = "main"  # until a commit is known; the manifest pins what came by its sha256
CLIMBMIX_TRAIN_SHARDS = 6542  # shard_00000 to shard_06541; shard_06542 is the validation shard

# Python source that uv.lock pins; two files differ between the wheels for Linux and macOS, x86-64 and Arm (2026-11-23).
PYTHON_PACKAGES = """torch sympy pandas numpy matplotlib networkx fonttools huggingface_hub setuptools pyarrow mpmath
    pillow fsspec jinja2 requests"""
PYTHON_LEFT_OUT = {"torch/version.py", "numpy/__config__.py"}
TEXT_SUFFIXES = """.txt .md .py .rst .tex .org .html .htm .xml .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .kt .swift .js
    .ts .jsx .tsx .css .sh .rb .pl .php .lua .r .jl .sql .hs .ml .scala .yaml .yml .toml .ini .cfg"""
TOO_SMALL = "The corpus is too small: a few hundred KB are the least to train on and be judged by."
LARGE = {"vocab_size": 8192, "seq_len": 2048, "eval_tokens": 40 * 2**19}
SMALL = {"vocab_size": 4096, "seq_len": 256, "eval_tokens": 2**19}  # chosen by measuring: README, "On a CPU"


@dataclass(frozen=True)
class Corpus:
    """What is trained on and judged by: climbmix, python, or the user's folder."""

    name: str
    directory: Path  # its place in the cache
    vocab_size: int
    seq_len: int  # tokens
    eval_tokens: int  # at most
    num_shards: int | None = None  # climbmix: training shards
    folder: str | None = None  # folder: where its text is

    @property
    def command(self) -> str:
        """The command that prepares it."""
        shards = f" --shards {self.num_shards}" if self.num_shards else ""
        return f"uv run prepare.py --corpus {shlex.quote(self.folder or self.name)}{shards}"


def cache_root() -> Path:
    """The cache folder: $AUTORESEARCH_CACHE, else $XDG_CACHE_HOME/autoresearch, else ~/.cache/autoresearch."""
    chosen, home = os.environ.get("AUTORESEARCH_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.realpath(os.path.expanduser(chosen or f"{home}/autoresearch")))


def get_device() -> torch.device:
    """The device that every run on this machine uses."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_corpus(choice: str | None = None, num_shards: int | None = None) -> tuple[Corpus, str]:
    """Return the corpus that `choice` (--corpus), else $AUTORESEARCH_CORPUS, else the device asks for, and why."""
    why, scale = "as asked for", LARGE if get_device().type == "cuda" else SMALL
    if not (choice := choice or os.environ.get("AUTORESEARCH_CORPUS")):
        choice, with_cuda = ("climbmix", "with") if scale is LARGE else ("python", "without")
        why = f"the default {with_cuda} CUDA; --corpus takes climbmix, python or a folder"
    num_all = CLIMBMIX_TRAIN_SHARDS
    if num_shards is not None and not (choice == "climbmix" and (0 < num_shards <= num_all or num_shards == -1)):
        raise SystemExit(f"--shards {num_shards} with {choice}: only climbmix has shards, 1 to {num_all} (-1: all)")
    if choice == "climbmix":
        number = num_all if num_shards == -1 else num_shards or 10
        return Corpus(choice, cache_root() / choice, **LARGE, num_shards=number), why
    if choice == "python":
        return Corpus(choice, cache_root() / choice, **SMALL), why
    folder = Path(os.path.realpath(os.path.expanduser(choice)))
    if not folder.is_dir():
        raise SystemExit(f"corpus {choice}: not climbmix, not python, and not a folder: {folder}")
    name = f"folder-{re.sub(r'[^a-zA-Z0-9_-]', '_', folder.name)}-{digest(str(folder), scale)[:8]}"
    return Corpus("folder", cache_root() / name, **scale, folder=str(folder)), why  # a CPU can't evaluate 20M tokens


def digest(*parts: object) -> str:
    """sha256, in hex, over the JSON of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SOURCE_SHA256 = sha256_file(Path(__file__))
SMALL_HERE = os.environ.get("AUTORESEARCH_CORPUS") == "python" or not torch.cuda.is_available()
MAX_SEQ_LEN = (SMALL if SMALL_HERE else LARGE)["seq_len"]  # tokens; for scripts that import it

# Progress -------------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Print a line, in place of a live one; the name of a file may hold what no terminal can show."""
    print(LIVE_END + line.encode("utf-8", "replace").decode(), flush=True)


def make_meter() -> tqdm:
    """A progress bar in bytes that prints nothing by itself: str() shows it, also where there is no terminal."""
    bar = "{desc}: {percentage:.0f} % |{bar:20}| {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
    return tqdm(disable=False, file=io.StringIO(), total=1, unit="B", unit_scale=True, bar_format=bar)


def begin(meter: tqdm, name: str, total: float = 0, done: float = 0) -> None:
    """Have a meter turn to the next thing, of which `done` bytes were there before."""
    meter.reset(total)
    meter.set_description_str(name, refresh=False)
    meter.n = meter.initial = done


say_once = functools.cache(say)  # for what is read more than once


@contextlib.contextmanager
def status_line(status: Callable[[], str]) -> Iterator[None]:
    """Show what `status` returns while the block runs: live on a terminal, elsewhere a line every half minute."""
    done, begin = threading.Event(), time.perf_counter()

    def show() -> None:
        while not done.wait(0.2 if LIVE_END else 30.0):
            line = f"{status()} ({time.perf_counter() - begin:.0f} s)"
            width = shutil.get_terminal_size().columns - 1 if LIVE_END else None
            print(f"{LIVE_END}{line[:width]}", end="\r" if LIVE_END else "\n", flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print(LIVE_END, end="", flush=True)


# Download -------------------------------------------------------------------------------------------------------------

RETRY_SECONDS = (1, 2, 4, 8, 16, 32)  # between tries that bring nothing new: a minute without the hub is outlasted
RETRY_AFTER = 300  # seconds at most that the hub may ask to be left alone
STALL_SECONDS = 30  # without a byte, then a connection is given up
OFFLINE_SECONDS = 6  # without any answer, then there is no network
FAILED = (requests.RequestException, ValueError)  # what a failed request raises: ValueError for what is no URL
TOKENS_SIZE = 1.25  # of a token file for each byte of its shard, an estimate: 2 bytes for each 4 of text, packed to 0.4


class Remote(NamedTuple):
    """A file as the hub describes it."""

    location: str  # where its bytes are: on another host as a rule, and signed for some minutes only
    size: int  # bytes
    sha256: str


def shard_names(corpus: Corpus) -> list[str]:
    """The shards of climbmix that a corpus needs, that for validation first; none of a local corpus."""
    numbers = (CLIMBMIX_TRAIN_SHARDS, *range(corpus.num_shards)) if corpus.num_shards else ()
    return [f"shard_{number:05d}.parquet" for number in numbers]


def shard_url(name: str) -> str:
    """Where the hub, or the mirror that $HF_ENDPOINT names, has a shard of climbmix."""
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{hub.rstrip('/')}/datasets/{CLIMBMIX_REPO}/resolve/{CLIMBMIX_REVISION}/{name}"


def ask(method: str, url: str, **options: object) -> requests.Response:
    """Send a HTTP request. HF_TOKEN goes along to the hub's own address alone, and no .netrc takes its place."""
    token, same = os.environ.get("HF_TOKEN", "").strip(), urlsplit(url)[:2] == urlsplit(shard_url(""))[:2]
    if not re.fullmatch("[!-~]*", token):
        raise SystemExit("HF_TOKEN holds a space or another character that no token has: copy it again, or unset it")

    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers.update({"Authorization": f"Bearer {token}"} if token and same else {})
        return request

    return requests.request(method, url, auth=authorize, timeout=STALL_SECONDS, **options)


def describe(url: str) -> Remote:
    """Ask the hub for size and sha256. Raises one of FAILED, and SystemExit where to ask again is no use."""
    location = url
    for _ in range(4):
        answer = ask("HEAD", location, allow_redirects=False)
        location = urljoin(location, answer.headers.get("Location", ""))
        if "X-Linked-ETag" in answer.headers or not answer.is_redirect:  # else the repository was renamed
            break
    if 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
        what = "set HF_TOKEN to a token that may read it" if answer.status_code in (401, 403) else "it has no such file"
        raise SystemExit(f"{url} answered {answer.status_code}: {what}. Is HF_ENDPOINT right, if set?")
    answer.raise_for_status()
    size, sha256 = answer.headers.get("X-Linked-Size", ""), answer.headers.get("X-Linked-ETag", "").strip('"')
    if not (re.fullmatch(r"[1-9]\d{0,15}", size) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise SystemExit(f"no size and sha256 (X-Linked-Size, X-Linked-ETag) came with {url}: no dataset hub")
    return Remote(location, int(size), sha256)


def explain(error: BaseException) -> str:
    """What is at the bottom of a failed request, without its URL, which may be signed."""
    if (answer := getattr(error, "response", None)) is not None:
        return f"HTTP {answer.status_code} {answer.reason}"
    if type(error) is requests.RequestException:
        return str(error)  # one of fetch
    while error.__context__:
        error = error.__context__
    return re.sub(r"\w+://[^\s'\"]+", "…", f"{type(error).__name__}: {error}")[:150]


def require_network(url: str) -> None:
    """Raise SystemExit if no answer of any kind comes within OFFLINE_SECONDS."""
    answered, problems = threading.Event(), ["no answer"]

    def knock() -> None:
        while not answered.is_set():
            try:
                with contextlib.suppress(SystemExit):  # the next request raises it again
                    ask("HEAD", url, allow_redirects=False)
                answered.set()
            except FAILED as error:
                problems.append(explain(error))
                time.sleep(1)

    threading.Thread(target=knock, daemon=True).start()  # looking up a name may hang for longer than any time-out
    if not answered.wait(OFFLINE_SECONDS):
        answered.set()
        seen = f"{url.split('/datasets/')[0]} can't be reached ({problems[-1]})"
        advice = "No network? `--corpus python` needs none. A mirror? HF_ENDPOINT=https://…"
        raise SystemExit(f"the shards did not arrive: {seen}. {advice}")


def retried(part: Path, attempt: Callable[[], Result]) -> Result:
    """Return what `attempt` returns, after waiting and trying again as long as it raises one of FAILED.

    Raises SystemExit if in all the tries of RETRY_SECONDS `part` has not grown beyond what it was at its largest.
    """
    furthest, waits = file_size(part), iter(RETRY_SECONDS)
    while True:
        try:
            return attempt()
        except FAILED as error:
            problem, answer = explain(error), getattr(error, "response", None)
        if file_size(part) > furthest:
            furthest, waits = file_size(part), iter(RETRY_SECONDS)
        if (wait := next(waits, None)) is None:
            raise SystemExit(f"{part.stem}: {problem}")
        if answer is not None and re.fullmatch(r"\d{1,9}", asked := answer.headers.get("Retry-After", "")):
            wait = max(wait, min(int(asked), RETRY_AFTER))
        say(f"{part.stem}: {problem}; next try in {wait} s")
        time.sleep(wait)


def fetch(part: Path, url: str, meter: tqdm) -> None:
    """Append to `part` what it lacks. Raises RequestException if it does not have the hub's size and sha256 then."""
    remote, done = describe(url), file_size(part)  # at every try, for a location soon expires
    if done < remote.size:
        ranges = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
        with ask("GET", remote.location, headers=ranges, stream=True) as answer:
            if done and answer.status_code in (200, 416):  # it comes from the start, or is shorter than the hub says
                meter.update(-done)
                part.unlink()
                done = 0
            answer.raise_for_status()
            with part.open("ab", buffering=0) as file:  # unbuffered: kill -9 loses nothing
                for block in answer.iter_content(2**13):
                    done += file.write(block)
                    meter.update(len(block))
                    if done > remote.size:
                        break
    if done < remote.size:
        raise requests.RequestException(f"{done} of {remote.size} bytes came")
    if done > remote.size or sha256_file(part) != remote.sha256:
        meter.update(-done)
        part.unlink()
        raise requests.RequestException(f"{done} bytes of another sha256 than the hub's came, and were thrown away")


def download(corpus: Corpus, names: list[str], meter: tqdm) -> None:
    """Download shards and enter them in the manifest. Raises SystemExit with what is missing, and what to do.

    If the hub refuses one, or the disk is too small, that is before the first byte.
    """
    require_network(shard_url(names[0]))
    begin(meter, f"asking for {len(names)} shards")
    parts = [corpus.directory / f"{name}.part" for name in names]
    for part in parts:
        if (path := part.with_suffix("")).exists() and not part.exists():
            os.replace(path, part)  # it is not as the manifest says: it may be whole all the same, or its beginning
    try:
        size = 0
        for part in parts:
            size += retried(part, functools.partial(describe, shard_url(part.stem))).size
        begun = sum(map(file_size, parts))
        needed, free = size * (1 + TOKENS_SIZE) - begun, shutil.disk_usage(corpus.directory).free
        if needed > free:
            seen = f"shards and their tokens need about {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free"
            raise SystemExit(f"{corpus.directory}: {seen}. Free some, set AUTORESEARCH_CACHE, or take fewer --shards")
        begin(meter, "", size, begun)
        for number, part in enumerate(parts):
            meter.set_description_str(f"download, {number} of {len(names)} shards", refresh=False)
            ensure(corpus, part.stem, lambda part: retried(part, lambda: fetch(part, shard_url(part.stem), meter)))
    except SystemExit as problem:
        missing = [name for name in names if not (corpus.directory / name).exists()]
        listed = ", ".join(missing[:12]) + f" and {len(missing) - 12} more" * (len(missing) > 12)
        again = f"What did is kept, and `{corpus.command}` goes on from there"
        raise SystemExit(f"{problem}\n{listed} did not arrive. {again}") from None


# Documents ------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A file of a local corpus. The order of files, and so the split, depends on nothing but their names."""

    path: Path
    name: str
    size: int  # bytes
    stamp: str  # changes with the content: sha256 from the package's RECORD (python), time of change (folder)


def find_sources(corpus: Corpus) -> list[Source]:
    """List the files of a local corpus in a fixed shuffled order. Raises SystemExit if there are none."""
    if corpus.name == "climbmix":
        return []
    sources, suffixes = [], {*TEXT_SUFFIXES.split(), ".parquet", ".jsonl"}
    for package in PYTHON_PACKAGES.split() if corpus.name == "python" else ():
        for file in importlib.metadata.files(package):
            name, kept = str(file), file.suffix == ".py" and file.hash and file.parts[0] != ".."
            if kept and name not in PYTHON_LEFT_OUT:
                sources.append(Source(Path(file.locate()), name, file.size, file.hash.value))

    def passed_over(error: OSError) -> None:
        say_once(f"skipped {error.filename}: {error.strerror}")

    for folder, folders, names in os.walk(corpus.folder, onerror=passed_over) if corpus.folder else ():
        folders[:] = [name for name in folders if not name.startswith(".") and Path(folder, name) != cache_root()]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in suffixes and path.is_file():
                name, stat = path.relative_to(corpus.folder).as_posix(), path.stat()
                sources.append(Source(path, name, stat.st_size, str(stat.st_mtime_ns)))
    if not sources:
        raise SystemExit(f"{corpus.folder}: no text in it. Read are, at any depth: {' '.join(sorted(suffixes))}")
    return sorted(sources, key=lambda source: digest(source.name))


def split_text(blocks: Iterable[str], limit: int) -> Iterator[str]:
    """Cut a text into documents of at most `limit` characters, at blank lines where there are some, else at lines.

    Raises ValueError for what is binary.
    """
    cuts, rest = (r"(?=\r?\n\r?\n|\Z)", r"(?=\r?\n|\Z)", ""), ""
    pattern = re.compile("|".join(f".{{1,{limit}}}{cut}" for cut in cuts), re.DOTALL)
    for block in itertools.chain(blocks, [""]):  # the empty one ends the text
        if "\0" in block:
            raise ValueError("binary")
        parts = pattern.findall(rest + block)
        rest = parts.pop() if block else ""  # it may go on in the next block
        yield from (document for part in parts if (document := part.strip("\r\n")))


def read_jsonl(file: BinaryIO) -> Iterator[str]:
    """Yield what stands under "text" in each line. Raises SystemExit for a line of anything else."""
    for number, line in enumerate(file, 1):
        try:
            yield json.loads(line)["text"].encode("utf-8", "replace").decode() if line.strip() else ""
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise SystemExit(f'{file.name}:{number}: expected a JSON object with a text under "text"') from None


def read_documents(path: Path, meter: tqdm, limit: int = 0) -> Iterator[str]:
    """Yield the documents of a file, streaming; those of plain text are cut to `limit` characters.

    Raises ValueError if it is not text, OSError if it is unreadable, SystemExit for other than the format's documents.
    """
    if path.suffix.lower() != ".parquet":
        with path.open("rb") as file:
            at, text_file = 0, io.TextIOWrapper(file, "utf-8", newline="")
            blocks = iter(lambda: text_file.read(2**22), "")
            for text in read_jsonl(file) if path.suffix.lower() == ".jsonl" else split_text(blocks, limit):
                meter.update(file.tell() - at)
                at = file.tell()
                if text:
                    yield text
        return
    try:
        with pq.ParquetFile(path) as file:
            if "text" not in (names := file.schema_arrow.names):
                raise SystemExit(f"{path}: no column text; its columns are {', '.join(names)}")
            if not (pa.types.is_string(kind := file.schema_arrow.field("text").type) or pa.types.is_large_string(kind)):
                raise SystemExit(f"{path}: its column text is of the type {kind}, not string")
            for batch in file.iter_batches(1024, columns=["text"]):
                meter.update(path.stat().st_size * batch.num_rows // file.metadata.num_rows)
                yield from filter(None, batch.column(0).to_pylist())
    except (pa.ArrowException, ValueError, OSError) as error:
        raise SystemExit(f"{path}: not a readable parquet file ({error})") from None


def local_documents(sources: list[Source], split: str, corpus: Corpus, meter: tqdm) -> Iterator[str]:
    """Yield the documents of one split of a local corpus, saying which files could not be read.

    One file in 25 is held out, but of a file above 1 % of the text one document in 25; fewer of a very large corpus.
    """
    total, skipped = sum(source.size for source in sources), []
    holdout = max(25, min(total // (8 * corpus.eval_tokens), len(sources) // 2))
    for position, source in enumerate(sources):
        whole = corpus.name == "python" or source.size <= total / 100
        if not whole or (position % holdout == holdout - 1) == (split == "val"):
            try:  # characters: about a row
                for index, text in enumerate(read_documents(source.path, meter, 4 * corpus.seq_len)):
                    if whole or (index % holdout == holdout - 1) == (split == "val"):
                        yield text
            except ValueError as error:  # UnicodeDecodeError is one
                skipped.append(f"{source.path} ({error})")
            except OSError as error:  # not skipped: what is held out must not depend on it
                raise SystemExit(f"{source.path}: {error.strerror}. Make it readable, or take it away") from None
        else:
            meter.update(source.size)
    if skipped:
        say_once(f"skipped {len(skipped)} files that are not UTF-8 text, the first is {skipped[0]}")


# Tokenizer ------------------------------------------------------------------------------------------------------------

SPLIT_PATTERN = (  # GPT-4's, but with at most two digits in a token: a small vocabulary has none to spare for numbers
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]
BOS = SPECIAL_TOKENS[0]


class Tokenizer:
    """Byte-pair encoding of a prepared corpus. Raises SystemExit if its file is not the manifest's."""

    def __init__(self, corpus: Corpus):
        self.corpus, saved = corpus, json.loads(verified(corpus, "tokenizer.json"))
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(saved["tokens"])}
        special = {token: len(ranks) + i for i, token in enumerate(saved["special"])}  # after all other ids
        rules = {"pat_str": saved["pattern"], "mergeable_ranks": ranks, "special_tokens": special}
        self.encoding = tiktoken.Encoding("autoresearch", **rules)

    @classmethod
    def from_directory(cls) -> "Tokenizer":
        """Load the tokenizer of the corpus that a run would take."""
        corpus, _ = choose_corpus()
        prepare(corpus)
        return cls(corpus)

    def get_vocab_size(self) -> int:
        """Number of token ids, specials included."""
        return self.encoding.n_vocab

    def get_bos_token_id(self) -> int:
        """The id that every document and every row begins with."""
        return self.encoding.encode_single_token(BOS)

    def encode(self, text: str) -> list[int]:
        """Encode a text; specials in it are plain text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids."""
        return self.encoding.decode(list(ids))

    def tokens(self) -> list[bytes]:
        """Raw bytes of each id, none of specials: over an encoded text they sum to len(text.encode()) exactly."""
        ordinary = range(self.encoding.n_vocab - len(SPECIAL_TOKENS))
        return [*map(self.encoding.decode_single_token_bytes, ordinary), *[b""] * len(SPECIAL_TOKENS)]


def train_tokenizer(part: Path, documents: Iterable[str], vocab_size: int) -> None:
    """Train byte-pair merges on the first 10,000 characters of each document."""
    bpe, texts = rustbpe.Tokenizer(), (text[:10_000] for text in documents)
    if (first := next(texts, None)) is None:
        raise SystemExit(f"there is no text that could be read. {TOO_SMALL}")
    bpe.train_from_iterator(itertools.chain([first], texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    merges = sorted(bpe.get_mergeable_ranks(), key=lambda merge: merge[1])
    tokens = [base64.b64encode(bytes(token)).decode() for token, _ in merges]
    part.write_text(json.dumps({"pattern": SPLIT_PATTERN, "special": SPECIAL_TOKENS, "tokens": tokens}, indent=0))


# Token cache ----------------------------------------------------------------------------------------------------------

MANIFEST = "manifest.json"
PIECE = 2**27  # bytes of text in a token file of a local corpus: the most that a kill costs, and the loader maps


def read_manifest(directory: Path) -> dict:
    """{"made_from": digests, "files": {name: {"size", "sha256", …}}} of a place in the cache."""
    path = directory / MANIFEST
    if not path.exists():
        return {"made_from": {}, "files": {}}
    try:
        manifest = json.loads(path.read_text())
        if manifest.pop("digest") != digest(manifest):
            raise ValueError("its digest is another")
        return manifest
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise SystemExit(f"{path} is damaged ({error!r}). Delete it, then `uv run prepare.py` makes it again") from None


def write_manifest(directory: Path, manifest: dict) -> None:
    """Write a manifest, with a digest of itself."""
    write(directory / MANIFEST, json.dumps(manifest | {"digest": digest(manifest)}, sort_keys=True))


def write(path: Path, line: str) -> None:
    """Write a file under another name, flush it to disk and rename it: it is whole or not there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(f"{line}\n")
    flush(part)
    os.replace(part, path)


def flush(path: Path) -> None:
    """Have a file on disk, whatever happens to the machine."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def file_size(path: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def is_whole(path: Path, entry: dict | None, thorough: bool = True) -> bool:
    """Whether a file has the size and, if `thorough`, the sha256 of its entry in the manifest."""
    same = entry and path.exists() and file_size(path) == entry["size"]
    return bool(same) and (not thorough or sha256_file(path) == entry["sha256"])


def damaged(corpus: Corpus, names: Iterable[str], thorough: bool = True) -> dict[str, str]:
    """Say what is wrong with files, by name, and what mends it. If `thorough` they are read, on all cores."""
    files = read_manifest(corpus.directory)["files"]

    def problem(name: str) -> str | None:
        path = corpus.directory / name
        seen = "damaged" if path.exists() else "missing"
        return None if is_whole(path, files.get(name), thorough) else f"{path} is {seen}. `{corpus.command}` mends it"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {name: found for name, found in zip(names, pool.map(problem, names), strict=True) if found}


def verified(corpus: Corpus, name: str) -> bytes:
    """Return the content of a prepared file. Raises SystemExit if it is missing or its sha256 is not the manifest's."""
    if problems := damaged(corpus, [name]):
        raise SystemExit(problems[name])
    return (corpus.directory / name).read_bytes()


def ensure(corpus: Corpus, name: str, make: Callable[[Path], dict | None]) -> dict:
    """Have `make` write a .part file, enter it and what it returns in the manifest, and only then give it its name.

    Killed in between, the next call finds a .part that is what the manifest says, and has only to rename it.
    """
    part, manifest = corpus.directory / f"{name}.part", read_manifest(corpus.directory)
    if not is_whole(part, manifest["files"].get(name)):
        try:
            more = make(part)
        except BaseException:
            if not name.endswith(".parquet"):  # of a download, what there is is gone on with
                part.unlink(missing_ok=True)
            raise
        flush(part)
        manifest["files"][name] = {"size": file_size(part), "sha256": sha256_file(part)} | (more or {})
        write_manifest(corpus.directory, manifest)
    os.replace(part, corpus.directory / name)
    say(f"{name}: {manifest['files'][name]['size'] / 1e6:.2f} MB")
    return manifest["files"][name]


@contextlib.contextmanager
def locked(path: Path, advice: str, wait: bool) -> Iterator[None]:
    """Hold a lock file that names its holder; the system lets it go with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+" if path.exists() else "a+") as lock:
        with contextlib.suppress(PermissionError):
            path.chmod(0o666)  # for a device, which other users share
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            message = f"{path} is held by process {lock.read()}: {advice}"
            if not wait:
                raise SystemExit(message) from None
            say(message)
            with status_line(lambda: "waiting"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        lock.truncate()
        print(os.getpid(), end="", file=lock, flush=True)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process that was forked would hold it on


@contextlib.contextmanager
def explained(corpus: Corpus) -> Iterator[None]:
    """Turn what the disk or the user can do to the block into SystemExit with what to do."""
    try:
        yield
    except OSError as error:
        advice = "Free some space, or set AUTORESEARCH_CACHE to a folder that can be written. Finished files are kept"
        raise SystemExit(f"can't write to or read from {corpus.directory}: {error}. {advice}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"stopped. What is finished is kept, and `{corpus.command}` goes on from there") from None


def prepare(corpus: Corpus, thorough: bool = False) -> None:
    """Make what is missing of a corpus, if `thorough` also what is damaged. Safe to kill and to run twice at once."""
    meter = make_meter()
    show = status_line(lambda: str(meter) if meter.total else meter.desc)
    with explained(corpus), locked(corpus.directory / "lock", "waiting for it", wait=True), show:
        build(corpus, thorough, meter)


def made_from(corpus: Corpus, sources: list[Source]) -> dict[str, str]:
    """Digests of what decides all that is in the cache."""
    text = digest([(source.name, source.size, source.stamp) for source in sources])
    scale = digest(corpus.vocab_size, corpus.seq_len, corpus.eval_tokens)
    return {"prepare.py": SOURCE_SHA256, "text": text, "configuration": scale}


def build(corpus: Corpus, thorough: bool, meter: tqdm) -> None:
    """Make the files of a corpus: shards to download, tokenizer.json, val_rows.bin, train_*.tokens."""
    directory, sources = corpus.directory, find_sources(corpus)
    if (manifest := read_manifest(directory))["made_from"] != (now := made_from(corpus, sources)):
        if manifest["files"]:
            say(f"{directory} was made by another prepare.py or from other text: making it again")
        for path in directory.iterdir():
            if re.fullmatch(r"(tokenizer\.json|val_rows\.bin|train_\d+\.tokens)(\.part)?", path.name):
                path.unlink()
        shards = {name: entry for name, entry in manifest["files"].items() if name.endswith(".parquet")}
        write_manifest(directory, {"made_from": now, "files": shards})
    files = read_manifest(directory)["files"]
    begin(meter, "reading what is prepared")
    whole = files.keys() - damaged(corpus, files, thorough).keys()

    if corpus.name == "climbmix":
        shards = shard_names(corpus)
        if missing := [name for name in shards if name not in whole]:
            download(corpus, missing, meter)
        val, *train = [functools.partial(read_documents, directory / name, meter) for name in shards]
        paths, piece, first = [directory / name for name in shards[1:]], math.inf, 100_000
    else:
        val, *train = [functools.partial(local_documents, sources, split, corpus, meter) for split in ("val", "train")]
        paths, piece, first = [source.path for source in sources], PIECE, 2**15

    if "tokenizer.json" not in whole:
        begin(meter, "tokenizer.json")
        texts = itertools.islice(train[0](), first)  # of the first shard alone
        ensure(corpus, "tokenizer.json", lambda part: train_tokenizer(part, texts, corpus.vocab_size))
    encoding, held_out, names = Tokenizer(corpus).encoding, None, []
    if "val_rows.bin" not in whole:
        begin(meter, "val_rows.bin")
        ensure(corpus, "val_rows.bin", lambda part: write_val_rows(part, val(), corpus, encoding))
    for documents in train:
        stream, entry = enumerate(documents(), 1), {"documents": 0, "last": False}
        while not entry["last"]:
            names.append(f"train_{len(names):05d}.tokens")
            if names[-1] not in whole:
                if held_out is None:
                    begin(meter, "what is held out")
                    held_out = {text_key(text.encode()) for text in val()}
                    unread = paths[len(names) - 1 :] if corpus.num_shards else paths
                    begin(meter, "tokens", sum(map(file_size, unread)))
                rest = itertools.dropwhile(lambda item, done=entry["documents"]: item[0] <= done, stream)
                make = functools.partial(write_tokens, stream=rest, held_out=held_out, encoding=encoding, size=piece)
                entry = ensure(corpus, names[-1], make)
            else:
                entry = files[names[-1]]
    token_files(corpus)


def token_files(corpus: Corpus) -> list[str]:
    """The files that a corpus trains on. Raises SystemExit if there is nothing in them."""
    files = read_manifest(corpus.directory)["files"]
    names = sorted(name for name in files if name.endswith(".tokens"))[: corpus.num_shards]
    if not (names := [name for name in names if files[name]["size"]]):
        raise SystemExit(f"no text to train on that is not in the validation text as well. {TOO_SMALL}")
    return names


def text_key(text: bytes) -> bytes:
    """What stands for a document where many are remembered: 16 bytes."""
    return hashlib.blake2b(text, digest_size=16).digest()


def write_val_rows(part: Path, documents: Iterator[str], corpus: Corpus, encoding: tiktoken.Encoding) -> None:
    """Pack held-out documents into the rows that every run is judged by."""
    bos = encoding.encode_single_token(BOS)
    encoded = (
        (ids, 1)
        for tokens in encode_documents(documents, encoding)
        for ids in np.split(tokens, np.flatnonzero(tokens == bos)[1:])
    )
    rows = itertools.islice(pack_rows(encoded, corpus.seq_len + 1), corpus.eval_tokens // corpus.seq_len)
    if not (rows := [row for row, _ in rows]):
        raise SystemExit(f"the text held out for validation does not fill {corpus.seq_len} tokens. {TOO_SMALL}")
    part.write_bytes(np.stack(rows).tobytes())


def write_tokens(part: Path, stream: Iterator, held_out: set[bytes], encoding: tiktoken.Encoding, size: float) -> dict:
    """Write tokens of the next (number, document) of a stream, of about `size` bytes, without what is held out.

    Returns {"documents": the number of the last one, "last": whether there is none after it}.
    """
    number = 0

    def kept() -> Iterator[str]:
        nonlocal number, size
        for count, text in stream:
            number, data = count, text.encode()
            if text_key(data) not in held_out:  # no document stands in both splits
                yield text
            if (size := size - len(data)) <= 0:
                return

    with part.open("wb") as file:
        file.writelines(encode_documents(kept(), encoding))
    return {"documents": number, "last": size > 0}


def encode_documents(documents: Iterator[str], encoding: tiktoken.Encoding) -> Iterator[np.ndarray]:
    """Yield the ids of many documents at a time, BOS before each, uint16 (tokens,), on all cores."""
    bos = encoding.encode_single_token(BOS)

    def encode(texts: list[str]) -> np.ndarray:
        try:
            if any(BOS in text or len(text) > 2**20 for text in texts):
                raise ValueError("what spells BOS is text, and a word of a million letters takes very long")
            ids = encoding.encode_to_numpy(BOS + BOS.join(texts), allowed_special={BOS}, disallowed_special=())
        except ValueError:  # or it has more spaces in a row than the split pattern can take
            cut = ((text[at : at + 2**16], not at) for text in texts for at in range(0, len(text), 2**16))
            ids = [i for text, first in cut for i in (*[bos] * first, *encoding.encode_ordinary(text))]
        return np.asarray(ids, dtype=np.uint16)

    with ThreadPoolExecutor(threads := os.cpu_count() or 1) as pool:
        batches = iter(lambda: list(itertools.islice(documents, 32)), [])
        running = [pool.submit(encode, batch) for batch in itertools.islice(batches, 2 * threads)]
        while running:
            yield running.pop(0).result()
            running.extend(pool.submit(encode, batch) for batch in itertools.islice(batches, 1))


def harness_fingerprint(corpus: Corpus) -> str:
    """12 hex digits over this file, corpus, tokenizer and validation rows: val_bpb compare only where it is equal."""
    files = read_manifest(corpus.directory)["files"]
    settings = (corpus.name, corpus.vocab_size, corpus.seq_len, corpus.num_shards)
    return digest(SOURCE_SHA256, settings, files["tokenizer.json"]["sha256"], files["val_rows.bin"]["sha256"])[:12]


# Dataloader -----------------------------------------------------------------------------------------------------------


def pack_rows(documents: Iterable[tuple[np.ndarray, int]], length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pack (ids, epoch) into rows, uint16 (length,), without padding; yield them with the epoch.

    Best fit: of the next 1000 documents the longest that fits the room left, the earliest among equals; where none
    fits, the shortest is cropped to fill the row. Every document begins with BOS, so every row does.
    """
    documents, order, epoch = iter(documents), itertools.count(), 1
    buffer: list[tuple[int, int, np.ndarray]] = []  # sorted by length, then by order of arrival
    while True:
        row, room = np.empty(length, dtype=np.uint16), length
        while room:
            while len(buffer) < 1000 and (item := next(documents, None)):
                ids, epoch = item
                insort(buffer, (len(ids), next(order), ids[:length].copy()))  # a slice would keep its file in memory
            if not buffer:
                return
            fits = bisect_left(buffer, (room + 1,))
            best = bisect_left(buffer, (buffer[fits - 1][0],)) if fits else 0
            size, _, ids = buffer.pop(best)
            size = min(size, room)
            row[length - room :][:size] = ids[:size]
            room -= size
        yield row, epoch


def train_documents(corpus: Corpus, seed: int, part: tuple = (0, 1)) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (ids, epoch) for ever, slices of the memory-mapped tokens: shards shuffled, documents shuffled in each.

    `part`: from where to where of each shard. In a local corpus documents of one file stand together.
    """
    names, bos = token_files(corpus), Tokenizer(corpus).get_bos_token_id()
    for epoch in itertools.count(1):
        rng, documents = np.random.default_rng([seed, epoch]), 0
        for name in rng.permutation(names):
            tokens = np.asarray(np.memmap(corpus.directory / name, dtype=np.uint16, mode="r"))
            starts = np.append(np.flatnonzero(tokens == bos), len(tokens))
            first, end = (round(bound * (len(starts) - 1)) for bound in part)
            documents += end - first
            for i in first + rng.permutation(end - first):
                yield tokens[starts[i] : starts[i + 1]], epoch
        if not documents:
            raise ValueError(f"part {part} of {corpus.directory} holds no document")


def read_val_rows(corpus: Corpus) -> np.ndarray:
    """The rows that every run is judged by: uint16, (rows, seq_len + 1). Raises SystemExit if they were changed."""
    return np.frombuffer(verified(corpus, "val_rows.bin"), dtype=np.uint16).reshape(-1, corpus.seq_len + 1)


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str, seed=SEED, part=(0, 1)) -> Iterator[tuple]:
    """Yield (x, y, epoch) for ever: inputs and targets, int64 (B, T), on the device, made ready by a background thread.

    `split` is train, or val for the fixed rows over and over. The rows depend on corpus, T and seed, not on B. `part`:
    (0.5, 1) is the second half of each shard; parts that do not overlap have no document in common.
    """
    device, corpus = get_device(), tokenizer.corpus
    if split == "train":
        rows = pack_rows(train_documents(corpus, seed, part), T + 1)
    elif split == "val" and corpus.seq_len >= T:
        rows = ((row[: T + 1], epoch) for epoch in itertools.count(1) for row in read_val_rows(corpus))
    else:
        raise ValueError(f"split={split!r}, T={T}: split must be train or val, and T for val at most {corpus.seq_len}")

    def next_batch() -> tuple[torch.Tensor, int]:
        picked, epochs = zip(*itertools.islice(rows, B), strict=True)
        batch = torch.from_numpy(np.stack(picked).view(np.int16))  # PyTorch does little with uint16; ids are below 2^15
        return batch.pin_memory() if device.type == "cuda" else batch, epochs[-1]

    worker = ThreadPoolExecutor(1, "dataloader")
    ready = [worker.submit(next_batch) for _ in range(4)]
    try:
        while True:
            batch, epoch = ready.pop(0).result()
            ready.append(worker.submit(next_batch))
            batch = batch.to(device, non_blocking=True)  # two bytes a token: a quarter of what goes to the model
            yield batch[:, :-1].long(), batch[:, 1:].long(), epoch
    finally:
        worker.shutdown(wait=False, cancel_futures=True)


# Evaluator ------------------------------------------------------------------------------------------------------------


AUDITS = 8  # batches audited besides the first, drawn at random in every evaluation; more of small ones

# How far an audit may move losses, in nats. In two runs of tests/bench_judge.py (2026-11-23) honest models moved none
# by a bit, in float32 or bfloat16; one whose layers all round to bfloat16 at random, worse than any kernel, moved
# single ones by 0.11 and the mean by 0.0004. So twice what moves when a batch comes again is added. The least leak of
# one head of one block that sees one token ahead moved a loss by 0.028, nine times TOLERANCE, though val_bpb by 0.0007.
TOLERANCE = 0.003
UNSTEADY = 0.5  # most that a loss, and
DRIFT = 0.003  # that the mean may move when the same batch comes again


@torch.no_grad()
def evaluate_bpb(model: torch.nn.Module, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of the model on the validation rows; unlike the loss it is the same thing for every vocabulary.

    `model(x)` gets ids, int64 (B, T), never targets, and returns logits, (B, T, vocab). A batch too big is halved.
    Raises ValueError for a model that can't be judged: bad logits, a look at what is to be predicted, a state.
    """
    corpus, tokens = tokenizer.corpus, Tokenizer(tokenizer.corpus).tokens()
    if tokenizer.tokens() != tokens:
        raise ValueError(f"the tokenizer handed over is not that of {corpus.directory}, which the rows are made with")
    if batch_size < 1:
        raise ValueError(f"a batch of {batch_size} rows: expected 1 or more")
    rows, before, val_bpb = read_val_rows(corpus), digest_tensors(model.parameters()), None
    with evaluating(model):
        while val_bpb is None:
            try:
                val_bpb = judge(model, rows, tokens, batch_size)
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
            batch_size = (batch_size + 1) // 2
    if digest_tensors(model.parameters()) != before:
        raise ValueError("parameters changed during the evaluation: a model is judged as it is, not while it learns")
    return val_bpb


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; give each part back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def judge(model: torch.nn.Module, rows: np.ndarray, tokens: list[bytes], batch_size: int) -> float:
    """Cross-entropy in float32, summed in float64, without tokens of no bytes (specials), over ln 2 and the bytes.

    Audited batches are answered three times: as they are; with every row changed after a random position, which must
    not move a loss before it; and again at the end, their rows in another order, which must not move any.
    """
    vocab, length, secret = len(tokens), rows.shape[1] - 1, random.SystemRandom()
    draw = torch.Generator().manual_seed(secret.getrandbits(63))  # no model knows what is drawn
    chosen = secret.sample(range(len(rows)), min(AUDITS + 64 // batch_size, len(rows)))
    audited = {0, *(row // batch_size for row in chosen)}
    sizes, nats, size, audits = torch.tensor([len(token) for token in tokens]), 0.0, 0, []
    for number in range(-(-len(rows) // batch_size)):
        numbers = np.arange(number * batch_size, (number + 1) * batch_size)
        batch = torch.from_numpy(rows[numbers % len(rows)].astype(np.int64))  # one shape: nothing is compiled twice
        x, y = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        inputs = {"x": x}
        if number in audited:
            last = torch.randint(length - 1, (batch_size, 1), generator=draw)
            other = torch.randint(1, vocab, x.shape, generator=draw) * (torch.arange(length) > last)
            inputs["changed"] = (x + other) % vocab
        calls = secret.sample(sorted(inputs), len(inputs))
        losses = {name: token_losses(model, inputs[name], y, vocab, number) for name in calls}
        if number in audited:
            audits.append((number, x, y, last, inputs["changed"], losses["x"], losses["changed"]))
        counted = torch.from_numpy(numbers < len(rows))[:, None] & (sizes[y] > 0)
        nats += losses["x"][counted].sum(dtype=torch.float64).item()
        size += sizes[y][counted].sum().item()
    refuse_leaks(model, vocab, audits)
    return nats / math.log(2) / size


def token_losses(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, vocab: int, batch: int) -> torch.Tensor:
    """Nats of each target, float32 (B, T), on the CPU. Raises ValueError for what are no logits."""
    device = next((p.device for p in model.parameters()), get_device())
    logits = model(x.to(device))
    tensor = isinstance(logits, torch.Tensor)
    if not tensor or logits.shape != (*x.shape, vocab) or not logits.is_floating_point():
        seen = f"{logits.dtype} {tuple(logits.shape)}" if tensor else type(logits).__name__
        raise ValueError(f"model(x) must return floating-point logits {(*x.shape, vocab)}; it returned {seen}")
    if not logits.sum().isfinite() and not (finite := logits.isfinite()).all():
        row, position, token = (~finite).nonzero()[0].tolist()
        where = f"batch {batch}, row {row}, position {position}, token {token}"
        raise ValueError(
            f"a logit is not finite: {logits[row, position, token].item()} at {where}. For never, -1e4 will do"
        )
    pairs = zip(logits, y.to(device), strict=True)  # row by row: a float32 copy of all logits may not fit memory
    losses = torch.stack([F.cross_entropy(row.float(), target, reduction="none") for row, target in pairs]).cpu()
    if not losses.isfinite().all():
        raise ValueError(f"batch {batch}: logits of up to {logits.abs().max().item():.3g} are too large for float32")
    return losses


def refuse_leaks(model: torch.nn.Module, vocab: int, audits: list[tuple]) -> None:
    """Raise ValueError if audits show losses that depend on later tokens, on other rows, or on what came before.

    An audit: the batch's number, x, y, the last position of each row that stayed, changed x, losses of x and of that.
    """
    numbers, *tensors = zip(*audits, strict=True)
    xs, ys, last, changed, losses, moved = map(torch.stack, tensors)
    again = []
    for number, x, y, *_ in audits:
        order = torch.randperm(len(x))
        again.append(token_losses(model, x[order], y[order], vocab, number)[order.argsort()])
    drift = torch.stack(again) - losses
    noise, moved, at = drift.abs(), (moved - losses).abs(), torch.arange(losses.shape[2])
    steady = noise.max() <= UNSTEADY and drift.mean().abs() <= DRIFT
    leaks = moved[at <= last].max() > TOLERANCE + 2 * noise.max()  # in single losses, or in many: those just before
    leaks |= any(moved[seen].mean() > TOLERANCE + 2 * noise[seen].mean() for seen in (at == last, at <= last))
    if steady and not leaks:
        return
    worst = moved * (at <= last) if steady else noise
    audit, row, position = (i.item() for i in torch.unravel_index(worst.argmax(), worst.shape))
    seen = f"batch {numbers[audit]}, row {row}, position {position}: the loss moves by {worst.max():.3g} nats"
    if not steady:
        what = "the answer depends on earlier batches, or on chance as with dropout"
        raise ValueError(f"{seen} (the mean by {drift.mean():.3g}) when the batch comes again: {what}")
    others = torch.where(torch.arange(len(xs[audit]))[:, None] == row, xs[audit], changed[audit])
    others = token_losses(model, others, ys[audit], vocab, numbers[audit])[row, position]
    if (others - losses[audit, row, position]).abs() > worst.max() / 2:
        raise ValueError(f"{seen} when other rows of the batch change: a row must be predicted from itself alone")
    what = f"when tokens after position {last[audit, row].item()} change: the model sees what it has to predict"
    raise ValueError(f"{seen} {what}. Mend mask, window, shift or padding")


def digest_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """A digest of all bits of tensors."""
    data = (tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy() for tensor in tensors)
    return digest([hashlib.sha256(bits).hexdigest() for bits in data])


# Device ---------------------------------------------------------------------------------------------------------------


@functools.cache
def load_kernel(repo_id: str, revision: str) -> types.ModuleType:
    """Load an organization's kernel, without asking the hub if it was downloaded. Raises whatever is in the way."""
    from huggingface_hub import constants, utils
    from kernels import get_kernel, get_local_kernel, install_kernel

    logging.getLogger("kernels").setLevel(logging.ERROR)
    if repo_id in os.environ.get("LOCAL_KERNELS", ""):  # repository=folder, a build of your own
        return get_kernel(repo_id, revision=revision)
    try:
        path = install_kernel(repo_id, revision=revision, local_files_only=True)
    except Exception:
        if constants.HF_HUB_OFFLINE:
            raise
        pool, url = ThreadPool(2), f"{constants.ENDPOINT}/api/organizations/{repo_id.split('/')[0]}/overview"
        pool.apply_async(requests.get, [url], {"timeout": 2}).get(3).raise_for_status()  # looking up a name may hang
        print(f"downloading {repo_id}, once", flush=True)
        utils.disable_progress_bars()
        path = pool.apply_async(install_kernel, [repo_id], {"revision": revision}).get(60)
    return get_local_kernel(path)


def choose_precision(device: torch.device) -> tuple[torch.dtype, bool, str]:
    """Return the dtype to compute in, whether to compile, and why."""
    compiler = any(map(shutil.which, ("gcc", "g++", "clang", "clang++")))
    if device.type == "cuda":
        works = compiler and has_triton()
        return torch.bfloat16, works, "a GPU" if works else "torch.compile needs Triton and a C compiler (gcc)"
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.float32, False, "this CPU has no AVX512-BF16 or AMX"
    lack = "" if compiler else ", but torch.compile needs a C++ compiler (g++)"
    return torch.bfloat16, compiler, f"the CPU has bf16 instructions{lack}"


# Dense bf16 TFLOP/s with float32 sums, by a pattern for the device's name: datasheets of NVIDIA and AMD, for RTX cards
# NVIDIA's whitepapers of the architectures (GA102, Ada, Blackwell).
PEAK_TFLOPS = {
    r"A100\b": 312, r"H100 PCIe": 756, r"H[12]00 NVL": 835.5, r"(G?H200|H100)\b": 989.5, r"B200\b": 2250,
    r"A10$": 125, r"L4$": 121, r"L40S$": 362, r"RTX 3090$": 71, r"RTX 4090$": 165.2, r"RTX 5090$": 209.5,
    r"RTX 6000 Ada": 364.2, r"RTX PRO 6000 Blackwell Max-Q": 438.9, r"RTX PRO 6000 Blackwell Workstation": 503.8,
    r"MI250X$": 191.5, r"MI300X": 1307.4,  # an MI250X is two devices
}  # fmt: skip


def peak_flops(device: torch.device) -> float:
    """The device's dense bf16 peak in FLOP/s, 0 if it is not known: no figure is better than a wrong one."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peaks = (peak * 1e12 for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}", name))
    return 0.0 if re.search(r"MIG|-\d+[CQ]$", name) else next(peaks, 0.0)  # MIG and vGPU: a slice of a GPU


# Clock and run --------------------------------------------------------------------------------------------------------


ORDER = "start() begins the five minutes, stop() ends them, finish() judges: once each, in this order"
OTHER_MEMORY = 2 * 2**30  # bytes of a GPU; a desktop takes less
OTHER_LOAD = 0.25  # of all cores; idle ones show up to 0.05, one busy core of two 0.5 (2026-11-25)
SUMMARY = {"val_bpb": ".6f", "training_seconds": ".1f", "total_seconds": ".1f", "peak_vram_mb": ".1f"}
SUMMARY |= {"mfu_percent": ".2f", "total_tokens_M": ".1f", "num_steps": "d", "num_params_M": ".1f", "depth": "d"}


@dataclass
class Run:
    """What train.py gets. All that changes the weights happens between start() and stop(); finish() judges them."""

    corpus: Corpus
    tokenizer: Tokenizer
    device: torch.device
    seed: int
    started: float = field(default_factory=time.perf_counter)
    began: float = 0.0  # of the five minutes
    seconds: float = 0.0  # that they took
    status: str = "starting"
    weights: str = ""  # their digest at the end of the five minutes
    summary: dict[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def start(self, model: torch.nn.Module) -> None:
        """Begin the five minutes. Raises ValueError if they were begun before, or the model has learned before them."""
        if self.began:
            raise ValueError(ORDER)
        rows = torch.from_numpy(read_val_rows(self.corpus)[:8, None].astype(np.int64))  # one at a time: little memory
        vocab = self.tokenizer.get_vocab_size()
        with evaluating(model):
            losses = [token_losses(model, row[:, :-1], row[:, 1:], vocab, 0) for row in rows]
        if (loss := torch.cat(losses).mean().item()) < math.log(vocab) - 0.5:
            seen = f"its loss is {loss:.2f} nats where a guess costs {math.log(vocab):.2f}"
            raise ValueError(f"the model has learned before the five minutes: {seen}. Undo every step of the warm-up")
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def progress(self) -> float:
        """Part of the five minutes that is used, 0 to 1, without waiting for the device."""
        return min((time.perf_counter() - self.began) / TIME_BUDGET, 1.0)

    def stop(self, model: torch.nn.Module) -> None:
        """End the five minutes, once the device has finished. Raises ValueError if they took LATE too long."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if not self.began or self.weights:
            raise ValueError(ORDER)
        self.seconds = time.perf_counter() - self.began
        self.weights = digest_tensors([*model.parameters(), *model.buffers()])
        if self.seconds > TIME_BUDGET + LATE:
            seen = f"training took {self.seconds:.0f} s instead of {TIME_BUDGET}"
            raise ValueError(f"{seen}: make steps smaller, and ask progress() before each")

    def finish(self, model: torch.nn.Module, batch_size: int, steps: int, tokens: int, depth: int, mfu: float) -> None:
        """Judge the weights of stop() and complete the summary. Its nine lines are an interface: scripts grep them."""
        if not self.weights or self.summary:
            raise ValueError(ORDER)
        if digest_tensors([*model.parameters(), *model.buffers()]) != self.weights:
            raise ValueError("parameters or buffers changed after stop(): what changes them belongs before it")
        if (passed := time.perf_counter() - self.began - self.seconds) > LATE:
            raise ValueError(f"finish() came {passed:.0f} s after stop(): at most {LATE} s may pass between them")
        val_bpb = evaluate_bpb(model, self.tokenizer, batch_size)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB on Linux
        resident /= 2**20 if sys.platform == "darwin" else 2**10
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else resident
        total, params = time.perf_counter() - self.started, sum(p.numel() for p in model.parameters())
        figures = val_bpb, self.seconds, total, peak, mfu, tokens / 1e6, steps, params / 1e6, depth
        self.summary = {name: format(figures[i], spec) for i, (name, spec) in enumerate(SUMMARY.items())}


def cpu_load() -> float:
    """The part of all CPU time, 0 to 1, that others use in half a second; 0 where Linux's /proc is not there."""
    if not (stat := Path("/proc/stat")).exists():
        return 0.0
    before = np.array(stat.read_text().split()[1:9], dtype=float)  # user nice system idle iowait irq softirq steal
    time.sleep(0.5)
    spent = np.array(stat.read_text().split()[1:9], dtype=float) - before
    return 1 - spent[3:5].sum() / max(spent.sum(), 1)


@contextlib.contextmanager
def training_run(description: str | None) -> Iterator[Run]:
    """Parse the command line, lock the device, prepare the corpus, grant ten minutes, and record how the run ended."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpus_arguments(parser)
    parser.add_argument("--seed", type=int, default=SEED, help=f"of weights and data order (default {SEED})")
    arguments = parser.parse_args()
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed {arguments.seed}: expected a number from 0 to {2**32 - 1}")
    source, device, cuda = (ROOT / "train.py").read_text(), get_device(), torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    device_id = torch.cuda.get_device_properties(0).uuid if cuda else "cpu"
    with locked(Path(DEVICE_LOCK % device_id), "two runs at once can't be compared; wait for it", wait=False):
        print(f"device: {name}{'' if cuda else ', for there is no CUDA device'}", flush=True)
        free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
        if total - free > OTHER_MEMORY or (not cuda and cpu_load() > OTHER_LOAD):
            print("warning: the device has other work, which may make val_bpb worse than it could be", flush=True)
        corpus, why = choose_corpus(arguments.corpus, arguments.shards)
        if corpus.name == "climbmix" and not cuda:
            raise SystemExit("climbmix needs a GPU: a CPU would take hours to evaluate on it. Use --corpus python")
        say(f"corpus: {corpus.folder or corpus.name} ({why})")
        prepare(corpus)
        record_ended_run(running := cache_root() / f"running-{device_id}.json")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped, as with Ctrl-C
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(arguments.seed)
        record = {"id": f"{time.time_ns()}-{os.getpid()}", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        commit, committed = (git(*words, default="") for words in (("rev-parse", "HEAD"), ("show", "HEAD:./train.py")))
        record |= {"repository": str(ROOT), "commit": commit, "prepare_sha256": SOURCE_SHA256}
        digests = {"train_sha256": hashlib.sha256(source.encode()).hexdigest(), "harness": harness_fingerprint(corpus)}
        record |= digests | {"train_committed": committed == source.strip()}
        record |= {"command": sys.argv, "seed": arguments.seed, "device": name}
        if past := [run for run in read_lines("runs.jsonl") if run.items() >= digests.items()]:
            seen = (f"seed {run['seed']} {run.get('val_bpb', run['status'])} on {run['device']}" for run in past[-3:])
            times = "once" if len(past) == 1 else f"{len(past)} times"
            print(f"this text of train.py was run already, {times}: {', '.join(seen)}", flush=True)
        run = Run(corpus, Tokenizer(corpus), device, arguments.seed)
        text = {"train_source": source}  # last in its line: who reads the file sees the figures first
        write(running, json.dumps(record | {"status": "killed"} | text))  # what remains if the run ends without a word
        try:
            with time_limited(running), status_line(lambda: run.status):
                yield run
            if not run.summary or record["harness"] != harness_fingerprint(corpus):
                raise RuntimeError("no val_bpb: run.finish was not called, or the corpus was made anew meanwhile")
        except BaseException as error:
            record |= {"status": "stopped" if isinstance(error, KeyboardInterrupt) else "crash"}
            record["traceback"] = "".join(traceback.format_exception(error)).splitlines()[-20:]
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit(f"stopped, at: {run.status}") from None
            if isinstance(error, SystemExit) and not error.code:
                raise SystemExit("train.py ended without run.finish: no val_bpb") from None
            raise
        else:
            record |= {name: float(value) for name, value in run.summary.items()} | {"status": "finished"}
        finally:
            try:
                record["train_edited"] = train_on_disk() != source.strip()
                write(running, json.dumps(record | text))
                record_ended_run(running)
            except OSError as error:  # the figures below are still worth having
                print(f"the record could not be written to {cache_root()}: {error}", flush=True)
        summary = run.summary | {"harness": record["harness"], "seed": run.seed} | comparison(record)
        print("---", *(f"{name + ':':<18}{value}" for name, value in summary.items()), sep="\n", flush=True)
        if record["train_edited"]:
            print("train.py was edited while the run went on: the record holds the text that it began with", flush=True)


@contextlib.contextmanager
def time_limited(running: Path) -> Iterator[None]:
    """End the process past RUN_LIMIT, also in a call that never returns; tracebacks go to stderr and to `running`."""
    with running.open("a") as file:
        faulthandler.register(signal.SIGALRM, all_threads=True)
        signal.setitimer(signal.ITIMER_REAL, RUN_LIMIT)
        faulthandler.dump_traceback_later(RUN_LIMIT + 1, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)


def record_ended_run(running: Path) -> None:
    """Move the record of a run that has ended to runs.jsonl; tracebacks after it were left by the limit."""
    if running.exists():
        line, *tracebacks = running.read_text(errors="replace").splitlines() or [""]
        late = {"status": "timeout", "traceback": tracebacks[-20:]} if tracebacks else {}
        try:
            append_line("runs.jsonl", json.loads(line) | late)
        except ValueError:
            print(f"{running.name} held no record of a run, and is removed: {line[:60]!r}", flush=True)
        running.unlink()


def comparable_runs(record: dict) -> list[dict]:
    """The finished runs of the same harness on the same kind of device."""
    same = {"status": "finished", "harness": record["harness"], "device": record["device"]}
    return [run for run in read_lines("runs.jsonl") if run.items() >= same.items()]


def comparison(record: dict) -> dict[str, str]:
    """Summary lines: the noise between seeds of one train.py, and how far this one is from the best kept.

    Both are means over seeds: the noise of their difference is noise * sqrt(1 / seeds + 1 / seeds of the best).
    """
    figures, lines = {}, {}  # train_sha256: {seed: val_bpb}
    for run in (*comparable_runs(record), record):  # itself too, for on a full disk it is not on record
        figures.setdefault(run["train_sha256"], {})[run["seed"]] = run["val_bpb"]
    means = {text: statistics.fmean(seeds.values()) for text, seeds in figures.items()}
    several = {text: list(seeds.values()) for text, seeds in figures.items() if len(seeds) > 1}
    noise = 0.0
    if several:
        squares = sum((figure - means[text]) ** 2 for text in several for figure in several[text])
        runs = sum(map(len, several.values()))
        noise = math.sqrt(squares / (runs - len(several)))
        lines["noise"] = f"{noise:.6f} (pooled standard deviation, {runs} runs with several seeds)"
    kept = [entry for entry in read_ledger(git("branch", "--show-current", default=""))[1] if entry["status"] == "keep"]
    if kept := {entry["train_sha256"]: entry for entry in kept if entry["train_sha256"] in means}:
        best, this = min(kept, key=lambda text: means[text]), record["train_sha256"]
        lines["best_kept"] = f"{means[best]:.6f} ({kept[best]['commit'][:7]}, seeds: {len(figures[best])})"
        if this != best:
            difference = means[this] - means[best]
            scale = noise * math.sqrt(1 / len(figures[this]) + 1 / len(figures[best]))
            times = f"{difference / scale:+.2f} x its noise, " if scale else ""
            lines["difference"] = f"{difference:+.6f} ({times}seeds: {len(figures[this])})"
    return lines


def git(*arguments: str, text: str | None = None, default: str | None = None) -> str:
    """Output of a git command in this repository. Where it fails: `default`, else SystemExit with what git said."""
    settings = ("-c", "core.quotepath=off", "-c", "commit.gpgSign=false")  # nobody is there to type a passphrase
    command = ["env", "git", "-C", str(ROOT), *settings, *arguments]  # env: where git is missing it says so by status
    result = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", errors="replace")
    if result.returncode and default is None:
        raise SystemExit(f"`git {' '.join(arguments[:2])}` failed: {result.stderr.strip()}")
    return default if result.returncode else result.stdout.strip()


def train_on_disk() -> str:
    """The text of train.py as it is now, without white space around it; empty if it is gone."""
    path = ROOT / "train.py"
    return path.read_text(errors="replace").strip() if path.exists() else ""


def append_line(name: str, record: dict) -> None:
    """Append one line of JSON, whole, to a file in the cache folder, and flush it to disk."""
    with (cache_root() / name).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"  # a write was cut short
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


# Ledger ---------------------------------------------------------------------------------------------------------------


LEDGER_HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"


def read_lines(name: str) -> list[dict]:
    """Read the JSON lines of a file in the cache folder, one for each id, without those that were cut short."""
    path, lines = cache_root() / name, {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            lines[entry["id"]] = entry
    return list(lines.values())


def branched_from() -> str:
    """The commit where the branch left main; empty if git knows no main."""
    names = ["main", "master", "origin/main", "origin/master"]
    if not git("rev-parse", "--abbrev-ref", "origin/HEAD", default="").startswith("origin/autoresearch/"):
        names.append("origin/HEAD")  # of a clone of a checkout that is on a branch for experiments it is that branch
    return next(filter(None, (git("merge-base", "HEAD", name, default="") for name in names)), "")


def commit_named(name: str) -> str:
    """The hash of a commit; empty if git has none of this name."""
    return git("rev-parse", "-q", "--verify", f"{name}^{{commit}}", default="")


def train_of(commit: str) -> str:
    """The text of train.py in a commit, without white space around it; empty if it has none."""
    return git("show", f"{commit}:./train.py", default="")


def read_ledger(branch: str) -> tuple[list[str], list[dict]]:
    """Return the rows that were logged on a branch, in order, and what ledger.jsonl says of them.

    Rows are in the ledger that git keeps for the branch, in the log commits that name it or that main does not have (a
    clone has only these), and in ledger.jsonl those that a call which was cut short has not brought to git. A row typed
    in by hand is in none.
    """
    rows = git("show", f"refs/{branch}/ledger:./results.tsv", default="").splitlines()[1:]
    how = ("--reverse", "--full-history", "-p", "-U0", "--text", "--no-color", "--no-ext-diff", "--format=", "-E")
    for where in (("HEAD", "--all-match", f"--grep=^{re.escape(branch)}$"), (f"{branched_from()}..HEAD",)):
        logs = git("log", *how, "--grep=^log (keep|discard|crash):", *where, "--", "results.tsv", default="")
        added = (line[1:] for line in logs.splitlines() if line.startswith("+") and line.count("\t") == 4)
        rows += [row for row in added if row != LEDGER_HEADER]
    here = {"repository": str(ROOT), "branch": branch}
    entries = [line for line in read_lines("ledger.jsonl") if line.get("row") in rows or line.items() >= here.items()]
    wanted = "".join(f"{entry['commit']}\n" for entry in entries)
    known = git("cat-file", "--batch-check=%(objectname)", text=wanted, default="").splitlines()  # or "… missing"
    entries = [entry for entry in entries if entry["commit"] in known]
    return list(dict.fromkeys([*rows, *(entry["row"] for entry in entries)])), entries


def write_ledger(branch: str) -> None:
    """Bring results.tsv to what was logged, commit it, and have git keep that commit and each row's under refs/."""
    rows, entries = read_ledger(branch)
    text = "\n".join([LEDGER_HEADER, *rows])
    try:
        keep_commits(branch, {entry["commit"][:7]: entry["commit"] for entry in entries})
        write(ROOT / "results.tsv", text)
        if git("show", "HEAD:./results.tsv", default="") != text:
            _, _, _, status, description = rows[-1].split("\t")
            git("add", "-f", "results.tsv")
            message = f"log {status}: {description}\n\n{branch}"
            git("commit", "-q", "--no-verify", "--cleanup=verbatim", "-m", message, "--", "results.tsv")
    except (OSError, SystemExit) as error:
        advice = "The row is safe: when that is mended, the same command again commits it"
        raise SystemExit(f"results.tsv was not committed: {error}. {advice}") from None
    keep_commits(branch, {"ledger": git("rev-parse", "HEAD")})


def keep_commits(branch: str, commits: dict[str, str]) -> None:
    """Have git keep commits, by name, under refs/ and the branch: no reset and no garbage collection takes them."""
    git("update-ref", "--stdin", text="".join(f"update refs/{branch}/{name} {commits[name]}\n" for name in commits))


def kept_last(rows: list[str]) -> str:
    """The commit of the last row that was kept and that git has; where the branch began, if there is none."""
    kept = [row.split("\t")[0] for row in rows if row.split("\t")[3] == "keep"]
    return next(filter(None, map(commit_named, reversed(kept))), branched_from())


def way_back(branch: str, kept: str) -> str:
    """The command that takes the branch to the train.py that was kept last, with its ledger where git has both."""
    ledger = commit_named(f"refs/{branch}/ledger")
    return f"git reset --hard {(ledger if ledger and train_of(ledger) == train_of(kept) else kept)[:7]}"


def commit_of(run: dict) -> str:
    """The commit of the train.py that a run was of; one is made where there was none."""
    if run["train_committed"]:
        return run["commit"]
    blob = git("hash-object", "-w", "--stdin", text=run["train_source"])
    tree = re.sub(r"\w+(?=\ttrain\.py$)", blob, git("ls-tree", run["commit"]), flags=re.MULTILINE)
    return git("commit-tree", git("mktree", text=tree), "-p", run["commit"], "-m", "train.py as it was run uncommitted")


def log(status: str, description: str) -> None:
    """Log the last run: a row of results.tsv, committed alone. Raises SystemExit with what to do if it can't.

    The row is in ledger.jsonl before it is in git: a call that was cut short is completed by the next.
    """
    branch = experiment_branch()
    with locked(cache_root() / "ledger.lock", "it writes a ledger", wait=True):
        run, (rows, entries) = last_run(), read_ledger(branch)
        if entry := entry_of(run, entries):
            if here := entry["row"] in rows:
                write_ledger(branch)
            where = "" if here else f" on {entry['branch']}"
            kept, then = kept_last(rows), 'edit train.py, `git commit -am "<idea>"`, `uv run train.py`'
            if kept and git("merge-base", "--is-ancestor", kept, "HEAD", default="no"):
                then = f"the branch lacks what was kept last: `{way_back(branch, kept)}`"
            if not rows:
                then = "the baseline, `uv run train.py`"
            raise SystemExit(f"nothing to log: the last run has its row{where}, {entry['row']!r}. Next: {then}")
        refuse_row(run, status, branch, rows, entries)
        commit = git("rev-parse", "HEAD") if status == "keep" else commit_of(run)
        bpb, memory = 0.0, 0.0
        if status != "crash":
            seeds = seeds_of(run)
            shown = next((other for other in seeds if other["seed"] == SEED), seeds[0])
            bpb, memory = shown["val_bpb"], shown["peak_vram_mb"] / 1024
            description += "" if shown["seed"] == SEED else f" (seed {shown['seed']})"
        row = f"{commit[:7]}\t{bpb:.6f}\t{memory:.1f}\t{status}\t{description}"
        if row in rows:
            raise SystemExit(f"the ledger has this very row: say in its description what was different. {row!r}")
        entry = {"id": f"{branch} {run['id']}", "run": run["id"], "repository": str(ROOT), "branch": branch}
        entry |= {"commit": commit, "status": status, "row": row}
        entry |= {name: run[name] for name in ("train_sha256", "harness", "device")}
        append_line("ledger.jsonl", entry)
        write_ledger(branch)
        if status == "keep" and rows and len({other["seed"] for other in seeds_of(run)}) < 3:
            print("kept on fewer than three seeds: by one alone the luckiest of many ideas looks good")
        print(row)


def show_ledger() -> None:
    """Print the last rows of this branch, and whether the last run has one: where the loop stands."""
    rows, entries = read_ledger(experiment_branch())
    print(LEDGER_HEADER, *rows[-20:], f"--- {len(rows)} rows{', the last 20 of them' * (len(rows) > 20)}", sep="\n")
    try:
        run = last_run()
    except SystemExit as none:
        return print(none)
    seen = {"last run": f"{run['status']}, seed {run['seed']}, of {run['commit'][:7]}, begun {run['time']}"}
    if run["status"] == "finished":
        seen |= {"val_bpb": f"{run['val_bpb']:.6f}"} | comparison(run)
    seen["its row"] = "none yet: log it, or run what else it needs"
    if entry := entry_of(run, entries):
        seen["its row"] = entry["row"] + f" (on {entry['branch']})" * (entry["row"] not in rows)
    seen["all runs"] = str(cache_root() / "runs.jsonl")
    if not rows:
        seen["next"] = '`uv run train.py`, the baseline, and `uv run prepare.py log keep "baseline"`'
    print(*(f"{name + ':':<18}{value}" for name, value in seen.items()), sep="\n")


def experiment_branch() -> str:
    """The branch that is checked out. Raises SystemExit if it is not one for experiments."""
    branch, start = git("branch", "--show-current"), "`git checkout -b autoresearch/<tag> main`"
    if folder := git("rev-parse", "--show-prefix"):
        raise SystemExit(f"{folder} is a folder of another repository: autoresearch needs one of its own, a clone")
    if not branch:
        raise SystemExit(f"no branch is checked out: `git checkout autoresearch/<tag>`, or for a new one {start}")
    if not branch.startswith("autoresearch/"):
        raise SystemExit(f"on {branch} nothing is logged, but on a branch of its own: {start}")
    return branch


def entry_of(run: dict, entries: list[dict]) -> dict | None:
    """What was logged of a run, or of its train.py where that was kept: more seeds of it get no other row."""
    same = {"status": "keep", "train_sha256": run["train_sha256"]}
    kept = [entry for entry in entries if entry.items() >= same.items()]
    return next((line for line in read_lines("ledger.jsonl") if line.get("run") == run["id"]), next(iter(kept), None))


def last_run() -> dict:
    """The record of this repository's last run. Raises SystemExit if there is none, or it goes on."""
    for running in cache_root().glob("running-*.json"):
        with contextlib.suppress(SystemExit), locked(Path(DEVICE_LOCK % running.stem[8:]), "", wait=False):
            record_ended_run(running)  # of a run that ended without a word
        if running.exists() and json.loads(running.read_text().splitlines()[0])["repository"] == str(ROOT):
            raise SystemExit("a run of this repository is still going on: log it when it has printed its summary")
    runs = [run for run in read_lines("runs.jsonl") if run.get("repository") == str(ROOT)]
    if not runs or not commit_named(runs[-1]["commit"]):  # or they are of a clone that was here before
        raise SystemExit("nothing to log: no run of this repository is on record. The first one: `uv run train.py`")
    return runs[-1]


def seeds_of(run: dict) -> list[dict]:
    """The finished runs that compare with a run and have its train.py, the newest first."""
    return [other for other in comparable_runs(run)[::-1] if other["train_sha256"] == run["train_sha256"]]


def refuse_row(run: dict, status: str, branch: str, rows: list[str], entries: list[dict]) -> None:
    """Raise SystemExit, with what to do, if a run can't have a row of this status in the ledger of the branch."""
    if not (base := branched_from()):
        raise SystemExit("git knows no main to compare with: `git branch main <the commit where your work began>`")
    tried, seeds, others = run["train_source"].strip(), seeds_of(run), ("--", ".", ":!results.tsv", ":!train.py")
    there = train_of("HEAD") == tried
    get_back = "" if there or status == "crash" else f"`git reset --hard {commit_of(run)[:7]}`, "
    if status == "crash" and (own := [other for other in seeds if other["repository"] == str(ROOT)]):
        advice = '`uv run prepare.py log discard "…"`, or keep'
        raise SystemExit(f"this train.py has a figure, val_bpb {own[0]['val_bpb']:.6f}: {advice}")
    if status != "crash" and not seeds:
        advice = '`uv run prepare.py log crash "…"`'
        if run["status"] in ("killed", "stopped"):
            seed = "" if run["seed"] == SEED else f" --seed {run['seed']}"
            advice = f"{get_back}`uv run train.py{seed}` runs it again; if the idea was at fault, log crash"
        raise SystemExit(f"the last run has no val_bpb ({run['status']}): {advice}")
    if status != "keep":
        kept = kept_last(rows)
        if train_of("HEAD") != train_of(kept) or train_on_disk() == tried != train_of(kept):
            seen = git("log", "-1", "--format=%h %s", "--", ".", ":!results.tsv")
            advice = f"`{way_back(branch, kept)}` takes it there. Then log again"
            raise SystemExit(f"train.py is that of {seen!r} or later, not what was kept last: {advice}")
    committed = git("diff", "--name-only", base, "HEAD", *others).splitlines()
    if changed := sorted({*committed, *git("diff", "--name-only", base, *others).splitlines()}):
        amend = "`git commit -a --amend --no-edit --allow-empty`, " if committed else ""
        undo = f"`git restore -s {base[:7]} -SW {shlex.join(changed)}`, {amend}"
        raise SystemExit(f"only train.py may change, but {', '.join(changed)} did, too: {undo}and log again")
    if git("hash-object", "prepare.py") != git("rev-parse", f"{base}:./prepare.py"):
        flags = ("--no-skip-worktree", "--no-assume-unchanged")
        shown = ", ".join(f"`git update-index {flag} prepare.py`" for flag in flags)
        raise SystemExit(f"prepare.py is not that of {base[:7]}, and git was told to hide it: {shown}, and log again")
    if modules := git("ls-files", "--others", "--exclude-standard", "--", "*.py").splitlines():
        raise SystemExit(f"{', '.join(modules)}: no commit has it, so the run can't be repeated. Move it into train.py")
    if run.get("prepare_sha256") != SOURCE_SHA256:
        raise SystemExit("the last run was judged by another prepare.py and does not compare: `uv run train.py`")
    before = next((entry for entry in entries[::-1] if entry["status"] == "keep" and "harness" in entry), run)
    judges = [f"{judged['harness']} on {judged['device']}" for judged in (run, before)]
    if status != "crash" and judges[0] != judges[1]:
        seen = f"the last run is of harness {judges[0]}, what was kept of {judges[1]}: they do not compare"
        advice = "Run it there, `uv run train.py`, or begin a new branch, `git checkout -b autoresearch/<tag> main`"
        raise SystemExit(f"{seen}. {advice}")
    if status == "keep":
        if not there:
            advice = f"is not that of HEAD, but of its commit: {get_back}and log again"
            if train_on_disk() == tried:
                advice = 'is not committed: `git commit -am "<idea>"`, and log again'
            raise SystemExit(f"the train.py of the last run {advice}")
        if not any(other["seed"] == SEED for other in seeds):
            raise SystemExit(f"a row needs the run with seed {SEED}, by which all are compared: `uv run train.py`")


# Commands -------------------------------------------------------------------------------------------------------------


def check(corpus: Corpus) -> None:
    """Verify everything on disk. Raises SystemExit with what is wrong, and the command that mends it."""
    manifest, now = read_manifest(corpus.directory), made_from(corpus, find_sources(corpus))
    if others := [what for what in now if manifest["files"] and manifest["made_from"].get(what) != now[what]]:
        what = " and of another ".join(others)
        raise SystemExit(f"{corpus.directory} is of another {what}. `{corpus.command}` makes it again")
    tokens = {name: entry["last"] for name, entry in manifest["files"].items() if name.endswith(".tokens")}
    number = corpus.num_shards or len(tokens) + (True not in tokens.values())  # the last is written at the end
    names = ["tokenizer.json", "val_rows.bin", *(f"train_{i:05d}.tokens" for i in range(number))]
    names = dict.fromkeys([*shard_names(corpus), *names, *manifest["files"]])
    with status_line(lambda: "reading what is prepared"):
        problems = damaged(corpus, names)
    if problems:
        raise SystemExit("\n".join(problems.values()))
    token_files(corpus)


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --corpus and --shards."""
    default = "$AUTORESEARCH_CORPUS, else climbmix with CUDA, python without"
    parser.add_argument("--corpus", metavar="NAME", help=f"climbmix, python or a folder of text (default: {default})")
    parser.add_argument("--shards", metavar="N", type=int, help="of climbmix, to train on (default 10, -1: all)")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpus_arguments(parser)
    usage = 'nothing to prepare, check, log, or log keep|discard|crash "what was tried"'
    parser.add_argument("command", nargs="*", help=usage)
    logs = sys.argv[1:2] == ["log"] and len(sys.argv) > 3 and sys.argv[3] not in ("-h", "--help")
    arguments = parser.parse_args(["--"] * logs + sys.argv[1:])  # what was tried may begin with a dash
    words, what = arguments.command, " ".join(" ".join(arguments.command[2:]).split())
    what = "".join(character for character in what if character.isprintable())
    if words[:1] == ["log"] and words[1:2] in (["keep"], ["discard"], ["crash"]) and what:
        try:
            return log(words[1], what)
        except OSError as error:
            advice = "Free some space, then log again"
            raise SystemExit(f"nothing was logged, {cache_root()} can't be written: {error}. {advice}") from None
    if words == ["log"]:
        return show_ledger()
    if words not in ([], ["check"]):
        parser.error(f"{' '.join(words)}: expected {usage}")
    corpus, why = choose_corpus(arguments.corpus, arguments.shards)
    say(f"corpus: {corpus.folder or corpus.name} ({why})")
    if arguments.command:
        with explained(corpus):
            check(corpus)
    else:
        prepare(corpus, thorough=True)
    size = sum(entry["size"] for entry in read_manifest(corpus.directory)["files"].values())
    print(f"ready: {size / 1e6:.1f} MB in {corpus.directory}\nharness: {harness_fingerprint(corpus)}")


if __name__ == "__main__":
    main()
