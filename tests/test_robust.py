"""The robust best: neighbours and seeds against one lucky run, what cannot be pooled, and the file that is written."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from landscapes import drawn, space_of_text, with_objectives, write_landscape

from hpcl.analysis import robust
from hpcl.analysis.neighbours import MOST_OWN, smooth
from hpcl.analysis.notes import differences_from_notes
from hpcl.analysis.pooled import pool
from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.results import SearchResults, load_search
from hpcl.yamlio import load

SPACE = space_of_text(
    """
    base: {preset: embedded}
    space:
      topk.margin: {float: [0.5, 2.0]}
      moco.temperature: {float: [0.05, 0.5], log: true}
    """
)
CONDITIONS = space_of_text(
    """
    base: {preset: embedded}
    space:
      topk.mode: {choice: [replace, add, none]}
      topk.k: {int: [1, 5], when: {topk.mode: [replace, add]}}
    """
)


def hill(values: dict[str, Any]) -> float:
    """Best at margin 1.2, whatever the temperature."""
    return 0.9 - 0.2 * (values["topk.margin"] - 1.2) ** 2


def distances(places: np.ndarray) -> np.ndarray:
    return np.abs(places.T[:, :, None] - places.T[:, None, :])


def regrets(dims: int, trials: int, noise: float, repetitions: int) -> tuple[float, float]:
    """Mean regret of the robust best and of the best value, in standard deviations of the landscape."""
    found = []
    for seed in range(repetitions):
        rng = np.random.default_rng(seed)
        centre, places = rng.uniform(0.2, 0.8, dims), rng.random((trials, dims))
        true = -((places[:, :3] - centre[:3]) ** 2).sum(axis=1)
        values = true + noise * true.std() * rng.standard_normal(trials)
        chosen = smooth(distances(places), values).choose()
        found.append([(true.max() - true[i]) / true.std() for i in (chosen, int(values.argmax()))])
    means = np.mean(found, axis=0)
    return float(means[0]), float(means[1])


def test_the_robust_best_is_truly_better_than_the_best_noisy_value() -> None:
    chosen, lucky = regrets(dims=3, trials=32, noise=1.0, repetitions=40)
    assert chosen < 0.75 * lucky
    chosen, lucky = regrets(dims=8, trials=40, noise=1.0, repetitions=20)
    assert chosen < lucky


def test_one_lucky_trial_among_bad_neighbours_does_not_win() -> None:
    """A quarter of the space is good (0.9), the rest is bad (0.8), and one bad trial there got 0.93."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        places = rng.random((40, 2))
        good = (places[:, 0] > 0.5) & (places[:, 1] > 0.5)
        values = np.where(good, 0.9, 0.8) + 0.01 * rng.standard_normal(40)
        lucky = int(np.linalg.norm(places - 0.2, axis=1).argmin())
        values[lucky] = 0.93
        worth = smooth(distances(places), values)
        assert values.argmax() == lucky
        assert good[worth.choose()]
        assert worth.mean[lucky] < 0.9


def test_without_noise_the_best_value_is_the_best() -> None:
    places = np.random.default_rng(0).random((60, 2))
    values = -((places - 0.5) ** 2).sum(axis=1)
    worth = smooth(distances(places), values)
    assert worth.choose() == values.argmax()
    assert worth.unexplained < 0.2
    np.testing.assert_allclose(worth.mean, values, atol=0.05)


def test_pure_noise_is_seen_as_noise_and_weights_are_weights() -> None:
    rng = np.random.default_rng(0)
    worth = smooth(distances(rng.random((80, 3))), rng.standard_normal(80))
    assert worth.unexplained > 0.6
    assert np.abs(worth.mean).max() < 1.0
    assert ((worth.own >= 0) & (worth.own <= MOST_OWN)).all()
    assert (worth.neighbours < 80).all()


