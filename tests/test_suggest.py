"""The space to search next: edges, fields that do not matter, conditions, and that it always loads and is planned."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from landscapes import drawn, space_of_text, write_landscape

from hpcl.analysis import suggest
from hpcl.analysis.edges import extended, narrowed, position, value_at
from hpcl.analysis.ranges import Seen, look
from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.results import load_search
from hpcl.results.fields import Field
from hpcl.search import cli, space
from hpcl.search.params import Choice, Float, Int
from hpcl.search.plan import Node, make_plan
from hpcl.search.space import Space

SHIPPED = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))
SPACE = space_of_text(
    """
    base: {preset: embedded}
    space:
      topk.mode: {choice: [replace, add, none]}
      topk.margin: {float: [0.5, 2.0], when: {topk.mode: [replace, add]}}
      moco.temperature: {float: [0.05, 0.5], log: true}
      prototypes.weight: {float: [0.1, 3.0], log: true}
    """
)


def change(made: suggest.Suggestion, path: str) -> suggest.Change:
    return next(each for each in made.changes if each.path == path)


def suggested(
    tmp_path: Path, of: Space, objective: Callable[[dict[str, Any]], float], trials: int = 60, seed: int = 0
) -> suggest.Suggestion:
    """What is suggested, after it was written, loaded and planned."""
    rng = np.random.default_rng(seed)
    points = drawn(of, trials, seed)
    values = [objective(point) + 1e-4 * rng.standard_normal() for point in points]
    made = suggest.suggest(write_landscape(tmp_path / "a", of, values, points=points))
    loads(tmp_path, made)
    return made


def loads(tmp_path: Path, made: suggest.Suggestion) -> Space:
    """The suggested space as its file gives it back, planned as `--dry-run` does."""
    file = tmp_path / "next.yaml"
    suggest.write(file, made.space.to_tree(), suggest.header(made))
    again = space.load(file)
    assert again == made.space
    make_plan(again, [Node(cpus=4.0)], cluster="this machine", folder=tmp_path / "results")
    return again


# ---------------------------------------------------------------- verdicts


def test_objectives_that_pile_up_at_an_edge_extend_the_range_there(tmp_path: Path) -> None:
    made = suggested(tmp_path, SPACE, lambda values: -math.log(values["moco.temperature"]))
    temperature = change(made, "moco.temperature")
    assert temperature.seen.edges == ("low",)
    assert temperature.why == "best at its low edge"
    param = made.space.params["moco.temperature"]
    assert isinstance(param, Float) and param.log
    assert param.low == pytest.approx(0.05 * 10**-0.5, rel=0.01)  # half of the range, on its own scale
    assert param.high < 0.5  # it matters, so the bad side is left
    assert "in the lowest tenth" in temperature.seen.text()


def test_an_extension_ends_where_the_configuration_does(tmp_path: Path) -> None:
    of = space_of_text(
        "{base: {preset: embedded}, space: {augment.jitter: {float: [0.2, 0.9]}, head.hidden: {int: [2, 64]}}}"
    )
    made = suggested(tmp_path, of, lambda values: values["augment.jitter"] - 0.1 * values["head.hidden"] / 64)
    jitter, hidden = made.space.params["augment.jitter"], change(made, "head.hidden")
    assert isinstance(jitter, Float) and jitter.high == 1.0
    made = suggested(tmp_path, of, lambda values: -float(values["head.hidden"]))
    hidden = change(made, "head.hidden")
    assert hidden.seen.edges == ("low",) and "allows nothing beyond its low end" in hidden.why
    param = made.space.params["head.hidden"]
    assert isinstance(param, Int) and param.low == 2 and param.high < 64


def test_a_field_without_an_effect_is_fixed_at_the_former_base_s_value(tmp_path: Path) -> None:
    made = suggested(tmp_path, SPACE, lambda values: -((math.log(values["moco.temperature"]) + 1.8) ** 2), trials=120)
    weight = change(made, "prototypes.weight")
    assert weight.seen.verdict == "no effect" and weight.seen.power > 0.8
    assert weight.why == "no effect seen" and "by chance" in weight.seen.text()
    assert "prototypes.weight" not in made.space.params
    assert made.best is not None
    # Not one lucky trial's: nothing says that it is better.
    assert made.space.base.at("prototypes.weight") == SPACE.base.at("prototypes.weight")
    assert made.best.values["prototypes.weight"] != SPACE.base.at("prototypes.weight")
    assert weight.after == "fixed at 1.0"
    notes = "\n".join(made.notes)
    assert "fixed at the value of the former base" in notes and "12.5% of the ranks" in notes
    assert "so trial 0 of the next search is that but for the 2 fields without an effect" in notes
    temperature = made.space.params["moco.temperature"]
    assert isinstance(temperature, Float) and 0.05 < temperature.low < math.exp(-1.8) < temperature.high < 0.5
    assert change(made, "moco.temperature").why == "matters"
    assert made.space.default_point() == {
        path: made.best.values[path] for path in made.space.params if path in made.best.values
    }


def test_too_few_trials_change_nothing_and_that_is_said(tmp_path: Path) -> None:
    made = suggested(tmp_path, SPACE, lambda values: -values["moco.temperature"], trials=7)
    assert not any(each.changed for each in made.changes)
    assert made.space.params == SPACE.params and made.space.base == SPACE.base
    assert "7 trials finished, 8 are needed" in made.notes[0]
    one = suggest.suggest(write_landscape(tmp_path / "one", SPACE, lambda values: 0.5, trials=1))
    assert "1 trial finished, 8 are needed" in one.notes[0]
    assert suggest.header(one).startswith("The space to search after one, by 1 finished trial of 1.\n")
    assert made.space.search.seed == SPACE.search.seed + 1
    made = suggested(tmp_path, SPACE, lambda values: math.sin(99 * values["moco.temperature"]), trials=12)
    assert change(made, "prototypes.weight").why == "too few trials to tell"
    assert "is seen from about 71 finished trials on" in "\n".join(made.notes)
    assert change(made, "prototypes.weight").after == change(made, "prototypes.weight").before


def test_clearly_worse_choices_are_dropped_and_children_that_cannot_act_with_them(tmp_path: Path) -> None:
    made = suggested(tmp_path, SPACE, lambda values: {"replace": 0.0, "add": 1.0, "none": 1.0}[values["topk.mode"]])
    mode = made.space.params["topk.mode"]
    assert isinstance(mode, Choice) and set(mode.choices) == {"add", "none"}
    assert "replace clearly worse" in change(made, "topk.mode").why
    if "topk.margin" in made.space.params:
        assert made.space.params["topk.margin"].when == {"topk.mode": ("add",)}
    made = suggested(tmp_path, SPACE, lambda values: float(values["topk.mode"] == "none"))
    assert "topk.mode" not in made.space.params and "topk.margin" not in made.space.params
    assert made.space.base.at("topk.mode") == "none"


def test_a_field_on_which_others_depend_is_not_fixed_where_these_could_not_act(tmp_path: Path) -> None:
    of = space_of_text(
        """
        base: {preset: embedded, topk: {mode: none}}
        space:
          topk.mode: {choice: [replace, none]}
          topk.margin: {float: [0.5, 2.0], when: {topk.mode: [replace]}}
        """
    )
    # By itself the mode makes no difference, but within one the margin does.
    made = suggested(tmp_path, of, lambda values: values.get("topk.margin", 1.25), trials=120, seed=4)
    mode = change(made, "topk.mode")
    assert mode.seen.verdict == "no effect" and mode.why == "no effect seen; kept, as fields depend on it"
    assert set(made.space.params) == {"topk.mode", "topk.margin"}


def test_conditions_of_a_fixed_parent_are_resolved(tmp_path: Path) -> None:
    # Only the mode `none` is bad, so that margin stays searched with nothing that it depends on.
    of = space_of_text(
        """
        base: {preset: embedded}
        space:
          topk.mode: {choice: [replace, none]}
          topk.margin: {float: [0.5, 2.0], when: {topk.mode: [replace]}}
        """
    )
    made = suggested(tmp_path, of, lambda values: 1 - (values.get("topk.margin", 9) - 1.0) ** 2, trials=80)
    assert made.space.base.at("topk.mode") == "replace"
    assert made.space.params["topk.margin"].when == {}


def test_something_is_always_searched(tmp_path: Path) -> None:
    seen = {path: Seen(path, 120, 30, effect=0.0, p_effect=0.9, chance=0.02, power=0.96) for path in SPACE.params}
    made, changes = suggest._next(SPACE, seen, SPACE.default_point(), set())
    assert list(made.params) == ["topk.mode"]
    assert [each.why for each in changes] == [
        "no effect seen; kept, as something must be searched",
        *["no effect seen"] * 3,
    ]
    # Also where what is not fixed could no longer act.
    seen["topk.margin"] = Seen("topk.margin", 20, 5)
    seen["topk.mode"] = Seen("topk.mode", 120, 30, p_corrected=0.001, worse=("replace", "add"))
    made, changes = suggest._next(SPACE, seen, {**SPACE.default_point(), "topk.mode": "none"}, set())
    assert list(made.params) == ["moco.temperature"]
    assert made.base.at("topk.mode") == "none"


def test_what_the_configuration_refuses_is_left_as_it_was(tmp_path: Path) -> None:
    # A queue must be a multiple of the batch: narrowing and extending a choice-like int by step keeps to it.
    of = space_of_text(
        "{base: {preset: embedded}, space: {moco.queue: {int: [256, 1024], step: 128}, topk.k: {int: [1, 5]}}}"
    )
    made = suggested(tmp_path, of, lambda values: float(values["moco.queue"]))
    queue = made.space.params["moco.queue"]
    assert isinstance(queue, Int) and queue.step == 128 and queue.high > 1024
    assert (queue.high - queue.low) % 128 == 0


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_follow_ups_of_every_shipped_space_load_and_are_planned(file: Path, tmp_path: Path) -> None:
    shipped = space.load(file)
    rng = np.random.default_rng(7)
    for seed in range(1 if len(shipped.params) > 8 else 2):
        # Random trends: something is at an edge, something does not matter.
        slopes = {path: rng.normal() * rng.integers(0, 2) for path in shipped.params}
        objective = _trend(shipped, slopes)
        made = suggested(tmp_path, shipped, objective, trials=int(rng.integers(6, 70)), seed=seed)
        assert made.space.params.keys() <= shipped.params.keys()
        assert made.space.search.trials == shipped.search.trials
        for each in made.changes:
            assert each.after and each.why and each.seen.text()


def _trend(of: Space, slopes: dict[str, float]) -> Callable[[dict[str, Any]], float]:
    def objective(values: dict[str, Any]) -> float:
        total = 0.0
        for path, value in values.items():
            param = of.params[path]
            place = param.choices.index(value) if isinstance(param, Choice) else position(param, float(value))
            total += slopes[path] * place
        return total

    return objective


def test_follow_ups_of_follow_ups_load(tmp_path: Path) -> None:
    of = SPACE
    for generation in range(3):
        made = suggested(tmp_path, of, lambda values: -math.log(values["moco.temperature"]), seed=generation)
        of = made.space
        assert of.name == f"search-{generation + 2}"
    assert of.params["moco.temperature"].low < 0.01  # type: ignore[union-attr]


# ---------------------------------------------------------------- ranges


@pytest.mark.parametrize("trials", [36, 60, 72, 120])
def test_fields_that_explain_a_tenth_each_are_rarely_fixed_and_those_without_effect_are_after_many_trials(
    trials: int,
) -> None:
    """5 of 10 fields explain 10 % each, the rest is luck. Of 50, 50, 250 and 250 such, 0, 0, 6 and 0.4 % were fixed."""
    field = Field("x", "float", 0.0, 1.0)
    fixed: dict[bool, list[bool]] = {True: [], False: []}
    for seed in range(10 if trials > 60 else 2):
        rng = np.random.default_rng([seed, trials])
        places = rng.random((trials, 10))
        good = (places[:, :5] - 0.5).sum(axis=1) * math.sqrt(1.2) + math.sqrt(0.5) * rng.standard_normal(trials)
        for i in (0, 1, 2, 5, 6, 7):
            seen = look(field, pd.Series(places[:, i]), good, fields=10)
            fixed[i < 5].append(seen.verdict == "no effect")
    assert np.mean(fixed[True]) <= 0.1
    assert np.mean(fixed[False]) >= (0.45 if trials > 60 else 0)


def test_values_without_a_place_on_the_scale_are_left_out_and_that_is_said() -> None:
    field = Field("x", "float", 1e-6, 1e-2, log=True)
    rng = np.random.default_rng(0)
    values = np.append(0.0, 10 ** rng.uniform(-6, -2, 35))
    seen = look(field, pd.Series(values), rng.standard_normal(36), fields=3)
    assert (seen.n, seen.no_place) == (35, 1)
    assert seen.text().startswith("n = 35 (and 1 without a place in the range): explains ")
    assert all(math.isfinite(end) for end in seen.span)
    one = look(field, pd.Series([0.0] * 10 + [1e-4] * 10), rng.standard_normal(20), fields=3)
    assert "one value in all that have a place" in one.text()
    none = look(field, pd.Series([0.0] * 10), rng.standard_normal(10), fields=3)
    assert none.verdict == "few" and "one value" not in none.text()


def test_a_field_that_matters_is_rarely_missed_and_noise_rarely_matters() -> None:
    field = Field("x", "float", 0.0, 1.0)
    verdicts: dict[str, list[str]] = {"noise": [], "trend": [], "hump": []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        places = rng.random(40)
        noise = rng.standard_normal(40)
        for name, signal in (("noise", 0.0), ("trend", places), ("hump", -((places - 0.5) ** 2) * 4)):
            good = 4 * signal + noise
            verdicts[name].append(look(field, pd.Series(places), np.asarray(good), fields=8).verdict)
    assert sum(v in ("matters", "edge") for v in verdicts["noise"]) <= 2
    assert "no effect" not in verdicts["noise"] + verdicts["trend"] + verdicts["hump"]  # 40 trials are too few
    assert sum(v == "edge" for v in verdicts["trend"]) >= 12
    assert sum(v == "matters" for v in verdicts["hump"]) >= 7


def test_an_end_of_few_whole_numbers_is_expected_as_often_as_it_is_drawn() -> None:
    few = Field("x", "int", 1.0, 3.0)
    values = pd.Series([3.0] * 8 + [1.0] * 8)
    seen = look(few, values, np.arange(16.0)[::-1], fields=1)
    assert (seen.at_low, seen.at_high, seen.good) == (0, 4, 4)
    assert seen.p_high == pytest.approx(2 * (1 / 3) ** 4)
    many = look(Field("x", "int", 1.0, 64.0, log=True), pd.Series([64.0] * 16), np.arange(16.0), fields=1)
    share = math.log(64.5 / 42.5) / math.log(64.5 / 0.5)  # 43 is the first within the last tenth of the logarithm
    assert many.p_high == pytest.approx(2 * share**4)
    assert math.isnan(many.effect) and "one value in all of them" in many.text()


def test_narrowed_ranges_hold_the_good_trials_and_are_never_too_narrow() -> None:
    linear, log = Float(low=0.0, high=1.0), Float(low=0.01, high=1.0, log=True)
    assert narrowed(linear, (0.4, 0.6)) == Float(low=0.3, high=0.7)
    assert narrowed(linear, (0.5, 0.5)) == Float(low=0.37, high=0.63)
    assert narrowed(linear, (0.0, 0.02)) == Float(low=0.0, high=0.25)
    assert narrowed(linear, (0.02, 0.95)) == linear
    assert narrowed(linear, (0.4, 0.6), best=0.9) == Float(low=0.3, high=1.0)
    made = narrowed(log, (0.4, 0.6))
    assert (made.low, made.high) == pytest.approx((0.0398, 0.252), rel=0.01)
    assert narrowed(Int(low=1, high=3), (0.5, 0.5)) == Int(low=1, high=3)
    assert narrowed(Int(low=0, high=100), (0.5, 0.5)) == Int(low=37, high=63)
    assert narrowed(Int(low=0, high=100, step=10), (0.5, 0.5)) == Int(low=30, high=70, step=10)
    assert narrowed(Float(low=0.0, high=1.0, step=0.1), (0.5, 0.55)).high == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("param", "path", "edge", "expected"),
    [
        (Float(low=0.5, high=3.5), "topk.margin", "high", 4.0),  # at most 4
        (Float(low=1.5, high=3.0), "clusters.multiplier", "low", 1.01),  # above 1: kept clear of
        (Float(low=0.1, high=1.0), "clusters.size_tolerance", "high", 1.0),  # at its bound
        (Float(low=0.1, high=1.0, log=True), "topk.far_weight", "high", 3.16),
        (Int(low=1, high=4), "clusters.levels", "high", 6),
        (Int(low=1, high=7), "clusters.levels", "high", 8),
        (Int(low=2, high=32, log=True), "clusters.first", "low", 1),
        (Float(low=-0.05, high=0.2), "growth.theta_end", "low", -0.175),
        (Float(low=0.2, high=0.8, step=0.2), "augment.jitter", "high", 1.0),
    ],
)
def test_extended_ranges(param: Float | Int, path: str, edge: str, expected: float) -> None:
    p = {"p_low": 0.001} if edge == "low" else {"p_high": 0.001}
    made, text = extended(param, Seen(path, 40, 10, **p), None, Config(), path)  # type: ignore[arg-type]
    assert (made.low if edge == "low" else made.high) == pytest.approx(expected)
    assert bool(text) == (expected in (param.low, param.high))
    assert (made.high if edge == "low" else made.low) == (param.high if edge == "low" else param.low)


def test_positions_and_values_are_inverse() -> None:
    for param in (Float(low=0.01, high=1.0, log=True), Float(low=-1.0, high=3.0), Int(low=2, high=64, log=True)):
        for place in (-0.5, 0.0, 0.3, 1.0, 1.5):
            assert position(param, value_at(param, place)) == pytest.approx(place)


# ---------------------------------------------------------------- command


def test_the_command_writes_a_space_that_the_search_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_landscape(tmp_path / "a", SPACE, lambda values: -math.log(values["moco.temperature"]), trials=60)
    suggest.main(tmp_path / "a", None)
    printed = capsys.readouterr().out
    assert "best at its low edge" in printed and "python run_search.py --space" in printed
    file = tmp_path / "a" / "follow-up.yaml"
    text = file.read_text()
    assert text.startswith("# The space to search after a, by 60 finished trials of 60.")
    assert "# moco.temperature" in text and "best at its low edge" in text
    assert cli.main(["--space", str(file), "--results", str(tmp_path / "results"), "--dry-run"]) == 0
    assert "moco.temperature" in capsys.readouterr().out
    suggest.main(tmp_path / "a", None)  # its own file is written again
    file.write_text("name: mine\n")
    with pytest.raises(UserError, match="give another --out"):
        suggest.main(tmp_path / "a", None)
    assert file.read_text() == "name: mine\n"
    suggest.main(tmp_path / "a", tmp_path / "other.yaml")
    space.load(tmp_path / "other.yaml")


def test_names_that_hold_a_line_s_end_forge_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a\nforged: line"
    write_landscape(folder, SPACE, lambda values: -math.log(values["moco.temperature"]), trials=12)
    suggest.main(folder, None)
    text = capsys.readouterr().out + (folder / "follow-up.yaml").read_text()
    assert "a forged: line" in text
    assert not any(line.startswith(("forged", "# forged")) for line in text.splitlines())
    (folder / "space.yaml").unlink()
    with pytest.raises(UserError) as error:
        suggest.suggest(load_search(folder))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_space_is_refused(tmp_path: Path) -> None:
    write_landscape(tmp_path / "a", SPACE, lambda values: 0.5, trials=4)
    (tmp_path / "a" / "space.yaml").unlink()
    with pytest.raises(UserError, match=r"space\.yaml is needed"):
        suggest.main(tmp_path / "a", None)
