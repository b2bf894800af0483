"""The commands that program.md shows, on real git: after a night with its usual slips the ledger holds what was logged.

The five minutes are cut to half a second, in a commit of the clone; all else is as a user has it.
"""

import ast
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, environ

TAG, HEADER = "nov25", "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
DOCUMENTED = [
    line.strip()
    for block in re.findall(r"^ *```\n(.*?)^ *```$", (ROOT / "program.md").read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
SHORTER = {
    "prepare.py": {"TIME_BUDGET = 300": "TIME_BUDGET = 0.5", "RUN_LIMIT = 600": "RUN_LIMIT = 120"},
    "train.py": {
        "HEAD_DIM = 4, 48, 64": "HEAD_DIM = 1, 64, 64",
        "COUNT_ROWS = 2**23": "COUNT_ROWS = 2**10",
    },
}

# Has PyTorch imported and runs no thread, so that a command takes no time to start: a child for each line of JSON. It
# is killed before its `die`th write to a file, rename, or call of another program.
SERVER = """
import json, os, runpy, signal, sys, traceback
import prepare, torch._dynamo, train

for line in sys.stdin:
    job = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    for number in (1, 2):
        os.dup2(os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(job["cwd"])
    left = job["die"]

    def mortal(event, arguments):
        global left
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "subprocess.Popen"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.argv, sys.path[0] = job["argv"], job["cwd"]
    for name in ("prepare", "train"):
        del sys.modules[name]
    sys.addaudithook(mortal)
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        print("" if isinstance(end.code, int | None) else end.code)
    except BaseException:
        status = traceback.print_exc() or 1
    sys.stdout.flush()
    os._exit(status)
"""


def row_in(text):
    """The row that a refusal says the last run has."""
    return ast.literal_eval(re.search(r"has its row, ('.*?')\. Next", text)[1])


def documented(start):
    """The command of program.md that begins so."""
    return start if start in DOCUMENTED else next(command for command in DOCUMENTED if command.startswith(start))


class Night:
    """A clone and its cache folder, what was logged, and every point of the night to come back to."""

    def __init__(self, path, folder):
        self.path, self.clone, self.rows, self.points, self.executed = path, path / "clone", [], {}, set()
        self.edits = 0
        locks = {"AUTORESEARCH_CACHE": path / "cache", "AUTORESEARCH_CORPUS": folder, "TORCHDYNAMO_DISABLE": 1}
        uv = {"UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_NO_SYNC": 1}
        self.environ = environ(**locks, **uv)
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=ROOT, env=self.environ, stdin=-1, stdout=-1, text=True
        )
        self.clone.mkdir()
        for name in ("prepare.py", "train.py", "program.md", "results.tsv", ".gitignore", "pyproject.toml", "uv.lock"):
            shutil.copy(ROOT / name, self.clone)
        shutil.copy(ROOT / ".python-version", self.clone)
        self.replace("prepare.py", '"/tmp/autoresearch-%s.lock"', f'"{path}/%s.lock"')
        for name, changes in SHORTER.items():
            for before, after in changes.items():
                self.replace(name, before, after)
        (self.clone / "results.tsv").write_text(f"{HEADER}\nabcdef0\t0.900000\t1.0\tkeep\tof another night\n")
        self.git("init", "-q", "-b", "main")
        self.git("config", "user.name", "test")
        self.git("config", "user.email", "test@example.invalid")
        self.git("add", "-A")
        self.git("commit", "-qm", "start")
        self.git("commit", "-qm", "more", "--allow-empty")

    def replace(self, name, before, after):
        text = (self.clone / name).read_text()
        assert text.count(before) == 1, before
        (self.clone / name).write_text(text.replace(before, after))

    def git(self, *arguments, cwd=None):
        command = ["git", *arguments]
        return subprocess.run(command, cwd=cwd or self.clone, check=True, capture_output=True, text=True).stdout.strip()

    def do(self, command, real=False, die=0, cwd=None, **fill):
        """Execute a command of program.md or of a message; returns its exit status and what it printed."""
        self.executed.add(command)
        for name, value in {"tag": TAG, "idea": "an idea", "what": "an idea", "commit": "HEAD", **fill}.items():
            command = re.sub(rf"<(the )?{name}[^>]*>", value, command)
        words = shlex.split(command.replace("…", "what it was"))
        if words[:2] == ["uv", "run"] and not real:
            (output := self.path / "output").unlink(missing_ok=True)
            job = {"argv": words[2:], "cwd": str(cwd or self.clone), "output": str(output), "die": die}
            self.server.stdin.write(json.dumps(job) + "\n")
            self.server.stdin.flush()
            status, text = int(self.server.stdout.readline()), output.read_text()
        else:
            words[0] = os.environ.get("UV", "uv") if words[0] == "uv" else words[0]
            result = subprocess.run(
                words, cwd=self.clone, env=self.environ, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=300
            )
            status, text = result.returncode, result.stdout
        if words[2:4] == ["prepare.py", "log"] and status == 0 and len(words) > 4:
            self.rows.append(text.splitlines()[-1])
        return status, text

    def carry_on(self, command, **how):
        """Execute a command; where it refuses, first the commands that it names. Returns all that was printed."""
        seen = ""
        for _ in range(5):
            status, text = self.do(command, **how)
            seen += text
            if status == 0 or "nothing to log: the last run has its row" in text:
                return seen
            advice = re.findall(r"`([^`]+)`", text)
            assert advice, text
            for other in advice:
                if other != command:
                    assert self.do(other)[0] == 0, (other, seen)
        raise AssertionError(seen)

    def edit(self, text="# an idea"):
        """Change train.py, as no edit before did."""
        self.edits += 1
        self.replace("train.py", "\nif __name__ ==", f"{text}  # edit {self.edits}\n\nif __name__ ==")

    def runs(self):
        lines = (self.path / "cache" / "runs.jsonl").read_text().splitlines()
        return [(run["status"], run["seed"]) for run in map(json.loads, lines)]

    def remember(self, point):
        """Keep what is on disk, to come back to it."""
        for name in ("clone", "cache"):
            shutil.copytree(self.path / name, self.path / "points" / point / name, symlinks=True)
        self.points[point] = list(self.rows)

    def back_to(self, point):
        for name in ("clone", "cache"):
            shutil.rmtree(self.path / name)
            shutil.copytree(self.path / "points" / point / name, self.path / name, symlinks=True)
        self.rows = list(self.points[point])
        return self

    def verify(self):
        """The ledger holds what was logged, on disk and in git, and no garbage collection takes a row's commit."""
        expected = "\n".join([HEADER, *self.rows])
        assert (self.clone / "results.tsv").read_text() == f"{expected}\n"
        assert self.git("show", "HEAD:results.tsv") == expected
        changed = self.git("diff", "--name-only", "main", "HEAD").split()
        assert set(changed) <= {"train.py", "results.tsv"}
        refs = self.git("for-each-ref", "--format=%(refname)", "refs/autoresearch/").split()
        assert {f"refs/autoresearch/{TAG}/{row[:7]}" for row in self.rows} <= set(refs)


RUN, SEEDS = "uv run train.py", ("uv run train.py --seed 43", "uv run train.py --seed 44")
COMMIT, RESET = "git commit -am", "git reset --hard HEAD~1"
KEEP, DISCARD, CRASH = (f"uv run prepare.py log {status}" for status in ("keep", "discard", "crash"))
WRONG = "GPT.forward = lambda *_: 1 / 0"
HANG = "__import__('prepare').RUN_LIMIT = 5; GPT.forward = lambda *_: __import__('time').sleep(600)"


@pytest.fixture(scope="module")
def whole_night(tmp_path_factory, folder):
    """The whole contract, each command as it stands in program.md; the first time through uv."""
    path = tmp_path_factory.mktemp("night")
    shutil.copytree(folder / "algorithms" / "centrality", path / "text")
    night = Night(path, path / "text")

    def do(start, status=0, **fill):
        command = documented(start)
        result = night.do(command, real=command not in night.executed, **fill)
        assert result[0] == status, result[1]
        return result[1]

    assert do("git status --short") == ""
    do("git checkout -b")
    assert "ready: " in do("uv run prepare.py")
    night.remember("branched")
    do(RUN)
    night.remember("baseline run")
    do('uv run prepare.py log keep "baseline"')
    night.remember("baseline logged")
    for seed in SEEDS:
        do(seed)
    night.remember("seeds run")
    night.edit()
    do(COMMIT)
    night.remember("better committed")
    assert "difference:" in do(RUN)
    night.remember("better run")
    do('uv run prepare.py log keep "<')
    night.remember("better logged")
    night.edit()
    do(COMMIT)
    do(RUN)
    night.remember("worse run")
    do(RESET)
    night.remember("worse reset")
    do(DISCARD)
    night.remember("worse logged")
    night.edit(WRONG)
    do(COMMIT)
    assert "ZeroDivisionError" in do(RUN, status=1)
    night.edit(WRONG)
    do("git commit -a --amend --no-edit")
    do(RUN, status=1)
    night.remember("crash run")
    do(RESET)
    night.remember("crash reset")
    do(CRASH)
    night.remember("crash logged")
    night.edit(HANG)
    do(COMMIT)
    do(RUN, status=1)
    night.remember("time-out run")
    do(RESET)
    night.remember("time-out reset")
    do(CRASH)
    night.remember("time-out logged")
    assert "its row: " in do("uv run prepare.py log")
    assert "train.py" in do("git show autoresearch/", commit=night.rows[2][:7])
    do("git log --oneline")
    yield night
    night.server.stdin.close()
    night.server.wait()


@pytest.fixture
def night(whole_night):
    return whole_night.back_to("time-out logged")


def test_every_command_of_program_md_was_executed(night):
    assert set(DOCUMENTED) <= night.executed


def test_the_night_is_in_the_ledger_and_on_record(night):
    night.verify()
    assert [row.split("\t")[3] for row in night.rows] == ["keep", "keep", "discard", "crash", "crash"]
    assert [row.split("\t")[1] for row in night.rows][3:] == ["0.000000"] * 2
    finished = [("finished", seed) for seed in (42, 43, 44, 42, 42)]
    assert night.runs() == [*finished, ("crash", 42), ("crash", 42), ("timeout", 42)]
    subjects = night.git("log", "--format=%s", "main..HEAD").splitlines()[::-1]
    kept = ["log keep: baseline", "an idea", "log keep: an idea"]
    assert subjects == [*kept, "log discard: an idea", "log crash: an idea", "log crash: an idea"]
    night.git("reflog", "expire", "--expire=now", "--all")
    night.git("gc", "-q", "--prune=now")
    for row in night.rows[1:]:
        assert "train.py" in night.git("show", "--stat", row[:7])


REST = {
    "branched": [RUN, KEEP],
    "baseline run": [KEEP],
    "baseline logged": ["edit", COMMIT, RUN, KEEP],
    "better committed": [RUN, KEEP],
    "better run": [KEEP],
    "better logged": ["edit", COMMIT, RUN, RESET, DISCARD],
    "worse run": [RESET, DISCARD],
    "worse reset": [DISCARD],
    "worse logged": ["edit", COMMIT, RUN, KEEP],
    "crash run": [RESET, CRASH],
    "crash reset": [CRASH],
    "time-out run": [RESET, CRASH],
    "time-out reset": [CRASH],
}


@pytest.mark.parametrize("back", ["HEAD~0", "HEAD~1", "HEAD~2", "HEAD~3"])
@pytest.mark.parametrize("point", REST)
def test_a_reset_at_any_point_loses_no_row_and_the_loop_goes_on(night, point, back):
    night.back_to(point)
    runs, rows = night.runs() if point != "branched" else [], list(night.rows)
    if int(night.git("rev-list", "--count", "HEAD")) <= int(back[5:]):
        pytest.skip(f"{back} was never committed")
    night.git("reset", "-q", "--hard", back)
    for command in REST[point]:
        if command == "edit":
            night.edit()
        else:
            night.carry_on(documented(command))
    night.verify()
    assert night.rows[: len(rows)] == rows
    assert night.runs()[: len(runs)] == runs
    if "committed" not in point:  # where the commit that was to be run is gone, its parent was run again, and has a row
        assert len(night.rows) == len(rows) + 1


@pytest.mark.parametrize(
    ("point", "command"),
    [("baseline run", KEEP), ("better run", KEEP), ("worse reset", DISCARD), ("crash reset", CRASH)],
)
def test_a_log_that_is_killed_at_any_step_is_completed_by_the_next(night, point, command):
    for die in itertools.count(1):
        night.back_to(point)
        status, text = night.do(documented(command), die=die)
        if status == 0:
            break
        assert status == -9, text
        status, text = night.do(documented(command))
        if status:
            night.rows.append(row_in(text))
        assert len(night.rows) == len(night.points[point]) + 1
        night.verify()
    assert die > 8


@pytest.mark.parametrize("die", [1, 4, 7, 10, 13, 16, 19, 22])
def test_a_log_that_was_killed_and_forgotten_is_completed_by_the_log_of_the_next_run(night, die):
    night.back_to("better run")
    status, _ = night.do(documented(KEEP), die=die)
    written = (night.path / "cache" / "ledger.jsonl").read_text().splitlines()
    night.edit()
    for command in (COMMIT, RUN, RESET):
        assert night.do(documented(command))[0] == 0
    if len(written) == 2 and status == -9:
        night.rows.append(json.loads(written[1])["row"])
    night.carry_on(documented(DISCARD))
    night.verify()
    assert len(night.rows) == len(written) + 1


def test_an_uncommitted_edit_is_committed_before_it_is_kept(night):
    night.edit()
    night.do(RUN)
    assert "is not committed: `git commit -am" in night.carry_on(documented(KEEP))
    night.verify()
    assert night.rows[-1][:7] == night.git("rev-parse", "--short=7", "HEAD~1")


def test_an_uncommitted_edit_that_was_taken_out_is_discarded_with_a_commit_of_its_own(night):
    text = (night.clone / "train.py").read_text()
    night.edit()
    edited = (night.clone / "train.py").read_text()
    night.do(RUN)
    night.do(RESET)
    night.carry_on(documented(DISCARD))
    night.verify()
    assert (night.clone / "train.py").read_text() == text
    assert night.git("show", f"{night.rows[-1][:7]}:train.py") == edited.strip()


def test_a_commit_that_touches_prepare_py_is_not_logged_until_that_is_undone_and_it_is_run_again(night):
    night.edit()
    with (night.clone / "prepare.py").open("a") as file:
        file.write("# a judge that is kinder\n")
    night.do(documented(COMMIT))
    night.do(RUN)
    seen = night.carry_on(documented(KEEP))
    assert "only train.py may change, but prepare.py did, too: `git restore -s" in seen
    assert "judged by another prepare.py" in seen
    night.verify()
    assert night.runs()[-2:] == [("finished", 42)] * 2


def test_files_that_only_the_working_tree_has_are_no_part_of_an_experiment(night):
    night.back_to("better run")
    (night.clone / "layers.py").write_text("WIDTH = 1\n")
    status, text = night.do(documented(KEEP))
    assert status == 1
    assert "layers.py: no commit has it" in text
    (night.clone / "layers.py").unlink()
    (night.clone / "run.log").touch()  # harmless
    night.carry_on(documented(KEEP))
    night.verify()


def test_a_forgotten_reset_is_asked_for(night):
    night.back_to("worse run")
    seen = night.carry_on(documented(DISCARD))
    assert "not what was kept last: `git reset --hard" in seen
    night.verify()
    assert night.rows[-1].split("\t")[3] == "discard"


def test_a_second_commit_of_an_experiment_is_taken_out_too(night):
    night.edit()
    night.do(documented(COMMIT))
    night.edit()
    for command in (COMMIT, RUN, RESET):
        night.do(documented(command))
    night.carry_on(documented(DISCARD))
    night.verify()
    assert night.git("diff", "--name-only", "HEAD", night.git("rev-parse", "HEAD~1")) == "results.tsv"


@pytest.mark.parametrize("command", [KEEP, DISCARD, CRASH])
def test_a_repeated_log_writes_nothing(night, command):
    for point in ("better logged", "worse logged", "crash logged"):
        night.back_to(point)
        head = night.git("rev-parse", "HEAD")
        status, text = night.do(documented(command))
        assert status == 1
        assert "nothing to log: the last run has its row" in text
        night.verify()
        assert night.git("rev-parse", "HEAD") == head


@pytest.mark.parametrize(
    ("point", "command", "says"),
    [
        ("better run", CRASH, "this train.py has a figure, val_bpb"),
        ("crash reset", KEEP, "has no val_bpb (crash): `uv run prepare.py log crash"),
        ("time-out reset", DISCARD, "has no val_bpb (timeout): `uv run prepare.py log crash"),
        ("worse reset", KEEP, "is not that of HEAD, but of its commit: `git reset --hard"),
        ("seeds run", KEEP, "nothing to log: the last run has its row"),
    ],
)
def test_a_row_that_the_record_contradicts_is_refused(night, point, command, says):
    night.back_to(point)
    status, text = night.do(documented(command))
    assert status == 1
    assert says in text
    night.verify()


def test_a_row_has_the_figure_of_the_default_seed_whatever_seeds_were_run_after_it(night):
    night.back_to("better run")
    for seed in SEEDS:
        night.do(seed)
    night.carry_on(documented(KEEP))
    night.verify()
    record = json.loads((night.path / "cache" / "runs.jsonl").read_text().splitlines()[-3])
    assert record["seed"] == 42
    assert night.rows[-1].split("\t")[1] == f"{record['val_bpb']:.6f}"


def test_another_seed_alone_is_no_row_to_keep(night):
    night.back_to("better committed")
    night.do(SEEDS[0])
    seen = night.carry_on(documented(KEEP))
    assert "a row needs the run with seed 42, by which all are compared: `uv run train.py`" in seen
    night.verify()


def test_nothing_is_logged_on_main(night):
    night.back_to("better run")
    night.git("checkout", "-q", "main")
    status, text = night.do(documented(KEEP))
    assert status == 1
    assert "on main nothing is logged, but on a branch of its own: `git checkout -b autoresearch/<tag> main`" in text


def test_a_ledger_changed_by_hand_is_as_it_was_logged_after_the_next_log(night):
    for commit in (False, True):
        night.back_to("better committed")
        ledger = night.clone / "results.tsv"
        ledger.write_text(ledger.read_text().replace("keep", "discard") + "1234567\t0.100000\t0.0\tkeep\tby hand\n")
        if commit:
            night.do("git commit -a --amend --no-edit")
        night.do(RUN)
        night.carry_on(documented(KEEP))
        night.verify()


def test_a_ledger_file_that_is_gone_comes_back(night):
    night.back_to("better run")
    (night.clone / "results.tsv").unlink()
    night.carry_on(documented(KEEP))
    night.verify()


def test_a_second_worktree_has_a_ledger_of_its_own(night):
    night.back_to("worse reset")
    rows, other = list(night.rows), night.path / "other"
    night.git("worktree", "add", "-q", "-b", "autoresearch/other", str(other), "main")
    assert night.do(RUN, cwd=other)[0] == 0
    night.do(documented(KEEP), cwd=other)
    header, row = (other / "results.tsv").read_text().splitlines()
    assert (header, row) == (HEADER, night.rows[-1])
    assert night.git("show", "autoresearch/other:results.tsv").splitlines() == [header, row]
    night.rows = rows
    night.carry_on(documented(DISCARD))
    night.verify()
    shutil.rmtree(other)


@pytest.mark.parametrize("lost", [["ledger.jsonl"], ["ledger.jsonl", "runs.jsonl"]])
def test_rows_outlive_the_cache_folder(night, lost):
    for name in lost:
        (night.path / "cache" / name).unlink()
    night.edit()
    for command in (COMMIT, RUN, KEEP):
        night.carry_on(documented(command))
    night.verify()
    assert len(night.rows) == 6


@pytest.mark.parametrize("how", ["as it is", "with a main", "of a checkout whose main has the branch"])
def test_a_clone_of_the_branch_goes_on_with_its_ledger(night, how):
    if how == "of a checkout whose main has the branch":
        night.git("branch", "-f", "main", "HEAD")
    first, night.clone = night.clone, night.path / "elsewhere"
    try:
        night.git("clone", "-q", str(first), str(night.clone), cwd=night.path)
        if how == "with a main":
            night.git("fetch", "-q", "origin", "main:main")
        night.git("config", "user.name", "test")
        night.git("config", "user.email", "test@example.invalid")
        night.edit()
        for command in (COMMIT, RUN, KEEP):
            night.carry_on(documented(command))
        expected = "\n".join([HEADER, *night.rows])
        assert (night.clone / "results.tsv").read_text() == f"{expected}\n"
    finally:
        shutil.rmtree(night.clone)
        night.clone = first


def test_a_commit_that_git_refuses_is_made_by_the_same_command_later(night):
    night.back_to("better run")
    (night.clone / ".git" / "index.lock").touch()
    status, text = night.do(documented(KEEP))
    assert status == 1
    assert "results.tsv was not committed" in text
    assert "index.lock" in text
    assert "The row is safe" in text
    (night.clone / ".git" / "index.lock").unlink()
    status, text = night.do(documented(KEEP))
    night.rows.append(row_in(text))
    night.verify()


def test_a_run_without_a_description_is_not_logged(night):
    night.back_to("better run")
    for words in ("", " ''", " '  '"):
        status, text = night.do(f"uv run prepare.py log keep{words}")
        assert status == 2
        assert "what was tried" in text
    night.verify()


def test_the_ledger_is_shown(night):
    night.back_to("worse reset")
    status, text = night.do("uv run prepare.py log")
    assert status == 0
    assert text.splitlines()[:3] == [HEADER, *night.rows]
    assert re.search(r"^last run: +finished, seed 42, of \w{7}", text, re.MULTILINE)
    assert re.search(r"^its row: +none yet", text, re.MULTILINE)


def refused(night, command, says):
    """A command of program.md is refused, and the ledger stays as it is."""
    status, text = night.do(documented(command))
    assert status == 1
    assert says in text
    return text


def test_a_confirming_run_that_was_killed_hides_no_figure(night):
    night.edit("if '43' in __import__('sys').argv: GPT.forward = lambda *_: os.kill(os.getpid(), 9)")
    for command in (COMMIT, RUN):
        night.do(documented(command))
    assert night.do(SEEDS[0])[0] == -9
    night.carry_on(documented(KEEP))
    assert night.runs()[-2:] == [("finished", 42), ("killed", 43)]
    night.verify()


def test_a_killed_run_is_run_again(night):
    night.edit("if not os.path.exists('again'): open('again', 'w'); GPT.forward = lambda *_: os.kill(os.getpid(), 9)")
    night.do(documented(COMMIT))
    assert night.do(RUN)[0] == -9
    night.do(RESET)
    assert "the last run has no val_bpb (killed): `git reset --hard " in night.carry_on(documented(KEEP))
    night.verify()


@pytest.mark.parametrize(
    ("said", "logged"),
    [("-x + wider", "-x + wider"), ("--corpus", "--corpus"), ("wi\udcffd\u200ber \n\t é", "wider é")],
)
def test_a_description_may_hold_any_characters(night, said, logged):
    night.back_to("better run")
    assert night.do(f"{KEEP} {shlex.quote(said)}")[0] == 0
    assert night.rows[-1].split("\t")[4] == logged
    night.verify()


def test_the_same_crash_twice_is_told_apart(night):
    night.back_to("crash run")
    commit = night.git("rev-parse", "HEAD")
    for command in (RESET, CRASH):
        night.do(documented(command))
    night.git("reset", "-q", "--hard", commit)
    night.do(RUN)
    night.do(RESET)
    refused(night, CRASH, "the ledger has this very row: say in its description what was different")
    assert night.do(f"{CRASH} 'once more'")[0] == 0
    night.verify()


def test_what_was_run_uncommitted_is_taken_out_before_it_is_discarded(night):
    night.edit()
    night.do(RUN)
    assert "not what was kept last: `git reset --hard" in night.carry_on(documented(DISCARD))
    night.verify()
    assert night.git("status", "--short") == ""


def test_a_commit_that_touches_another_file_is_mended_also_where_the_file_is_as_it_was(night):
    night.edit()
    (night.clone / "Müll.txt").write_text("x")
    night.git("add", "Müll.txt")
    night.do(documented(COMMIT))
    night.do(RUN)
    (night.clone / "Müll.txt").unlink()
    assert "only train.py may change, but Müll.txt did, too: `git restore -s" in night.carry_on(documented(KEEP))
    night.verify()


def test_a_reset_too_far_is_undone_by_the_command_that_a_repeated_log_names(night):
    night.git("reset", "-q", "--hard", "main")
    text = refused(night, CRASH, "Next: the branch lacks what was kept last: `git reset --hard")
    night.do(re.search("`(git reset .*?)`", text)[1])
    kept = [row for row in night.rows if "\tkeep\t" in row][-1]
    assert night.git("diff", "--name-only", kept[:7], "HEAD") in ("", "results.tsv")
    night.edit()
    for command in (COMMIT, RUN, KEEP):
        night.carry_on(documented(command))
    night.verify()


def test_a_ledger_that_git_does_not_track_is_committed(night):
    night.back_to("branched")
    night.git("rm", "-q", "--cached", "results.tsv")
    night.git("commit", "-qm", "no ledger")
    with (night.clone / ".gitignore").open("a") as file:
        file.write("results.tsv\n")
    night.git("commit", "-qam", "ignored")
    night.git("branch", "-f", "main", "HEAD")
    for command in (RUN, KEEP):
        night.carry_on(documented(command))
    night.verify()


def test_a_folder_in_the_place_of_the_ledger_loses_no_row(night):
    night.back_to("better run")
    (night.clone / "results.tsv").unlink()
    (night.clone / "results.tsv").mkdir()
    refused(night, KEEP, "results.tsv was not committed")
    (night.clone / "results.tsv").rmdir()
    night.rows.append(row_in(night.do(documented(KEEP))[1]))
    night.verify()


def test_a_branch_with_another_name_has_the_same_ledger(night):
    night.back_to("better run")
    night.git("branch", "-m", "autoresearch/renamed")
    night.carry_on(documented(KEEP))
    assert (night.clone / "results.tsv").read_text().splitlines() == [HEADER, *night.rows]
    refused(night, KEEP, "nothing to log: the last run has its row, ")


def test_a_night_that_begins_on_the_branch_of_another_has_its_own_ledger(night):
    assert night.do(documented("git checkout -b"), tag="nov26")[0] == 0
    night.rows = []
    assert "of another night" not in night.do("uv run prepare.py log")[1]
    assert "nothing to log: the last run has its row on autoresearch/nov25, " in night.do(documented(CRASH))[1]
    for command in (RUN, 'uv run prepare.py log keep "baseline"'):
        night.carry_on(command)
    assert (night.clone / "results.tsv").read_text().splitlines() == [HEADER, *night.rows]
    assert len(night.rows) == 1


def test_two_clones_of_one_branch_lose_no_row_of_each_other(night):
    first, other = night.clone, night.path / "elsewhere"
    night.git("clone", "-q", str(first), str(other), cwd=night.path)
    try:
        for name, value in (("user.name", "test"), ("user.email", "test@example.invalid")):
            night.git("config", name, value, cwd=other)
        night.clone = other
        night.git("fetch", "-q", "origin", "main:main")
        for clone in (other, first, other):
            night.clone = clone
            night.git("pull", "-q", str(first if clone == other else other), f"autoresearch/{TAG}")
            night.edit()
            for command in (COMMIT, RUN, KEEP):
                night.carry_on(documented(command))
            assert (clone / "results.tsv").read_text().splitlines() == [HEADER, *night.rows]
        assert len(night.rows) == 8
    finally:
        shutil.rmtree(other)
        night.clone = first


def test_without_a_main_or_a_branch_or_a_repository_of_its_own_it_says_what_to_do(night):
    night.back_to("better run")
    night.git("branch", "-m", "main", "trunk")
    refused(night, KEEP, "git knows no main to compare with: `git branch main <the commit where your work began>`")
    night.git("branch", "main", "trunk")
    night.git("checkout", "-q", "--detach")
    refused(night, KEEP, "no branch is checked out: `git checkout autoresearch/<tag>`")
    night.git("checkout", "-q", f"autoresearch/{TAG}")
    (night.clone / ".git").rename(night.path / "git")
    try:
        refused(night, KEEP, "not a git repository")
        night.git("init", "-q", cwd=night.path)
        refused(night, KEEP, "clone/ is a folder of another repository")
    finally:
        shutil.rmtree(night.path / ".git", ignore_errors=True)
        (night.path / "git").rename(night.clone / ".git")
    night.carry_on(documented(KEEP))
    night.verify()


@pytest.mark.parametrize("torn", ["", '{"id": "1'])
def test_a_record_that_was_cut_short_is_removed(night, torn):
    night.back_to("better run")
    running = night.path / "cache" / "running-cpu.json"
    running.write_text(torn)
    assert "running-cpu.json held no record of a run" in night.do(documented(KEEP))[1]
    assert not running.exists()
    night.verify()


def test_a_train_py_that_is_gone_comes_back(night):
    night.back_to("better run")
    (night.clone / "train.py").unlink()
    night.carry_on(documented(KEEP))
    night.git("checkout", "-q", "train.py")
    night.verify()


def test_a_merge_that_dropped_rows_and_an_attribute_lose_none(night):
    for name in night.git("for-each-ref", "--format=%(refname)", "refs/autoresearch/").split():
        night.git("update-ref", "-d", name)
    (night.path / "cache" / "ledger.jsonl").unlink()
    night.git("branch", "other")
    night.git("reset", "-q", "--hard", "HEAD~2")
    night.git("merge", "-q", "-s", "ours", "-m", "a merge that takes the older ledger", "other")
    (night.clone / ".git" / "info" / "attributes").write_text("*.tsv -diff\n")
    expected = [HEADER, *night.rows]
    assert night.do("uv run prepare.py log")[1].splitlines()[: len(expected)] == expected


def test_a_figure_of_another_corpus_is_not_kept_beside_those_of_this_one(night, folder):
    night.edit()
    night.do(documented(COMMIT))
    assert night.do(f"{RUN} --corpus {folder / 'drawing'}")[0] == 0
    for command in (KEEP, DISCARD):
        if command == DISCARD:
            night.do(RESET)
        refused(night, command, "they do not compare. Run it there, `uv run train.py`, or begin a new branch")


@pytest.mark.parametrize("flag", ["--skip-worktree", "--assume-unchanged"])
def test_a_judge_that_git_was_told_to_overlook_is_seen(night, flag):
    night.back_to("better committed")
    night.git("update-index", flag, "prepare.py")
    with (night.clone / "prepare.py").open("a") as file:
        file.write("# a change\n")
    night.do(RUN)
    for advice in ("prepare.py is not that of ", "only train.py may change, but prepare.py did", "another prepare.py"):
        for command in re.findall("`(.*?)`", refused(night, KEEP, advice)):
            night.do(command)
    assert night.do(documented(KEEP))[0] == 0
    night.verify()


def test_what_has_a_figure_is_no_crash(night):
    night.edit("if '43' in __import__('sys').argv: GPT.forward = lambda *_: 1 / 0")
    for command in (COMMIT, RUN):
        night.do(documented(command))
    assert night.do(SEEDS[0])[0] == 1
    night.do(RESET)
    refused(night, CRASH, "this train.py has a figure, val_bpb")
    assert night.do(documented(DISCARD))[0] == 0
    night.verify()


def test_a_full_disk_is_one_clear_message(night):
    night.back_to("better run")
    status, text = night.do(f"bash -c 'ulimit -f 0; {sys.executable} prepare.py log keep x'")
    assert status == 1
    assert text.startswith(f"nothing was logged, {night.path / 'cache'} can't be written: ")
    assert text.endswith("Free some space, then log again\n")
    night.carry_on(documented(KEEP))
    night.verify()


def test_a_commit_that_git_refuses_is_kept_from_garbage_collection_meanwhile(night):
    night.back_to("worse reset")
    (night.clone / ".git" / "index.lock").touch()
    refused(night, DISCARD, "The row is safe")
    (night.clone / ".git" / "index.lock").unlink()
    night.git("reflog", "expire", "--expire=now", "--all")
    night.git("gc", "-q", "--prune=now")
    night.rows.append(row_in(night.do(documented(DISCARD))[1]))
    night.verify()


def test_a_signature_that_nobody_can_give_is_not_asked_for(night):
    night.back_to("better run")
    night.git("config", "commit.gpgSign", "true")
    night.git("config", "gpg.program", "false")
    night.carry_on(documented(KEEP))
    night.verify()


@pytest.mark.parametrize(("seeds", "warned"), [((), True), (SEEDS, False)])
def test_what_is_kept_on_one_seed_says_so(night, seeds, warned):
    night.edit()
    for command in (COMMIT, RUN, *seeds):
        night.do(documented(command))
    assert ("kept on fewer than three seeds" in night.do(documented(KEEP))[1]) == warned
    night.verify()
