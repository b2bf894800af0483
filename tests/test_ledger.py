"""After a night with its usual slips the ledger holds what was logged: every row, once, as it was.

The runs are real; their five minutes are cut to 0.2 s. Refusals are obeyed to the letter.
"""

import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys

import night as commands
import pytest
from conftest import HEADER
from night import BASELINE, BRANCH, COMMIT, CRASH, DISCARD, KEEP, RESET, RUN, SEEDS, Night

NOTHING = "nothing to log: the last run has its row"


@pytest.fixture(scope="module")
def whole_night(tmp_path_factory, cache):
    """A baseline of three seeds, a keep, a discard, a crash, a time-out."""
    night = Night(tmp_path_factory.mktemp("night"), cache / "tokens")
    night.must("uv run prepare.py")
    night.remember("branched")
    night.must(RUN)
    night.remember("baseline run")
    night.must(*SEEDS, BASELINE)
    night.remember("baseline logged")
    night.edit()
    night.must(COMMIT)
    night.remember("better committed")
    night.must(RUN)
    night.remember("better run")
    night.must(KEEP)
    night.remember("better logged")
    night.edit()
    night.must(COMMIT, RUN)
    night.remember("worse run")
    night.must(RESET)
    night.remember("worse reset")
    night.must(DISCARD)
    night.remember("worse logged")
    night.edit(commands.FAILS)
    night.must(COMMIT)
    assert "ZeroDivisionError" in night.do(RUN)[1]
    night.remember("crash run")
    night.must(RESET)
    night.remember("crash reset")
    night.must(CRASH)
    night.remember("crash logged")
    night.edit(commands.HANGS)
    night.must(COMMIT)
    assert night.do(RUN)[0] == 1
    night.must(RESET)
    night.remember("time-out reset")
    night.must(CRASH)
    night.remember("over")
    return night


@pytest.fixture
def night(whole_night):
    return whole_night.back_to("over")


def table(night):
    """The rows of results.tsv, each a list of its five fields."""
    lines = (night.clone / "results.tsv").read_text().splitlines()
    assert lines[0] == HEADER
    return [line.split("\t") for line in lines[1:]]


def collect_garbage(night):
    night.git("reflog", "expire", "--expire=now", "--all")
    night.git("gc", "-q", "--prune=now")


# rows


def test_a_night_is_in_the_ledger(night):
    night.verify()
    rows = table(night)
    assert [row[3] for row in rows] == ["keep", "keep", "discard", "crash", "crash"]
    assert [row[1:3] for row in rows[3:]] == [["0.000000", "0.0"]] * 2
    assert [row[4] for row in rows] == ["baseline (3 seeds)", *["an idea"] * 4]
    subjects = night.git("log", "--format=%s", "main..HEAD").splitlines()[::-1]
    kept = ["log keep: baseline (3 seeds)", "an idea", "log keep: an idea"]
    assert subjects == [*kept, "log discard: an idea", "log crash: an idea", "log crash: an idea"]


def test_a_night_is_on_record(night):
    runs = night.runs()
    finished = [("finished", seed) for seed in (42, 43, 44, 42, 42)]
    assert night.statuses() == [*finished, ("crash", 42), ("timeout", 42)]
    for run in runs:
        source = (night.cache / "runs" / run["id"] / "train.py").read_text()
        assert source.strip() == night.git("show", f"{run['commit']}:train.py")
    assert [run["log"].get("row") for run in runs if run["log"]] == night.rows


def test_a_row_has_the_mean_over_the_seeds_and_the_most_memory(night):
    runs = night.runs()[:3]
    value, memory = table(night)[0][1:3]
    assert value == f"{statistics.fmean(run['val_bpb'] for run in runs):.6f}"
    assert memory == f"{max(run['peak_vram_mb'] for run in runs) / 1024:.1f}"


def test_several_runs_of_one_seed_count_by_their_mean(night):
    night.back_to("baseline run").must(RUN, SEEDS[0], BASELINE)
    first, second, other = (run["val_bpb"] for run in night.runs())
    assert table(night)[0][1] == f"{((first + second) / 2 + other) / 2:.6f}"
    assert table(night)[0][4] == "baseline (2 seeds)"


