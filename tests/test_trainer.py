"""The training loop: exactness by seed, frozen stages, divergence, and all options in turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import NUM_IMAGES, timeless

from hpcl.checkpoint import load_checkpoint
from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.kmeans import size_bounds
from hpcl.results import EPOCH_COLUMNS, read_rows
from hpcl.step import Step
from hpcl.trainer import fit

GOLDEN = Path(__file__).parent / "golden" / "tiny.json"


def test_rows_tell_the_five_stages(unbroken: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = unbroken
    names = {column.name for column in EPOCH_COLUMNS}
    assert [row["stage"] for row in rows] == [1, 2, 3, 3, 3, 4, 5, 5]
    assert [row["state"] for row in rows] == ["running"] * 7 + ["finished"]
    for row in rows:
        assert set(row) <= names
        assert (row["clusters"] is None) == (row["stage"] == 1) == (row["acc_proto"] is None)
        for name in ("loss", "acc_inst", "acc_proto_ref", "proto_bits", "inst_ref", "nce_ref", "knn", "feature_std"):
            assert row[name] is not None, name
        if row["clusters"]:
            low, high = size_bounds(NUM_IMAGES, row["clusters"], 1 / 3)
            assert low <= row["size_min"] <= row["size_max"] <= high
    assert [row.get("objective") is not None for row in rows] == [False] * 7 + [True]
    grown = [row["clusters"] for row in rows if row.get("grew")]
    assert grown and all(row["growth_reason"].startswith("5") for row in rows if row.get("grew"))
    assert rows[-1]["clusters"] > rows[1]["clusters"]
    table = read_rows(folder / "epochs.parquet")
    assert [row["loss"] for row in table] == [row["loss"] for row in rows]
    assert {"config.yaml", "log.txt", "checkpoint.pt"} <= {path.name for path in folder.iterdir()}
    assert any(path.name.startswith("events.out.tfevents") for path in folder.iterdir())


def test_a_run_after_another_one_in_the_same_process_equals_it_alone(
    unbroken: tuple[Path, list[dict[str, Any]]], tiny: Config, tmp_path: Path
) -> None:
    fit(tiny.with_values({"seed": 7, "clusters.first": 5, "stages.total": 6}), tmp_path / "before")
    torch.rand(3)  # whatever state the global generator is in
    again = fit(tiny, tmp_path / "again")
    assert timeless(again.rows) == timeless(unbroken[1])
    weights = load_checkpoint(unbroken[0] / "checkpoint.pt")["pair"]
    for name, value in again.network.state_dict().items():
        assert torch.equal(value, weights[f"query.{name}"]), name


def test_another_seed_gives_another_run(
    unbroken: tuple[Path, list[dict[str, Any]]], tiny: Config, tmp_path: Path
) -> None:
    other = fit(tiny.with_values({"seed": 1, "stages.total": 5}), tmp_path)
    assert other.rows[0]["loss"] != unbroken[1][0]["loss"]


def test_the_encoder_is_bit_identical_over_stage_2(tiny: Config, tmp_path: Path) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}

    def keep(row: dict[str, Any]) -> None:
        states[row["epoch"]] = load_checkpoint(tmp_path / "checkpoint.pt")["pair"]

    fit(tiny, tmp_path, report=keep)
    for before, after in ((1, 2), (5, 6)):  # stage 2, stage 4
        for name, value in states[before].items():
            if ".mlp." not in name and not name.endswith("_extra_state"):
                assert torch.equal(value, states[after][name]), name
        assert not torch.equal(states[before]["query.mlp.0.weight"], states[after]["query.mlp.0.weight"])
    assert torch.equal(states[1]["query.mlp.0.weight"], states[1]["key.mlp.0.weight"])
    assert not torch.equal(states[2]["query.fc.weight"], states[3]["query.fc.weight"])


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(tiny: Config, tmp_path: Path) -> None:
    rows = fit(tiny.with_values({"stages.stage3.lr": 1e30}), tmp_path).rows
    assert rows[-1]["state"] == "diverged"
    assert rows[-1]["stage"] == 3
    assert rows[-1]["loss"] is None
    assert len(load_checkpoint(tmp_path / "checkpoint.pt")["rows"]) == len(rows) - 1


def test_features_that_are_not_finite_after_the_last_step_are_a_divergence(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, steps = Step.take, []

    def poisoned(step: Step, net: torch.nn.Module, *arguments: Any) -> torch.Tensor:
        sums = take(step, net, *arguments)
        steps.append(1)
        if len(steps) == 8 * (NUM_IMAGES // 64):  # the run's last step; its loss is finite
            torch.nn.init.constant_(next(net.parameters()), torch.inf)
        return sums

    monkeypatch.setattr(Step, "take", poisoned)
    last = fit(tiny, tmp_path).rows[-1]
    assert (last["epoch"], last["state"], last["loss"], last.get("objective")) == (8, "diverged", None, None)
    assert len(load_checkpoint(tmp_path / "checkpoint.pt")["rows"]) == 7


def test_settings_that_do_not_fit_the_data_are_all_named(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        fit(tiny.with_values({"optimizer.batch": 512, "moco.queue": 1024}), tmp_path)
    assert len(error.value.problems) == 2
    assert "moco.queue is 1024, but may be at most half of the 405 training images" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"prototypes.targets": "pcl", "topk.mode": "none", "growth.policy": "plateau"},
        {"prototypes.targets": "adjusted", "topk.mode": "add", "topk.far": "sum", "topk.weights": "softmax"},
        {"prototypes.max_in_loss": 2, "prototypes.negatives": 3, "topk.mode": "none"},
        {"head.kind": "v1", "head.attach": "replace", "growth.policy": "fixed", "growth.hold": 1},
        {"head.kind": "linear", "moco.symmetric": True, "moco.queue": 64},
        {"head.kind": "none", "stages.stage2.epochs": 0, "stages.stage4.epochs": 0},
        {"model.bn_splits": 4, "clusters.levels": 1, "clusters.warm": False},
        {"clusters.size_tolerance": None, "clusters.space": "embedding", "clusters.backend": "torch"},
        {"clusters.first": 30, "clusters.levels": 3, "clusters.maximum": 40, "augment.blur": 1.0},
        {"clusters.first": 300, "clusters.maximum": 1000, "growth.policy": "fixed", "growth.hold": 1},
        {"clusters.nesting": "tree", "moco.select": True, "prototypes.select": True, "head.kind": "multi"},
        {"clusters.counts": (3, 9), "density.shrink": 0.5, "density.parent": 0.5, "head.kind": "simclr2"},
        {"runtime.precision": "bf16", "model.bn_splits": 2, "meters.knn_every": 0, "stages.stage1.epochs": 0},
    ],
)
def test_every_option_trains(tiny: Config, tmp_path: Path, changes: dict[str, Any]) -> None:
    # all at once: some pairs are only valid together
    rows = fit(tiny.with_values({"stages.total": None, **changes}), tmp_path).rows
    assert rows[-1]["state"] == "finished"
    assert all(row["loss"] > 0 for row in rows)


def test_a_users_backbone(tiny: Config, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 24), torch.nn.ReLU())
    run = fit(tiny.with_values({"stages.total": 5}), tmp_path, backbone=module)
    assert run.network.feature_dim == 24
    assert run.rows[-1]["state"] == "finished"


def _dropping() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 24), torch.nn.Dropout(0.5))


def test_a_backbone_that_draws_is_a_function_of_the_seed(tiny: Config, tmp_path: Path) -> None:
    config = tiny.with_values({"stages.total": 5})
    whole = fit(config, tmp_path / "whole", backbone=_dropping).rows
    torch.rand(3)  # whatever state the global generator is in

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "resumed", backbone=_dropping, report=stop)
    assert timeless(fit(config, tmp_path / "resumed", backbone=_dropping).rows) == timeless(whole)


@pytest.mark.parametrize("objective", ["auto", None])
def test_unlabelled_images_train_without_what_needs_labels(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str | None
) -> None:
    monkeypatch.setenv("HPCL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(80):
        pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    values = {"data.source": str(tmp_path / "images"), "data.subset": 1.0, "data.size": 16, "stages.total": 5}
    config = tiny.with_values({**values, "optimizer.batch": 20, "moco.queue": 40})
    rows = fit(config, tmp_path / "run", objective=objective).rows
    assert rows[-1]["state"] == "finished"
    assert {(row["knn"], row.get("objective")) for row in rows} == {(None, None)}
    assert all(row["acc_proto_ref"] is not None for row in rows)


def test_the_golden_curve(unbroken: tuple[Path, list[dict[str, Any]]]) -> None:
    """Losses of the tiny run as stored (see CONTRIBUTING.md for when and how it is made anew)."""
    golden = json.loads(GOLDEN.read_text())
    for row, stored in zip(unbroken[1], golden, strict=True):
        for name, value in stored.items():
            assert row.get(name) == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name
