"""Which stage trains what, for how long and how fast. Numbers in, plan out.

The five stages of the research notes (seed 000):

    1  encoder (backbone and its fc), no MLP    InfoNCE
    2  MLP alone                                InfoNCE + prototypes
    3  everything                               the same, clusters may grow
    4  MLP alone                                the same
    5  everything                               the same, clusters may grow

Each has its own epochs, learning rate and schedule; a stage of 0 epochs is left
out. Epochs are counted from 1 over the whole run.

Methods without stages (:mod:`hpcl.methods`) train everything all the time: stage 1 is
their warm-up without prototypes, the others are one with it and with each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from hpcl.config import Config
from hpcl.methods import METHODS
from hpcl.sections import HEAD_ONLY_STAGES, STAGES, Stages


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run: its epochs, its learning rate, and what it trains and uses."""

    stage: int
    """Number of the stage, 1 to 5."""
    first_epoch: int
    """First epoch, counted from 1 over the whole run."""
    last_epoch: int
    """Last epoch, inclusive."""
    lr: float
    """Learning rate at the first step."""
    schedule: Literal["constant", "cosine"]
    """Learning rate within the stage: constant, or cosine to 0."""
    trains_encoder: bool
    """Whether the backbone (and the fc, where it is in use) learns; else it is frozen."""
    uses_prototypes: bool
    """Whether clusters exist and the prototype losses count."""
    uses_head: bool
    """Whether embeddings come out of the MLP, which then learns; else out of the fc."""
    may_grow: bool
    """Whether the growth policy is asked after each epoch."""
    schedule_epochs: tuple[int, int]
    """First and last epoch over which the learning rate's schedule runs: the stage, or the run."""
    continues: bool = False
    """Whether it goes on from the stage before: same weights, same optimizer, same output space."""

    @property
    def epochs(self) -> int:
        """Length of the stage in epochs."""
        return self.last_epoch - self.first_epoch + 1


def stage_lengths(stages: Stages) -> tuple[int, int, int, int, int]:
    """The five lengths in epochs, scaled to `stages.total` where that is set.

    Scaling is by largest remainder (Hamilton), ties to the earlier stage, so the
    sum is exact. A stage above 0 keeps at least one epoch: those whose share is
    less are set to 1 and the rest is shared anew among the others.

    Raises:
        ValueError: `total` is less than the number of stages above 0, or all are 0.

    Example:
        >>> stage_lengths(Stages(total=16))
        (2, 1, 5, 1, 7)
    """
    lengths = {s: stages.of(s).epochs for s in STAGES}
    if stages.total is not None:
        lengths |= _apportion({s: n for s, n in lengths.items() if n}, stages.total)
    one, two, three, four, five = (lengths[s] for s in STAGES)
    return one, two, three, four, five


def _apportion(weights: dict[int, int], total: int) -> dict[int, int]:
    """`total` shared out in proportion to positive weights, at least 1 each."""
    if not weights:
        raise ValueError(f"stages.total is {total}, but all five stages have 0 epochs: at least one must train")
    if total < len(weights):
        raise ValueError(f"stages.total is {total}, but must be >= {len(weights)}, the number of stages above 0")
    quotas = {s: Fraction(total * n, sum(weights.values())) for s, n in weights.items()}
    shares = {s: math.floor(quota) for s, quota in quotas.items()}
    by_remainder = sorted(weights, key=lambda s: (shares[s] - quotas[s], s))
    for s in by_remainder[: total - sum(shares.values())]:
        shares[s] += 1
    short = [s for s, share in shares.items() if share == 0]
    if not short:
        return shares
    rest = _apportion({s: n for s, n in weights.items() if s not in short}, total - len(short))
    return {s: rest.get(s, 1) for s in weights}


def make_plan(config: Config) -> tuple[StagePlan, ...]:
    """The stages that this configuration runs, in order, without those of 0 epochs."""
    plan: list[StagePlan] = []
    method, lengths = METHODS[config.method], stage_lengths(config.stages)
    first = 1
    for stage, epochs in zip(STAGES, lengths, strict=True):
        if epochs == 0:
            continue
        settings = config.stages.of(stage if method.staged else 1)
        last = first + epochs - 1
        plan.append(
            StagePlan(
                stage=stage,
                first_epoch=first,
                last_epoch=last,
                lr=settings.lr,
                schedule=settings.schedule,
                trains_encoder=stage not in HEAD_ONLY_STAGES or not method.staged,
                uses_prototypes=stage > 1 and method.prototypes,
                uses_head=config.head.kind != "none" and (stage > 1 or not method.staged),
                may_grow=method.grows and stage in config.growth.stages and config.clusters.counts is None,
                schedule_epochs=(first, last) if method.staged else (1, sum(lengths)),
                continues=bool(plan) and not method.staged,
            )
        )
        first += epochs
    return tuple(plan)


def total_epochs(plan: Sequence[StagePlan]) -> int:
    """Epochs of the whole run."""
    return sum(stage.epochs for stage in plan)


def stage_at(plan: Sequence[StagePlan], epoch: int) -> StagePlan:
    """The stage that this epoch belongs to.

    Raises:
        ValueError: the epoch lies outside the run.
    """
    for stage in plan:
        if stage.first_epoch <= epoch <= stage.last_epoch:
            return stage
    raise ValueError(f"epoch is {epoch}, but must be between 1 and {total_epochs(plan)}")


def learning_rate(stage: StagePlan, step: int, num_steps: int) -> float:
    """The learning rate of one step: `lr`, or ``lr/2 (1 + cos(pi step / steps))``.

    Args:
        stage: the stage.
        step: step within the stage's schedule, from 0.
        num_steps: steps of the whole schedule, at least 1.

    Raises:
        ValueError: `step` does not lie in 0..num_steps.
    """
    if num_steps < 1 or not 0 <= step <= num_steps:
        raise ValueError(f"step is {step} of {num_steps}, but must be between 0 and their number")
    if stage.schedule == "constant":
        return stage.lr
    return stage.lr * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