def test_the_ledger_is_shown_with_where_the_night_stands(night):
    text = night.back_to("worse reset").must("uv run prepare.py log")
    assert text.splitlines()[:3] == [HEADER, *night.rows]
    for start in ("noise: ", "best_kept: ", "difference: ", "its_row: +none yet"):
        assert re.search(f"^{start}", text, re.MULTILINE)
    assert "its_row:          " + night.back_to("over").rows[-1] in night.must(
        "uv run prepare.py log"
    )


@pytest.mark.parametrize(
    ("said", "logged"),
    [
        ("-x + wider", "-x + wider"),
        ("wi\udcffd\u200ber \n\t é", "wider é"),
        ("wider \x01", "wider"),
        ("\x01 \x02 wider", "wider"),
    ],
)
def test_a_description_is_one_line_of_what_can_be_printed(night, said, logged):
    night.back_to("better run")
    assert commands.Command(night, ["prepare.py", "log", "keep", said]).wait()[0] == 0
    assert table(night)[-1][4] == logged
    night.refused(KEEP, NOTHING)
    assert len(table(night)) == 2


@pytest.mark.parametrize("words", [[], [""], [" \t"], ["\x01 \x02"]])
def test_a_row_without_a_description_is_refused(night, words):
    night.back_to("better run")
    status, text = commands.Command(night, ["prepare.py", "log", "keep", *words]).wait()
    assert status != 0
    assert "what was tried" in text
    night.verify()


# no row is lost


REST = {
    "branched": [RUN, KEEP],
    "baseline run": [KEEP],
    "baseline logged": ["edit", COMMIT, RUN, KEEP],
    "better committed": [RUN, KEEP],
    "better run": [KEEP],
    "better logged": ["edit", COMMIT, RUN, RESET, DISCARD],
    "worse run": [RESET, DISCARD],
    "worse reset": [DISCARD],
    "crash run": [RESET, CRASH],
    "crash reset": [CRASH],
    "time-out reset": [CRASH],
    "over": ["edit", COMMIT, RUN, KEEP],
}


def reset_and_go_on(night, point, back):
    night.back_to(point)
    runs, rows = night.runs(), list(night.rows)
    if int(night.git("rev-list", "--count", "HEAD")) <= int(back[5:]):
        pytest.skip(f"{back} was never committed")
    night.git("reset", "-q", "--hard", back)
    for command in REST[point]:
        if command == "edit":
            night.edit()
        elif command.startswith("uv run prepare.py log"):
            night.carry_on(command)
        else:
            night.do(command)
    night.verify()
    assert night.rows[: len(rows)] == rows
    assert [run["id"] for run in night.runs()][: len(runs)] == [run["id"] for run in runs]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("back", [f"HEAD~{number}" for number in range(5)])
@pytest.mark.parametrize("point", REST)
def test_a_reset_to_any_commit_at_any_point_loses_no_row_and_no_run(night, point, back):
    rows = reset_and_go_on(night, point, back)
    if point != "better committed":  # there what was to be run is gone, and its parent has a row
        assert len(night.rows) == len(rows) + 1


@pytest.mark.parametrize(("point", "back"), [("worse reset", "HEAD~3"), ("crash run", "HEAD~2")])
def test_a_reset_too_far_loses_no_row(night, point, back):
    rows = reset_and_go_on(night, point, back)
    assert len(night.rows) == len(rows) + 1


def kill_and_repeat(night, point, command, die):
    """Kill a log before its `die`th write; return whether it came so far."""
    night.back_to(point)
    status, text = night.do(command, die=die)
    if status == 0:
        return False
    assert status == -9, text
    night.carry_on(command)
    assert len(night.rows) == len(night.points[point]) + 1
    night.verify()
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "command"),
    [
        ("baseline run", KEEP),
        ("better run", KEEP),
        ("worse reset", DISCARD),
        ("crash reset", CRASH),
    ],
)
def test_a_log_that_is_killed_at_any_step_is_completed_by_the_next(night, point, command):
    for die in itertools.count(1):
        if not kill_and_repeat(night, point, command, die):
            break
    assert die > 20


@pytest.mark.parametrize("die", [25, 30, 33, 36, 39])
def test_a_killed_log_is_completed_by_the_next(night, die):
    kill_and_repeat(night, "worse reset", DISCARD, die)


