"""Prototype galleries as HTML: a fragment for the report, and the page of ``hpcl prototypes``.

Each prototype is a card with one image of its nearest training images; parents stand beside their children, coarse
to fine. Nothing is loaded from elsewhere and nothing runs: pictures are data URIs, there is no script.

Legend: N images of the source, n images of a card, C channels (1 or 3), H W height and width.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from hpcl.analysis.text import counted
from hpcl.errors import UserError, harmless
from hpcl.files import may_write, write_text

if TYPE_CHECKING:
    from jinja2 import Environment

    from hpcl.gallery import Gallery, GalleryPrototype

Pixels = npt.NDArray[np.uint8]

MARKER = "written by hpcl prototypes"
"""Stands at the beginning of each page, so that nothing else is ever overwritten."""

MOST_COARSE = 12
"""Prototypes of the coarsest level that are shown where finer ones stand beside them."""

MOST_CARDS = 60
"""Cards in all."""

MOST_IMAGES = 24
"""Images of a card, so that the pictures of all cards fit into MOST_BYTES."""

MOST_BYTES = 400_000
"""All pictures of a fragment together, as text of data URIs."""

_ENCODINGS: tuple[tuple[int, int | None], ...] = ((32, None), (32, 85), (32, 70), (32, 50), (24, 40))
"""(longest edge of an image in pixels, JPEG quality or None for PNG), tried in this order until all pictures fit."""

_SHOWN_EDGE = 36
"""Longest edge of an image on the page, in CSS pixels."""

_GAP = 128
"""Grey of the lines between images: seen on light and dark pages, beside black and white images."""

_LONGEST_NAME = 40
"""Letters of a class name that are shown."""


@dataclass(eq=False)
class _Node:
    """A shown prototype and what is below it."""

    prototype: GalleryPrototype
    below: list[GalleryPrototype] = field(default_factory=list)
    """All that have it as parent, the largest first."""
    children: list[_Node] = field(default_factory=list)
    """Those of them that are shown."""


def fragment(gallery: Gallery, images: Pixels) -> str:
    """The gallery as an HTML element without heading, below 500 kB; :data:`CSS` styles it.

    Shows up to MOST_COARSE prototypes of the coarsest level, the largest ones, with those below them, up to MOST_CARDS
    in all (of a single level so many), and says what it left out. Its colours are the page's ``--ink``, ``--muted``
    and ``--rule``. All names in it are escaped.

    Args:
        gallery: of :func:`hpcl.gallery.gallery_of`, with at most MOST_IMAGES images per prototype.
        images: (N, C, H, W) uint8, which the gallery's places refer to.

    Returns:
        ``<section class="gallery">...</section>``.
    """
    rows = _chosen(gallery)
    shown = [node for row in rows for node in row]
    pictures = dict(zip(map(id, shown), _pictures([images[node.prototype.nearest] for node in shown]), strict=True))

    def view(node: _Node, depth: int) -> dict[str, Any]:
        return {
            **_words(node.prototype, depth),
            "picture": pictures[id(node)],
            "children": [view(child, depth + 1) for child in node.children],
            "more": len(node.below) - len(node.children),
        }

    return (
        environment()
        .get_template("gallery.html")
        .render(
            gallery=gallery,
            levels=gallery.levels,
            labelled=gallery.levels[0].purity is not None,
            nodes=[view(root, 1) for root in rows[0]],
            columns=max(3, len(gallery.levels)),
            left_out=_left_out(gallery, [len(row) for row in rows]),
        )
    )


def page(body: str, title: str, notes: Sequence[str] = ()) -> str:
    """A whole HTML document around a fragment, for screens of any width, light or dark, and for paper.

    Args:
        body: HTML, as :func:`fragment` gives it; taken as it is.
        title: plain text.
        notes: lines of plain text below the title, such as the file and the images.
    """
    return (
        environment()
        .get_template("gallery_page.html")
        .render(
            marker=MARKER,
            body=body,
            title=harmless(title),
            notes=[harmless(note) for note in notes],
            css=_PAGE_CSS + CSS,
        )
    )


def main(checkpoint: Path, out: Path | None, images: int, data: str | None) -> None:
    """Write a checkpoint's gallery as a page, and print a line about each level.

    Args:
        checkpoint: a run's or trial's ``checkpoint.pt``.
        out: the page; default ``prototypes.html`` beside the checkpoint.
        images: per prototype, 1..MOST_IMAGES.
        data: where the images it was trained on lie now, if not where they lay then.

    Raises:
        UserError: as :func:`hpcl.gallery.gallery_of`; `images` out of range; or `out` cannot be written.
    """
    if not 1 <= images <= MOST_IMAGES:
        raise UserError(f"--images is {images}, but must be in 1..{MOST_IMAGES}")
    where = out if out is not None else checkpoint.parent / "prototypes.html"
    if checkpoint.parent.is_dir() or out is not None:
        may_write(where, MARKER, "hpcl prototypes", "name another file with --out")
    from hpcl.gallery import gallery_of

    gallery, found = gallery_of(checkpoint, images, data)
    print(harmless(found.describe()))
    for depth, level in enumerate(gallery.levels, 1):
        sizes = [prototype.size for prototype in level.prototypes]
        line = f"level {depth}: {counted(len(sizes), 'prototype')} of {min(sizes)}..{max(sizes)} images"
        if level.purity is not None:
            line += f", purity {level.purity:.3f}, AMI with the labels {_number(level.ami)}"
        print(line)
    notes = (f"{checkpoint}, after epoch {gallery.epoch} (stage {gallery.stage})", found.describe())
    text = page(fragment(gallery, found.images), f"Prototypes of {_name_of(checkpoint)}", notes)
    write_text(where, text)
    print(harmless(f"written: {where} ({len(text.encode()) / 1000:.0f} kB)"))


# ---------------------------------------------------------------- which prototypes are shown


def _chosen(gallery: Gallery) -> list[list[_Node]]:
    """The shown prototypes of each level, coarse to fine, the largest of the coarsest level first."""
    most = MOST_COARSE if len(gallery.levels) > 1 else MOST_CARDS
    coarsest = sorted(gallery.levels[0].prototypes, key=_largest_first)[:most]
    rows = [[_Node(prototype) for prototype in coarsest]]
    left = MOST_CARDS - len(coarsest)
    for depth, level in enumerate(gallery.levels[1:], 1):
        family: dict[int | None, list[GalleryPrototype]] = {}
        for prototype in sorted(level.prototypes, key=_largest_first):
            family.setdefault(prototype.parent, []).append(prototype)
        for parent in rows[-1]:
            parent.below = family.get(parent.prototype.number, [])
        # Places are shared out evenly: no level takes those of the levels below, no parent those of its neighbours.
        places = left // (len(gallery.levels) - depth)
        by_rank = sorted((rank, at) for at, parent in enumerate(rows[-1]) for rank in range(len(parent.below)))
        for rank, at in by_rank[:places]:
            rows[-1][at].children.append(_Node(rows[-1][at].below[rank]))
        rows.append([child for parent in rows[-1] for child in parent.children])
        left -= len(rows[-1])
    return rows


def _largest_first(prototype: GalleryPrototype) -> tuple[int, int]:
    return -prototype.size, prototype.number


# ---------------------------------------------------------------- words


def _words(prototype: GalleryPrototype, depth: int) -> dict[str, Any]:
    """What a card of level `depth`, from 1, says of its prototype."""
    alt = f"{counted(len(prototype.nearest), 'image')} nearest to prototype {prototype.number + 1} of level {depth}"
    label = None
    if prototype.class_name is not None and prototype.purity is not None:
        label = _short(harmless(prototype.class_name))
        most = "mostly" if prototype.purity > 0.5 else "most often"
        alt += f": {most} '{label}', {_percent(prototype.purity)} of {prototype.size:,}"
    else:
        alt += f", of {prototype.size:,}"
    return {"prototype": prototype, "depth": depth, "alt": alt, "label": label}


def _left_out(gallery: Gallery, per_level: list[int]) -> str:
    """What is not shown, in a sentence; empty where all is."""
    totals = [len(level.prototypes) for level in gallery.levels]
    if per_level == totals:
        return ""
    parts = [
        f"{shown if shown < total else 'all'} of the {total:,} of level {depth}"
        for depth, (shown, total) in enumerate(zip(per_level, totals, strict=True), 1)
    ]
    largest = " (the largest)" if per_level[0] < totals[0] else ""
    return f"Shown: {parts[0]}{largest}{''.join(f', {part}' for part in parts[1:])}. The others are left out."


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…"


def _percent(share: float) -> str:
    """Whole percent; 100 only where it is all."""
    return f"{min(99, round(100 * share)) if share < 1 else 100} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _name_of(checkpoint: Path) -> str:
    """How people call the run: its folder's name, for a trial the search's before it."""
    folder = checkpoint.absolute().parent
    return f"{folder.parent.parent.name}, trial {folder.name}" if folder.parent.name == "trials" else folder.name


# ---------------------------------------------------------------- pictures


def _pictures(groups: list[Pixels]) -> list[dict[str, Any]]:
    """One picture of each group of images (n, C, H, W): `src`, `width` and `height` on the page."""
    found: list[dict[str, Any]] = []
    for edge, quality in _ENCODINGS:
        found = [_picture(group, edge, quality) for group in groups]
        if sum(len(picture["src"]) for picture in found) <= MOST_BYTES:
            break
    return found


def _picture(group: Pixels, edge: int, quality: int | None) -> dict[str, Any]:
    thumbs = [_thumb(pixels, edge) for pixels in group]
    width, height = thumbs[0].size
    columns = min(len(thumbs), max(4, math.ceil(math.sqrt(len(thumbs)))))
    rows = math.ceil(len(thumbs) / columns)
    sheet = Image.new(thumbs[0].mode, (columns * (width + 1) - 1, rows * (height + 1) - 1))
    sheet.paste(_GAP if sheet.mode == "L" else (_GAP,) * 3, (0, 0, *sheet.size))
    for at, thumb in enumerate(thumbs):
        sheet.paste(thumb, (at % columns * (width + 1), at // columns * (height + 1)))
    file = io.BytesIO()
    if quality is None:
        sheet.save(file, "PNG", optimize=True)
    else:
        sheet.save(file, "JPEG", quality=quality, optimize=True)
    scale = _SHOWN_EDGE / max(width, height)
    return {
        "src": f"data:image/{'png' if quality is None else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}",
        "width": round(sheet.width * scale),
        "height": round(sheet.height * scale),
    }


def _thumb(pixels: Pixels, edge: int) -> Image.Image:
    """One image (C, H, W), made smaller where an edge is longer than that."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    scale = edge / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


