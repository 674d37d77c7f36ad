"""benchmarks/step.py: that it runs, and that what it compares is the same work."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--batch", "8", "--queue", "16", "--size", "8", "--steps", "1", "--repeats", "1", "--workers", "0"]
SMALL += ["--device", "cpu", "--threads", "1"]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("step")


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("lightly", "kornia", "psutil"))), reason="needs the extra `bench`"
)
def test_all_rows_are_measured_and_do_the_same_work(step: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(SMALL) == 0
    told = capsys.readouterr().out
    assert "126,496 trained parameters in both; InfoNCE of the same keys" in told
    rows = [line[:30].strip() for line in told.splitlines()]
    for row in ("networks alone", "hpcl, a step", "lightly, 0 workers", "hpcl / lightly, 0 workers"):
        assert rows.count(row) == 1
    assert rows.count("kornia") == rows.count("Pillow, one by one") == 2  # with and without blur


def test_without_the_peers_our_rows_remain_and_it_says_what_is_left_out(
    step: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    peers = ("lightly", "kornia", "psutil")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in peers else found(name))
    assert step.main(SMALL) == 0
    told = capsys.readouterr().out
    for peer in peers:
        assert f"left out: all rows that need {peer}; install it with: pip install 'hpcl[bench]'" in told
    rows = [line[:30].strip() for line in told.splitlines()]
    assert rows.count("hpcl, a step") == rows.count("networks alone") == 1 and "lightly, 0 workers" not in rows


def test_other_losses_or_networks_are_refused(step: ModuleType) -> None:
    pytest.importorskip("lightly", reason="needs the extra `bench`")
    options = step.options_of(SMALL)
    config = step.config_of(options)
    ours = step.Ours(config, step.images_of(options), torch.device("cpu"))
    theirs = step.lightly_step(ours, config, step.images_of(options), torch.device("cpu"))
    assert step.same_work(ours, theirs)
    theirs.criterion.temperature *= 1.1
    with pytest.raises(RuntimeError, match="the losses differ on the same keys"):
        step.same_work(ours, theirs)
    ours.parameters = ours.parameters[1:]
    with pytest.raises(RuntimeError, match="the networks differ: 125,632 and 126,496 trained parameters"):
        step.same_work(ours, theirs)


def test_mistakes_are_told_all_at_once(step: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--batch", "48", "--steps", "0", "--size", "4", "--workers", "-1"]) == 2
    told = capsys.readouterr().err
    assert "--steps is 0, but must be >= 1" in told and "--workers has -1, but must be >= 0" in told
    assert "--queue is 4096, but must be a multiple of --batch (48)" in told
    assert "a side is 4, but must be >= 8" in told
    assert step.main(["--batch", "0"]) == 2
    assert capsys.readouterr().err == "--batch is 0, but must be >= 2\n"
