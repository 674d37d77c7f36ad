"""``hpcl suggest results/<name>``: what the search says of its ranges, and the space to search next.

A range whose edge holds the best trials is extended beyond it; a field that matters is narrowed to where the good
trials lie; a field without any effect, in trials enough to see one, is fixed at the value of trial 0, the base's; what
cannot be told stays as it is. All else in the base becomes the robust best's, so trial 0 of the next search is the best
of this one, but for what was fixed. :mod:`hpcl.analysis.ranges` has the tests.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hpcl.analysis.edges import extended, narrowed
from hpcl.analysis.pooled import space_of
from hpcl.analysis.ranges import EFFECT, LEAST, POWER, Seen, look, trials_needed
from hpcl.analysis.robust import Candidate, robust_best
from hpcl.analysis.text import aligned, counted, one_line
from hpcl.config import Config
from hpcl.errors import ConfigError, harmless
from hpcl.files import may_write
from hpcl.results import load_search
from hpcl.search.params import Choice, Param, same
from hpcl.search.space import Space, from_tree
from hpcl.validation import show
from hpcl.yamlio import dump, read_tree, write

if TYPE_CHECKING:
    from hpcl.results import SearchResults

FILE = "follow-up.yaml"
FIRST_LINE = "The space to search after "
"""How the header of a file begins that this command wrote, and may therefore write again."""
_FREE: Any = object()


@dataclass(frozen=True)
class Change:
    """What becomes of one field."""

    path: str
    seen: Seen
    before: str
    """Its range in the search, such as ``[0.1, 1.0] log``."""
    after: str
    """Its range in the next one, ``fixed at X``, or ``out`` where it can no longer act."""
    why: str
    """The verdict in words."""

    @property
    def changed(self) -> bool:
        """Whether the next search does otherwise."""
        return self.before != self.after


@dataclass(frozen=True)
class Suggestion:
    """The space to search next, and why."""

    search: SearchResults
    space: Space
    """It loads and runs as it is."""
    changes: tuple[Change, ...]
    """One for each searched field."""
    best: Candidate | None
    """The robust best, the base of the next space but for what is fixed; None where too few trials finished."""
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The table and what follows from it, as lines for a terminal and for the file's header."""
        cells = [("field", "range", "next", "verdict", "seen")]
        cells += [(c.path, c.before, c.after if c.changed else "the same", c.why, c.seen.text()) for c in self.changes]
        return [*aligned(cells), *(one_line(f"note: {note}") for note in self.notes)]


def suggest(search: SearchResults) -> Suggestion:
    """What a search says of its ranges, and the space to search next.

    Args:
        search: of :func:`hpcl.results.load_search`, with a ``space.yaml``.

    Raises:
        UserError: the folder has no space that can be read.
    """
    space = space_of(search)
    seen = {path: _seen(search, path) for path in space.params}
    search_next = space.search.model_copy(update={"seed": space.search.seed + 1})
    plain = replace(space, name=_next_name(space.name), search=search_next)
    if all(each.verdict == "few" for each in seen.values()):
        changes = [
            Change(path, seen[path], _range(p), _range(p), _words(seen[path])) for path, p in space.params.items()
        ]
        note = (
            f"{counted(len(search.finished), 'trial')} finished, {LEAST} are needed to say anything: nothing is "
            "changed but the seed of the sampler; search on with more trials"
        )
        return Suggestion(search, _checked(plain), tuple(changes), None, (*search.about.notes, note))
    found = robust_best([search])
    best, notes = found.best, list(search.about.notes)
    # What does not load is taken back, field by field: rules between fields are the configuration's to tell.
    held: set[str] = set()
    while True:
        made, changes = _next(plain, seen, best.values, held)
        try:
            checked = _checked(made)
            break
        except ConfigError as error:
            wide = [c.path for c in changes if c.changed and c.path not in held]
            if not wide:
                checked, changes = _checked(plain), []
                notes.append(f"no change is possible: {error.problems[0]}")
                break
            named = [path for path in wide if path in str(error)] or wide
            held |= set(named)
            notes.append(f"{', '.join(named)}: left as it was, for the configuration refuses it: {error.problems[0]}")
    if any(each.verdict == "unclear" and each.power < POWER for each in seen.values()):
        notes.append(
            f"that a field has no effect is seen from about {trials_needed()} finished trials on in which it acts"
        )
    fixed = [c for c in changes if c.after.startswith("fixed") and c.seen.verdict == "no effect"]
    if fixed:
        notes.append(
            "fixed at the value of the former base is what shows no effect: no more than chance gives, where one that "
            f"explains {EFFECT:.1%} of the ranks would have been seen with a probability of {POWER:.0%} or more; what "
            "matters only together with another field is not seen"
        )
    but = f" but for the {counted(len(fixed), 'field')} without an effect" if fixed else ""
    notes.append(
        f"the base is {best.name}, the robust best ({found.evidence()}), so trial 0 of the next search is that{but}"
    )
    notes.append(f"search.seed is {checked.search.seed}, so that the same points are not drawn again")
    return Suggestion(search, checked, tuple(changes), best, tuple(notes))


