"""Encoded images to 8-bit pixels: upright, gray or RGB, resized.

Images may come from anybody. Only formats that Pillow decodes itself are read: for EPS it would
start Ghostscript, which runs what stands in the file. A few bytes may decode to more than memory
holds: the pixels of one image are bounded.

Legend: H W height and width in pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

_Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What is read, as Pillow names it, whatever a file's name ends with."""
MOST_PIXELS = 80_000_000
"""Of one image; Pillow itself warns from 89 million on."""


@dataclass
class Item:
    """One image on its way from its source."""

    name: str
    """Where it is from, for messages."""
    content: bytes | Path | _Pixels | None
    """The encoded image, its file, or its pixels (H, W) or (H, W, 3); None: there is none."""
    label: Any
    """What the source says: a number, a name, or None."""
    split: int
    """Code of its part."""
    problem: str | None = None
    """Why it cannot be used, if that is known without decoding."""
    coarse: Any = None
    """A coarse label: a number, a name, or None."""


def decode(content: bytes | Path | _Pixels, size: int | None) -> _Pixels:
    """uint8 (H, W) of a gray image, (H, W, 3) of any other.

    The image is turned upright (EXIF). 16-bit gray is scaled, v / 257. Alpha is dropped,
    palettes and other colour spaces become RGB.

    Args:
        content: an encoded image, the file that holds it, or its pixels.
        size: the shorter side is resized to it and a centred square cut out; None keeps the size.

    Raises:
        Exception: whatever Pillow's decoders raise for a broken image.
    """
    if isinstance(content, np.ndarray):
        return content if size is None else np.asarray(_fit(Image.fromarray(content), size))
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as opened:
        if opened.width * opened.height > MOST_PIXELS:
            raise ValueError(
                f"has {opened.width}x{opened.height} pixels, but at most {MOST_PIXELS // 10**6} million are decoded; "
                "make it smaller"
            )
        opened.load()
        ImageOps.exif_transpose(opened, in_place=True)
        image = _eight_bit(opened)
        return np.asarray(image if size is None else _fit(image, size))


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image as 8-bit gray ("L") or RGB."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow's own conversion cuts at 255. 65535 / 257 = 255; + 128 rounds.
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if mode in ("I", "F"):
        raise ValueError(f"pixels are 32-bit (mode {mode}), but must be 8-bit or 16-bit gray, or colour")
    if mode in ("L", "RGB"):
        return image
    if mode in ("1", "LA", "La"):
        return image.convert("L")
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size`, then the centred square; bicubic, antialiased."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
