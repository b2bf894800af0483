"""A server on this machine that answers as the Hugging Face dataset hub and its CDN do, with faults on demand.

with Hub({"shard_00000.parquet": data}) as hub:
    hub.fail(cut=100_000)              # the next body ends after 100,000 bytes
    ... HF_ENDPOINT=hub.endpoint ...
    hub.requests                       # every request that came
"""

import contextlib
import hashlib
import itertools
import math
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Request:
    """A request that came, and how many bytes of a body went back."""

    time: float  # seconds
    method: str
    path: str
    host: str
    range: str | None
    authorization: str | None
    sent: int = 0

    @property
    def name(self) -> str:
        return urlsplit(self.path).path.rsplit("/", 1)[1]

    @property
    def place(self) -> str:
        return "hub" if self.path.startswith("/datasets/") else "cdn"


@dataclass
class Fault:
    """What is to go wrong with the next `times` answers of the hub or its CDN, about one file or all."""

    place: str
    times: float
    name: str | None
    how: dict


class Hub:
    """Redirects from 127.0.0.1 (the hub) to localhost (its CDN); `files` are its files: {name: bytes}."""

    def __init__(self, files: dict[str, bytes], repo: str = "karpathy/climbmix-400b-shuffle"):
        self.files, self.repo, self.renamed = files, repo, None  # renamed: the repository's new name
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.closing, self.lock, self.signatures = threading.Event(), threading.Lock(), itertools.count()

    def __enter__(self) -> "Hub":
        handler = type("Handler", (Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        port, other_port = (server.server_port for server in self.servers)
        self.endpoint, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self.cdn_on_another_port = f"http://127.0.0.1:{other_port}"  # a test may set `cdn` to it
        for server in self.servers:
            server.daemon_threads, server.block_on_close = True, False
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fail(self, place: str = "cdn", times: float = 1, name: str | None = None, **how: object) -> None:
        """Have the next `times` answers of `place`, about the file `name` or any, go wrong. At both places:

        status=, headers={}: of an answer without a body     wait=seconds: before the answer

        At the hub: size=, etag=, location=: what it says of the file. At the CDN:

        cut=N: the connection ends after N bytes of the body (reset=True: as one that is reset)
        stall=N: after N bytes no more come, and the connection stays open
        ignore_range=True: 200 and everything            flip=N: a bit of byte N of the file
        longer=N: the file is so much longer (shorter, if negative) than the hub says, as is Content-Length
        pace=seconds: between 16 KiB of the body
        """
        self.faults.append(Fault(place, times, name, how))

    def mend(self) -> None:
        """From now on nothing goes wrong."""
        self.faults.clear()

    def how(self, request: Request) -> dict:
        """What is to go wrong with this request."""
        with self.lock:
            self.requests.append(request)
            how = {}
            for fault in self.faults:
                if fault.place == request.place and fault.name in (None, request.name) and fault.times > 0:
                    fault.times -= 1
                    how |= fault.how
            return how

    def asked(self, place: str, name: str | None = None) -> list[Request]:
        """The requests that came to the hub or to its CDN, about one file or all."""
        return [request for request in self.requests if request.place == place and name in (None, request.name)]

    def sent(self, name: str) -> int:
        """Bytes of a file that were sent."""
        return sum(request.sent for request in self.asked("cdn", name))


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the client has gone
            super().handle()

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        headers = (self.headers.get(name) for name in ("Host", "Range", "Authorization"))
        self.request_seen = Request(time.monotonic(), self.command, self.path, *headers)
        how, data = self.hub.how(self.request_seen), self.hub.files.get(self.request_seen.name)
        self.hub.closing.wait(how.get("wait", 0))
        if "status" in how or data is None:
            self.answer(how.get("status", 404), {"Content-Length": "0"} | how.get("headers", {}))
        elif self.request_seen.place == "hub":
            self.describe(data, how)
        else:
            self.send_file(data, how)

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def describe(self, data, how):
        hub, name = self.hub, self.request_seen.name
        if hub.renamed and self.path.startswith(f"/datasets/{hub.repo}/"):
            location = self.path.replace(hub.repo, hub.renamed)
            return self.answer(307, {"Location": location, "Content-Length": "0"})
        if not self.path.startswith(f"/datasets/{hub.renamed or hub.repo}/resolve/main/"):
            return self.answer(404, {"Content-Length": "0"})
        headers = {
            "Location": how.get("location", f"{hub.cdn}/repos/{name}?Signature=hush{next(hub.signatures)}"),
            "X-Linked-Size": str(how.get("size", len(data))),
            "X-Linked-ETag": how.get("etag", f'"{hashlib.sha256(data).hexdigest()}"'),
            "X-Repo-Commit": "0123456789" * 4,
            "Content-Length": "0",
        }
        return self.answer(302, {name: value for name, value in headers.items() if value})

    def send_file(self, data, how):
        longer = how.get("longer", 0)
        data = data + bytes(longer) if longer > 0 else data[: len(data) + longer]
        if (at := how.get("flip")) is not None:
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        asked = re.fullmatch(r"bytes=(\d+)-", self.request_seen.range or "")
        start = int(asked[1]) if asked and not how.get("ignore_range") else None
        if start is not None and start >= len(data):
            return self.answer(416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"})
        headers = {} if start is None else {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        body = data[start or 0 :]
        self.answer(200 if start is None else 206, headers | {"Content-Length": str(len(body))})
        if self.command == "GET":
            limit = min(how.get("cut", math.inf), how.get("stall", math.inf), len(body))
            for at in range(0, limit, 2**14):
                self.request_seen.sent += self.wfile.write(body[at : min(at + 2**14, limit)])
                self.hub.closing.wait(how.get("pace", 0))
            if "stall" in how:
                self.hub.closing.wait()
            if how.get("reset"):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        return None
