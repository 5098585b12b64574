"""The notebook runs from its first cell to its last, as the tour that it is, and is committed without outputs."""

import json

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "examples/quickstart.ipynb"


def test_it_is_committed_without_outputs_and_explains_every_cell():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds == ["markdown", "code"] * (len(cells) // 2)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


def test_it_runs():
    nbclient = pytest.importorskip("nbclient", reason="running the notebook needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="running the notebook needs nbclient and ipykernel")
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells[1].source += '\nRUN = Path("nowhere")'
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    text = [
        "".join(o.get("text", "") for o in cell.outputs if o.output_type == "stream")
        for cell in notebook.cells
        if "outputs" in cell
    ]
    pictures = [
        sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in notebook.cells if "outputs" in cell
    ]
    assert pictures == [0, 1, 0, 1, 0, 0, 0]
    losses = [float(line.split()[-1]) for line in text[2].splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "corners (" in text[4]
    assert "AP_R40, per cent: 4 frames" in text[5]
    assert "README.md" in text[6]
