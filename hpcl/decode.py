"""Encoded images to 8-bit pixels: upright, gray or RGB, resized.

Images may come from anybody. Only formats that Pillow decodes itself are read: for EPS it would
start Ghostscript, which runs what stands in the file. A few bytes may decode to more than memory
holds: the pixels of one image are bounded here, those of all together where they are kept.

Legend: N images, C channels (1 or 3), H W height and width in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What is read, as Pillow names it, whatever a file's name ends with."""
MOST_PIXELS = 80_000_000
"""Of one image; Pillow itself warns from 89 million on."""


@dataclass
class Item:
    """One image on its way from its source."""

    name: str
    """Where it is from, for messages."""
    content: bytes | Path | Pixels | None
    """The encoded image, its file, or its pixels, uint8 (H, W) or (H, W, 3); None once decoded."""
    label: Any
    """What the source says: a number, a name, or None."""
    split: int
    """Code of its part."""
    problem: str | None = None
    """Why it cannot be used, if that is known without decoding."""
    coarse: Any = None
    """The label of a coarser level, as `label`."""


def decode(content: bytes | Path | Pixels, size: int | None) -> Pixels:
    """uint8 (H, W) of a gray image, (H, W, 3) of any other.

    The image is turned upright (EXIF). 16-bit gray is scaled, v / 257. Alpha is dropped,
    palettes and other colour spaces become RGB. Of an animation the first frame is taken.

    Args:
        content: an encoded image, the file that holds it, or its pixels, which are resized only.
        size: the shorter side is resized to it and a centred square cut out; None keeps the size.

    Raises:
        Exception: whatever Pillow's decoders raise for a broken image.
    """
    return _decode(content, size, None)


def decode_told(content: bytes | Path | Pixels, size: int | None) -> tuple[Pixels, tuple[str, ...]]:
    """As :func:`decode`, and what was done to the image apart from resizing, such as "alpha dropped".

    Raises:
        Exception: whatever Pillow's decoders raise for a broken image.
    """
    told: list[str] = []
    return _decode(content, size, told), tuple(told)


def attempt(item: Item, size: int | None) -> Pixels | str:
    """Pixels of one item as :func:`decode` gives them, or the reason why there are none."""
    found = attempt_told(item, size, tell=False)
    return found if isinstance(found, str) else found[0]


def attempt_told(item: Item, size: int | None, *, tell: bool = True) -> tuple[Pixels, tuple[str, ...]] | str:
    """As :func:`decode_told` of one item, or the reason why it has no pixels."""
    if item.problem is not None:
        return item.problem
    if item.content is None:
        return "has no image bytes"
    try:
        return decode_told(item.content, size) if tell else (decode(item.content, size), ())
    except MemoryError:
        raise
    except Image.DecompressionBombError:  # Pillow's own bound, which is higher, comes before ours
        return f"has more than {MOST_PIXELS // 10**6} million pixels, which are not decoded; make it smaller"
    except UnidentifiedImageError:  # its text names an object in memory
        return f"is no image that is read ({', '.join(FORMATS)})"
    except Exception as error:  # broken files make decoders raise almost anything
        return " ".join(str(error).split())[:200] or type(error).__name__


def blocks(items: Iterable[Item], length: int = 1024, most: int = 2**26) -> Iterator[list[Item]]:
    """The items in lists of so many, or fewer where they are large, to be held in memory while they are decoded.

    Args:
        items: the images.
        length: of a list.
        most: bytes of encoded images after which a list has no more.
    """
    block: list[Item] = []
    held = 0
    for item in items:
        block.append(item)
        held += _length(item.content)
        if len(block) == length or held > most:
            yield block
            block, held = [], 0
    if block:
        yield block


def resize(images: Pixels, size: int) -> Pixels:
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


def resize_one(pixels: Pixels, size: int) -> Pixels:
    """Pixels (H, W) or (H, W, 3) resized and cut to size x size, as :func:`decode` does."""
    return _sized(pixels, size)


def _length(content: bytes | Path | Pixels | None) -> int:
    """Bytes in memory."""
    return content.nbytes if isinstance(content, np.ndarray) else len(content) if isinstance(content, bytes) else 0


def _decode(content: bytes | Path | Pixels, size: int | None, told: list[str] | None) -> Pixels:
    """As :func:`decode`; `told` is None where nobody asks, as looking for a second frame takes time."""
    if isinstance(content, np.ndarray):
        return _sized(content, size)
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as opened:
        if opened.width * opened.height > MOST_PIXELS:
            raise ValueError(
                f"has {opened.width}x{opened.height} pixels, but at most {MOST_PIXELS // 10**6} million are decoded; "
                "make it smaller"
            )
        wide = told is not None and any(";16" in str(tile[3]) for tile in opened.tile)
        if told is not None and getattr(opened, "is_animated", False):
            told.append("first frame or page taken, the others left out")
        if size is not None and opened.format == "JPEG":
            # Its decoder halves the image while that leaves twice the side that is wanted: less than half of the time
            # for a photograph of 640x480 to 84, and pixels that differ by .3 of 255 on average (benchmarks/data.py).
            opened.draft(None, (2 * size, 2 * size))
        opened.load()
        if told is not None:
            told += _changes(opened, wide)
        ImageOps.exif_transpose(opened, in_place=True)
        image = _eight_bit(opened)
        return np.asarray(image if size is None else _fit(image, size))


def _changes(image: Image.Image, wide: bool) -> list[str]:
    """What :func:`_decode` will do to a loaded image; `wide` where its file has 16 bits a channel."""
    told = []
    mode = image.mode
    if image.getexif().get(0x0112, 1) in range(2, 9):
        told.append("turned upright as EXIF says")
    if mode.startswith("I"):
        told.append("16-bit gray scaled to 8 bit (v / 257)")
    elif wide:
        told.append("16-bit colour reduced to 8 bit")
    if mode == "1":
        told.append("black and white made gray (0, 255)")
    elif mode.startswith("P"):
        told.append("palette made RGB")
    elif mode not in ("L", "RGB", "LA", "La", "RGBA", "RGBa", "RGBX", "I", "I;16", "I;16L", "I;16B", "I;16N"):
        told.append(f"{mode} made RGB")
    if mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        told.append("alpha dropped")
    return told


def _sized(pixels: Pixels, size: int | None) -> Pixels:
    """Pixels (H, W) or (H, W, 3) resized and cut."""
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(f"pixels are {pixels.dtype} of shape {pixels.shape}, but must be uint8 (H, W) or (H, W, 3)")
    if not pixels.size:
        raise ValueError(f"pixels are of shape {pixels.shape}, but must be at least 1x1")
    if pixels.shape[0] * pixels.shape[1] > MOST_PIXELS:
        raise ValueError(
            f"has {pixels.shape[1]}x{pixels.shape[0]} pixels, but at most {MOST_PIXELS // 10**6} million are taken"
        )
    if size is None or pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(_fit(Image.fromarray(np.ascontiguousarray(pixels)), size))


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
