"""How many clusters there are, and when their number grows. Numbers in, decision out.

The count sequence is ``next(k) = max(k + 1, ceil(m k))`` with the cluster
multiplier m; L consecutive counts of it are in use at once, and a growth moves
all of them one place on. Three policies decide when, behind one interface::

    decision = policy.update(epoch, acc_proto, acc_inst, next_finest=36)

`Window` is the sliding window of the research notes (seed 002, improvements 1
to 3), `Plateau` their earlier rule, `Fixed` a clock. A policy is asked once per
epoch, after it, in the stages that may grow; its state is plain JSON and part of
every checkpoint. Every decision carries the number of the rule that made it:

    1. the next finest count would exceed the largest one allowed: hold
    2. too little seen at this count: hold
    3. acc_proto still gains: hold
    4. acc_inst still gains: hold
    5. grow

Accuracies are fractions in 0..1; epochs are counted from 1 over the whole run.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hpcl.sections import Growth

PLATEAU_GAIN = 0.01
"""Relative gain below which `Plateau` calls an accuracy flat (notes: 1 %)."""

SMALLEST_BEST = 1e-6
"""Floor of the divisor of a relative gain, so that a first gain from 0 is finite."""


def next_count(k: int, multiplier: float) -> int:
    """The count after k in the sequence: ``max(k + 1, ceil(m k))``.

    The multiplier is taken as the decimal number it was written as: 1.1 times 50
    is 55 here, not the 55.00000000000001 of binary floats that ceil makes 56.

    Args:
        k: number of clusters, at least 1.
        multiplier: cluster multiplier m, above 0 (the notes use 1.7).

    Example:
        >>> next_count(7, 1.7)
        12
    """
    if k < 1:
        raise ValueError(f"k is {k}, but must be >= 1")
    return max(k + 1, math.ceil(Fraction(repr(float(multiplier))) * k))


def level_counts(first: int, multiplier: float, index: int, levels: int) -> tuple[int, ...]:
    """The counts in use at once, coarse to fine: members t to t + L - 1 of the sequence.

    Args:
        first: first member of the sequence (member 0), at least 1.
        multiplier: cluster multiplier m.
        index: t, growths so far; at least 0.
        levels: L, at least 1.

    Example:
        >>> level_counts(2, 1.7, index=1, levels=3)
        (4, 7, 12)
    """
    if index < 0 or levels < 1:
        raise ValueError(f"index is {index} and levels is {levels}, but must be >= 0 and >= 1")
    sequence = [first]
    while len(sequence) < index + levels:
        sequence.append(next_count(sequence[-1], multiplier))
    return tuple(sequence[index:])


@dataclass(frozen=True)
class Decision:
    """What a policy decided after one epoch."""

    grow: bool
    """Whether the next epoch uses the next counts of the sequence."""
    reason: str
    """The rule's number, then its figures: `3: acc_proto 0.412 > 0.390 of the window`."""
    theta: float | None = None
    """Threshold on the gain of acc_inst that held in this decision; None where the
    policy has no such threshold."""


