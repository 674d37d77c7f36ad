"""The Arrow file in which decoded images lie: one record batch, mapped by whoever reads it.

Columns: image (uint8 C x H x W), label, coarse, split, and the pixel sums of each channel; its metadata name
the classes, the source and what was left out. Other programs read it as any Arrow IPC file.

Legend: N images, C channels (1 or 3), H W height and width in pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hpcl.data.labels import Ids
from hpcl.sources import SPLITS

FORMAT = "2"
"""Changes when the file's layout, or what decoding gives, changes."""
_READ = ("1", FORMAT)
"""Formats that are read; 1 had no coarse labels."""
_CHUNK = 4 << 20
"""Bytes of pixels that are summed at a time."""


@dataclass(frozen=True, eq=False)
class Content:
    """What a source holds beside its pixels, in the order of its images."""

    labels: Ids | None
    """(N,) places in `classes`; None for unlabelled sources."""
    coarse: Ids | None
    """(N,) places in `coarse_classes`; None where there are no coarse labels."""
    split: npt.NDArray[np.int8]
    """(N,) places in :data:`hpcl.sources.SPLITS`; 0 where the source names no split."""
    classes: tuple[str, ...]
    coarse_classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    """(where, reason) of everything that was left out."""
    other_files: int


@dataclass(frozen=True, eq=False)
class Stored:
    """A mapped file.

    The sums per image and channel make mean and standard deviation of any training part
    exact without a pass over the pixels.
    """

    images: npt.NDArray[np.uint8]
    """(N, C, H, W), read-only."""
    content: Content
    sums: Ids
    """(N, C) sum of each channel's pixels."""
    squares: Ids
    """(N, C) sum of their squares."""
    facts: dict[str, Any]
    """What the metadata say: shape, classes, coarse_classes, content_hash, source, fingerprint, size, skipped,
    other_files."""
    is_current: bool
    """Whether it is of the format that is written now."""

    @property
    def content_hash(self) -> str:
        """SHA-256 of pixels, labels, splits and class names."""
        return str(self.facts["content_hash"])

    def holds(self, source: str, fingerprint: str, size: int | None) -> bool:
        """Whether it was made from this source as it is now, at this size, in today's format."""
        facts = self.facts
        wanted = {"source": source, "fingerprint": fingerprint, "size": size}
        return self.is_current and all(facts.get(name) == value for name, value in wanted.items())

    @staticmethod
    def open(path: Path) -> Stored | None:
        """Maps a file; None if it is incomplete, not of a known format, or does not hold what it says."""
        try:
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            metadata = file.schema.metadata or {}
            version = metadata.get(b"hpcl.format", b"").decode()
            if version not in _READ or file.num_record_batches != 1:
                return None
            facts = json.loads(metadata[b"hpcl"])
            facts = {"coarse_classes": [], "size": None, **facts}
            batch = file.get_batch(0)
            batch.validate(full=True)
            count, channels, height, width = facts["shape"]
            pixels = np.frombuffer(batch.column("image").buffers()[1], dtype=np.uint8)

            def per_channel(name: str) -> Ids:
                return np.array(batch.column(name).flatten(), dtype=np.int64).reshape(count, channels)

            def labels(name: str) -> Ids | None:
                column = batch.column(name) if name in batch.schema.names else None
                return None if column is None or column.null_count else np.array(column, dtype=np.int64)

            stored = Stored(
                images=pixels[: count * channels * height * width].reshape(count, channels, height, width),
                content=Content(
                    labels("label"),
                    labels("coarse"),
                    np.array(batch.column("split").indices, dtype=np.int8),
                    tuple(facts["classes"]),
                    tuple(facts["coarse_classes"]),
                    tuple((str(where), str(reason)) for where, reason in facts["skipped"]),
                    facts["other_files"],
                ),
                sums=per_channel("pixel_sum"),
                squares=per_channel("pixel_square_sum"),
                facts=facts,
                is_current=version == FORMAT,
            )
        except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError):
            return None
        return stored if stored._is_sound else None

    @property
    def _is_sound(self) -> bool:
        """Whether labels, parts and facts are such as :func:`write` writes: a file may be somebody else's."""
        facts, content = self.facts, self.content
        kinds = {"content_hash": str, "fingerprint": str, "classes": list, "coarse_classes": list, "skipped": list}
        if self.images.shape[1] not in (1, 3) or any(type(facts.get(n)) is not kind for n, kind in kinds.items()):
            return False
        codes: list[tuple[npt.NDArray[Any], int]] = [(content.split, len(SPLITS))]
        codes += [(content.labels, len(content.classes))] if content.labels is not None else []
        codes += [(content.coarse, len(content.coarse_classes))] if content.coarse is not None else []
        return (
            all(len(x) == len(self.images) > 0 and x.min() >= 0 and x.max() < count for x, count in codes)
            and all(type(name) is str for name in (*content.classes, *content.coarse_classes))
            and all(type(pair) is list for pair in facts["skipped"])
            and type(facts["other_files"]) is int
        )


