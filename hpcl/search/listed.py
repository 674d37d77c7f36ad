"""Given runs in the place of a sampler: the configurations that a retraining trains, each with several seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcl.search.warm import Point


@dataclass(frozen=True)
class Run:
    """One run of a retraining: a trial's configuration with a seed."""

    trial: str
    """The trial of the search."""
    seed: int
    values: Mapping[str, Any]
    """By config path; without the seed."""

    @property
    def name(self) -> str:
        """Its id, and the name of its folder."""
        return f"{self.trial}-seed{self.seed}"


class Listed:
    """Hands out runs in their order; the methods are those of :class:`hpcl.search.sampler.Sampler`.

    It learns nothing, so what is told is dropped, and its trials have no number in a study.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)

    def name(self, number: int) -> str:
        """Id of the run with this number, from 0."""
        return self.runs[number].name

    def ask(self, number: int) -> tuple[dict[str, Any], None]:
        """The values of a run by config path, its seed among them."""
        run = self.runs[number]
        return {**run.values, "seed": run.seed}, None

    def report(self, optuna_number: int, value: float | None, step: int) -> None:
        """Nothing."""

    def tell(self, optuna_number: int, state: str, value: float | None = None) -> None:
        """Nothing."""

    def reconcile(self, known: Mapping[int, tuple[str, float | None]]) -> dict[int, int]:
        """Nothing."""
        return {}

    def close_running(self) -> None:
        """Nothing."""

    def add_finished(self, points: Iterable[Point]) -> int:
        """Nothing; 0 points were added."""
        return 0