class Window:
    """The notes' sliding window: grow when neither accuracy beats its recent best.

    With W epochs in the window, ``gain = (acc_inst - best) / max(best, 1e-6)`` and
    ``theta(e) = theta_end + (theta_0 - theta_end) (1 - e/E)^gamma + j step``:

    1. next finest count > the largest allowed: hold (nothing is stored)
    2. fewer than W epochs in the window: store, hold
    3. acc_proto > best acc_proto of the window * (1 + theta_p): store, hold
    4. gain > theta(e): j += 1, store, hold
    5. grow: j = 0 and the window is emptied; the epoch belongs to the old count
       and is not stored

    `max_hold` epochs at one count override 3 and 4. theta may be negative: late in
    training acc_inst may fall for an epoch (notes, thought 3).

    Args:
        settings: the `growth` section of the configuration.
        total_epochs: E, epochs of the whole run.
        max_clusters: largest count allowed on the finest level.
    """

    def __init__(self, settings: Growth, total_epochs: int, max_clusters: int) -> None:
        self._settings = settings
        self._total_epochs = total_epochs
        self._max_clusters = max_clusters
        self._proto: deque[float] = deque(maxlen=settings.window)
        self._inst: deque[float] = deque(maxlen=settings.window)
        self._raises = 0
        self._held = 0

    def theta(self, epoch: int) -> float:
        """The threshold on the relative gain of acc_inst at this epoch, raises included."""
        s = self._settings
        left = max(0.0, 1.0 - epoch / self._total_epochs)
        return s.theta_end + (s.theta_start - s.theta_end) * math.pow(left, s.gamma) + self._raises * s.step

    def update(self, epoch: int, acc_proto: float, acc_inst: float, *, next_finest: int) -> Decision:
        """The decision after `epoch`.

        Args:
            epoch: absolute epoch, from 1.
            acc_proto: mean top-1 of the prototype logits in this epoch, 0..1.
            acc_inst: mean top-1 of the InfoNCE logits in this epoch, 0..1.
            next_finest: count of the finest level if the clusters grew now.

        Raises:
            ValueError: an accuracy is not a finite number.
        """
        _check_finite(acc_proto=acc_proto, acc_inst=acc_inst)
        s = self._settings
        self._held += 1
        theta = self.theta(epoch)
        if next_finest > self._max_clusters:
            return Decision(False, _at_most(next_finest, self._max_clusters), theta)
        if len(self._proto) < s.window:
            self._store(acc_proto, acc_inst)
            return Decision(False, f"2: {len(self._proto)} of {s.window} epochs in the window", theta)

        bar = max(self._proto) * (1.0 + s.theta_proto)
        gain = _gain(acc_inst, max(self._inst))
        overrides = ""
        if acc_proto > bar:
            overrides = f"3: acc_proto {acc_proto:.4g} > {bar:.4g} of the window"
        elif gain > theta:
            overrides = f"4: acc_inst gained {gain:.4g} > theta {theta:.4g}"
        forced = s.max_hold is not None and self._held >= s.max_hold
        if overrides and not forced:
            self._raises += overrides.startswith("4")
            self._store(acc_proto, acc_inst)
            return Decision(False, overrides, theta)

        if overrides:
            reason = f"5: {self._held} epochs at this count, max_hold {s.max_hold} (over {overrides})"
        else:
            reason = f"5: acc_proto {acc_proto:.4g} <= {bar:.4g}, acc_inst gained {gain:.4g} <= theta {theta:.4g}"
        self._raises = 0
        self._held = 0
        self.clear()
        return Decision(True, reason, theta)

    def clear(self) -> None:
        """Empty the window, at a stage switch. The raises of theta and the epochs at
        this count stay: only a growth undoes them."""
        self._proto.clear()
        self._inst.clear()

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on, as plain JSON."""
        return {
            "policy": "window",
            "proto": list(self._proto),
            "inst": list(self._inst),
            "raises": self._raises,
            "held": self._held,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; the next decisions are those of an unbroken run.

        Raises:
            ValueError: the state is another policy's.
        """
        _check_policy(state, "window")
        self._proto = deque(state["proto"], maxlen=self._settings.window)
        self._inst = deque(state["inst"], maxlen=self._settings.window)
        self._raises = int(state["raises"])
        self._held = int(state["held"])

    def _store(self, acc_proto: float, acc_inst: float) -> None:
        self._proto.append(acc_proto)
        self._inst.append(acc_inst)


