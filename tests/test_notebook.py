"""The notebook runs from its first cell to its last, as the tour that it is, and is committed without outputs."""

import ast
import contextlib
import io
import json
import sys

from conftest import ROOT
from PIL import Image

NOTEBOOK = ROOT / "examples/quickstart.ipynb"


def test_it_is_committed_without_outputs_and_explains_every_cell():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds == ["markdown", "code"] * (len(cells) // 2)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


def run_cell(source, names):
    """Run a cell as a notebook does. Returns what it prints, and the value of its last line where that is one."""
    tree, value, printed = ast.parse(source), None, io.StringIO()
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        if last:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return printed.getvalue(), value


def test_it_runs(monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    first, *others = [
        "".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"
    ]
    names = {}
    ran = [run_cell(source, names) for source in (f'{first}\nRUN = Path("nowhere")', *others)]
    text, values = zip(*ran, strict=True)
    assert [isinstance(value, Image.Image) for value in values] == [False, True, False, True, False, False, False]
    losses = [float(line.split()[-1]) for line in text[2].splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "corners (" in text[4]
    assert "AP_R40, per cent: 4 frames" in text[5]
    assert "README.md" in text[6]
