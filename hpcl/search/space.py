"""The space file: which fields of the configuration are searched, and how.

    base:                          # what all trials share
      preset: embedded             # or `config: FILE`; left out, the defaults
      stages: {total: 20}          # overrides, nested as in a configuration
    space:                         # searched fields by dotted path
      clusters.multiplier: {float: [1.2, 3.0], log: true}
      clusters.levels: {int: [1, 4]}
      topk.mode: {choice: [replace, add, none]}
      topk.k: {int: [1, 5], when: {topk.mode: [replace, add]}}
    search: {trials: 16, metric: acc_proto_ref, grace: 5, factor: 2}
    resources: {workers: 1}

Before anything starts, every value that a field can take is put into the base and
checked by the configuration's own rules, alone and in pairs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hpcl import presets
from hpcl.config import Config
from hpcl.errors import ConfigError
from hpcl.methods import reads
from hpcl.search.check import space_problems, with_parents
from hpcl.search.params import Choice, Float, Int, Param, Resources, Search, same
from hpcl.sections import Section
from hpcl.stages import stage_lengths
from hpcl.validation import TreePath, show, validation_problems
from hpcl.yamlio import Tree, assignment, did_you_mean, load_tree, located, merge, parse, read_value, replaced

__all__ = [
    "Choice", "Float", "Int", "Param", "Resources", "Search", "Space",
    "apply_overrides", "from_tree", "load", "with_overrides",
]  # fmt: skip

_KINDS: dict[str, type[Float | Int | Choice]] = {"float": Float, "int": Int, "choice": Choice}
_FOLDER_NAME = "text that can name a folder, without slashes or a leading dot"
_PARTS = ("name", "base", "space", "search", "resources")


@dataclass(frozen=True)
class Space:
    """A checked space file."""

    name: str
    """Name of the search; the results go to a folder of this name."""
    base: Config
    """What all trials share, and the default of each searched field."""
    params: dict[str, Param]
    """Searched fields by config path; a field stands after those that its `when` names."""
    search: Search
    resources: Resources
    tree: Tree = field(default_factory=lambda: Tree({}), compare=False, repr=False)
    """The file, for the places in error messages."""
    _bases: dict[str, Config] = field(default_factory=dict, compare=False, repr=False)
    """By method, what :meth:`base_with` made."""

    @property
    def epochs(self) -> int:
        """Epochs of the base, and of every trial where `stages.total` is set."""
        return sum(stage_lengths(self.base.stages))

    def base_with(self, values: Mapping[str, Any]) -> Config:
        """The base as it is with a sampled method, whose defaults may differ from the base's own."""
        method = values.get("method", self.base.method)
        if method == self.base.method:
            return self.base
        if method not in self._bases:
            self._bases[method] = self.base.with_values({"method": method})
        return self._bases[method]

    def is_active(self, path: str, values: Mapping[str, Any]) -> bool:
        """Whether a field is sampled, given the values sampled before it (others have the base's value)."""
        when = self.params[path].when
        if not when:
            return True
        base = self.base_with(values)
        return all(
            any(same(values.get(parent, base.at(parent)), value) for value in allowed)
            for parent, allowed in when.items()
        )

    def default_point(self) -> dict[str, Any]:
        """The base's values of the active fields, which is trial 0: the notes' configuration where the base keeps it.

        A value outside of its range is replaced by the nearest end (`default_notes` says which).
        """
        values: dict[str, Any] = {}
        for path, param in self.params.items():
            if self.is_active(path, values):
                values[path] = param.nearest(self.base.at(path))
        return values

    def default_notes(self) -> list[tuple[str, Any, Any]]:
        """(path, value of the base, value in trial 0) of each field whose base value is not in its range."""
        point = self.default_point()
        return [(path, self.base.at(path), v) for path, v in point.items() if not same(v, self.base.at(path))]

    def config_for(self, values: Mapping[str, Any]) -> Config:
        """The configuration of a trial with these sampled values.

        Raises:
            pydantic.ValidationError: the values break a rule of the configuration.
        """
        return self.base.with_values(dict(values))

    def to_tree(self) -> dict[str, Any]:
        """Plain values that `hpcl.yamlio.dump` writes and `load` reads back to an equal space; no preset is named."""
        space = {}
        for path, param in self.params.items():
            spec: dict[str, Any] = param.model_dump(exclude_defaults=True, exclude={"kind", "low", "high", "choices"})
            ends = param.choices if isinstance(param, Choice) else (param.low, param.high)
            space[path] = {param.kind: list(ends), **spec}
        return {
            "name": self.name,
            "base": self.base.model_dump(),
            "space": space,
            "search": self.search.model_dump(),
            "resources": self.resources.model_dump(),
        }


