"""What ends a search: its trials, hours, GPU-hours or epochs, whichever comes first.

When all trials are drawn, those that run go on as ASHA decides. When hours, GPU-hours or
epochs are used up, no trial is drawn any more, and what runs finishes its epoch. The plan
says beforehand which of these is expected to come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The limits of one search; None: no such limit."""

    trials: int
    """Trials to draw."""
    hours: float | None = None
    """Wall time, all sessions of the search together."""
    gpu_hours: float | None = None
    """GPUs times hours, of all trials together; half a GPU for two hours is one."""
    epochs: int | None = None
    """Epochs that all trials together train; a shared one counts once."""

    def exhausted(self, *, trials_begun: int, seconds: float, gpu_seconds: float, epochs: int) -> str | None:
        """What is used up and so ends the search, in words; None while it may go on.

        Args:
            trials_begun: trials drawn; only told, since drawing the last one ends no running trial.
            seconds: wall time of the search so far.
            gpu_seconds: GPUs times seconds so far, of all trials.
            epochs: epochs trained so far, by all trials.

        Example:
            >>> Budget(32, gpu_hours=2).exhausted(trials_begun=7, seconds=9000, gpu_seconds=7200, epochs=90)
            '2 GPU-hours are used up (7 of 32 trials begun)'
        """
        spent = {"hour": seconds / 3600, "GPU-hour": gpu_seconds / 3600, "epoch": epochs}
        over = [(limit, unit) for limit, unit in self._limits() if spent[unit] >= limit]
        if not over:
            return None
        verb = "is" if len(over) == 1 and over[0][0] == 1 else "are"
        return f"{_named(over)} {verb} used up ({trials_begun} of {_count(self.trials, 'trial')} begun)"

    def binding(
        self,
        *,
        expected_epochs: float,
        seconds_per_epoch: float | None,
        trials_at_a_time: int,
        gpus_per_trial: float,
    ) -> str:
        """Which limit is expected to end the search, in words for the plan.

        Args:
            expected_epochs: epochs that all trials together are expected to train.
            seconds_per_epoch: of one trial while the others run, as measured; None: not measured,
                so that hours cannot be compared with epochs.
            trials_at_a_time: trials that run at a time, at least 1.
            gpus_per_trial: GPUs that a trial holds; 0 where trials use none.

        Example:
            >>> Budget(16, epochs=100).binding(
            ...     expected_epochs=260, seconds_per_epoch=None, trials_at_a_time=2, gpus_per_trial=0)
            '100 epochs, before the about 260 of 16 trials'
        """
        allowed: list[tuple[float, tuple[float, str]]] = []  # epochs that a limit has room for
        unknown, never = [], []
        for limit, unit in self._limits():
            if unit == "epoch":
                allowed.append((limit, (limit, unit)))
            elif unit == "GPU-hour" and gpus_per_trial == 0:
                never.append((limit, unit))
            elif seconds_per_epoch is None:
                unknown.append((limit, unit))
            else:
                held = gpus_per_trial if unit == "GPU-hour" else 1 / trials_at_a_time
                allowed.append((limit * 3600 / (held * seconds_per_epoch), (limit, unit)))
        trials = _count(self.trials, "trial")
        room, first = min(allowed, default=(expected_epochs, (0.0, "")))
        if room >= expected_epochs:
            parts = [f"{trials}, after about {expected_epochs:.0f} epochs"]
        elif first[1] == "epoch":
            parts = [f"{_count(*first)}, before the about {expected_epochs:.0f} of {trials}"]
        else:
            parts = [f"{_count(*first)}, after about {room:.0f} of the about {expected_epochs:.0f} epochs of {trials}"]
        if unknown:
            parts.append(f"whether {_named(unknown, 'or')} come first is known with a measured epoch only (--measure)")
        if never:
            parts.append(f"never {_named(never)}: the trials use no GPU")
        return "; ".join(parts)

    def _limits(self) -> list[tuple[float, str]]:
        """The limits beside the trials, each with its unit."""
        limits = ((self.hours, "hour"), (self.gpu_hours, "GPU-hour"), (self.epochs, "epoch"))
        return [(limit, unit) for limit, unit in limits if limit is not None]


def _named(limits: Sequence[tuple[float, str]], word: str = "and") -> str:
    return f" {word} ".join(_count(limit, unit) for limit, unit in limits)


def _count(amount: float, unit: str) -> str:
    return f"{amount:.6g} {unit}{'' if amount == 1 else 's'}"
