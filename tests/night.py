"""A night on real git: a clone, a cache folder, and the commands as an agent gives them.

Commands need no time to start: each is a fork of one process that has imported torch.
"""

import contextlib
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import networkx
from conftest import HEADER, ROOT, environ, git, make_clone, replace

TEXT = Path(networkx.__file__).parent / "algorithms" / "centrality"  # real text, 600 KB
BRANCH = "autoresearch/nov25"

RUN = "uv run train.py"
SEEDS = (f"{RUN} --seed 43", f"{RUN} --seed 44")
COMMIT = 'git commit train.py -m "<the idea in one line>"'
RESET = "git reset --hard HEAD~1"
BASELINE = 'uv run prepare.py log keep "baseline"'
KEEP, DISCARD = (f'uv run prepare.py log {word} "<what was tried>"' for word in ("keep", "discard"))
CRASH = 'uv run prepare.py log crash "<what was tried, and why it failed>"'

FAILS = "Bigram.forward = lambda *_: 1 / 0"
DIES = "import signal; Bigram.forward = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
HANGS = """
import harness.run, time
harness.run.RUN_LIMIT, Bigram.forward = 1, lambda *_: time.sleep(99)"""

# A job is {"start": argv, ...}, answered by a pid, or {"wait": pid}, answered by an exit status.
# A command is killed before its `die`th write to a file, rename, or call of another program.
SERVER = """
import json, os, runpy, signal, sys, traceback
import prepare, harness.run, torch._dynamo

def command(start, cwd, environ, output, die):
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.update(environ)
    sys.argv, sys.path[0] = start, cwd
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    for name in [name for name in sys.modules if name.split(".")[0] in ("prepare", "harness")]:
        del sys.modules[name]

    def mortal(event, arguments):
        nonlocal die
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir", "subprocess.Popen"):
            die -= 1
            if die == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(mortal)
    try:
        runpy.run_path(start[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
    elif (answer := os.fork()) == 0:
        status = command(**job)
        sys.stdout.flush()
        os._exit(status)
    print(answer, flush=True)
"""


@functools.cache
def server():
    """The process that forks all commands."""
    environment = environ(PYTHONDONTWRITEBYTECODE=1)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=environment, **pipes)


def ask(**job):
    """Give the server a job; return its answer."""
    print(json.dumps(job), file=server().stdin, flush=True)
    return int(server().stdout.readline())


class Command:
    """A command that was started, in the foreground if it is waited for at once."""

    numbers = iter(range(10**6))

    def __init__(self, night, words, die=0, output=None):
        self.output = output or night.path / f"output-{next(self.numbers)}"
        job = {"cwd": str(night.clone), "environ": night.environ, "output": str(self.output)}
        self.pid = ask(start=words, die=die, **job)

    def wait(self):
        """Return exit status and output."""
        status = ask(wait=self.pid)
        return status, Path(self.output).read_text(errors="replace")

    def wait_for(self, text):
        """Wait until it has printed a text."""
        end = time.monotonic() + 60
        while not Path(self.output).exists() or text not in Path(self.output).read_text():
            assert time.monotonic() < end, Path(self.output).read_text()
            time.sleep(0.01)