def test_equal_values_and_a_single_trial_are_no_trouble() -> None:
    rng = np.random.default_rng(0)
    places, values = rng.random((12, 2)), rng.random(12)
    for unit in (1e-305, 1e305):  # of any size
        worth, same = smooth(distances(places), values * unit), smooth(distances(places), values)
        np.testing.assert_allclose(worth.mean / unit, same.mean)
        np.testing.assert_allclose(worth.sd / unit, same.sd)
    assert smooth(np.zeros((2, 3, 3)), np.full(3, 0.5)).choose() == 0
    assert smooth(np.zeros((1, 1, 1)), np.array([0.5])).choose() == 0
    twice = smooth(np.zeros((1, 8, 8)), np.arange(8.0))  # one configuration, eight times: its mean
    np.testing.assert_allclose(twice.mean, 3.5)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("luck", [False, True])
def test_no_share_of_luck_is_claimed_for_one_run_each_cannot_tell_it(tmp_path: Path, luck: bool) -> None:
    """8 trials in 4 fields without any luck gave "about 55 %", pure luck 48 to 63."""
    of = space_of_text(
        """
        base: {preset: embedded}
        space:
          topk.margin: {float: [0.5, 2.0]}
          augment.jitter: {float: [0.1, 0.9]}
          clusters.multiplier: {float: [1.2, 3.0]}
          growth.theta_end: {float: [0.0, 0.2]}
        """
    )
    points = drawn(of, 8)
    draw = np.random.default_rng(0).standard_normal(8)
    values = list(draw) if luck else [math.sin(5 * sum(point.values())) for point in points]
    found = robust.robust_best([write_landscape(tmp_path / "a", of, values, points=points)])
    text = "\n".join(found.lines()) + robust.header(found)
    assert "of the variance" not in text
    assert found.notes == (
        f"one run each: the order of the best ones may be luck; hpcl retrain {tmp_path / 'a'} tells them apart by "
        "seeds",
    )


def test_what_is_no_number_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    search = write_landscape(tmp_path / "a", SPACE, [0.1, 0.2, 0.3, 0.5, 0.4], trials=5)
    search = with_objectives(search, [float("inf"), float("-inf"), 0.3, 0.5, 0.4])
    found = robust.robust_best([search])
    assert found.best.trial_id == found.lucky.trial_id == "0003" and found.trials == 3
    assert found.notes[0].startswith("a: 2 values of objective are not finite")
    assert f"note         {found.notes[0]}" in found.lines()


def test_a_retraining_that_cannot_be_judged_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    search = write_landscape(tmp_path / "a", SPACE, hill, trials=12, retrained={"0003": [0.8, 0.81]})
    assert robust.robust_best([search]).by == "seeds"
    for columns, why in (
        ({"epochs": math.nan}, "trial 0003 of a was retrained, but is left out: for how many epochs is not known"),
        ({"trial_id": "9999"}, "trial 9999 of a was retrained, but is left out: the search has no such trial"),
        ({"objective": [0.8, math.inf]}, "trial 0003 of a was retrained, but is left out: 1 seed infinite"),
        ({"epochs": 2}, "trial 0003 of a is left out, the configuration refuses it at 2 epochs: "),
    ):
        found = robust.robust_best([replace(search, retrain=search.retrain.assign(**columns))])
        assert found.by == "neighbourhood"
        assert any(note.startswith(why) for note in found.notes), found.notes
    odd = replace(search, about=replace(search.about, facts={"retrained": [1]}))
    assert robust.robust_best([odd]).by == "seeds"


def test_a_configuration_that_is_refused_leaves_its_place_to_the_next(tmp_path: Path) -> None:
    search = write_landscape(tmp_path / "a", SPACE, [0.1, 0.2, 0.3, 0.4], trials=4)
    wrong = search.trials.assign(**{"config.topk.margin": [1.0, 1.0, 1.0, 99.0]})
    found = robust.robust_best([replace(search, trials=wrong)])
    assert found.best.trial_id == "0002" and found.lucky.trial_id == "0003"
    assert "trial 0003 of a is left out, the configuration refuses it: topk.margin" in found.notes[0]
    with pytest.raises(UserError, match="there is no other trial"):
        robust.robust_best([replace(search, trials=wrong.assign(**{"config.topk.margin": 99.0}))])