# ---------------------------------------------------------------- HTML


@cache
def environment() -> Environment:
    """The templates of this folder; whatever is put into one is escaped."""
    from jinja2 import Environment, FileSystemLoader

    folder = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"percent": _percent, "number": _number, "counted": counted}
    return made


CSS = """
.gallery { container-type: inline-size; color: var(--ink); line-height: 1.4; }
.gallery table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0 0 .8rem; }
.gallery th, .gallery td { padding: .25rem 1.4rem .25rem 0; text-align: right; border-bottom: 1px solid var(--rule); }
.gallery th:first-child { text-align: left; }
.gallery th { font-weight: 600; }
.gallery p { color: var(--muted); max-width: 48rem; margin: 0 0 .6rem; }
.gallery .tree { margin-top: 1.4rem; }
.gallery .node { display: grid; grid-template-columns: calc(100cqi / var(--columns) - 1rem) minmax(0, 1fr);
  gap: .5rem 1rem; align-items: start; }
.gallery .tree > .node { border-top: 1px solid var(--rule); padding: .9rem 0; }
.gallery .children { display: grid; gap: .7rem 1.2rem; border-left: 1px solid var(--rule); padding-left: 1rem; }
.gallery .flat, .gallery .leaves { display: grid; gap: .6rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); }
.gallery .flat .node, .gallery .leaves .node { display: block; }
.gallery .card { margin: 0; display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: flex-start;
  break-inside: avoid; }
.gallery .card img { display: block; max-width: 100%; height: auto; border-radius: 3px; }
.gallery figcaption { flex: 1 1 6.5rem; min-width: 6.5rem; font-size: .8rem; color: var(--muted);
  font-variant-numeric: tabular-nums; }
.gallery .label { display: block; font-size: .95rem; line-height: 1.2; overflow-wrap: anywhere; }
.gallery .label b { color: var(--ink); margin-right: .2rem; }
.gallery .bar { display: block; height: 4px; border-radius: 2px; background: var(--rule); margin: .15rem 0 .25rem;
  max-width: 9rem; overflow: hidden;
  print-color-adjust: exact; }
.gallery .bar i { display: block; height: 100%; background: var(--ink); }
.gallery .more { font-size: .8rem; margin: 0; align-self: center; }
@container (max-width: 40rem) {
  .gallery .node { display: block; }
  .gallery .children { margin: .7rem 0 0 .2rem; padding-left: .9rem; border-left-width: 2px; }
  .gallery table { font-size: .85rem; width: 100%; }
  .gallery th, .gallery td { padding-right: 0; padding-left: .5rem; }
  .gallery th:first-child { padding-left: 0; }
}
"""
"""Style of a fragment; its colours are custom properties of the page."""

_PAGE_CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1a1c1f; --muted: #6a7076; --rule: #d5d9dd; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #e4e7ea; --muted: #9aa1a8; --rule: #363b41; }
}
@media print { :root { --page: #ffffff; --ink: #000000; --muted: #444444; --rule: #bbbbbb; } }
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 2.5rem) 3rem; max-width: 70rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
header { margin-bottom: 1.6rem; }
header p { margin: 0; color: var(--muted); font-size: .875rem; overflow-wrap: anywhere; }
"""
