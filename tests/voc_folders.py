"""Folders in the form of VOC2007 that tests write: real MNIST digits on canvases, with their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpcl.data import ImageSet, load
from hpcl.sections import Data

Box = tuple[str, tuple[float, float, float, float], dict[str, int]]
"""Name, (xmin, ymin, xmax, ymax) as VOC counts, flags."""


SIDE = 32


@cache
def digits() -> ImageSet:
    return load(Data())


def xml(width: int, height: int, boxes: Sequence[Box]) -> str:
    objects = "".join(
        f"<object><name>{name}</name>{''.join(f'<{flag}>{value}</{flag}>' for flag, value in flags.items())}"
        f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, (x1, y1, x2, y2), flags in boxes
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><folder>VOC2007</folder>{size}{objects}</annotation>"


def write_voc(
    root: Path, images: dict[str, tuple[np.ndarray[Any, Any], Sequence[Box]]], parts: dict[str, Sequence[str]]
) -> Path:
    """A folder `VOC2007` below `root` with these images (uint8 (H, W) or (H, W, 3)), their boxes and lists."""
    folder = root / "VOC2007"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, (pixels, boxes) in images.items():
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        (folder / "Annotations" / f"{name}.xml").write_text(xml(pixels.shape[1], pixels.shape[0], boxes))
    for part, names in parts.items():
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def canvas(
    rng: np.random.Generator, height: int, width: int, classes: Sequence[int], most: int, colour: bool
) -> tuple[np.ndarray[Any, Any], list[Box]]:
    """A noisy canvas with 1 to `most` digits of these classes, SIDE pixels each, and tight boxes."""
    data = digits()
    assert data.labels is not None
    shape = (height, width, 3) if colour else (height, width)
    pixels = rng.integers(0, 60, shape, dtype=np.uint8)
    boxes: list[Box] = []
    slots = rng.permutation(width // SIDE)[: rng.integers(1, most + 1)]
    for slot in slots:
        label = int(rng.choice(classes))
        image = data.images[rng.choice(np.flatnonzero(data.labels == label)), 0]
        digit = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        x, y = SIDE * int(slot), int(rng.integers(0, height - SIDE + 1))
        window = pixels[y : y + SIDE, x : x + SIDE]
        np.maximum(window, digit[..., None] if colour else digit, out=window)
        rows, columns = (np.flatnonzero((digit > 80).any(axis)) for axis in (1, 0))
        x1, y1, x2, y2 = (int(v) for v in (x + columns[0], y + rows[0], x + columns[-1], y + rows[-1]))
        boxes.append((f"digit{label}", (x1 + 1, y1 + 1, x2 + 1, y2 + 1), {"difficult": 0, "truncated": 0}))
    return pixels, boxes


def digit_folder(
    root: Path,
    counts: dict[str, int],
    *,
    seed: int = 0,
    classes: Sequence[int] = (0, 1, 4),
    size: tuple[int, int] = (48, 96),
    most: int = 2,
    colour: bool = True,
) -> Path:
    """Canvases with digits; `counts` images of each part (trainval becomes the union of train and val)."""
    rng = np.random.default_rng(seed)
    images, parts = {}, {}
    for part, count in counts.items():
        parts[part] = [f"{part}{i:04}" for i in range(count)]
        for name in parts[part]:
            images[name] = canvas(rng, *size, classes, most, colour)
    if {"train", "val"} <= parts.keys():
        parts["trainval"] = parts["train"] + parts["val"]
    return write_voc(root, images, parts)
