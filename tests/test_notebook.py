"""analysis.ipynb, run from top to bottom: on ledgers as they exist, on nights gone wrong, and as it is shipped."""

import copy
import json
import re
import subprocess

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import prepare

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
ROWS = "a1b2c3d\t1.300000\t1.4\tkeep\tbaseline\nb2c3d4e\t1.290000\t1.4\tkeep\thigher rate\n"
ROWS += "c3d4e5f\t0.000000\t0.0\tcrash\twidth 10,000\nd4e5f6a\t1.310000\t1.4\tdiscard\tno value embeddings\n"
NOTEBOOK = nbformat.read(ROOT / "analysis.ipynb", as_version=4)


@pytest.fixture(scope="module")
def execute():
    """Run all cells in a folder, in one kernel, as a user does; returns what they printed and displayed.

    `settings` is code that is run after the cell with the settings, `also` after all.
    """
    notebook = copy.deepcopy(NOTEBOOK)
    client = NotebookClient(notebook, timeout=120)

    def run(folder, settings="", also=""):
        cells = [nbformat.v4.new_code_cell(f"import os; os.chdir({str(folder)!r})"), *notebook.cells]
        cells.insert(3, nbformat.v4.new_code_cell(settings))
        cells.append(nbformat.v4.new_code_cell(also))
        notebook.cells, shipped = cells, notebook.cells
        for number, cell in enumerate(cells):
            if cell.cell_type == "code":
                client.execute_cell(cell, number)
        notebook.cells = shipped
        outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
        return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)

    with client.setup_kernel():
        yield run


