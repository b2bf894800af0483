"""Several agents at once: worktrees of one repository, one cache folder, a lock for each device."""

import json
import multiprocessing
import random
import re
import time

import pytest
from conftest import HEADER, git, replace
from night import BASELINE, COMMIT, CRASH, DISCARD, FAILS, KEEP, RESET, RUN, Night

AGENTS = 4
SECONDS = 40


def settle(night, rng, command):
    """Log, perhaps killed in between, until there is a row."""
    if night.do(command, die=rng.choice([0, rng.randint(1, 30)]))[0]:
        night.carry_on(command)


def experiment(night, rng):
    """Try an idea as an agent does, or fail in the middle of it."""
    fails = rng.random() < 0.2
    night.edit(FAILS if fails else "")
    night.must(COMMIT)
    if night.do(RUN, die=rng.choice([0, 0, rng.randint(1, 30)]))[0] < 0:
        night.do(RUN)  # killed: nothing is known of the idea
    if rng.random() < 0.2:
        git(night.clone, "reset", "-q", "--hard", "HEAD")
    if fails:
        night.must(RESET)
        return settle(night, rng, CRASH)
    if rng.random() < 0.5:
        return settle(night, rng, KEEP)
    night.must(RESET)
    settle(night, rng, DISCARD)


def live(night, number):
    """What one agent does in its worktree, on its device."""
    rng, path, name = random.Random(number), night.path, f"gpu{number}"
    night.path, night.clone, night.edits = path / f"{name}-output", path / name, 100 * number
    night.path.mkdir()
    night.environ["LOCKS"] = str(path / name)
    night.must(RUN, BASELINE)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        experiment(night, rng)
    runs = night.runs()
    assert {run["repository"] for run in runs} == {str(night.clone)}
    audit = night.do("uv run prepare.py audit")[1]
    assert set(re.findall("^row.*", audit, re.MULTILINE)) <= set(re.findall(".*worse by.*", audit))
    (path / f"{name}.json").write_text(json.dumps(night.rows))


@pytest.mark.slow
def test_agents_with_one_cache_lose_no_row_and_get_none_of_another(tmp_path, cache):
    night = Night(tmp_path, cache / "tokens")
    night.git("checkout", "-q", "main")
    lock = f'"{tmp_path}/%s.lock"'
    replace(night.clone / "harness/run.py", lock, 'os.environ["LOCKS"] + ".lock-%s"')
    night.git("commit", "-qam", "a lock for each agent")
    names = [f"gpu{number}" for number in range(AGENTS)]
    for name in names:
        branch = f"autoresearch/night-{name}"
        night.git("worktree", "add", "-q", "-b", branch, tmp_path / name, "main")

    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=live, args=(night, i)) for i in range(AGENTS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * AGENTS

    refs = set(night.git("for-each-ref", "--format=%(refname)", "refs/autoresearch/").split())
    for name in names:
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        expected = "\n".join([HEADER, *rows])
        assert (tmp_path / name / "results.tsv").read_text() == f"{expected}\n"
        assert night.git("show", f"autoresearch/night-{name}:results.tsv") == expected
        assert {f"refs/autoresearch/night-{name}/{row[:7]}" for row in rows} <= refs
    branches = [f"autoresearch/night-{name}" for name in names]
    text = night.do(f"uv run prepare.py audit {' '.join(branches)}")[1]
    assert re.findall(r"^(\S+): \w+ faults$", text, re.MULTILINE) == branches
