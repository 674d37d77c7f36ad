"""The searched fields of a results folder, as its ``space.yaml`` or its table says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hpcl.results.about import is_number

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

PREFIX = "config."
"""What the name of a searched field's column begins with in ``trials.parquet``."""


@dataclass(frozen=True)
class Field:
    """One searched field: where its values lay."""

    path: str
    """Path in the configuration, such as ``clusters.multiplier``."""
    kind: Literal["float", "int", "choice"]
    low: float = math.nan
    """Low end; NaN for a choice."""
    high: float = math.nan
    """High end; NaN for a choice."""
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()
    """Values of a choice, as the configuration has them."""
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Path -> values under which the field acts; elsewhere it had the base's value."""
    base: Any = None
    """The base's value; None where it is not known."""
    guessed: bool = False
    """Whether the ends are merely the least and the largest value seen: no space file says more."""

    @property
    def column(self) -> str:
        """Its column in ``trials``."""
        return PREFIX + self.path

    def positions(self, values: pd.Series) -> NDArray[np.float64]:
        """Places in the range, 0 at the low end and 1 at the high one, on the scale that was sampled.

        For a choice the number of the value among the choices (text compared as the table has it).

        Args:
            values: of the field's column.

        Returns:
            float64 (n,), NaN where there is no value, or one without a place on the scale.
        """
        import numpy as np
        import pandas as pd

        if self.kind == "choice":
            codes = {shown(value): code for code, value in enumerate(self.choices)}
            return np.array([codes.get(shown(value), math.nan) for value in values], dtype=np.float64)
        numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=math.nan)
        low, high = self.low, self.high
        if self.log:  # what is not above 0, such as a base's, has no place on the scale
            numbers = np.log(np.where(numbers > 0, numbers, math.nan))
            low, high = math.log(low), math.log(high)
        return np.asarray((numbers - low) / (high - low)) if high > low else np.where(np.isnan(numbers), np.nan, 0.5)

    def acts(self, trials: pd.DataFrame) -> NDArray[np.bool_]:
        """In which trials the field was sampled: those in which its `when` held.

        Args:
            trials: with the columns of the fields it depends on.
        """
        import numpy as np

        held = np.ones(len(trials), dtype=bool)
        for parent, allowed in self.when.items():
            if PREFIX + parent in trials:
                wanted = {shown(value) for value in allowed}
                held &= np.array([shown(value) in wanted for value in trials[PREFIX + parent]], dtype=bool)
        return held


def shown(value: Any) -> str:
    """A value of a choice as text that is equal for equal values, whichever file it comes from."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "null"
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:.12g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    return str(value)


def is_missing(value: Any, field: Field) -> bool:
    """Whether a table holds no value there; null is a value of a choice that has it."""
    if value is not None and not (isinstance(value, float) and math.isnan(value)):
        return False
    return not (field.kind == "choice" and "null" in {shown(choice) for choice in field.choices})


def from_space(space: Mapping[str, Any]) -> dict[str, Field]:
    """The fields of a space file's content: a mapping with ``space`` and ``base``; what is malformed is left out."""
    fields = {}
    searched = space.get("space")
    for path, spec in (searched if isinstance(searched, Mapping) else {}).items():
        made = _field(str(path), spec, _at(space.get("base"), str(path)))
        if made is not None:
            fields[made.path] = made
    return fields


def _field(path: str, spec: Any, base: Any) -> Field | None:
    if not isinstance(spec, Mapping):
        return None
    when = spec.get("when") if isinstance(spec.get("when"), Mapping) else {}
    more: dict[str, Any] = {
        "when": {str(p): tuple(v) if isinstance(v, (list, tuple)) else (v,) for p, v in (when or {}).items()},
        "base": base,
    }
    choices = spec.get("choice")
    if isinstance(choices, (list, tuple)) and choices:
        return Field(path, "choice", choices=tuple(choices), **more)
    kind: Literal["float", "int"] = "int" if "int" in spec else "float"
    ends = spec.get(kind)
    if not (
        isinstance(ends, (list, tuple)) and len(ends) == 2 and all(is_number(end) for end in ends) and ends[0] < ends[1]
    ):
        return None
    log = spec.get("log") is True and ends[0] > 0
    step = float(spec["step"]) if is_number(spec.get("step")) else None
    return Field(path, kind, float(ends[0]), float(ends[1]), log=log, step=step, **more)


def from_table(trials: pd.DataFrame) -> dict[str, Field]:
    """The fields of a table without a space file: the ``config.`` columns with several values, by their extremes."""
    import pandas as pd

    fields = {}
    for column in trials.columns:
        path = str(column).removeprefix(PREFIX)
        values = trials[column].dropna()
        if path == column or values.nunique() < 2:
            continue
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            kind: Literal["float", "int"] = "int" if bool((values == values.round()).all()) else "float"
            low, high = float(values.min()), float(values.max())
            log = low > 0 and high / low >= 50
            fields[path] = Field(path, kind, low, high, log=log, guessed=True)
        else:
            choices = tuple(sorted({shown(value) for value in values}))
            fields[path] = Field(path, "choice", choices=choices, guessed=True)
    return fields


def _at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
