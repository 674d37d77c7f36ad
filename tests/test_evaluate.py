"""`hpcl evaluate` and tasks as objectives: on the tiny run's checkpoint, real digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpcl.cli import app, main
from hpcl.config import Config
from hpcl.data import load
from hpcl.dist import current_world
from hpcl.downstream import tasks
from hpcl.downstream.bench import Bench
from hpcl.downstream.scores import OBJECTIVES, TASK_NAMES
from hpcl.errors import StorageError, UserError
from hpcl.evaluate import evaluate, rows_before
from hpcl.pretrained import load_network
from hpcl.search.params import Search
from hpcl.trainer import fit

Unbroken = tuple[Path, list[dict[str, Any]]]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of ``hpcl`` with these arguments."""
    monkeypatch.setattr("sys.argv", ["hpcl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_one_table_and_its_rows(
    unbroken: Unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "downstream.parquet"
    checkpoint = str(unbroken[0] / "checkpoint.pt")
    command = ["evaluate", checkpoint, "--tasks", "knn,fewshot,clusters,detection", "--seeds", "2", "--out", str(out)]
    assert run([*command, "--no-baselines"], monkeypatch) == 0
    said = capsys.readouterr().out
    assert "not measured:" in said and "data.novel_classes" in said and "--voc PATH" in said  # what they would need
    rows = rows_before(out)
    assert {row["task"] for row in rows} == {"knn", "clusters"} and {row["encoder"] for row in rows} == {"trained"}
    assert all(row["checkpoint"] == checkpoint and row["split"] == "test" and 0 <= row["seed"] < 2 for row in rows)
    (knn,) = (row["value"] for row in rows if row["task"] == "knn" and row["setting"].startswith("k = 200"))
    assert f"{knn:.3f}".removeprefix("0") in said  # once, as no seed has a say in it
    # called again it adds
    assert run([*command, "--no-baselines"], monkeypatch) == 0
    assert len(rows_before(out)) == 2 * len(rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "knn,lineal"], "--tasks names lineal, but must name some of knn, linear, fewshot"),
        (["--split", "train"], "--split is train, but must be val or test"),
        (["--tasks", "voc"], "none of the tasks could be measured (voc)"),
        (["--data", "no/such/folder"], "no/such/folder, which does not exist"),
        (["--tasks", "voc", "--voc", "no/such/folder"], "no/such/folder"),
    ],
)
def test_mistakes_end_with_2_and_say_what_to_do(
    arguments: list[str], words: str, unbroken: Unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ["evaluate", str(unbroken[0] / "checkpoint.pt"), *arguments, "--out", str(tmp_path / "out.parquet")]
    assert run(given, monkeypatch) == 2
    assert words in capsys.readouterr().err


def test_where_nothing_can_be_written_nothing_is_measured(unbroken: Unbroken, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    with pytest.raises(StorageError, match=r"file/out.parquet: cannot be written"):
        evaluate([unbroken[0] / "checkpoint.pt"], ["knn"], tmp_path / "file" / "out.parquet", say=said.append)
    assert not said


def test_what_is_named_twice_is_not_measured_twice(unbroken: Unbroken, tmp_path: Path) -> None:
    checkpoint = unbroken[0] / "checkpoint.pt"
    copy = tmp_path / "copy.pt"
    copy.write_bytes(checkpoint.read_bytes())
    with pytest.raises(UserError, match=r"copy.pt: is the same checkpoint as .*checkpoint.pt"):
        evaluate([checkpoint, copy], ["knn"], tmp_path / "out.parquet", seeds=1, baselines=False)
    rows, _ = evaluate(
        [checkpoint], ["knn", "knn"], tmp_path / "out.parquet", seeds=1, baselines=False, say=lambda _: None
    )
    assert len(rows) == 2


def test_images_that_changed_since_the_training_are_refused(unbroken: Unbroken, tmp_path: Path) -> None:
    state = torch.load(unbroken[0] / "checkpoint.pt", weights_only=True)
    state["data"]["hash"] = "0"
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"mnist5k: holds other images now than when .* say with --data"):
        evaluate([tmp_path / "checkpoint.pt"], ["knn"], tmp_path / "out.parquet", seeds=1)
    assert not (tmp_path / "out.parquet").exists()


def test_checkpoints_of_several_configurations_are_refused(unbroken: Unbroken, tiny: Config, tmp_path: Path) -> None:
    short = {f"stages.stage{s}.epochs": int(s == 1) for s in range(1, 6)}
    other = fit(tiny.with_values({**short, "moco.temperature": 0.3}), tmp_path / "other").folder
    with pytest.raises(UserError, match="has another configuration than"):
        evaluate([unbroken[0] / "checkpoint.pt", other / "checkpoint.pt"], ["knn"], tmp_path / "d.parquet")


def test_seeds_of_one_configuration_are_one_line(unbroken: Unbroken, tiny: Config, tmp_path: Path) -> None:
    """Two checkpoints that differ in their seed: both are `trained`, what they are compared with is measured once."""
    again = fit(tiny.with_values({"seed": 1}), tmp_path / "again").folder
    both = [unbroken[0] / "checkpoint.pt", again / "checkpoint.pt"]
    rows, _ = evaluate(both, ["knn"], tmp_path / "d.parquet", seeds=1, say=lambda text: None)
    first = [row["setting"] for row in rows if row["encoder"] == "trained"]
    assert len(first) == 2 * len(set(first)) and len({row["checkpoint"] for row in rows}) == 2
    for encoder in ("untrained", "pixels", "supervised"):
        assert sum(row["encoder"] == encoder for row in rows) == len(set(first))


# --- objectives of a search --------------------------------------------------------


def test_linear_at_val_is_the_probe_that_auto_measures(unbroken: Unbroken, tiny: Config, tmp_path: Path) -> None:
    found = fit(tiny, tmp_path / "run", objective="linear@val").rows[-1]["objective"]
    assert found == unbroken[1][-1]["objective"]


@pytest.mark.parametrize("name", ["knn@val", "linear@val", "clusters@val"])
def test_an_objective_does_not_look_at_test_images(name: str, unbroken: Unbroken) -> None:
    """Their pixels and labels are replaced by nonsense: the value stays (of tasks that train: test_finetune.py)."""
    config, network, _ = load_network(unbroken[0] / "checkpoint.pt")
    images = load(config.data)
    pixels, labels = images.images.copy(), np.array(images.labels)
    pixels[images.test] = 255 - pixels[images.test]
    labels[images.test] = 0
    spoilt = replace(images, images=pixels, labels=labels)
    state = torch.load(unbroken[0] / "checkpoint.pt", weights_only=True)
    values = [
        tasks.objective(name, Bench(config, network, each, current_world("cpu"), split="val", state=state))
        for each in (images, spoilt)
    ]
    assert values[0] is not None and 0 < values[0] <= 1 and values[0] == values[1]


def test_test_images_choose_nothing(unbroken: Unbroken) -> None:
    config, network, _ = load_network(unbroken[0] / "checkpoint.pt")
    bench = Bench(config, network, load(config.data), current_world("cpu"), split="test")
    with pytest.raises(ValueError, match="measured on val, never on test"):
        tasks.objective("linear@val", bench)
    with pytest.raises(
        ValueError, match="linear@test is measured on test images, which must not choose: make it linear@val"
    ):
        Search(objective="linear@test")


def test_every_task_can_be_asked_for_and_every_objective_is_a_task(unbroken: Unbroken) -> None:
    config, network, _ = load_network(unbroken[0] / "checkpoint.pt")
    bench = Bench(config, network, load(config.data), current_world("cpu"), split="val")
    for task in TASK_NAMES:
        reason = tasks.refusal(task, bench)
        assert reason is None or len(reason) > 20
    assert {name.partition("@")[0] for name in OBJECTIVES} < set(TASK_NAMES)
    assert tasks.objective_problem("linear@val", config, load(config.data)) is None
    told = tasks.objective_problem("fewshot@val", config, load(config.data))
    assert told is not None and told.startswith("search.objective is fewshot@val, but ")


def test_help_lists_the_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["evaluate", "--help"])
    assert "finetune" in capsys.readouterr().out
