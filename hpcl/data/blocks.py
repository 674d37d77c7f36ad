"""Many images to pixels: a block at a time, on all cores, with a bound on what is in memory.

Legend: C channels (1 or 3), H W height and width in pixels.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from hpcl.decode import Item, Pixels, attempt, blocks

_ITEMS = 256
"""Images of a block at most."""
_ENCODED = 2**26
"""Bytes of encoded images after which a block has no more."""
_DECODED = 2**26
"""Bytes of pixels that a block may have."""
_AHEAD = 2**28
"""Bytes of pixels that all blocks in memory may have."""


@dataclass(frozen=True)
class OtherSize:
    """An image that is whole but has not the size that all must have."""

    height: int
    width: int


@dataclass(frozen=True)
class Block:
    """Some images in a row, decoded."""

    items: list[Item]
    """As they came, without their content."""
    results: list[Pixels | OtherSize | str]
    """For each: pixels (H, W) or (H, W, 3), or the reason why there are none."""

    @property
    def kept(self) -> list[Pixels]:
        """The pixels of those that have some."""
        return [result for result in self.results if isinstance(result, np.ndarray)]

    @property
    def skipped(self) -> list[tuple[int, str]]:
        """Place in the block and reason of those that are left out."""
        return [(i, result) for i, result in enumerate(self.results) if isinstance(result, str)]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoded(
    items: Iterator[Item], size: int | None, shape: tuple[int, int] | None = None
) -> Generator[Block, None, None]:
    """Decodes all images, block by block in their order, on all cores.

    Where `size` is None all images must have the height and width of the first one that can be read: pixels
    of another size are dropped at once, so that they cannot fill the memory. Until it is known a block has
    one image.

    Args:
        items: the images.
        size: side in pixels to which they are resized and cut; None keeps their size.
        shape: height and width that all must have, if that is known.
    """
    shape = (size, size) if size is not None else shape
    # Threads, not processes: Pillow decodes outside the interpreter lock, and a fork of a
    # process that already runs torch or Arrow threads may hang.
    pool = ThreadPoolExecutor(cores(), thread_name_prefix="hpcl-decode")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our bound is below Pillow's
            while shape is None:
                block = _whole(*_begun(pool, next(blocks(items, 1), []), size, None))
                if not block.items:
                    return
                shape = next((pixels.shape[:2] for pixels in block.kept), None)
                yield block
            length, ahead = _lengths(3 * shape[0] * shape[1])
            waiting: deque[tuple[list[Item], list[_Part]]] = deque()
            for some in blocks(items, length, _ENCODED):
                waiting.append(_begun(pool, some, size, shape))
                if len(waiting) > ahead:
                    yield _whole(*waiting.popleft())
            while waiting:
                yield _whole(*waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_Part = Future[list[Pixels | OtherSize | str]]


def _lengths(most: int) -> tuple[int, int]:
    """Images of a block, and blocks decoded at a time beside the one that is waited for.

    Args:
        most: bytes of an image's pixels at most.
    """
    length = max(1, min(_ITEMS, _DECODED // most))
    parts = -(-length // _part_of(length))
    return length, max(1, min(-(-2 * cores() // parts), _AHEAD // (length * most)))


def _part_of(length: int) -> int:
    """Images that a thread takes at a time."""
    return max(1, min(8, length // (2 * cores())))


def _begun(
    pool: ThreadPoolExecutor, some: list[Item], size: int | None, shape: tuple[int, int] | None
) -> tuple[list[Item], list[_Part]]:
    def several(part: list[Item]) -> list[Pixels | OtherSize | str]:
        return [_result(item, size, shape) for item in part]

    step, rest = _part_of(len(some)), iter(some)
    return some, [pool.submit(several, part) for part in iter(lambda: list(islice(rest, step)), [])]


def _whole(some: list[Item], parts: list[_Part]) -> Block:
    block = Block(some, [result for part in parts for result in part.result()])
    for item in some:
        item.content = None
    return block


def _result(item: Item, size: int | None, shape: tuple[int, int] | None) -> Pixels | OtherSize | str:
    """Pixels of one item as :func:`hpcl.decode.decode` gives them, or the reason why there are none."""
    pixels = attempt(item, size)
    if isinstance(pixels, str):
        return pixels
    return pixels if shape in (None, pixels.shape[:2]) else OtherSize(*pixels.shape[:2])
