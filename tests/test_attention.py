"""Attention of train.py: each backend against a plain reference, and flash-attention 3 with all that may be in its way.

The kernel that is loaded here is laid out as the package `kernels` expects it and loaded by that package, from a folder
or from a hub on the loopback interface; it computes in PyTorch, so that it runs without a GPU.
"""

import http.server
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import prepare
import train

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent

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


def attention_by_hand(q, k, v, window):
    """Softmax attention in float64, one query at a time. q, k, v: (B, T, H, D)."""
    q, k, v = (x.double() for x in (q, k, v))
    result = []
    for t in range(q.shape[1]):
        first = max(0, t - window)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, first : t + 1]) / math.sqrt(q.shape[-1])
        result.append(torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, first : t + 1]))
    return torch.stack(result, 1)


def check_backend(backend, device, dtype, tolerance, length, head_dim, gradients):
    torch.manual_seed(0)
    windows, shape = [0, 1, 64, length // 2, length], (2, length, 2, head_dim)
    attention = train.Attention(backend, length, set(windows), device)
    if device.type == "cuda" and backend == "flex":  # uncompiled it is another implementation
        attention = torch.compile(attention, dynamic=False)
    for window in windows:
        inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=gradients) for _ in range(3)]
        seen, expected = attention(*inputs, window), attention_by_hand(*inputs, window)
        assert (seen.double() - expected).norm() <= tolerance * expected.norm()
        if gradients:
            direction = torch.randn_like(expected)
            ours = torch.autograd.grad(seen, inputs, direction.to(dtype))
            theirs = torch.autograd.grad(expected, inputs, direction)
            for a, b in zip(ours, theirs, strict=True):  # of a window of 0, q and k have no gradient
                assert (a.double() - b.double()).norm() <= tolerance * max(b.double().norm(), direction.norm())


@pytest.mark.parametrize("length", [128, 151])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", ["matmul", "sdpa", "flex", "flash3"])
def test_every_backend_honours_the_window(backend, head_dim, length, local_kernel):
    local_kernel()
    # PyTorch has no backward pass of FlexAttention for CPUs
    check_backend(backend, CPU, torch.float32, 1e-5, length, head_dim, gradients=backend != "flex")


@pytest.mark.gpu
@pytest.mark.parametrize("length", [512, 333])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", ["flash3", "flex", "sdpa", "matmul"])
def test_every_backend_honours_the_window_on_a_gpu(backend, head_dim, length):
    device = torch.device("cuda")
    if backend == "flash3" and train.choose_attention(device, compiled=True)[0] != "flash3":
        pytest.skip(train.choose_attention(device, compiled=True)[1])
    check_backend(backend, device, torch.bfloat16, 1e-2, length, head_dim, gradients=True)


def test_a_window_hides_what_lies_before_it():
    q, k, v = (torch.randn(1, 32, 1, 16) for _ in range(3))
    attention = train.Attention("matmul", 32, {5}, CPU)
    before = attention(q, k, v, 5)
    k[:, 10], v[:, 10] = 100.0, 100.0
    changed = (attention(q, k, v, 5) != before).any(-1)[0, :, 0]
    assert changed.nonzero().flatten().tolist() == [10, 11, 12, 13, 14, 15]


# flash-attention 3


def write_kernel(folder, source=KERNEL, metadata=METADATA, variant="torch-cuda"):
    """A build for every GPU, as the package lays it out; its variant for this PyTorch, which is a build for CUDA."""
    build = folder / "build" / variant
    build.mkdir(parents=True)
    (build / "metadata.json").write_text(json.dumps(metadata))
    (build / "__init__.py").write_text(source)
    return folder


