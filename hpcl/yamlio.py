"""YAML in and out, with the place of every mistake.

Plain YAML as its version 1.2 core schema reads it, so `1e-4` is a number and
`no` is text. PyYAML's own loader reads `1e-4` as text and lets the last of two
equal keys win silently; here both are handled. Aliases and tags are refused: a
configuration needs neither, and a few lines of them can fill the memory.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from hpcl.config import Config
from hpcl.errors import ConfigError
from hpcl.files import read_some, write_text
from hpcl.validation import Problem, TreePath, field_paths, validation_problems

MAX_DEPTH, MAX_BYTES = 64, 64_000
"""Nesting and size of a YAML file beyond which it is refused: checking one of megabytes takes hours."""

ModelT = TypeVar("ModelT", bound=BaseModel)

_NULL = re.compile(r"null|Null|NULL|~|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
# Text that every YAML reader takes for text without quotes (1.1 readers take `no` and `on` for booleans).
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})


@dataclass(frozen=True)
class Mark:
    """A place in a file; lines and columns count from 1, line 0 means the whole source."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Tree:
    """A YAML mapping with the place of each of its keys and values.

    `keys` and `values` are indexed by the path from the root, for example
    ``("augment", "crop_scale", 0)``.
    """

    value: dict[str, Any]
    file: str = "(no file)"
    keys: Mapping[TreePath, Mark] = field(default_factory=dict)
    values: Mapping[TreePath, Mark] = field(default_factory=dict)

    def where(self, *paths: TreePath, key: bool = False) -> str:
        """Place of the first of `paths` that the tree has, else of the nearest enclosing part."""
        marks = self.keys if key else self.values
        for path in paths:
            if path in marks:
                return str(marks[path])
        for path in paths:
            for end in range(len(path), 0, -1):
                if path[:end] in self.values:
                    return str(self.values[path[:end]])
        return str(self.values.get((), Mark(self.file)))

    def under(self, *prefix: str | int) -> Tree:
        """The subtree below a path; the root of the subtree must be a mapping or absent."""
        node: Any = self.value
        for name in prefix:
            node = node.get(name, {}) if isinstance(node, dict) else {}
        n = len(prefix)
        keys = {path[n:]: mark for path, mark in self.keys.items() if path[:n] == prefix and len(path) > n}
        values = {path[n:]: mark for path, mark in self.values.items() if path[:n] == prefix}
        return Tree(node if isinstance(node, dict) else {}, self.file, keys, values)

    def without(self, *names: str) -> Tree:
        """The tree without these keys at its root."""
        value = {name: item for name, item in self.value.items() if name not in names}
        keys = {path: mark for path, mark in self.keys.items() if path[0] not in names}
        values = {path: mark for path, mark in self.values.items() if not path or path[0] not in names}
        return Tree(value, self.file, keys, values)


def load_tree(path: str | os.PathLike[str]) -> Tree:
    """The mapping in a YAML file, with the place of every key and value.

    Raises:
        ConfigError: no such file, not YAML, a key twice, an alias or tag, no mapping at the root.
    """
    file = Path(path)
    try:
        data = read_some(file, MAX_BYTES)
    except FileNotFoundError:
        siblings = [str(p) for p in sorted(file.parent.glob("*.y*ml"))] if file.parent.is_dir() else []
        raise ConfigError(f"{file}: there is no such file{did_you_mean(str(file), siblings)}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{file}: is larger than {MAX_BYTES // 1000} kB, so it is no configuration or space of ours")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not a text file in UTF-8, but must be YAML") from None
    return read_tree(text, str(file))


def read_tree(text: str, file: str = "(text)") -> Tree:
    """The mapping in a YAML text; see `load_tree`."""
    reader = _Reader(text, file)
    value = reader.read()
    if not reader.problems and not isinstance(value, dict):
        got = "empty" if value is None else f"a {type(value).__name__}"
        reader.problems.append(f"{file}:1:1: the file is {got}, but must be a mapping (`key: value` lines)")
    if reader.problems:
        raise ConfigError(*reader.problems)
    return Tree(value, file, reader.keys, reader.values)


def read_value(text: str, file: str) -> Any:
    """One YAML value, as on the right of `--set path=value`; `file` names it in errors."""
    reader = _Reader(text, file)
    value = reader.read()
    if reader.problems:
        raise ConfigError(*reader.problems)
    return value


