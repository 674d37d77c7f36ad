"""runtime.compile: the same run over all stages, interrupted or on two ranks, from checkpoints with the same names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import timeless
from test_ranks import Ranks

from hpcl.checkpoint import load_checkpoint
from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.trainer import fit

DOUBLE = {"runtime.precision": "fp64"}
"""Fused arithmetic then differs in the last bits alone, which 48 steps cannot make large."""


def test_a_machine_without_compiler_is_told(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "our-compiler")
    with pytest.raises(UserError, match=r"runtime\.compile is true, which needs our-compiler; install it"):
        fit(tiny.with_values({"runtime.compile": True}), tmp_path)


def assert_same(rows: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """All columns but times: numbers to a millionth, all else exactly."""
    assert len(rows) == len(wanted)
    for row, other in zip(timeless(rows), timeless(wanted), strict=True):
        assert row == {
            name: pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value
            for name, value in other.items()
        }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_compiled_run_equals_the_eager_one(tiny: Config, tmp_path: Path) -> None:
    eager, config = tiny.with_values(DOUBLE), tiny.with_values(DOUBLE | {"runtime.compile": True})
    rows = fit(eager, tmp_path / "eager").rows
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "compiled", report=stop)
    assert graphs["unique_graphs"] - before == 6  # query and key, in stages 1, 2 and 3
    assert_same(fit(config, tmp_path / "compiled").rows, rows)
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.pt")["pair"] for name in ("eager", "compiled"))
    assert one.keys() == other.keys()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_compiled_ranks_equal_two_eager_ones(tiny: Config, tmp_path: Path) -> None:
    ranks = Ranks(2, tmp_path)
    try:
        rows = ranks.train(tiny.with_values(DOUBLE), tmp_path / "eager")
        compiled = ranks.train(tiny.with_values(DOUBLE | {"runtime.compile": True}), tmp_path / "compiled")
    finally:
        ranks.end()
    assert_same(compiled, rows)