def main(folder: Path, out: Path | None) -> None:
    """``hpcl suggest FOLDER``: print the table, and write the space to search next.

    Args:
        folder: of a search.
        out: YAML file to write; None: ``follow-up.yaml`` in the folder.

    Raises:
        UserError: the folder is no search with a space, or the file is there and was not written by this command.
    """
    search = load_search(folder)
    out = folder / FILE if out is None else out
    may_write(out, FIRST_LINE, "hpcl suggest", "give another --out")
    made = suggest(search)
    print(harmless("\n".join(made.lines())), flush=True)
    write(out, made.space.to_tree(), header(made))
    command = f"python run_search.py --space {shlex.quote(str(out))}"
    lines = (f"written  {out}", f"then     {command}   (--dry-run first)")
    print(harmless("\n".join(map(one_line, lines))), flush=True)


def header(made: Suggestion) -> str:
    """The comment on top of the file: what was changed and why, field by field."""
    name = made.search.about.name
    done = counted(len(made.search.finished), "finished trial")
    first = one_line(f"{FIRST_LINE}{name}, by {done} of {len(made.search.trials)}.")
    return harmless("\n".join([first, "", *made.lines()]))


def _seen(search: SearchResults, path: str) -> Seen:
    field, done = search.fields[path], search.finished
    acted = done[field.acts(done)]
    good = search.sign * acted["objective"].to_numpy(dtype=float)
    return look(field, acted[field.column], good, len(search.fields))


def _next(
    space: Space, seen: Mapping[str, Seen], best: Mapping[str, Any], held: set[str]
) -> tuple[Space, list[Change]]:
    """The space with each field as its verdict has it, not yet checked; fields in `held` keep their ranges."""
    fixed = {
        path: value
        for path, param in space.params.items()
        if path not in held and (value := _fixed(param, seen[path], best.get(path), space.base.at(path))) is not _FREE
    }
    why = {path: _words(seen[path]) for path in space.params}
    why |= {path: f"{why[path]}; kept, the configuration allows no other" for path in held}
    for path in [path for path in fixed if seen[path].verdict == "no effect"]:
        children = {child for child, p in space.params.items() if path in p.when and child not in fixed}
        if not all(_can_act(space.params[child], fixed) for child in children):
            del fixed[path]
            why[path] += "; kept, as fields depend on it"
            held = held | {path}
    if not any(_can_act(param, fixed) for path, param in space.params.items() if path not in fixed):
        # A space must search something: of what is not decided (a choice may be) what comes nearest to mattering.
        free = [path for path in fixed if not space.params[path].when]
        free = [path for path in free if seen[path].verdict == "no effect"] or free
        least = min(free, key=lambda path: seen[path].p_effect)
        del fixed[least]
        why[least] += "; kept, as something must be searched"
        held = held | {least}
    base = space.base.with_values(dict(best))
    for path, value in list(fixed.items()):
        try:
            base = base.with_values({path: value})
        except ValidationError:
            del fixed[path]
            why[path] += "; kept, the configuration refuses the former base's value"
            held = held | {path}
    params: dict[str, Param] = {}
    changes = []
    for path, param in space.params.items():
        if path in fixed:
            after = f"fixed at {show(base.at(path))}"
            why[path] += _worse_text(param, seen[path], best.get(path))
        else:
            new = param
            if path not in held:
                new, more = _changed(param, seen[path], best.get(path), base, path)
                why[path] += more
            when = _still(space, path, params, base)
            if when is None:
                after = "out"
                why[path] = "can no longer act" if new is param else f"{why[path]}; it can no longer act"
            else:
                params[path] = new.model_copy(update={"when": when})
                after = _range(new)
        changes.append(Change(path, seen[path], _range(param), after, why[path]))
    return replace(space, base=base, params=params), changes


