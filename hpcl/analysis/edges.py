"""A searched range, extended beyond an edge or narrowed to a part of itself: ranges in, ranges out."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError

from hpcl.analysis.ranges import LEVEL, Seen
from hpcl.config import Config
from hpcl.search.params import Float, Int

BEYOND = 0.5
"""How far a range is extended beyond an edge, in lengths of the range on its scale."""
MARGIN = 0.1
"""What is left around the good trials, at each side."""
LEAST_WIDTH = 0.25
"""No range is narrowed to less of itself."""
NOT_WORTH = 0.9
"""Narrowing to more than this is left."""

Number = Float | Int


def extended(param: Number, seen: Seen, best: Any, base: Config, path: str) -> tuple[Number, str]:
    """The range beyond the edges at which the best trials lie, as far as the configuration allows.

    Where the field matters besides, the far end comes nearer, to the good trials.

    Args:
        param: the range.
        seen: with at least one edge.
        best: the robust best's value; None where the field did not act there.
        base: the configuration that values are tried in.
        path: the field.

    Returns:
        The range, and what to add to the verdict: nothing, or that the field goes no further.
    """
    low, high = param.low, param.high
    stuck = []
    if "low" in seen.edges:
        low = _beyond(param, -BEYOND, base, path)
        stuck += ["low"] * (low == param.low)
    if "high" in seen.edges:
        high = _beyond(param, 1 + BEYOND, base, path)
        stuck += ["high"] * (high == param.high)
    if seen.p_corrected <= LEVEL:
        inner = narrowed(param, seen.span, best)
        low = low if "low" in seen.edges else inner.low
        high = high if "high" in seen.edges else inner.high
    text = f", and allows nothing beyond its {' and '.join(stuck)} end" if stuck else ""
    return _with(param, low, high), text


def narrowed(param: Number, span: tuple[float, float], best: Any = None) -> Number:
    """The part of the range in which the good trials and the best one lie, with MARGIN, at least LEAST_WIDTH.

    Args:
        param: the range.
        span: least and largest position of the good trials, 0..1.
        best: a value that stays in the range; None: none.
    """
    places = [*span, *([] if best is None else [position(param, float(best))])]
    low, high = min(places) - MARGIN, max(places) + MARGIN
    if (lacking := LEAST_WIDTH - (high - low)) > 0:
        low, high = low - lacking / 2, high + lacking / 2
    # At an end of the range the width that lies outside is given to the other side.
    low, high = max(0.0, low - max(0.0, high - 1)), min(1.0, high + max(0.0, -low))
    if high - low > NOT_WORTH:
        return param
    if param.step is not None and not (isinstance(param, Int) and param.step == 1):
        steps = round((param.high - param.low) / param.step)
        first, last = math.floor(low * steps), math.ceil(high * steps)
        return _with(
            param, param.low + first * param.step, param.high if last >= steps else param.low + last * param.step
        )
    ends = (_rounded(value_at(param, low), math.floor, param), _rounded(value_at(param, high), math.ceil, param))
    return _with(param, max(param.low, ends[0]), min(param.high, ends[1]))


def position(param: Number, value: float) -> float:
    """Place of a value in the range, 0 at the low end and 1 at the high one, on the scale that is sampled."""
    if param.log:
        return math.log(value / param.low) / math.log(param.high / param.low) if value > 0 else 0.0
    return (value - param.low) / (param.high - param.low)


def value_at(param: Number, place: float) -> float:
    """The value at a place, which may lie beyond 0 and 1."""
    if param.log:
        return float(param.low * (param.high / param.low) ** place)
    return float(param.low + place * (param.high - param.low))


def _beyond(param: Number, place: float, base: Config, path: str) -> float:
    """The value at a place beyond the range, or the farthest on the way there that the configuration allows."""
    up = place > 1
    end = param.high if up else param.low
    if param.step is not None and not (isinstance(param, Int) and param.step == 1):
        steps = math.ceil(BEYOND * (param.high - param.low) / param.step)
        each = param.step if up else -param.step
        return next((end + i * each for i in range(steps, 0, -1) if _allowed(base, path, end + i * each)), end)
    far = value_at(param, place)
    if isinstance(param, Int):
        far = max(end + 1.0, math.ceil(far)) if up else min(end - 1.0, math.floor(far))
        far = max(far, 1.0) if param.log else far
    inward = math.floor if up else math.ceil

    def sound(value: float) -> float | None:
        """The value with few digits, if it is allowed and beyond the end."""
        for way in (round, inward):  # a bound such as 4.0 is met exactly, one that is excluded is kept clear of
            rounded = _rounded(value, way, param)
            if (rounded > end if up else rounded < end) and _allowed(base, path, rounded):
                return rounded
        return None

    if (found := sound(far)) is not None:
        return found
    good, bad = float(end), far
    for _ in range(20):  # to a millionth of the way: more than 3 digits need, and no more than rounding forgives
        middle = (good + bad) / 2
        exact = inward(middle) if isinstance(param, Int) else middle
        good, bad = (middle, bad) if _allowed(base, path, exact) else (good, middle)
    found = sound(good)
    return end if found is None else found


def _allowed(base: Config, path: str, value: float) -> bool:
    try:
        base.with_values({path: value})
    except ValidationError:
        return False
    return True


def _rounded(value: float, way: Any, param: Number) -> float:
    """The value with 3 digits (whole for an int), in the given direction."""
    if isinstance(param, Int):
        return int(way(value - 1e-9) if way is math.ceil else way(value + 1e-9) if way is math.floor else way(value))
    if value == 0:
        return 0.0
    # Digits of the range, not of the value: 0.00012 on [0, 1] is 0.
    scale = abs(value) if param.log else max(abs(param.high - param.low), 1e-300)
    unit = 10.0 ** (math.floor(math.log10(scale)) - 2)
    return float(f"{way(value / unit) * unit:.10g}")


def _with(param: Number, low: float, high: float) -> Number:
    if isinstance(param, Int):
        low, high = int(low), int(high)
    if not low < high:  # rounding has met in the middle
        low, high = param.low, param.high
    return param.model_copy(update={"low": low, "high": high})