def load(path: str | os.PathLike[str]) -> Space:
    """The space in a YAML file, fully checked.

    Raises:
        ConfigError: all problems at once, each "file:line:column: path is X, but must be Y".
    """
    return from_tree(load_tree(path), folder=Path(path).parent, name=Path(path).stem)


def from_tree(tree: Tree, *, folder: Path = Path(), name: str = "search") -> Space:
    """The space in a YAML tree.

    Args:
        tree: the content of a space file.
        folder: where a relative `base: {config: FILE}` is looked for.
        name: name of the search where the file gives none.

    Raises:
        ConfigError: as `load`.
    """
    problems = [
        f"{tree.where((key,), key=True)}: {key}: there is no such part{did_you_mean(key, _PARTS)}; "
        f"a space file has {', '.join(_PARTS)}"
        for key in tree.value
        if key not in _PARTS
    ]
    base, base_problems = _collect(lambda: _read_base(tree, folder))
    head, head_problems = _collect(lambda: _read_head(tree))
    params, param_problems = _read_params(tree)
    problems += base_problems + head_problems + param_problems
    name = tree.value.get("name", name)
    if not _is_folder_name(name):
        problems.append(f"{tree.where(('name',))}: name is {name}, but must be {_FOLDER_NAME}")
    # With a broken base the fields are still checked, each by its own type and bounds.
    search, resources = (head.search, head.resources) if head else (Search(), Resources())
    draft = Space(name, base or Config(), params, search, resources, tree)
    problems += space_problems(draft, rules=base is not None and head is not None)
    if problems:
        raise ConfigError(*sorted(dict.fromkeys(problems), key=_line))
    return _settled(draft)


