"""train.py and the ledger as a user runs them: subprocesses in a git clone, with the five minutes cut to seconds."""

import json
import math
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

import prepare

# The budget is no product flag: the test changes the module before train.py asks for it.
SHORT = "import prepare; prepare.TIME_BUDGET = 4; import train; {change}; train.main()"
UNCOMPILED = "train.choose_precision = lambda device: (train.torch.float32, False, 'for this test')"
SMALLER = "train.TOTAL_BATCH_SIZE = train.DEVICE_BATCH_SIZE * 256; train.DEPTH = 1"

SUMMARY = r"""---
val_bpb:          (?P<val_bpb>\d+\.\d{6})
training_seconds: (?P<training_seconds>\d+\.\d)
total_seconds:    (?P<total_seconds>\d+\.\d)
peak_vram_mb:     (?P<peak_vram_mb>\d+\.\d)
mfu_percent:      (?P<mfu_percent>\d+\.\d\d)
total_tokens_M:   (?P<total_tokens_M>\d+\.\d)
num_steps:        (?P<num_steps>\d+)
num_params_M:     (?P<num_params_M>\d+\.\d)
depth:            (?P<depth>\d+)
harness:          (?P<harness>[0-9a-f]{12})
seed:             (?P<seed>\d+)
$"""


def git(clone, *arguments):
    return subprocess.run(["git", *arguments], cwd=clone, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path):
    """What a user has after git clone."""
    path = tmp_path / "clone"
    path.mkdir()
    for name in ("prepare.py", "train.py", "results.tsv"):
        shutil.copy(ROOT / name, path)
    (path / "results.tsv").write_text((ROOT / "results.tsv").read_text().splitlines()[0] + "\n")
    git(path, "init", "-q")
    git(path, "config", "user.name", "test")
    git(path, "config", "user.email", "test@example.invalid")
    git(path, "add", "-A")
    git(path, "commit", "-qm", "start")
    return path


