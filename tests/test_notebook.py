"""examples/notebook.ipynb runs from top to bottom, without a network, and is kept without outputs."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples/notebook.ipynb"


def test_notebook(tmp_path, monkeypatch):
    for package in ("nbclient", "ipykernel", "timm", "sklearn", "matplotlib", "scipy"):
        pytest.importorskip(package)
    import nbclient
    import nbformat

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    results = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    texts = [output.data["text/plain"] for output in results if "data" in output]
    accuracies = [float(text) for text in texts if text.startswith("0.")]
    assert len(accuracies) == 3
    assert accuracies[0] < accuracies[1] == accuracies[2]
    assert any("image/png" in output.data for output in results if "data" in output)
    assert (tmp_path / "kat.safetensors").exists()