def test_a_trial_s_values_are_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = write_landscape(tmp_path / "a", SPACE, hill, trials=12, retrained={"0003": [0.8, 0.81]})
    asked: list[str] = []
    values = SearchResults.values

    def counting(self: SearchResults, trial_id: str) -> dict[str, Any]:
        asked.append(trial_id)
        return values(self, trial_id)

    monkeypatch.setattr(SearchResults, "values", counting)
    robust.robust_best([search])
    assert sorted(asked) == [f"{i:04d}" for i in range(12)]


def test_one_of_a_thing_is_said_as_one(tmp_path: Path) -> None:
    found = robust.robust_best([write_landscape(tmp_path / "a", SPACE, [0.5], trials=1)])
    assert "of 1 finished trial in 1 search" in found.lines()[0]
    assert not found.notes  # there is no order
    assert robust.header(found).startswith("Robust best of 1 finished trial in a: trial 0000")


def test_a_lucky_trial_of_a_real_folder_is_not_chosen(tmp_path: Path) -> None:
    points = drawn(SPACE, 40)
    rng = np.random.default_rng(1)
    values = [hill(point) + 0.004 * rng.standard_normal() for point in points]
    lucky = int(np.argmax([abs(point["topk.margin"] - 1.2) for point in points]))
    values[lucky] = 0.93
    found = robust.robust_best([write_landscape(tmp_path / "a", SPACE, values, points=points)])
    assert found.by == "neighbourhood"
    assert found.lucky.trial_id == f"{lucky:04d}"
    assert found.best.trial_id != found.lucky.trial_id
    assert abs(found.best.values["topk.margin"] - 1.2) < 0.25
    assert found.best.low <= found.best.estimate <= found.best.high
    assert found.config.at("topk.margin") == found.best.values["topk.margin"]
    assert found.config.at("optimizer.batch") == SPACE.base.at("optimizer.batch")
    text = "\n".join(found.lines())
    assert f"robust best  trial {found.best.trial_id} of a, of 40 finished trials in 1 search" in text
    assert f"best value   trial {lucky:04d} of a: linear probe 0.93 in one run; estimated at " in text


def test_several_searches_are_pooled_over_the_union_of_their_fields(tmp_path: Path) -> None:
    wide = space_of_text("{base: {preset: embedded}, space: {topk.margin: {float: [0.2, 3.0]}, topk.k: {int: [1, 5]}}}")
    a = write_landscape(tmp_path / "a", SPACE, hill, trials=12)
    b = write_landscape(tmp_path / "b", wide, hill, trials=12, seed=5)
    pooled = pool([a, b])
    assert set(pooled.fields) == {"topk.margin", "moco.temperature", "topk.k"}
    assert (pooled.fields["topk.margin"].low, pooled.fields["topk.margin"].high) == (0.2, 3.0)
    apart = pooled.distances()
    assert apart.shape == (3, 24, 24)
    assert (apart >= 0).all() and (apart <= 1 + 1e-9).all()
    np.testing.assert_array_equal(apart, apart.transpose(0, 2, 1))
    found = robust.robust_best([a, b])
    assert found.trials == 24 and found.searches == ("a", "b")
    assert abs(found.best.values["topk.margin"] - 1.2) < 0.3


def test_fields_that_do_not_act_are_ignored_and_choices_are_equal_or_different(tmp_path: Path) -> None:
    points: list[dict[str, Any]] = [
        {"topk.mode": "replace", "topk.k": 1},
        {"topk.mode": "replace", "topk.k": 5},
        {"topk.mode": "none"},
        {"topk.mode": "none"},
    ]
    pooled = pool([write_landscape(tmp_path / "a", CONDITIONS, [0.4, 0.3, 0.2, 0.1], points=points)])
    mode, k = pooled.distances()
    np.testing.assert_array_equal(mode, [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]])
    far = 0.5 * 2**0.5  # half a range to the middle, and as much on an axis of its own
    np.testing.assert_allclose(k, [[0, 1, far, far], [1, 0, far, far], [far, far, 0, 0], [far, far, 0, 0]])


