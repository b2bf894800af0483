"""Attention of train.py: each backend against a plain reference, and the choice between them.

The kernel package loads a kernel of its own layout here, from a folder or from a hub on the
loopback interface. The kernel computes in PyTorch, so that it needs no GPU.
"""

import http.server
import json
import math
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import kernels
import pytest
import torch

import train

CPU = torch.device("cpu")
ROOT = Path(train.__file__).resolve().parent

KERNEL = """
import torch

def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
    assert causal and window_size[1] == 0
    at = torch.arange(q.size(1), device=q.device)
    seen = (at <= at[:, None]) & (at >= at[:, None] - window_size[0])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT).float() * q.size(-1) ** -0.5
    y = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype) @ v
    return y.transpose(1, 2)
"""
METADATA = {
    "id": "_flash_attn3_test",
    "name": "flash-attn3",
    "version": 1,
    "license": "bsd-3-clause",
    "python-depends": [],
    "backend": {"type": "cuda"},
}


@pytest.fixture(autouse=True)
def knobs(monkeypatch):
    monkeypatch.setattr(train, "HEAD_DIM", 64)


# backends


def attention_by_hand(q, k, v, window):
    """Softmax attention in float64, one query at a time. q, k, v: (B, T, H, D)."""
    q, k, v = (x.double() for x in (q, k, v))
    result = []
    for t in range(q.shape[1]):
        seen = slice(max(0, t - window), t + 1)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, seen]) / math.sqrt(q.shape[-1])
        result.append(torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, seen]))
    return torch.stack(result, 1)


