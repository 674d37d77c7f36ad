"""A source of images to one Arrow file: decoded once, on all cores, never all in memory, resumed where it was cut off.

Blocks of images are decoded and go into a scratch folder beside the file (:mod:`hpcl.data.scratch`); in the end
one record batch is written from there and takes the file's place.

Legend: N images, C channels (1 or 3), H W height and width in pixels.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcl import sources
from hpcl.data.blocks import Block, OtherSize, decoded
from hpcl.data.labels import class_ids
from hpcl.data.progress import Progress, Waiting
from hpcl.data.scratch import Scratch, claimed, remove
from hpcl.data.store import FORMAT, Content, Stored, is_ours, write
from hpcl.decode import Item
from hpcl.errors import UserError, harmless
from hpcl.sources import DataError, Source

_log = logging.getLogger("hpcl.data")

_LOOKED_AT = 4096
"""Images after which it is said that they have several sizes, rather than looking at all of them."""
_ONE_AT_A_TIME = threading.Lock()
"""A conversion takes all cores, and some file systems' locks hold between processes only."""


def convert_file(source: str, out: Path, size: int | None = None, *, force: bool = False) -> tuple[Stored, bool]:
    """Converts a source into a file of one's own.

    Args:
        source: as `data.source`.
        out: the file; one that was made from another source, or at another size, is overwritten.
        size: side in pixels to which images are resized and cut; None keeps theirs.
        force: overwrite a file that this project did not write.

    Returns:
        The file's content, and whether it was there already.

    Raises:
        UserError: the source cannot be used, or the file cannot be written.
    """
    found = look_for(source)
    out = out.expanduser()
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or name another file")
    if out.is_dir():
        raise UserError(f"{out}: is a folder, but must be a file to write")
    if found.path is not None and out.exists() and out.samefile(found.path):
        raise UserError(f"{out}: is the source itself; name another file")
    if out.exists() and not force and not is_ours(out):
        raise UserError(
            f"{out}: is there already, and not written by `hpcl data convert`; name another file, or overwrite it "
            "with --force"
        )
    there = Stored.open(out)
    if there is not None and there.holds(_name(found), found.fingerprint, size):
        return there, True
    return convert(found, size, out, "name a file elsewhere"), False


def look_for(source: str) -> Source:
    """As :func:`hpcl.sources.find`, with a word on sources that cannot even be looked for.

    Raises:
        DataError: it does not exist, is nothing that can be read, or must not be looked at.
    """
    try:
        return sources.find(source)
    except (OSError, RuntimeError) as error:  # no permission, a name too long, the home of an unknown user
        raise DataError(f"data.source is {source[:80]}, which cannot be read ({error}); give another") from error


def open_arrow(source: Source) -> Stored:
    """The content of a source of kind arrow.

    Raises:
        DataError: this project did not write it, or it is damaged.
    """
    stored = Stored.open(source.files[0])
    if stored is None:
        raise DataError(
            f"data.source is {source.path}, an Arrow file that this project did not write or that is incomplete; "
            "give the source it was made from"
        )
    return stored


def convert(source: Source, size: int | None, target: Path, instead: str) -> Stored:
    """The mapped content of a file; written first where it is missing, or holds anything else.

    One process converts, others that want the same file wait for it.

    Args:
        source: what to decode.
        size: side in pixels, or None.
        target: the file; its folder must be there.
        instead: what the user can do where it cannot be written.

    Raises:
        DataError: no usable image, images of several sizes with `size` None, labels that do not fit, or a file
            that cannot be written; what was decoded until then is kept in the last case.
    """
    made = Waiting(f"{source.path or source.kind} to {target}")
    with _ONE_AT_A_TIME, _told(target, instead), claimed(target, made) as folder:
        found = Stored.open(target)
        if found is None or not found.holds(_name(source), source.fingerprint, size):
            try:
                _convert(source, size, target, folder, instead)
            except _Full:
                raise
            except DataError:  # decoded again it would be the same
                remove(folder)
                raise
            found = Stored.open(target)
        remove(folder)
    if found is None or found.facts["fingerprint"] != source.fingerprint:
        raise DataError(f"data.source {source.path} changed while it was being read; run again")
    return found


def _name(source: Source) -> str:
    return str(source.path or source.kind)


class _Full(DataError):
    """There is no room to write; what was decoded is kept."""


