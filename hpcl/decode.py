"""Encoded images to 8-bit pixels: upright, gray or RGB, resized.

Images may come from anybody. Only formats that Pillow decodes itself are read: for EPS it would
start Ghostscript, which runs what stands in the file. A few bytes may decode to more than memory
holds: the pixels of one image are bounded, and so are those of all together.

Legend: N images, C channels (1 or 3), H W height and width in pixels.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from hpcl.errors import UserError

_Pixels = npt.NDArray[np.uint8]

_BLOCK = 1024
"""Images held in memory in encoded form at a time, at most."""
_BYTES = 2**28
"""Of encoded images after which no more are held."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What is read, as Pillow names it, whatever a file's name ends with."""
MOST_PIXELS = 80_000_000
"""Of one image; Pillow itself warns from 89 million on."""
MOST_PART = 0.9
"""Of this machine's memory that all decoded images may take."""


@dataclass
class Item:
    """One image on its way from its source."""

    name: str
    """Where it is from, for messages."""
    content: bytes | Path | None
    """The encoded image or its file; None once decoded."""
    label: Any
    """What the source says: a number, a name, or None."""
    split: int
    """Code of its part."""
    problem: str | None = None
    """Why it cannot be used, if that is known without decoding."""


def decode_all(items: Iterator[Item], size: int | None) -> tuple[list[Item], list[tuple[str, str]], list[_Pixels]]:
    """Decodes all items on all cores: those kept (without their bytes), those skipped, and the pixels.

    Raises:
        UserError: the pixels are more than memory holds.
    """
    kept: list[Item] = []
    skipped: list[tuple[str, str]] = []
    arrays: list[_Pixels] = []
    memory = _Memory()

    def several(part: list[Item]) -> list[_Pixels | str]:
        return [memory.take(_pixels(item, size)) for item in part]

    # Threads, not processes: Pillow decodes outside the interpreter lock, and a fork of a
    # process that already runs torch or Arrow threads may hang.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our bound is below Pillow's
        for block in _blocks(items, _BLOCK):
            parts = [block[i : i + 32] for i in range(0, len(block), 32)]
            for part, results in zip(parts, pool.map(several, parts), strict=True):
                for item, result in zip(part, results, strict=True):
                    item.content = None
                    if isinstance(result, str):
                        skipped.append((item.name, result))
                    else:
                        kept.append(item)
                        arrays.append(result)
    return kept, skipped, arrays


class _Memory:
    """What all decoded images take; asked by every thread after each image, so that none runs far beyond the bound."""

    def __init__(self) -> None:
        self._all = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._taken = self._images = 0
        self._lock = threading.Lock()

    def take(self, result: _Pixels | str) -> _Pixels | str:
        """Count an image, and give it back.

        Raises:
            UserError: there is no room for it.
        """
        if isinstance(result, str):
            return result
        with self._lock:
            self._taken += result.nbytes
            self._images += 1
            if self._taken > MOST_PART * self._all:
                raise UserError(
                    f"data.source: the first {self._images:,} images take {self._taken / 1e9:.1f} GB when they are "
                    f"decoded, but this machine has {self._all / 1e9:.1f} GB of memory; set data.size to a "
                    "smaller side in pixels, or take fewer images"
                )
        return result


def decode(content: bytes | Path, size: int | None) -> _Pixels:
    """uint8 (H, W) of a gray image, (H, W, 3) of any other.

    The image is turned upright (EXIF). 16-bit gray is scaled, v / 257. Alpha is dropped,
    palettes and other colour spaces become RGB.

    Args:
        content: an encoded image, or the file that holds it.
        size: the shorter side is resized to it and a centred square cut out; None keeps the size.

    Raises:
        Exception: whatever Pillow's decoders raise for a broken image.
    """
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


def resize(images: _Pixels, size: int) -> _Pixels:
    """Decoded images (N, C, H, W) resized and cut to (N, C, size, size), as :func:`decode` does."""
    if images.shape[2:] == (size, size):
        return images
    out = np.empty((*images.shape[:2], size, size), dtype=np.uint8)
    for i, pixels in enumerate(images):
        if len(pixels) == 1:
            out[i] = np.asarray(_fit(Image.fromarray(pixels[0]), size))
        else:
            colour = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            out[i] = np.asarray(_fit(colour, size)).transpose(2, 0, 1)
    return out


def _pixels(item: Item, size: int | None) -> _Pixels | str:
    """Pixels of one item as :func:`decode` gives them, or the reason why there are none."""
    if item.problem is not None:
        return item.problem
    if item.content is None:
        return "has no image bytes"
    try:
        return decode(item.content, size)
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its text names an object in memory
        return f"is no image that is read ({', '.join(FORMATS)})"
    except Exception as error:  # broken files make decoders raise almost anything
        return " ".join(str(error).split())[:200] or type(error).__name__


def _blocks(items: Iterator[Item], length: int) -> Iterator[list[Item]]:
    block: list[Item] = []
    held = 0
    for item in items:
        block.append(item)
        held += len(item.content) if isinstance(item.content, bytes) else 0
        if len(block) == length or held > _BYTES:
            yield block
            block, held = [], 0
    if block:
        yield block


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