def test_distances_are_those_of_points_so_that_kernels_can_be_inverted(tmp_path: Path) -> None:
    """With many trials and fields that do not act, a matrix that is no kernel has eigenvalues below 0."""
    draw = np.random.default_rng(0)
    modes = draw.choice(["replace", "none"], 200)
    points: list[dict[str, Any]] = [
        {"topk.mode": str(mode), **({"topk.k": int(draw.integers(1, 6))} if mode == "replace" else {})}
        for mode in modes
    ]
    search = write_landscape(tmp_path / "a", CONDITIONS, draw.random(200).tolist(), points=points)
    distances = pool([search]).distances()
    squared = (distances**2).sum(axis=0)
    centred = squared - squared.mean(axis=0) - squared.mean(axis=1)[:, None] + squared.mean()
    assert np.linalg.eigvalsh(-centred).min() > -1e-9  # Schoenberg: distances of points
    assert robust.robust_best([search]).by == "neighbourhood"


def test_bases_that_differ_keep_configurations_apart(tmp_path: Path) -> None:
    other = space_of_text("{base: {preset: embedded, head: {kind: v1}}, space: {topk.margin: {float: [0.5, 2.0]}}}")
    a, b = (write_landscape(tmp_path / name, s, hill, trials=4) for name, s in (("a", SPACE), ("b", other)))
    assert "head.kind" in pool([a, b]).fields


def test_seeds_are_the_strongest_evidence(tmp_path: Path) -> None:
    retrained = {"0000": [0.80, 0.81, 0.95], "0003": [0.84, 0.85, 0.83], "0004": [0.99], "0005": [0.9, float("nan")]}
    search = write_landscape(tmp_path / "a", SPACE, hill, trials=12, retrained=retrained)
    found = robust.robust_best([search])
    assert found.by == "seeds"
    assert found.best.trial_id == "0003"  # not the best single seed, nor the one with a single or a lost seed
    assert (found.best.low, found.best.estimate, found.best.high) == (0.83, 0.84, 0.85)
    assert found.config.stages.total is None  # as it was retrained: 150 epochs
    assert "median 0.84 over 3 seeds at 150 epochs" in found.evidence()
    assert "holds the true median with 75%" in found.evidence()
    assert any("trial 0005 of a was retrained, but is left out: 1 seed diverged" in note for note in found.notes)


def test_a_retrained_trial_that_was_stopped_in_the_search_can_win(tmp_path: Path) -> None:
    points = drawn(SPACE, 8)
    values = [None, *(hill(point) for point in points[1:])]
    retrained = {"0000": [0.9, 0.9], "0001": [0.8, 0.8]}
    found = robust.robust_best(
        [write_landscape(tmp_path / "a", SPACE, values, points=points, retrained=retrained, retrained_epochs=40)]
    )
    assert found.best.trial_id == "0000" and found.best.objective is None
    assert found.config.stages.total == 40


def test_few_trials_are_chosen_by_their_value_and_that_is_said(tmp_path: Path) -> None:
    found = robust.robust_best([write_landscape(tmp_path / "a", SPACE, [0.3, 0.5, 0.4], trials=3)])
    assert found.by == "one run" and found.best.trial_id == "0001"
    assert "this may be luck" in found.evidence()


def test_smaller_is_better_for_a_loss(tmp_path: Path) -> None:
    facts = {"metric": "nce_ref", "objective": "nce_ref"}
    search = write_landscape(
        tmp_path / "a", SPACE, lambda values: -hill(values), trials=30, facts=facts, chosen_by="nce_ref"
    )
    found = robust.robust_best([search])
    assert found.chosen_by == "nce_ref"
    assert abs(found.best.values["topk.margin"] - 1.2) < 0.25
    assert found.best.estimate == pytest.approx(-0.9, abs=0.02)


