"""Finished trials of earlier searches that a new search may learn from (``--warm-from``).

A trial is taken where the new space could have drawn it: its whole configuration, searched
or not, must be one that the space allows, on the same images, with the same metric. All
else is left out, with the reason and how many trials it holds for.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.files import read_object
from hpcl.results import read_rows
from hpcl.search import space as spaces
from hpcl.search.params import Choice, Param, same
from hpcl.search.places import location, place
from hpcl.search.space import Space
from hpcl.search.storage import fetch
from hpcl.validation import field_paths, show

_NO_MATTER = ("seed", "runtime.", "clusters.backend")
"""Paths (a section ends with a dot) whose values may differ: they do not change the method."""
_SHOWN = 3
"""Values or fields that a reason names; it counts the others."""


class Point(NamedTuple):
    """A finished trial of an earlier search, as the new one would have drawn it."""

    values: dict[str, Any]
    """Values by config path of the fields that are searched and active in the new space."""
    value: float
    """Last value of the metric."""
    source: str
    """Its folder, ``results/<name>/trials/<id>`` as a full path."""


@dataclass
class Warm:
    """What earlier searches give."""

    points: list[Point] = field(default_factory=list)
    """In the order of the folders, and in each of the trials' numbers."""
    skipped: list[str] = field(default_factory=list)
    """A sentence per reason and folder, for example ``3 trials of results/a:
    clusters.multiplier 3.4 is outside of [1.2, 3.0]``."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked and is taken on trust."""

    @property
    def lines(self) -> list[str]:
        """All of it, to be printed."""
        more = (*self.notes, *(f"skipped {text}" for text in self.skipped))
        return [f"warm start: {len(self.points)} finished trials of earlier searches", *(f"  {text}" for text in more)]


@dataclass(frozen=True)
class _Earlier:
    """A results folder."""

    folder: Path
    space: Space
    trials: list[dict[str, Any]]
    facts: dict[str, Any]
    """``search.json``; empty where it cannot be read."""


def read_warm(
    folders: Iterable[str | Path], space: Space, *, data_hash: str | None = None, backbone: str | None = None
) -> Warm:
    """The finished trials of results folders that fit a space.

    Args:
        folders: paths or URIs, each with ``trials.parquet`` and ``space.yaml``; a folder given twice counts once.
        space: what is searched now.
        data_hash: hash of the images, compared with ``data_hash`` in ``search.json``; where one
            of the two is not known, `data.source` must be the same and is taken on trust.
        backbone: name of your own module, where the new search has one.

    Raises:
        UserError: a folder is not one of a search, or is damaged; names all of them.
    """
    earlier: list[_Earlier] = []
    problems: list[str] = []
    named: dict[Path, Path] = {}
    for folder in map(place, folders):
        named.setdefault(folder.resolve(), folder)
    for folder in named.values():
        try:
            earlier.append(_read(folder))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    warm = Warm()
    for search in earlier:
        _take(warm, search, space, data_hash, backbone)
    return warm


def _read(folder: Path) -> _Earlier:
    table = folder / "trials.parquet"
    fetch(folder, {"trials.parquet", "space.yaml", "search.json"})
    for path in (folder, folder / "space.yaml", table):
        if not path.exists():
            raise UserError(
                f"--warm-from {location(folder)}: {location(path)} is missing; give the folder of a search, "
                "results/<name>"
            )
    space = spaces.load(folder / "space.yaml")
    try:
        rows = sorted(read_rows(table), key=lambda row: int(row["number"]))
        trials = [
            {"trial_id": str(row["trial_id"]), "state": str(row["state"]), "values": _values(row, space)}
            | {"metric": None if row["metric"] is None else float(row["metric"])}
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--warm-from {location(folder)}: {location(table)} is damaged, or is not of the space in its space.yaml "
            f"({error}); leave the folder out"
        ) from None
    try:
        facts = read_object(folder / "search.json")
    except (OSError, ValueError):
        facts = {}
    return _Earlier(folder, space, trials, facts)


def _values(row: dict[str, Any], space: Space) -> dict[str, Any]:
    """A trial's values of the fields that its search searched, sampled or not, out of its columns."""
    return {path: _value(row[f"config.{path}"], param, space.base.at(path)) for path, param in space.params.items()}


def _value(cell: Any, param: Param, base: Any) -> Any:
    if not isinstance(param, Choice) or cell is None:
        return cell
    for choice in (*param.choices, base):  # in a column of text, all but text stands as JSON
        if same(cell, choice) or (isinstance(cell, str) and cell == json.dumps(choice)):
            return choice
    raise ValueError(f"{cell} is no choice")