@pytest.fixture
def local_kernel(tmp_path, monkeypatch):
    """Write a kernel and have the package load it from its folder."""

    def write(**parts):
        write_kernel(tmp_path / "kernel", **parts)
        monkeypatch.setenv("LOCAL_KERNELS", f"{train.FLASH_KERNEL['repo_id']}={tmp_path / 'kernel'}")

    prepare.load_kernel.cache_clear()
    yield write
    prepare.load_kernel.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU as choose_attention sees one; what it tries there is tried on the CPU."""
    try_attention = train.try_attention
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(train, "try_attention", lambda backend, device: try_attention(backend, CPU))
    return torch.device("cuda")


def test_a_kernel_that_works_is_taken(local_kernel, hopper):
    local_kernel()
    assert train.choose_attention(hopper, compiled=True)[0] == "flash3"


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"source": KERNEL.replace("window_size[0])", "2 * window_size[0])")}, "results are wrong"),
        ({"source": KERNEL + "raise ImportError('undefined symbol: _ZN3c10')"}, "undefined symbol"),
        ({"source": KERNEL.replace("flash_attn_func", "other")}, "flash_attn_func"),
        ({"source": KERNEL.replace("assert causal", "raise RuntimeError('no kernel image')  # ")}, "no kernel image"),
        ({"source": "def broken("}, "SyntaxError"),
        ({"variant": "torch29-cxx11-cu128-x86_64-linux"}, "Cannot find a build variant"),
        ({"metadata": {}}, "ValueError"),
    ],
)
def test_a_kernel_that_does_not_work_is_named_in_one_line(local_kernel, hopper, parts, reason):
    local_kernel(**parts)
    backend, why = train.choose_attention(hopper, compiled=True)
    assert backend == "flex"
    assert reason in why
    assert "\n" not in why


def test_trying_attention_draws_no_random_numbers(local_kernel, hopper):
    local_kernel()
    state = torch.get_rng_state()
    train.choose_attention(hopper, compiled=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("capability", "compiled", "backend"), [((8, 0), True, "flex"), ((12, 0), True, "flex"), ((8, 0), False, "sdpa")]
)
def test_other_gpus_do_not_ask_for_the_kernel(monkeypatch, capability, compiled, backend):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(train, "try_attention", lambda *arguments: None)  # a kernel that would work
    assert train.choose_attention(torch.device("cuda"), compiled)[0] == backend


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the kernel hub as serves one repository, of a publisher that is trusted or not."""

    def do_GET(self):
        server, path = self.server, self.path.split("?")[0]
        server.asked.append(path)
        api = f"/api/kernels/{train.FLASH_KERNEL['repo_id']}"
        files = {str(file.relative_to(server.folder)): file for file in server.folder.rglob("*") if file.is_file()}
        entries = [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": f"{i:040x}"}
            for i, (name, file) in enumerate(sorted(files.items()))
        ]
        if path == "/api/organizations/kernels-community/overview":
            self.answer({"name": "kernels-community", "fullname": "", "trustedKernelPublisher": server.trusted})
        elif path == f"{api}/tree/v1/build":
            folders = sorted({str(Path(name).parent) for name in files})
            self.answer([{"type": "directory", "path": name, "oid": "0" * 40} for name in folders])
        elif path.startswith(f"{api}/tree/"):
            self.answer(entries)
        elif path.startswith(f"{api}/revision/"):
            self.answer({"id": train.FLASH_KERNEL["repo_id"], "sha": "a" * 40, "siblings": entries})
        elif (name := path.partition("/resolve/")[2].partition("/")[2]) in files:
            self.answer(files[name].read_bytes(), name)
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, body, etag=""):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        for name, value in {
            "Content-Length": len(body),
            "X-Repo-Commit": "a" * 40,
            "ETag": f'"{abs(hash(etag))}"',
        }.items():
            self.send_header(name, value)
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


CHOOSE = """
import torch, train
original, cpu = train.try_attention, torch.device("cpu")
torch.cuda.get_device_capability = lambda: (9, 0)
train.try_attention = lambda backend, device: original(backend, cpu)
print(*train.choose_attention(torch.device("cuda"), True))
"""


def choose(tmp_path, endpoint, **environment):
    """Choose in a process of its own, with an empty cache the first time: the hub's address is read on import."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "LOCAL_KERNELS", "AUTORESEARCH_"))}
    settings = inherited | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache")} | environment
    command = [sys.executable, "-c", CHOOSE]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=60)


def test_a_kernel_is_downloaded_once_and_then_needs_no_hub(hub, tmp_path):
    first = choose(tmp_path, hub.url)
    assert first.stdout.splitlines()[0] == "downloading kernels-community/flash-attn3, once"
    assert first.stdout.splitlines()[-1].startswith("flash3 ")
    assert first.stderr == ""
    asked = len(hub.asked)
    assert choose(tmp_path, hub.url).stdout.startswith("flash3 ")
    assert len(hub.asked) == asked
    hub.shutdown()
    hub.server_close()
    for offline in ("0", "1"):
        again = choose(tmp_path, hub.url, HF_HUB_OFFLINE=offline)
        assert again.stdout.startswith("flash3 ")
        assert again.stderr == ""


def test_a_publisher_who_is_not_trusted_is_not_loaded(hub, tmp_path):
    hub.trusted = False
    seen = choose(tmp_path, hub.url)
    assert "not from a trusted publisher" in seen.stdout.splitlines()[-1]
    assert not any("/resolve/" in path for path in hub.asked)


def test_without_a_hub_one_line_says_so(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        for endpoint in ("http://127.0.0.1:1", f"http://127.0.0.1:{silent.getsockname()[1]}", "http://hub.invalid"):
            seen = choose(tmp_path, endpoint)
            assert seen.returncode == 0
            assert seen.stderr == ""
            (line,) = seen.stdout.splitlines()
            assert line.startswith("flex flash-attention 3 does not work: ")
    offline = choose(tmp_path, "http://127.0.0.1:1", HF_HUB_OFFLINE="1")
    assert offline.stdout.startswith("flex ")


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_the_environment_forces_a_backend(tmp_path, backend):
    seen = choose(tmp_path, "http://127.0.0.1:1", AUTORESEARCH_ATTENTION=backend)
    assert seen.stdout == f"{backend} AUTORESEARCH_ATTENTION says so\n"


def test_a_forced_backend_that_does_not_work_ends_the_run_in_one_line(tmp_path):
    for backend, reason in (("flash3", "ConnectionError|NewConnectionError|MaxRetryError"), ("flex", "backward")):
        seen = choose(tmp_path, "http://127.0.0.1:1", AUTORESEARCH_ATTENTION=backend)
        assert seen.returncode == 1
        line = seen.stderr.splitlines()[-1]
        assert line.startswith(f"AUTORESEARCH_ATTENTION={backend} does not work: ")
        assert re.search(reason, line)
        assert "Traceback" not in seen.stderr


def test_a_backend_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setattr(train, "FORCED_BACKEND", "flash2")
    with pytest.raises(SystemExit, match=r"'flash2' must be one of .*flash3.*AUTORESEARCH_ATTENTION"):
        train.check_knobs(256)
