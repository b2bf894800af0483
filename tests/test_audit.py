"""Each sentence of the audit has a night that deserves it, and a clean night has none."""

import json
import re
import shutil

import pytest
from night import BASELINE, BRANCH, COMMIT, CRASH, DISCARD, FAILS, KEEP, RESET, RUN, SEEDS, Night

AUDIT = "uv run prepare.py audit"


@pytest.fixture(scope="module")
def whole_night(tmp_path_factory, cache):
    """A baseline of two seeds, a discard, a keep; each run has the value that it is given."""
    night = Night(tmp_path_factory.mktemp("night"), cache / "tokens")
    run(night, RUN, 3.00)
    run(night, SEEDS[0], 3.02)
    night.must(BASELINE)
    experiment(night, 3.10, RESET, DISCARD)
    experiment(night, 2.90, KEEP)
    night.remember("over")
    return night


@pytest.fixture
def night(whole_night):
    return whole_night.back_to("over")


def run(night, command, val_bpb):
    """Run train.py, and have it measure this value."""
    night.must(command)
    change(night, -1, val_bpb=val_bpb)


def experiment(night, val_bpb, *log):
    night.edit()
    night.must(COMMIT)
    run(night, RUN, val_bpb)
    night.must(*log)


def change(night, number, **more):
    """Change the record of a run."""
    run = night.runs()[number]
    (night.cache / "runs" / run["id"] / "run.json").write_text(json.dumps(run | more))


def edit_ledger(night, before, after):
    ledger = night.clone / "results.tsv"
    assert before in ledger.read_text()
    ledger.write_text(ledger.read_text().replace(before, after, 1))


def faults(night, *names):
    """What the audit finds; its exit status says whether it is anything."""
    status, text = night.do(" ".join([AUDIT, *names]))
    *found, summary = text.splitlines()
    assert summary == f"{(names or ['results.tsv'])[0]}: {len(found) or 'no'} faults"
    assert status == int(bool(found))
    return found


def test_a_clean_night_has_no_faults(night):
    assert faults(night) == []


def test_the_ledger_of_a_branch_is_audited_wherever_one_is(night):
    night.git("checkout", "-q", "main")
    assert faults(night, BRANCH) == []
    assert len(faults(night)) == 1  # that of main: a commit that nobody has
    assert "failed" in night.do(f"{AUDIT} nowhere")[1]


@pytest.mark.parametrize("how", ["changed", "added"])
def test_a_row_by_hand_is_a_fault(night, how):
    if how == "changed":
        edit_ledger(night, "3.100000", "3.000000")
    else:
        with (night.clone / "results.tsv").open("a") as file:
            file.write(f"{night.rows[0][:7]}\t2.800000\t1.0\tdiscard\tby hand\n")
    number = 2 if how == "changed" else 4
    says = rf"row {number} \(\w{{7}}\): no run on record was logged with these words"
    assert re.match(says, faults(night)[0])


def test_a_row_whose_runs_say_another_value_is_a_fault(night):
    change(night, 0, val_bpb=3.04)
    (fault,) = faults(night)
    assert fault.endswith("): its val_bpb is 3.010000, the mean of its runs 3.030000")


@pytest.mark.parametrize("name", ["harness", "device"])
def test_a_row_of_another_harness_or_device_is_a_fault(night, name):
    experiment(night, 3.20, RESET, DISCARD)
    change(night, -1, **{name: "another"})
    (fault,) = faults(night)
    assert fault.endswith("it does not compare with the row before: another harness, or device")


def test_a_crash_has_no_value_that_could_compare(night):
    night.edit(FAILS)
    night.must(COMMIT)
    night.do(RUN)
    night.must(RESET, CRASH)
    change(night, -1, device="before a fallback was known")
    experiment(night, 3.20, RESET, DISCARD)
    assert faults(night) == []


def test_a_second_row_of_one_train_py_is_a_fault(night):
    commit = night.rows[1][:7]
    back = night.git("rev-parse", "HEAD")
    night.must(f"git reset --hard {commit}", RUN, f"git reset --hard {back}", DISCARD)
    (fault,) = faults(night)
    assert fault.endswith("): its train.py has a row already")


def test_a_keep_that_is_worse_by_more_than_the_noise_is_a_fault(night):
    experiment(night, 3.10, KEEP)
    (fault,) = faults(night)
    seen = "kept with 3.100000 after 2.900000, worse by 6.75 x the noise of the difference"
    assert fault.endswith(f"): {seen}")


def test_a_keep_that_is_worse_within_twice_the_noise_may_have_been_simpler(night):
    experiment(night, 2.95, KEEP)  # 1.69 times
    assert faults(night) == []


def test_a_keep_whose_noise_nobody_knows_is_not_accused(night):
    for number in (0, 1):
        change(night, number, val_bpb=3.01)
    experiment(night, 3.10, KEEP)
    assert faults(night) == []


def test_a_row_whose_commit_is_gone_is_a_fault(night):
    commit = night.rows[1][:7]
    night.git("update-ref", "-d", f"refs/{BRANCH}/{commit}")
    night.git("reflog", "expire", "--expire=now", "--all")
    night.git("gc", "-q", "--prune=now")
    (fault,) = faults(night)
    assert fault == f"row 2 ({commit}): git does not have its commit"


@pytest.mark.parametrize("line", ["not a row", "abcdef0\tlow\t1.0\tkeep\tby hand"])
def test_a_line_that_is_no_row_is_a_fault(night, line):
    with (night.clone / "results.tsv").open("a") as file:
        file.write(f"{line}\n")
    first, second = faults(night)
    commit = line.split("\t")[0]
    assert first.startswith(f"row 4 ({commit}): no run on record")
    assert second == f"row 4 ({commit}): git does not have its commit"


def test_a_row_that_is_missing_is_a_fault(night):
    edit_ledger(night, night.rows[1] + "\n", "")
    assert f"logged, but not in the ledger: {night.rows[1]!r}" in faults(night)


def test_a_run_without_a_row_is_a_fault_once_the_night_has_gone_on(night):
    experiment(night, 2.95, RESET)
    assert faults(night) == []  # it may still be logged
    experiment(night, 2.80, KEEP)
    (fault,) = faults(night)
    assert re.match(r"a run has no row: 2\.950000, run \d{8}-\d{6}-", fault)


def test_a_value_with_runs_of_another_folder_is_a_fault(night):
    change(night, 1, repository="/somewhere/else")
    assert any(fault.endswith("its value has runs of another folder") for fault in faults(night))


def test_runs_of_another_folder_spoil_nothing(night):
    experiment(night, 2.95, RESET)
    change(night, -1, repository="/somewhere/else")
    experiment(night, 2.80, KEEP)
    assert faults(night) == []


def test_a_clone_without_records_is_told_from_a_spoiled_ledger(night):
    shutil.rmtree(night.cache / "runs")
    assert faults(night) == []
