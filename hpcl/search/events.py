"""What an event of the journal must be: its fields, their types, and what they may be used for.

A results folder may come from somebody else. So a line of its journal is checked before
anything is made of it: a trial's id becomes the name of a folder, a reason is printed.
"""

from __future__ import annotations

import math
import re
import reprlib
from typing import Any, get_args

from hpcl.results import EPOCH_COLUMNS, State

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_NUMBER: tuple[type, ...] = (int, float)
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "trial": {"trial": (str,), "number": (int,), "values": (dict,), "optuna": (int, type(None))},
    "retold": {"trial": (str,), "optuna": (int,)},
    "fork": {"trial": (str,), "prefix": (str,)},
    "row": {"trial": (str,), "row": (dict,)},
    "rung": {"trial": (str,), "bracket": (int,), "rung": _NUMBER, "value": _NUMBER},
    "end": {"trial": (str,), "state": (str,), "reason": (str,)},
    "retry": {"trial": (str,), "reason": (str,)},
    "note": {"text": (str,)},
    "state": {"state": (str,), "reason": (str,)},
}
"""Fields that an event must have; other events and other fields are not looked at."""
_MAY_HAVE: dict[str, tuple[type, ...]] = {"command": (str,), "gpus": _NUMBER, "cpus": _NUMBER}
_CELLS: dict[str, tuple[type, ...]] = {
    column.name: {"int64": (int,), "float64": _NUMBER, "string": (str,), "bool": (bool,)}[column.type]
    for column in EPOCH_COLUMNS
}
_STATES = {"end": set(get_args(State)) - {"running"}, "state": {"finished", "interrupted", "failed"}}
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}


def problem_of(event: Any, begun: set[str]) -> str | None:
    """Why this is no event of a search, in words; None where it is one.

    Args:
        event: what stands in a line of the journal.
        begun: ids of the trials and prefixes that earlier lines began; one that this line begins is added.
    """
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return "no JSON object that names one"
    kind = event["event"]
    fields = {"time": _NUMBER, **_FIELDS.get(kind, {}), **{n: t for n, t in _MAY_HAVE.items() if n in event}}
    for name, types in fields.items():
        if why := _wrong(event.get(name), types):
            return f"{name} {why}"
    if kind == "row":
        for name, value in event["row"].items():
            if name in _CELLS and (why := _wrong(value, _CELLS[name])):
                return f"{name} {why}"
        if event["row"].get("epoch", 0) < 1:
            return "a row without an epoch"
    if kind in _STATES and event["state"] not in _STATES[kind]:
        return f"state is {reprlib.repr(event['state'])}, but must be one of {', '.join(sorted(_STATES[kind]))}"
    if "trial" not in fields:
        return None
    trial = event["trial"]
    if not _ID.fullmatch(trial):
        return f"trial is {reprlib.repr(trial)}, but must be letters, digits, - and _: it names a folder"
    if kind == "trial":
        begun.add(trial)
    return None if trial in begun else f"trial {trial} was never begun"


def _wrong(value: Any, types: tuple[type, ...]) -> str | None:
    """What is wrong with a value; exact types, so that true is no number."""
    if type(value) not in types:
        return f"is {reprlib.repr(value)}, but must be {_WORDS[types[-1] if types[-1] in _WORDS else types[0]]}"
    if type(value) is int and not 0 <= value < 2**63:
        return f"is {reprlib.repr(value)}, but must be from 0 to 2^63"
    if type(value) is float and not math.isfinite(value):
        return f"is {value}, but must be finite"
    return None
