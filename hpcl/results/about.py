"""What is known about a search besides its tables: ``search.json`` and ``space.yaml``, each value looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpcl.errors import ConfigError
from hpcl.files import read_object
from hpcl.yamlio import load_tree

if TYPE_CHECKING:
    import pandas as pd

Mode = Literal["max", "min"]


@dataclass(frozen=True)
class About:
    """What is known about a search besides its tables."""

    name: str
    """Name of the folder."""
    kind: Literal["hpcl", "tune"] = "hpcl"
    """Who wrote it: this project, or Ray Tune."""
    state: str = "unknown"
    """finished, interrupted, failed, or running (also of one that was killed)."""
    metric: str | None = None
    """The curve that stopped trials, or by which trials are compared."""
    mode: Mode | None = None
    """Its better end; None: by its name (:data:`~hpcl.results.LOWER_IS_BETTER`)."""
    objective: str = "auto"
    """What the search was told to choose by: `auto`, `linear` or a curve."""
    clock: Literal["stage", "epoch"] = "stage"
    """What rungs and rows are placed by: the base's schedule, or the trial's own epochs."""
    rungs: tuple[float, ...] = ()
    """Where ASHA compared trials, ascending, on the search's clock; empty where nothing was stopped."""
    factor: float | None = None
    """ASHA's reduction factor."""
    fork: float = 0.0
    """Time on the clock up to which all trials share one run."""
    data: str | None = None
    """Source of the images."""
    val_images: int | None = None
    """Images of the validation split, by which a probe's accuracy is measured; None: not known."""
    command: str | None = None
    """The command that began it."""
    started: str | None = None
    """When it began, as ISO 8601."""
    seconds: float | None = None
    """How long it ran, all sessions together."""
    hours_shared: Mapping[str, float] = field(default_factory=dict)
    """`gpu_hours` and `cpu_hours` of the prefixes that trials share; in no row of `trials`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """All of ``search.json``: versions, hardware, seeds, commit."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """The base configuration, nested as in ``space.yaml``."""
    notes: tuple[str, ...] = ()
    """What the reader should know: of the search, and of what its files lack."""


def read_about(folder: Path, epochs: pd.DataFrame, notes: list[str]) -> tuple[About, dict[str, Any]]:
    """What the files of a results folder say besides the tables, and the content of its ``space.yaml``.

    Args:
        folder: of the search.
        epochs: its table, by which the fork is told where the files do not.
        notes: what is said of the tables; what cannot be read or used is added.
    """
    facts, space = _facts(folder / "search.json", notes), _space(folder / "space.yaml", notes)
    said = _Said(facts, notes)
    settings = space.get("search") if isinstance(space.get("search"), dict) else {}
    asked = _Said(settings or {}, notes)
    rungs = said.numbers("rungs")
    grace = asked.number("grace")
    base = space.get("base")
    shared = said.get("prefixes", list, []) or []
    hours = {
        name: math.fsum(_Said(prefix, notes).number(name) or 0.0 for prefix in shared if isinstance(prefix, dict))
        for name in ("gpu_hours", "cpu_hours")
    }
    images = said.get("images", dict, {}) or {}
    val = _Said(images, notes).number("val")
    about = About(
        name=folder.resolve().name,
        state=said.text("state") or "unknown",
        metric=said.text("metric") or asked.text("metric"),
        objective=said.text("objective") or asked.text("objective") or "auto",
        clock="epoch" if asked.text("clock") == "epoch" else "stage",
        rungs=rungs,
        factor=next((f for f in (said.number("factor"), asked.number("factor")) if f and f > 1), None),
        fork=max(0.0, rungs[0] - grace) if rungs and grace else fork_of(epochs),
        data=said.text("data"),
        val_images=int(val) if val else None,
        command=said.text("command"),
        started=said.text("started"),
        seconds=said.number("seconds"),
        hours_shared=hours,
        facts=facts,
        base=base if isinstance(base, dict) else {},
        notes=(*(f"said while it ran: {note}" for note in said.get("notes", list, []) or []), *notes),
    )
    return about, space


class _Said:
    """Values of a file that may be damaged or another version's: what is not of its kind is left out, and said."""

    def __init__(self, values: Mapping[str, Any], notes: list[str]) -> None:
        self._values, self._notes = values, notes

    def get(self, name: str, kind: type, otherwise: Any = None) -> Any:
        """The value where it is of this kind."""
        value = self._values.get(name)
        if value is None:
            return otherwise
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self._notes.append(f"{name} is {str(value)[:60]}, which cannot be used: it is left out")
            return otherwise
        return value

    def text(self, name: str) -> str | None:
        """A text that is not empty."""
        return self.get(name, str) or None

    def number(self, name: str) -> float | None:
        """A finite number above or at 0."""
        value = self._values.get(name)
        if value is None:
            return None
        if is_number(value) and value >= 0:
            return float(value)
        self._notes.append(f"{name} is {str(value)[:60]}, which cannot be used: it is left out")
        return None

    def numbers(self, name: str) -> tuple[float, ...]:
        """Finite numbers above 0, ascending."""
        return tuple(sorted({float(v) for v in self.get(name, list, []) or [] if is_number(v) and v > 0}))


def is_number(value: Any) -> bool:
    """Whether a value of a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _facts(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        notes.append(f"search.json cannot be read ({error}): what the search ran on is not known")
        return {}


def _space(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = load_tree(path).value
    except (ConfigError, OSError) as error:
        notes.append(f"space.yaml cannot be read ({error}): ranges are those of the values seen")
        return {}
    return value if isinstance(value, dict) else {}


def fork_of(epochs: pd.DataFrame) -> float:
    """Time on the clock up to which all trials share one run, by their rows."""
    if epochs.empty or not bool(epochs["shared"].any()):
        return 0.0
    ends = epochs[epochs["shared"].fillna(False).astype(bool)].groupby("trial_id")["clock"].max()
    return float(ends.min()) if len(ends) == epochs["trial_id"].nunique() else 0.0
