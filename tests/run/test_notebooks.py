"""The notebooks run from a clean kernel, and lie in the repository without outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

SAID = {
    "compare_runs": ["rotation", "simclr"],
    "representation_quality": ["this backbone", "raw pixels", "random weights", "RankMe", "report.html report.json"],
    "write_a_task": ["Careless breaks 'randomness comes from draw'", "this backbone", "report.html"],
}
"""What the outputs of each must hold."""
IMAGES = {"compare_runs": 3, "representation_quality": 8, "write_a_task": 1}


def test_every_notebook_is_known() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(SAID)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_a_clean_kernel(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNLABELED_NOTEBOOK_TINY", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "\n".join(str(output.get("text", "")) + str(output.get("data", {})) for output in outputs)
    for overrides in SAID[path.stem]:
        assert overrides in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= IMAGES[path.stem]
