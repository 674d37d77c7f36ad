"""Images as one memory-mapped array, with labels and fixed train, val and test parts.

A source is decoded once into an Arrow IPC file (see :func:`hpcl.files.cache_folder`) and mapped
from then on: processes on one machine share one copy, and loading takes milliseconds.

Legend: N images of the source, n images of a batch, C channels (1 or 3), H W height and width.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from hpcl import config, sources
from hpcl.decode import resize
from hpcl.files import cache_folder
from hpcl.rng import seed_of
from hpcl.sources import SPLITS, DataError, Raw, Source

__all__ = ["DataError", "DeviceImages", "ImageSet", "cache_folder", "load"]

Ids = npt.NDArray[np.int64]

_FORMAT = "1"
"""Changes when the cached file's layout, or what decoding gives, changes."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images and their parts."""

    images: npt.NDArray[np.uint8]
    """(N, C, H, W), read-only view of the mapped file."""
    labels: Ids | None
    """(N,) places in `classes`; None for unlabelled sources."""
    train: Ids
    """Sorted places of the training images, after the held-out parts and `subset`."""
    val: Ids
    """Sorted places of the images for choosing the best trial; empty for unlabelled sources."""
    test: Ids
    """Sorted places of the test images; empty for unlabelled sources without test split."""
    classes: tuple[str, ...]
    """Class names; empty for unlabelled sources."""
    source: str
    """`data.source` as given."""
    content_hash: str
    """SHA-256 of pixels, labels, splits and class names: equal for equal content."""
    mean: npt.NDArray[np.float32]
    """(C,) mean of the training images' pixels, in 0..1 units."""
    std: npt.NDArray[np.float32]
    """(C,) standard deviation of the same; at least 1/255."""
    skipped: tuple[tuple[str, str], ...] = ()
    """(where, reason) of everything that looked like an image and was left out."""
    other_files: int = 0
    """Files in the folder that are no images."""
    coarse_labels: Ids | None = None
    """(N,) places in `coarse_classes`; None where the source has none."""
    coarse_classes: tuple[str, ...] = ()
    novel_val: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Sorted places of images whose classes never occur in training, for choosing; empty where there are none."""
    novel_test: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """The same for testing."""

    def describe(self) -> str:
        """One line: source, size, classes, parts, what was left out.

        For example ``mnist5k: 5,000 images 1x28x28, 10 classes; train 4,050, val 450, test 500``.
        """
        count, channels, height, width = self.images.shape
        parts = {name: getattr(self, name) for name in SPLITS}
        shown = [f"{name} {len(ids):,}" for name, ids in parts.items()]
        unused = count - sum(len(ids) for ids in parts.values())
        if unused:
            shown.append(f"unused {unused:,}")
        classes = f"{len(self.classes)} classes" if self.labels is not None else "unlabelled"
        line = f"{self.source}: {count:,} images {channels}x{height}x{width}, {classes}; {', '.join(shown)}"
        if self.skipped:
            line += f"; {len(self.skipped):,} skipped (first: {': '.join(self.skipped[0])})"
        if self.other_files:
            line += f"; {self.other_files:,} other files ignored"
        if self.labels is not None:
            known = np.unique(self.labels[self.train])
            for name in ("val", "test"):
                strange = len(np.setdiff1d(self.labels[parts[name]], known))
                if strange:
                    line += f"; {strange} classes of {name} have no training image"
        return line


class DeviceImages:
    """Batches of an image set on a device.

    On a GPU all images are copied there once if they fit; else, and on a CPU, every batch
    is gathered from the mapped file.

    Args:
        data: the images.
        device: where batches are wanted.
        share: largest part of a GPU's free memory the images may take.
    """

    def __init__(self, data: ImageSet, device: torch.device | str, *, share: float = 0.5) -> None:
        self.device = torch.device(device)
        self.mean, self.std = (torch.from_numpy(values).to(self.device) for values in (data.mean, data.std))
        """(C,) of the training images, as :attr:`ImageSet.mean` and `std`, on the device."""
        self._map = data.images
        self._held = self._copy(share) if self.device.type == "cuda" else None

    @property
    def resident(self) -> bool:
        """Whether all images lie in the device's own memory."""
        return self._held is not None

    def batch(self, ids: Ids | Tensor) -> Tensor:
        """uint8 (n, C, H, W) on the device: the images at these places (long), in their order."""
        wanted = torch.as_tensor(ids)
        if self._held is not None:
            return self._held.index_select(0, wanted.to(self.device, non_blocking=True))
        rows = torch.from_numpy(self._map[wanted.cpu().numpy()])
        if self.device.type == "cpu":
            return rows
        return rows.pin_memory().to(self.device, non_blocking=True)

    def _copy(self, share: float) -> Tensor | None:
        free, _ = torch.cuda.mem_get_info(self.device)
        if self._map.nbytes > share * free:
            return None
        try:
            held = torch.empty(self._map.shape, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:  # another trial took the memory meanwhile
            return None
        step = max(1, (64 << 20) // max(1, self._map[:1].nbytes))
        for start in range(0, len(self._map), step):
            held[start : start + step] = torch.from_numpy(self._map[start : start + step].copy())
        return held


def load(data: config.Data, cache_dir: str | Path | None = None) -> ImageSet:
    """The images a configuration names, decoded on first use.

    Parts: the source's own val and test splits where it has them. Else, where there are
    labels, `test_fraction` of all images and then `val_fraction` of the rest, by class.
    `subset` takes of what is left for training, by class, at least one image each.

    Safe with several processes at once: each writes a file of its own and renames it. (So
    let one process load first, or all of them decode.)

    Args:
        data: section `data` of the configuration.
        cache_dir: folder of decoded images; default :func:`hpcl.files.cache_folder`.

    Raises:
        DataError: the source does not exist, holds no usable training image, does not fit
            its settings, or the cache cannot be written.
    """
    try:
        source = sources.find(data.source)
    except (OSError, RuntimeError) as error:  # no permission, a name too long, the home of an unknown user
        raise DataError(f"data.source is {data.source[:80]}, which cannot be read ({error}); give another") from error
    stored = _Stored.open(source.files[0]) if source.kind == "arrow" else None
    if source.kind == "arrow" and stored is None:
        raise DataError(
            f"data.source is {data.source}, an Arrow file that this project did not write or that is incomplete; "
            "give the source it was made from"
        )
    if stored is None or (data.size is not None and stored.images.shape[2:] != (data.size, data.size)):
        stored = _cached(source, data.size, Path(cache_dir) if cache_dir is not None else cache_folder(), stored)
    train, val, test = _parts(stored.labels, stored.split, data)
    if not len(train):
        counts = ", ".join(f"{int((stored.split == code).sum())} {name}" for code, name in enumerate(SPLITS))
        raise DataError(
            f"data.source {data.source} has no training image ({counts}); give one with a train split, or with none"
        )
    mean, std = _mean_and_std(stored, train)
    return ImageSet(
        images=stored.images,
        labels=stored.labels,
        train=train,
        val=val,
        test=test,
        classes=tuple(stored.facts["classes"]),
        source=data.source,
        content_hash=stored.facts["content_hash"],
        mean=mean,
        std=std,
        skipped=tuple((str(where), str(reason)) for where, reason in stored.facts["skipped"]),
        other_files=int(stored.facts["other_files"]),
    )


# --- parts -------------------------------------------------------------------------


def _parts(labels: Ids | None, split: npt.NDArray[np.int8], data: config.Data) -> tuple[Ids, Ids, Ids]:
    """Sorted places of the train, val and test images; see :func:`load`."""
    train, val, test = (np.flatnonzero(split == code) for code in range(len(SPLITS)))
    if labels is not None:
        if not len(test):
            test = _draw(train, labels, data.test_fraction, data.split_seed, "test", least=0)
            train = np.setdiff1d(train, test)
        if not len(val):
            val = _draw(train, labels, data.val_fraction, data.split_seed, "val", least=0)
            train = np.setdiff1d(train, val)
    if data.subset < 1:
        of_image = labels if labels is not None else np.zeros(len(split), dtype=np.int64)
        train = _draw(train, of_image, data.subset, data.split_seed, "subset", least=1)
    return train, val, test


def _draw(ids: Ids, labels: Ids, fraction: float, seed: int, purpose: str, *, least: int) -> Ids:
    """A fraction of some images, the same of each class (largest remainder), sorted.

    Args:
        ids: (n,) images to choose from.
        labels: (N,) class of every image.
        fraction: of `ids`.
        seed: of the choice.
        purpose: names the draw.
        least: images at least per class; 0 leaves one of each class instead.
    """
    classes = np.unique(labels[ids])
    members = [ids[labels[ids] == label] for label in classes]
    sizes = np.array([len(of_class) for of_class in members], dtype=np.int64)
    quota = fraction * sizes
    counts = np.floor(quota + 1e-9).astype(np.int64)
    missing = round(fraction * len(ids)) - int(counts.sum())
    by_remainder = np.argsort(-np.round(quota - counts, 9), kind="stable")
    counts[by_remainder[: max(0, missing)]] += 1
    counts = np.maximum(counts, least) if least else np.minimum(counts, sizes - 1)
    chosen = [
        np.random.default_rng(seed_of(seed, f"data-{purpose}", label)).permutation(of_class)[:count]
        for label, of_class, count in zip(classes, members, counts, strict=True)
    ]
    return np.sort(np.concatenate(chosen)) if chosen else ids


# --- the Arrow file ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Stored:
    """A mapped file: one record batch with the columns image, label, split, and pixel sums.

    The sums per image and channel make mean and standard deviation of any training part
    exact without a pass over the pixels.
    """

    images: npt.NDArray[np.uint8]
    labels: Ids | None
    split: npt.NDArray[np.int8]
    sums: Ids
    """(N, C) sum of each channel's pixels."""
    squares: Ids
    """(N, C) sum of their squares."""
    facts: dict[str, Any]
    """shape, classes, content_hash, source, fingerprint, skipped, other_files."""

    @staticmethod
    def open(path: Path) -> _Stored | None:
        """Maps the file; None if it is incomplete, not of this format, or does not hold what it says."""
        try:
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            metadata = file.schema.metadata or {}
            if metadata.get(b"hpcl.format") != _FORMAT.encode() or file.num_record_batches != 1:
                return None
            facts = json.loads(metadata[b"hpcl"])
            batch = file.get_batch(0)
            batch.validate(full=True)
            count, channels, height, width = facts["shape"]
            pixels = np.frombuffer(batch.column("image").buffers()[1], dtype=np.uint8)
            label = batch.column("label")

            def per_channel(name: str) -> Ids:
                return np.array(batch.column(name).flatten(), dtype=np.int64).reshape(count, channels)

            stored = _Stored(
                images=pixels[: count * channels * height * width].reshape(count, channels, height, width),
                labels=None if label.null_count else np.array(label, dtype=np.int64),
                split=np.array(batch.column("split").indices, dtype=np.int8),
                sums=per_channel("pixel_sum"),
                squares=per_channel("pixel_square_sum"),
                facts=facts,
            )
        except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError):
            return None
        return stored if stored.is_sound else None

    @property
    def is_sound(self) -> bool:
        """Whether labels, parts and facts are such as :func:`_write` writes: a file may be somebody else's."""
        facts, kinds = self.facts, {"content_hash": str, "fingerprint": str, "classes": list, "skipped": list}
        if self.images.shape[1] not in (1, 3) or any(type(facts.get(n)) is not kind for n, kind in kinds.items()):
            return False
        codes = [(self.split, len(SPLITS))] + [(x, len(facts["classes"])) for x in (self.labels,) if x is not None]
        return (
            all(len(x) == len(self.images) > 0 and x.min() >= 0 and x.max() < count for x, count in codes)
            and all(type(name) is str for name in facts["classes"])
            and all(type(pair) is list and len(pair) == 2 for pair in facts["skipped"])
            and type(facts.get("other_files")) is int
        )


def _cached(source: Source, size: int | None, folder: Path, stored: _Stored | None) -> _Stored:
    """The mapped cache file of a source at a size; written first where it is missing or stale.

    Args:
        source: what to decode.
        size: side in pixels or None.
        folder: of the cache.
        stored: an Arrow source's content, to be resized in place of decoding.
    """
    identity = f"{source.kind}\0{source.path}\0{size}"
    stem = re.sub(r"[^A-Za-z0-9]+", "-", source.path.stem if source.path else source.kind).strip("-")[:40]
    path = folder / f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.arrow"
    found = _Stored.open(path)
    if found is not None and found.facts["fingerprint"] == source.fingerprint:
        return found
    if stored is None:
        raw = sources.read(source, size)
    else:
        assert size is not None
        facts = stored.facts
        skipped = tuple((where, reason) for where, reason in facts["skipped"])
        pixels = resize(stored.images, size)
        raw = Raw(pixels, stored.labels, stored.split, tuple(facts["classes"]), skipped, facts["other_files"])
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # the images may be for this user alone
        _write(raw, str(source.path or source.kind), source.fingerprint, path)
    except OSError as error:
        raise DataError(
            f"the cache folder {folder} cannot be written ({error}); "
            "free space there or set HPCL_CACHE to another folder"
        ) from error
    written = _Stored.open(path)
    if written is None or written.facts["fingerprint"] != source.fingerprint:
        raise DataError(f"data.source {source.path} changed while it was being read; run again")
    return written


def _write(raw: Raw, source: str, fingerprint: str, path: Path) -> None:
    """Writes a decoded source as one Arrow record batch; a reader sees the old file or the whole new one."""
    count, channels, height, width = raw.images.shape
    images = np.ascontiguousarray(raw.images)
    sums, squares = _pixel_sums(images)
    label = pa.array(raw.labels, pa.int64()) if raw.labels is not None else pa.nulls(count, pa.int64())
    width_bytes = pa.binary(channels * height * width)
    columns = {
        "image": pa.Array.from_buffers(width_bytes, count, [None, pa.py_buffer(images)]),
        "label": label,
        "split": pa.DictionaryArray.from_arrays(pa.array(raw.split, pa.int8()), list(SPLITS)),
        "pixel_sum": pa.FixedSizeListArray.from_arrays(sums.reshape(-1), channels),
        "pixel_square_sum": pa.FixedSizeListArray.from_arrays(squares.reshape(-1), channels),
    }
    digest = hashlib.sha256(json.dumps([list(raw.images.shape), list(raw.classes)]).encode())
    for part in (images, raw.labels, raw.split):
        digest.update(b"none" if part is None else np.ascontiguousarray(part).data)
    facts = {
        "shape": list(raw.images.shape),
        "classes": list(raw.classes),
        "content_hash": digest.hexdigest(),
        "source": source,
        "fingerprint": fingerprint,
        "skipped": [list(pair) for pair in raw.skipped],
        "other_files": raw.other_files,
    }
    batch = pa.record_batch(columns).replace_schema_metadata({"hpcl.format": _FORMAT, "hpcl": json.dumps(facts)})
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _pixel_sums(images: npt.NDArray[np.uint8]) -> tuple[Ids, Ids]:
    """(N, C) sums and sums of squares of the pixels of each image and channel."""
    count, channels = images.shape[:2]
    sums, squares = (np.empty((count, channels), dtype=np.int64) for _ in range(2))
    step = max(1, (4 << 20) // max(1, images[:1].nbytes))
    for start in range(0, count, step):
        part = images[start : start + step].reshape(-1, channels, images[0, 0].size)
        sums[start : start + step] = part.sum(2, dtype=np.int64)
        squares[start : start + step] = np.square(part, dtype=np.uint16).sum(2, dtype=np.int64)
    return sums, squares


def _mean_and_std(stored: _Stored, ids: Ids) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(C,) mean and standard deviation of the pixels of some images, in 0..1 units."""
    pixels = len(ids) * stored.images[0, 0].size
    mean = stored.sums[ids].sum(0) / pixels
    variance = stored.squares[ids].sum(0) / pixels - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))  # at least one gray level: a flat set must not divide by 0
    return (mean / 255).astype(np.float32), (std / 255).astype(np.float32)
