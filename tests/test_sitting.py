"""dev/gpu_sitting.py and dev/bench_step.py, end to end at a reduced size on a CPU."""

import json
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "dev"))
import gpu_sitting

SITTING = ROOT / "dev" / "gpu_sitting.py"


def compare(command, corpus, out, *more, seconds=1):
    common = ["--small", "--seconds", seconds, "--corpus", corpus.folder, "--out", out]
    return command(SITTING, "compare", *common, *more, timeout=900)


def read_results(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_variants_are_interleaved_over_the_seeds(command, corpus, tmp_path):
    more = ["--variants", "recipe", "published", "--seeds", 1, 2, "--set", "NGRAM_CONTEXTS=()"]
    result = compare(command, corpus, tmp_path, *more)
    assert result.returncode == 0, result.stdout
    results = read_results(tmp_path)
    order = [(result["variant"], result["seed"]) for result in results]
    assert order == [("recipe", 1), ("published", 1), ("recipe", 2), ("published", 2)]
    for result in results:
        assert 0 < result["val_bpb"] < 8
        assert result["num_steps"] > 0
        assert result["epochs"] > 0


def test_what_cannot_end_in_time_is_not_started(command, corpus, tmp_path):
    more = ["--variants", "recipe", "published", "--limit", 0.5]
    result = compare(command, corpus, tmp_path, *more)
    assert result.returncode == 1
    assert result.stdout.count("not started for lack of time") == 2
    assert not (tmp_path / "results.jsonl").exists()


def test_a_variant_that_fails_does_not_stop_the_others(command, corpus, tmp_path):
    more = ["--variants", "recipe", "published", "--set", "SOFT_CAP=-1"]
    result = compare(command, corpus, tmp_path, *more)
    assert result.returncode == 1
    assert result.stdout.count("SOFT_CAP=-1 must be from 0 to 70") == 4  # when seen, and at the end


def test_a_knob_that_is_not_there_is_named(command, corpus, tmp_path):
    more = ["--variants", "recipe", "--set", "DEPHT=3", "--set", "DEPTH=3"]
    result = compare(command, corpus, tmp_path, *more)
    assert result.returncode == 1
    assert "no knob DEPHT" in result.stdout


@pytest.mark.slow
def test_averaged_weights_are_the_mean_of_the_last_steps(command, corpus, tmp_path):
    more = ["--variants", "recipe", "averaged", "--set", "NGRAM_CONTEXTS=()"]
    result = compare(command, corpus, tmp_path, *more)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_every_variant_trains(command, corpus, tmp_path):
    result = compare(command, corpus, tmp_path, "--variants", *gpu_sitting.VARIANTS)
    seen = {result["variant"]: result for result in read_results(tmp_path)}
    assert set(seen) == set(gpu_sitting.VARIANTS), result.stdout


@pytest.mark.slow
def test_a_profile_names_the_parts_of_a_step(command, corpus, tmp_path):
    common = ["--small", "--corpus", corpus.folder, "--out", tmp_path]
    result = command(SITTING, "profile", *common, "--variants", "recipe")
    assert result.returncode == 0, result.stdout
    text = (tmp_path / "profile-recipe.txt").read_text()
    for part in ("forward", "backward", "optimizer"):
        assert re.search(rf"of a step of 2048 tokens: .*{part} [\d.]+ ms", text), text


def test_a_corpus_is_collected_without_doubles(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.py").write_text("x = 1\n")
    (tmp_path / "in" / "b.py").write_text("x = 1\n")
    (tmp_path / "in" / "c.md").write_text("# Title\n")
    (tmp_path / "in" / "d.bin").write_text("no text")
    gpu_sitting.collect(tmp_path / "out", [str(tmp_path / "in")])
    texts = sorted(path.read_text() for path in (tmp_path / "out").iterdir())
    assert texts == ["# Title\n", "x = 1\n"]