class Night:
    """A clone on a branch for experiments, and what was logged in it."""

    def __init__(self, path, tokens, limit=60, seconds=0.2):
        self.path, self.clone, self.cache = path, path / "clone", path / "cache"
        self.rows, self.points, self.executed, self.edits = [], {}, set(), 0
        self.environ = {"AUTORESEARCH_CACHE": str(self.cache), "AUTORESEARCH_CORPUS": str(TEXT)}
        make_clone(self.clone, seconds=seconds, limit=limit)
        replace(self.clone / "prepare.py", '"eval_tokens": 2**19', '"eval_tokens": 2**11')
        replace(self.clone / "train.py", "run.finish(model, 64,", "run.finish(model, 8,")
        with (self.clone / "results.tsv").open("a") as file:
            file.write("abcdef0\t0.900000\t1.0\tkeep\tof another night\n")
        self.git("commit", "-qa", "--amend", "--no-edit")
        self.git("commit", "-qm", "more", "--allow-empty")
        tokens.mkdir(exist_ok=True)
        self.cache.mkdir()
        (self.cache / "tokens").symlink_to(tokens)
        self.do("git checkout -b autoresearch/<tag> main")

    def git(self, *arguments):
        return git(self.clone, *arguments)

    def start(self, command, **how):
        """Start a command of Python in the background."""
        return Command(self, shlex.split(command)[2:], **how)

    def do(self, command, real=False, **how):
        """Execute a command of program.md or of a message; return its exit status and output."""
        self.executed.add(command)
        command = command.replace("<tag>", BRANCH.split("/")[1])
        if "<commit>" in command:
            command = command.replace("<commit>", self.rows[-1][:7])
        words = shlex.split(re.sub("<[^>]+>", "an idea", command))
        if real or words[0] == "git":
            uv = {"UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_NO_SYNC": "1"}
            options = {"cwd": self.clone, "env": environ(**self.environ, **uv), "text": True}
            result = subprocess.run(words, capture_output=True, **options)
            status, text = result.returncode, result.stdout + result.stderr
        else:
            status, text = Command(self, words[2:], **how).wait()
        if words[2:4] == ["prepare.py", "log"] and status == 0 and len(words) > 4:
            self.rows.append(next(line for line in text.splitlines() if line.count("\t") == 4))
        return status, text

    def must(self, *commands):
        """Execute commands, each of which succeeds; return what the last one printed."""
        for command in commands:
            status, text = self.do(command)
            assert status == 0, (command, text)
        return text

    def carry_on(self, command):
        """Log, following the advice of every refusal, until there is a row; return all output."""
        seen = ""
        for _ in range(6):
            status, text = self.do(command)
            seen += text
            if status == 0:
                return seen
            if "has its row" in text and "another branch" not in text:
                self.rows += [row for row in [row_in(text)] if row not in self.rows]
                return seen
            if instead := re.search("log (keep or )?(crash|discard) instead", text):
                command = {"crash": CRASH, "discard": DISCARD}[instead[2]]
            advice = re.findall(r"`((?:git|uv) [^`]+)`", text)
            assert advice or instead, text
            self.must(*advice) if advice else None
        raise AssertionError(seen)

    def refused(self, command, says):
        """A command is refused, and the ledger stays as it is; return what it prints."""
        status, text = self.do(command)
        assert status == 1
        assert re.search(says, text), text
        return text

    def edit(self, code=""):
        """Change train.py, as no edit before did."""
        self.edits += 1
        train = self.clone / "train.py"
        before, main = train.read_text().split("\nif __name__ ==")
        train.write_text(f"{before}{code}  # edit {self.edits}\n\nif __name__ =={main}")

    def runs(self):
        """The records of this night, as `runs --json` gives them."""
        status, text = self.do("uv run prepare.py runs --json")
        assert status == 0, text
        return json.loads(text.splitlines()[0])

    def statuses(self):
        return [(run["status"], run["seed"]) for run in self.runs()]

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
        """The ledger holds what was logged, on disk and in git, and each row's commit has a ref."""
        expected = "\n".join([HEADER, *self.rows])
        assert (self.clone / "results.tsv").read_text() == f"{expected}\n"
        assert self.git("show", "HEAD:results.tsv") == expected
        changed = self.git("diff", "--name-only", "main", "HEAD").split()
        assert set(changed) <= {"train.py", "results.tsv"}
        refs = self.git("for-each-ref", "--format=%(refname)", "refs/autoresearch/").split()
        assert {f"refs/{BRANCH}/{row[:7]}" for row in self.rows} <= set(refs)


def row_in(text):
    """The row that a refusal says the last run has."""
    quoted = re.search(r"has its row here: (['\"].*['\"])", text)[1]
    return quoted[1:-1].replace("\\t", "\t")


@contextlib.contextmanager
def elsewhere(night, clone):
    """For a while the commands are given in another folder, with rows of its own."""
    before, rows = night.clone, night.rows
    night.clone, night.rows = clone, []
    yield night
    night.clone, night.rows = before, rows