@pytest.mark.slow
@pytest.mark.parametrize("die", range(20, 50, 2))
def test_a_log_that_was_killed_and_forgotten_is_completed_by_that_of_the_next_run(night, die):
    night.back_to("better run")
    night.do(KEEP, die=die)
    night.rows = [run["log"]["row"] for run in night.runs() if run["log"]]
    logged = len(night.rows)
    night.edit()
    night.must(COMMIT, RUN, RESET)
    night.carry_on(DISCARD)
    night.verify()
    assert len(night.rows) == logged + 1


@pytest.mark.parametrize("command", [KEEP, DISCARD, CRASH])
def test_a_repeated_log_writes_nothing(night, command):
    head = night.git("rev-parse", "HEAD")
    night.refused(command, NOTHING)
    night.verify()
    assert night.git("rev-parse", "HEAD") == head


@pytest.mark.parametrize("commit", [False, True])
def test_a_ledger_changed_by_hand_is_as_it_was_logged_after_the_next_log(night, commit):
    night.back_to("better run")
    ledger = night.clone / "results.tsv"
    by_hand = "1234567\t0.100000\t0.0\tkeep\tby hand\n"
    ledger.write_text(ledger.read_text().replace("keep", "discard") + by_hand)
    if commit:
        night.must("git commit train.py --amend --no-edit")
    night.carry_on(KEEP)
    night.verify()


@pytest.mark.parametrize("lost", ["file", "replaced by a folder"])
def test_a_ledger_that_is_gone_comes_back(night, lost):
    night.back_to("better run")
    ledger = night.clone / "results.tsv"
    ledger.unlink()
    if lost == "file":
        night.must(KEEP)
    else:
        ledger.mkdir()
        night.refused(KEEP, "results.tsv was not committed.*The row is safe")
        ledger.rmdir()
        night.carry_on(KEEP)
    night.verify()


def test_a_commit_that_git_refuses_is_made_by_the_same_command_later(night):
    night.back_to("worse reset")
    lock = night.clone / ".git" / "index.lock"
    lock.touch()
    night.refused(DISCARD, r"(?s)results\.tsv was not committed.*index\.lock.*The row is safe")
    lock.unlink()
    collect_garbage(night)
    night.carry_on(DISCARD)
    night.verify()


def test_a_signature_that_nobody_can_give_is_not_asked_for(night):
    night.back_to("better run")
    night.git("config", "commit.gpgSign", "true")
    night.git("config", "gpg.program", "false")
    night.must(KEEP)
    night.verify()


# discarded commits


def test_discarded_commits_outlive_garbage_collection(night):
    collect_garbage(night)
    for row in night.rows[1:]:  # the baseline is main's
        assert "train.py" in night.must(f"git show {BRANCH}/{row[:7]}")


def test_an_uncommitted_run_that_was_discarded_outlives_garbage_collection(night):
    night.edit()
    edited = (night.clone / "train.py").read_text()
    night.must(RUN, RESET)
    night.carry_on(DISCARD)
    night.verify()
    collect_garbage(night)
    assert night.git("show", f"{BRANCH}/{night.rows[-1][:7]}:train.py") == edited.strip()


def test_garbage_collection_keeps_the_order_of_rows_whose_runs_were_not_committed(night):
    night.back_to("better logged")
    night.edit()
    night.must(RUN)
    night.carry_on(KEEP)
    collect_garbage(night)
    kept = (night.clone / "train.py").read_text()
    night.edit()
    night.must(COMMIT, RUN)
    night.carry_on(DISCARD)
    night.verify()
    assert (night.clone / "train.py").read_text() == kept


# refusals, each with what to do


@pytest.mark.parametrize(
    ("point", "command", "says"),
    [
        ("better run", CRASH, r"val_bpb is \d\.\d{6}: log keep or discard instead"),
        ("crash reset", KEEP, r"the last run has no val_bpb \(crash\): log crash instead"),
        ("time-out reset", DISCARD, r"the last run has no val_bpb \(timeout\): log crash instead"),
        ("worse reset", KEEP, "HEAD has another train.py than the last run: `git reset --hard"),
        ("worse run", DISCARD, "the experiment is still in the branch: `git reset --hard"),
        ("crash run", CRASH, "the experiment is still in the branch: `git reset --hard"),
    ],
)
def test_a_row_that_the_record_contradicts_is_refused_and_the_advice_leads_to_one(
    night, point, command, says
):
    night.back_to(point).refused(command, says)
    night.verify()
    night.carry_on(command)
    night.verify()
    assert len(night.rows) == len(night.points[point]) + 1


