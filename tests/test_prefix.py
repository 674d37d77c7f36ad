"""What runs share: which field acts from where, keys, and forks that equal unshared runs bit for bit."""

from __future__ import annotations

import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hpcl.checkpoint import load_checkpoint, save_checkpoint
from hpcl.config import ACTS_FROM, Config
from hpcl.errors import UserError
from hpcl.prefix import acts_from, code_version, prefix_content, prefix_differences, prefix_key
from hpcl.results import TIME_COLUMNS, read_rows
from hpcl.sections import Section
from hpcl.trainer import fit
from hpcl.validation import field_paths

Row = dict[str, Any]
ENVIRONMENT = {"data": "9f", "code": "1a", "ranks": 1, "device": "cpu", "dtype": "float32", "torch": "2.11"}
KEPT = ("pair", "queue", "optimizer", "growth", "hierarchy", "meters")
"""Parts of a checkpoint that the next epoch depends on."""


def other(config: Config, path: str) -> Any:
    """A valid value of the field that is not its own; the same at every call."""
    value = config.at(path)
    *sections, name = path.split(".")
    section = config.at(".".join(sections)) if sections else config
    assert isinstance(section, Section)
    tries: list[Any] = list(_literals(type(section).model_fields[name].annotation))
    if isinstance(value, bool):
        tries.append(not value)
    elif isinstance(value, int | float):
        tries += [value * 2, value / 2, value + 1, value + 0.25]
    elif isinstance(value, str):
        tries.append(value + "x")
    elif isinstance(value, tuple):
        tries += [value[1:], (value[0] * 0.9, value[1])]
    for candidate in [*tries, 16, 0.5, (3, 5)]:
        if candidate == value:
            continue
        try:
            config.with_values({path: candidate})
        except ValidationError:
            continue
        return candidate
    raise AssertionError(f"no other value found for {path}")


def _literals(annotation: Any) -> typing.Iterator[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
    for part in typing.get_args(annotation):
        yield from _literals(part)


def changed_after(config: Config, stage: int) -> Config:
    """The config with another value at every field that acts after this stage only."""
    paths = [path for path in field_paths(Config) if acts_from(path, config) > stage]
    return config.with_values({path: other(config, path) for path in paths})


# ---------------------------------------------------------------- from where a field acts


def test_every_field_has_a_declared_stage(tiny: Config) -> None:
    paths = list(field_paths(Config))
    assert len(paths) > 80
    for path in paths:
        assert acts_from(path, tiny) in (1, 2, 3, 4, 5), path
    for name in ACTS_FROM:
        assert any(path == name or path.startswith(f"{name}.") for path in paths), f"{name} is no field or section"
    with pytest.raises(KeyError):
        acts_from("clusters.frist", tiny)


def test_a_field_that_nobody_declared_is_found_out(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ACTS_FROM, "topk")
    with pytest.raises(KeyError, match=r"topk\.k"):
        acts_from("topk.k", tiny)


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, {"seed": 1, "clusters.backend": 1, "clusters.first": 2, "head.kind": 2, "growth.window": 3}),
        ({}, {"stages.stage4.lr": 4, "stages.stage1.epochs": 1, "stages.stage2.epochs": 2, "stages.stage5.epochs": 3}),
        ({"stages.stage3.epochs": 0}, {"growth.window": 5, "stages.stage4.epochs": 4, "stages.stage5.epochs": 5}),
        ({"growth.stages": (2, 5)}, {"growth.window": 2, "stages.stage5.epochs": 2, "stages.stage3.lr": 3}),
        ({"growth.stages": ()}, {"growth.window": 5, "growth.stages": 2, "stages.stage4.epochs": 4}),
        ({"stages.total": 12}, {"stages.stage5.epochs": 1, "stages.stage5.lr": 5, "stages.total": 1}),
    ],
)
def test_from_where_fields_act(tiny: Config, changes: dict[str, Any], stages: dict[str, int]) -> None:
    config = tiny.with_values(changes)
    assert {path: acts_from(path, config) for path in stages} == stages


