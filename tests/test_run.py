"""A run: its summary, folder, limit, lock and clock. Its train.py is tests/tiny_train.py."""

import faulthandler
import itertools
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import termios

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, environ, git, replace
from night import BASELINE, COMMIT, RUN, SEEDS, TEXT, Command, Night, ask

import prepare
from harness import record
from harness.run import GRACE_SECONDS, RUN_LIMIT, Run

SUMMARY = r"""---
val_bpb:          \d+\.\d{6}
training_seconds: \d+\.\d
total_seconds:    \d+\.\d
peak_vram_mb:     \d+\.\d
mfu_percent:      \d+\.\d\d
total_tokens_M:   \d+\.\d
num_steps:        \d+
num_params_M:     \d+\.\d
depth:            \d+
harness:          [0-9a-f]{12}
seed:             \d+
"""
SAYS_HERE = "print('here', flush=True), "
SLEEPS = f"import time; Bigram.forward = lambda *_: ({SAYS_HERE} time.sleep(99))"
IN_C = f"import re; Bigram.forward = lambda *_: ({SAYS_HERE} re.match('(a+)+b', 'a' * 99))"

# Training sets the limit that stop() gives to the evaluation, which takes as long as it takes.
SLOW_EVALUATION = """
import time
import harness.run

def forward(self, ids):
    if self.training:
        harness.run.RUN_LIMIT = {limit}
    return self.head(self.embedding(ids))

def evaluate(*_):
    time.sleep({seconds})
    return 1.0

harness.run.RUN_LIMIT = {before}
Bigram.forward, harness.run.prepare.evaluate_bpb = forward, evaluate
"""


@pytest.fixture
def night(tmp_path, cache):
    """A clone and a cache folder without a run."""
    return Night(tmp_path, cache / "tokens")


def folders(night):
    return sorted((night.cache / "runs").glob("[0-9]*"))


def begin(night, how=SLEEPS):
    """Start a run that hangs in its model."""
    night.edit(how)
    run = night.start(RUN)
    run.wait_for("here")
    return run


# the summary


def test_a_summary_has_the_lines_that_scripts_grep(night):
    text = night.must(RUN)
    assert re.search(f"{SUMMARY}$", text), text
    lines = dict(re.findall(r"^(\w+): +(\S+)$", text, re.MULTILINE))
    assert 0 < float(lines["val_bpb"]) < math.log2(256)
    assert 0.2 <= float(lines["training_seconds"]) < float(lines["total_seconds"])
    assert int(lines["num_steps"]) >= 1
    assert (lines["depth"], lines["seed"]) == ("1", "42")
    (run,) = night.runs()
    assert run["status"] == "finished"
    assert run["val_bpb"] == float(lines["val_bpb"])
    assert run["harness"] == lines["harness"]
    assert run["commit"] == night.git("rev-parse", "HEAD")


def test_a_summary_ends_with_what_helps_to_decide(night):
    night.must(RUN, SEEDS[0], BASELINE)
    night.edit()
    text = night.must(COMMIT, RUN)
    lines = text.split("---\n")[1].splitlines()
    names = [line.split(":")[0] for line in lines]
    assert names[9:] == ["harness", "seed", "noise", "best_kept", "difference"]
    assert re.match(r"noise: {12}\d\.\d{6} \(standard deviation between seeds\)", lines[11])
    assert re.match(rf"best_kept: {{8}}\d\.\d{{6}} \({night.rows[0][:7]}, seeds: 2\)", lines[12])
    assert re.match(r"difference: {7}[+-]\d\.\d{6} \([+-]\S+ x its noise, seeds: 1\)", lines[13])


def test_a_pipe_gets_a_line_now_and_then_and_at_most_60(night):
    text = night.must(RUN)
    assert len(text.splitlines()) + 2 * RUN_LIMIT / 30 <= 60
    replace(night.clone / "harness/run.py", "last - shown > 30", "last - shown > 0.05")
    run = begin(night)
    run.wait_for("training (0 s)\ntraining (0 s)\n")
    os.kill(run.pid, signal.SIGKILL)
    run.wait()


