"""analysis.ipynb, run from top to bottom: on a night, on ledgers of all kinds, as it is shipped."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nbformat
import pytest
from conftest import HEADER, ROOT, environ, git, make_clone
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROWS = """a1b2c3d	1.300000	1.4	keep	baseline
b2c3d4e	1.290000	1.5	keep	wider (3 seeds)
c3d4e5f	0.000000	0.0	crash	width 10,000
d4e5f6a	1.310000	1.4	discard	no value embeddings"""


def read_outputs(notebook):
    """The plain text of an executed notebook's outputs, with single spaces."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    texts = [each.get("text") or each.get("data", {}).get("text/plain", "") for each in outputs]
    return "\n".join(" ".join(line.split()) for text in texts for line in text.splitlines())


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with the notebook, on a branch for experiments."""
    path = make_clone(tmp_path_factory.mktemp("notebook") / "clone")
    shutil.copy(ROOT / "analysis.ipynb", path)
    git(path, "add", "-A")
    git(path, "commit", "-qm", "the notebook")
    git(path, "checkout", "-q", "-b", "autoresearch/test")
    return path


@pytest.fixture(scope="module")
def execute(clone):
    """Run all cells on a ledger, in one kernel; return what can be read then, and after `also`."""
    notebook = nbformat.read(clone / "analysis.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": clone}})
    shipped = notebook.cells

    def run(ledger, cache, also=""):
        names = ledger if isinstance(ledger, list) else [str(ledger)]
        settings = "import os, sys; sys.dont_write_bytecode = True; "
        settings += f"os.environ['AUTORESEARCH_CACHE'] = {str(cache)!r}; LEDGERS = {names!r}"
        new_cell = nbformat.v4.new_code_cell
        notebook.cells = [*shipped[:2], new_cell(settings), *shipped[2:], new_cell(also)]
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                client.execute_cell(cell, number)
        return read_outputs(notebook)

    with client.setup_kernel():
        yield run


@pytest.fixture
def read(execute, tmp_path):
    """Write a ledger and run the notebook on it, on a machine that has no record of its runs."""

    def run(text, also=""):
        (tmp_path / "ledger.tsv").write_text(text, newline="")
        return execute(tmp_path / "ledger.tsv", tmp_path, also)

    return run


class Night:
    """A branch with a ledger that `log` wrote, and the records of its runs."""

    def __init__(self, clone, cache, device="cpu (AVX2)"):
        self.clone, self.cache, self.device = clone, cache, device
        ask = "from harness.record import *; print(digest(judge_sources()))"
        self.judge = subprocess.check_output([sys.executable, "-c", ask], cwd=clone, text=True)
        self.clock = datetime.now(UTC) - timedelta(hours=2)
        self.experiment("keep", f"baseline, {clone.name}", 1.3, 1.302, 1.298)

    def experiment(self, status, description, *values):
        train = self.clone / "train.py"
        train.write_text(f"{train.read_text()}\n# {description}\n")
        git(self.clone, "commit", "-qam", description)
        for seed, value in enumerate(values or [None], 42):
            self.run(seed, value)
        if status != "keep":
            git(self.clone, "reset", "-q", "--hard", "HEAD~1")
        self.prepare("log", status, description)

    def run(self, seed, value):
        """Write the record of a run, as harness/run.py does."""
        source = (self.clone / "train.py").read_bytes()
        record = {
            "id": f"{self.clock:%Y%m%d-%H%M%S-%f}-1",
            "status": "crash",
            "repository": str(self.clone),
            "commit": git(self.clone, "rev-parse", "HEAD"),
            "train_sha256": hashlib.sha256(source).hexdigest(),
            "judge": self.judge.strip(),
            "harness": "0123456789ab",
            "seed": seed,
            "device": self.device,
            "host": "here",
            "pid": 1,
            "log": {},
        }
        if value:
            record |= {"status": "finished", "val_bpb": value, "peak_vram_mb": 1433.6}
            record |= {"total_tokens_M": 5.1, "total_seconds": 330.0, "num_steps": 99}
        folder = self.cache / "runs" / record["id"]
        folder.mkdir(parents=True)
        (folder / "train.py").write_bytes(source)
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "traceback.txt").touch()
        self.clock += timedelta(minutes=6)

    def prepare(self, *words):
        command = [sys.executable, "prepare.py", *words]
        options = {"cwd": self.clone, "capture_output": True, "text": True}
        result = subprocess.run(command, env=environ(AUTORESEARCH_CACHE=self.cache), **options)
        assert not result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def night(clone, tmp_path_factory):
    night = Night(clone, tmp_path_factory.mktemp("night"))
    night.experiment("keep", "wider", 1.28, 1.281, 1.279)
    night.experiment("keep", "better with (9 seeds)", 1.2805)
    night.experiment("discard", "deeper", 1.31)
    night.experiment("crash", "wrong")
    return night


@pytest.fixture(scope="module")
def seen(execute, night):
    """What the notebook says of the night."""
    also = "print('tick', name_tick(5.0, 0).split(), axes.get_xlabel())\n"
    also += "print('step line', axes.lines[0].get_ydata())"
    return execute("results.tsv", night.cache, also)


# A night ----------------------------------------------------------------------------------------


def test_the_finding_and_the_totals_of_a_night_are_shown(seen):
    assert "finding 5 experiments, 3 kept, 1.3000 → 1.2800\n" in seen
    assert "noise 0.002097, the standard deviation between seeds\n" in seen
    assert "runs 9 in 2.0 hours, 4.5 an hour\n" in seen
    assert "5 of 5 rows have their run on record" in seen


def test_each_keep_is_judged_against_the_noise_of_its_difference(seen):
    assert " 1.300000 3 first baseline, clone (3 seeds)\n" in seen
    assert " 1.280000 3 +0.020000 +11.68 better wider (3 seeds)\n" in seen
    assert " 1.280500 1 -0.000500 -0.21 within the noise better with (9 seeds)\n" in seen


def test_the_hours_are_under_the_experiments(seen):
    assert "tick ['5', '2.0', 'h'] experiment, and hours since the first run began" in seen


def test_the_step_line_is_the_best_kept_so_far(seen):
    assert "step line [1.3 1.28 1.28 1.28 1.28]" in seen


def test_a_clean_night_has_no_faults(seen):
    assert "no faults" in seen


def test_a_keep_that_is_worse_by_more_than_the_noise_is_called_so(execute, night, tmp_path):
    row = "a1b2c3d\t1.400000\t1.4\tkeep\thopeful\n"
    (tmp_path / "ledger.tsv").write_text((night.clone / "results.tsv").read_text() + row)
    seen = execute(tmp_path / "ledger.tsv", night.cache)
    assert "1.400000 1 -0.120000 -49.57 worse hopeful\n" in seen
    assert "5 of 6 rows have their run on record" in seen


def test_the_audit_is_that_of_the_harness(execute, night, tmp_path):
    text = (night.clone / "results.tsv").read_text()
    (tmp_path / "ledger.tsv").write_text(text.replace("1.280000", "1.180000"))
    *faults, _ = night.prepare("audit", str(tmp_path / "ledger.tsv")).splitlines()
    assert len(faults) > 1
    assert "\n".join(faults) in execute(tmp_path / "ledger.tsv", night.cache)


def test_the_ledger_of_a_branch_is_read_where_another_one_is_checked_out(execute, night):
    git(night.clone, "checkout", "-q", "main")
    try:
        seen = execute("autoresearch/test", night.cache)
    finally:
        git(night.clone, "checkout", "-q", "autoresearch/test")
    assert "5 experiments, 3 kept" in seen
    assert "5 of 5 rows have their run on record" in seen


def test_jupyter_execute_inplace_leaves_all_readable_as_plain_text(night):
    notebook = night.clone / "analysis.ipynb"
    command = [Path(sys.executable).with_name("jupyter"), "execute", "--inplace", notebook]
    environment = environ(AUTORESEARCH_CACHE=night.cache)
    (night.clone / "progress.png").unlink(missing_ok=True)
    try:
        subprocess.run(command, check=True, capture_output=True, cwd="/", env=environment)
        seen = read_outputs(nbformat.read(notebook, as_version=4))
    finally:
        git(night.clone, "checkout", "-q", "analysis.ipynb")
    assert "finding 5 experiments, 3 kept, 1.3000 → 1.2800\n" in seen
    assert " 1.280000 3 +0.020000 +11.68 better wider (3 seeds)\n" in seen
    assert "no faults" in seen
    assert (night.clone / "progress.png").read_bytes().startswith(b"\x89PNG")


# A night of several agents ----------------------------------------------------------------------

FLEET = [f"autoresearch/gpu{number}" for number in range(3)]
SHOW = """
print("drawn", len(ledger), "steps", axes.lines[0].get_ydata())
print("legend", [text.get_text() for text in axes.get_legend().texts])
print("colours", len({tuple(map(tuple, each.get_facecolor())) for each in axes.collections[1:]}))
"""


@pytest.fixture(scope="module")
def fleet(clone, execute, tmp_path_factory):
    """What the notebook says of three branches, the last of which is of another device."""
    path = tmp_path_factory.mktemp("fleet")
    nights = []
    for name, device in zip(FLEET, ("H100", "H100", "H200"), strict=True):
        folder = path / name
        git(clone, "worktree", "add", "-q", "-b", name, folder, "main")
        nights.append(Night(folder, path / "cache", device))
    nights[1].experiment("keep", "wider", 1.28, 1.281, 1.279)
    nights[2].experiment("keep", "on a better device", 1.1)
    nights[0].experiment("keep", "deeper", 1.29)
    nights[0].experiment("discard", "deeper still", 1.31)
    nights[1].experiment("keep", "both", 1.27)
    return execute(FLEET, path / "cache", SHOW)


def test_the_branches_of_a_device_are_one_night_in_the_order_of_time(fleet):
    assert "finding 8 experiments, 7 kept, 1.3000 → 1.2700\n" in fleet
    assert "drawn 8 steps [1.3 1.3 1.3 1.28 1.28 1.28 1.28 1.27]" in fleet


def test_a_keep_is_judged_against_the_best_of_all_branches(fleet):
    assert re.search(r"autoresearch/gpu0 \S+ 1\.290000 1 -0\.010000 -\S+ worse deeper\n", fleet)
    assert re.search(r"autoresearch/gpu1 \S+ 1\.270000 1 \+0\.010000 \S+ better both\n", fleet)


def test_a_ledger_of_another_device_is_shown_but_not_compared(fleet):
    device = "H200, harness 0123456789ab; first: H100, harness 0123456789ab"
    assert f"autoresearch/gpu2 is shown, but not compared: {device}\n" in fleet
    assert "on a better device" not in fleet


def test_each_branch_has_a_colour_and_its_number_of_keeps(fleet):
    for name, kept in zip(FLEET, (2, 3, 2), strict=True):
        assert f"'{name}: {kept} kept'" in fleet
    assert "colours 3" in fleet


def test_each_branch_is_audited(fleet):
    for name in FLEET:
        assert f"\n{name}: no faults\n" in fleet


# Ledgers of all kinds ---------------------------------------------------------------------------


def test_columns_are_found_by_name_and_others_are_passed_over(read):
    header = "status\tseconds\tdescription\tval_bpb\tcommit\tmemory_gb"
    rows = "keep\t300\tbaseline\t1.3\ta1b2c3d\t1.4\r\ndiscard\t300\twider\t1.4\tb2c3d4e\t1.4\r\n"
    seen = read(f"\ufeff{header}\r\n{rows}", "print(ledger[COLUMNS].values.tolist())")
    assert "can't be read" not in seen
    assert "['a1b2c3d', 1.3, '1.4', 'keep', 'baseline']" in seen
    assert "['b2c3d4e', 1.4, '1.4', 'discard', 'wider']" in seen


BROKEN = {
    "a1b2c3d\t1.3\t1.4\tkeep": "it has 4 cells, the header 5",
    "a1b2c3d\t1.3\t1.4\tkeep\tx\ty": "it has 6 cells, the header 5",
    "": "it has 1 cells, the header 5",
    "a1b2c3d\t1.3\t1.4\tmaybe\tx": "its status is 'maybe'",
    "a1b2c3d\t~1.3\t1.4\tkeep\tx": "could not convert string to float: '~1.3'",
    "a1b2c3d\tinf\t1.4\tdiscard\tx": "discard with a val_bpb of inf",
    "a1b2c3d\tnan\t1.4\tkeep\tx": "keep with a val_bpb of nan",
    "a1b2c3d\t0.000000\t1.4\tkeep\tx": "keep with a val_bpb of 0.0",
}


def test_lines_that_can_not_be_read_are_listed_with_the_reason(read):
    seen = read("\n".join([HEADER, *BROKEN, ROWS]))
    for number, reason in enumerate(BROKEN.values(), 2):
        assert f", line {number} can't be read: {reason}: " in seen
    assert "4 experiments, 2 kept, 1.3000 → 1.2900" in seen


def test_a_header_that_lacks_a_column_is_refused_and_named(read):
    with pytest.raises(CellExecutionError, match=r"lacks \{'val_bpb'\}: 'commit"):
        read(f"{HEADER}\n{ROWS}".replace("val_bpb", "loss"))


def test_a_ledger_that_is_neither_a_file_nor_in_git_is_refused(execute, tmp_path):
    with pytest.raises(CellExecutionError, match="autoresearch/other"):
        execute("autoresearch/other", tmp_path)


def test_without_a_record_the_description_tells_the_number_of_seeds(read):
    seen = read(f"{HEADER}\n{ROWS}\n")
    assert " 1.300000 1 first baseline\n" in seen
    assert " 1.290000 3 +0.010000 unknown better wider (3 seeds)\n" in seen
    assert "0 of 4 rows have their run on record" in seen


@pytest.mark.parametrize("text", ["", f"{HEADER}\n", f"{HEADER}\n{ROWS.splitlines()[2]}\n"])
def test_a_ledger_without_a_value_removes_the_picture_of_another_one(read, clone, text):
    (clone / "progress.png").touch()
    assert "nothing was kept" in read(text)
    assert not (clone / "progress.png").exists()


def test_a_description_is_shown_whole_in_one_line_whatever_is_in_it(read):
    words = 'größer 幅 🚀 $x^2$ $ \\alpha "quoted ' + "words " * 60 + "at the end"
    seen = read(f"{HEADER}\na1b2c3d\t1.3\t1.4\tkeep\t{words}\n")
    assert "1 experiment, 1 kept, 1.3000 → 1.3000" in seen
    assert f" first {words}\n" in seen
    assert "Warning" not in seen


# The picture ------------------------------------------------------------------------------------

LAYOUT = """
figure = axes.figure
figure.canvas.draw()
labels = [text.get_window_extent() for text in axes.texts if text.get_text()]
pixels = axes.transData.transform(ledger.val_bpb.reset_index().dropna())
steps = axes.transData.transform_path(axes.lines[0].get_path())
print("labels", len(labels))
print("on each other", sum(label.count_overlaps(labels) - 1 for label in labels))
print("on points", sum(label.count_contains(pixels) for label in labels))
print("on the line", sum(steps.intersects_bbox(label, filled=False) for label in labels))
print("outside", sum(axes.bbox.count_contains(label.corners()) < 4 for label in labels))
print("title", figure.get_suptitle(), "|", axes.get_title(loc="right"))
print("y from", *axes.get_ylim())
"""


def long_night():
    """126 rows with 23 keeps and a crash, most of them a little worse than the best before."""
    rows, best = [], 0.9979
    for number in range(126):
        value, status = best + 0.0005 + number * 37 % 41 / 4000, "discard"
        if number % 6 == 0 or number in (7, 8):
            best = 0.9979 - 0.0282 * number / 125 if number else best
            value, status = best, "keep"
        if number == 50:
            value, status = 0, "crash"
        rows.append(f"{number:07x}\t{value:.6f}\t44.0\t{status}\tidea {number} of a long night")
    return "\n".join([HEADER, *rows])


def test_the_title_is_the_finding_and_labels_cover_nothing(read):
    seen = read(long_night(), LAYOUT)
    assert int(re.search(r"\nlabels (\d+)", seen)[1]) >= 10
    for what in ("on each other", "on points", "on the line", "outside"):
        assert f"\n{what} 0\n" in seen
    assert "title 126 experiments, 23 kept, 0.9979 → 0.9" in seen


def test_what_lies_far_from_the_rest_does_not_squeeze_it_and_is_said(read):
    far = "e5f6a7b\t97.3\t1.4\tdiscard\tdiverged\nf6a7b8c\t5000\t1.4\tdiscard\tdiverged\n"
    seen = read(f"{HEADER}\n{ROWS}\n{far}d4e5f6a\t1.305\t1.4\tdiscard\tx\n", LAYOUT)
    assert "| 2 drawn at the edge: 97.3 to 5000" in seen
    low, high = map(float, re.search(r"y from (\S+) (\S+)", seen).groups())
    assert 1.2 < low < 1.29 < 1.31 < high < 1.4


def test_what_was_kept_is_never_cut_off(read):
    rows = "".join(f"a1b2c3d\t1.{value}\t1\tkeep\tx\n" for value in (900, 301, 300, 299, 298, 297))
    seen = read(f"{HEADER}\n{rows}", LAYOUT)
    assert "drawn at the edge" not in seen
    assert float(re.search(r"y from \S+ (\S+)", seen)[1]) > 1.9


# As it is shipped -------------------------------------------------------------------------------


def test_it_needs_neither_torch_nor_the_judge(read):
    seen = read(f"{HEADER}\n{ROWS}", "print('loaded', {'torch', 'prepare'} & set(sys.modules))")
    assert "loaded set()" in seen


def test_it_is_shipped_executed_without_paths_of_a_machine():
    notebook = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
    seen = read_outputs(notebook)
    for words in ("finding ", "commit ", " faults", "rows have their run on record"):
        assert words in seen
    text = nbformat.writes(notebook)
    assert "image/png" in text
    for path in ("/tmp/", "/home/", "/root/", "/Users/", "/work/", str(ROOT)):
        assert path not in text
