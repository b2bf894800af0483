"""What an agent may do by itself at night: each command of program.md, and no near miss of one.

Their rules are imitated here; where the command lines are installed (npm install -g @anthropic-ai/claude-code
@openai/codex), they decide themselves, too.
"""

import ast
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from test_contract import DOCUMENTED

import prepare

SETTINGS = json.loads((ROOT / ".claude" / "overnight.json").read_text())
RULES = ROOT / ".codex" / "rules" / "autoresearch.rules"
FILLED = {"<tag>": "nov25", "<commit>": "1234567"}
ASKED_BY_MESSAGES = """git reset --hard 1234567
git restore -s 1234567 -SW prepare.py
git commit -a --amend --no-edit --allow-empty""".splitlines()
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
NEAR_MISSES_OF_CLAUDE = [  # a rule of Codex is the beginning of a command, and lets these pass
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


COMMANDS = sorted({fill(command) for command in DOCUMENTED}) + ASKED_BY_MESSAGES


def claude_allows(command):
    """Claude Code's rules: deny before allow; * stands for anything, also for nothing with the space before it."""

    def matches(rule):
        if not (found := re.fullmatch(r"Bash\((.*)\)", rule)):
            return False
        pattern = re.escape(found[1]).replace(r"\*", ".*")
        return re.fullmatch(re.sub(r"\\ \.\*$", "( .*)?", pattern), command) is not None

    rules = SETTINGS["permissions"]
    return any(map(matches, rules["allow"])) and not any(map(matches, rules["deny"]))


@pytest.mark.parametrize("command", COMMANDS)
def test_claude_code_runs_each_command_of_the_loop(command):
    assert claude_allows(command)


@pytest.mark.parametrize("command", NEAR_MISSES + NEAR_MISSES_OF_CLAUDE)
def test_claude_code_runs_no_near_miss(command):
    assert not claude_allows(command)


def test_claude_code_edits_train_py_and_nothing_else():
    rules = SETTINGS["permissions"]
    assert [rule for rule in rules["allow"] if rule.startswith(("Edit", "Write"))] == ["Edit(./train.py)"]
    denied = [re.fullmatch(r"Edit\(\./(.*)\)", rule) for rule in rules["deny"]]
    denied = [found[1] for found in denied if found]
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    for name in files:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in denied) == (name != "train.py"), name


def test_a_command_of_claude_code_may_take_as_long_as_a_run():
    minutes = int(re.search(r"time limit of (\d+) minutes", (ROOT / "program.md").read_text())[1])
    assert minutes * 60 > prepare.RUN_LIMIT
    for name in ("BASH_DEFAULT_TIMEOUT_MS", "BASH_MAX_TIMEOUT_MS"):
        assert int(SETTINGS["env"][name]) == minutes * 60_000


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


@pytest.mark.parametrize("command", COMMANDS)
def test_codex_runs_each_command_of_the_loop(command):
    assert codex_decision(command) == "allow"


@pytest.mark.parametrize("command", NEAR_MISSES)
def test_codex_runs_no_near_miss(command):
    assert codex_decision(command) in (None, "forbidden")


@pytest.mark.skipif(not shutil.which("codex"), reason="needs the Codex command line: npm install -g @openai/codex")
@pytest.mark.parametrize("command", COMMANDS + NEAR_MISSES)
def test_codex_itself_decides_likewise(command):
    check = ["codex", "execpolicy", "check", "--rules", RULES, *shlex.split(command)]
    output = subprocess.run(check, check=True, capture_output=True, text=True).stdout
    assert json.loads(output).get("decision") == codex_decision(command)