def test_without_a_run_there_is_nothing_to_log(night):
    night.back_to("branched")
    assert "nothing to log, no run here yet: `uv run train.py`" in night.carry_on(BASELINE)
    night.verify()


def test_an_uncommitted_edit_is_committed_before_it_is_kept(night):
    night.edit()
    night.must(RUN)
    assert '`git commit train.py -m "<idea>"`' in night.carry_on(KEEP)
    night.verify()
    assert night.rows[-1][:7] == night.git("rev-parse", "HEAD~1")[:7]


def test_an_uncommitted_edit_is_taken_out_before_it_is_discarded(night):
    night.edit()
    night.must(RUN)
    assert "the experiment is still in the branch" in night.carry_on(DISCARD)
    night.verify()
    assert night.git("status", "--short") == ""


def test_a_second_commit_of_an_experiment_is_taken_out_too(night):
    night.back_to("better logged")
    kept = (night.clone / "train.py").read_text()
    night.edit()
    night.must(COMMIT)
    night.edit()
    night.must(COMMIT, RUN, RESET)
    night.carry_on(DISCARD)
    night.verify()
    assert (night.clone / "train.py").read_text() == kept


@pytest.mark.parametrize("committed", [False, True])
def test_another_file_is_restored_before_the_run_is_logged(night, committed):
    night.back_to("better committed")
    with (night.clone / "program.md").open("a") as file:
        file.write("a rule that suits me\n")
    (night.clone / "Müll und mehr.txt").write_text("x")
    night.git("add", "Müll und mehr.txt")
    if committed:
        night.must("git commit train.py --amend --no-edit")
    night.must(RUN)
    seen = night.carry_on(KEEP)
    assert re.search(r"only train\.py may change, but 'Müll und mehr\.txt' program\.md did", seen)
    night.verify()
    assert night.git("status", "--short") == ""


def test_a_file_that_was_committed_and_removed_is_taken_out_of_the_branch(night):
    night.back_to("better committed")
    (night.clone / "layers.py").write_text("WIDTH = 1\n")
    night.git("add", "layers.py")
    night.must("git commit train.py --amend --no-edit", RUN)
    (night.clone / "layers.py").unlink()
    night.carry_on(KEEP)
    night.verify()


def test_a_module_that_no_commit_has_is_no_part_of_an_experiment(night):
    night.back_to("better run")
    (night.clone / "layers.py").write_text("WIDTH = 1\n")
    (night.clone / "run.log").touch()  # harmless
    night.refused(KEEP, "'layers.py' is not in git: move what it does into train.py")
    (night.clone / "layers.py").unlink()
    night.must(KEEP)
    night.verify()


@pytest.mark.parametrize("name", ["prepare.py", "harness/run.py", "harness/ledger.py"])
@pytest.mark.parametrize("flag", ["--skip-worktree", "--assume-unchanged"])
def test_a_locked_file_that_git_was_told_to_overlook_is_seen(night, name, flag):
    night.back_to("better run")
    night.git("update-index", flag, name)
    with (night.clone / name).open("a") as file:
        file.write("# a change\n")
    night.refused(KEEP, f"{name} (is not that of|did: )")
    night.verify()


def test_a_run_by_another_judge_has_no_row_beside_those_of_this_one(night):
    night.back_to("better committed")
    with (night.clone / "prepare.py").open("a") as file:
        file.write("MAX_LEAK = 9\n")
    assert "does not compare with what was kept" in night.do(RUN)[1]
    night.must("git restore -s main -SW prepare.py", RUN, KEEP)
    night.verify()
    assert len({run["harness"] for run in night.runs() if run["log"]}) == 1


def test_a_baseline_by_another_judge_is_refused(night):
    night.back_to("branched")
    with (night.clone / "prepare.py").open("a") as file:
        file.write("MAX_LEAK = 9\n")
    night.must(RUN, "git restore -s main -SW prepare.py")
    night.refused(BASELINE, "the last run was judged by other code: `uv run train.py`")
    night.must(RUN, BASELINE)
    night.verify()