NO_ROWS = ([], [], None)
LEDGERS = {  # text: statuses of the rows, numbers of the lines that were not read, the best that was kept
    "ours": (HEADER + ROWS, (["keep", "keep", "crash", "discard"], [], 1.29)),
    "empty": ("", NO_ROWS),
    "only a header": (HEADER, NO_ROWS),
    "one row": (HEADER + ROWS.split("\n")[0], (["keep"], [], 1.3)),
    "no header": (ROWS, (["keep", "keep", "crash", "discard"], [], 1.29)),
    "a crash first": (
        HEADER + "a1b2c3d\t0.000000\t0.0\tcrash\tbaseline\n" + ROWS,
        (["crash", "keep", "keep", "crash", "discard"], [], 1.29),
    ),
    "no keep": (HEADER + "a1b2c3d\t1.3\t1.4\tdiscard\tx\nb2c3d4e\t1.2\t1.4\tdiscard\ty\n", (["discard"] * 2, [], None)),
    "only crashes": (HEADER + "a1b2c3d\t0.000000\t0.0\tcrash\tx\n" * 3, (["crash"] * 3, [], None)),
    "seven columns of another loop": (
        "iteration\tcommit\tmetric\tdelta\tguard\tstatus\tdescription\n"
        "0\ta1b2c3d\t0.9979\t0.0\t-\tbaseline\tinitial state\n"
        "1\tb2c3d4e\t0.9931\t-0.0048\tpass\tkeep\thalf the batch\n"
        "2\t-\t1.0012\t+0.0081\tpass\tdiscard\twider\n"
        "3\t-\t0.0\t0.0\t-\tcrash\tdepth 40\n"
        "4\t-\t-\t-\tfail\thook-blocked\ttouched prepare.py\n",
        (["keep", "keep", "discard", "crash", "other"], [], 0.9931),
    ),
    "fourteen columns, metric before and after": (
        "timestamp\tagent\tbranch\tcommit\tmetric_before\tmetric_after\tdelta\tguard\tdecision\tsteps\ttokens_M\t"
        "peak_vram_mb\tseconds\tnotes\n"
        "2026-03-10T01:02:03\tA\tx\ta1b2c3d\t\t0.9979\t\tok\tBASELINE\t953\t499.6\t45060.2\t300.1\tstart\n"
        "2026-03-10T01:09:41\tB\tx\tb2c3d4e\t0.9979\t0.9860\t-0.0119\tok\tKEEP\t1906\t499.7\t45060.2\t300.0\t2^18\n"
        "2026-03-10T01:17:02\tB\tx\tc3d4e5f\t0.9860\t0.9991\t0.0131\tok\tREVERT\t1700\t445.0\t51000.0\t300.2\twide\n",
        (["keep", "keep", "discard"], [], 0.986),
    ),
    "status first": (
        "status\tval_bpb\tcommit\tdescription\nkeep\t0.99\ta1b2c3d\tx\ndiscard\t1.01\t\ty\n",
        (["keep", "discard"], [], 0.99),
    ),
    "commas, quoted and not": (
        'commit,val_bpb,memory_gb,status,description\na1b2c3d,0.99,44.0,keep,"rate 0.04, betas ""0.8, 0.95"""\n'
        "b2c3d4e,0.98,44.0,keep,wider, and deeper\n",
        (["keep", "keep"], [], 0.98),
    ),
    "a block of commas after tabs": (
        HEADER + ROWS + "\ncommit,status,val_bpb,description\ne5f6a7b,keep,1.25,rotary base\n",
        (["keep", "keep", "crash", "discard", "keep"], [], 1.25),
    ),
    "comments and banners": (
        "# night of March 10, 8 GPUs, goal 0.95\n#commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
        "a1b2c3d\t0.99\t44.0\tkeep\tbaseline\n=== second session ===\n# resumed\n----\n"
        "Best so far: 0.99, commit a1b2c3d, not bad\nb2c3d4e\t1.01\t44.0\tdiscard\tx\n",
        (["keep", "discard"], [1, 4, 5, 7], 0.99),
    ),
    "a table of Markdown": (
        "| commit | val_bpb | status | idea |\n|---|---|:-:|---|\n| a1b2c3d | 0.99 | **keep** | start |\n"
        "| `b2c3d4e` | 1.2 | discard ❌ | wide |\n",
        (["keep", "discard"], [], 0.99),
    ),
    "many words for one status": (
        HEADER + "a1b2c3d\t1.0\t1\tbaseline\tx\n\t0.9\t1\ttentative\tx\n\t\t\tskipped\tx\n\tn/a\tn/a\tFAILED\tx\n"
        "b2c3d4e\t0.8\t1\tbest\tx\n\t\t\tcrash\tx\n\tnan\t\tOOM\tx\n",
        (["keep", "other", "other", "crash", "keep", "crash", "crash"], [], 0.8),
    ),
    "ragged rows": (
        HEADER + "a1b2c3d\t1.0\t1.0\tkeep\nb2c3d4e\t0.9\tkeep\tx\nc3d4e5f\t0.8\t1.0\tkeep\tx\ty\tz\nd4e5f6a\n"
        "e5f6a7b\t0.7\t1.0\tmaybe\tx\n",
        (["keep", "keep"], [3, 5, 6], 0.8),
    ),
    "figures that are none": (
        HEADER + "a1b2c3d\t1.0\t1.0\tkeep\tx\nb2c3d4e\t~0.9\t1.0\tkeep\tx\nc3d4e5f\tn/a\t1.0\tkeep\tx\n"
        "d4e5f6a\t-3\t1.0\tdiscard\tx\ne5f6a7b\tinf\t1.0\tdiscard\tx\nf6a7b8c\t0.000000\t1.0\tkeep\tx\n",
        (["keep"], [3, 4, 5, 6, 7], 1.0),
    ),
    "descriptions with everything": (
        HEADER + "a1b2c3d\t1.0\t1.0\tkeep\t\"quoted\" and 'so' 🚀 $x^2$ $ \\alpha 幅\nb2c3d4e\t0.9\t1.0\tkeep\t"
        '"one\ntwo"\nc3d4e5f\t0.95\t1.0\tdiscard\t\n',
        (["keep", "keep", "discard"], [4], 0.9),
    ),
    "line ends of Windows and a byte order mark": (
        "\ufeff" + (HEADER + ROWS).replace("\n", "\r\n"),
        (["keep", "keep", "crash", "discard"], [], 1.29),
    ),
    "two figures, two memories": (
        "commit\tval_loss\tval_bpb\tmemory_mb\tmemory_gb\tstatus\tdescription\na1b2c3d\t3.1\t0.99\t1024\t1.0\tkeep\tx\n",
        (["keep"], [], 0.99),
    ),
    "statuses that say two things, or no": (
        HEADER + "a1b2c3d\t1.0\t1\tnot kept\tx\na1b2c3d\t1.0\t1\tcrash, then keep\tx\na1b2c3d\t1.0\t1\tKEEP ✅\tx\n",
        (["keep"], [2, 3], 1.0),
    ),
    "no ledger at all": ("\x00\x01\x02 binary \xff\n" + "x" * 200_000 + ",y,z\n", ([], [1, 2], None)),
    "all figures equal": (HEADER + "a1b2c3d\t1.0\t1.0\tkeep\tx\n" * 3, (["keep"] * 3, [], 1.0)),
    "a result that is a status": (
        "commit,val_loss,result,description\na1b2c3d,0.99,keep,x\nb2c3d4e,1.2,Discarded,y\n",
        (["keep", "discard"], [], 0.99),
    ),
    "semicolons": (
        "; night of March 10\ncommit;val_bpb;status;description\na1b2c3d;0.99;keep;wider, and deeper\n"
        ';1.2;discard;"a; b"\n',
        (["keep", "discard"], [1], 0.99),
    ),
    "a header that is not recognised": (
        "id\tloss at the end\tGiB\tgood\twhat\n" + ROWS,
        (["keep", "keep", "crash", "discard"], [1], 1.29),
    ),
    "one that went astray": (
        HEADER + ROWS + "e5f6a7b\t97.3\t1.4\tdiscard\tdiverged\n",
        (["keep", "keep", "crash", "discard", "discard"], [], 1.29),
    ),
}