class ScriptedModel(BaseHTTPRequestHandler):
    """Speaks the Messages API: asks for one tool call after the other, and keeps what Claude Code answers to each."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer("application/json", b"")

    do_GET = do_HEAD  # noqa: N815

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not body.get("tools") or "count_tokens" in self.path:  # a title, a summary: nothing that is tested
            return self.answer("application/json", b'{"input_tokens": 1}')
        parts = [part for message in body["messages"] for part in message["content"] if isinstance(part, dict)]
        results = [json.dumps(part["content"]) for part in parts if part["type"] == "tool_result"]
        self.server.first = self.server.first or json.dumps(body)
        self.server.results = results
        block, delta, reason = {"type": "text", "text": ""}, {"type": "text_delta", "text": "done"}, "end_turn"
        if len(results) < len(self.server.calls):
            name, arguments = self.server.calls[len(results)]
            block = {"type": "tool_use", "id": f"toolu_{len(results)}", "name": name, "input": {}}
            delta, reason = {"type": "input_json_delta", "partial_json": json.dumps(arguments)}, "tool_use"
        message = {"id": "msg", "type": "message", "role": "assistant", "model": body["model"], "content": []}
        message |= {"stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}
        stop = {"stop_reason": reason, "stop_sequence": None}
        events = {
            "message_start": {"message": message},
            "content_block_start": {"index": 0, "content_block": block},
            "content_block_delta": {"index": 0, "delta": delta},
            "content_block_stop": {"index": 0},
            "message_delta": {"delta": stop, "usage": {"output_tokens": 1}},
            "message_stop": {},
        }
        lines = (f"event: {name}\ndata: {json.dumps({'type': name} | event)}\n\n" for name, event in events.items())
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
git commit -am "$(git push)"
git show autoresearch/nov25/1234567 > prepare.py
cat train.py > prepare.py""".splitlines()
OTHER_FILES = """prepare.py
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


@pytest.mark.skipif(not shutil.which("claude"), reason="needs Claude Code: npm install -g @anthropic-ai/claude-code")
def test_claude_code_itself_decides_likewise(tmp_path):
    clone, stub = tmp_path / "clone", tmp_path / "bin" / "uv"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    shutil.copy(ROOT / ".claude" / "overnight.json", clone / ".claude")
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho uv $*\n")  # who decides is Claude Code; nothing has to be trained
    stub.chmod(0o755)
    knob = {"old_string": "SOFT_CAP = 15.0", "new_string": "SOFT_CAP = 16.0"}
    near_misses = NEAR_MISSES + NEAR_MISSES_OF_CLAUDE
    denied = [["Write", {"file_path": f"{clone}/{name}", "content": "x"}] for name in OTHER_FILES]
    denied += [["Bash", {"command": command, "description": "x"}] for command in near_misses + COMPOUND]
    allowed = [["Bash", {"command": command, "description": "x"}] for command in COMMANDS]
    allowed += [["Read", {"file_path": f"{clone}/{name}"}] for name in ("prepare.py", "results.tsv", "train.py")]
    allowed += [["Edit", {"file_path": f"{clone}/train.py"} | knob]]
    server = ThreadingHTTPServer(("127.0.0.1", 0), ScriptedModel)
    server.calls, server.results, server.first = denied + allowed, [], ""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = {"CLAUDE_CONFIG_DIR": str(tmp_path / "config"), "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
    own |= {"ANTHROPIC_BASE_URL": f"http://127.0.0.1:{server.server_port}", "ANTHROPIC_API_KEY": "none"}
    own |= {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("claude "))
    command, *flags, prompt = shlex.split(line)
    night = [command, "-p", *flags, prompt]
    subprocess.run(night, cwd=clone, env=os.environ | own, check=True, capture_output=True, timeout=300)
    server.shutdown()
    assert len(server.results) == len(server.calls)
    for (tool, arguments), result in zip(server.calls, server.results, strict=True):
        refused = re.search(r"Permission to use \w+.* has been denied|denied by your permission settings", result)
        assert bool(refused) == ([tool, arguments] in denied), (tool, arguments, result)
    assert "SOFT_CAP = 16.0" in (clone / "train.py").read_text()
    assert "# The research program" in server.first  # through .claude/CLAUDE.md, whatever is compacted later