def test_a_terminal_gets_one_live_line(night):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    night.edit(SLEEPS)
    run = Command(night, ["train.py"], output=os.ttyname(theirs))
    seen, live = b"", b"\r\x1b[Ktraining (0 s)"
    while live * 2 not in seen and select.select([ours], [], [], 60)[0]:
        seen += os.read(ours, 1000)
    os.kill(run.pid, signal.SIGKILL)
    ask(wait=run.pid)
    os.close(theirs)
    os.close(ours)
    assert live * 2 in seen


def test_seeds_decide_a_run(night):
    steps = "import harness.run; harness.run.Run.progress = lambda _, at=iter((0, 0, 1)): next(at)"
    night.edit(steps)
    night.must(COMMIT, RUN, RUN, SEEDS[0])
    first, again, other = (run["val_bpb"] for run in night.runs())
    assert first == again != other


def test_a_run_whose_record_can_not_be_written_still_has_its_summary(night):
    gone = f"shutil.rmtree('{night.cache}/runs', True)"
    night.edit(f"import shutil; Run.stop = lambda *_, stop=Run.stop: stop(*_) or {gone}")
    replace(night.clone / "train.py", "import training_run", "import Run, training_run")
    text = night.must(RUN)
    assert "the run's record could not be written: " in text
    assert re.search(f"{SUMMARY}$", text)


def test_help_says_what_a_run_takes(night):
    text = night.must(f"{RUN} --help")
    assert all(word in text for word in ("--corpus", "--shards", "--seed"))


def test_climbmix_is_refused_on_a_cpu_before_it_is_downloaded(night):
    assert "Use --corpus python" in night.do(f"{RUN} --corpus climbmix")[1]
    assert not (night.cache / "climbmix").exists()


# the folder of a run


def test_a_run_that_goes_on_is_on_record_and_one_that_is_killed_is_seen_to_be(night):
    run = begin(night)
    (folder,) = folders(night)
    assert (folder / "train.py").read_text() == (night.clone / "train.py").read_text()
    before = (folder / "run.json").read_bytes()
    assert night.statuses() == [("running", 42)]
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait()[0] == -9
    assert night.statuses() == [("killed", 42)]
    assert (folder / "run.json").read_bytes() == before  # nobody had to complete it


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_run_that_is_stopped_says_where(night, name):
    run = begin(night)
    os.kill(run.pid, getattr(signal, name))
    status, text = run.wait()
    assert status == 1
    assert "stopped while training" in text
    assert "Traceback" not in text
    assert night.statuses() == [("stopped", 42)]


def test_a_run_that_fails_has_its_traceback_on_record(night):
    night.edit("Bigram.forward = lambda *_: 1 / 0")
    assert "ZeroDivisionError" in night.do(RUN)[1]
    (run,) = night.runs()
    assert run["status"] == "crash"
    assert run["traceback"][-1] == "ZeroDivisionError: division by zero"


def test_a_loss_that_is_not_a_number_ends_the_run(night):
    night.edit("LR = 1e30")
    assert re.search(r"the loss of step \d+ is (nan|inf)", night.do(RUN)[1])
    assert night.statuses() == [("crash", 42)]


@pytest.mark.parametrize(
    "code",
    [
        "from harness.run import Run; Run.finish = lambda *_, **__: None",
        "Bigram.forward = lambda *_: __import__('sys').exit()",
    ],
)
def test_a_run_that_ends_without_being_judged_is_a_crash(night, code):
    night.edit(code)
    status, text = night.do(RUN)
    assert (status, night.statuses()) == (1, [("crash", 42)])
    assert "no val_bpb: " in text


def killed_at(night, die):
    """Kill a run before its `die`th write: every folder is whole. Return whether it came so far."""
    status, _ = night.do(RUN, die=die)
    for folder in folders(night):
        assert (folder / "train.py").read_text() == (night.clone / "train.py").read_text()
        assert (folder / "traceback.txt").exists()
        json.loads((folder / "run.json").read_text())
    text = night.must("uv run prepare.py runs")
    assert "can't be read" not in text
    return status == -9


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_write_leaves_a_whole_folder_or_none(night):
    for die in itertools.count(1):
        if not killed_at(night, die):
            break
    assert die > 10
    assert {status for status, _ in night.statuses()} == {"killed", "finished"}


