"""How all charts look: their colours, a figure to draw in, and its SVG for a page.

Charts are matplotlib figures, so a notebook shows them as they are. In a page's SVG text stays text, and each colour of
:data:`COLOURS` becomes a CSS variable (``--ink``, ``--best``, ...) that the page defines for light and dark.
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from html import escape
from typing import Any, ParamSpec

from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

P = ParamSpec("P")

COLOURS = {
    "ink": "#1a1c1f",
    "muted": "#6a7076",
    "rule": "#d5d9dd",
    "band": "#eef1f4",
    "finished": "#1b6ca8",
    "stopped": "#a9adb2",
    "failed": "#7b2d8b",
    "diverged": "#c0392b",
    "running": "#4d7f6b",
    "best": "#e07a1f",
    "base": "#2a8f57",
    "noise": "#b9862b",
}
"""Role -> colour on a light page; the page's style sheet has them for dark ones too."""

SERIES = ("#1b6ca8", "#e07a1f", "#2a8f57", "#7b2d8b", "#c0392b", "#4d7f6b", "#b9862b", "#6a7076")
"""Colours of things that have no role, in this order: all of them are among COLOURS."""

_OFTEN = 20
"""Times that a style stands in a chart from which on it is written once."""

_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names with a $ are no formulas
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
}


def chart(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a function draw in the project's look, whatever the look of the notebook that calls it."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context({**rcParamsDefault, **_STYLE}):
            return draw(*args, **kwargs)

    return styled


def new_figure(
    width: float = 7.0, height: float = 3.4, columns: int = 1, rows: int = 1, **more: Any
) -> tuple[Figure, Any]:
    """A figure and its axes: one, or an array of them where there are several. To be called within :func:`chart`.

    Args:
        width: in inches; a page shows 7 inches over its full width.
        height: in inches.
        columns, rows: axes beside and below one another.
        more: for ``Figure.subplots``.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **more)


def whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers only, such as epochs."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def nothing(axes: Axes, why: str) -> None:
    """Say in an empty chart why nothing is drawn."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color=COLOURS["muted"], wrap=True)


def svg(figure: Figure, alt: str) -> str:
    """The figure as an ``<svg>`` element for a page: scales with it, follows its colours, and says what it shows.

    Args:
        figure: of :func:`new_figure`.
        alt: what is seen, in a sentence, for those who do not see it.
    """
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "hpcl", "text.parse_math": False}),
        warnings.catch_warnings(),
        io.StringIO() as file,
    ):
        warnings.simplefilter("ignore")  # of glyphs that matplotlib's own font lacks; the page has the reader's fonts

        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style [^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s*xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    # Places to a hundredth of a point; not the numbers that stand in the chart as text.
    text = re.sub(r' (?:d|x|y|points|transform)="[^"]*"', lambda m: re.sub(r"(\d\.\d{2})\d+", r"\1", m[0]), text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's own
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    # Only what is referred to needs an id. Matplotlib's differ from run to run; a page holds several charts.
    used = dict.fromkeys(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    numbers = {name: number for number, name in enumerate(used)}
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="@{numbers[m[1]]}"' if m[1] in numbers else "", text)
    text = re.sub(r'(href="#|url\(#)([^")]+)', lambda m: f"{m[1]}@{numbers[m[2]]}", text)
    prefix = f"c{zlib.crc32((alt + text).encode()):08x}-"
    text = text.replace(' id="@', f' id="{prefix}').replace("#@", f"#{prefix}")
    text = re.sub(r"\s*\n\s*", " ", text)
    often = [style for style, count in Counter(re.findall(r' style="[^"]*"', text)).items() if count > _OFTEN]
    rules = ""
    for number, style in enumerate(often):  # every point of a cloud has its own copy of the same style
        text = text.replace(style, f' class="{prefix}s{number}"')
        rules += f".{prefix}s{number}{{{style[8:-1]}}}"
    if rules:
        text = text.replace("<defs>", f"<style>{rules}</style><defs>", 1)
    label = escape(alt, quote=True)
    head, _, rest = text.partition(">")
    head = re.sub(r'\s(width|height|version)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{label}"><title>{label}</title>{rest.strip()}'


def listed(names: Sequence[str], most: int = 4) -> str:
    """Names in words: all of them, or so many and the number of the others."""
    names = list(names)
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
