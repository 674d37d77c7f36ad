"""The text of ``hpcl data check``: what a source holds, then all that was found, grouped by reason."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hpcl.errors import harmless
from hpcl.sources.check import Checked, Finding
from hpcl.sources.source import SPLITS

_SHOWN = 3
_TWIN = "as another image"
MARK = "hpcl data check"
"""First words of the file, by which it is known as ours."""


def lines(checked: Checked, shown: int | None = _SHOWN) -> Iterator[str]:
    """The text, line by line.

    Args:
        checked: from :func:`hpcl.sources.check.check`.
        shown: findings of each reason that are named; None names all.
    """
    source = checked.source
    yield harmless(f"{MARK}: {source.path or source.kind} (kind: {source.kind})")
    for note in source.notes:
        yield harmless(f"  {note}")
    splits = ", ".join(f"{checked.of_split[code]:,} {name}" for code, name in enumerate(SPLITS))
    yield f"{checked.images:,} usable images: {splits}"
    if checked.images:
        yield f"size: {_sizes(checked)}"
    yield from _classes(checked)
    yield from (harmless(f"cannot be used: {text}") for text in checked.unusable)
    if not checked.found and not checked.unusable:
        yield "found: nothing to report"
    for kind, entries in sorted(checked.findings.items()):
        yield f"{kind}: {len(entries):,}"
        for reason, group in _grouped(entries).items():
            yield f"  {len(group):,} x {reason}"
            some = group if shown is None else group[:shown]
            for where, what in some:
                yield f"    {where}" + (f": {what}" if what != reason else "")
            if len(some) < len(group):
                yield f"    and {len(group) - len(some):,} more"


def _grouped(entries: list[Finding]) -> dict[str, list[Finding]]:
    """The findings by reason, without its details, numbers and names; the most frequent first."""
    groups: dict[str, list[Finding]] = {}
    for where, what in entries:
        key = re.sub(r"\d[\d,]*", "N", re.split(r"[;:(']|, ", what, maxsplit=1)[0]).strip()
        groups.setdefault(_TWIN if what.startswith("as ") else key, []).append((where, what))
    named = {}
    for key, group in sorted(groups.items(), key=lambda pair: -len(pair[1])):
        same = len({what for _, what in group}) == 1
        named[group[0][1] if same and key != _TWIN else key or group[0][1]] = group
    return named


def _sizes(checked: Checked) -> str:
    said = ", ".join(f"{width}x{height} ({count:,})" for (width, height), count in checked.sizes.most_common(4))
    more = f" and {len(checked.sizes) - 4:,} more sizes" if len(checked.sizes) > 4 else ""
    colour = checked.images - checked.gray
    kind = "gray" if not colour else "colour" if not checked.gray else f"{colour:,} colour, {checked.gray:,} gray"
    advice = "" if len(checked.sizes) == 1 or checked.size else "; several sizes need data.size"
    return f"{said}{more}, {kind}{advice}"


def _classes(checked: Checked) -> Iterator[str]:
    if not checked.classes:
        yield "classes: none (unlabelled)"
        return
    counts = sorted(((sum(of), name) for name, of in checked.classes.items()), key=lambda pair: (-pair[0], pair[1]))
    (most, largest), (least, smallest) = counts[0], counts[-1]
    each = (
        f"{most:,} images each" if most == least else f"largest {largest} ({most:,}), smallest {smallest} ({least:,})"
    )
    yield f"classes: {len(counts):,}, {each}"
    in_split = [{name for name, of in checked.classes.items() if of[code]} for code in range(len(SPLITS))]
    for code in (1, 2):
        if strange := in_split[code] - in_split[0]:
            apart = len(strange) == len(in_split[code])
            then = (
                f": kept for few-shot episodes, and {SPLITS[code]} is drawn from the training images" if apart else ""
            )
            of = f"{len(strange):,} of the {len(in_split[code]):,} classes of {SPLITS[code]}"
            yield f"  {of} have no training image{then}"
    if checked.coarse:
        top = sorted(checked.coarse.items(), key=lambda pair: (-pair[1], pair[0]))
        yield (
            f"coarse classes: {len(top):,}, largest {top[0][0]} ({top[0][1]:,}), smallest {top[-1][0]} ({top[-1][1]:,})"
        )