@contextmanager
def _told(target: Path, instead: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Full(
            f"{target}: cannot be written ({error}); what was decoded is kept, and the same command goes on from "
            f"there: free space in {target.parent}, or {instead}"
        ) from error


# ---------------------------------------------------------------- what a source holds


@dataclass
class _Given:
    """A source's images, and what is known beside them."""

    items: Iterator[Item]
    classes: tuple[str, ...] | None
    coarse_classes: tuple[str, ...] | None
    skipped: tuple[tuple[str, str], ...]
    other_files: int
    total: int | None
    """Images, where that is known without reading them."""


def _given(source: Source) -> _Given:
    if source.kind != "arrow":
        names, coarse = sources.class_names(source), sources.coarse_names(source)
        return _Given(sources.items(source), names, coarse, source.skipped, source.other_files, sources.count(source))
    stored = open_arrow(source)
    content = stored.content
    return _Given(
        _stored_items(stored),
        content.classes or None,
        content.coarse_classes or None,
        content.skipped,
        content.other_files,
        len(stored.images),
    )


def _stored_items(stored: Stored) -> Iterator[Item]:
    content = stored.content
    for i, pixels in enumerate(stored.images):
        label, coarse = (None if ids is None else int(ids[i]) for ids in (content.labels, content.coarse))
        whole = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
        yield Item(f"image {i}", whole, label, int(content.split[i]), coarse=coarse)


# ---------------------------------------------------------------- decoding


@dataclass
class _Read:
    """What was read of a source so far, without its pixels."""

    labels: list[Any] = field(default_factory=list)
    coarse: list[Any] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    examples: dict[tuple[int, int], str] = field(default_factory=dict)
    """Name of the first image of each size."""

    def add(self, items: list[Item], skipped: list[tuple[int, str]]) -> None:
        """Take in the images of a block."""
        left_out = dict(skipped)
        for place, item in enumerate(items):
            if place in left_out:
                self.skipped.append((item.name, left_out[place]))
                continue
            self.labels.append(item.label)
            self.coarse.append(item.coarse)
            self.split.append(item.split)

    def add_sizes(self, block: Block) -> None:
        """Count the sizes of a block's images."""
        for item, result in zip(block.items, block.results, strict=True):
            if isinstance(result, str):
                continue
            size = (result.height, result.width) if isinstance(result, OtherSize) else result.shape[:2]
            self.sizes[size] += 1
            self.examples.setdefault(size, item.name)


def _convert(source: Source, size: int | None, target: Path, folder: Path, instead: str) -> None:
    """Decodes what is not decoded yet, and writes the file.

    Raises:
        DataError: as :func:`convert`.
        OSError: the disk is full, or the folder cannot be written.
    """
    given, read = _given(source), _Read()
    key = {"format": FORMAT, "source": _name(source), "fingerprint": source.fingerprint, "size": size}
    _log.info("reading images from %s", source.path)
    with closing(Scratch(folder, key)) as scratch:
        before = sum(done.items for done in scratch.done)
        name = source.path.name if source.path else source.kind
        with Progress(f"decoding {name}", given.total, before) as progress:
            _decode(given, size, scratch, read, progress, instead)
            skipped = tuple((harmless(where), harmless(reason)) for where, reason in (*given.skipped, *read.skipped))
            for where, reason in skipped[:5]:
                _log.warning("skipped %s: %s", where, reason)
            if len(skipped) > 5:
                _log.warning("and %s more; `hpcl data check` names all", f"{len(skipped) - 5:,}")
            if not read.labels:
                first = "; the first: " + ": ".join(skipped[0]) if skipped else ""
                raise DataError(f"data.source {source.path} has no usable image ({len(skipped)} skipped{first})")
            content = _content(given, read, skipped, _name(source))
            progress.finishing(f"writing {target}")
            images = scratch.whole()
            _check_space(folder, images.nbytes, instead)
            write(folder / "store", images, content, _name(source), source.fingerprint, size)
            if source.path is not None and look_for(str(source.path)).fingerprint != source.fingerprint:
                raise DataError(f"data.source {source.path} changed while it was being read; run again")
            os.replace(folder / "store", target)


def _decode(given: _Given, size: int | None, scratch: Scratch, read: _Read, progress: Progress, instead: str) -> None:
    """Decode all blocks that the scratch folder has not yet."""
    shape = None
    for done in scratch.done:
        items = list(islice(given.items, done.items))
        if len(items) < done.items:
            raise DataError("data.source changed while it was being read; run again")
        read.add(items, done.skipped)
        if done.shape[0]:
            shape = done.shape[2:]
            kept = next(item.name for i, item in enumerate(items) if i not in dict(done.skipped))
            read.sizes[shape] += done.shape[0]
            read.examples.setdefault(shape, kept)
    measured = not scratch.done
    with closing(decoded(given.items, size, shape)) as blocks:
        for block in blocks:
            read.add_sizes(block)
            read.add(block.items, block.skipped)
            if len(read.sizes) == 1 or (not block.kept and not read.sizes):
                done = scratch.add(len(block.items), block.kept, block.skipped)
                if measured and given.total and done.shape[0]:
                    _check_space(scratch.folder, 2 * given.total * done.bytes // done.shape[0], instead)
                    measured = False
            elif sum(read.sizes.values()) >= _LOOKED_AT:
                break
            progress.advance(len(block.items))
    if len(read.sizes) > 1:
        raise DataError(_several(read))


def _several(read: _Read) -> str:
    """What is wrong with images of several sizes."""
    shown = ", ".join(
        f"{width}x{height} ({count}, e.g. {read.examples[height, width]})"
        for (height, width), count in read.sizes.most_common(4)
    )
    more = f" and {len(read.sizes) - 4} more" if len(read.sizes) > 4 else ""
    count = sum(read.sizes.values())
    which = f"first {count:,} images" if count >= _LOOKED_AT else "images"
    return (
        f"data.size is null, but the {which} have {len(read.sizes)} sizes: {shown}{more}; "
        "set data.size to the side in pixels to which all are resized and cut"
    )


def _content(given: _Given, read: _Read, skipped: tuple[tuple[str, str], ...], where: str) -> Content:
    labels, classes = class_ids(read.labels, given.classes, where)
    coarse, coarse_classes = class_ids(read.coarse, given.coarse_classes, where, "coarse label")
    split: npt.NDArray[np.int8] = np.array(read.split, dtype=np.int8)
    return Content(labels, coarse, split, classes, coarse_classes, skipped, given.other_files)


def _check_space(folder: Path, needed: int, instead: str) -> None:
    """See that a disk has room, before it is full.

    Raises:
        DataError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _Full(
            f"{folder.parent}: {needed / 1e9:.3g} GB more are needed there, but {free / 1e9:.3g} GB are free; "
            f"free space, or {instead}. The same command goes on from what is decoded"
        )