def test_a_run_of_another_corpus_has_no_row_beside_those_of_this_one(night):
    night.back_to("better committed")
    text = night.do(f"{RUN} --corpus {commands.TEXT.parent / 'isomorphism'}")[1]
    assert "does not compare with what was kept" in text
    assert night.statuses()[-1] == ("stopped", 42)
    night.must(RUN, KEEP)
    night.verify()


def test_another_seed_alone_is_no_row_to_keep(night):
    night.back_to("better committed").must(SEEDS[0])
    assert "a row needs the run with seed 42: `uv run train.py`" in night.carry_on(KEEP)
    night.verify()
    assert table(night)[-1][4] == "an idea (2 seeds)"


def test_a_killed_run_is_run_again(night):
    once = "if not os.path.exists('again'): open('again', 'w'); "
    night.edit(once + commands.DIES.split("; ")[1].replace("signal.SIGKILL", "9"))
    night.must(COMMIT)
    assert night.do(RUN)[0] == -9
    night.must(RESET)
    assert (
        "the last run has no val_bpb (killed from outside, or out of memory): `git reset --hard"
        in night.carry_on(KEEP)
    )
    night.verify()


def test_a_confirming_run_that_failed_hides_no_value(night):
    night.edit("if '43' in __import__('sys').argv: Bigram.forward = lambda *_: 1 / 0")
    night.must(COMMIT, RUN)
    assert night.do(SEEDS[0])[0] == 1
    night.must(RESET)
    night.refused(CRASH, "log keep or discard instead")
    night.must(DISCARD)
    night.verify()
    assert night.rows[-1].split("\t")[1] != "0.000000"


def test_a_run_that_goes_on_is_not_logged(night):
    night.edit(
        "import time; Bigram.forward = lambda *_: print('here', flush=True) or time.sleep(99)"
    )
    night.must(COMMIT)
    run = night.start(RUN)
    run.wait_for("here")
    text = night.do(CRASH)[1]
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert f"process {run.pid} still runs train.py: wait for its end, then log it" in text
    night.must(RESET, CRASH)
    night.verify()


def test_nothing_is_logged_but_on_a_branch_for_experiments(night):
    night.back_to("better run")
    for place, name in (("main", "main"), ("--detach", "no branch")):
        night.git("checkout", "-q", place)
        advice = "`git checkout -b autoresearch/<tag> main`"
        night.refused(KEEP, f"nothing is logged on {name}: {advice}")
    night.git("checkout", "-q", BRANCH)
    night.must(KEEP)
    night.verify()


def test_without_a_main_or_a_repository_it_says_so(night):
    night.back_to("better run")
    night.git("branch", "-m", "main", "trunk")
    night.refused(KEEP, "git has no main to compare with")
    night.git("branch", "-m", "trunk", "main")
    (night.clone / ".git").rename(night.path / "git")
    night.refused(KEEP, "not a git repository")
    (night.path / "git").rename(night.clone / ".git")
    night.must(KEEP)
    night.verify()


# several folders


def test_a_second_worktree_has_rows_and_values_of_its_own(night):
    night.back_to("better run")
    other = night.path / "other"
    night.git("worktree", "add", "-q", "-b", "autoresearch/other", other, "main")
    with commands.elsewhere(night, other):
        night.must(RUN, BASELINE)
        (run,) = night.runs()
        assert run["val_bpb"] not in [run["val_bpb"] for run in night.runs()[1:]]
        assert [row[:2] for row in table(night)] == [[run["commit"][:7], f"{run['val_bpb']:.6f}"]]
        assert night.git("show", "autoresearch/other:results.tsv").splitlines()[1:] == night.rows
    night.carry_on(KEEP)
    night.verify()
    shutil.rmtree(other)


def test_a_night_that_begins_after_another_has_rows_of_its_own(night):
    night.git("checkout", "-q", "-b", "autoresearch/nov26", "main")
    night.rows = []
    assert "the last run has its row on another branch " in night.carry_on(BASELINE)
    assert ["\t".join(row) for row in table(night)] == night.rows
    night.git("checkout", "-q", BRANCH)


