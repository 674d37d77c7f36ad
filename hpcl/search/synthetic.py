"""Learning curves without learning: families with known optima, for tests and benchmarks of the search.

A curve rises from chance (0.1) to ``0.1 + 0.7 · quality`` along ``1 - exp(-s/tau)``, where s is the
place in the schedule (0 to 1, by the base's stage lengths) and quality is 1 at one point of the space
and falls off around it. A :class:`Family` adds what makes real curves hard to compare early:

- drops: at each growth of the clusters the value falls by a fraction and recovers within a few epochs;
  how often and when depends on ``clusters.multiplier`` and ``growth.window``;
- noise: of each epoch, normal;
- slow starters: the better a trial will be, the later it rises, so that curves cross;
- divergence: above a learning rate a trial has a good curve and then NaN; the optimum lies just below;
- lengths: the stages' lengths are searched, so that equal epochs are different places of the schedule.

No torch, ray or optuna here; the same curves serve a simulator and scripted trainers in real processes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcl.config import Config
from hpcl.rng import seed_of
from hpcl.search.clock import StageClock
from hpcl.search.params import Choice, Float, Int, Param, Resources, Search
from hpcl.search.space import Space
from hpcl.stages import stage_lengths

CHANCE = 0.1
"""Every curve's value before training."""

BEST = 0.8
"""Final value of the best point of every family."""

LENGTHS = (4, 2, 12, 2, 16)
"""Base lengths of the five stages, 36 epochs together."""

_PARAMS: dict[str, Param] = {
    "stages.stage3.lr": Float(low=0.006, high=0.3, log=True),
    "moco.temperature": Float(low=0.05, high=0.5, log=True),
    "prototypes.weight": Float(low=0.1, high=3.0, log=True),
    "clusters.multiplier": Float(low=1.2, high=3.0, log=True),
    "growth.window": Int(low=1, high=5),
    "topk.mode": Choice(choices=("replace", "add", "none")),
}
_LENGTHS: dict[str, Param] = {
    "stages.stage3.epochs": Int(low=6, high=24),
    "stages.stage5.epochs": Int(low=8, high=32),
}
_STEEP = {"stages.stage3.lr": 4.0, "moco.temperature": 2.5, "prototypes.weight": 1.0}
_MILD = 0.4
_MODES = (1.0, 0.93, 0.85)


@dataclass(frozen=True)
class Curve:
    """One trial's curve, whole, whether or not anybody trains it to the end."""

    values: tuple[float | None, ...]
    """The metric after each epoch; None where it has no value yet; NaN, only in the last place: the trial
    diverges there."""
    times: tuple[float, ...]
    """Canonical time (base epochs) after each epoch."""
    seconds: tuple[float, ...]
    """Duration of each epoch."""
    final: float
    """The last value without noise; chance where the trial diverges."""

    @property
    def diverges(self) -> bool:
        """Whether the last value is not finite."""
        last = self.values[-1]
        return last is not None and not math.isfinite(last)


@dataclass(frozen=True)
class Family:
    """What is hard about a family's curves; the defaults are smooth curves that seldom cross."""

    about: str
    """In a few words."""
    noise: float = 0.0
    """Standard deviation of each epoch's noise."""
    drop: float = 0.0
    """Fraction of the value that is lost at a growth."""
    slow: float = 0.0
    """Natural logarithm of how much slower the best trial rises than the worst."""
    unstable: float = 0.0
    """Fraction of the learning rate's (logarithmic) range above which trials diverge."""
    lengths: bool = False
    """Whether the lengths of stages 3 and 5 are searched."""


FAMILIES: dict[str, Family] = {
    "smooth": Family("saturating curves"),
    "noise": Family("noise of 0.04 each epoch", noise=0.04),
    "growth": Family("falls by 40 % at each growth", noise=0.01, drop=0.4),
    "slow": Family("the best start 6 times slower", noise=0.01, slow=1.8),
    "divergence": Family("the upper third of learning rates diverges", noise=0.01, unstable=0.33),
    "lengths": Family("stages 3 and 5 of searched length", noise=0.01, lengths=True),
    "all": Family("all of it", noise=0.02, drop=0.3, slow=1.0, unstable=0.2, lengths=True),
}
"""The families by name."""