# ---------------------------------------------------------------- content and key


def test_the_key_changes_with_what_acts_and_with_nothing_else(tiny: Config) -> None:
    keys = {stage: prefix_key(tiny, stage, ENVIRONMENT) for stage in range(1, 5)}
    assert len(set(keys.values())) == 4 and all(len(key) == 16 and int(key, 16) >= 0 for key in keys.values())
    for path in field_paths(Config):
        changed = tiny.with_values({path: other(tiny, path)})
        first = acts_from(path, tiny)
        if path == "growth.stages":  # declared as 2, the first it could name; here it is (5,) instead of (3, 5)
            first = 3
        for stage, key in keys.items():
            assert (prefix_key(changed, stage, ENVIRONMENT) != key) == (first <= stage), (path, stage)
    assert prefix_key(changed_after(tiny, 2), 2, ENVIRONMENT) == keys[2]


def test_the_key_changes_with_every_part_of_the_environment(tiny: Config) -> None:
    key = prefix_key(tiny, 1, ENVIRONMENT)
    assert prefix_key(tiny, 1, dict(reversed(ENVIRONMENT.items()))) == key
    changed = [{**ENVIRONMENT, name: "another"} for name in ENVIRONMENT] + [{**ENVIRONMENT, "more": 1}]
    assert len({key, *(prefix_key(tiny, 1, environment) for environment in changed)}) == len(changed) + 1


def test_content_has_lengths_as_trained_and_the_total_where_it_is_read(tiny: Config) -> None:
    scaled = tiny.with_values({"stages.total": 16})
    lengths = {f"stages.stage{s}.epochs": length for s, length in enumerate((2, 2, 6), 1)}
    assert prefix_content(scaled, 3).items() >= lengths.items()
    written = tiny.with_values({f"stages.stage{s}.epochs": n for s, n in enumerate((2, 2, 6, 2, 4), 1)})
    assert prefix_content(written, 3) == prefix_content(scaled, 3)

    assert "total_epochs" not in prefix_content(tiny, 2)
    assert prefix_content(tiny, 3)["total_epochs"] == 8
    assert prefix_content(tiny, 3)["growth.stages"] == [3] and prefix_content(tiny, 5)["growth.stages"] == [3, 5]
    quiet = tiny.with_values({"growth.stages": (5,)})
    assert not {"total_epochs", "growth.window"} & prefix_content(quiet, 4).keys()
    over = quiet.with_values({"stages.stage4.epochs": 0, "stages.stage5.epochs": 0})  # the run ends with stage 3
    assert prefix_differences(over, quiet, 3) == ["total_epochs (nothing instead of 5)"]

    skipped = tiny.with_values({"stages.stage2.epochs": 0})
    assert prefix_content(skipped, 2) == {**prefix_content(skipped, 1), "stages.stage2.epochs": 0}
    with pytest.raises(ValueError, match="stage is 6"):
        prefix_content(tiny, 6)


def test_the_code_version_is_that_of_the_learning_core(tmp_path: Path) -> None:
    names = ("losses.py", "downstream/knn.py", "cli.py", "search/plan.py", "presets/cifar.yaml")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1\n")
    version = code_version(tmp_path)
    changed = {}
    for name in names:
        (tmp_path / name).write_text("2\n")
        changed[name] = code_version(tmp_path) != version
        (tmp_path / name).write_text("1\n")
    assert [name for name in names if changed[name]] == ["losses.py", "downstream/knn.py"]
    (tmp_path / "losses.py").rename(tmp_path / "loss.py")
    assert code_version(tmp_path) != version
    assert len(code_version()) == 16 and code_version() == code_version()


def test_planning_needs_no_torch() -> None:
    code = "import sys, hpcl.prefix; print([n for n in ('torch', 'ray', 'numpy') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---------------------------------------------------------------- forks


