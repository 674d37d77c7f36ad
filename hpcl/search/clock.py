"""Where in the schedule a trial stands: the clock by which ASHA compares trials. Numbers in, numbers out.

With searched stage lengths, equal epochs are different stages in different trials. The
clock `stage` counts in canonical time instead: epoch i (from 1) of a stage with n epochs
in this trial lies at

    t = S + b i / n

with b the stage's length in the base configuration and S the base epochs of the stages
before it. So a time means the same place of the schedule in every trial, and stages end
at exactly S + b. A stage without base epochs takes no time: the clock stands still at S.
A stage that the trial leaves out is jumped over.

The clock `epoch` counts the trial's own epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hpcl.config import Config
from hpcl.stages import stage_lengths

TOLERANCE = 1e-9
"""Relative difference of two times that counts as an error of rounding."""


class StageClock:
    """Canonical time of an epoch.

    Args:
        base: the configuration whose stage lengths are the clock's unit.
        kind: `stage` (canonical time, in base epochs) or `epoch` (the trial's own epochs).

    Example:
        >>> clock = StageClock(Config())  # stages of 20, 5, 50, 5 and 70 epochs
        >>> clock.time((10, 5, 50, 5, 70), 5), clock.time((10, 5, 50, 5, 70), 11), clock.total
        (10.0, 21.0, 150.0)
    """

    def __init__(self, base: Config, kind: Literal["stage", "epoch"] = "stage") -> None:
        self.kind = kind
        self._base = stage_lengths(base.stages)

    @property
    def total(self) -> float:
        """Time at the end of the base's schedule: its number of epochs, with both clocks."""
        return float(sum(self._base))

    def time(self, lengths: Sequence[int], epoch: int) -> float:
        """The time after an epoch of a trial; never decreases with the epoch.

        Args:
            lengths: the trial's five stage lengths in epochs (:func:`hpcl.stages.stage_lengths`).
            epoch: counted from 1 over the whole run; 0 is the start.

        Raises:
            ValueError: the trial has no such epoch.
        """
        if not 0 <= epoch <= sum(lengths):
            raise ValueError(f"epoch is {epoch}, but must be between 0 and {sum(lengths)}, the trial's last")
        if self.kind == "epoch":
            return float(epoch)
        start, left = 0, epoch
        for base, length in zip(self._base, lengths, strict=True):
            if left <= length:
                break
            start, left = start + base, left - length
        # Whole numbers are multiplied first, so that a division without remainder is exact.
        return start + base * left / max(length, 1)


def rung_times(
    grace: float | None, factor: float, total: float, *, fork: float = 0.0, bracket: int = 0
) -> tuple[float, ...]:
    """The rungs of a bracket, ascending: ``fork + grace * factor^(k + bracket)`` below the schedule's end.

    Args:
        grace: time from the fork to the first rung of bracket 0, above 0; None: no rungs.
        factor: ratio of two rungs, above 1.
        total: the schedule's end; a rung there would come too late to stop anything.
        fork: time up to which trials share one run.
        bracket: rungs left out at the beginning.

    Raises:
        ValueError: `grace` or `factor` is out of range.

    Example:
        >>> rung_times(8, 2, 150), rung_times(8, 2, 150, fork=20, bracket=2)
        ((8.0, 16.0, 32.0, 64.0, 128.0), (52.0, 84.0, 148.0))
    """
    if grace is None:
        return ()
    if not grace > 0 or not factor > 1:
        raise ValueError(f"grace is {grace} and factor {factor}, but they must be > 0 and > 1")
    rungs: list[float] = []
    step = float(grace * factor**bracket)
    while not reached(fork + step, total):
        rungs.append(float(fork + step))
        step = float(grace * factor ** (bracket + len(rungs)))
    return tuple(rungs)


def reached(time: float, rung: float) -> bool:
    """Whether a time has come to a rung; an error of rounding does not put it off."""
    return time >= rung - TOLERANCE * max(1.0, abs(rung))