def apply_overrides(space: Space, assignments: Iterable[str]) -> Space:
    """The space with `path=value` texts of `--set` put in: config paths, `search.X` or `resources.X`.

    Raises:
        ConfigError: no such path, a value that does not fit, or a field that is searched.

    Example:
        ``apply_overrides(space, ["moco.temperature=0.2", "search.grace=4"])``
    """
    assignments = list(assignments)
    parsed: list[tuple[str, str, Any]] = []
    problems: list[str] = []
    for text in assignments:
        try:
            parsed.append((f"--set {text}", *assignment(text)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return _changed(space, parsed) if parsed else space


def with_overrides(
    space: Space,
    *,
    name: str | None = None,
    data: str | None = None,
    trials: int | None = None,
    seed: int | None = None,
    workers: int | None = None,
    gpus_per_worker: float | str | None = None,
    epochs: int | None = None,
) -> Space:
    """The space with the command line's flags put in; None leaves what the file says.

    Args:
        name: name of the search.
        data: `data.source`.
        trials: `search.trials`.
        seed: of the sampler (`search.seed`) and of every trial (`seed`).
        workers: `resources.workers`.
        gpus_per_worker: `resources.gpus_per_worker`, a number or "auto".
        epochs: `stages.total`: the stages are scaled in proportion, and so is `search.grace`.

    Raises:
        ConfigError: a value that does not fit, or a field that is searched; names the flag.
    """
    changes: list[tuple[str, str, Any]] = []
    if data is not None:
        changes.append((f"--data {data}", "data.source", data))
    if trials is not None:
        changes.append((f"--trials {trials}", "search.trials", trials))
    if seed is not None:
        changes += [(f"--seed {seed}", "search.seed", seed), (f"--seed {seed}", "seed", seed)]
    if workers is not None:
        changes.append((f"--workers {workers}", "resources.workers", workers))
    if gpus_per_worker is not None:
        where = f"--gpus-per-worker {gpus_per_worker}"
        gpus = read_value(gpus_per_worker, where) if isinstance(gpus_per_worker, str) else gpus_per_worker
        changes.append((where, "resources.gpus_per_worker", gpus))
    if epochs is not None:
        changes.append((f"--epochs {epochs}", "stages.total", epochs))
        grace = space.search.grace
        if grace is not None and epochs != space.epochs and epochs >= 1:
            # In proportion, so that the first rung stays in the same stage; no rung fits into one epoch.
            scaled = min(max(1, round(grace * epochs / space.epochs)), epochs - 1)
            changes.append((f"--epochs {epochs}", "search.grace", scaled or None))
    if name is not None:
        if not _is_folder_name(name):
            raise ConfigError(f"--name {name or show(name)}: must be {_FOLDER_NAME}")
        space = replace(space, name=name)
    return _changed(space, changes) if changes else space


def _is_folder_name(name: Any) -> bool:
    return isinstance(name, str) and name[:1] not in ("", ".") and name.isprintable() and not re.search(r"[/\\]", name)


def _line(problem: str) -> tuple[int, int]:
    place = re.match(r".*?:(\d+):(\d+): ", problem)
    return (int(place[1]), int(place[2])) if place else (0, 0)


class _Head(Section):
    search: Search = Search()
    resources: Resources = Resources()


def _collect(read: Any) -> tuple[Any, list[str]]:
    try:
        return read(), []
    except ConfigError as error:
        return None, list(error.problems)


def _read_base(tree: Tree, folder: Path) -> Config:
    base = tree.value.get("base", {})
    if not isinstance(base, dict):
        raise ConfigError(f"{tree.where(('base',))}: base must be a mapping, such as `preset: embedded`")
    over = tree.under("base").without("preset", "config")
    origin = Tree({})
    given = [key for key in ("preset", "config") if key in base]
    if len(given) == 2:
        raise ConfigError(f"{tree.where(('base', 'config'), key=True)}: base names a preset and a config; keep one")
    for key in given:
        where = tree.where(("base", key))
        if not isinstance(base[key], str):
            raise ConfigError(f"{where}: base.{key} is {base[key]}, but must be text")
        try:
            origin = presets.tree(base[key]) if key == "preset" else load_tree(folder / base[key])
        except ConfigError as error:
            raise ConfigError(*(f"{where}: {problem}" for problem in error.problems)) from None
    return parse(Config, merge(origin, over))


def _read_head(tree: Tree) -> _Head:
    value: dict[str, Any] = {key: tree.value[key] for key in ("search", "resources") if key in tree.value}
    return parse(_Head, replace(tree, value=value))


def _read_params(tree: Tree) -> tuple[dict[str, Param], list[str]]:
    specs = tree.value.get("space")
    if not isinstance(specs, dict) or not specs:
        return {}, [f"{tree.where(('space',))}: space must name at least one field to search"]
    params: dict[str, Param] = {}
    problems: list[str] = []
    for path, spec in specs.items():
        param, found = _read_param(tree, path, spec)
        problems += found
        if param is not None:
            params[path] = param
    return params, problems


def _read_param(tree: Tree, path: str, spec: Any) -> tuple[Param | None, list[str]]:
    here: TreePath = ("space", path)
    kinds = [kind for kind in _KINDS if isinstance(spec, dict) and kind in spec]
    if len(kinds) != 1:
        got = f"names {' and '.join(kinds)}" if kinds else "names none of them"
        example = "such as {float: [0.1, 1.0], log: true}"
        return None, [f"{tree.where(here)}: {path} must have exactly one of float, int and choice, {example}; it {got}"]
    kind = kinds[0]
    known = (kind, "log", "step", "when") if kind != "choice" else (kind, "when")
    problems = [
        f"{tree.where((*here, key), key=True)}: {path}: {key} does not belong to {kind}{did_you_mean(key, known)}"
        for key in spec
        if key not in known
    ]
    values = spec[kind]
    if not isinstance(values, list) or (kind != "choice" and len(values) != 2):
        wanted = "a list of values" if kind == "choice" else "[low, high]"
        return None, [*problems, f"{tree.where((*here, kind))}: {path}: {kind} must be {wanted}"]
    when = spec.get("when", {})
    if not isinstance(when, dict):
        return None, [*problems, f"{tree.where((*here, 'when'))}: {path}: when must be a mapping, path: value"]
    data: dict[str, Any] = {key: spec[key] for key in ("log", "step") if key in spec and key in known}
    data["when"] = {parent: tuple(_frozen(v if isinstance(v, list) else [v])) for parent, v in when.items()}
    data |= {"choices": _frozen(values)} if kind == "choice" else {"low": values[0], "high": values[1]}
    model = _KINDS[kind]
    try:
        return model.model_validate(data), problems
    except ValidationError as error:
        places: dict[str, TreePath] = {"low": (kind, 0), "high": (kind, 1), "choices": (kind,)}
        found = [
            replace(
                problem,
                paths=tuple((*here, *places.get(str(p[0]), p)) for p in problem.paths if p) or (here,),
                text=f"{path}: {problem.text}",
            )
            for problem in validation_problems(error, model)
        ]
        return None, problems + located(found, tree)


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _settled(space: Space) -> Space:
    """The checked space with choices as the configuration keeps them and parents before children."""
    params: dict[str, Param] = {}
    for path in _parents_first(space.params):
        param = space.params[path]
        if isinstance(param, Choice):
            kept = [space.base.with_values(space_values) for space_values in _each(space, path, param)]
            param = param.model_copy(update={"choices": tuple(config.at(path) for config in kept)})
        params[path] = _where_read(path, param, params.get("method"))
    return replace(space, params=params)


def _where_read(path: str, param: Param, methods: Param | None) -> Param:
    """The field with the condition that the sampled method reads it, where not all of them do."""
    if methods is None or "method" in param.when:
        return param
    reading = tuple(method for method in methods.ends() if reads(str(method), path))
    return (
        param
        if len(reading) in (0, len(methods.ends()))
        else param.model_copy(update={"when": {"method": reading, **param.when}})
    )


def _each(space: Space, path: str, param: Choice) -> Iterator[dict[str, Any]]:
    for value in param.choices:
        yield with_parents(space, {path: value}) or {path: value}


def _parents_first(params: Mapping[str, Param]) -> list[str]:
    order: list[str] = []

    def add(path: str) -> None:
        if path in params and path not in order:
            for parent in params[path].when:
                add(parent)
            order.append(path)

    for path in ("method", *params):  # the method decides what others' conditions meet in the base
        add(path)
    return order


def _changed(space: Space, changes: list[tuple[str, str, Any]]) -> Space:
    """The space with (where it was asked for, path, value) put in, checked anew."""
    problems = [
        f"{where}: {path} is searched by this space ({space.tree.where(('space', path), key=True)}); "
        "take it out of the file's `space` to fix its value"
        for where, path, _ in changes
        if path in space.params
    ]
    heads = ("search.", "resources.")
    in_head = [(where, path, value) for where, path, value in changes if path.startswith(heads)]
    in_base = {path: (where, value) for where, path, value in changes if not path.startswith(heads)}
    base, found = _collect(lambda: replaced(space.base, in_base) if in_base else space.base)
    head, more = _collect(lambda: _changed_head(space, in_head))
    problems += found + more
    if problems or base is None or head is None:
        raise ConfigError(*dict.fromkeys(problems))
    changed = replace(space, base=base, search=head.search, resources=head.resources)
    asked = ", ".join(dict.fromkeys(where for where, _, _ in changes))
    if problems := space_problems(changed, rules=True):
        raise ConfigError(*(f"{asked}: {problem}" for problem in problems))
    return changed


def _changed_head(space: Space, changes: list[tuple[str, str, Any]]) -> _Head:
    value = {"search": space.search.model_dump(exclude={"mode"}), "resources": space.resources.model_dump()}
    marks: dict[TreePath, Any] = {}
    for where, path, new in changes:
        section, _, name = path.partition(".")
        value[section][name] = new
        marks[(section, name)] = where
    asked = ", ".join(dict.fromkeys(where for where, _, _ in changes))
    return parse(_Head, Tree(value, asked, marks, marks))