@pytest.mark.parametrize("die", [10, 14])
def test_a_run_that_is_killed_at_a_write_leaves_a_whole_folder_or_none(night, die):
    assert killed_at(night, die)


MAKES_RUNS = """
import sys
from harness import record
for number in range(25):
    run = {"id": record.new_id() + f"-{number}", "status": "running", "process": sys.argv[1]}
    with record.create_run(run, b"x" * 50_000):
        record.write_run(run | {"status": "finished"})
"""


def test_processes_that_make_runs_at_once_lose_none(tmp_path, monkeypatch):
    arguments = [sys.executable, "-c", MAKES_RUNS]
    options = {"cwd": ROOT, "env": environ(AUTORESEARCH_CACHE=tmp_path)}
    processes = [subprocess.Popen([*arguments, str(i)], **options) for i in range(4)]
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    while any(process.poll() is None for process in processes):
        assert {run["status"] for run in record.read_runs()} <= {"running", "finished"}
    runs = record.read_runs()
    assert [process.wait() for process in processes] == [0] * 4
    assert sorted(run["process"] for run in runs) == sorted("0123" * 25)
    assert {run["status"] for run in runs} == {"finished"}


# the limit


@pytest.mark.parametrize(("how", "where"), [(SLEEPS, "a call that waits"), (IN_C, "a call into C")])
def test_a_run_that_hangs_is_ended_with_tracebacks_on_record(night, how, where):
    run = begin(night, f"import harness.run; harness.run.RUN_LIMIT = 1; {how}")
    assert run.wait()[0] == 1
    (run,) = night.runs()
    assert run["status"] == "timeout"
    assert any("in main" in line for line in run["traceback"])


def test_an_evaluation_that_outlasts_the_limit_of_training_is_not_lost(night):
    night.edit(SLOW_EVALUATION.format(before=3, limit=60, seconds=4.5))
    assert "val_bpb:          1.000000" in night.must(RUN)
    assert night.statuses() == [("finished", 42)]


def test_an_evaluation_that_hangs_is_ended_by_its_own_limit(night):
    night.edit(SLOW_EVALUATION.format(before=60, limit=1, seconds=99))
    assert night.do(RUN)[0] == 1
    (run,) = night.runs()
    assert run["status"] == "timeout"
    assert any("in finish" in line for line in run["traceback"])


# the lock


def test_a_second_run_is_refused_with_the_pid_of_the_first_until_that_is_gone(night):
    first = begin(night)
    for other in (night.cache, night.path / "another cache"):
        night.environ["AUTORESEARCH_CACHE"] = str(other)
        status, text = night.do(RUN)
        assert status == 1
        assert f"held by process {first.pid}: two runs at once can't be compared" in text
    night.environ["AUTORESEARCH_CACHE"] = str(night.cache)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    night.git("checkout", "-q", "train.py")
    night.must(RUN)
    assert night.statuses() == [("killed", 42), ("finished", 42)]


# the clock


@pytest.fixture
def run(corpus, tokenizer, tmp_path):
    with (tmp_path / "traceback.txt").open("w") as file:
        yield Run(corpus, tokenizer, torch.device("cpu"), 42, file)
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def model(corpus):
    """One that has learned nothing yet."""
    torch.manual_seed(0)
    size = corpus.vocab_size
    return torch.nn.Sequential(torch.nn.Embedding(size, 8), torch.nn.Linear(8, size))


