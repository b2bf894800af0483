"""program.md is what an agent does all night: each of its commands works, as it stands there."""

import re

from conftest import ROOT
from night import BASELINE, BRANCH, COMMIT, CRASH, DISCARD, FAILS, KEEP, RESET, RUN, SEEDS, Night

BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "program.md").read_text())  # those of a language are examples
DOCUMENTED = [line.strip() for kind, text in BLOCKS if not kind for line in text.splitlines()]


def test_every_command_of_program_md_works_in_a_night(tmp_path, cache, thorough):
    night = Night(tmp_path, cache / "tokens")
    night.git("checkout", "-q", "main")
    night.git("branch", "-D", BRANCH)
    night.executed.clear()

    def do(*commands, fails=False):
        for command in commands:
            status, text = night.do(command, real=thorough)
            assert status == int(fails), (command, text)
        return text

    assert do("git status --short") == ""
    assert "ready: " in do("git checkout -b autoresearch/<tag> main", "uv run prepare.py")
    assert do(RUN, *SEEDS, BASELINE).strip().endswith("baseline (3 seeds)")
    night.edit()
    assert "difference: " in do(COMMIT, RUN)
    do(KEEP)
    night.edit()
    do(COMMIT, RUN, RESET, DISCARD)
    night.edit(FAILS)
    do(COMMIT)
    assert "ZeroDivisionError" in do(RUN, fails=True)
    night.edit(FAILS)
    do("git commit train.py --amend --no-edit")
    do(RUN, fails=True)
    do(RESET, CRASH)
    assert do("uv run prepare.py runs").count("an idea") == 3
    audit = night.do("uv run prepare.py audit", real=thorough)[1]
    assert set(re.findall("^row.*", audit, re.MULTILINE)) <= set(re.findall(".*worse by.*", audit))
    assert "its_row: " in do("uv run prepare.py log")
    assert "log crash: an idea" in do("git log --oneline -5")
    assert "train.py" in do("git show autoresearch/<tag>/<commit>")
    do("git restore -s autoresearch/<tag>/<commit> -SW train.py")
    assert night.git("diff", "--cached", "--name-only") == "train.py"
    night.verify()
    assert set(DOCUMENTED) <= night.executed
