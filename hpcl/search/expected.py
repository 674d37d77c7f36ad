"""How much a search is expected to train: epochs, and seconds where an epoch was measured. Numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpcl.search.params import Choice, Param
from hpcl.search.prefixes import EPOCHS, PrefixPlan
from hpcl.search.space import Space
from hpcl.sections import STAGES
from hpcl.stages import stage_lengths


@dataclass(frozen=True)
class Lengths:
    """Epochs of a trial that is not stopped."""

    least: int
    typical: tuple[float, float, float, float, float]
    """Mean length of each of the five stages over the searched ranges."""
    most: int


@dataclass(frozen=True)
class Measured:
    """What an epoch of a trial takes."""

    seconds: tuple[float, float, float, float, float]
    """Seconds of an epoch in each of the five stages; the four with prototypes are taken as equal."""
    device: str
    """Where it was measured, for example `cpu`."""


@dataclass(frozen=True)
class Expected:
    """What a search is expected to train, in epochs or in seconds of a trial."""

    work: float
    """Of all trials and prefixes together, with ASHA."""
    wall: float
    """From start to end, so many trials at a time."""
    work_saved: float
    """What shared prefixes spare of the work, if each of them is drawn by some trial."""
    wall_saved: float
    """What they spare of the way from start to end: less, for slots stand empty while the first ones train."""


def expect(
    space: Space,
    shared: PrefixPlan | None,
    rungs: Sequence[float],
    at_a_time: int,
    per_epoch: Sequence[float] = EPOCHS,
) -> Expected:
    """What a search is expected to train.

    Args:
        space: the checked space.
        shared: its prefixes.
        rungs: its rungs on the clock.
        at_a_time: trials at a time.
        per_epoch: seconds of an epoch of each of the five stages; left out: epochs are counted.
    """
    search, lengths = space.search, trial_lengths(space)
    work = expected_work(
        search.trials,
        space.epochs,
        rungs,
        search.factor,
        start=shared.fork_time if shared else 0.0,
        min_peers=search.min_peers,
        brackets=search.brackets,
        cost=lambda time: _time_until(time, space, lengths, per_epoch),
    )
    if shared is None:
        return Expected(work, work / at_a_time, 0.0, 0.0)
    work += shared.work(per_epoch)
    saved, idle = shared.saved(search.trials, per_epoch), shared.idle(at_a_time, per_epoch)
    return Expected(work, (work + idle) / at_a_time, saved, (saved - idle) / at_a_time)


def survivors(arrivals: float, factor: float, min_peers: int = 1) -> float:
    """Trials that go on from a rung to which `arrivals` trials come one after another.

    ASHA lets the first `min_peers` go on; the j-th goes on if it reaches the (1 - 1/factor)
    quantile of the j - 1 before it. If every order of the trials is equally likely, that has
    the probability (j - 2 + factor) / (factor · j), exactly so for values drawn uniformly. The
    sum over j is a little more than arrivals / factor: the price of not waiting. Fractional
    arrivals are interpolated.
    """

    def goes_on(j: int) -> float:
        return 1.0 if j <= min_peers else (j - 2 + factor) / (factor * j)

    whole = int(arrivals)
    return sum(map(goes_on, range(1, whole + 1))) + (arrivals - whole) * goes_on(whole + 1)


def expected_work(
    trials: float,
    total: float,
    rungs: Sequence[float],
    factor: float,
    *,
    start: float = 0.0,
    min_peers: int = 1,
    brackets: int = 1,
    cost: Callable[[float], float] = lambda time: time,
) -> float:
    """Epochs that ASHA is expected to let `trials` trials train, or what else they cost.

    ``n_0 (r_0 - start) + n_1 (r_1 - r_0) + ... + n_s (total - r_(s-1))`` with rungs r, n_0 the
    trials and n_(i+1) = `survivors(n_i)`. Trials that improve during the search, as TPE's
    should, make it somewhat more. Of several brackets, bracket b is dealt trials in
    proportion to ``e^(number of its rungs)`` (as Ray does) and leaves out b rungs.

    Args:
        trials: number of trials.
        total: where a trial ends.
        rungs: where ASHA decides, ascending.
        factor: at a rung about 1 in `factor` goes on.
        start: where trials fork from what they share.
        min_peers: as `survivors`.
        brackets: number of brackets.
        cost: from the start of a schedule to a time; the time itself gives epochs.

    Example:
        >>> expected_work(16, 20, [], 2)
        320.0
    """
    weights = [math.exp(-b) for b in range(brackets)]
    spent = 0.0
    for bracket, weight in enumerate(weights):
        running, before = trials * weight / sum(weights), start
        for rung in (*rungs[bracket:], total):
            spent += running * (cost(rung) - cost(before))
            running, before = survivors(running, factor, min_peers), rung
    return spent


def trial_lengths(space: Space) -> Lengths:
    """Epochs of a trial: they differ where stage lengths are searched and `stages.total` is null."""
    base = stage_lengths(space.base.stages)
    if space.base.stages.total is not None:
        return Lengths(sum(base), base, sum(base))
    spans = [(float(n), float(n), float(n)) for n in base]
    for i, stage in enumerate(STAGES):
        param = space.params.get(f"stages.stage{stage}.epochs")
        if param is not None:
            ends = [*param.ends(), *([base[i]] if param.when else [])]
            spans[i] = (min(ends), _mean(param), max(ends))
    one, two, three, four, five = (typical for _, typical, _ in spans)
    return Lengths(
        max(1, round(sum(low for low, _, _ in spans))),
        (one, two, three, four, five),
        round(sum(high for *_, high in spans)),
    )


def _time_until(time: float, space: Space, lengths: Lengths, per_epoch: Sequence[float]) -> float:
    """What a typical trial takes up to a time on the clock, with this time for an epoch of each stage."""
    spent, begin = 0.0, 0
    for base, typical, each in zip(stage_lengths(space.base.stages), lengths.typical, per_epoch, strict=True):
        part = min(max((time - begin) / base, 0.0), 1.0) if base else float(time >= begin)
        spent, begin = spent + part * typical * each, begin + base
    return spent


def _mean(param: Param) -> float:
    """Mean of a number that is searched, as it is first drawn."""
    if isinstance(param, Choice):
        return float(sum(param.choices) / len(param.choices))
    if param.log:
        return (param.high - param.low) / math.log(param.high / param.low)
    return (param.low + param.high) / 2