def merge(base: Tree, over: Tree) -> Tree:
    """`base` with the values of `over` put in, mapping by mapping; places come from where a value came from."""

    def merged(low: Any, high: Any) -> Any:
        if not (isinstance(low, dict) and isinstance(high, dict)):
            return high
        return low | {name: merged(low[name], value) if name in low else value for name, value in high.items()}

    # A list that `over` replaces takes the places of its old items with it.
    fresh = {path for path in over.values if path and not isinstance(_value_at(over.value, path), dict)}

    def kept(path: TreePath) -> bool:
        return not any(path[:end] in fresh for end in range(1, len(path) + 1))

    keys = {path: mark for path, mark in base.keys.items() if kept(path)} | dict(over.keys)
    values = {path: mark for path, mark in base.values.items() if kept(path)} | dict(over.values)
    return Tree(merged(base.value, over.value), over.file, keys, values)


def parse(model_class: type[ModelT], tree: Tree) -> ModelT:
    """The model that a tree describes.

    Raises:
        ConfigError: all problems at once, each "file:line:column: path is X, but must be Y".

    Example:
        >>> from hpcl.config import Config
        >>> parse(Config, read_tree("clusters: {multiplier: 2.0}")).clusters.multiplier
        2.0
    """
    try:
        return model_class.model_validate(tree.value)
    except ValidationError as error:
        raise ConfigError(*located(validation_problems(error, model_class), tree)) from None


def load(model_class: type[ModelT], path: str | os.PathLike[str]) -> ModelT:
    """The model in a YAML file; raises ConfigError as `load_tree` and `parse` do."""
    return parse(model_class, load_tree(path))


