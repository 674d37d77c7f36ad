"""Images and tables that tests of data sources write."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hpcl.data import DataError, load
from hpcl.errors import UserError
from hpcl.sections import Data

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def random_pixels(seed: int, height: int = 12, width: int = 12, channels: int = 3) -> Pixels:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: Pixels | Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def class_folders(root: Path, classes: int = 3, each: int = 10, **options: Any) -> Path:
    for label in range(classes):
        for i in range(each):
            save(root / f"class{label}" / f"{i:03}.png", random_pixels(100 * label + i, **options))
    return root


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def table(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


def problem_of(data: Data, cache: Path | None = None) -> str:
    """The text of the one problem that loading raises."""
    with pytest.raises(DataError) as caught:
        load(data, cache)
    assert isinstance(caught.value, UserError) and len(caught.value.problems) == 1
    return str(caught.value)