def _can_act(param: Param, fixed: Mapping[str, Any]) -> bool:
    """Whether fixed values let a field act."""
    return all(
        parent not in fixed or any(same(fixed[parent], value) for value in allowed)
        for parent, allowed in param.when.items()
    )


def _left(param: Choice, seen: Seen, best: Any) -> tuple[list[Any], list[Any]]:
    """Choices that are left, and those that are clearly worse; the robust best's is never among those."""
    worse = [value for value in seen.worse if not same(value, best)] if seen.verdict == "matters" else []
    return [c for c in param.choices if not any(same(c, value) for value in worse)], worse


def _fixed(param: Param, seen: Seen, best: Any, base: Any) -> Any:
    """The value at which a field is fixed; _FREE where it stays searched."""
    if seen.verdict == "no effect":
        return param.nearest(base)  # what trial 0 had
    if isinstance(param, Choice):
        left, _ = _left(param, seen, best)
        return left[0] if len(left) == 1 else _FREE
    return _FREE


def _worse_text(param: Param, seen: Seen, best: Any) -> str:
    worse = _left(param, seen, best)[1] if isinstance(param, Choice) else []
    return f": {', '.join(show(value) for value in worse)} clearly worse" if worse else ""


def _changed(param: Param, seen: Seen, best: Any, base: Config, path: str) -> tuple[Param, str]:
    """A field that stays searched as its verdict has it, and what to add to the verdict."""
    if isinstance(param, Choice):
        left, worse = _left(param, seen, best)
        return (param.model_copy(update={"choices": tuple(left)}) if worse else param), _worse_text(param, seen, best)
    if seen.verdict == "edge":
        return extended(param, seen, best, base, path)
    return (narrowed(param, seen.span, best) if seen.verdict == "matters" else param), ""


def _still(space: Space, path: str, params: Mapping[str, Param], base: Config) -> dict[str, tuple[Any, ...]] | None:
    """The conditions of a field that can still fail; None where they can no longer be met."""
    when: dict[str, tuple[Any, ...]] = {}
    for parent, allowed in space.params[path].when.items():
        if parent in params:
            other = params[parent]
            left = tuple(value for value in allowed if _can_take(other, value))
            if not left:
                return None
            if not (isinstance(other, Choice) and all(any(same(c, v) for v in left) for c in other.choices)):
                when[parent] = left
        elif not any(same(base.at(parent), value) for value in allowed):
            return None
        elif parent not in space.params:
            when[parent] = allowed
    return when


def _can_take(param: Param, value: Any) -> bool:
    if isinstance(param, Choice):
        return any(same(value, choice) for choice in param.choices)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and bool(abs(param.nearest(value) - value) < 1e-12)


def _checked(space: Space) -> Space:
    """The space as a file would be read back.

    Raises:
        ConfigError: it would not.
    """
    return from_tree(read_tree(dump(space.to_tree()), "the next space"))


def _words(seen: Seen) -> str:
    """A verdict in words."""
    if seen.verdict == "unclear":
        return "not clear" if seen.power >= POWER else "too few trials to tell"
    return {
        "few": "too few trials to tell",
        "edge": f"best at its {' and '.join(seen.edges)} edge",
        "matters": "matters",
        "no effect": "no effect seen",
    }[seen.verdict]


def _range(param: Param) -> str:
    """A range in words."""
    if isinstance(param, Choice):
        return show(list(param.choices))
    step = f" step {show(param.step)}" if param.step not in (None, 1) else ""
    return f"[{show(param.low)}, {show(param.high)}]{' log' if param.log else ''}{step}"


def _next_name(name: str) -> str:
    """``clusters-2`` after ``clusters``, ``clusters-3`` after that."""
    numbered = re.fullmatch(r"(.*)-(\d{1,6})", name)
    return f"{numbered[1]}-{int(numbered[2]) + 1}" if numbered and numbered[1] else f"{name}-2"