def located(problems: Iterable[Problem], tree: Tree) -> list[str]:
    """Problems as sentences that begin with their place in the tree, in the order of the file."""

    def place(problem: Problem) -> tuple[str, int, int]:
        where = tree.where(*problem.paths, key=problem.at_key)
        numbers = re.search(r":(\d+):(\d+)$", where)
        return (where, *((int(numbers[1]), int(numbers[2])) if numbers else (0, 0)))

    placed = sorted(((place(problem), problem.text) for problem in problems), key=lambda pair: pair[0][1:])
    return [f"{where}: {text}" for (where, _, _), text in placed]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Text to put behind a wrong word: `; did you mean X?` with the nearest known one, else nothing."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:  # the right name in another section: `moco.batch` for `optimizer.batch`
        last = word.rsplit(".", 1)[-1]
        close = [path for path in known if path.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean {close[0]}?" if close else ""


def dump(value: BaseModel | Mapping[str, Any], header: str = "") -> str:
    """YAML text that `load` reads back to an equal model.

    Args:
        value: a model, or a mapping of plain values (lists and tuples stand on one line).
        header: lines put on top as comments.
    """
    tree = value.model_dump() if isinstance(value, BaseModel) else dict(value)
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    body: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return comment + body


def write(path: str | os.PathLike[str], value: BaseModel | Mapping[str, Any], header: str = "") -> None:
    """Writes `dump(value, header)` so that a reader sees the old file or the new one, never a part."""
    write_text(Path(path), dump(value, header))


def assignment(text: str, flag: str = "--set") -> tuple[str, Any]:
    """Path and value of a `path=value` from the command line; the value is read as YAML.

    Example:
        >>> assignment("moco.temperature=1e-1")
        ('moco.temperature', 0.1)
    """
    path, equals, value = text.partition("=")
    if not (path.strip() and equals):
        raise ConfigError(f"{flag} {text}: must be path=value, for example {flag} clusters.first=4")
    return path.strip(), read_value(value, f"{flag} {text}")


def replaced(config: Config, values: Mapping[str, tuple[str, Any]]) -> Config:
    """The configuration with fields replaced, each given as path -> (where it was asked for, value).

    Raises:
        ConfigError: all problems at once; each begins with where the value was asked for.
    """
    known = field_paths(type(config))
    problems = []
    for path, (where, _) in values.items():
        if inside := [name for name in known if name.startswith(f"{path}.")]:
            problems.append(f"{where}: {path} is a section, but must be one of its fields, such as {inside[0]}")
        elif path not in known:
            problems.append(f"{where}: {path}: there is no such field{did_you_mean(path, known)}")
    if problems:
        raise ConfigError(*problems)
    try:
        return config.with_values({path: value for path, (_, value) in values.items()})
    except ValidationError as error:
        labels: dict[TreePath, Mark] = {tuple(path.split(".")): Mark(where) for path, (where, _) in values.items()}
        everything = Tree({}, ", ".join(dict.fromkeys(where for where, _ in values.values())), {}, labels)
        raise ConfigError(*located(validation_problems(error, type(config)), everything)) from None


def load_config_with(
    path: str | os.PathLike[str], assignments: Iterable[str], *, data: str | None = None, epochs: int | None = None
) -> Config:
    """The configuration in a YAML file with changes from the command line.

    Args:
        path: the file.
        assignments: `path=value` texts of `--set`.
        data: replaces `data.source`.
        epochs: total epochs; the stages are scaled in proportion.

    Raises:
        ConfigError: as `load` and `replaced` do; a mistake in the file is reported before the changes are made.
    """
    values = {name: (f"--set {text}", value) for text in assignments for name, value in [assignment(text)]}
    if data is not None:
        values["data.source"] = (f"--data {data}", data)
    if epochs is not None:
        values["stages.total"] = (f"--epochs {epochs}", epochs)
    return replaced(load(Config, path), values)


def _value_at(tree: Any, path: TreePath) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _scalar(text: str) -> Any:
    """The value of an unquoted scalar under YAML 1.2's core schema."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text) and len(text) <= 400:  # int() refuses thousands of digits
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinite := _INFINITE.fullmatch(text):
        return -math.inf if infinite[1] == "-" else math.inf
    return math.nan if _NAN.fullmatch(text) else text


class _Reader:
    """Builds plain values from PyYAML's events and keeps the place of each."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        self.problems: list[str] = []
        self.keys: dict[TreePath, Mark] = {}
        self.values: dict[TreePath, Mark] = {}

    def read(self) -> Any:
        try:
            events = iter(yaml.parse(self.text, Loader=yaml.SafeLoader))
            next(events)  # start of the stream
            if isinstance(next(events), yaml.StreamEndEvent):
                return None
            value = self._node(next(events), (), events)
            next(events)  # end of the document
            extra = next(events)
            if not isinstance(extra, yaml.StreamEndEvent):
                self._problem(extra, "a second document starts here, but one file holds one")
            return value
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = Mark(self.file, mark.line + 1, mark.column + 1) if mark else Mark(self.file)
            context = f" ({error.context})" if error.context else ""
            self.problems.append(f"{place}: is not YAML: {error.problem}{context}")
        except yaml.YAMLError as error:  # characters that no YAML text may hold
            self.problems.append(f"{self.file}: is not YAML: {' '.join(str(error).split())}")
        return None

    def _mark(self, event: Any) -> Mark:
        return Mark(self.file, event.start_mark.line + 1, event.start_mark.column + 1)

    def _problem(self, event: Any, text: str) -> None:
        self.problems.append(f"{self._mark(event)}: {text}")

    def _node(self, event: Any, path: TreePath, events: Iterator[Any]) -> Any:
        self.values[path] = self._mark(event)
        if isinstance(event, yaml.AliasEvent):
            self._problem(event, f"*{event.anchor} is an alias, but aliases are not read: write the value out")
            return None
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._problem(event, f"{tag} is a tag, but tags are not read: write a plain value")
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event.value) if event.implicit[0] else event.value
        if len(path) >= MAX_DEPTH:
            raise ConfigError(f"{self._mark(event)}: nests more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(event := next(events), yaml.SequenceEndEvent):
                items.append(self._node(event, (*path, len(items)), events))
            return items
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            name = event.value if isinstance(event, yaml.ScalarEvent) else None
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
                self._problem(event, "a key must be plain text")
                self._node(event, (*path, "?"), events)
                name = None
            elif name in mapping:
                first = self.keys[(*path, name)].line
                self._problem(event, f"the key {name} stands here a second time (first in line {first}); remove one")
                name = None
            if name is None:
                self._node(next(events), (*path, "?"), events)
                continue
            self.keys[(*path, name)] = self._mark(event)
            mapping[name] = self._node(next(events), (*path, name), events)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Plain values only: no anchors, lists on one line, text quoted wherever a reader could take it for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dump_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _dump_list(dumper: yaml.SafeDumper, items: Iterable[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", list(items), flow_style=True)


_Dumper.add_representer(str, _dump_text)
_Dumper.add_representer(list, _dump_list)
_Dumper.add_representer(tuple, _dump_list)
