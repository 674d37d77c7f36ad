"""What a section of a report is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from hpcl.analysis.charts.look import svg
from hpcl.errors import harmless


@dataclass(frozen=True)
class Drawing:
    """A chart in the page."""

    svg: str
    small: bool = False
    """Whether it is to stay small on a wide screen."""


@dataclass(frozen=True)
class Grid:
    """A small table in the page."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Section:
    """One question."""

    id: str
    title: str
    texts: Sequence[str] = ()
    figures: Sequence[Drawing] = ()
    table: Grid | None = None
    html: str = ""
    """HTML that is taken as it is: its maker has escaped what it holds."""
    folded: bool = False
    """Whether it opens only when it is asked for."""


def draw(figure: Figure, alt: str, *, small: bool = False) -> Drawing:
    """A chart for the page; `alt` says what is seen, for those who do not see it."""
    return Drawing(svg(figure, harmless(alt)), small)
