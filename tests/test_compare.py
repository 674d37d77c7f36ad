"""Searches side by side: the same hours, winners within their ranges, and what seeds or one run can tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from landscapes import space_of_text, with_objectives, write_landscape
from matplotlib import rc_context

from hpcl.analysis import compare
from hpcl.analysis.charts.compare import best_over_hours, winning_places
from hpcl.analysis.charts.look import svg
from hpcl.analysis.pooled import pool
from hpcl.errors import UserError
from hpcl.results.fields import Field

SPACE = space_of_text(
    """
    base: {preset: embedded}
    space:
      topk.mode: {choice: [replace, add, none]}
      topk.margin: {float: [0.5, 2.0], log: true, when: {topk.mode: [replace, add]}}
      topk.k: {int: [1, 5]}
    """
)
NARROW = space_of_text("{base: {preset: embedded}, space: {topk.k: {int: [2, 4]}}}")
POINT: dict[str, Any] = {"topk.mode": "none", "topk.k": 5}


def test_overview_same_hours_and_winners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first: dict[str, Any] = {"topk.mode": "replace", "topk.margin": 1.0, "topk.k": 3}
    points = [first, POINT, {**first, "topk.k": 1}]
    write_landscape(tmp_path / "a", SPACE, [0.5, 0.7, None], points=points)
    write_landscape(tmp_path / "b", NARROW, [0.6, 0.65, 0.64, 0.66], trials=4)
    compare.main([tmp_path / "a", tmp_path / "b"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "search trials finished spent chosen by best base best at 0.05"
    assert lines[1] == "a 3 2 0.05 CPU-hours linear probe 0.7000 (trial 0001) 0.5000 0.7000"
    assert lines[2] == "b 4 4 0.08 CPU-hours linear probe 0.6600 (trial 0003) 0.6000 0.6500"
    assert lines[4:6] == ["best so far after the same CPU-hours", "CPU-hours a b"]
    assert lines[6:10] == ["0.0125 none none", "0.025 0.5000 0.6000", "0.0375 0.5000 0.6000", "0.05 0.7000 0.6500"]
    winners = lines[lines.index("winning values") :]
    assert winners[1] == "field a range b range"
    assert winners[2] == "topk.mode none [replace, add, none] replace not searched"
    assert winners[3] == "topk.margin did not act [0.5, 2.0] log 1.0 not searched"
    assert winners[4].startswith("topk.k 5 [1, 5] ") and winners[4].endswith(" [2, 4]")
    assert "one run each cannot tell them apart (0.7000 and 0.6600)" in lines[-1]


def test_seeds_tell_a_clear_difference_and_say_n(tmp_path: Path) -> None:
    sides = [
        write_landscape(tmp_path / name, SPACE, [0.5, 0.6], trials=2, retrained={"0000": [0.1, 0.1], "0001": seeds})
        for name, seeds in (("a", [0.900, 0.901, 0.902, 0.901]), ("b", [0.850, 0.852, 0.851, 0.853]))
    ]
    difference = compare.compare(sides).differences[0]
    assert difference.trials == ("0001", "0001") and difference.n == (4, 4)
    assert difference.difference == pytest.approx(0.0495)
    assert 0.045 < difference.low < difference.difference < difference.high < 0.054
    assert difference.p == pytest.approx(2 / 70)
    text = difference.text()
    assert "(n = 4)" in text and "which is told apart from 0" in text and "at least 0.029" in text


def test_seeds_that_overlap_tell_nothing_apart(tmp_path: Path) -> None:
    sides = [
        write_landscape(tmp_path / name, SPACE, [0.5], trials=1, retrained={"0000": seeds})
        for name, seeds in (("a", [0.90, 0.91, 0.89]), ("b", [0.89, 0.905, 0.90]))
    ]
    difference = compare.compare(sides).differences[0]
    assert difference.low < 0 < difference.high
    assert "is not told apart from 0" in difference.text()


def test_the_interval_covers_the_true_difference_as_often_as_it_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    covered = []
    search = write_landscape(tmp_path / "a", SPACE, [0.5], trials=1, retrained={"0000": [0.5] * 8})
    for _ in range(100):
        sides = []
        for sd in (0.01, 0.03):
            sides.append(replace(search, retrain=search.retrain.assign(objective=rng.normal(0.9, sd, 8))))
        seeded = (compare._seeded(sides[0])[0], compare._seeded(sides[1])[0])
        made = compare._difference((sides[0], sides[1]), ("a", "b"), seeded)
        assert isinstance(made, compare.Difference) and made.p is None
        covered.append(made.low <= 0 <= made.high)
    assert 0.9 < np.mean(covered) < 0.99


def test_equal_seeds_and_lost_ones(tmp_path: Path) -> None:
    a = write_landscape(tmp_path / "a", SPACE, [0.5], trials=1, retrained={"0000": [0.9, 0.9]})
    b = write_landscape(tmp_path / "b", SPACE, [0.5], trials=1, retrained={"0000": [0.8, 0.8]})
    difference = compare.compare([a, b]).differences[0]
    assert (difference.low, difference.high) == pytest.approx((0.1, 0.1))
    lost = write_landscape(tmp_path / "c", SPACE, [0.5], trials=1, retrained={"0000": [0.9, 0.9, float("nan")]})
    made = compare.compare([a, lost])
    assert not made.differences
    assert "trial 0000 of c was retrained, but is left out: 1 seed diverged" in made.notes
    longer = write_landscape(
        tmp_path / "d", SPACE, [0.5], trials=1, retrained={"0000": [0.8, 0.8]}, retrained_epochs=20
    )
    assert "their seeds do not compare" in compare.compare([a, longer]).notes[0]


def test_the_number_of_validation_images_shows_in_the_probe_s_values(tmp_path: Path) -> None:
    assert compare.probe_images([407 / 450, 403 / 450, 398 / 450, 406 / 450]) == 450
    assert compare.probe_images([407 / 450, 403 / 450]) is None  # two tell too little
    assert compare.probe_images([0.123456789, 0.2345678912, 0.3456789123]) is None
    sides = [
        write_landscape(tmp_path / name, SPACE, [n / 450 for n in counts], trials=3)
        for name, counts in (("a", (407, 401, 390)), ("b", (403, 398, 377)))
    ]
    note = compare.compare(sides).notes[-1]
    assert "450 validation images" in note and "0.0200" in note
    unknown = write_landscape(tmp_path / "c", SPACE, [0.1234567, 0.2345671, 0.3456712], trials=3)
    assert "is not known here" in compare.compare([unknown, sides[0]]).notes[-1]
    told = replace(unknown, about=replace(unknown.about, val_images=900))
    assert "scored on 900 validation images, so" in compare.compare([told, sides[0]]).notes[-1]
    for outside in (1.5, -0.2):
        wrong = write_landscape(tmp_path / "d", SPACE, [outside], trials=1)
        assert "must be from 0 to 1" in compare.compare([wrong, sides[0]]).notes[-1]


def test_different_images_and_objectives_are_said_not_refused(tmp_path: Path) -> None:
    a = write_landscape(tmp_path / "a", SPACE, [0.5], trials=1)
    b = write_landscape(tmp_path / "b", SPACE, [0.5], trials=1, facts={"data": "cifar", "data_hash": "other"})
    c = write_landscape(tmp_path / "c", SPACE, [0.5], trials=1, facts={"objective": "knn"})
    made = compare.compare([a, b, c])
    text = "\n".join(made.lines())
    assert text.count("not comparable: ") == 2
    assert "was searched on other images (cifar)" in text and "chosen by knn" in text
    assert not made.differences


def test_what_best_refuses_is_said_with_all_reasons(tmp_path: Path) -> None:
    longer = space_of_text(
        "{base: {preset: embedded, stages: {total: 40}, data: {split_seed: 7}}, space: {topk.k: {int: [1, 5]}}}"
    )
    a, b = (
        write_landscape(tmp_path / name, of, [0.5, 0.6], trials=2, retrained={"0000": [0.8, 0.9]})
        for name, of in (("a", SPACE), ("b", longer))
    )
    made = compare.compare([a, b])
    assert made.lines()[:2] == [
        f"not comparable: {tmp_path / 'b'}: data.split_seed is 7, but 0 in {tmp_path / 'a'}",
        f"not comparable: {tmp_path / 'b'}: trained 40 epochs, but {tmp_path / 'a'} 20",
    ]
    assert not made.differences and "one run each" not in "\n".join(made.lines())
    with pytest.raises(UserError) as error:
        pool([a, b])
    assert set(made.apart) == set(error.value.problems)


def test_seeds_of_searches_of_different_length_compare_for_they_were_retrained_as_long(tmp_path: Path) -> None:
    longer = space_of_text("{base: {preset: embedded, stages: {total: 40}}, space: {topk.k: {int: [1, 5]}}}")
    a, b = (
        write_landscape(tmp_path / name, of, [0.5], trials=1, retrained={"0000": [0.8, 0.9]})
        for name, of in (("a", SPACE), ("b", longer))
    )
    made = compare.compare([a, b])
    assert len(made.apart) == 1 and len(made.differences) == 1


def test_a_folder_given_twice_is_refused(tmp_path: Path) -> None:
    write_landscape(tmp_path / "a", SPACE, [0.5], trials=1)
    with pytest.raises(UserError, match="a: is given twice; leave one out"):
        compare.main([tmp_path / "a", tmp_path / ".." / tmp_path.name / "a"])


def test_what_is_no_number_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    a = write_landscape(tmp_path / "a", SPACE, [0.5, 0.6], trials=2, facts={"seconds": "abc"})
    a = with_objectives(a, [0.5, float("inf")])
    b = write_landscape(tmp_path / "b", SPACE, [0.5, 0.6], trials=2, retrained={"0000": [0.8, 0.9]})
    b = replace(b, retrain=b.retrain.assign(epochs=float("nan")))
    made = compare.compare([a, b])
    assert made.notes[0].startswith("a: seconds is abc") or made.notes[1].startswith("a: seconds is abc")
    assert any(note.startswith("a: 1 values of objective are not finite") for note in made.notes)
    assert "trial 0000 of b was retrained, but is left out: for how many epochs is not known" in made.notes
    assert max(best_over_hours(made).axes[0].lines[0].get_ydata()) == 0.5


def test_hours_of_different_kinds_have_no_same_hours(tmp_path: Path) -> None:
    a = write_landscape(tmp_path / "a", SPACE, [0.5, 0.6], trials=2)
    b = write_landscape(tmp_path / "b", SPACE, [0.5, None], trials=2, seconds=0.0)
    made = compare.compare([a, b])
    assert made.common is None
    assert any("spent in CPU-hours and epochs" in note for note in made.notes)
    assert "best so far" not in "\n".join(made.lines())
    assert "part of what" in best_over_hours(made).axes[0].get_xlabel()


def test_a_search_without_finished_trials_and_equal_names(tmp_path: Path) -> None:
    a = write_landscape(tmp_path / "one" / "a", SPACE, [0.5, 0.6], trials=2)
    b = write_landscape(tmp_path / "two" / "a", SPACE, [None, None], trials=2)
    made = compare.compare([a, b])
    assert made.names == (str(tmp_path / "one" / "a"), str(tmp_path / "two" / "a"))
    assert not made.apart  # one has no values
    assert " none " in made.lines()[2]
    for chart in (best_over_hours, winning_places):
        assert "<svg" in svg(chart(made), "two searches")
    nothing = compare.compare([b, write_landscape(tmp_path / "c" / "a", SPACE, [None], trials=1)])
    for chart in (best_over_hours, winning_places):
        assert chart(nothing).axes[0].texts[0].get_text() == "no trial finished with a value"


def test_charts_show_steps_and_places(tmp_path: Path) -> None:
    points = [{**POINT, "topk.k": 1}, POINT]
    a = write_landscape(tmp_path / "a", SPACE, [0.5, 0.7], points=points)
    b = write_landscape(tmp_path / "b", NARROW, [0.6, 0.65], points=[{"topk.k": 3}, {"topk.k": 2}])
    made = compare.compare([a, b])
    with rc_context({"axes.titlelocation": "center", "font.size": 30}):  # of a notebook
        axes = best_over_hours(made).axes[0]
        assert winning_places(made).axes[0].get_title(loc="left") == "Where did the winners lie?"
    assert axes.get_title(loc="left") == "What had each search found after the same hours?"
    line = axes.lines[0]
    np.testing.assert_allclose(line.get_xdata(), [0.02, 0.04, 0.04])
    np.testing.assert_allclose(line.get_ydata(), [0.5, 0.7, 0.7])
    assert axes.get_xlabel() == "CPU-hours spent" and "linear probe" in axes.get_ylabel()
    places = winning_places(made).axes[0]
    np.testing.assert_allclose([p[0] for p in places.collections[0].get_offsets()], [1.0, 1.0])  # mode none, k 5
    np.testing.assert_allclose([p[0] for p in places.collections[1].get_offsets()], [0.0])  # k 2 of [2, 4]


def test_names_that_begin_with_an_underscore_stand_in_the_legend(tmp_path: Path) -> None:
    made = compare.compare([write_landscape(tmp_path / name, NARROW, [0.6, 0.65], trials=2) for name in ("_a", "b")])
    for chart in (best_over_hours, winning_places):
        labels = [text.get_text() for text in chart(made).axes[0].get_legend().get_texts()]
        assert labels[0].startswith("\u200b_a") and labels[1].startswith("b")


def test_a_winner_without_a_place_on_the_scale_is_not_drawn(tmp_path: Path) -> None:
    of = space_of_text("{base: {preset: embedded}, space: {optimizer.weight_decay: {float: [1e-6, 0.01], log: true}}}")
    points = [{"optimizer.weight_decay": 0.0}, {"optimizer.weight_decay": 1e-4}]
    a = write_landscape(tmp_path / "a", of, [0.9, 0.5], points=points)
    b = write_landscape(tmp_path / "b", of, [0.5, 0.9], points=points)
    drawn = winning_places(compare.compare([a, b])).axes[0].collections
    assert [len(each.get_offsets()) for each in drawn] == [0, 1]


def test_ranges_in_words_and_too_few_folders(tmp_path: Path) -> None:
    assert compare.range_text(Field("a", "int", 1.0, 5.0, log=True)) == "[1, 5] log"
    assert compare.range_text(Field("a", "float", 0.5, 2.0, guessed=True)) == "seen [0.5, 2.0]"
    with pytest.raises(UserError, match="at least two"):
        compare.main([tmp_path])
    with pytest.raises(UserError) as error:
        compare.main([tmp_path / "x", tmp_path / "y"])
    assert len(error.value.problems) == 2


def test_names_are_printed_harmlessly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a\x1b[31m\nforged a", "b\nforged b"]
    for name in names:
        search = write_landscape(tmp_path / name, NARROW, [0.5, 0.6], trials=2)
        # Without a space the fields are the table's columns, by whatever name.
        (tmp_path / name / "space.yaml").unlink()
        trials = search.trials.rename(columns={"config.topk.k": "config.x\nforged: field"}).assign(number=[0, 1])
        trials["config.x\nforged: field"] = [2, 3]
        trials.to_parquet(tmp_path / name / "trials.parquet")
    compare.main([tmp_path / name for name in names])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "x forged: field" in printed
    assert not any(line.startswith("forged") for line in printed.splitlines())
    with pytest.raises(UserError) as error:
        compare.main([tmp_path / names[0]] * 2)
    assert "\n" not in str(error.value)