def learn(run, model):
    """Take twenty steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loader = prepare.make_dataloader(run.tokenizer, 4, 64, "train")
    for x, y, _ in itertools.islice(loader, 20):
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    loader.close()


def finish(run, model):
    run.finish(model, 16, steps=1, tokens=1, depth=1, mfu=0.0)


def test_a_model_that_learned_before_start_is_refused(run, model):
    learn(run, model)
    says = r"learned before start\(\): its loss is \S+ nats, that of an untrained one 8\.3"
    with pytest.raises(ValueError, match=says):
        run.start(model)


def test_start_stop_and_finish_come_once_and_in_this_order(run, model, monkeypatch):
    monkeypatch.setattr(prepare, "read_val_rows", lambda _, read=prepare.read_val_rows: read(_)[:9])
    calls = {"start": run.start, "stop": run.stop, "finish": lambda model: finish(run, model)}
    for right in calls:
        for wrong in calls:
            if wrong != right:
                with pytest.raises(ValueError, match="once each, in this order"):
                    calls[wrong](model)
        calls[right](model)
    with pytest.raises(ValueError, match="once each, in this order"):
        finish(run, model)


def test_what_comes_before_start_is_no_training(run, model):
    run.launched -= 1000  # a long warm-up
    run.start(model)
    assert run.progress() < 1
    run.stop(model)
    assert run.seconds < 1000


def test_a_step_that_goes_far_beyond_the_budget_is_refused(run, model):
    run.start(model)
    run.started -= prepare.TIME_BUDGET + GRACE_SECONDS
    assert run.progress() == 1
    with pytest.raises(ValueError, match=r"training took 31\d s instead of 300"):
        run.stop(model)


@pytest.mark.parametrize("what", ["parameters", "buffers"])
def test_a_model_that_changes_after_stop_is_refused(run, model, what):
    model.register_buffer("seen", torch.zeros(1))
    run.start(model)
    run.stop(model)
    with torch.no_grad():
        next(getattr(model, what)()).view(-1)[0] += 1
    with pytest.raises(ValueError, match=r"weights or buffers changed after stop\(\)"):
        finish(run, model)


def test_a_model_that_learns_while_it_is_judged_is_refused(run, model):
    model.register_buffer("seen", torch.zeros(1))
    run.start(model)
    run.stop(model)
    model.register_forward_hook(lambda *_: model.seen.add_(1) and None)
    with pytest.raises(ValueError, match=r"weights or buffers changed after stop\(\)"):
        finish(run, model)


def test_a_finish_that_comes_late_is_refused(run, model):
    run.start(model)
    run.stop(model)
    run.started -= GRACE_SECONDS + 1
    with pytest.raises(ValueError, match=r"finish\(\) came \d+ s after stop\(\)"):
        finish(run, model)


# the comparison with other runs


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Add a run to the records of a folder, and a commit; with a status, also its row.

    Return what helps to decide about it.
    """
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    git(tmp_path, "init", "-q", "-b", "autoresearch/test")
    git(tmp_path, "config", "user.name", "test")
    git(tmp_path, "config", "user.email", "test@example.invalid")

    def add(val_bpb, text, seed=42, logged=None, branch="autoresearch/test", **more):
        git(tmp_path, "commit", "-q", "--allow-empty", "-m", f"{val_bpb}")
        commit = git(tmp_path, "rev-parse", "HEAD")
        run = {"id": record.new_id(), "repository": str(tmp_path), "status": "finished"}
        run |= {"harness": "h", "device": "d", "train_sha256": text, "seed": seed, "log": {}}
        run |= {"commit": commit, "val_bpb": val_bpb} | more
        if logged:
            run["log"] = {"status": logged, "branch": branch, "commit": commit, "time": run["id"]}
        record.create_run(run, b"").close()
        return record.describe_value(run) | {"commit": commit[:7]}

    return add


def test_without_seeds_or_kept_runs_there_is_nothing_to_compare(add):
    assert list(add(1.0, "a")) == ["commit"]


def test_the_noise_is_the_median_difference_of_all_versions_with_several_seeds(add):
    for val_bpb, text, seed in [(1.00, "a", 1), (1.02, "a", 2), (1.04, "a", 3), (0.90, "b", 1)]:
        add(val_bpb, text, seed)
    for val_bpb, text, seed in [(0.92, "b", 2), (0.50, "c", 1), (0.60, "c", 1)]:
        add(val_bpb, text, seed)
    add(5.0, "a", 4, harness="another")
    add(5.0, "a", 5, device="another")
    add(5.0, "a", 6, status="crash")
    lines = add(0.8, "d")
    expected = 0.02 / 0.9539  # the median of the differences 0.02, 0.02, 0.02, 0.04
    assert lines["noise"] == f"{expected:.6f} (standard deviation between seeds)"
    assert "best_kept" not in lines


