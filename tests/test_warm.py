"""Finished trials of earlier results folders for a new search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcl.errors import UserError
from hpcl.search.space import Space, from_tree
from hpcl.search.tables import Tables
from hpcl.search.warm import Warm, read_warm
from hpcl.yamlio import read_tree, write

EARLIER = """
base: {preset: embedded}
space:
  clusters.multiplier: {float: [1.2, 6.0]}
  clusters.levels: {int: [1, 4]}
  growth.stages: {choice: [[3, 5], [5], [3]]}
  topk.mode: {choice: [replace, none]}
  topk.k: {int: [1, 5], when: {topk.mode: replace}}
"""
DEFAULT = {"clusters.multiplier": 1.7, "clusters.levels": 3, "growth.stages": (3, 5), "topk.mode": "replace"}


def make(text: str) -> Space:
    return from_tree(read_tree(text))


def earlier(folder: Path, *trials: dict[str, Any], text: str = EARLIER, **facts: Any) -> Path:
    """A results folder with one finished trial of metric 0.1, 0.2, ... for each of the values."""
    space = make(text)
    folder.mkdir()
    write(folder / "space.yaml", space.to_tree())
    tables = Tables(folder, space)
    for number, values in enumerate(trials):
        row = {"epoch": 1, "state": "finished", "acc_proto_ref": (number + 1) / 10, "seconds": 1.0}
        tables.begin(f"{number:04d}", number, values)
        tables.add(f"{number:04d}", row)
        tables.end(f"{number:04d}", "finished", "all 1 epochs trained")
    tables.write()
    if facts:
        (folder / "search.json").write_text(json.dumps(facts))
    return folder


def reasons(warm: Warm, folder: Path) -> list[str]:
    return [sentence.replace(str(folder), "FOLDER") for sentence in warm.skipped]


def test_trials_of_the_same_space_come_as_they_were_drawn(tmp_path: Path) -> None:
    without = {k: v for k, v in DEFAULT.items() if k != "topk.k"} | {"topk.mode": "none", "growth.stages": (5,)}
    folder = earlier(tmp_path / "a", {**DEFAULT, "topk.k": 4}, without)
    warm = read_warm([folder, folder / ".." / "a"], make(EARLIER))
    assert [point.values for point in warm.points] == [{**DEFAULT, "topk.k": 4}, without]
    assert [point.value for point in warm.points] == [0.1, 0.2]
    assert warm.points[1].source == str(folder / "trials" / "0001")
    assert warm.skipped == [] and warm.notes == []


def test_a_field_may_have_been_fixed_and_a_searched_one_may_be_fixed_now(tmp_path: Path) -> None:
    space = make(
        "base: {preset: embedded}\nspace: {moco.momentum: {choice: [0.9, 0.99]}, topk.mode: {choice: [replace, add]}}"
    )
    folder = earlier(
        tmp_path / "a",
        DEFAULT,
        {**DEFAULT, "clusters.levels": 2},
        {**DEFAULT, "clusters.levels": 1},
        {**DEFAULT, "growth.stages": (5,)},
        {**DEFAULT, "topk.mode": "none"},
    )
    warm = read_warm([folder], space)
    assert [point.values for point in warm.points] == [{"moco.momentum": 0.99, "topk.mode": "replace"}]
    assert reasons(warm, folder) == [
        "2 trials of FOLDER: clusters.levels 2, 1 are not what it is here (3; it is not searched)",
        "1 trial of FOLDER: growth.stages [5] is not what it is here ([3, 5]; it is not searched)",
        "1 trial of FOLDER: topk.mode none is none of replace, add",
    ]


def test_values_out_of_range_are_counted_by_reason(tmp_path: Path) -> None:
    space = make("""
base: {preset: embedded}
space:
  clusters.multiplier: {float: [1.2, 3.2], step: 0.5}
  clusters.levels: {int: [1, 3]}
  growth.stages: {choice: [[3, 5], [3]]}
  topk.mode: {choice: [replace, none]}
  topk.k: {int: [1, 5]}
