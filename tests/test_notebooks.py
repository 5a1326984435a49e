"""Each notebook runs from the top in a fresh kernel, without a hidden error; its form is sound."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import nb as tool  # noqa: E402

NOTEBOOKS = [p for folder in ("nbs", "tutorials") for p in sorted((ROOT / folder).rglob("*.ipynb"))]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(notebook: Path) -> None:
    assert not tool.faults(notebook)
    tool.execute(notebook, timeout=600)


@pytest.mark.parametrize("code, word", [
    ("import threading; t = threading.Thread(target=lambda: 1/0); t.start(); t.join()", "Exception in thread"),
    ("!false", "ended with 1"),
    ("1/0", "division by zero"),
    ("import ipywidgets\nout = ipywidgets.Output()\ndisplay(out)\nwith out: 1/0", "division by zero"),
])
def test_errors_that_notebooks_hide_are_found(tmp_path: Path, code: str, word: str) -> None:
    import nbformat
    path = tmp_path / "bad.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
    with pytest.raises(Exception, match=word): tool.execute(path, timeout=60)


def test_faults_of_form_are_found(tmp_path: Path) -> None:
    import nbformat
    cells = [nbformat.v4.new_code_cell("x = 1\n#| export\ny = 2"), nbformat.v4.new_code_cell("#| export\n%time 1"),
             nbformat.v4.new_code_cell("\n")]
    for cell in cells: cell.id = "twice"
    path = tmp_path / "bad.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    found = " / ".join(tool.faults(path))
    for word in ("repeated", "no kernelspec", "not at the top", "magic", "empty"): assert word in found
