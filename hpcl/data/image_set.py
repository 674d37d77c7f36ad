"""Images as one memory-mapped array, with labels and fixed train, val and test parts.

A source is decoded once into an Arrow IPC file (see :func:`hpcl.files.cache_folder`) and mapped
from then on: processes on one machine share one copy, and loading takes milliseconds.

Legend: N images of the source, C channels (1 or 3), H W height and width.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpcl import sections
from hpcl.data.convert import convert, look_for, open_arrow
from hpcl.data.labels import Ids, no_ids
from hpcl.data.parts import parts_of
from hpcl.data.store import Stored
from hpcl.files import cache_folder
from hpcl.sources import SPLITS, DataError, Source


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
    """Class names, of novel classes too; empty for unlabelled sources."""
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
    """(N,) places in `coarse_classes`, such as CIFAR-100's 20; None where the source has none."""
    coarse_classes: tuple[str, ...] = ()
    """Names of the coarse classes."""
    novel_val: Ids = field(default_factory=no_ids)
    """Sorted places of images of classes that occur in neither train, val nor test, to choose by; often empty."""
    novel_test: Ids = field(default_factory=no_ids)
    """The same, to report (few-shot episodes)."""

    def describe(self) -> str:
        """One line: source, size, classes, parts, what was left out.

        For example ``mnist5k: 5,000 images 1x28x28, 10 classes; train 4,050, val 450, test 500``.
        """
        count, channels, height, width = self.images.shape
        parts = {name: getattr(self, name) for name in SPLITS}
        shown = [f"{name} {len(ids):,}" for name, ids in parts.items()]
        novel = {"novel val": self.novel_val, "novel test": self.novel_test}
        for name, ids in novel.items():
            if self.labels is not None and len(ids):
                count_of = len(np.unique(self.labels[ids]))
                shown.append(f"{name} {len(ids):,} ({count_of:,} class{'es' if count_of > 1 else ''})")
        unused = count - sum(len(ids) for ids in (*parts.values(), *novel.values()))
        if unused:
            shown.append(f"unused {unused:,}")
        classes = f"{len(self.classes)} classes" if self.labels is not None else "unlabelled"
        if self.coarse_labels is not None:
            classes += f" in {len(self.coarse_classes)} coarse ones"
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


def load(data: sections.Data, cache_dir: str | Path | None = None) -> ImageSet:
    """The images a configuration names, decoded on first use; :func:`hpcl.data.parts.parts_of` says into which parts.

    Safe with several processes at once: one decodes, the others wait for it. A process that is killed in
    decoding loses nothing: the next one goes on from its last block.

    Args:
        data: section `data` of the configuration.
        cache_dir: folder of decoded images; default :func:`hpcl.files.cache_folder`.

    Raises:
        DataError: the source does not exist, holds no usable training image, does not fit
            its settings, or the cache cannot be written.
    """
    source = look_for(data.source)
    stored = open_arrow(source) if source.kind == "arrow" else None
    if stored is None or (data.size is not None and stored.images.shape[2:] != (data.size, data.size)):
        stored = _cached(source, data.size, Path(cache_dir) if cache_dir is not None else cache_folder())
    content = stored.content
    parts = parts_of(content.labels, content.split, data)
    mean, std = _mean_and_std(stored, parts.train)
    return ImageSet(
        images=stored.images,
        labels=content.labels,
        train=parts.train,
        val=parts.val,
        test=parts.test,
        classes=content.classes,
        source=data.source,
        content_hash=stored.content_hash,
        mean=mean,
        std=std,
        skipped=content.skipped,
        other_files=content.other_files,
        coarse_labels=content.coarse,
        coarse_classes=content.coarse_classes,
        novel_val=parts.novel_val,
        novel_test=parts.novel_test,
    )


def cache_file(source: Source, size: int | None, folder: Path) -> Path:
    """Where the decoded images of a source at a size lie in a cache folder."""
    identity = f"{source.kind}\0{source.path}\0{size}"
    stem = re.sub(r"[^A-Za-z0-9]+", "-", source.path.stem if source.path else source.kind).strip("-")[:40]
    return folder / f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.arrow"


def _cached(source: Source, size: int | None, folder: Path) -> Stored:
    """The mapped cache file of a source at a size; written first where it is missing or stale."""
    path = cache_file(source, size, folder)
    found = Stored.open(path)
    if found is not None and found.holds(str(source.path or source.kind), source.fingerprint, size):
        return found
    instead = "set HPCL_CACHE to another folder"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # the images may be for this user alone
    except OSError as error:
        raise DataError(
            f"the cache folder {folder} cannot be written ({error}); free space there or {instead}"
        ) from error
    return convert(source, size, path, instead)


def _mean_and_std(stored: Stored, ids: Ids) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(C,) mean and standard deviation of the pixels of some images, in 0..1 units."""
    pixels = len(ids) * stored.images[0, 0].size
    mean = stored.sums[ids].sum(0) / pixels
    variance = stored.squares[ids].sum(0) / pixels - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))  # at least one gray level: a flat set must not divide by 0
    return (mean / 255).astype(np.float32), (std / 255).astype(np.float32)
