"""How a configuration differs from the research notes', whose values are the defaults."""

from __future__ import annotations

from collections.abc import Iterable

from hpcl.analysis.text import aligned
from hpcl.config import Config
from hpcl.methods import METHODS
from hpcl.sections import STAGES, Stages
from hpcl.stages import stage_lengths
from hpcl.validation import field_paths, show

_LENGTHS = {"stages.total", *(f"stages.stage{stage}.epochs" for stage in STAGES)}

SEARCHED = "against the research notes' configuration"
BASE = "also different, by the base of the search"
METHOD = "also different, by the method"


def differences_from_notes(config: Config, searched: Iterable[str] = ()) -> dict[str, list[str]]:
    """Title -> a line per field that differs from the notes: what was searched, the method's defaults, the base.

    The lengths of the stages stand in one line, as they are scaled to the total.

    Args:
        config: complete.
        searched: paths of fields that a search chose.
    """
    notes, searched = Config(), set(searched)
    rows: dict[str, list[tuple[str, str, str]]] = {SEARCHED: [], METHOD: [], BASE: []}
    defaults = METHODS[config.method].defaults
    own, theirs = stage_lengths(config.stages), stage_lengths(notes.stages)
    if own != theirs:
        same = ", in the same proportion" if stage_lengths(Stages(total=sum(own))) == own else ""
        title = SEARCHED if searched & _LENGTHS else BASE
        rows[title].append(("stages", f"{_lengths(own)} epochs", f"(notes: {_lengths(theirs)}{same})"))
    for path in field_paths(Config):
        value, of = config.at(path), notes.at(path)
        if path not in _LENGTHS and value != of:
            by_method = path in defaults and value == defaults[path]
            title = SEARCHED if path in searched else METHOD if by_method else BASE
            rows[title].append((path, show(value), f"(notes: {show(of)})"))
    if not any(rows.values()):
        return {SEARCHED: ["it is the notes' configuration"]}
    lines = {title: aligned(found) for title, found in rows.items() if found}
    return {SEARCHED: ["what was searched has the notes' values"], **lines} if searched else lines


def _lengths(lengths: tuple[int, ...]) -> str:
    return f"{'/'.join(str(n) for n in lengths)} = {sum(lengths)}"
