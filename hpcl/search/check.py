"""Whether every value that a space can propose is one that the configuration accepts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hpcl.backbone_names import name_problem
from hpcl.config import Config
from hpcl.data_rules import data_problems
from hpcl.methods import METHODS, reads
from hpcl.search.clock import rung_times
from hpcl.search.params import PROTOTYPE_CURVES, Choice, Float, Param, same
from hpcl.stages import stage_lengths
from hpcl.validation import TreePath, field_paths, show, validation_problems
from hpcl.yamlio import did_you_mean

if TYPE_CHECKING:
    from hpcl.search.space import Space

_ENDLESS = 10**12
"""Number of training images that no rule of `data_problems` finds too small, for before the data are read."""

Wrong = list[tuple[tuple[TreePath, ...], str]]
Check = Callable[[dict[str, Any]], Wrong]

_NOT_SEARCHED = {
    "seed": "all trials use the same seed, so that they differ in nothing but the searched fields",
    "data": "trials on different images have curves that do not compare",
    "meters": "the meters must be the same function for every trial, or the curves do not compare",
    "stages.total": "it would only make some trials longer than others; search stages.stageK.epochs, or leave it",
}


def space_problems(space: Space, *, rules: bool, images: int = _ENDLESS) -> list[str]:
    """Every problem of a space, each beginning with its place in the file.

    Args:
        space: the space, not yet known to be right.
        rules: also check what depends on more than one field; False where the base is not valid.
        images: number of training images, where the data have been read.
    """
    known = field_paths(Config)
    problems: list[str] = []
    sound: dict[str, Param] = {}
    for path, param in space.params.items():
        found = _path_problems(space, path, known) or _when_problems(space, path, param, known)
        if not found:
            sound[path] = param
        problems += found
    problems += _cycles(space, sound)
    if problems and rules:
        rules = False  # a field that is wrong in itself would be reported once more by each rule
    wrong = partial(_config_problems, space, images)
    before = wrong({}) if rules else []
    for _, text in before:  # each begins with a field
        field = ("base", *text.partition(" ")[0].split("."))
        problems.append(f"{space.tree.where(field)}: {text}")
    for path, param in sound.items():
        problems += _value_problems(space, path, param, rules, {text for _, text in before}, wrong)
    if rules and not problems:
        problems = _pair_problems(space, wrong) or _corner_problems(space, wrong)
        problems += _search_problems(space) + _unread_problems(space)
    return list(dict.fromkeys(problems))


def backbone_problems(space: Space) -> list[str]:
    """Names of `model.backbone`, in the base or among its choices, that no trial could build."""
    found = [(where, name_problem(name)) for name, where in _values_of(space, "model.backbone")]
    return [f"{where}: {problem}" for where, problem in found if problem]


def device_problems(space: Space, gpus: float, cluster: str) -> list[str]:
    """Where the space wants `runtime.device: cuda`, but a trial gets no GPU.

    Args:
        space: the space.
        gpus: GPUs of a worker.
        cluster: what there is, in words.
    """
    return [
        f"{where}: runtime.device is cuda, but a worker gets no GPU (resources.gpus_per_worker is "
        f"{show(space.resources.gpus_per_worker)}; {cluster}); set it to auto or cpu"
        for value, where in _values_of(space, "runtime.device")
        if value == "cuda" and not gpus
    ]


def _values_of(space: Space, path: str) -> list[tuple[Any, str]]:
    """The values that a field can take, each with its place in the file."""
    param, where = space.params.get(path), space.tree.where
    values = []
    if isinstance(param, Choice):
        values = [
            (value, where(("space", path, param.kind, i), ("space", path))) for i, value in enumerate(param.choices)
        ]
    if param is None or param.when:
        values.append((space.base.at(path), where(("base", *path.split(".")), ("base",))))
    return values


def with_parents(space: Space, values: dict[str, Any]) -> dict[str, Any] | None:
    """`values` and what makes their fields active; None where they exclude each other."""
    complete = dict(values)
    waiting = list(values)
    while waiting:
        path = waiting.pop()
        for parent, allowed in space.params[path].when.items() if path in space.params else ():
            now = complete.get(parent, space.base_with(complete).at(parent))
            if any(same(now, value) for value in allowed):
                continue
            if parent not in space.params and "method" not in complete:  # some methods may have it as their default
                fitting = [m for m in _methods(space) if _meets(space, m, parent, allowed)]
                if fitting:
                    complete["method"] = fitting[0]
                    waiting.append("method")
                    continue
            if parent in complete or parent not in space.params:
                return None
            complete[parent] = allowed[0]
            waiting.append(parent)
    return complete


def _methods(space: Space) -> list[str]:
    """The methods that trials may have."""
    searched = space.params.get("method")
    return [str(method) for method in searched.ends()] if searched else [space.base.method]


def _meets(space: Space, method: str, parent: str, allowed: tuple[Any, ...]) -> bool:
    """Whether a field that is not searched has one of these values with a method."""
    return any(same(space.base_with({"method": method}).at(parent), value) for value in allowed)


def _path_problems(space: Space, path: str, known: list[str]) -> list[str]:
    where = space.tree.where(("space", path), key=True)
    if path not in known:
        if inside := [name for name in known if name.startswith(f"{path}.")]:
            return [f"{where}: {path} is a section, but must be one of its fields, such as {inside[0]}"]
        return [f"{where}: {path}: there is no such field{did_you_mean(path, known)}"]
    for name, reason in _NOT_SEARCHED.items():
        if path == name or path.startswith(f"{name}."):
            return [f"{where}: {path} cannot be searched: {reason}; set it in base"]
    return []


def _when_problems(space: Space, path: str, param: Param, known: list[str]) -> list[str]:
    problems = []
    for parent, allowed in param.when.items():
        where = space.tree.where(("space", path, "when", parent), key=True)
        if parent not in known:
            problems.append(f"{where}: when: {parent}: there is no such field{did_you_mean(parent, known)}")
        elif parent not in space.params:
            fixed = space.base.at(parent)
            if not any(_meets(space, method, parent, allowed) for method in _methods(space)):
                problems.append(f"{where}: {path} would never be sampled: {parent} is {show(fixed)} in every trial")
        else:
            other = space.params[parent]
            for value in allowed:
                if not _can_take(other, value):
                    problems.append(f"{where}: when: {parent} is never {show(value)}, but {_words(other)}")
    return problems


def _can_take(param: Param, value: Any) -> bool:
    if isinstance(param, Choice):
        return any(same(value, choice) for choice in param.choices)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and (param.low <= value <= param.high) and bool(abs(param.nearest(value) - value) < 1e-12)


def _words(param: Param) -> str:
    if isinstance(param, Choice):
        return "one of " + ", ".join(show(value) for value in param.choices)
    return f"between {show(param.low)} and {show(param.high)}"


def _cycles(space: Space, params: dict[str, Param]) -> list[str]:
    for start in params:
        seen, waiting = set(), [start]
        while waiting:
            path = waiting.pop()
            for parent in params[path].when if path in params else ():
                if parent == start:
                    where = space.tree.where(("space", start, "when"), key=True)
                    return [f"{where}: {start} depends on itself by `when`; take one condition out"]
                if parent not in seen:
                    seen.add(parent)
                    waiting.append(parent)
    return []


def _config_problems(space: Space, images: int, values: dict[str, Any]) -> Wrong:
    """(paths, text) of what is wrong with the base with these values put in."""
    try:
        config = space.base.with_values(values)
        lengths = stage_lengths(config.stages)
    except ValidationError as error:
        return [(problem.paths, problem.text) for problem in validation_problems(error, Config)]
    except ValueError as error:
        return [(((),), str(error))]
    texts = data_problems(config, images, space.resources.workers)
    return [(((),), text) for text in texts] if sum(lengths) else []


def _value_problems(space: Space, path: str, param: Param, rules: bool, known: set[str], wrong: Check) -> list[str]:
    """What is wrong with single values of a field, at the value's place in the file."""
    problems: list[str] = []
    own: TreePath = tuple(path.split("."))
    grid = param.grid()
    for i, value in enumerate(grid):
        values = {path: value} if not rules else with_parents(space, {path: value})
        if values is None:  # its conditions exclude each other
            where = space.tree.where(("space", path, "when"), key=True)
            return [f"{where}: {path} would never be sampled: its conditions exclude each other"]
        last = i == len(grid) - 1
        for paths, text in wrong(values):
            if text in known or not (rules or paths[0][: len(own)] == own):
                continue
            place = i if isinstance(param, Choice) else int(last)
            where = space.tree.where(("space", path, param.kind, place), ("space", path))
            if isinstance(param, Choice):
                which = f"choice {i + 1} of {path}"
            else:
                which = f"{'low end' if i == 0 else 'high end' if last else 'inside the range'} of {path}"
                if isinstance(param, Float) and text.endswith("must be a whole number"):
                    which += "; write int: [low, high]"
            problems.append(f"{where}: {text} ({which})")
            if not isinstance(param, Choice) and 0 < i < len(grid) - 1:
                return problems  # one value inside the range is enough to show it
    return problems


