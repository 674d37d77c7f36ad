"""Pydantic's validation errors as sentences: "path is X, but must be Y"."""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

TreePath = tuple[str | int, ...]
"""Keys and list positions from the root, for example ("augment", "crop_scale", 0)."""

_MUST = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "some text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
}
_BOUNDS = {"greater_than": ("gt", ">"), "greater_than_equal": ("ge", ">="), "less_than": ("lt", "<")}
_BOUNDS["less_than_equal"] = ("le", "<=")


@dataclass(frozen=True)
class Problem:
    """What is wrong with one field, and the paths that a reader would look at, best first."""

    paths: tuple[TreePath, ...]
    text: str
    at_key: bool = False


def show(value: Any) -> str:
    """A value as it would stand in YAML, shortened to about 60 characters."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, float):
        text = f".{value}" if not math.isfinite(value) else f"{value:.6g}"
        text = text if re.search(r"[.en]", text) else text + ".0"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(show(item) for item in value) + "]"
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{name}: {show(item)}" for name, item in value.items()) + "}"
    else:
        text = str(value) or "''"
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(path: TreePath) -> str:
    """`augment.crop_scale[0]` for ("augment", "crop_scale", 0)."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The model class in an annotation such as `Stage` or `Stage | None`, if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in typing.get_args(annotation):
        if (found := section_class(part)) is not None:
            return found
    return None


def field_paths(model_class: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of all fields that hold a value rather than a section, in order of definition."""
    paths: list[str] = []
    for name, info in model_class.model_fields.items():
        inner = section_class(info.annotation)
        paths += [prefix + name] if inner is None else field_paths(inner, f"{prefix}{name}.")
    return paths


def validation_problems(error: ValidationError, model_class: type[BaseModel]) -> list[Problem]:
    """Every problem in a validation error of `model_class`, one per field."""
    problems: list[Problem] = []
    musts: dict[TreePath, tuple[Any, list[str]]] = {}
    for detail in error.errors(include_url=False):
        path, owner = _resolve(detail["loc"], model_class)
        kind = detail["type"]
        if kind == "value_error":
            problems += _rule_problems(str(detail["ctx"]["error"]), path, owner)
        elif kind == "extra_forbidden":
            hint = _hint(str(path[-1]), path[:-1], owner, model_class)
            problems.append(Problem((path,), f"{dotted(path)}: there is no such field{hint}", at_key=True))
        elif kind == "missing" and path and isinstance(path[-1], str):
            problems.append(Problem((path,), f"{dotted(path)} is missing"))
        elif kind in ("missing", "too_short", "too_long", "unexpected_positional_argument"):
            whole = path[:-1] if path and isinstance(path[-1], int) else path
            wanted = detail.get("ctx", {}).get("max_length") or detail.get("ctx", {}).get("min_length")
            musts.setdefault(whole, (detail["input"], []))[1].append(f"a list of {wanted or 2} values")
        else:
            musts.setdefault(path, (detail["input"], []))[1].append(_must(detail))
    for path, (got, wanted_list) in musts.items():
        wanted = " or ".join(dict.fromkeys(wanted_list))
        problems.append(Problem((path,), f"{dotted(path)} is {show(got)}, but must be {wanted}"))
    return problems


def _resolve(loc: TreePath, model_class: type[BaseModel]) -> tuple[TreePath, type[BaseModel] | None]:
    """The part of pydantic's location that is in the user's tree (it adds the names of union branches),
    and the model class that the last key was looked up in."""
    path: TreePath = ()
    inside: type[BaseModel] | None = model_class
    owner: type[BaseModel] | None = model_class
    for part in loc:
        if inside is None and not isinstance(part, int):
            break
        path = (*path, part)
        if isinstance(part, int):
            continue
        owner = inside
        info = inside.model_fields.get(part) if inside else None
        inside = section_class(info.annotation) if info else None
    if inside is not None:
        owner = inside
    return path, owner


def _rule_problems(text: str, path: TreePath, owner: type[BaseModel] | None) -> list[Problem]:
    """The problems a model's own rule names; several are joined by "; " (which also begins a did-you-mean)."""
    problems = []
    for sentence in re.split(r"; (?!did you mean)", text):
        named = [tuple(name.split(".")) for name in re.findall(r"[a-z_]\w*(?:\.\w+)*", sentence)]
        known = [name for name in named if owner is not None and _is_field(name, owner)]
        starts_with_field = bool(known) and sentence.startswith(".".join(known[0]))
        prefix = dotted(path)
        if prefix:
            sentence = f"{prefix}.{sentence}" if starts_with_field else f"{prefix}: {sentence}"
        problems.append(Problem((*((*path, *name) for name in known), path), sentence))
    return problems


def _is_field(path: tuple[str, ...], model_class: type[BaseModel]) -> bool:
    inside: type[BaseModel] | None = model_class
    for name in path:
        if inside is None or name not in inside.model_fields:
            return False
        inside = section_class(inside.model_fields[name].annotation)
    return True


def _hint(name: str, prefix: TreePath, owner: type[BaseModel] | None, root: type[BaseModel]) -> str:
    near = list(owner.model_fields) if owner is not None else []
    if "." in name and owner is not None and _is_field(tuple(name.split(".")), owner):
        section, _, rest = name.partition(".")
        return f"; write `{section}: {{{rest}: ...}}`"
    close = difflib.get_close_matches(name, near, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {dotted((*prefix, close[0]))}?"
    elsewhere = [path for path in field_paths(root) if path.rsplit(".", 1)[-1] == name]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known here: {', '.join(near)}" if near else ""


def _must(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _BOUNDS:
        name, sign = _BOUNDS[kind]
        return f"{sign} {show(context[name])}"
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        got = detail["input"]
        close = difflib.get_close_matches(got, names, n=1, cutoff=0.6) if isinstance(got, str) else []
        options = names[0] if len(names) == 1 else "one of " + ", ".join(names)
        return options + (f" (did you mean {close[0]}?)" if close else "")
    return _MUST.get(kind, f"valid: {detail['msg']}")