class Family:
    """The tiny run trained alone, and its prefixes: each from another config and forked from the one before."""

    def __init__(self, tiny: Config, folder: Path) -> None:
        self.folder, self.rows = folder / "alone", fit(tiny, folder / "alone").rows
        self.prefixes: dict[int, Path] = {}
        self.prefix_rows: dict[int, list[Row]] = {}
        for stage in range(1, 5):
            config, home = changed_after(tiny, stage), folder / f"prefix{stage}"
            self.prefix_rows[stage] = fit(config, home, fork=self.prefixes.get(stage - 1), until_stage=stage).rows
            self.prefixes[stage] = home / "checkpoint.pt"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    from conftest import TINY

    return Family(Config.model_validate(TINY), tmp_path_factory.mktemp("family"))


def comparable(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k not in (*TIME_COLUMNS, "shared")} for row in rows]


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Bit-equal, in depth."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for name in ours:
            assert_same(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert ours == theirs, where


def assert_equals_alone(family: Family, folder: Path, rows: list[Row], shared: int) -> None:
    assert comparable(rows) == comparable(family.rows)
    assert [row["shared"] for row in rows] == [True] * shared + [False] * (8 - shared)
    assert [row["shared"] for row in read_rows(folder / "epochs.parquet")] == [row["shared"] for row in rows]
    ours, theirs = (load_checkpoint(home / "checkpoint.pt") for home in (folder, family.folder))
    for part in KEPT:
        assert_same(ours[part], theirs[part], part)


def test_prefixes_end_with_their_stage_and_mark_what_they_were_given(family: Family) -> None:
    for stage, length, shared in ((1, 1, 0), (2, 2, 1), (3, 5, 2), (4, 6, 5)):
        rows = family.prefix_rows[stage]
        assert comparable(rows) == comparable(family.rows[:length])
        assert {row["state"] for row in rows} == {"running"} and not any(row.get("objective") for row in rows)
        assert [row["shared"] for row in rows] == [True] * shared + [False] * (length - shared)
    assert not any(row["shared"] for row in family.rows)
    assert any(row.get("grew") for row in family.prefix_rows[3])


@pytest.mark.parametrize(("stage", "shared"), [(1, 1), (2, 2), (3, 5), (4, 6)])
def test_a_fork_equals_the_run_alone(family: Family, tiny: Config, tmp_path: Path, stage: int, shared: int) -> None:
    seen: list[Row] = []
    run = fit(tiny, tmp_path, fork=family.prefixes[stage], report=seen.append)
    assert_equals_alone(family, tmp_path, run.rows, shared)
    assert seen == run.rows[shared - 1 :]  # the last shared row first, as after a break
    text = (tmp_path / "log.txt").read_text()
    assert f"epochs 1 to {shared} are those of {family.prefixes[stage]}" in text


def test_the_prefix_of_stage_1_had_another_head(family: Family) -> None:
    theirs, ours = (load_checkpoint(path)["pair"] for path in (family.prefixes[1], family.folder / "checkpoint.pt"))
    assert theirs["query.mlp.0.weight"].shape != ours["query.mlp.0.weight"].shape


def test_runs_without_a_head_fork_from_one_with_it(family: Family, tiny: Config, tmp_path: Path) -> None:
    bare = {"head.kind": "none", "stages.stage2.epochs": 0, "stages.stage3.epochs": 1, "stages.stage4.epochs": 0}
    config = tiny.with_values({**bare, "stages.stage5.epochs": 0})
    forked = fit(config, tmp_path / "forked", fork=family.prefixes[1]).rows
    assert comparable(forked) == comparable(fit(config, tmp_path / "alone").rows)


def test_a_killed_fork_goes_on_from_its_own_checkpoint(family: Family, tiny: Config, tmp_path: Path) -> None:
    def kill_at(epoch: int) -> Any:
        def report(row: Row) -> None:
            if row["epoch"] == epoch:
                raise KeyboardInterrupt

        return report

    for epoch in (2, 4):  # at the shared row, then at an own one
        with pytest.raises(KeyboardInterrupt):
            fit(tiny, tmp_path, fork=family.prefixes[2] if epoch == 2 else tmp_path / "gone", report=kill_at(epoch))
        assert len(load_checkpoint(tmp_path / "checkpoint.pt")["rows"]) == epoch
    rows = fit(tiny, tmp_path, fork=tmp_path / "gone").rows
    assert_equals_alone(family, tmp_path, rows, shared=2)


def test_a_prefix_that_is_there_is_not_trained_again(family: Family, tiny: Config) -> None:
    before = family.prefixes[2].read_bytes()
    seen: list[Row] = []
    fit(changed_after(tiny, 2), family.prefixes[2].parent, until_stage=2, report=seen.append)
    assert seen == [family.prefix_rows[2][-1]]
    assert family.prefixes[2].read_bytes() == before


def test_a_cut_prefix_goes_on(family: Family, tiny: Config, tmp_path: Path) -> None:
    fit(tiny, tmp_path, until_stage=1)
    rows = fit(tiny, tmp_path, until_stage=2).rows
    assert comparable(rows) == comparable(family.rows[:2]) and [row["shared"] for row in rows] == [False, False]


@pytest.mark.parametrize(
    ("stage", "changes", "text"),
    [
        (1, {"seed": 1, "augment.flip": 0.5}, r"through stage 1 .*seed \(0 instead of 1\), augment.flip \(0.0 inst"),
        (2, {"clusters.first": 3}, r"through stage 2 with other values than this run's: clusters.first \(2 instead of"),
        (2, {"head.kind": "v1"}, r"head.kind \(\"v2\" instead of \"v1\"\); fork from"),
        (2, {"stages.stage1.epochs": 2}, r"stages.stage1.epochs \(1 instead of 2\)"),
        (3, {"growth.gamma": 2.0}, r"growth.gamma \(1.0 instead of 2.0\)"),
        (3, {"stages.stage5.epochs": 1}, r"total_epochs \(8 instead of 7\)"),
    ],
)
def test_another_prefix_is_refused(
    family: Family, tiny: Config, tmp_path: Path, stage: int, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text) as error:
        fit(tiny.with_values(changes), tmp_path, fork=family.prefixes[stage])
    assert str(family.prefixes[stage]) in str(error.value)
    assert not list(tmp_path.iterdir())


def test_other_images_or_backbones_are_refused(family: Family, tiny: Config, tmp_path: Path) -> None:
    state = load_checkpoint(family.prefixes[1])
    save_checkpoint(tmp_path / "images.pt", {**state, "data": {**state["data"], "hash": "another"}})
    with pytest.raises(UserError, match=r"was trained on other images than .* holds now; train the run from the start"):
        fit(tiny, tmp_path / "run", fork=tmp_path / "images.pt")
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 24))
    with pytest.raises(UserError, match="with the backbone convnet, this run has Sequential; give the same"):
        fit(tiny, tmp_path / "run", fork=family.prefixes[1], backbone=own)
    with pytest.raises(UserError, match=r"no\.pt: no such file"):
        fit(tiny, tmp_path / "run", fork=tmp_path / "no.pt")
    assert not (tmp_path / "run").exists()


def test_a_fork_and_a_prefix_leave_something_to_train(family: Family, tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already holds all 8 epochs of this run; fork from a shorter one"):
        fit(tiny, tmp_path, fork=family.folder / "checkpoint.pt")
    short = tiny.with_values({"stages.stage1.epochs": 0, "stages.stage5.epochs": 0})
    for stage, end in ((1, 0), (4, 5), (5, 5)):
        with pytest.raises(ValueError, match=rf"until_stage is {stage}, .*\(that would be after epoch {end} of 5\)"):
            fit(short, tmp_path, until_stage=stage)
    assert not list(tmp_path.iterdir())