""")
    base = {**DEFAULT, "topk.k": 3}
    folder = earlier(
        tmp_path / "a",
        {**base, "clusters.multiplier": 3.4},
        base,
        {**base, "clusters.multiplier": 3.21},
        {**base, "clusters.multiplier": 3.4},
        {**base, "clusters.multiplier": 3.5},
        {**base, "clusters.multiplier": 5.5},
        {**base, "clusters.multiplier": 1.71},
        {**base, "clusters.levels": 4},
        {**base, "growth.stages": (5,)},
        {**base, "clusters.multiplier": 3.2},
    )
    warm = read_warm([folder], space)
    assert [point.value for point in warm.points] == [0.2, 1.0]
    assert warm.points[1].values == {**base, "clusters.multiplier": 3.2}
    assert reasons(warm, folder) == [
        "5 trials of FOLDER: clusters.multiplier 3.4, 3.21, 3.5 and 1 more are outside of [1.2, 3.2]",
        "1 trial of FOLDER: clusters.multiplier 1.71 is between the steps of 0.5 in [1.2, 3.2]",
        "1 trial of FOLDER: clusters.levels 4 is outside of [1, 3]",
        "1 trial of FOLDER: growth.stages [5] is none of [3, 5], [3]",
    ]


def test_a_field_that_is_not_active_here_must_be_the_bases(tmp_path: Path) -> None:
    free = EARLIER.replace(", when: {topk.mode: replace}", "")
    folder = earlier(
        tmp_path / "a",
        {**DEFAULT, "topk.mode": "none", "topk.k": 3},
        {**DEFAULT, "topk.mode": "none", "topk.k": 5},
        {**DEFAULT, "topk.k": 5},
        text=free,
    )
    warm = read_warm([folder], make(EARLIER))
    assert [point.values for point in warm.points] == [{**DEFAULT, "topk.mode": "none"}, {**DEFAULT, "topk.k": 5}]
    assert reasons(warm, folder) == ["1 trial of FOLDER: topk.k 5 is not what it is here (3; it is not sampled)"]


def test_unfinished_trials_and_missing_values_are_left_out(tmp_path: Path) -> None:
    folder, space = tmp_path / "a", make(EARLIER)
    folder.mkdir()
    write(folder / "space.yaml", space.to_tree())
    tables = Tables(folder, space)
    for number, state in enumerate(["stopped", "finished", "failed", "stopped", "running", "finished"]):
        trial = f"{number:04d}"
        tables.begin(trial, number, DEFAULT)
        tables.add(trial, {"epoch": 1, "state": "running", "acc_proto_ref": 0.5 if number < 5 else None})
        if state != "running":
            tables.end(trial, state, "so")
    tables.write()
    warm = read_warm([folder], space)
    assert [point.source for point in warm.points] == [str(folder / "trials" / "0001")]
    assert reasons(warm, folder) == [
        "4 trials of FOLDER: not finished (2 stopped, 1 failed, 1 running)",
        "1 trial of FOLDER: acc_proto_ref null is no number",
    ]


def test_another_base_or_metric_leaves_all_out(tmp_path: Path) -> None:
    folder = earlier(tmp_path / "a", DEFAULT, DEFAULT)
    changed = EARLIER.replace("embedded", "embedded, seed: 7, runtime: {threads: 1}, augment: {flip: 0.3, hue: 0.2}")
    warm = read_warm([folder], make(changed + "search: {metric: nce_ref}"))
    assert warm.points == []
    assert reasons(warm, folder) == [
        "2 trials of FOLDER: search.metric is acc_proto_ref there, but nce_ref here; "
        "augment.flip is 0.0 there, but 0.3 here; augment.hue is 0.0 there, but 0.2 here"
    ]
    assert len(read_warm([folder], make(changed.replace(", augment: {flip: 0.3, hue: 0.2}", ""))).points) == 2
    more = EARLIER.replace("embedded", "embedded, augment: {flip: 0.3, hue: 0.2, gray: 0.1, blur: 0.5}")
    assert read_warm([folder], make(more)).skipped[0].endswith("; and 1 more")


def test_images_are_compared_by_hash_or_taken_on_trust(tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    here = EARLIER.replace("embedded", f"embedded, data: {{source: {source}}}")
    known = earlier(tmp_path / "known", DEFAULT, text=here, data_hash="abc", backbone="convnet")
    unknown = earlier(tmp_path / "unknown", DEFAULT, text=here)
    moved = earlier(tmp_path / "moved", DEFAULT, data_hash="abc")
    warm = read_warm([known, unknown, moved], make(here), data_hash="abc")
    assert [Path(point.source).parts[-3] for point in warm.points] == ["known", "unknown", "moved"]
    assert len(warm.notes) == 1 and "unknown: that its images are the same as now is taken on trust" in warm.notes[0]
    warm = read_warm([known, unknown, moved], make(here), data_hash="xyz")
    assert [Path(point.source).parts[-3] for point in warm.points] == ["unknown"]
    assert reasons(warm, known)[0] == "1 trial of FOLDER: the images are others (their hash differs)"
    warm = read_warm([known, moved], make(here))
    assert [Path(point.source).parts[-3] for point in warm.points] == ["known"]
    assert reasons(warm, moved) == [f"1 trial of FOLDER: data.source is mnist5k there, but {source} here"]


def test_a_backbone_of_ones_own_is_another_backbone(tmp_path: Path) -> None:
    own = earlier(tmp_path / "own", DEFAULT, backbone="MyNet")
    known = earlier(tmp_path / "known", DEFAULT, backbone="convnet")
    here = make(EARLIER)
    assert [Path(p.source).parts[-3] for p in read_warm([own, known], here).points] == ["known"]
    assert [Path(p.source).parts[-3] for p in read_warm([own, known], here, backbone="MyNet").points] == ["own"]
    assert reasons(read_warm([own], here), own) == ["1 trial of FOLDER: the backbone is MyNet, but convnet here"]


def test_all_bad_folders_are_named_at_once(tmp_path: Path) -> None:
    good = earlier(tmp_path / "good", DEFAULT)
    (tmp_path / "empty").mkdir()
    broken = earlier(tmp_path / "broken", DEFAULT)
    (broken / "trials.parquet").write_text("what")
    other = earlier(tmp_path / "other", DEFAULT)
    write(
        other / "space.yaml", make("base: {preset: embedded}\nspace: {moco.momentum: {float: [0.9, 0.99]}}").to_tree()
    )
    names = ["missing", "good", "empty", "broken", "other"]
    with pytest.raises(UserError) as caught:
        read_warm([tmp_path / name for name in names], make(EARLIER))
    missing, empty, damaged, odd = caught.value.problems
    assert missing.startswith(f"--warm-from {tmp_path}/missing: {tmp_path}/missing is missing; give the folder of a")
    assert f"{tmp_path}/empty/space.yaml is missing" in empty
    assert "broken/trials.parquet is damaged" in damaged and "leave the folder out" in damaged
    assert "other/trials.parquet is damaged" in odd and "config.moco.momentum" in odd
    assert len(read_warm([good], make(EARLIER)).points) == 1


def test_what_is_read_can_be_added_to_a_study(tmp_path: Path) -> None:
    from hpcl.search.sampler import Sampler

    folder = earlier(tmp_path / "a", {**DEFAULT, "topk.k": 4}, {**DEFAULT, "topk.mode": "none", "growth.stages": (3,)})
    space = make(EARLIER)
    sampler = Sampler(space, startup=2)
    assert sampler.add_finished(read_warm([folder], space).points) == 2
    assert [trial.value for trial in sampler.study.trials] == [0.1, 0.2]
    assert sampler.study.best_trial.params["growth.stages"] == "[3]"
    assert "topk.k" not in sampler.study.best_trial.params