def records(clone):
    lines = (prepare.cache_root() / "runs.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["repository"] == str(clone)]


def test_a_run_from_start_to_summary_is_recorded_and_logged(command, clone, folder, corpus):
    result = command("-c", SHORT.format(change="pass"), "--corpus", folder, "--seed", 7, cwd=clone)
    assert result.returncode == 0, result.stdout
    found = re.search(SUMMARY, result.stdout)
    assert found, result.stdout
    figures = {name: float(value) for name, value in found.groupdict().items() if name != "harness"}
    assert 0.5 < figures["val_bpb"] < math.log2(256)
    assert 4.0 <= figures["training_seconds"] < figures["total_seconds"]
    assert figures["num_steps"] >= 1
    assert figures["total_tokens_M"] == pytest.approx(figures["num_steps"] * 2**14 / 1e6, abs=0.051)
    assert figures["seed"] == 7
    assert found["harness"] == prepare.harness_fingerprint(corpus)
    assert len(result.stdout.splitlines()) <= 60
    for start in ("device: ", "corpus: ", "precision: ", "attention: ", "model: ", "step: "):
        assert re.search(f"^{start}", result.stdout, re.MULTILINE), start

    (record,) = records(clone)
    assert record["status"] == "finished"
    assert record["val_bpb"] == figures["val_bpb"]
    assert record["commit"] == git(clone, "rev-parse", "HEAD")
    assert record["train_committed"] is True
    assert record["train_source"] == (clone / "train.py").read_text()
    assert record["seed"] == 7

    logged = command("prepare.py", "log", "keep", "baseline,\twith a tab\nand a line", cwd=clone)
    assert logged.returncode == 0, logged.stdout
    header, row = (clone / "results.tsv").read_text().splitlines()
    assert header == "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
    commit, val_bpb, memory, status, description = row.split("\t")
    assert (commit, val_bpb) == (record["commit"][:7], found["val_bpb"])
    assert float(memory) == pytest.approx(figures["peak_vram_mb"] / 1024, abs=0.051)
    assert (status, description) == ("keep", "baseline, with a tab and a line")
    assert git(clone, "show", "--name-only", "--format=", "HEAD") == "results.tsv"
    again = command("prepare.py", "log", "keep", "baseline", cwd=clone)
    assert again.returncode == 1
    assert "nothing to log" in again.stdout


def test_two_runs_of_one_seed_start_alike_and_another_seed_does_not(command, clone, folder, corpus):
    first_loss = "prepare.Run.progress = lambda self, at=iter((0, 0, 0, 1)): next(at)"
    report = "finish = prepare.Run.finish; prepare.Run.finish = lambda self, val_bpb, *rest: "
    report += "(print(f'seen {val_bpb:.4f}'), finish(self, val_bpb, *rest))"
    script = SHORT.format(change="; ".join([UNCOMPILED, SMALLER, first_loss, report]))
    seen = [command("-c", script, "--corpus", folder, "--seed", seed, cwd=clone).stdout for seed in (1, 1, 2)]
    seen = [re.search(r"seen (\S+)", output)[1] for output in seen]
    assert seen[0] == seen[1] != seen[2]


def test_a_loss_that_is_not_a_number_ends_the_run_and_is_logged_as_a_crash(command, clone, folder, corpus):
    change = f"{UNCOMPILED}; {SMALLER}; train.HEAD_LR = float('nan')"
    result = command("-c", SHORT.format(change=change), "--corpus", folder, cwd=clone)
    assert result.returncode == 1
    assert re.search(r"the loss of step \d+ is nan", result.stdout)
    (record,) = records(clone)
    assert record["status"] == "crash"
    assert "is nan" in record["traceback"][-1]
    refused = command("prepare.py", "log", "keep", "a crash", cwd=clone)
    assert refused.returncode == 1
    assert command("prepare.py", "log", "crash", "head rate nan", cwd=clone).returncode == 0
    row = (clone / "results.tsv").read_text().splitlines()[-1].split("\t")
    assert row[1:] == ["0.000000", "0.0", "crash", "head rate nan"]


def test_a_micro_batch_that_does_not_fit_memory_is_halved_and_the_batch_stays(command, clone, folder, corpus):
    # the error that CUDA gives, raised by every forward pass of more than two rows
    tight = "forward = train.GPT.forward; full = train.torch.OutOfMemoryError('full'); train.GPT.forward = "
    tight += "lambda self, ids, *y: forward(self, ids, *y) if len(ids) <= 2 else (_ for _ in ()).throw(full)"
    change = f"{UNCOMPILED}; train.DEPTH = 1; {tight}"
    result = command("-c", SHORT.format(change=change), "--corpus", folder, cwd=clone)
    assert result.returncode == 0, result.stdout
    assert "out of memory: micro-batches of 2 rows instead" in result.stdout
    assert "step: 16384 tokens in 32 micro-batches of 2 rows of 256" in result.stdout


def test_without_a_compiler_the_run_goes_on_uncompiled(command, clone, folder, corpus):
    change = f"train.choose_precision = lambda device: (train.torch.float32, True, 'for this test'); {SMALLER}"
    result = command(
        "-c",
        SHORT.format(change=change),
        "--corpus",
        folder,
        cwd=clone,
        CXX="/nowhere/g++",
        TORCHINDUCTOR_CACHE_DIR=clone,
    )
    assert result.returncode == 0, result.stdout
    assert "not compiled after all" in result.stdout


def test_a_second_run_on_the_device_is_refused(command, clone, folder, corpus):
    device = "cpu" if prepare.get_device().type == "cpu" else prepare.torch.cuda.get_device_properties(0).uuid
    with prepare.locked(prepare.cache_root() / f"device-{device}.lock", "", wait=False):
        result = command("train.py", "--corpus", folder, cwd=clone)
    assert result.returncode == 1
    assert re.search(r"held by process \d+: two runs at once can't be compared", result.stdout)


def test_help_says_what_a_run_takes(command):
    result = command("train.py", "--help")
    assert result.returncode == 0
    for word in ("--corpus", "--shards", "--seed", "uv run train.py"):
        assert word in result.stdout


def test_nothing_to_log_is_said(command, clone):
    result = command("prepare.py", "log", "keep", "nothing", cwd=clone)
    assert result.returncode == 1
    assert "nothing to log" in result.stdout


def test_a_script_of_the_family_finds_the_names_it_imports():
    names = ("MAX_SEQ_LEN", "TIME_BUDGET", "Tokenizer", "make_dataloader", "evaluate_bpb")
    assert all(hasattr(prepare, name) for name in names)
    assert (prepare.choose_corpus()[0].seq_len, 300) == (prepare.MAX_SEQ_LEN, prepare.TIME_BUDGET)


FAMILY = """
import torch
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, evaluate_bpb, make_dataloader

tokenizer = Tokenizer.from_directory()
vocab_size = tokenizer.get_vocab_size()
model = torch.nn.Sequential(torch.nn.Embedding(vocab_size, 16), torch.nn.Linear(16, vocab_size))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
loader = make_dataloader(tokenizer, 4, MAX_SEQ_LEN, "train")
for step in range(20):
    x, y, epoch = next(loader)
    loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"seen {TIME_BUDGET} {evaluate_bpb(model, tokenizer, 64):.4f}")
"""


def test_a_script_of_the_family_runs_unmodified(command, folder, corpus):
    result = command("-c", FAMILY, AUTORESEARCH_CORPUS=folder)
    budget, val_bpb = re.search(r"seen (\d+) (\S+)", result.stdout).groups()
    assert int(budget) == 300
    assert 0.5 < float(val_bpb) < math.log2(corpus.vocab_size) / 2


def test_a_record_that_was_cut_short_costs_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    run = {"id": "1", "repository": str(prepare.ROOT)}
    prepare.append_line("runs.jsonl", run)
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"id": "2", "repo')
    prepare.append_line("runs.jsonl", run | {"id": "3"})
    assert [line["id"] for line in prepare.read_lines("runs.jsonl")] == ["1", "3"]


def test_what_git_does_not_commit_is_not_logged_and_can_be_logged_later(command, clone, folder, corpus):
    record = {"id": "1", "time": "", "repository": str(clone), "commit": git(clone, "rev-parse", "HEAD")}
    record |= {"status": "finished", "val_bpb": 1.25, "peak_vram_mb": 1536.0, "train_committed": True}
    prepare.append_line("runs.jsonl", record)
    (clone / ".git" / "index.lock").touch()
    refused = command("prepare.py", "log", "keep", "first", cwd=clone)
    assert refused.returncode == 1
    assert "nothing was logged" in refused.stdout
    assert (clone / "results.tsv").read_text().count("\n") == 1
    (clone / ".git" / "index.lock").unlink()
    assert command("prepare.py", "log", "keep", "first", cwd=clone).returncode == 0
    assert (clone / "results.tsv").read_text().splitlines()[1].split("\t")[1:] == ["1.250000", "1.5", "keep", "first"]


def test_a_run_that_is_stopped_says_so_in_a_line(command, clone, folder, corpus):
    change = f"{UNCOMPILED}; {SMALLER}; train.evaluate_bpb = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)"
    result = command("-c", SHORT.format(change=change), "--corpus", folder, cwd=clone)
    assert result.returncode == 1
    assert "stopped, at: evaluating after" in result.stdout
    assert "Traceback" not in result.stdout
    (record,) = records(clone)
    assert record["status"] == "stopped"
