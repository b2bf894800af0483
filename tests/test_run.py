"""train.py and the ledger as a user runs them: subprocesses in a git clone, with the five minutes cut to seconds."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, environ

import prepare
import train

# The budget is no product flag: the test changes the module before train.py asks for it.
SHORT = "import os, prepare; prepare.DEVICE_LOCK = os.environ['LOCKS'] + '/%s.lock'; "
SHORT += "prepare.TIME_BUDGET = 4; import train; {change}; train.main()"
UNCOMPILED = "train.choose_precision = lambda device: (train.torch.float32, False, 'for this test')"
SMALLER = "train.TOTAL_BATCH_SIZE = train.DEVICE_BATCH_SIZE * 256; train.DEPTH = 1; train.COUNT_ROWS = 2**10"

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
    git(path, "init", "-q", "-b", "main")
    git(path, "config", "user.name", "test")
    git(path, "config", "user.email", "test@example.invalid")
    git(path, "add", "-A")
    git(path, "commit", "-qm", "start")
    git(path, "checkout", "-q", "-b", "autoresearch/test")
    return path


def records(clone):
    lines = (prepare.cache_root() / "runs.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["repository"] == str(clone)]


def test_a_run_from_start_to_summary_is_recorded_and_logged(command, clone, folder, corpus):
    result = command("-c", SHORT.format(change="pass"), "--corpus", folder, cwd=clone)
    assert result.returncode == 0, result.stdout
    found = re.search(SUMMARY, result.stdout)
    assert found, result.stdout
    figures = {name: float(value) for name, value in found.groupdict().items() if name != "harness"}
    assert 0.5 < figures["val_bpb"] < math.log2(256)
    assert 4.0 <= figures["training_seconds"] < figures["total_seconds"]
    assert figures["num_steps"] >= 1
    assert figures["total_tokens_M"] == pytest.approx(figures["num_steps"] * 2**12 / 1e6, abs=0.051)
    assert figures["seed"] == 42
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
    assert record["seed"] == 42
    assert record["train_edited"] is False

    logged = command("prepare.py", "log", "keep", "baseline,\twith a tab\nand a line", cwd=clone)
    assert logged.returncode == 0, logged.stdout
    header, row = (clone / "results.tsv").read_text().splitlines()
    assert header == "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
    commit, val_bpb, memory, status, description = row.split("\t")
    assert (commit, val_bpb) == (record["commit"][:7], found["val_bpb"])
    assert float(memory) == pytest.approx(figures["peak_vram_mb"] / 1024, abs=0.051)
    assert (status, description) == ("keep", "baseline, with a tab and a line")
    assert git(clone, "show", "--name-only", "--format=", "HEAD") == "results.tsv"


def test_two_runs_of_one_seed_start_alike_and_another_seed_does_not(command, clone, folder, corpus):
    first_loss = "prepare.Run.progress = lambda self, at=iter((0, 0, 0, 1)): next(at)"
    script = SHORT.format(change="; ".join([UNCOMPILED, SMALLER, first_loss]))
    with (clone / "train.py").open("a") as file:
        file.write("# a text that no other test runs\n")
    outputs = [command("-c", script, "--corpus", folder, "--seed", seed, cwd=clone).stdout for seed in (1, 1, 2)]
    seen = [re.search(r"val_bpb: +(\S+)", output)[1] for output in outputs]
    assert seen[0] == seen[1] != seen[2]
    said = [re.findall(r"this text of train.py was run already, (once|2 times): (.*)", output) for output in outputs]
    once = f"seed 1 {float(seen[0])} on cpu"
    assert not said[0]
    assert [(count, rest.count(once)) for count, rest in said[1] + said[2]] == [("once", 1), ("2 times", 2)]
    noise = abs(float(seen[0]) - float(seen[2])) / math.sqrt(2)
    assert float(re.search(r"noise: +(\S+) \(pooled standard deviation, 2 runs", outputs[2])[1]) == pytest.approx(
        noise, abs=1e-6
    )


def test_a_loss_that_is_not_a_number_ends_the_run_and_is_logged_as_a_crash(command, clone, folder, corpus):
    (clone / "train.py").write_text((ROOT / "train.py").read_text() + "# no other test runs this, with a figure\n")
    git(clone, "commit", "-qam", "a text of its own")
    change = f"{UNCOMPILED}; {SMALLER}; train.HEAD_LR = float('nan')"
    result = command("-c", SHORT.format(change=change), "--corpus", folder, cwd=clone)
    assert result.returncode == 1
    assert re.search(r"the loss of step \d+ is nan", result.stdout)
    (record,) = records(clone)
    assert record["status"] == "crash"
    assert "is nan" in record["traceback"][-1]
    refused = command("prepare.py", "log", "keep", "a crash", cwd=clone)
    assert refused.returncode == 1
    git(clone, "reset", "-q", "--hard", "HEAD~1")
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
    assert "step: 4096 tokens in 8 micro-batches of 2 rows of 256" in result.stdout


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


HANG = "train.fit = lambda run, *_: (print('here', flush=True), {how})"
SLEEP = "__import__('time').sleep(600)"


def begin(clone, folder, how=SLEEP):
    """Start a run that gets as far as its warm-up and hangs there."""
    script = SHORT.format(change=HANG.format(how=how))
    arguments = [sys.executable, "-u", "-c", script, "--corpus", folder]
    process = subprocess.Popen(
        arguments, cwd=clone, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.stdout.readline() != "here\n":
        assert process.poll() is None
    return process


def test_a_second_run_is_refused_until_the_first_is_gone_even_by_kill_9(command, clone, folder, corpus, tmp_path):
    first = begin(clone, folder)
    for cache in (prepare.cache_root(), tmp_path / "another cache"):
        run = ["-c", SHORT.format(change="pass"), "--corpus", folder]
        refused = command(*run, cwd=clone, AUTORESEARCH_CACHE=cache, LOCKS=prepare.cache_root())
        assert refused.returncode == 1
        assert re.search(rf"held by process {first.pid}: two runs at once can't be compared", refused.stdout)
    first.kill()
    first.wait()
    second = command("-c", SHORT.format(change=f"{UNCOMPILED}; {SMALLER}"), "--corpus", folder, cwd=clone)
    assert second.returncode == 0, second.stdout
    assert [record["status"] for record in records(clone)] == ["killed", "finished"]
    assert records(clone)[0]["train_source"] == (clone / "train.py").read_text()


@pytest.mark.parametrize(
    ("how", "where"),
    [
        (SLEEP, "a call that waits"),
        ("__import__('re').match('(a+)+b', 'a' * 99)", "a call into C that lets no other Python thread run"),
    ],
)
def test_a_run_that_hangs_is_ended_with_the_tracebacks_of_all_threads(command, clone, folder, corpus, how, where):
    script = f"import prepare; prepare.RUN_LIMIT = 4; {SHORT.format(change=HANG.format(how=how))}"
    result = command("-c", script, "--corpus", folder, cwd=clone)
    assert result.returncode == 1
    assert len(re.findall(r"^(Current thread|Thread) 0x", result.stdout, re.MULTILINE)) >= 2, result.stdout
    assert "in train" in result.stdout
    assert not (prepare.cache_root() / "runs.jsonl").exists() or not records(clone)
    assert command("prepare.py", "log", "crash", "it hung", cwd=clone).returncode == 0
    (record,) = records(clone)
    assert record["status"] == "timeout"
    assert any("in train" in line for line in record["traceback"])
    assert (clone / "results.tsv").read_text().splitlines()[-1].endswith("\t0.000000\t0.0\tcrash\tit hung")


@pytest.mark.parametrize(
    ("name", "status", "returncode"), [("SIGTERM", "stopped", 1), ("SIGINT", "stopped", 1), ("SIGKILL", "killed", -9)]
)
def test_a_run_that_is_ended_by_a_signal_can_be_logged(command, clone, folder, corpus, name, status, returncode):
    process = begin(clone, folder)
    process.send_signal(getattr(signal, name))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == returncode
    assert "Traceback" not in output
    assert ("stopped, at: starting" in output) == (status == "stopped")
    assert command("prepare.py", "log", "crash", name, cwd=clone).returncode == 0
    assert [record["status"] for record in records(clone)] == [status]
    assert (clone / "results.tsv").read_text().splitlines()[-1].endswith(f"\t0.000000\t0.0\tcrash\t{name}")


def test_a_run_whose_train_py_is_edited_meanwhile_says_so(command, clone, folder, corpus):
    before = (clone / "train.py").read_text()
    edit = "train.check_knobs = lambda _: open('train.py', 'a').write('# edited')"
    result = command("-c", SHORT.format(change=f"{UNCOMPILED}; {SMALLER}; {edit}"), "--corpus", folder, cwd=clone)
    assert "train.py was edited while the run went on" in result.stdout
    (record,) = records(clone)
    assert record["train_edited"] is True
    assert record["train_source"] == before
    assert record["train_committed"] is True


APPEND = """
import prepare, sys
for number in range(50):
    prepare.append_line("appended.jsonl", {"id": f"{sys.argv[1]}-{number}", "text": "x" * 50_000})
