"""What an agent may do by itself at night: each command of program.md, and no near miss of one.

Their rules are imitated here. Where the command lines are installed (npm install -g
@anthropic-ai/claude-code @openai/codex), they decide themselves, too. To try several versions of
Claude Code, name their programs, with colons between them, in the variable CLAUDES.
"""

import ast
import contextlib
import fnmatch
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from test_contract import DOCUMENTED

from harness import run

SETTINGS = json.loads((ROOT / ".claude" / "overnight.json").read_text())
CODEX = tomllib.loads((ROOT / ".codex" / "config.toml").read_text())
RULES = ROOT / ".codex" / "rules" / "autoresearch.rules"
CLAUDES = list(filter(None, os.environ.get("CLAUDES", shutil.which("claude") or "").split(":")))
FILLED = {"<tag>": "nov25", "<commit>": "1234567"}


def advice():
    """The commands that the messages of the ledger name, 1234567 for what they fill in."""
    tree = ast.parse((ROOT / "harness" / "ledger.py").read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [getattr(part, "value", "") for part in node.values]
            texts = [part if isinstance(part, str) else "1234567" for part in parts]
            yield from re.findall("`((?:git|uv) [^`]+)`", "".join(texts))
        elif isinstance(node, ast.Constant) and id(node) not in docstrings:
            yield from re.findall("`((?:git|uv) [^`]+)`", str(node.value))


NEAR_MISSES = """uv run python train.py
uv run --with scipy train.py
python3 train.py
uv add scipy
uv pip install scipy
uv sync --upgrade
git push
git push origin autoresearch/nov25
git clean -fdx
git checkout main
git branch -D main
git log --oneline --output=prepare.py
git diff --output=prepare.py
git update-ref -d refs/autoresearch/nov25/ledger
git rebase main
git config user.name me
rm -rf .git
curl https://example.invalid
sudo uv run train.py""".splitlines()
NEAR_MISSES_OF_CLAUDE = [  # a rule of Codex is the beginning of a command, and allows these
    "git show autoresearch/nov25/1234567 --output=prepare.py",
    'git show autoresearch/nov25/1234567 "--output=prepare.py"',
    "git show autoresearch/nov25/1234567\t--output=prepare.py",
    r"git show autoresearch/nov25/1234567 \-\-output=prepare.py",
    "git show autoresearch/$IFS--output=prepare.py",
]


def fill(command):
    for name, value in FILLED.items():
        command = command.replace(name, value)
    return re.sub(r"<[^>]+>", "wider, and a higher rate", command)


COMMANDS = sorted({fill(command) for command in (*DOCUMENTED, *advice())})
COMMANDS += ["uv run prepare.py runs --json"]


def claude_allows(command):
    """Claude Code's rules: deny before allow; " *" stands for anything, and for nothing."""

    def matches(rule):
        if not (found := re.fullmatch(r"Bash\((.*)\)", rule)):
            return False
        pattern = re.escape(found[1]).replace(r"\*", ".*")
        return re.fullmatch(re.sub(r"\\ \.\*$", "( .*)?", pattern), command) is not None

    rules = SETTINGS["permissions"]
    return any(map(matches, rules["allow"])) and not any(map(matches, rules["deny"]))


def test_messages_name_commands():
    assert {"uv run train.py", "git reset --hard 1234567"} <= set(advice())


@pytest.mark.parametrize("command", COMMANDS)
def test_claude_code_and_codex_run_each_command_of_the_loop(command):
    assert claude_allows(command)
    assert codex_decision(command) == "allow"


@pytest.mark.parametrize("command", NEAR_MISSES)
def test_claude_code_and_codex_run_no_near_miss(command):
    assert not claude_allows(command)
    assert codex_decision(command) in (None, "forbidden")


@pytest.mark.parametrize("command", NEAR_MISSES_OF_CLAUDE)
def test_claude_code_runs_no_command_in_disguise(command):
    assert not claude_allows(command)


def test_claude_code_reads_the_runs_and_no_tokens():
    rules = SETTINGS["permissions"]
    assert "Read(~/.cache/autoresearch/runs/**)" in rules["allow"]
    assert "Read(~/.cache/autoresearch/**/*.tokens)" in rules["deny"]


def test_claude_code_edits_train_py_and_nothing_else():
    rules = SETTINGS["permissions"]
    assert [rule for rule in rules["allow"] if rule.startswith(("Edit", "Write"))] == [
        "Edit(./train.py)"
    ]
    denied = [re.fullmatch(r"Edit\(\./(.*)\)", rule) for rule in rules["deny"]]
    denied = [found[1] for found in denied if found]
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.split():
        assert any(fnmatch.fnmatch(name, pattern) for pattern in denied) == (name != "train.py"), (
            name
        )


def test_a_command_may_take_as_long_as_a_run():
    page = (ROOT / "program.md").read_text()
    minutes = int(re.search(r"time limit of (\d+) minutes", page)[1])
    assert minutes * 60 > 2 * run.RUN_LIMIT  # training and evaluation have a limit each
    for name in ("BASH_DEFAULT_TIMEOUT_MS", "BASH_MAX_TIMEOUT_MS"):
        assert int(SETTINGS["env"][name]) == minutes * 60_000
    assert CODEX["background_terminal_max_timeout"] == minutes * 60_000


def test_the_contract_is_imported_for_claude_code():
    lines = (ROOT / ".claude" / "CLAUDE.md").read_text().splitlines()
    assert len(lines) == 2
    imported = lines[1].removeprefix("@")
    assert (ROOT / ".claude" / imported).resolve() == ROOT / "program.md"


def codex_rules():
    """The calls of prefix_rule: Starlark's literals are Python's."""
    calls = [statement.value for statement in ast.parse(RULES.read_text()).body]
    return [{word.arg: ast.literal_eval(word.value) for word in call.keywords} for call in calls]


def codex_decision(command, rules=None):
    """Codex's rules: the strictest of those whose pattern is a prefix of the command's words."""
    words, order = shlex.split(command), ["allow", "prompt", "forbidden"]
    found = [
        rule["decision"]
        for rule in rules or codex_rules()
        if len(words) >= len(rule["pattern"])
        and all(
            word in ([part] if isinstance(part, str) else part)
            for word, part in zip(words, rule["pattern"], strict=False)
        )
    ]
    return max(found, key=order.index, default=None)


def test_the_examples_of_the_rules_for_codex_hold():
    for rule in codex_rules():
        assert rule["match"]
        assert {codex_decision(command, [rule]) for command in rule["match"]} == {rule["decision"]}
        for command in rule["not_match"]:
            assert codex_decision(command, [rule]) is None


@pytest.mark.skipif(not shutil.which("codex"), reason="needs npm install -g @openai/codex")
@pytest.mark.parametrize("command", COMMANDS + NEAR_MISSES)
def test_codex_itself_decides_likewise(command):
    check = ["codex", "execpolicy", "check", "--rules", RULES, *shlex.split(command)]
    output = subprocess.run(check, check=True, capture_output=True, text=True).stdout
    assert json.loads(output).get("decision") == codex_decision(command)


@pytest.mark.skipif(not shutil.which("codex"), reason="needs npm install -g @openai/codex")
@pytest.mark.parametrize("trust", ["trusted", "untrusted"])
def test_codex_itself_shows_the_contract_in_a_trusted_folder(tmp_path, trust):
    projects = f'projects={{"{ROOT}"={{trust_level="{trust}"}}}}'
    shown = subprocess.run(
        ["codex", "--config", projects, "debug", "prompt-input", "hello"],
        cwd=ROOT,
        env=os.environ | {"CODEX_HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for line in ("# The research program", "program.md is your contract only if"):
        assert (line in shown) == (trust == "trusted")


class ScriptedModel(BaseHTTPRequestHandler):
    """Speaks the Messages API: asks for one tool call after another, and keeps the answers."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer("application/json", b"")

    do_GET = do_HEAD  # noqa: N815

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not body.get("tools") or "count_tokens" in self.path:  # a title, a summary
            return self.answer("application/json", b'{"input_tokens": 1}')
        contents = [part for message in body["messages"] for part in message["content"]]
        parts = [part for part in contents if isinstance(part, dict)]
        results = [json.dumps(part["content"]) for part in parts if part["type"] == "tool_result"]
        self.server.first = self.server.first or json.dumps(body)
        self.server.results = results
        if len(results) == len(self.server.calls):
            self.server.finished.set()
        block, reason = {"type": "text", "text": ""}, "end_turn"
        delta = {"type": "text_delta", "text": "done"}
        if len(results) < len(self.server.calls):
            name, arguments = self.server.calls[len(results)]
            block = {"type": "tool_use", "id": f"toolu_{len(results)}", "name": name, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(arguments)}
            reason = "tool_use"
        message = {"id": "msg", "type": "message", "role": "assistant", "model": body["model"]}
        message |= {"content": [], "usage": {"input_tokens": 1, "output_tokens": 1}}
        message |= {"stop_reason": None, "stop_sequence": None}
        stop = {"stop_reason": reason, "stop_sequence": None}
        events = {
            "message_start": {"message": message},
            "content_block_start": {"index": 0, "content_block": block},
            "content_block_delta": {"index": 0, "delta": delta},
            "content_block_stop": {"index": 0},
            "message_delta": {"delta": stop, "usage": {"output_tokens": 1}},
            "message_stop": {},
        }
        data = {name: json.dumps({"type": name} | event) for name, event in events.items()}
        lines = (f"event: {name}\ndata: {line}\n\n" for name, line in data.items())
        self.answer("text/event-stream", "".join(lines).encode())

    def answer(self, kind, data):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


COMPOUND = """uv run train.py > run.log
uv run train.py 2>&1 | tee run.log
uv run train.py && git push
uv run train.py; rm -rf .git
git log --oneline -5 && git push
git commit train.py -m "$(git push)"
git show autoresearch/nov25/1234567 > prepare.py
cat train.py > prepare.py""".splitlines()
OTHER_FILES = """prepare.py
harness/run.py
harness/ledger.py
results.tsv
program.md
tests/conftest.py
.claude/overnight.json
.gitignore
new.py
sub/train.py
tests/train.py
.git/hooks/pre-commit
../elsewhere.py""".splitlines()


READING = """cat train.py
sed -n 1,20p harness/run.py
grep -n "^#" dev/LOG.md | tail -3
ls -la harness
head -20 prepare.py
tail -5 prepare.py
wc -l train.py
git diff
cat ~/.cache/autoresearch/runs/1/run.json""".splitlines()
LEAVING = """Agent SendMessage EnterPlanMode ExitPlanMode Monitor ScheduleWakeup CronCreate Workflow
EnterWorktree WebFetch WebSearch""".split()
WRITING = """sed -i s/a/b/ prepare.py
sed -n 'w prepare.py' train.py
sed -n '1e git push' train.py
grep -n the train.py | tee prepare.py
head -5 train.py >> prepare.py
wc -l train.py 2> new.py
sort -o prepare.py train.py
find . -name run.py -delete
cat <(git push)
cp train.py prepare.py""".splitlines()


def bash(command, **more):
    return ["Bash", {"command": command, "description": "x"} | more]


class Night:
    """The README's line in a terminal, in a clone, with a model that asks for these calls."""

    def __init__(self, claude, folder, uv):
        self.claude, self.folder, self.clone = claude, folder, folder / "clone"
        subprocess.run(["git", "clone", "-q", ROOT, self.clone], check=True)
        shutil.copy(ROOT / ".claude" / "overnight.json", self.clone / ".claude")
        stub = folder / "bin" / "uv"  # who decides is Claude Code; nothing has to be trained
        stub.parent.mkdir()
        stub.write_text(f"#!/bin/sh\n{uv}\n")
        stub.chmod(0o755)

    def run(self, calls):
        """Return what each call was answered, and what the model was sent first."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), ScriptedModel)
        server.calls, server.results, server.first = calls, [], ""
        server.finished = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        trusted = {"projects": {str(self.clone): {"hasTrustDialogAccepted": True}}}
        asked_before = {"customApiKeyResponses": {"approved": ["none"]}}
        config = self.folder / "config"
        config.mkdir()
        (config / ".claude.json").write_text(
            json.dumps({"hasCompletedOnboarding": True} | trusted | asked_before)
        )
        own = {
            "CLAUDE_CONFIG_DIR": str(config),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{server.server_port}",
            "ANTHROPIC_API_KEY": "none",
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "TERM": "xterm",
        }
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CLAUDE", "ANTHROPIC"))
        }
        lines = (ROOT / "README.md").read_text().splitlines()
        line = next(line for line in lines if " claude --settings" in f" {line}")
        exported, options = re.fullmatch("((?:[A-Z_]+=[^ ]+ )*)claude (.*)", line).groups()
        own |= dict(word.split("=") for word in exported.split())
        terminal, its_end = pty.openpty()
        night = subprocess.Popen(
            [self.claude, *shlex.split(options)],
            cwd=self.clone,
            env=inherited | own,
            stdin=its_end,
            stdout=its_end,
            stderr=its_end,
            start_new_session=True,
        )
        os.close(its_end)
        screen = []
        threading.Thread(target=self.watch, args=(terminal, screen), daemon=True).start()
        finished = server.finished.wait(timeout=120)
        night.terminate()
        night.wait(timeout=20)
        server.shutdown()
        assert finished, (server.results[-1:], b"".join(screen)[-4000:])
        return server.results, server.first

    @staticmethod
    def watch(terminal, screen):
        with contextlib.suppress(OSError):  # the program has ended
            while data := os.read(terminal, 65536):
                screen.append(data)


@pytest.fixture(params=CLAUDES or [None])
def claude(request):
    if request.param is None:
        pytest.skip("needs npm install -g @anthropic-ai/claude-code")
    return request.param


def test_claude_code_itself_decides_likewise(claude, tmp_path):
    night = Night(claude, tmp_path, uv="echo uv $*")
    knob = {"old_string": "CAP = 15", "new_string": "CAP = 16"}
    commands = NEAR_MISSES + NEAR_MISSES_OF_CLAUDE + COMPOUND + WRITING
    denied = [
        ["Write", {"file_path": f"{night.clone}/{name}", "content": "x"}] for name in OTHER_FILES
    ]
    denied += map(bash, commands)
    allowed = list(map(bash, COMMANDS + READING))
    readable = ("prepare.py", "harness/run.py", "results.tsv", "train.py")
    allowed += [["Read", {"file_path": f"{night.clone}/{name}"}] for name in readable]
    train = {"file_path": f"{night.clone}/train.py"}
    allowed += [["Write", train | {"content": "CAP = 15\n"}], ["Edit", train | knob]]
    results, first = night.run(denied + allowed)
    denial = r"Permission to use \w+.* has been denied|denied by your permission settings"
    for (tool, arguments), result in zip(denied + allowed, results, strict=True):
        refused = re.search(denial, result)
        assert bool(refused) == ([tool, arguments] in denied), (tool, arguments, result)
    assert (night.clone / "train.py").read_text() == "CAP = 16\n"
    assert "# The research program" in first  # by .claude/CLAUDE.md, also when compacted


def test_claude_code_offers_no_tool_that_leaves_the_loop(claude, tmp_path):
    _, first = Night(claude, tmp_path, uv="true").run([bash("git status --short")])
    deferred = re.findall(r"(?<=\\n)\w+(?=\\n)", first)  # listed by name, one a line
    offered = {tool["name"] for tool in json.loads(first)["tools"]}.union(deferred)
    assert {"Bash", "Edit", "Read"} <= offered
    assert not offered.intersection(LEAVING)


def test_claude_code_runs_nothing_in_the_background(claude, tmp_path):
    log = tmp_path / "log"
    night = Night(claude, tmp_path, uv=f"echo begin $* >> {log}; sleep 4; echo end $* >> {log}")
    late, background, _ = night.run(
        [
            bash("uv run train.py", timeout=1000),
            bash("uv run train.py --seed 43", run_in_background=True),
            bash("uv run prepare.py"),  # ends after the first would have
        ]
    )[0]
    assert "timed out" in late
    assert "run_in_background" in background
    assert log.read_text().splitlines() == [
        "begin run train.py",
        "begin run prepare.py",
        "end run prepare.py",
    ]
