"""analysis.ipynb runs from top to bottom on ledgers of every length."""

import shutil

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
ROWS = "a1b2c3d\t1.300000\t1.4\tkeep\tbaseline\nb2c3d4e\t1.290000\t1.4\tkeep\thigher rate\n"
ROWS += "c3d4e5f\t0.000000\t0.0\tcrash\twidth 10,000\nd4e5f6a\t1.310000\t1.4\tdiscard\tno value embeddings\n"


@pytest.mark.parametrize(
    ("ledger", "printed"), [(HEADER, "no experiments yet"), (HEADER + ROWS, "4 experiments: 2 keep")]
)
def test_the_notebook_runs_on_a_ledger(tmp_path, ledger, printed):
    shutil.copy(ROOT / "analysis.ipynb", tmp_path)
    (tmp_path / "results.tsv").write_text(ledger)
    notebook = nbformat.read(tmp_path / "analysis.ipynb", as_version=4)
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = "".join(str(output.get("text", "")) for cell in notebook.cells for output in cell.get("outputs", []))
    assert printed in outputs
    assert (tmp_path / "progress.png").exists() == (ledger != HEADER)


def test_the_shipped_ledger_has_the_documented_header():
    assert (ROOT / "results.tsv").read_text().startswith(HEADER)