def _pair_problems(space: Space, wrong: Check) -> list[str]:
    """What is wrong with two values together that are right alone; one sentence per pair of fields."""
    problems = []
    for (a, first), (b, second) in itertools.combinations(space.params.items(), 2):
        for x, y in itertools.product(first.ends(), second.ends()):
            values = with_parents(space, {a: x, b: y})
            found = wrong(values) if values is not None else []
            if found:
                where = space.tree.where(("space", b), key=True)
                problems.append(f"{where}: {found[0][1]} (with {a} {show(x)} and {b} {show(y)}, which may meet)")
                break
    return problems


def _corner_problems(space: Space, wrong: Check) -> list[str]:
    """What is wrong with trial 0, and with all fields at their low or all at their high ends."""
    corners: dict[str, dict[str, Any]] = {"trial 0": space.default_point()}
    for i, name in ((0, "all low ends or first choices together"), (-1, "all high ends or last choices together")):
        values: dict[str, Any] = {}
        for path in space.params:
            values[path] = space.params[path].ends()[i]
        corners[name] = {path: value for path, value in values.items() if space.is_active(path, values)}
    problems = []
    for name, values in corners.items():
        found = wrong(values)
        problems += [f"{space.tree.where(('space',))}: {text} ({name})" for _, text in found]
    return problems