"""


def test_processes_that_append_at_once_never_tear_a_line(cache):
    environment = environ()
    processes = [subprocess.Popen([sys.executable, "-c", APPEND, str(i)], cwd=ROOT, env=environment) for i in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    lines = [json.loads(line) for line in (prepare.cache_root() / "appended.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {f"{i}-{number}" for i in range(4) for number in range(50)}
    assert len(lines) == 200


# the clock


@pytest.fixture
def clocked(corpus, tokenizer):
    """A run and a small model that has learned nothing yet."""
    prepare.torch.manual_seed(0)
    vocab = corpus.vocab_size
    model = prepare.torch.nn.Sequential(prepare.torch.nn.Embedding(vocab, 8), prepare.torch.nn.Linear(8, vocab))
    return prepare.Run(corpus, tokenizer, prepare.torch.device("cpu"), 42), model


def learn(run, model):
    """Twenty steps of training."""
    optimizer = prepare.torch.optim.AdamW(model.parameters(), lr=0.1)
    loader = prepare.make_dataloader(run.tokenizer, 4, 64, "train")
    for x, y, _ in itertools.islice(loader, 20):
        prepare.F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    loader.close()


def test_a_model_that_learned_before_the_five_minutes_is_refused(clocked):
    run, model = clocked
    learn(run, model)
    with pytest.raises(
        ValueError, match=r"learned before the five minutes: its loss is \S+ nats where a guess costs 8\.3"
    ):
        run.start(model)


def test_start_stop_and_finish_come_once_and_in_this_order(clocked):
    run, model = clocked
    calls = {"start": [model], "stop": [model], "finish": [model, 16, 1, 1, 1, 0.0]}
    for right in calls:
        for wrong in calls:
            if wrong != right:
                with pytest.raises(ValueError, match="once each, in this order"):
                    getattr(run, wrong)(*calls[wrong])
        getattr(run, right)(*calls[right])
    with pytest.raises(ValueError, match="once each, in this order"):
        run.finish(*calls["finish"])


def test_a_step_that_goes_far_beyond_the_five_minutes_is_refused(clocked):
    run, model = clocked
    run.start(model)
    run.began -= 320
    assert run.progress() == 1
    with pytest.raises(ValueError, match="training took 320 s instead of 300"):
        run.stop(model)


def test_parameters_that_change_after_the_five_minutes_are_refused(clocked):
    run, model = clocked
    run.start(model)
    learn(run, model)
    run.stop(model)
    learn(run, model)
    with pytest.raises(ValueError, match=r"parameters or buffers changed after stop\(\)"):
        run.finish(model, 16, steps=1, tokens=1, depth=1, mfu=0.0)


@pytest.mark.parametrize(
    ("counted_tokens", "part", "counts", "steps"),
    [
        ((2**30, 2**30), (0, 1), [((0, 0.5), 0)], 45),  # too little text
        ((2**14, 2**18), (0.5, 1), [((0, 0.5), 2**18), ((0, 1), 2**18)], 38),  # time is kept for the second count
    ],
)
def test_the_first_step_after_the_warm_up_sees_the_first_of_the_data_that_are_not_counted(
    corpus, tokenizer, monkeypatch, counted_tokens, part, counts, steps
):
    small = {"DEPTH": 1, "DEVICE_BATCH_SIZE": 4, "TOTAL_BATCH_SIZE": 4 * 256, "COUNT_ROWS": 10_007}
    for name, value in {**small, "COUNTED_TOKENS": counted_tokens}.items():
        monkeypatch.setattr(train, name, value)
    ticks = itertools.count(5)
    monkeypatch.setattr(prepare.Run, "progress", lambda run: next(ticks) / 50)
    monkeypatch.setattr(train, "choose_precision", lambda device: (prepare.torch.float32, False, "for this test"))
    step, count, seen, counted, tables = train.train_step, train.count, [], [], []

    def watched_count(run, model, part, most):
        counted.append((part, count(run, model, part, most)))
        tables.append(model.table.sum().item())
        return counted[-1][1]

    def watched(model, optimizer, batches):
        seen.append((batches[0][0].tolist(), float(optimizer.steps), model.head.weight.sum().item()))
        return step(model, optimizer, batches)

    monkeypatch.setattr(train, "train_step", watched)
    monkeypatch.setattr(train, "count", watched_count)
    run = prepare.Run(corpus, tokenizer, prepare.torch.device("cpu"), 7)
    train.train(run)
    assert counted == counts
    assert len(set(tables)) == len(counts)  # counted anew, from other text
    assert len(seen) == 2 + steps
    expected = prepare.make_dataloader(tokenizer, 4, 256, "train", 7, part)
    warm_up, again, first, second = seen[:4]
    assert again[1:] != warm_up[1:] == first[1:]  # it trained, and was undone
    assert [first[0], second[0]] == [next(expected)[0].tolist() for _ in range(2)]
    expected.close()


# the comparison with other runs


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """An empty cache, and a repository on a branch for experiments; calling it adds a run, with a status also a row."""
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    git(tmp_path, "init", "-q", "-b", "autoresearch/test")
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]

    def add(number, val_bpb, text, seed=42, logged=None, branch="autoresearch/test", **more):
        git(tmp_path, *who, "commit", "-q", "--allow-empty", "-m", str(number))
        record = {"id": str(number), "repository": str(tmp_path), "status": "finished"}
        record["commit"] = git(tmp_path, "rev-parse", "HEAD")
        record |= {"harness": "h", "device": "d", "train_sha256": text, "seed": seed, "val_bpb": val_bpb} | more
        prepare.append_line("runs.jsonl", record)
        if logged:
            row = {"status": logged, "branch": branch, "row": f"{number}\t{val_bpb}\t0.0\t{logged}\tan idea"}
            row |= {name: record[name] for name in ("id", "repository", "commit", "train_sha256")}
            prepare.append_line("ledger.jsonl", row)
        return record

    return add


def test_without_seeds_or_kept_runs_there_is_nothing_to_compare(ledger):
    assert prepare.comparison(ledger(1, 1.0, "a")) == {}


def test_the_noise_is_pooled_over_texts_with_several_seeds(ledger):
    for number, (text, seed, val_bpb) in enumerate(
        [("a", 1, 1.00), ("a", 2, 1.02), ("a", 3, 1.04), ("b", 1, 0.90), ("b", 2, 0.92), ("c", 1, 0.5), ("c", 1, 0.6)]
    ):
        ledger(number, val_bpb, text, seed)
    ledger(10, 5.0, "a", 4, harness="another")
    ledger(11, 5.0, "a", 5, device="another")
    ledger(12, 5.0, "a", 6, status="crash")
    record = ledger(13, 0.8, "d")
    expected = math.sqrt((0.02**2 * 2 + 0.02**2 / 2) / 3)  # sums of squares: 0.0008 and 0.0002, over 2 + 1
    lines = prepare.comparison(record)
    assert float(lines["noise"].split()[0]) == pytest.approx(expected, abs=1e-6)
    assert "5 runs" in lines["noise"]
    assert "best_kept" not in lines


def test_a_train_py_is_compared_with_the_best_one_that_this_branch_kept_each_by_the_mean_of_its_seeds(ledger):
    best = ledger(1, 1.00, "a", 1, "keep")["commit"][:7]
    ledger(2, 0.98, "a", 2)
    ledger(3, 0.90, "b", logged="discard")
    ledger(4, 0.80, "c")  # not logged
    ledger(5, 0.70, "d", logged="keep", harness="another")
    ledger(6, 0.60, "e", logged="keep", branch="autoresearch/another")
    ledger(7, 1.20, "f", logged="keep")
    lines = prepare.comparison(ledger(8, 0.952, "g"))
    noise = math.sqrt(0.0002)  # of 1.00 and 0.98
    assert lines["best_kept"] == f"0.990000 ({best}, seeds: 2)"
    assert lines["difference"] == f"-0.038000 ({-0.038 / noise / math.sqrt(1 + 1 / 2):+.2f} x its noise, seeds: 1)"
    lines = prepare.comparison(ledger(9, 0.956, "g", 43))
    noise = math.sqrt((0.0002 + 0.000008) / 2)
    assert lines["difference"] == f"-0.036000 ({-0.036 / noise:+.2f} x its noise, seeds: 2)"
    again = prepare.comparison(ledger(10, 0.999, "a", 3))
    assert again["best_kept"] == f"0.993000 ({best}, seeds: 3)"
    assert "difference" not in again  # from itself


def test_a_run_that_is_not_on_record_is_compared_all_the_same(ledger):
    ledger(1, 1.0, "a", logged="keep")
    full_disk = ledger(2, 0.9, "b", harness="another") | {"harness": "h"}
    assert prepare.comparison(full_disk)["difference"] == "-0.100000 (seeds: 1)"


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_a_busy_machine_is_seen():
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        assert max(prepare.cpu_load() for _ in range(5)) > prepare.OTHER_LOAD
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def test_help_says_what_a_run_takes(command):
    result = command("train.py", "--help")
    assert result.returncode == 0
    for word in ("--corpus", "--shards", "--seed", "uv run train.py"):
        assert word in result.stdout


def test_a_script_of_the_family_finds_the_names_it_imports():
    names = ("MAX_SEQ_LEN", "TIME_BUDGET", "Tokenizer", "make_dataloader", "evaluate_bpb")
    assert all(hasattr(prepare, name) for name in names)
    assert (prepare.choose_corpus()[0].seq_len, 300) == (prepare.MAX_SEQ_LEN, prepare.TIME_BUDGET)


def test_a_script_of_the_family_runs_unmodified(command, folder, corpus):
    result = command(ROOT / "tests" / "family_train.py", AUTORESEARCH_CORPUS=folder, PYTHONPATH=ROOT)
    assert result.returncode == 0, result.stdout
    val_bpb, steps = re.search(r"val_bpb: +(\S+)\nsteps: +(\d+) of 300 s", result.stdout).groups()
    assert 0.5 < float(val_bpb) < math.log2(corpus.vocab_size) / 2
    assert int(steps) >= 1


def test_a_record_that_was_cut_short_costs_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    run = {"id": "1", "repository": str(prepare.ROOT)}
    prepare.append_line("runs.jsonl", run)
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('null\n{}\n{"id": "2", "repo')
    prepare.append_line("runs.jsonl", run | {"id": "3"})
    assert [line["id"] for line in prepare.read_lines("runs.jsonl")] == ["1", "3"]