def _take(warm: Warm, earlier: _Earlier, space: Space, data_hash: str | None, backbone: str | None) -> None:
    """Add a folder's trials, or why they are left out."""
    folder, name = earlier.folder, location(earlier.folder)
    ended = Counter(trial["state"] for trial in earlier.trials if trial["state"] != "finished")
    if ended:
        states = ", ".join(f"{count} {state}" for state, count in ended.items())
        warm.skipped.append(f"{_trials(ended.total())} of {name}: not finished ({states})")
    finished = [trial for trial in earlier.trials if trial["state"] == "finished"]
    if not finished:
        return
    if differences := _differences(earlier, space, data_hash, backbone):
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        warm.skipped.append(f"{_trials(len(finished))} of {name}: {'; '.join(differences[:_SHOWN])}{more}")
        return
    reasons: dict[tuple[str, str], list[Any]] = {}
    for trial in finished:
        value = trial["metric"]
        values, problem = _point(earlier.space.base, trial["values"], space)
        if problem is not None:
            path, found, why = problem
            reasons.setdefault((path, why), []).append(found)
        elif value is None or not math.isfinite(value):
            reasons.setdefault((space.search.metric, "no number"), []).append(value)
        else:
            warm.points.append(Point(values, value, location(folder.resolve() / "trials" / trial["trial_id"])))
    for (path, why), found_values in reasons.items():
        warm.skipped.append(f"{_trials(len(found_values))} of {name}: {path} {_listed(found_values)} {why}")
    if _on_trust(earlier, data_hash) and space.base.data.source != "mnist5k":
        warm.notes.append(
            f"{name}: that its images are the same as now is taken on trust (data.source is, but their hash is "
            f"not in its search.json{' or not known now' if data_hash is None else ''})"
        )


def _differences(earlier: _Earlier, space: Space, data_hash: str | None, backbone: str | None) -> list[str]:
    """What no trial of a search can have in common with the new one."""
    found = []
    there, here = earlier.space.search.metric, space.search.metric
    if there != here:
        found.append(f"search.metric is {there} there, but {here} here")
    if not _on_trust(earlier, data_hash):
        if earlier.facts["data_hash"] != data_hash:
            found.append("the images are others (their hash differs)")
    elif _source(earlier.space) != _source(space):
        found.append(f"data.source is {earlier.space.base.data.source} there, but {space.base.data.source} here")
    known = earlier.space.base.model.backbone
    own = earlier.facts.get("backbone", known)
    if (own if own != known else None) != backbone:
        found.append(f"the backbone is {own}, but {backbone or space.base.model.backbone} here")
    searched = {*earlier.space.params, *space.params, "data.source"}
    for path in field_paths(Config):
        if path in searched or path.startswith(_NO_MATTER):
            continue
        old, new = earlier.space.base.at(path), space.base.at(path)
        if not same(old, new):
            found.append(f"{path} is {show(old)} there, but {show(new)} here")
    return found


def _on_trust(earlier: _Earlier, data_hash: str | None) -> bool:
    return data_hash is None or not earlier.facts.get("data_hash")


def _source(space: Space) -> str:
    source = Path(space.base.data.source).expanduser()
    return str(source.resolve()) if source.exists() else space.base.data.source


def _point(base: Config, values: dict[str, Any], space: Space) -> tuple[dict[str, Any], tuple[str, Any, str] | None]:
    """The values that the new space would have drawn, and (path, value, why it could not have)."""
    point: dict[str, Any] = {}
    for path in dict.fromkeys((*space.params, *values)):  # parents stand before their children
        value = values[path] if path in values else base.at(path)
        here = space.base.at(path)
        if path in space.params and space.is_active(path, point):
            fitting, why = _fit(value, space.params[path])
            if why is not None:
                return {}, (path, value, why)
            point[path] = fitting
        elif not same(value, here):
            why = "not sampled" if path in space.params else "not searched"
            return {}, (path, value, f"not what it is here ({show(here)}; it is {why})")
    return point, None


def _fit(value: Any, param: Param) -> tuple[Any, str | None]:
    """The value as a field draws it, and why it does not."""
    if isinstance(param, Choice):
        for choice in param.choices:
            if same(choice, value):
                return choice, None
        return None, f"none of {', '.join(show(choice) for choice in param.choices)}"
    ends = f"[{show(param.low)}, {show(param.high)}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not param.low <= value <= param.high:
        return None, f"outside of {ends}"
    if param.step is not None and value != param.high:
        steps = (value - param.low) / param.step
        if abs(steps - round(steps)) > 1e-8:
            return None, f"between the steps of {show(param.step)} in {ends}"
    return value, None


def _trials(count: int) -> str:
    return f"{count} trial{'s' if count > 1 else ''}"


def _listed(values: Sequence[Any]) -> str:
    """Different values with their verb: `3.4 is`, or `3.1, 3.4 are`."""
    texts = list(dict.fromkeys(show(value) for value in values))
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more + (" is" if len(texts) == 1 else " are")
