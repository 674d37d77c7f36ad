"""Lines for a terminal: counts in words, tables, and names that stay in their line."""

from __future__ import annotations

from collections.abc import Sequence

from hpcl.errors import harmless


def counted(n: int, noun: str, several: str = "") -> str:
    """A number of things, such as "1 trial" or "1,200 trials"."""
    return f"{n:,} {noun if n == 1 else several or noun + 's'}"


def one_line(text: str) -> str:
    """The text as one line without control characters: a name that holds a line's end must not forge a line."""
    return harmless(" ".join(text.splitlines()))


def aligned(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Rows of text as lines of a table, columns side by side; each row is one line, whatever its cells hold."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [indent + "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