class Synthetic:
    """A family's curves over fields of the configuration, with the optimum and the base drawn from a seed.

    Args:
        family: what is hard.
        seed: of the optimum, the base's values (trial 0) and the noise, and of the sampler.
        search: settings of the search; its metric must be one where more is better.
    """

    best = BEST
    """Final value of the best point."""
    size: int | None = None
    """Most trials there are curves for; None: any number."""

    def __init__(self, family: Family, seed: int, search: Search | None = None) -> None:
        chance = random.Random(seed_of(seed, "synthetic"))
        params = {**_PARAMS, **(_LENGTHS if family.lengths else {})}
        self._family, self._seed = family, seed
        self._at = {path: chance.uniform(0.2, 0.8) for path in params}
        if family.unstable:
            self._at["stages.stage3.lr"] = 1 - family.unstable - 0.05
        self._modes = chance.sample(_MODES, len(_MODES))
        start = {path: _draw(param, chance) for path, param in params.items()}
        if family.unstable:
            start["stages.stage3.lr"] = _PARAMS["stages.stage3.lr"].nearest(0.02)
        lengths = {f"stages.stage{i}.epochs": n for i, n in enumerate(LENGTHS, start=1)}
        # The base keeps its lengths: its stages define the clock and the rungs.
        base = Config().with_values({**start, **lengths})
        chosen = (search or Search(grace=4, factor=3)).model_copy(update={"seed": seed})
        self.space = Space("synthetic", base, params, chosen, Resources())
        self._clock = StageClock(base, "stage")
        self.total = self._clock.total
        """Canonical time at the end of a schedule."""
        self.longest = 36 if not family.lengths else 8 + 24 + 32
        """Epochs of the longest schedule."""

    def quality(self, values: Mapping[str, Any]) -> float:
        """Between 0 and 1; 1 at the optimum. Learning rate and temperature act together."""
        params = self.space.params
        off = {path: unit(params[path], values[path]) - at for path, at in self._at.items() if path != "topk.mode"}
        off["stages.stage3.lr"] += 0.4 * off["moco.temperature"]
        far = sum(_STEEP.get(path, _MILD) * distance**2 for path, distance in off.items())
        return math.exp(-far) * self._modes[_PARAMS["topk.mode"].grid().index(values["topk.mode"])]

    def curve(self, number: int, values: Mapping[str, Any]) -> Curve:
        """The curve of the trial drawn in this place with these values by config path; a pure function."""
        family, quality = self._family, self.quality(values)
        config = self.space.base.with_values(dict(values))
        lengths = stage_lengths(config.stages)
        times = tuple(self._clock.time(lengths, epoch) for epoch in range(1, sum(lengths) + 1))
        chance = random.Random(seed_of(self._seed, "synthetic-curve", number))
        speed = unit(_PARAMS["stages.stage3.lr"], values["stages.stage3.lr"]) - 0.5
        tau = 0.12 * math.exp(family.slow * quality - 0.5 * speed)
        growths = self._growths(values) if family.drop else ()
        final = CHANCE + (BEST - CHANCE) * quality
        levels: list[float | None] = []
        for time in times:
            place = time / self.total
            level = CHANCE + (final - CHANCE) * math.expm1(-place / tau) / math.expm1(-1 / tau)
            for growth in growths:
                if place >= growth:
                    level *= 1 - family.drop * math.exp((growth - place) / 0.05)
            levels.append(level + family.noise * chance.gauss(0, 1))
        pace = math.exp(0.2 * chance.gauss(0, 1))
        seconds = tuple(pace * chance.uniform(0.9, 1.1) for _ in times)
        edge = unit(_PARAMS["stages.stage3.lr"], values["stages.stage3.lr"]) > 1 - family.unstable
        if edge and family.unstable:
            last = chance.randint(2, len(times) // 2)
            return Curve((*levels[: last - 1], math.nan), times[:last], seconds[:last], CHANCE)
        return Curve(tuple(levels), times, seconds, final)

    def _growths(self, values: Mapping[str, Any]) -> tuple[float, ...]:
        """Places of the schedule where the clusters grow: in stage 3, and once early in stage 5."""
        wait = unit(_PARAMS["growth.window"], values["growth.window"])
        count = 3 - round(2 * unit(_PARAMS["clusters.multiplier"], values["clusters.multiplier"]))
        first = sum(LENGTHS[:2]) / sum(LENGTHS)
        step = (0.06 + 0.06 * wait) * (4 - count) / 2
        return (*(first + step * (i + 1) for i in range(count)), 0.62 + 0.1 * wait)


def unit(param: Param, value: Any) -> float:
    """A number's place in its range, 0 to 1 (of the logarithm where `log`); a choice's place in its list."""
    if isinstance(param, Choice):
        return param.grid().index(value) / (len(param.choices) - 1)
    ends: Sequence[float] = (param.low, value, param.high)
    low, at, high = (math.log(x) for x in ends) if param.log else ends
    return (at - low) / (high - low)


def _draw(param: Param, chance: random.Random) -> Any:
    if isinstance(param, Choice):
        return chance.choice(param.choices)
    at = chance.random()
    value = param.low * (param.high / param.low) ** at if param.log else param.low + (param.high - param.low) * at
    return param.nearest(value)
