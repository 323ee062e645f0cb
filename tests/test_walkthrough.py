"""The walkthrough runs from top to bottom as it is, its own assertions included."""

import os

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_it_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(os.path.join(ROOT, "walkthrough.ipynb"), as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells)
    assert text.count("<details>") == text.count("</details>") >= 4  # exercises, answers hidden
    assert "from model import" in text and "class CausalSelfAttention" not in text
    saved = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert any(output for output in saved)  # readable on the web without running it
    monkeypatch.setenv("PYTHONPATH", ROOT)  # as pip install -e; the folder may be any
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3",
                            resources=dict(metadata=dict(path=tmp_path))).execute()
