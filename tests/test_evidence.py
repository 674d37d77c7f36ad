"""What several seeds say of a configuration: means, ranks, and how sure the lead is."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hpcl.search.evidence import Evidence, Standing


def rows(**runs: tuple[float | None, list[float | str | None]]) -> list[dict[str, Any]]:
    """Rows of retrain.parquet: trial -> (in the search, by seed: an objective, the state of a lost seed, or None)."""
    return [
        {
            "trial_id": trial.removeprefix("t"),
            "seed": seed,
            "state": "running" if value is None else value if isinstance(value, str) else "finished",
            "stop_reason": "out of luck" if isinstance(value, str) else None,
            "objective": None if isinstance(value, str) else value,
            "search_objective": search,
        }
        for trial, (search, values) in runs.items()
        for seed, value in enumerate(values)
    ]


def evidence(chosen_by: str = "linear probe", **runs: tuple[float | None, list[float | str | None]]) -> Evidence:
    return Evidence(rows(**runs), base="0000", chosen_by=chosen_by, searched_by=chosen_by)


def test_mean_and_sd_are_those_of_the_seeds_that_finished() -> None:
    one = evidence(t0000=(0.5, [0.2, 0.4, 0.9, "failed", None])).standings[0]
    assert one.n == 3 and one.mean == pytest.approx(0.5)
    assert one.sd == pytest.approx(math.sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2))
    assert one.lost == ("seed 3 failed: out of luck",) and one.open == (4,)
    assert one.text() == "0.5000 ± 0.3606 (n = 3 of 5)"
    assert Standing("0001", None, (0.25,)).text() == "0.2500 (n = 1)"
    assert Standing("0001", None, (), ("seed 0 failed: no",)).text() == "no seed finished"
    assert Standing("0001", None, (), (), (0,)).text() == "not yet"


def test_the_best_mean_comes_first_and_for_a_loss_the_smallest() -> None:
    runs: dict[str, Any] = {"t0000": (0.3, [0.1, 0.3]), "t0001": (0.2, [0.4, 0.2]), "t0002": (0.1, ["failed"])}
    assert [s.trial_id for s in evidence(**runs).standings] == ["0001", "0000", "0002"]
    assert [s.trial_id for s in evidence("loss", **runs).standings] == ["0000", "0001", "0002"]


@pytest.mark.parametrize(
    ("now", "tau"),
    [([0.3, 0.2, 0.1], 1.0), ([0.1, 0.2, 0.3], -1.0), ([0.3, 0.1, 0.2], 1 / 3), ([0.2, 0.1, 0.3], -1 / 3)],
)
def test_rank_agreement_is_kendalls(now: list[float], tau: float) -> None:
    runs: dict[str, Any] = {f"t{i}": (0.9 - i / 10, [value, value]) for i, value in enumerate(now)}
    told = evidence(**runs, t7=(None, [0.5]), t8=(0.2, ["failed"]))  # these have no pair
    assert told.agreement() == (pytest.approx(tau), 3)
    assert f"tau {tau:.2f} (n = 3; so few tell little)" in told.agreement_text()


def test_agreement_knows_which_end_is_better_on_either_side() -> None:
    runs = rows(t0=(2.0, [0.2]), t1=(1.0, [0.3]))  # nce_ref in the search, a probe in the retraining
    told = Evidence(runs, base="0", chosen_by="linear probe", searched_by="nce_ref")
    assert told.agreement() == (1.0, 2) and "of two it is 1 or -1" in told.agreement_text()
    assert "1.0000 (1)" in "\n".join(told.lines())


def test_agreement_that_cannot_be_told() -> None:
    assert evidence(t0=(0.1, [0.2])).agreement() == (None, 1)
    assert "too few" in evidence(t0=(0.1, [0.2])).agreement_text()
    equal = evidence(t0=(0.1, [0.2]), t1=(0.1, [0.3]))
    assert equal.agreement() == (None, 2) and "values are equal" in equal.agreement_text()
    many: dict[str, Any] = {f"t{i}": (i / 10, [i / 10]) for i in range(5)}
    assert evidence(**many).agreement_text().endswith("tau 1.00 (n = 5)")


def test_a_configuration_that_lost_a_seed_is_not_the_best_unless_all_did() -> None:
    told = evidence(t0000=(0.3, [0.5, 0.5]), t0001=(0.2, [0.9, "diverged"]), t0002=(0.1, [0.1]))
    assert told.best is not None and told.best.trial_id == "0000"
    assert [s.trial_id for s in told.left_out] == ["0001"]
    assert "trial 0002" in told.lead()
    told = evidence(t0000=(0.3, [0.5, "failed"]), t0001=(0.2, [0.9, "diverged"]))
    assert told.best is not None and told.best.trial_id == "0001" and not told.left_out
    assert evidence(t0000=(0.3, ["failed"])).best is None


def test_the_lead_is_held_against_its_standard_error() -> None:
    error = math.sqrt(0.02 / 2 + 0.0002 / 2)  # variances of (0.5, 0.7) and (0.49, 0.51)
    text = evidence(t0=(0.1, [0.5, 0.7]), t1=(0.1, [0.49, 0.51])).lead()
    assert f"the difference of 0.1000 is not more than its standard error, {error:.4f}" in text
    text = evidence(t0=(0.1, [0.6, 0.62]), t1=(0.1, [0.49, 0.51])).lead()
    assert "the difference of 0.1100 is more than its standard error, 0.0141" in text
    assert "cannot be judged" in evidence(t0=(0.1, [0.6]), t1=(0.1, [0.4, 0.5])).lead()
    assert evidence(t0=(0.1, [0.6])).lead() == "there is no other to compare it with"


def test_the_table_shows_ranks_then_and_now_and_what_was_lost() -> None:
    lines = evidence(
        t0000=(None, [0.3, 0.3]),
        t0004=(0.8, [0.5, None, None]),
        t0002=(0.9, [0.4, "diverged"]),
        t0005=(0.7, ["failed"]),
    ).lines()
    cells = [" ".join(line.split()) for line in lines]
    assert cells[0] == "rank trial linear probe in the search (linear probe, rank here)"
    assert cells[1] == "1 0004 0.5000 (n = 1 of 3) 0.8000 (2) seeds 1, 2 to come"
    assert cells[2] == "2 0002 0.4000 (n = 1 of 2) 0.9000 (1) seed 1 diverged: out of luck"
    assert cells[3] == "3 0000 0.3000 ± 0.0000 (n = 2) - base"
    assert cells[4] == "- 0005 no seed finished 0.7000 (3) seed 0 failed: out of luck"
