"""Pickles of images: the two common forms of mini-ImageNet, and CIFAR-10's and CIFAR-100's python batches.

| form | keys |
|---|---|
| mini-imagenet-cache-train.pkl | `image_data` (N, 84, 84, 3), `class_dict`: class to places |
| miniImageNet_category_split_val.pickle | `data` (N, 84, 84, 3), `labels`, perhaps `catname2label` |
| cifar-10-batches-py/data_batch_1 | `data` (N, 3072), `labels`; names in batches.meta |
| cifar-100-python/train | `data` (N, 3072), `fine_labels`, `coarse_labels`; names in meta |

Any number of images of any size will do. The split is what the file's name says. All go through
:mod:`hpcl.sources.unpickle`, which runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcl.decode import Item
from hpcl.sources.source import DataError, Source, fingerprint, split_of
from hpcl.sources.stored import Array, Unreadable, as_image, image_layout
from hpcl.sources.unpickle import load
from hpcl.sources.walk import Tree

ENDINGS = (".pkl", ".pickle", ".p")
_CIFAR = {"train", "test", "meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))}
_META = {"batches.meta", "meta"}


@dataclass(frozen=True)
class Batch:
    """The images of one file."""

    path: Path
    images: Array
    labels: list[Any]
    """One per image: a number, a name, or None where there is none."""
    coarse: list[Any] | None
    split: int


@dataclass(frozen=True)
class _Detail:
    batches: tuple[Batch, ...]
    classes: tuple[str, ...] | None
    coarse: tuple[str, ...] | None


def look(tree: Tree) -> Source | None:
    """The folder as a source of this kind: all its pickles that hold images.

    Raises:
        DataError: it holds pickles and no image file, and none of the pickles can be used; says why.
    """
    candidates = [path for path in tree.others if _may_be(path)]
    batches, names, failed = [], [], []
    for path in candidates:
        try:
            content = _read(path)
            if _is_meta(content):
                names.append((path, content))
            else:
                batches.append(_batch(path, content))
        except (Unreadable, OSError) as error:
            failed.append((path, _reason(error)))
    if not batches:
        if failed and not tree.images and all(path in candidates for path in tree.others):
            raise DataError(*(f"data.source: {path} {reason}" for path, reason in failed))
        return None
    used = [*(batch.path for batch in batches), *(path for path, _ in names)]
    others = [tree.name(path) for path in [*tree.others, *tree.images] if path not in set(candidates)]
    skipped = ((tree.name(path), reason) for path, reason in failed)
    notes = (f"taken as pickles; its {len(tree.images):,} image files are not read",) if tree.images else ()
    return tree.source(
        "pickle", used, others, skipped=skipped, notes=notes, detail=_detail(batches, [content for _, content in names])
    )


def look_at_file(path: Path) -> Source:
    """One file as a source; CIFAR's names are taken from the file beside it.

    Raises:
        DataError: it is no pickle of images; says why.
    """
    try:
        batch = _batch(path, _read(path))
        beside = [path.parent / name for name in sorted(_META) if (path.parent / name).is_file()]
        names = [beside[0]] if beside and path.name in _CIFAR else []
        detail = _detail([batch], [_read(file) for file in names])
    except (Unreadable, OSError) as error:
        raise DataError(f"data.source: {path} {_reason(error)}") from error
    root = path.parent if names else path
    return Source("pickle", path, (path, *names), fingerprint(root, [path, *names]), detail=detail)


def starts_one(path: Path, magic: bytes) -> bool:
    """Whether a file given as source is to be read as a pickle, by its name and first bytes."""
    return path.suffix.lower() in ENDINGS or (magic[:1] == b"\x80" and magic[1:2] <= b"\x05")


def items(source: Source) -> Iterator[Item]:
    """One item per image, in the files' order.

    Raises:
        DataError: a file has changed since it was found.
    """
    assert source.path is not None and isinstance(source.detail, _Detail)
    root = source.path if source.path.is_dir() else source.path.parent
    for batch in source.detail.batches:
        name = batch.path.relative_to(root).as_posix()
        layout = image_layout(batch.images.shape)
        side = math.isqrt(batch.images.shape[-1] // 3)
        coarse = batch.coarse or [None] * len(batch.labels)
        try:
            for number, (row, label, above) in enumerate(zip(batch.images.rows(), batch.labels, coarse, strict=True)):
                image = as_image(row, layout) if layout else as_image(row.reshape(3, side, side), "NCHW")
                problem = "no class of class_dict names it" if label is _NONE else None
                yield Item(f"{name} image {number}", image, None if problem else label, batch.split, problem, above)
        except (Unreadable, OSError, ValueError) as error:
            raise DataError(f"data.source: {batch.path} {_reason(error)}") from error


def class_names(source: Source) -> tuple[str, ...] | None:
    """Names of the labels that are numbers."""
    names: tuple[str, ...] | None = source.detail.classes
    return names


def coarse_names(source: Source) -> tuple[str, ...] | None:
    """Names of the coarse labels."""
    names: tuple[str, ...] | None = source.detail.coarse
    return names


_NONE = object()


def _may_be(path: Path) -> bool:
    if path.suffix.lower() in ENDINGS:
        return True
    if path.name not in _CIFAR | _META:
        return False
    try:
        with path.open("rb") as file:
            return file.read(1) in (b"\x80", b"(")
    except OSError:
        return False


def _read(path: Path) -> dict[str, Any]:
    content = load(path)
    if type(content) is not dict:
        raise Unreadable(f"holds a {type(content).__name__}, but must hold a dictionary of images and labels")
    return {_text(key): value for key, value in content.items()}


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    return str(error)


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _is_meta(content: dict[str, Any]) -> bool:
    return "data" not in content and ("label_names" in content or "fine_label_names" in content)


def _detail(batches: list[Batch], metas: list[dict[str, Any]]) -> _Detail:
    def names(*keys: str) -> tuple[str, ...] | None:
        found = next((meta[key] for meta in metas for key in keys if isinstance(meta.get(key), list)), None)
        return tuple(_text(name) for name in found) if found else None

    numbered = all(type(label) is int for batch in batches for label in batch.labels)
    classes = names("fine_label_names", "label_names") if numbered else None
    return _Detail(tuple(batches), classes, names("coarse_label_names"))


def _batch(path: Path, content: dict[str, Any]) -> Batch:
    """The images and labels of a file's dictionary."""
    images = content.get("image_data", content.get("data"))
    if not isinstance(images, Array):
        keys = ", ".join(sorted(content)[:8])
        raise Unreadable(f"has no array `image_data` or `data` (its keys: {keys or 'none'})")
    if images.dtype != np.uint8:
        raise Unreadable(f"has images of dtype {images.dtype}, but they must be uint8, 0 to 255")
    shape = images.shape
    is_flat = len(shape) == 2 and shape[1] > 0 and shape[1] == 3 * math.isqrt(shape[1] // 3) ** 2
    if (image_layout(shape) is None and not is_flat) or 0 in shape[1:]:
        raise Unreadable(f"has images of shape {shape}, but they must be (N, H, W, 3), (N, 3, H, W) or (N, 3 * side²)")
    count = shape[0]
    coarse = None
    if "class_dict" in content:
        labels = _by_class(content["class_dict"], count)
    else:
        key = "fine_labels" if "fine_labels" in content else "labels"
        labels = _list(content.get(key), key, count) or [None] * count
        coarse = _list(content.get("coarse_labels"), "coarse_labels", count)
        names = content.get("catname2label")
        if isinstance(names, dict):
            name_of = {label: _text(name) for name, label in names.items() if type(label) is int}
            if all(label in name_of for label in labels):
                labels = [name_of[label] for label in labels]
    return Batch(path, images, labels, coarse, split_of(path.name) or 0)


def _list(value: Any, key: str, count: int) -> list[Any] | None:
    if value is None:
        return None
    labels = _numbers(value)
    if labels is None or len(labels) != count:
        got = "no list of labels" if labels is None else f"{len(labels):,} labels"
        raise Unreadable(f"has {got} in `{key}` for {count:,} images")
    return labels


def _numbers(value: Any) -> list[Any] | None:
    """A list or an array of one axis (or several, all but one of length 1) as a list."""
    if isinstance(value, Array):
        array = value.load()
        found = array.reshape(-1).tolist() if array.size in array.shape else None
    else:
        found = value if type(value) is list else list(value) if type(value) is tuple else None
    if found is None or any(type(label) not in (int, str, bytes) for label in found):
        return None
    return [_text(label) if type(label) is bytes else label for label in found]


def _by_class(classes: Any, count: int) -> list[Any]:
    """The class of each image, or `_NONE`."""
    if type(classes) is not dict:
        raise Unreadable("has no dictionary as `class_dict`")
    labels: list[Any] = [_NONE] * count
    for name, places in classes.items():
        found = _numbers(places)
        if found is None:
            raise Unreadable(f"has class {_text(name)[:80]!r} in `class_dict` without a list of places")
        for place in found:
            if type(place) is not int or not 0 <= place < count:
                raise Unreadable(
                    f"names image {str(place)[:80]} of class {_text(name)[:80]!r}, but has {count:,} images"
                )
            if labels[place] is not _NONE:
                raise Unreadable(f"names image {place} twice in `class_dict`")
            labels[place] = name if type(name) is int else _text(name)
    return labels