class Plateau:
    """The notes' earlier rule: grow when both accuracies gained less than 1 %.

    Compared with the mean of the earlier epochs at this count; after `patience`
    such epochs in a row the clusters grow. Its rule 2 covers the first epoch at a
    count and the epochs within the patience. `max_hold` overrides rules 2 to 4.

    Args:
        settings: the `growth` section of the configuration.
        max_clusters: largest count allowed on the finest level.
    """

    def __init__(self, settings: Growth, max_clusters: int) -> None:
        self._settings = settings
        self._max_clusters = max_clusters
        self._held = 0
        self._seen = 0
        self._flat = 0
        self._sum_proto = 0.0
        self._sum_inst = 0.0

    def update(self, epoch: int, acc_proto: float, acc_inst: float, *, next_finest: int) -> Decision:
        """The decision after `epoch`; arguments and errors as `Window.update`."""
        _check_finite(acc_proto=acc_proto, acc_inst=acc_inst)
        s = self._settings
        self._held += 1
        if next_finest > self._max_clusters:
            return Decision(False, _at_most(next_finest, self._max_clusters))

        reason = self._why_hold(acc_proto, acc_inst)
        if reason and s.max_hold is not None and self._held >= s.max_hold:
            grow, reason = True, f"5: {self._held} epochs at this count, max_hold {s.max_hold} (over {reason})"
        elif reason:
            grow = False
        else:
            grow, reason = True, f"5: {self._flat} epochs with both gains below {PLATEAU_GAIN:g}"
        if grow:
            self._held = 0
            self.clear()
        else:
            self._seen += 1
            self._sum_proto += acc_proto
            self._sum_inst += acc_inst
        return Decision(grow, reason)

    def _why_hold(self, acc_proto: float, acc_inst: float) -> str:
        """The rule that holds, or nothing; counts the epochs without gain."""
        if not self._seen:
            return "2: first epoch at this count"
        gains = {
            "3: acc_proto": _gain(acc_proto, self._sum_proto / self._seen),
            "4: acc_inst": _gain(acc_inst, self._sum_inst / self._seen),
        }
        for name, gain in gains.items():
            if gain >= PLATEAU_GAIN:
                self._flat = 0
                return f"{name} gained {gain:.4g} >= {PLATEAU_GAIN:g} over the mean at this count"
        self._flat += 1
        if self._flat < self._settings.patience:
            return f"2: {self._flat} of {self._settings.patience} epochs without a gain"
        return ""

    def clear(self) -> None:
        """Forget the accuracies seen, at a stage switch; the epochs at this count stay."""
        self._seen = 0
        self._flat = 0
        self._sum_proto = 0.0
        self._sum_inst = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on, as plain JSON."""
        return {
            "policy": "plateau",
            "held": self._held,
            "seen": self._seen,
            "flat": self._flat,
            "sum_proto": self._sum_proto,
            "sum_inst": self._sum_inst,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`. Raises ValueError for another policy's."""
        _check_policy(state, "plateau")
        self._held = int(state["held"])
        self._seen = int(state["seen"])
        self._flat = int(state["flat"])
        self._sum_proto = float(state["sum_proto"])
        self._sum_inst = float(state["sum_inst"])


class Fixed:
    """Grow every `hold` epochs (or `max_hold`, where that is smaller), whatever the accuracies.

    Args:
        settings: the `growth` section of the configuration.
        max_clusters: largest count allowed on the finest level.
    """

    def __init__(self, settings: Growth, max_clusters: int) -> None:
        self._hold = min(settings.hold, settings.max_hold or settings.hold)
        self._max_clusters = max_clusters
        self._held = 0

    def update(self, epoch: int, acc_proto: float, acc_inst: float, *, next_finest: int) -> Decision:
        """The decision after `epoch`; arguments as `Window.update`, the accuracies are not read."""
        self._held += 1
        if next_finest > self._max_clusters:
            return Decision(False, _at_most(next_finest, self._max_clusters))
        if self._held < self._hold:
            return Decision(False, f"2: {self._held} of {self._hold} epochs at this count")
        self._held = 0
        return Decision(True, f"5: {self._hold} epochs at this count")

    def clear(self) -> None:
        """Nothing to forget at a stage switch: the epochs at this count go on."""

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on, as plain JSON."""
        return {"policy": "fixed", "held": self._held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`. Raises ValueError for another policy's."""
        _check_policy(state, "fixed")
        self._held = int(state["held"])


Policy = Window | Plateau | Fixed
"""Any of the three."""


def make_policy(settings: Growth, total_epochs: int, max_clusters: int) -> Policy:
    """The policy that the configuration names.

    Args:
        settings: the `growth` section of the configuration.
        total_epochs: E, epochs of the whole run, at least 1.
        max_clusters: largest count allowed on the finest level.
    """
    if total_epochs < 1:
        raise ValueError(f"total_epochs is {total_epochs}, but must be >= 1")
    if settings.policy == "window":
        return Window(settings, total_epochs, max_clusters)
    if settings.policy == "plateau":
        return Plateau(settings, max_clusters)
    return Fixed(settings, max_clusters)


def _gain(value: float, best: float) -> float:
    """Relative gain of an accuracy over an earlier one."""
    return (value - best) / max(best, SMALLEST_BEST)


def _at_most(next_finest: int, max_clusters: int) -> str:
    return f"1: next finest count {next_finest} > {max_clusters} clusters at most"


def _check_finite(**accuracies: float) -> None:
    # A NaN compares false with everything and would read as "no gain": grow.
    for name, value in accuracies.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, but must be a finite fraction")


def _check_policy(state: dict[str, Any], policy: str) -> None:
    if state.get("policy") != policy:
        raise ValueError(f"the state is of growth policy {state.get('policy')!r}, but this run uses {policy!r}")
