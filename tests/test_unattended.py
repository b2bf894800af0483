"""What an agent may do by itself at night: each command of program.md, and no near miss of one.

The rules for Codex are checked by Codex itself where it is installed (npm install -g @openai/codex).
"""

import ast
import fnmatch
import json
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT
from test_contract import DOCUMENTED

SETTINGS = json.loads((ROOT / ".claude" / "overnight.json").read_text())
RULES = ROOT / ".codex" / "rules" / "autoresearch.rules"
FILLED = {"<tag>": "nov25", "<commit>": "1234567"}
ASKED_BY_MESSAGES = ["git reset --hard 1234567", "git restore -s 1234567 -SW prepare.py"]
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
git update-ref -d refs/autoresearch/nov25/ledger
git rebase main
git config user.name me
rm -rf .git
curl https://example.invalid
nohup uv run train.py""".splitlines()


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


@pytest.mark.parametrize("command", NEAR_MISSES)
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
    for name in ("BASH_DEFAULT_TIMEOUT_MS", "BASH_MAX_TIMEOUT_MS"):
        assert int(SETTINGS["env"][name]) == 900_000


def test_the_contract_is_imported_for_claude_code():
    lines = (ROOT / ".claude" / "CLAUDE.md").read_text().splitlines()
    assert len(lines) == 2
    imported = lines[1].removeprefix("@")
    assert (ROOT / ".claude" / imported).resolve() == ROOT / "program.md"


def codex_rules():
    """The calls of prefix_rule: Starlark's literals are Python's."""
    calls = [statement.value for statement in ast.parse(RULES.read_text()).body]
    return [{word.arg: ast.literal_eval(word.value) for word in call.keywords} for call in calls]


def codex_decision(command):
    """Codex's rules: the strictest of those whose pattern is a prefix of the command's words."""
    words, order = shlex.split(command), ["allow", "prompt", "forbidden"]
    found = [
        rule["decision"]
        for rule in codex_rules()
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
        assert {codex_decision(command) for command in rule["match"]} == {rule["decision"]}
        for command in rule["not_match"]:
            assert codex_decision(command) != rule["decision"] or rule["decision"] == "allow"


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