def check_backend(backend, device, dtype, tolerance, length, head_dim, gradients):
    torch.manual_seed(0)
    windows, shape = [0, 1, 64, length // 2, length], (2, length, 2, head_dim)
    attention = train.Attention(backend, length, set(windows), device)
    if device.type == "cuda" and backend == "flex":  # another implementation when uncompiled
        attention = torch.compile(attention, dynamic=False)
    for window in windows:
        inputs = [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]
        for x in inputs:
            x.requires_grad_(gradients)
        seen, expected = attention(*inputs, window), attention_by_hand(*inputs, window)
        assert (seen.double() - expected).norm() <= tolerance * expected.norm()
        if gradients:
            direction = torch.randn_like(expected)
            ours = torch.autograd.grad(seen, inputs, direction.to(dtype))
            theirs = torch.autograd.grad(expected, inputs, direction)
            for a, b in zip(ours, theirs, strict=True):  # q and k of window 0 have none
                scale = max(b.double().norm(), direction.norm())
                assert (a.double() - b.double()).norm() <= tolerance * scale


@pytest.mark.parametrize("length", [128, 151])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", ["matmul", "sdpa", "flex", "flash3"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_backend_honours_the_window(backend, head_dim, length, local_kernel):
    local_kernel()
    # PyTorch has no backward pass of FlexAttention for CPUs.
    check_backend(backend, CPU, torch.float32, 1e-5, length, head_dim, backend != "flex")


@pytest.mark.gpu
@pytest.mark.parametrize("length", [512, 333])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", ["flash3", "flex", "sdpa", "matmul"])
def test_every_backend_honours_the_window_on_a_gpu(backend, head_dim, length):
    device = torch.device("cuda")
    if backend == "flash3":
        chosen, why = train.choose_attention(device, compiled=True)
        if chosen != "flash3":
            pytest.skip(why)
    check_backend(backend, device, torch.bfloat16, 1e-2, length, head_dim, gradients=True)


def test_a_key_is_seen_within_the_window_and_not_beyond():
    q, k, v = (torch.randn(1, 32, 1, 16) for _ in range(3))
    attention = train.Attention("matmul", 32, {5}, CPU)
    before = attention(q, k, v, 5)
    k[:, 10], v[:, 10] = 100.0, 100.0
    changed = (attention(q, k, v, 5) != before).any(-1)[0, :, 0]
    assert changed.nonzero().flatten().tolist() == [10, 11, 12, 13, 14, 15]


# the choice


def write_kernel(folder, source=KERNEL, metadata=METADATA, variant="torch-cuda"):
    """Write a build for every GPU, as the package lays it out."""
    build = folder / "build" / variant
    build.mkdir(parents=True)
    (build / "metadata.json").write_text(json.dumps(metadata))
    (build / "__init__.py").write_text(source)
    return folder


@pytest.fixture
def local_kernel(tmp_path, monkeypatch):
    """Write a kernel that the package finds as if it had been downloaded."""

    def write(**parts):
        folder = write_kernel(tmp_path / "kernel", **parts)
        monkeypatch.setattr(kernels, "install_kernel", lambda *_, **options: folder)

    train.load_flash3.cache_clear()
    yield write
    train.load_flash3.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU as choose_attention sees one, whose probes run on the CPU."""
    probe = train.probe_attention
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        train, "probe_attention", lambda backend, device, compiled: probe(backend, CPU, compiled)
    )
    return torch.device("cuda")


def test_a_cpu_takes_matmul_without_a_probe(monkeypatch):
    monkeypatch.setattr(train, "probe_attention", None)
    assert train.choose_attention(CPU, compiled=True)[0] == "matmul"


def test_a_kernel_that_works_is_taken_without_a_trace(local_kernel, hopper):
    local_kernel()
    state = torch.get_rng_state()
    assert train.choose_attention(hopper, compiled=False)[0] == "flash3"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_kernel_that_works_is_taken_when_compiled(local_kernel, hopper):
    local_kernel()
    assert train.choose_attention(hopper, compiled=True)[0] == "flash3"


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"source": KERNEL.replace("window_size[0])", "2 * window_size[0])")}, "results are wrong"),
        ({"source": KERNEL + "raise ImportError('undefined symbol: _ZN3c10')"}, "undefined symbol"),
        ({"source": KERNEL.replace("flash_attn_func", "other")}, "flash_attn_func"),
        ({"source": KERNEL.replace("assert causal", "raise OSError('no image')  # ")}, "no image"),
        ({"source": "def broken("}, "SyntaxError"),
        ({"variant": "torch29-cxx11-cu128-x86_64-linux"}, "Cannot find a build variant"),
        ({"metadata": {}}, "ValueError"),
    ],
)
def test_a_kernel_that_does_not_work_is_named_in_one_line(local_kernel, hopper, parts, reason):
    local_kernel(**parts)
    backend, why = train.choose_attention(hopper, compiled=False)
    assert backend == "sdpa"
    assert why.startswith("flash3 does not work: ")
    assert reason in why
    assert "\n" not in why


@pytest.mark.parametrize(
    ("capability", "compiled", "working", "chosen", "probed"),
    [
        ((9, 0), True, {"flash3", "flex"}, "flash3", ["flash3"]),
        ((9, 0), True, {"flex"}, "flex", ["flash3", "flex"]),
        ((9, 0), True, set(), "sdpa", ["flash3", "flex"]),
        ((9, 0), False, set(), "sdpa", ["flash3"]),
        ((8, 0), True, {"flash3", "flex"}, "flex", ["flex"]),
        ((12, 0), True, set(), "sdpa", ["flex"]),
        ((8, 0), False, {"flash3", "flex"}, "sdpa", []),
    ],
)
def test_a_gpu_takes_the_first_backend_that_works(
    monkeypatch, capability, compiled, working, chosen, probed
):
    seen = []

    def probe(backend, device, compiled):
        seen.append(backend)
        if backend not in working:
            raise RuntimeError(f"{backend} is broken\nand here is why")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(train, "probe_attention", probe)
    backend, why = train.choose_attention(torch.device("cuda"), compiled)
    assert (backend, seen) == (chosen, probed)
    assert all(f"{name} is broken" in why for name in probed if name not in working)
    assert "\n" not in why


# the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the kernel hub as serves one repository, of a publisher that is trusted or not."""

    def do_GET(self):
        server, path = self.server, self.path.split("?")[0]
        server.asked.append(path)
        repo = train.FLASH_KERNEL["repo_id"]
        publisher, api = repo.split("/")[0], f"/api/kernels/{repo}"
        files = {
            str(file.relative_to(server.folder)): file
            for file in server.folder.rglob("*")
            if file.is_file()
        }
        entries = [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": f"{i:040x}"}
            for i, (name, file) in enumerate(sorted(files.items()))
        ]
        name = path.partition("/resolve/")[2].partition("/")[2]
        if path == f"/api/organizations/{publisher}/overview":
            trust = {"trustedKernelPublisher": server.trusted}
            self.answer({"name": publisher, "fullname": "", **trust})
        elif path == f"{api}/tree/{train.FLASH_KERNEL['revision']}/build":
            folders = sorted({str(Path(name).parent) for name in files})
            self.answer([{"type": "directory", "path": name, "oid": "0" * 40} for name in folders])
        elif path.startswith(f"{api}/tree/"):
            self.answer(entries)
        elif path.startswith(f"{api}/revision/"):
            self.answer({"id": repo, "sha": "a" * 40, "siblings": entries})
        elif name in files:
            self.answer(files[name].read_bytes(), name)
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, body, etag=""):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{abs(hash(etag))}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.trusted, server.asked = write_kernel(tmp_path / "hub"), True, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# Chooses in a child for each line of JSON, with the environment that it holds: PyTorch is imported
# once, and the hub's packages, which read the environment on import, in every child.
CHOOSER = """
import json, os, sys
import torch, train

probe, cpu = train.probe_attention, torch.device("cpu")
torch.cuda.get_device_capability = lambda: (9, 0)
train.probe_attention = lambda backend, device, compiled: probe(backend, cpu, compiled)
for name in list(sys.modules):
    if name.split(".")[0] in ("huggingface_hub", "kernels"):
        del sys.modules[name]

for line in sys.stdin:
    job = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ.update(job["environment"])
    print(*train.choose_attention(torch.device("cuda"), False), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def chooser():
    prefixes = ("HF_", "LOCAL_KERNELS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    command = [sys.executable, "-c", CHOOSER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def choose(chooser, tmp_path):
    """Choose on a Hopper GPU, with a cache of this test's own; return all lines of output."""

    def run(endpoint, **environment):
        output = tmp_path / "output"
        output.unlink(missing_ok=True)
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache")}
        job = {"output": str(output), "environment": settings | environment}
        print(json.dumps(job), file=chooser.stdin, flush=True)
        assert chooser.stdout.readline() == "0\n", output.read_text()
        return output.read_text().splitlines()

    return run


