"""Which folder a search uses: a new one, or that of an unfinished search, which then goes on.

Without a name the folder is ``<results>/<name of the space>``, then ``-2``, ``-3`` and so on.
The same command again goes on with the newest unfinished search of the same space and leaves
finished ones alone. What differs between two spaces is told field by field.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hpcl.config import Config
from hpcl.errors import ConfigError, UserError
from hpcl.files import refuse_links
from hpcl.search import params
from hpcl.search.journal import JOURNAL_NAME, read_events
from hpcl.search.mirror import is_running
from hpcl.search.params import Param, Resources, Search, same
from hpcl.search.places import is_remote, place, shown
from hpcl.search.prefixes import PrefixPlan, plan_prefixes
from hpcl.search.space import Space, load, with_overrides
from hpcl.search.storage import drop, fetch
from hpcl.validation import field_paths, show

SPACE_NAME, RECORD_NAME = "space.yaml", "search.json"

BUDGETS = ("trials", "max_hours", "max_gpu_hours", "max_epochs")
"""Fields of `search` that say when it ends; raised, they let a finished search go on."""

MAY_DIFFER = frozenset(
    {f"search.{name}" for name in (*BUDGETS, "max_concurrent", "ahead", "retries", "hung_after", "give_up_after")}
    | {"resources.cpus_per_worker", "resources.gpus_per_worker", "resources.accelerator_type"}
)
"""Fields that may change when a search goes on: they do not change what a trial trains or how it is judged."""


_MISSING = 4
"""Numbers in a row that a store has no search of before no more are looked for."""


@dataclass(frozen=True)
class Choice:
    """Where the results go."""

    folder: Path
    """An absolute path."""
    resume: bool
    """Whether a search lies there already and goes on; False: the folder is to be made."""
    changes: tuple[str, ...] = ()
    """What differs from when it was last run, "path: value there, value here"; nothing that matters."""


def choose_folder(space: Space, name: str | None, results: str | Path, *, fresh: bool = False) -> Choice:
    """The folder of a search to be; nothing is made or changed.

    Args:
        space: the checked space.
        name: name of the folder; None: the space's, with a number where that is taken.
        results: folder of all results, or its URI.
        fresh: start anew, beside what is there.

    Raises:
        UserError: the search there is running, has finished, or is of another space (with what
            differs); or there can be no such folder.
    """
    if name is not None:
        with_overrides(space, name=name)
    root = place(results).resolve()
    first = root / (name or space.name)
    _bring(first)
    refuse_links(root / "prefixes", itself=True)
    if fresh:
        return Choice(_free(first), resume=False)
    there = [_Earlier(first)] if _exists(first) else []
    if name is not None:
        return _go_on(there[0], space) if there else Choice(first, resume=False)
    there = sorted(there + [_Earlier(folder, numbered=True) for folder in _numbered(first)], key=lambda e: e.age)
    for earlier in there:
        if not earlier.finished and earlier.is_of(space):
            return _go_on(earlier, space)
    newest = next((earlier for earlier in there if earlier.finished or earlier.is_called(space.name)), None)
    if newest is None or newest.finished:
        return Choice(_free(first), resume=False)
    return _go_on(newest, space)  # which refuses, and says what differs


def differences(there: Space, here: Space) -> tuple[list[str], list[str]]:
    """What differs between two spaces, "path: value there, value here": what keeps one search from going on
    as the other, and what does not matter."""
    pairs: dict[str, tuple[str, str]] = {}

    def compare(path: str, a: Any, b: Any, text: Callable[[Any], str] = show) -> None:
        if not same(a, b):
            pairs[path] = (text(a), text(b)) if text(a) != text(b) else (str(a), str(b))

    for path in field_paths(Config):
        a, b = there.base.at(path), here.base.at(path)
        compare(path, *((_full(a), _full(b)) if path == "data.source" else (a, b)))
    for path in {**there.params, **here.params}:
        compare(f"space: {path}", there.params.get(path), here.params.get(path), _spec)
    for section in ("search", "resources"):
        for field in (Search if section == "search" else Resources).model_fields:
            if field != "mode":  # follows from the metric
                a, b = (getattr(getattr(side, section), field) for side in (there, here))
                compare(f"{section}.{field}", a, b)
    if not pairs.keys() - MAY_DIFFER and pairs:
        a, b = (_stages(plan_prefixes(side)) for side in (there, here))
        compare("shared stages (they follow from search.trials)", a, b)
    texts = {path: f"{path}: {a} there, {b} here" for path, (a, b) in pairs.items()}
    return [texts[p] for p in texts if p not in MAY_DIFFER], [texts[p] for p in texts if p in MAY_DIFFER]


class _Earlier:
    """What lies in a folder that is there already.

    Args:
        folder: the folder.
        numbered: its name has a number behind the space's, so that it may be another search's own name.
    """

    def __init__(self, folder: Path, *, numbered: bool = False) -> None:
        self.folder, self._numbered = folder, numbered
        self._journal = folder / JOURNAL_NAME

    def __str__(self) -> str:
        return shown(self.folder)

    @property
    def is_search(self) -> bool:
        """Whether a search of this version was begun here."""
        return self._journal.is_file()

    @property
    def is_running(self) -> bool:
        """Whether a process runs it now."""
        return is_running(self.folder)

    @property
    def age(self) -> float:
        """Smaller for newer ones."""
        return -(self._journal if self.is_search else self.folder).stat().st_mtime

    @cached_property
    def finished(self) -> bool:
        """Whether it ended by itself."""
        try:
            state = json.loads((self.folder / RECORD_NAME).read_text(encoding="utf-8"))["state"]
        except (OSError, ValueError, KeyError, TypeError):
            return False  # killed before it was written
        return self.is_search and bool(state == "finished")

    @cached_property
    def only_begun(self) -> bool:
        """Whether it was killed before it had drawn a trial or written its space."""
        if not self.is_search or (self.folder / SPACE_NAME).exists():
            return False
        return not any(event["event"] == "trial" for event in read_events(self._journal))

    @cached_property
    def space(self) -> Space:
        """Its space.

        Raises:
            UserError: it is not the folder of a search, or the space cannot be read.
        """
        if not self.is_search:
            raise UserError(
                f"{self}: is there already, but holds no search that can go on (no {JOURNAL_NAME}: it was made by "
                "hand or by an older version); give another --name, --fresh to start beside it, or remove it"
            )
        try:
            return load(self.folder / SPACE_NAME)
        except ConfigError as error:
            raise UserError(
                f"{self}: its {SPACE_NAME} cannot be read by this version ({error.problems[0]}); give --fresh to "
                "start beside it, or another --name"
            ) from None

    def is_called(self, name: str) -> bool:
        """Whether it is a search of a space of this name."""
        try:
            return not self._numbered or self.space.name == name
        except UserError:
            return False

    def is_of(self, space: Space) -> bool:
        """Whether it can go on as a search of this space."""
        if self.only_begun:
            return True
        try:
            return self.is_called(space.name) and not differences(self.space, space)[0]
        except UserError:
            return False


def _go_on(earlier: _Earlier, space: Space) -> Choice:
    """Go on with the search in a folder."""
    if earlier.is_running:
        raise UserError(f"{earlier}: a search is running there; wait for it, give --fresh, or another --name")
    refuse_links(earlier.folder)
    if earlier.only_begun:
        return Choice(earlier.folder, resume=True)
    there = earlier.space
    refused, changes = differences(there, space)
    if refused:
        state = "a finished" if earlier.finished else "an unfinished"
        raise UserError(
            "\n  ".join([f"{earlier}: holds {state} search of another space (there / here):", *refused])
            + "\ngive --fresh to start beside it, or another --name"
        )
    if earlier.finished and not _extends(there.search, space.search):
        raise UserError(
            f"{earlier}: this search has finished; more --trials than {there.search.trials} go on with it, --fresh "
            "starts beside it, --name gives another name"
        )
    return Choice(earlier.folder, resume=True, changes=tuple(changes))


def _extends(there: Search, here: Search) -> bool:
    """Whether a limit was raised or taken away."""
    limits = [(getattr(there, name), getattr(here, name)) for name in BUDGETS]
    return any(a is not None and (b is None or b > a) for a, b in limits)


def _exists(folder: Path) -> bool:
    try:
        return folder.exists()
    except OSError as error:  # a name of 300 letters
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); choose another with --results or --name"
        ) from None


def _free(first: Path) -> Path:
    """The folder itself, or the first with a number behind its name that is not there."""
    return next(folder for folder in itertools.chain([first], _with_numbers(first)) if not _exists(folder))


def _with_numbers(first: Path) -> Iterator[Path]:
    return (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))


def _numbered(first: Path) -> list[Path]:
    """Folders with this name and a number behind it."""
    pattern = re.compile(re.escape(first.name) + r"-[1-9]\d*")
    siblings = first.parent.iterdir() if first.parent.is_dir() else ()
    return [folder for folder in siblings if folder.is_dir() and pattern.fullmatch(folder.name)]


def _bring(first: Path) -> None:
    """Bring what a store has of this name, with a number or without; not every store can list its folders."""
    missing = 0
    for folder in itertools.chain([first], _with_numbers(first)):
        if missing == _MISSING or not is_remote(folder):
            return
        drop(folder)
        fetch(folder)
        missing = 0 if folder.exists() else missing + 1


def _full(source: str) -> str:
    return source if source == "mnist5k" else str(Path(source).expanduser().resolve())


def _spec(param: Param | None) -> str:
    """How a field is searched, as in the space file."""
    if param is None:
        return "not searched"
    ends = param.choices if isinstance(param, params.Choice) else (param.low, param.high)
    rest = param.model_dump(exclude_defaults=True, exclude={"kind", "low", "high", "choices"})
    parts = [f"{key}: {show(value)}" for key, value in {param.kind: ends, **rest}.items()]
    return "{" + ", ".join(parts) + "}"


def _stages(shared: PrefixPlan | None) -> str:
    if shared is None:
        return "none"
    return "1" if shared.stage == 1 else f"1 to {shared.stage}"