def test_a_disturbed_run_counts_only_while_its_seed_has_no_other(add):
    add(1.00, "a", 1, "keep")
    add(3.00, "a", 2, disturbed=True, lost_percent=30.0, shared_gib=0.0)
    assert add(0.9, "b")["best_kept"].startswith("2.000000")
    add(1.20, "a", 2)
    add(9.00, "a", 2, disturbed=True, lost_percent=30.0, shared_gib=0.0)
    add(1.40, "a", 2)
    lines = add(0.9, "b", 43)
    assert lines["best_kept"].startswith("1.150000")
    assert lines["noise"].startswith(f"{0.15 / 0.9539:.6f}")  # 0.3 and 0.0, and no disturbed run


def test_one_bad_run_does_not_spoil_the_noise(add):
    for version in "abc":
        for seed in (1, 2, 3):
            add(1.0 + 0.01 * seed + 3.0 * (version == "b" and seed == 3), version, seed)
    assert add(0.9, "d")["noise"].startswith(f"{0.01 / 0.9539:.6f}")


def test_a_version_is_compared_with_the_best_one_that_this_branch_kept(add):
    best = add(1.00, "a", 1, "keep")["commit"]
    add(0.98, "a", 2)
    add(0.90, "b", logged="discard")
    add(0.80, "c")  # not logged
    add(0.70, "d", logged="keep", harness="another")
    add(0.60, "e", logged="keep", branch="autoresearch/another")
    add(1.20, "f", logged="keep")
    noise = 0.02 / 0.9539  # of 1.00 and 0.98
    times = -0.038 / (noise * math.sqrt(1 + 1 / 2))
    lines = add(0.952, "g")
    assert lines["best_kept"] == f"0.990000 ({best}, seeds: 2)"
    assert lines["difference"] == f"-0.038000 ({times:+.2f} x its noise, seeds: 1)"
    noise = (0.02 + 0.004) / 2 / 0.9539
    lines = add(0.956, "g", 43)
    assert lines["difference"] == f"-0.036000 ({-0.036 / noise:+.2f} x its noise, seeds: 2)"
    lines = add(0.999, "a", 3)
    assert lines["best_kept"] == f"0.993000 ({best}, seeds: 3)"
    assert "difference" not in lines  # from itself


def test_values_of_another_folder_are_not_used_but_for_the_noise(add):
    best = add(1.00, "a", 1, "keep")["commit"]
    add(0.10, "a", 2, repository="/somewhere/else")
    lines = add(0.90, "b")
    assert lines["noise"].startswith(f"{0.9 / 0.9539:.6f}")
    assert lines["best_kept"] == f"1.000000 ({best}, seeds: 1)"


# scripts of the family


def test_a_script_of_the_family_finds_the_names_that_it_imports():
    names = ("MAX_SEQ_LEN", "TIME_BUDGET", "Tokenizer", "make_dataloader", "evaluate_bpb")
    assert all(hasattr(prepare, name) for name in names)
    assert (prepare.choose_corpus().seq_len, 300) == (prepare.MAX_SEQ_LEN, prepare.TIME_BUDGET)


@pytest.mark.slow
def test_a_script_of_the_family_runs_unmodified(night):
    shutil.copy(ROOT / "tests" / "family_train.py", night.clone / "train.py")
    night.environ["AUTORESEARCH_CORPUS"] = str(TEXT)
    replace(night.clone / "train.py", "SECONDS = 64, 2, 2, 4, 4", "SECONDS = 64, 2, 2, 4, 0.2")
    text = night.must(RUN)
    val_bpb, steps = re.search(r"val_bpb: +(\S+)\nsteps: +(\d+) of 0.2 s", text).groups()
    assert 0 < float(val_bpb) < math.log2(256)
    assert int(steps) >= 1
