"""The notebooks run from top to bottom on the searches recorded beside them, and are kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ANALYSIS = Path(__file__).parent.parent / "analysis"
NOTEBOOKS = sorted(path.stem for path in ANALYSIS.glob("*.ipynb"))


def test_the_three_are_there_and_stripped() -> None:
    assert NOTEBOOKS == ["audit", "compare", "explore"]
    for name in NOTEBOOKS:
        for cell in json.loads((ANALYSIS / f"{name}.ipynb").read_text())["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str) -> None:
    client = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ANALYSIS / f"{name}.ipynb", as_version=4)
    beside = {"metadata": {"path": str(ANALYSIS)}}
    ran = client.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=beside).execute()
    charts = shown = 0
    for cell in ran.cells:
        for output in cell.get("outputs", []):
            kinds: dict[str, Any] = output.get("data", {})
            charts += "image/svg+xml" in kinds
            shown += output["output_type"] == "stream" and output["name"] == "stdout" and bool(output["text"].strip())
            assert not (output["output_type"] == "stream" and output["name"] == "stderr"), output["text"]
    assert charts >= 2 and shown >= 1
