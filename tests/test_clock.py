"""Canonical time, against exact fractions, and the rungs on it."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys
from fractions import Fraction
from itertools import accumulate, pairwise, product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler

import hpcl.search.clock
from hpcl.config import Config
from hpcl.search.clock import StageClock, reached, rung_times
from hpcl.sections import STAGES, Stages

stage_lists = st.lists(st.integers(0, 200), min_size=5, max_size=5).filter(any)


def base_of(lengths: list[int], total: int | None = None) -> Config:
    fields: dict[str, Any] = {f"stage{s}": {"epochs": n} for s, n in zip(STAGES, lengths, strict=True)}
    return Config().model_copy(update={"stages": Stages.model_validate(fields | {"total": total})})


def exact_time(base: list[int], lengths: list[int], epoch: int) -> Fraction:
    """The formula, stage by stage, in fractions."""
    ends = list(accumulate(lengths))
    s = next(s for s in range(5) if epoch <= ends[s] and lengths[s])
    i = epoch - (ends[s] - lengths[s])
    return sum(base[:s]) + Fraction(base[s] * i, lengths[s])


def test_examples_and_no_torch_or_ray() -> None:
    assert doctest.testmod(hpcl.search.clock).failed == 0
    code = "import sys, hpcl.search.clock; print([m for m in ('torch', 'ray', 'optuna', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@settings(deadline=None, max_examples=100)
@given(base=stage_lists, lengths=stage_lists)
def test_time_is_the_formula_exact_at_stage_ends_and_never_falls(base: list[int], lengths: list[int]) -> None:
    clock = StageClock(base_of(base))
    times = [clock.time(lengths, epoch) for epoch in range(1, sum(lengths) + 1)]
    for epoch, time in enumerate(times, 1):
        assert abs(Fraction(time) - exact_time(base, lengths, epoch)) <= Fraction(1, 10**12)
    ends = list(accumulate(lengths))
    for s, end in enumerate(ends):
        if lengths[s]:
            assert times[end - 1] == sum(base[: s + 1])
    assert all(a <= b for a, b in pairwise(times)) and clock.time(lengths, 0) == 0.0
    assert clock.total == sum(base) and times[-1] <= clock.total


@settings(deadline=None, max_examples=60)
@given(base=stage_lists)
def test_the_base_trial_itself_counts_epochs(base: list[int]) -> None:
    stage, epoch = StageClock(base_of(base)), StageClock(base_of(base), "epoch")
    assert stage.total == epoch.total
    for e in range(1, sum(base) + 1):
        assert stage.time(base, e) == epoch.time(base, e) == e


def test_the_unit_is_the_scaled_base() -> None:
    clock = StageClock(base_of([20, 5, 50, 5, 70], total=30))  # (4, 1, 10, 1, 14)
    assert clock.total == 30
    assert [clock.time((8, 1, 10, 1, 14), e) for e in (1, 2, 8, 9)] == [0.5, 1.0, 4.0, 5.0]


def test_a_stage_that_the_base_leaves_out_takes_no_time() -> None:
    clock = StageClock(base_of([4, 0, 6, 0, 0]))
    assert [clock.time((2, 3, 2, 0, 2), e) for e in range(1, 10)] == [2, 4, 4, 4, 4, 7, 10, 10, 10]


def test_a_stage_that_the_trial_leaves_out_is_jumped_over() -> None:
    clock = StageClock(base_of([4, 2, 6, 0, 8]))
    assert [clock.time((2, 0, 3, 0, 0), e) for e in range(1, 6)] == [2, 4, 8, 10, 12]
    assert [clock.time((0, 0, 0, 0, 2), e) for e in (1, 2)] == [16, 20]


def test_the_clock_epoch_counts_the_trials_own() -> None:
    clock = StageClock(base_of([4, 2, 6, 0, 8]), "epoch")
    assert [clock.time((2, 0, 30, 0, 0), e) for e in (1, 3, 32)] == [1, 3, 32] and clock.total == 20


@pytest.mark.parametrize("kind", ["stage", "epoch"])
@pytest.mark.parametrize("epoch", [-1, 11])
def test_an_epoch_outside_the_trial_is_refused(kind: Any, epoch: int) -> None:
    with pytest.raises(ValueError, match=f"epoch is {epoch}, but must be between 0 and 10, the trial's last"):
        StageClock(Config(), kind).time((2, 2, 2, 2, 2), epoch)


@pytest.mark.parametrize("grace", [1, 2, 3, 8, 2.5])
@pytest.mark.parametrize("factor", [2, 3, 4, 2.5, 1.5])
def test_rungs_are_rays_except_at_the_very_end(grace: Any, factor: float) -> None:
    for total, bracket in product((2, 20, 27, 64, 150), (0, 1, 3)):
        rays = AsyncHyperBandScheduler("t", "m", "max", max(total, grace), grace, factor, brackets=bracket + 1)
        below = [rung for rung, _ in reversed(rays._brackets[bracket]._rungs) if rung < total]
        assert list(rung_times(grace, factor, total, bracket=bracket)) == below


def test_rungs_count_from_the_fork() -> None:
    assert rung_times(8, 2, 150, fork=25) == (33, 41, 57, 89)
    assert rung_times(8, 2, 33, fork=25) == rung_times(None, 2, 150) == rung_times(8, 2, 5) == ()
    assert rung_times(8, 2, 33.5, fork=25) == (33,)


def test_rungs_need_a_grace_and_a_factor() -> None:
    for grace, factor in ((0, 2), (-1, 2), (8, 1), (math.nan, 2)):
        with pytest.raises(ValueError, match=f"grace is {grace} and factor {factor}, but they must be > 0 and > 1"):
            rung_times(grace, factor, 150)


@settings(deadline=None, max_examples=60)
@given(base=stage_lists, lengths=stage_lists, grace=st.integers(1, 40), factor=st.sampled_from([2, 3, 4, 2.5, 1.3]))
def test_no_rung_is_missed_or_come_to_early_by_rounding(
    base: list[int], lengths: list[int], grace: int, factor: float
) -> None:
    assume(grace < sum(base))
    clock = StageClock(base_of(base))
    rungs = rung_times(grace, factor, clock.total)
    exact = [grace * Fraction(str(factor)) ** k for k in range(len(rungs))]
    for epoch in range(1, sum(lengths) + 1):
        time, true = clock.time(lengths, epoch), exact_time(base, lengths, epoch)
        near = [abs(true - rung) for rung in exact if true != rung]
        assume(not near or min(near) > Fraction(1, 10**6))
        assert [reached(time, rung) for rung in rungs] == [true >= rung for rung in exact]


def test_times_that_differ_by_rounding_are_one() -> None:
    assert 0.1 + 0.2 != 0.3 and reached(0.3, 0.1 + 0.2) and reached(0.1 + 0.2, 0.3)
    assert reached(10.0, 10.0 * (1 + 1e-12)) and not reached(9.999999, 10.0)