def test_a_kernel_is_downloaded_once_and_then_needs_no_hub(hub, choose):
    first = choose(hub.url)
    assert first[0] == f"downloading {train.FLASH_KERNEL['repo_id']}, once"
    assert first[1].startswith("flash3 ")
    assert len(first) == 2
    asked = len(hub.asked)
    assert choose(hub.url)[0].startswith("flash3 ")
    assert len(hub.asked) == asked
    hub.shutdown()
    hub.server_close()
    for offline in ("0", "1"):
        (line,) = choose(hub.url, HF_HUB_OFFLINE=offline)
        assert line.startswith("flash3 ")


def test_a_kernel_of_an_untrusted_publisher_is_not_loaded(hub, choose):
    hub.trusted = False
    assert "not from a trusted publisher" in choose(hub.url)[-1]
    assert not any("/resolve/" in path for path in hub.asked)


def test_without_a_hub_one_line_says_so(choose):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        port = silent.getsockname()[1]
        for endpoint in ("http://127.0.0.1:1", f"http://127.0.0.1:{port}", "http://hub.invalid"):
            (line,) = choose(endpoint)
            assert line.startswith("sdpa flash3 does not work: ")


def test_without_permission_the_hub_is_not_asked(hub, choose):
    (line,) = choose(hub.url, HF_HUB_OFFLINE="1")
    assert line.startswith("sdpa flash3 does not work: ")
    assert hub.asked == []
