"""Stage lengths, the plan of a run, and learning rates."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hpcl.stages
from hpcl.config import Config
from hpcl.sections import STAGES, Stages
from hpcl.stages import StagePlan, learning_rate, make_plan, stage_at, stage_lengths, total_epochs


def stages_of(*epochs: int, total: int | None = None) -> Stages:
    fields: dict[str, Any] = {f"stage{s}": {"epochs": n} for s, n in zip(STAGES, epochs, strict=True)}
    return Stages.model_validate(fields | {"total": total})


def config_of(**values: Any) -> Config:
    return Config().with_values({path.replace("__", "."): value for path, value in values.items()})


# ---------------------------------------------------------------- lengths


def test_the_notes_lengths() -> None:
    assert stage_lengths(Stages()) == (20, 5, 50, 5, 70)
    assert stage_lengths(Stages(total=150)) == (20, 5, 50, 5, 70)
    assert stage_lengths(Stages(total=300)) == (40, 10, 100, 10, 140)


@pytest.mark.parametrize(
    ("epochs", "total", "wanted"),
    [
        ((20, 5, 50, 5, 70), 30, (4, 1, 10, 1, 14)),
        ((20, 5, 50, 5, 70), 16, (2, 1, 5, 1, 7)),
        ((20, 5, 50, 5, 70), 5, (1, 1, 1, 1, 1)),
        ((1, 1, 1, 0, 0), 10, (4, 3, 3, 0, 0)),
        ((1, 1000, 0, 1, 1000), 10, (1, 4, 0, 1, 4)),
        ((0, 0, 7, 0, 0), 3, (0, 0, 3, 0, 0)),
        ((1, 100, 100, 100, 1), 12, (1, 4, 3, 3, 1)),
    ],
)
def test_lengths_scaled_to_a_total(epochs: tuple[int, ...], total: int, wanted: tuple[int, ...]) -> None:
    assert stage_lengths(stages_of(*epochs, total=total)) == wanted


@settings(deadline=None, max_examples=200)
@given(
    epochs=st.lists(st.integers(0, 200), min_size=5, max_size=5).filter(any),
    extra=st.integers(0, 400),
)
def test_scaled_lengths_sum_exactly_and_keep_every_stage(epochs: list[int], extra: int) -> None:
    active = sum(n > 0 for n in epochs)
    total = active + extra
    lengths = stage_lengths(stages_of(*epochs, total=total))
    assert sum(lengths) == total
    assert [n > 0 for n in lengths] == [n > 0 for n in epochs]
    quotas = [total * n / sum(epochs) for n in epochs]
    if all(quota >= 1 for quota in quotas if quota):
        assert all(math.floor(q) <= n <= math.ceil(q) for n, q in zip(lengths, quotas, strict=True))
    order = sorted(range(5), key=lambda i: epochs[i])
    for shorter, longer in pairwise(order):
        assert epochs[shorter] == epochs[longer] or lengths[shorter] <= lengths[longer]


def test_a_total_below_the_number_of_stages_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stages\.total is 2, but must be >= 3, the number of stages above 0"):
        stage_lengths(stages_of(1, 1, 1, 0, 0, total=2))
    with pytest.raises(ValueError, match="but all five stages have 0 epochs"):
        stage_lengths(stages_of(0, 0, 0, 0, 0, total=2))


# ---------------------------------------------------------------- plan


def test_the_plan_of_the_notes() -> None:
    plan = make_plan(Config())
    rows = [(p.stage, p.first_epoch, p.last_epoch, p.epochs) for p in plan]
    assert rows == [(1, 1, 20, 20), (2, 21, 25, 5), (3, 26, 75, 50), (4, 76, 80, 5), (5, 81, 150, 70)]
    trains = [(p.trains_encoder, p.uses_head) for p in plan]
    assert trains == [(True, False), (False, True), (True, True), (False, True), (True, True)]
    assert [p.uses_prototypes for p in plan] == [False, True, True, True, True]
    assert [p.uses_head for p in plan] == [False, True, True, True, True]
    assert [p.may_grow for p in plan] == [False, False, True, False, True]
    assert total_epochs(plan) == 150


def test_a_stage_of_no_epochs_is_left_out_and_the_rest_moves_up() -> None:
    plan = make_plan(config_of(stages__stage1__epochs=0, stages__stage4__epochs=0))
    assert [(p.stage, p.first_epoch, p.last_epoch) for p in plan] == [(2, 1, 5), (3, 6, 55), (5, 56, 125)]


def test_without_an_mlp_no_stage_uses_one() -> None:
    plan = make_plan(config_of(head__kind="none", stages__stage2__epochs=0, stages__stage4__epochs=0))
    assert [p.stage for p in plan] == [1, 3, 5]
    assert not any(p.uses_head for p in plan)
    assert all(p.trains_encoder for p in plan)
    assert [p.uses_prototypes for p in plan] == [False, True, True]


def test_growth_stages_follow_the_configuration() -> None:
    assert [p.stage for p in make_plan(config_of(growth__stages=(2, 3, 4))) if p.may_grow] == [2, 3, 4]
    assert not any(p.may_grow for p in make_plan(config_of(growth__stages=())))


def test_every_stage_has_its_own_rate_and_schedule() -> None:
    plan = make_plan(config_of(stages__stage2__lr=0.5, stages__stage3__schedule="constant", stages__total=30))
    assert [p.lr for p in plan] == [0.06, 0.5, 0.06, 0.06, 0.06]
    assert [p.schedule for p in plan] == ["cosine", "cosine", "constant", "cosine", "cosine"]
    assert plan[-1].last_epoch == 30


def test_stage_at_covers_the_run_and_nothing_else() -> None:
    plan = make_plan(config_of(stages__total=16))
    assert [stage_at(plan, epoch).stage for epoch in range(1, 17)] == [1] * 2 + [2] + [3] * 5 + [4] + [5] * 7
    for epoch in (0, 17):
        with pytest.raises(ValueError, match=f"epoch is {epoch}, but must be between 1 and 16"):
            stage_at(plan, epoch)


# ---------------------------------------------------------------- learning rate


def one_stage(schedule: str, lr: float = 0.06) -> StagePlan:
    plan = make_plan(config_of(stages__stage1__schedule=schedule, stages__stage1__lr=lr))
    return plan[0]


def test_constant_rate() -> None:
    assert {learning_rate(one_stage("constant"), step, 40) for step in range(40)} == {0.06}


def test_cosine_rate_from_lr_to_zero() -> None:
    stage = one_stage("cosine", lr=0.4)
    rates = [learning_rate(stage, step, 40) for step in range(41)]
    assert rates[0] == 0.4
    assert rates[20] == pytest.approx(0.2)
    assert rates[10] == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    assert rates[40] == pytest.approx(0, abs=1e-15)
    assert all(earlier > later >= 0 for earlier, later in pairwise(rates))
    assert learning_rate(stage, 0, 1) == 0.4


@pytest.mark.parametrize(("step", "steps"), [(-1, 10), (11, 10), (0, 0)])
def test_a_step_outside_the_stage_is_refused(step: int, steps: int) -> None:
    with pytest.raises(ValueError, match=f"step is {step} of {steps}"):
        learning_rate(one_stage("cosine"), step, steps)


# ---------------------------------------------------------------- imports


def imports_torch(module: str) -> bool:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 1


def test_stages_are_pure() -> None:
    assert not imports_torch("hpcl.stages")
    assert imports_torch("hpcl.losses"), "the check must be able to fail"


def test_the_examples_in_the_docstrings_run() -> None:
    result = doctest.testmod(hpcl.stages)
    assert result.attempted > 0
    assert result.failed == 0
