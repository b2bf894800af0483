"""The climbmix corpus, from a server on this machine that answers as the dataset hub does."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare


@pytest.fixture
def hub(tmp_path, folder, monkeypatch):
    """A hub that redirects to a CDN path and serves ranges; `hub.cut` ends the first body after so many bytes."""
    files, rng = {}, np.random.default_rng(0)
    texts = [path.read_text() for path in sorted(folder.rglob("*.py"))]
    for number in (0, 1, prepare.CLIMBMIX_TRAIN_SHARDS):
        some = [texts[i] for i in rng.integers(0, len(texts), 60)]
        pq.write_table(pa.table({"text": some}), tmp_path / "shard.parquet")
        files[f"shard_{number:05d}.parquet"] = (tmp_path / "shard.parquet").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            hub.requests.append((self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization")))
            name = self.path.rsplit("/", 1)[1]
            data = files.get(name)
            if data is None:
                self.send_error(404)
            elif self.path.startswith(f"/datasets/{prepare.CLIMBMIX_REPO}/resolve/main/"):
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{hub.server_port}/cdn/{name}")  # another host
                self.send_header("X-Linked-Size", str(len(data)))
                self.send_header("X-Linked-ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start = int(asked[1]) if asked else 0
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                if hub.flip:
                    data, hub.flip = data[:100] + bytes([data[100] ^ 1]) + data[101:], False
                self.wfile.write(data[start : start + hub.cut] if hub.cut else data[start:])
                hub.cut, self.close_connection = None, True

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.requests, hub.cut, hub.flip, hub.files = [], None, False, files
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "RETRY_SECONDS", (0, 0))
    yield hub
    hub.shutdown()
    hub.server_close()


def test_shards_arrive_whole_and_become_a_corpus(hub):
    corpus, _ = prepare.choose_corpus("climbmix", 2)
    prepare.prepare(corpus)
    for name, data in hub.files.items():
        assert (corpus.directory / name).read_bytes() == data
    assert len(list(corpus.directory.glob("train_*.tokens"))) == 2
    tokenizer = prepare.Tokenizer(corpus)
    x, y, epoch = next(prepare.make_dataloader(tokenizer, 2, 2048, "train"))
    assert x.shape == y.shape == (2, 2048)
    assert epoch > 1  # so few documents fill the packing buffer in several passes
    before = len(hub.requests)
    prepare.prepare(corpus)
    assert len(hub.requests) == before


def test_a_download_that_breaks_off_goes_on_where_it_ended(hub):
    hub.cut = 100_000
    corpus, _ = prepare.choose_corpus("climbmix", 1)
    prepare.prepare(corpus)
    resumed = {asked for *_, asked, _ in hub.requests if asked}  # one place, asked of the hub and then of its CDN
    assert len(resumed) == 1
    assert 0 < int(re.fullmatch(r"bytes=(\d+)-", resumed.pop())[1]) <= 100_000
    for name in ("shard_00000.parquet", f"shard_{prepare.CLIMBMIX_TRAIN_SHARDS:05d}.parquet"):
        assert (corpus.directory / name).read_bytes() == hub.files[name]


def test_a_body_with_a_flipped_bit_is_thrown_away_and_fetched_again(hub):
    hub.flip = True
    corpus, _ = prepare.choose_corpus("climbmix", 1)
    prepare.prepare(corpus)
    for name in ("shard_00000.parquet", f"shard_{prepare.CLIMBMIX_TRAIN_SHARDS:05d}.parquet"):
        assert (corpus.directory / name).read_bytes() == hub.files[name]


def test_a_shard_that_is_not_there_is_named(hub):
    del hub.files["shard_00001.parquet"]
    corpus, _ = prepare.choose_corpus("climbmix", 2)
    with pytest.raises(SystemExit, match=r"shard_00001\.parquet answered 404.*HF_ENDPOINT"):
        prepare.prepare(corpus)
    assert not (corpus.directory / "shard_00001.parquet").exists()


def test_the_token_goes_to_the_hub_alone(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    corpus, _ = prepare.choose_corpus("climbmix", 1)
    prepare.prepare(corpus)
    for _, path, _, authorization in hub.requests:
        assert authorization == (None if path.startswith("/cdn/") else "Bearer secret")


def test_without_a_network_the_message_says_what_to_do(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    corpus, _ = prepare.choose_corpus("climbmix", 1)
    with pytest.raises(SystemExit, match=r"did not arrive.*--corpus python.*HF_ENDPOINT"):
        prepare.prepare(corpus)