@pytest.mark.parametrize("name", LEDGERS)
def test_every_ledger_is_read_or_its_lines_are_listed(execute, tmp_path, name):
    text, expected = LEDGERS[name]
    (tmp_path / "results.tsv").write_text(text)
    (tmp_path / "progress.png").write_text("of another ledger")
    best = "None if ledger.best.dropna().empty else float(ledger.best.iloc[-1])"
    seen = execute(
        tmp_path, f"RUNS = {str(tmp_path)!r}", f"print((ledger.status.tolist(), unread.index.tolist(), {best}))"
    )
    assert seen.splitlines()[-1] == str(expected)
    statuses, unread, _ = expected
    assert (f"{len(unread)} lines were not read:" in seen) == bool(unread)
    assert ("no experiments yet" in seen) == (not statuses)
    assert ("Nothing was audited: the ledger has no rows." in seen) == (not statuses)
    assert ("Not checked: figures, seeds" in seen) == bool(statuses)
    assert "nothing found" not in seen
    said = (
        "No header was recognised before the first row: its columns were taken to be commit, val_bpb, memory_gb, status"
    )
    assert (said in seen) == (name in ("no header", "a header that is not recognised"))
    drawn = any(status != "crash" for status in statuses)
    assert (tmp_path / "progress.png").exists() == drawn


def test_a_ledger_of_a_branch_is_read_and_one_that_is_nowhere_is_named(execute, night):
    night.git("checkout", "-q", "main")
    assert "4: 2 keep" in execute(night.path, f'LEDGER = "autoresearch/x"; RUNS = {str(night.cache)!r}')
    assert "autoresearch/y: no such file here, and no git ref" in execute(night.path, 'LEDGER = "autoresearch/y"')


