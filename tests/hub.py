"""A server on this machine that answers as the Hugging Face hub and its CDN do, with faults.

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
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Request:
    """A request that came, and how many bytes of a body went back."""

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
    """What goes wrong with the next `times` answers of the hub or its CDN."""

    place: str
    times: float
    how: dict


class Hub:
    """Redirects from 127.0.0.1 (the hub) to localhost (its CDN); files: {name: bytes}."""

    def __init__(self, files: dict[str, bytes], repo: str = "karpathy/climbmix-400b-shuffle"):
        self.files, self.repo = files, repo
        self.renamed: str | None = None  # the repository's new name
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.closing, self.lock = threading.Event(), threading.Lock()
        self.signatures = itertools.count()

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

    def fail(self, place: str = "cdn", times: float = 1, **how: object) -> None:
        """Have the next `times` answers of `place` go wrong. At both places:

        status=, headers={}: of an answer without a body

        At the hub: size=, etag=, location=: what it says of the file. At the CDN:

        cut=N: the connection ends after N bytes of the body (reset=True: as one that is reset)
        stall=N: after N bytes no more come, and the connection stays open
        ignore_range=True: 200 and everything            flip=N: a bit of byte N of the file
        longer=N: the file and Content-Length have N bytes more than the hub says (or fewer)
        pace=seconds: between 16 KiB of the body
        """
        self.faults.append(Fault(place, times, how))

    def recover(self) -> None:
        """From now on nothing goes wrong."""
        self.faults.clear()
        self.requests.clear()

    def how(self, request: Request) -> dict:
        """Return what is to go wrong with this request."""
        with self.lock:
            self.requests.append(request)
            how = {}
            for fault in self.faults:
                if fault.place == request.place and fault.times > 0:
                    fault.times -= 1
                    how |= fault.how
            return how

    def asked(self, place: str) -> list[Request]:
        """Return the requests that came to the hub or to its CDN."""
        return [request for request in self.requests if request.place == place]

    def sent(self, name: str) -> int:
        """Return how many bytes of a file were sent."""
        return sum(request.sent for request in self.requests if request.name == name)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the client has gone
            super().handle()

    def do_GET(self):
        headers = (self.headers.get(name) for name in ("Host", "Range", "Authorization"))
        self.request_seen = Request(self.path, *headers)
        how, data = self.hub.how(self.request_seen), self.hub.files.get(self.request_seen.name)
        if "status" in how or data is None:
            self.answer(how.get("status", 404), how.get("headers", {}))
        elif self.request_seen.place == "hub":
            self.describe(data, how)
        else:
            self.send_file(data, how)

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def describe(self, data, how):
        hub, name = self.hub, self.request_seen.name
        if hub.renamed and self.path.startswith(f"/datasets/{hub.repo}/"):
            return self.answer(307, {"Location": self.path.replace(hub.repo, hub.renamed)})
        if not self.path.startswith(f"/datasets/{hub.renamed or hub.repo}/resolve/main/"):
            return self.answer(404, {})
        signed = f"{hub.cdn}/repos/{name}?Signature=hush{next(hub.signatures)}"
        headers = {
            "Location": how.get("location", signed),
            "X-Linked-Size": str(how.get("size", len(data))),
            "X-Linked-ETag": how.get("etag", f'"{hashlib.sha256(data).hexdigest()}"'),
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
            return self.answer(416, {"Content-Range": f"bytes */{len(data)}"})
        body = data[start or 0 :]
        headers = {"Content-Length": str(len(body))}
        if start is not None:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(200 if start is None else 206, headers)
        limit = min(how.get("cut", math.inf), how.get("stall", math.inf), len(body))
        for at in range(0, limit, 2**14):
            block = body[at : min(at + 2**14, limit)]
            self.request_seen.sent += len(block)  # before the client can be done with it
            self.wfile.write(block)
            self.hub.closing.wait(how.get("pace", 0))
        if "stall" in how:
            self.hub.closing.wait()
        if how.get("reset"):
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        return None