def _unread_problems(space: Space) -> list[str]:
    """Searched fields that no method reads with which they are sampled."""
    problems = []
    for path, param in space.params.items():
        methods = [*(param.when.get("method") or _methods(space))]
        if not any(reads(str(method), path) for method in methods):
            where, names = space.tree.where(("space", path), key=True), ", ".join(map(str, methods))
            which = "method" if len(methods) == 1 else "each of the methods"
            problems.append(f"{where}: {path} does nothing with {which} {names}; take it out of `space`")
    return problems


def _search_problems(space: Space) -> list[str]:
    problems = []
    search, base, where = space.search, space.base, space.tree.where
    searched_lengths = [path for path in space.params if path.startswith("stages.") and path.endswith(".epochs")]
    if searched_lengths and base.stages.total is None and search.clock == "epoch":
        problems.append(
            f"{where(('space', searched_lengths[0]), key=True)}: {searched_lengths[0]} is searched, but stages.total "
            "is null and search.clock is epoch: trials would differ in their number of epochs and rungs would not "
            "compare; set stages.total in base, or search.clock to stage"
        )
    if search.grace is not None and search.grace >= space.epochs:
        problems.append(
            f"{where(('search', 'grace'), ('search',))}: search.grace is {search.grace}, but must be below the "
            f"{space.epochs} epochs of a trial (null: no trial is stopped early)"
        )
    elif search.grace is not None:
        rungs = len(rung_times(search.grace, search.factor, space.epochs))
        if search.brackets > rungs:
            problems.append(
                f"{where(('search', 'brackets'), ('search',))}: search.brackets is {search.brackets}, but must be at "
                f"most {rungs}, the number of rungs: trials of a bracket without rungs are never stopped"
            )
    bare = [method for method in _methods(space) if not METHODS[method].prototypes]
    for name, curve in (("metric", search.metric), ("objective", search.objective)):
        if curve in PROTOTYPE_CURVES and bare:
            instead, methods = "acc_proto_ref" if name == "metric" else "auto", " or ".join(bare)
            problems.append(
                f"{where(('search', name))}: search.{name} is {curve}, which a trial of method {methods} never has; "
                f"use {instead}"
            )
        if curve == "knn" and base.meters.knn_every == 0:
            problems.append(f"{where(('search', name))}: search.{name} is knn, but meters.knn_every is 0 (never)")
    return problems