def configured_clone(night, path):
    night.git("clone", "-q", night.clone, path)
    for name, value in (("user.name", "test"), ("user.email", "test@example.invalid")):
        subprocess.run(["git", "-C", path, "config", name, value], check=True)
    return path


@pytest.mark.parametrize("main", [False, True])
def test_a_clone_of_the_branch_goes_on_with_its_rows(night, main):
    rows, other = list(night.rows), configured_clone(night, night.path / "elsewhere")
    with commands.elsewhere(night, other):
        night.rows = rows
        if main:
            night.git("branch", "main", "origin/main")
        night.edit()
        night.must(COMMIT, RUN)
        night.carry_on(KEEP)
        assert ["\t".join(row) for row in table(night)] == night.rows
        assert len(night.rows) == 6
    shutil.rmtree(other)


@pytest.mark.slow
def test_two_clones_of_one_branch_lose_no_row_of_each_other(night):
    first, rows = night.clone, list(night.rows)
    other = configured_clone(night, night.path / "elsewhere")
    for clone, source in ((other, first), (first, other), (other, first)):
        with commands.elsewhere(night, clone):
            night.rows = rows
            night.git("pull", "-q", source, BRANCH)
            night.edit(f"# {source}")
            night.must(COMMIT, RUN)
            night.carry_on(KEEP)
            assert sorted("\t".join(row) for row in table(night)) == sorted(night.rows)
    assert len(rows) == 8
    shutil.rmtree(other)


def test_a_lost_cache_folder_costs_no_row_that_git_has(night):
    shutil.rmtree(night.cache / "runs")
    night.edit()
    night.must(COMMIT, RUN)
    night.carry_on(KEEP)
    night.verify()
    assert len(night.rows) == 6


def test_another_clone_in_the_same_place_goes_on_with_the_old_cache(night):
    again = configured_clone(night, night.path / "again")
    shutil.rmtree(night.clone)
    again.rename(night.clone)
    night.git("branch", "main", "origin/main")
    night.edit()
    night.must(COMMIT, RUN)
    night.carry_on(DISCARD)
    assert sorted("\t".join(row) for row in table(night)) == sorted(night.rows)
    assert len(night.rows) == 6


# records


def test_a_record_that_can_not_be_read_is_passed_over_and_said(night):
    for number, text in enumerate(['{"id": "1', "{}", ""]):
        folder = night.cache / "runs" / f"2020-{number}"
        folder.mkdir()
        (folder / "run.json").write_text(text)
    text = night.must("uv run prepare.py runs")
    assert len(re.findall(r"2020-\d/run\.json can't be read and is skipped", text)) == 3
    assert night.must("uv run prepare.py log").count("an idea") >= 4


def test_runs_are_a_table_of_this_folder_or_of_all(night):
    lines = night.must("uv run prepare.py runs").splitlines()
    assert len(lines) == 9
    assert lines[0].split() == "id commit seed status val_bpb num_steps lost_percent row".split()
    finished = r"\S+\s+\w{7}\s+42\s+finished\s+\d\.\d+\s+[\d.]+\s+[\d.]+\s+keep\s+an idea"
    assert re.match(finished, lines[4])
    assert re.match(r"\S+\s+\w{7}\s+42\s+timeout\s+crash\s+an idea", lines[7])
    for path in (night.cache / "runs").iterdir():
        run = json.loads((path / "run.json").read_text())
        run["repository"] = "/somewhere/else"
        (path / "run.json").write_text(json.dumps(run))
    assert len(night.must("uv run prepare.py runs").splitlines()) == 2
    assert len(night.must("uv run prepare.py runs --all").splitlines()) == 9
    text = commands.Command(night, ["prepare.py", "runs", "--all", "--json"]).wait()[1]
    assert len(json.loads(text)) == 7


@pytest.mark.parametrize("words", ["log", "runs", "runs --json", "runs --all", "audit"])
def test_the_books_are_kept_without_torch(night, words):
    (night.path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None\n")
    night.back_to("better run")
    command = [sys.executable, "prepare.py", *words.split()]
    environ = night.environ | {"PYTHONPATH": str(night.path)}
    result = subprocess.run(command, cwd=night.clone, env=environ, capture_output=True, text=True)
    assert "torch" not in result.stderr
    assert "keep" in result.stdout or "no faults" in result.stdout
