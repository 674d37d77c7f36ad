"""What docs/analysis.md shows in Python runs as it stands, on a recorded search."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8"), re.DOTALL)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS, ids=lambda text: text.split("\n")[0])
def test_a_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "import duckdb" in block:
        pytest.importorskip("duckdb", reason="duckdb is not installed")
    shutil.copytree(ROOT / "analysis" / "recorded" / "random", tmp_path / "results" / "mine")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    if "search" in names:
        assert names["search"].best is not None
