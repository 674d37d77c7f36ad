"""Arrays that lie in a file and are read from it row by row, so that a set of any size takes no memory.

Legend: N images, C channels (1 or 3), H W height and width in pixels.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpcl.decode import Pixels

_CHUNK = 2**20


class Unreadable(Exception):
    """A file that is not read; the text goes on after its name: "is cut off", "asks for os.system, ..."."""


@dataclass(frozen=True)
class Span:
    """A long string that is left in its file."""

    path: Path
    start: int
    length: int
    """Bytes in the file."""
    encoding: str
    """bytes, latin-1 or utf-8 for text as it is; "both" for bytes kept as text: UTF-8 of latin-1."""

    def as_latin1(self) -> Span:
        """The text's bytes in latin-1."""
        return replace(self, encoding="both")

    def chunks(self) -> Iterator[bytes]:
        """The bytes, some at a time.

        Raises:
            Unreadable: the file has changed, or the text is no bytes.
        """
        text = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.length
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise Unreadable("became shorter while it was read")
                left -= len(chunk)
                try:
                    yield text.decode(chunk, final=not left).encode("latin-1") if self.encoding == "both" else chunk
                except UnicodeError as error:
                    raise Unreadable(f"has an array whose data are no bytes ({error})") from error


class Array:
    """An array of numbers or texts; :meth:`fill` says what it is."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype: np.dtype[Any] = np.dtype("u1")
        self._fortran = False
        self._data: bytes | Span | None = None

    def fill(self, data: bytes | Span, dtype: np.dtype[Any], shape: Any, fortran: bool) -> None:
        """Sets shape and data, once.

        Raises:
            Unreadable: the data are not as long as the shape says.
        """
        if self._data is not None:
            raise Unreadable("fills an array twice")
        if type(shape) is not tuple or any(type(side) is not int or side < 0 for side in shape) or len(shape) > 8:
            raise Unreadable("has an array without shape")
        wanted = math.prod(shape) * dtype.itemsize
        held = len(data) if isinstance(data, bytes) else data.length
        text = isinstance(data, Span) and data.encoding == "both"  # one or two bytes of UTF-8 for each
        if not (wanted <= held <= 2 * wanted if text else held == wanted):
            raise Unreadable(f"has an array of shape {shape}, {wanted:,} bytes, but {held:,} bytes of data for it")
        self.shape, self.dtype, self._fortran, self._data = shape, dtype, fortran, data

    def rows(self) -> Iterator[np.ndarray[Any, Any]]:
        """Each of the first axis in turn.

        Raises:
            Unreadable: the data end early.
        """
        if self._fortran or not isinstance(self._data, Span):
            yield from self.load()
            return
        shape, length = self.shape[1:], math.prod(self.shape[1:]) * self.dtype.itemsize
        held, count = bytearray(), 0
        for chunk in self._data.chunks():
            held += chunk
            whole = len(held) // length if length else 0
            for i in range(whole):
                yield np.frombuffer(bytes(held[i * length : (i + 1) * length]), self.dtype).reshape(shape)
            count += whole
            del held[: whole * length]
        if count != self.shape[0] or held:
            raise Unreadable(f"has an array of {self.shape[0]:,} rows, but data for {count:,}")

    def load(self) -> np.ndarray[Any, Any]:
        """The whole array, which takes as much memory as its file.

        Raises:
            Unreadable: the data end early, or nothing was filled in.
        """
        if self._data is None:
            raise Unreadable("has an array without data")
        data = self._data if isinstance(self._data, bytes) else b"".join(self._data.chunks())
        try:
            flat = np.frombuffer(data, self.dtype)
            return flat.reshape(self.shape, order="F" if self._fortran else "C")
        except ValueError as error:
            raise Unreadable(f"has an array of shape {self.shape}, which its data do not fill") from error


def image_layout(shape: tuple[int, ...]) -> str | None:
    """How images lie in an array: NHW, NHWC or NCHW (C of 1 or 3), or None if it holds none.

    >>> image_layout((9, 84, 84, 3)), image_layout((9, 1, 28, 28)), image_layout((9, 28, 28)), image_layout((9, 2))
    ('NHWC', 'NCHW', 'NHW', None)
    """
    if len(shape) == 3:
        return "NHW"
    if len(shape) == 4 and shape[3] in (1, 3):
        return "NHWC"
    return "NCHW" if len(shape) == 4 and shape[1] in (1, 3) else None


def as_image(row: Pixels, layout: str) -> Pixels:
    """One row of an array as (H, W) or (H, W, 3)."""
    if layout == "NCHW":
        row = row.transpose(1, 2, 0)
    if layout != "NHW" and row.shape[2] == 1:
        row = row[:, :, 0]
    return np.ascontiguousarray(row)