def test_what_cannot_be_pooled_is_refused_with_all_reasons(tmp_path: Path) -> None:
    longer = space_of_text(
        "{base: {preset: embedded, stages: {total: 30}, data: {subset: 0.5}}, space: {topk.k: {int: [1, 5]}}}"
    )
    a = write_landscape(tmp_path / "a", SPACE, hill, trials=4)
    b = write_landscape(tmp_path / "b", longer, [0.1, 0.2, 0.3, 0.4], trials=4, facts={"data_hash": "other"})
    c = write_landscape(tmp_path / "c", SPACE, hill, trials=4, facts={"objective": "knn"})
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError) as error:
        robust.robust_best([a, b, c, a])
    text = str(error.value)
    assert "b: the images at mnist5k had changed" in text
    assert "data.subset is 0.5, but 1.0" in text
    assert "trained 30 epochs, but" in text
    assert "c: was chosen by knn" in text
    assert "a: is given twice" in text
    with pytest.raises(UserError, match="no trial finished"):
        robust.robust_best([write_landscape(tmp_path / "e", SPACE, [None, None], trials=2)])
    with pytest.raises(UserError) as error:
        robust.main([tmp_path / "d", tmp_path / "missing"], None, False)
    assert len(error.value.problems) == 2
    with pytest.raises(UserError, match="give the folder"):
        robust.main([], None, False)


def test_the_written_file_loads_and_says_by_what_evidence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_landscape(tmp_path / "a", SPACE, lambda values: values["topk.margin"], trials=12)
    out = tmp_path / "best.yaml"
    robust.main([tmp_path / "a"], out, False)
    text = out.read_text()
    assert text.startswith("# Robust best of 12 finished trials in a: trial ")
    config = load(Config, out)
    assert config == robust.robust_best([load_search(tmp_path / "a")]).config
    printed = capsys.readouterr().out
    assert "against the research notes' configuration" in printed
    assert "moco.temperature" in printed and "(notes: 0.1)" in printed
    assert "3/1/6/1/9 = 20 epochs" in printed and "in the same proportion" in printed
    robust.main([tmp_path / "a"], out, False)  # its own file is written again


def test_a_file_of_others_is_not_overwritten_unless_forced(tmp_path: Path) -> None:
    write_landscape(tmp_path / "a", SPACE, hill, trials=12)
    out = tmp_path / "best.yaml"
    out.write_text("# Best of the 8 finished trials\n")
    with pytest.raises(UserError, match="--force overwrites it"):
        robust.main([tmp_path / "a"], out, False)
    assert out.read_text() == "# Best of the 8 finished trials\n"
    robust.main([tmp_path / "a"], out, True)
    assert out.read_text().startswith("# Robust best of ")
    for wrong, why in ((tmp_path, "is a folder"), (tmp_path / "no" / "best.yaml", "there is no folder")):
        with pytest.raises(UserError, match=why):
            robust.main([tmp_path / "a"], wrong, False)


def test_a_name_with_control_characters_is_printed_and_written_harmlessly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_landscape(tmp_path / "a\x1b[31m\nseed: 7", SPACE, hill, trials=12)
    out = tmp_path / "best.yaml"
    robust.main([tmp_path / "a\x1b[31m\nseed: 7"], out, False)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed + out.read_text()
    assert not any(line.startswith("seed: 7") for line in (printed + out.read_text()).splitlines())
    with pytest.raises(UserError) as error:
        robust.main([tmp_path / "a\x1b[31m\nseed: 7"] * 2, None, False)
    assert "\n" not in str(error.value)
    assert load(Config, out).seed == 0


def test_differences_from_the_notes() -> None:
    pcl = differences_from_notes(Config().with_values({"method": "pcl"}))["also different, by the method"]
    assert [line.split()[0] for line in pcl] == [
        "head.attach", "clusters.size_tolerance", "prototypes.targets", "topk.mode"
    ]  # fmt: skip
    assert differences_from_notes(Config()) == {
        "against the research notes' configuration": ["it is the notes' configuration"]
    }
    changed = Config().with_values({"topk.margin": 1.5, "stages.total": 100, "stages.stage1.epochs": 40})
    mine, base = differences_from_notes(changed, ["topk.margin"]).values()
    assert mine == ["topk.margin  1.5  (notes: 1.0)"]
    assert "= 100 epochs" in base[0]
    assert "proportion" not in base[0]
    assert differences_from_notes(Config().with_values({"stages.total": 20}), ["topk.margin"]) == {
        "against the research notes' configuration": ["what was searched has the notes' values"],
        "also different, by the base of the search": [
            "stages  3/1/6/1/9 = 20 epochs  (notes: 20/5/50/5/70 = 150, in the same proportion)"
        ],
    }