class Night:
    """A repository with a branch of experiments, its ledger, and the record that prepare.py leaves of them."""

    def __init__(self, path):
        self.path, self.cache, self.runs, self.entries, self.rows = path / "repository", path / "cache", [], [], []
        self.path.mkdir()
        self.cache.mkdir()
        self.git("init", "-q", "-b", "main")
        for name, value in (("user.name", "test"), ("user.email", "test@example.invalid")):
            self.git("config", name, value)
        for name in ("prepare.py", "train.py"):
            (self.path / name).write_text(f"# {name}\n")
        self.git("add", "-A")
        self.git("commit", "-qm", "start")
        self.git("checkout", "-qb", "autoresearch/x")
        self.experiment("baseline", "keep", [1.3, 1.302, 1.298])
        self.experiment("wider", "keep", [1.28, 1.281, 1.279])
        self.experiment("deeper", "discard", [1.31])
        self.experiment("wrong", "crash", [])
        self.keep_ledger()

    def git(self, *arguments):
        command = ["git", *arguments]
        return subprocess.run(command, cwd=self.path, check=True, capture_output=True, text=True).stdout.strip()

    def experiment(self, what, status, figures):
        if self.rows:
            (self.path / "train.py").write_text(f"# {what}\n")
            self.git("commit", "-qam", what)
        commit = self.git("rev-parse", "HEAD")
        run = {"repository": str(self.path), "commit": commit, "train_committed": True, "train_sha256": what}
        run |= {"harness": "h1", "device": "cpu (AVX2)", "total_seconds": 360.0, "total_tokens_M": 5.1}
        for seed, figure in enumerate(figures or [None], 42):
            number = len(self.runs)
            time = f"2026-11-25T{number // 10:02}:{number % 10 * 6:02}:00Z"
            ended = {"status": "finished", "val_bpb": figure} if figure else {"status": "crash"}
            self.runs.append({"id": f"run {number}", "time": time, "seed": seed} | run | ended)
        row = f"{commit[:7]}\t{(figures or [0])[0]:.6f}\t1.4\t{status}\t{what}"
        if status != "keep":
            self.git("reset", "-q", "--hard", "HEAD~1")
        self.rows.append(row)
        entry = {"id": f"x {number}", "run": self.runs[-1]["id"], "branch": "autoresearch/x", "status": status}
        entry |= {"repository": str(self.path), "harness": "h1", "device": "cpu (AVX2)"}
        self.entries.append(entry | {"commit": commit, "train_sha256": what, "row": row})
        self.write()
        self.git("add", "results.tsv")
        self.git("commit", "-qm", f"log {status}: {what}")

    def keep_ledger(self):
        """As prepare.py does: git keeps the ledger's commit, whatever becomes of the branch."""
        self.git("update-ref", "refs/autoresearch/x/ledger", "HEAD")

    def old(self, number, when, **changes):
        """A run like one of the night, but of another time."""
        changes = {"id": f"old {len(self.runs)}", "time": when} | changes
        self.runs.insert(0, self.runs[number] | changes)

    def write(self):
        (self.path / "results.tsv").write_text(HEADER + "".join(f"{row}\n" for row in self.rows))
        for name, lines in (("runs", self.runs), ("ledger", self.entries)):
            (self.cache / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def audit(self, execute):
        self.write()
        return execute(self.path, f"RUNS = {str(self.cache)!r}")


@pytest.fixture
def night(tmp_path):
    return Night(tmp_path)


def test_a_clean_night_says_so_in_one_line(execute, night):
    seen = night.audit(execute)
    assert "Audit: nothing found. 4 rows, 8 runs." in seen
    assert "Not checked" not in seen
    assert re.search(r"runs +8: 0.8 hours out of 0.8, 10.0 an hour", seen)
    assert re.search(r"val_bpb of seed 42, as in the rows, first kept to best +1.300000 to 1.280000", seen)
    assert re.search(r"val_bpb, mean over seeds, first kept to best +1.300000 \(mean of 3 seeds\) to 1.280000", seen)
    assert re.search(r"commit +val_bpb of seed 42 +mean over seeds +seeds +gain", seen)


def other_figure(night):
    night.rows[1] = night.rows[1].replace("1.280000", "1.180000")


def row_without_run(night):
    night.rows.append("abcdef0\t1.290000\t1.4\tdiscard\tby hand")


def run_without_row(night):
    night.runs.append(night.runs[6] | {"id": "more", "train_sha256": "other", "val_bpb": 1.27})


def commit_unknown(night):
    night.rows[1] = night.rows[1].replace(night.rows[1][:7], "abcdef0")


def other_file(night):
    (night.path / "prepare.py").write_text("# kinder\n")
    night.git("commit", "-qam", "kinder")
    night.experiment("kinder", "keep", [1.2])


def not_better(night):
    night.experiment("hopeful", "keep", [1.285])


def row_deleted(night):
    del night.rows[2]


def row_deleted_in_git_alone(night):
    night.entries.clear()
    del night.rows[2]


def row_changed(night):
    night.git("update-ref", "-d", "refs/autoresearch/x/ledger")
    night.rows[2] = night.rows[2].replace("deeper", "broader")


def row_changed_on_main(night):
    del night.entries[3:]
    night.git("checkout", "-q", "main")
    night.rows[2] = night.rows[2].replace("deeper", "broader")


def seed_again(night):
    night.runs.append(night.runs[3] | {"id": "again", "time": "2026-11-25T00:50:00Z", "val_bpb": 1.283})


def other_harness(night):
    for run in night.runs[3:]:
        run["harness"] = "h2"


def other_device(night):
    for run in night.runs[6:]:
        run["device"] = "cpu (AVX512)"


def uncommitted(night):
    night.runs[6]["train_committed"] = False


def twice(night):
    night.rows.append(night.rows[2] + " again")


def other_seed(night):
    night.experiment("lucky", "keep", [1.25])
    night.runs[-1]["seed"] = 1337


FINDINGS = {
    other_figure: r"row 2 (\w{7}, keep): its val_bpb is 1.180000, but in the record 1.280000, 1.281000, 1.279000.",
    row_without_run: "row 5 (abcdef0, discard): the record has no run of it.",
    run_without_row: r"a run has no row: 1.27, seed 42, of \w{7}, begun 2026-11-25T00:36:00Z.",
    commit_unknown: "row 2 (abcdef0, keep): git does not have its commit.",
    other_file: r"row 5 (\w{7}, keep): its commit changed prepare.py, not train.py alone.",
    not_better: r"row 5 (\w{7}, keep): kept with 1.285000 (1 seed), worse than 1.280000 (mean of 3 seeds) before it",
    row_deleted: r"logged on autoresearch/x, but not in the ledger: \w{7} 1.310000 1.4 discard",
    row_deleted_in_git_alone: r"logged on autoresearch/x, but not in the ledger: \w{7} 1.310000 1.4 discard",
    row_changed: r"row 3 (\w{7}, discard): it was not logged as it stands: on autoresearch/x no such row was.",
    row_changed_on_main: r"row 3 (\w{7}, discard): it was not logged as it stands: on autoresearch/x no",
    seed_again: r"row 2 (\w{7}, keep): seed 42 of \w{7} was run 2 times: 1.280000 to 1.283000.",
    other_harness: r"row 2 (\w{7}, keep): run with harness h2, the row before with h1: they do not compare.",
    other_device: r"row 3 (\w{7}, discard): run with device cpu (AVX512), the row before with cpu (AVX2): they do not",
    uncommitted: r"row 3 (\w{7}, discard): its run was of a train.py that was not committed.",
    twice: r"row 5 (\w{7}, discard): the same train.py as row 3.",
    other_seed: r"row 5 (\w{7}, keep): kept by seed 1337, where all others are compared by 42.",
}


@pytest.mark.parametrize("spoil", FINDINGS)
def test_what_does_not_fit_is_a_sentence(execute, night, spoil):
    spoil(night)
    expected = re.escape(FINDINGS[spoil]).replace(r"\\w\{7\}", r"\w{7}")
    seen = night.audit(execute)
    assert re.search(expected, seen), seen
    assert "nothing found" not in seen


def test_a_keep_within_the_noise_is_marked_and_not_accused(execute, night):
    night.experiment("hardly", "keep", [1.2795])
    night.experiment("simpler", "keep", [1.2805])
    night.keep_ledger()
    seen = night.audit(execute)
    assert re.search(r"row 5 \(\w{7}, keep\): kept within the noise, -0.27 x it: right only if it is simpler\.", seen)
    assert re.search(r"row 6 \(\w{7}, keep\): kept within the noise, \+0.45 x it: right only if it is simpler\.", seen)
    assert "Audit: nothing found. 6 rows, 10 runs." in seen
    assert "within the noise" in seen.split("so it is")[1]
    assert "better" in seen


def test_a_keep_without_a_known_noise_is_not_accused(execute, tmp_path):
    (tmp_path / "results.tsv").write_text(HEADER + ROWS + "e5f6a7b\t1.295000\t1.4\tkeep\tsimpler\n")
    seen = execute(tmp_path, f"RUNS = {str(tmp_path)!r}")
    assert (
        "row 5 (e5f6a7b, keep): kept with 1.295000, not better than 1.290000 before it, where the noise isn't" in seen
    )
    assert "What was checked fits together. 5 rows, 0 runs." in seen
    assert "mean over seeds" not in seen


def test_runs_of_another_time_and_of_other_nights_spoil_nothing(execute, night):
    night.runs.append(night.runs[0] | {"id": "next", "time": "2026-11-27T00:00:00Z", "val_bpb": 1.3})
    night.runs.append(night.runs[0] | {"id": "new", "time": "2026-11-27T01:00:00Z", "train_sha256": "new"})
    night.entries.append(night.entries[0] | {"id": "y", "run": "next", "branch": "autoresearch/y", "row": "other"})
    night.old(0, "2026-11-20T00:00:00Z", val_bpb=1.31)
    night.old(0, "2026-11-20T01:00:00Z", train_sha256="by hand")
    night.old(4, "2026-11-25T00:01:00Z", train_sha256="of another clone", repository="/elsewhere")
    seen = night.audit(execute)
    assert "Audit: nothing found. 4 rows, 8 runs." in seen
    assert re.search(r"runs +8: 0.8 hours out of 0.8, 10.0 an hour", seen)


def test_a_row_has_the_run_that_was_logged_for_it(execute, night):
    """Not the newest of its commit: that is of another clone here, on another device."""
    night.runs.append(night.runs[3] | {"id": "elsewhere", "repository": "/elsewhere", "device": "cpu (AVX512)"})
    night.entries[1]["run"] = "run 3"
    night.write()
    seen = execute(
        night.path, f"RUNS = {str(night.cache)!r}", "print(record['own'][2]['id'], ledger['seeds'].tolist())"
    )
    assert seen.splitlines()[-1] == "run 3 [3, 3, 1, 0]"


def test_the_noise_is_that_of_prepare(execute, night, monkeypatch):
    """Of all runs that compare, with a row or without, and the newest figure of a seed that was run again."""
    other = {"train_sha256": "tried by hand", "repository": "/elsewhere"}
    night.old(0, "2026-11-20T00:00:00Z", seed=44, val_bpb=1.4)
    for number, figure in enumerate((1.5, 1.51, 1.53)):
        night.old(0, "2026-11-20T00:00:00Z", seed=number, val_bpb=figure, **other)
    night.old(0, "2026-11-20T00:00:00Z", seed=9, val_bpb=1.9, device="cpu (AVX512)", **other)
    night.old(0, "2026-11-20T00:00:00Z", seed=9, val_bpb=1.9, harness="h0", **other)
    night.write()
    monkeypatch.setattr(prepare, "read_lines", lambda name: night.runs)
    monkeypatch.setattr(prepare, "read_ledger", lambda branch: ([], []))
    newest = [run for run in night.runs if run["status"] == "finished"][-1]
    expected = prepare.comparison(newest)["noise"].split()[0]
    seen = execute(night.path, f"RUNS = {str(night.cache)!r}", "print(f'{noise:.6f}')")
    assert seen.splitlines()[-1] == expected


def test_the_picture_has_a_title_and_time_begins_with_the_first_run(execute, night):
    also = "figure = draw(ledger, noise, 'title'); plt.close(); print(ledger.hours.round(3).tolist(),"
    also += "figure.axes[-1].get_xlim()[0], figure.axes[0].get_ylabel(), figure.get_suptitle(), '+',"
    also += "name_of(record['branch']), days_of(record['night']))"
    night.write()
    seen = execute(night.path, f"RUNS = {str(night.cache)!r}", also)
    assert (
        seen.splitlines()[-1]
        == "[0.1, 0.4, 0.7, 0.8] 0.0 val_bpb of seed 42 (lower is better) title + autoresearch/x 2026-11-25"
    )


def test_descriptions_are_shown_whole_and_functions_have_docstrings(execute, tmp_path):
    (tmp_path / "results.tsv").write_text(HEADER + ROWS.replace("baseline", "words " * 30 + "at the end"))
    also = "import inspect; print([name for name, it in globals().items() if inspect.isfunction(it) and not it.__doc__"
    also += " and it.__module__ == '__main__'])"
    seen = execute(tmp_path, f"RUNS = {str(tmp_path)!r}", also)
    assert "words " * 30 + "at the end" in seen
    assert seen.splitlines()[-1] == "[]"


def test_the_shipped_notebook_was_executed_and_names_no_path():
    outputs = [output for cell in NOTEBOOK.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = nbformat.writes(NOTEBOOK)
    for path in ("/tmp", "/home", "/root", "/Users", str(ROOT)):
        assert path not in text


def test_the_shipped_notebook_runs_on_the_shipped_ledger_in_a_fresh_clone(execute, tmp_path):
    """There is no record of the runs there, and it says so."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True, capture_output=True)
    assert (clone / "results.tsv").read_text().startswith(HEADER)
    seen = execute(clone, f"RUNS = {str(tmp_path)!r}", "print(len(ledger) > 0, len(unread), found)")
    assert "Not checked: figures, seeds, harness and device, as the record on this machine has no run of these" in seen
    assert "Not checked: whether rows were changed or deleted by hand" in seen
    assert "nothing found" not in seen
    assert seen.splitlines()[-1] == "True 0 []"
    assert (clone / "progress.png").exists()
