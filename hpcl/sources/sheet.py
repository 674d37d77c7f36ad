"""A contact sheet: a few images of each class under its name, as one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from hpcl.errors import harmless
from hpcl.files import atomic_path
from hpcl.sources.check import EACH, THUMB, Checked
from hpcl.sources.check_text import MARK
from hpcl.sources.source import SPLITS

_MOST = 60
"""Classes that are shown."""
_ACROSS = 3
"""Classes side by side."""
_GAP, _LINE, _MARGIN = 3, 22, 14
_INK, _PALE, _PAPER = (25, 25, 25), (105, 105, 105), (255, 255, 255)

_FONT = "fonts/ttf/DejaVuSans.ttf"
"""Comes with matplotlib: Latin, Greek, Cyrillic and more; Pillow's own has hardly more than ASCII."""

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def write_sheet(checked: Checked, path: Path) -> None:
    """Writes the sheet; with more than 60 classes those shown are spread evenly over them.

    Raises:
        StorageError: the file cannot be written.
    """
    names = list(checked.pictures)
    if len(names) > _MOST:
        names = [names[i * len(names) // _MOST] for i in range(_MOST)]
    block_width = EACH * (THUMB + _GAP) + _MARGIN
    width = _MARGIN + _ACROSS * block_width
    images = f"{checked.images:,} images"
    classes = f"{len(checked.classes):,} classes" if checked.classes else "no classes"
    shown = f", {len(names)} of them shown" if checked.classes and len(names) < len(checked.classes) else ""
    cut = f"; cut to {checked.size}x{checked.size}" if checked.size else "; cut to squares"
    label = checked.source.path.name if checked.source.path else checked.source.kind
    head = harmless(f"{label}: {images}, {classes}{shown}{cut}")
    if names == [""]:
        sheet = _paper(width, -(-len(checked.pictures[""]) // (_ACROSS * EACH)) * (THUMB + _GAP), head)
        for i, picture in enumerate(checked.pictures[""]):
            y, x = divmod(i, _ACROSS * EACH)
            _paste(sheet, picture, _MARGIN + x * (THUMB + _GAP), 3 * _MARGIN + y * (THUMB + _GAP))
    else:
        block_height = _LINE + THUMB + _MARGIN
        sheet = _paper(width, -(-len(names) // _ACROSS) * block_height, head)
        for i, name in enumerate(names):
            row, column = divmod(i, _ACROSS)
            x, y = _MARGIN + column * block_width, 3 * _MARGIN + row * block_height
            _title(sheet, x, y, block_width - _MARGIN, name, _counts(checked, name))
            for j, picture in enumerate(checked.pictures[name]):
                _paste(sheet, picture, x + j * (THUMB + _GAP), y + _LINE)
    said = PngImagePlugin.PngInfo()
    said.add_text("Software", MARK)  # by which the next check knows that it may write over it
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG", pnginfo=said)


def _font(size: int) -> _Font:
    import matplotlib

    try:
        return ImageFont.truetype(f"{matplotlib.get_data_path()}/{_FONT}", size)
    except OSError:  # a matplotlib that was packed without it
        return ImageFont.load_default(size)


def _paper(width: int, height: int, head: str) -> Image.Image:
    sheet = Image.new("RGB", (width, height + 4 * _MARGIN), _PAPER)
    font = _font(17)
    ImageDraw.Draw(sheet).text((_MARGIN, _MARGIN - 2), _fitting(head, font, width - 2 * _MARGIN), _INK, font)
    return sheet


def _title(sheet: Image.Image, x: int, y: int, width: int, name: str, counts: str) -> None:
    draw, bold, small = ImageDraw.Draw(sheet), _font(15), _font(12)
    room = width - int(small.getlength(counts)) - 12
    text = _fitting(name, bold, room)
    draw.text((x, y), text, _INK, bold)
    draw.text((x + bold.getlength(text) + 8, y + 3), counts, _PALE, small)


def _fitting(text: str, font: _Font, width: float) -> str:
    """The text, cut in its middle where it is too long."""
    if font.getlength(text) <= width:
        return text
    half = len(text) // 2
    while half > 1 and font.getlength(f"{text[:half]}...{text[-half:]}") > width:
        half -= 1
    return f"{text[:half]}...{text[-half:]}"


def _counts(checked: Checked, name: str) -> str:
    of = checked.classes.get(name, [])
    return ", ".join(f"{count:,} {split}" for split, count in zip(SPLITS, of, strict=False) if count)


def _paste(sheet: Image.Image, picture: np.ndarray, x: int, y: int) -> None:
    sheet.paste(Image.fromarray(picture).convert("RGB"), (x, y))