def is_ours(path: Path) -> bool:
    """Whether a file, whole or not, is one that :func:`write` made."""
    try:
        return b"hpcl.format" in (pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata or {})
    except (pa.ArrowException, OSError):
        return False


def write(
    path: Path, images: npt.NDArray[np.uint8], content: Content, source: str, fingerprint: str, size: int | None
) -> None:
    """Writes decoded images, synced to disk; pixels that are mapped are not brought into memory.

    Args:
        path: the file; what is there is overwritten.
        images: (N, C, H, W), contiguous.
        content: labels, parts and names.
        source: where they come from.
        fingerprint: the source's.
        size: to which they were resized, or None.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    count, channels, height, width = images.shape
    digest = hashlib.sha256(json.dumps([list(images.shape), list(content.classes)]).encode())
    sums, squares = _pass_over(images, digest)
    for part in (content.labels, content.split):
        digest.update(b"none" if part is None else np.ascontiguousarray(part).data)
    if content.coarse is not None:  # nothing of it where there is none: then equal to what earlier versions wrote
        digest.update(json.dumps(list(content.coarse_classes)).encode())
        digest.update(np.ascontiguousarray(content.coarse).data)

    def numbers(ids: Ids | None) -> pa.Array:
        return pa.array(ids, pa.int64()) if ids is not None else pa.nulls(count, pa.int64())

    columns = {
        "image": pa.Array.from_buffers(pa.binary(channels * height * width), count, [None, pa.py_buffer(images)]),
        "label": numbers(content.labels),
        "coarse": numbers(content.coarse),
        "split": pa.DictionaryArray.from_arrays(pa.array(content.split, pa.int8()), list(SPLITS)),
        "pixel_sum": pa.FixedSizeListArray.from_arrays(sums.reshape(-1), channels),
        "pixel_square_sum": pa.FixedSizeListArray.from_arrays(squares.reshape(-1), channels),
    }
    facts = {
        "shape": list(images.shape),
        "classes": list(content.classes),
        "coarse_classes": list(content.coarse_classes),
        "content_hash": digest.hexdigest(),
        "source": source,
        "fingerprint": fingerprint,
        "size": size,
        "skipped": [list(pair) for pair in content.skipped],
        "other_files": content.other_files,
    }
    batch = pa.record_batch(columns).replace_schema_metadata({"hpcl.format": FORMAT, "hpcl": json.dumps(facts)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _pass_over(images: npt.NDArray[np.uint8], digest: Any) -> tuple[Ids, Ids]:
    """(N, C) sums and sums of squares of each image's and channel's pixels, which go into the digest meanwhile."""
    count, channels, height, width = images.shape
    sums, squares = (np.empty((count, channels), dtype=np.int64) for _ in range(2))
    step = max(1, _CHUNK // max(1, images[0].nbytes))

    def add(start: int) -> None:
        part = images[start : start + step].reshape(-1, channels, height * width)
        sums[start : start + step] = part.sum(2, dtype=np.int64)
        squares[start : start + step] = np.square(part, dtype=np.uint16).sum(2, dtype=np.int64)

    def parts() -> Iterator[int]:
        yield from range(0, count, step)

    with ThreadPoolExecutor(2) as pool:  # the digest takes about as long, in this thread
        done = pool.map(add, parts())
        for start in parts():
            digest.update(images[start : start + step].data)
        for _ in done:
            pass
    return sums, squares
