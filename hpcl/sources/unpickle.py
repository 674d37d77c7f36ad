"""Pickles of numbers, texts, lists, dictionaries and numpy arrays, read without running anything.

Python's own unpickler calls what a pickle asks for, and reserves memory as large as a pickle says.
This one knows the operations that such data need and refuses all others by name. Long byte strings, so
the pixels of arrays, stay in the file until they are asked for, row by row. What is built in memory is bounded
by the file's length and by :data:`MOST_OPERATIONS`. Pickles of Python 2 are read as latin-1.

The operations are those of the standard library's `pickletools`.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from pickletools import opcodes
from typing import Any, BinaryIO

import numpy as np

from hpcl.sources.stored import Array, Span, Unreadable

MOST_OPERATIONS = 3_000_000
"""Steps of a pickle, at most: each makes an object of 100 bytes or so. A label takes one to three."""
_KEPT = 2**16
"""Bytes of a string from which on it stays in the file."""
_MOST_DIGITS = 1000
_SPARE = 2**20
"""Bytes that may be decoded beyond the file's length."""

_MARK = object()
_MODULES = {
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
    "__builtin__": "builtins",
}
_GLOBALS = {
    "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar", "numpy.core.numeric._frombuffer",
    "numpy.ndarray", "numpy.dtype", "_codecs.encode", "builtins.bytes",
}  # fmt: skip


class _Global:
    """A name that a pickle asks for; never the thing itself."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Type:
    """A dtype while it is built."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype


def load(path: Path) -> Any:
    """What a pickle holds; arrays as :class:`hpcl.sources.stored.Array`, long texts as `Span`.

    Raises:
        Unreadable: it is cut off, damaged, or asks for anything but plain data; says what.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        try:
            return _Machine(path, file).run()
        except (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError, MemoryError) as error:
            raise Unreadable(f"is no whole pickle ({type(error).__name__}: {str(error)[:100]})") from error


class _Machine:
    """The stack machine of a pickle, see `pickletools`."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self._budget = self._size + _SPARE
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MOST_OPERATIONS):
            code = self._file.read(1)
            if code == b".":
                (value,) = self._stack
                return value
            if not code:
                raise Unreadable("is cut off")
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise Unreadable(self._refusal(code))
            operation(self)
        raise Unreadable(f"takes more than {MOST_OPERATIONS:,} steps; this is no set of images")

    def _refusal(self, code: bytes) -> str:
        known = next((each for each in opcodes if each.code == code.decode("latin-1")), None)
        if known is None:
            return f"is no pickle (byte {code.hex()} at {self._file.tell() - 1})"
        if known.name == "INST":
            return self._asked(f"{self._line()}.{self._line()}")
        return f"uses {known.name}, which plain data do not need; it is not read, as it may run code"

    @staticmethod
    def _asked(name: str) -> str:
        return f"asks for {name[:200]}, but only plain data and numpy arrays are read; it may run code"

    # --- reading ---

    def _read(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise Unreadable(f"is cut off: {count:,} bytes are announced that it has not")
        return self._file.read(count)

    def _number(self, form: str) -> int:
        value: int = struct.unpack(form, self._read(struct.calcsize(form)))[0]
        return value

    def _line(self, most: int = _MOST_DIGITS) -> str:
        line = self._file.readline(most)
        if not line.endswith(b"\n"):
            raise Unreadable("is cut off, or has a line that is too long")
        return line[:-1].decode("latin-1").rstrip("\r")

    def _spend(self, count: int) -> None:
        """Count bytes that are made from others: one string may be asked for again and again."""
        self._budget -= count
        if self._budget < 0:
            raise Unreadable("would take more memory than it has bytes; this is no set of images")

    def _string(self, form: str, encoding: str) -> None:
        """Pushes a counted string: bytes, latin-1 or UTF-8 text, or a `Span` where it is long."""
        count = self._number(form)
        if count < 0:
            raise Unreadable("has a string of negative length")
        if count >= _KEPT:
            start = self._file.tell()
            if count > self._size - start:
                raise Unreadable(f"is cut off: {count:,} bytes are announced that it has not")
            self._file.seek(count, io.SEEK_CUR)
            self._stack.append(Span(self._path, start, count, encoding))
        else:
            content = self._read(count)
            self._stack.append(content if encoding == "bytes" else content.decode(encoding, "surrogatepass"))

    # --- the stack ---

    def _items(self) -> list[Any]:
        """What lies above the last mark."""
        at = len(self._stack) - 1
        while at >= 0 and self._stack[at] is not _MARK:
            at -= 1
        if at < 0:
            raise Unreadable("is damaged: a mark is missing")
        found = self._stack[at + 1 :]
        del self._stack[at:]
        return found

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise Unreadable("is damaged: a value is missing")
        found = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return found

    def _put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _get(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise Unreadable("appends to what is no list")
        target += values

    def _set(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(values) % 2:
            raise Unreadable("sets an item of what is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, bytes, int):  # the hash of a tuple in tuples takes for ever
                raise Unreadable(f"has a {type(key).__name__} as a key, but keys must be texts or numbers")
            target[key] = value

    def _dictionary(self) -> None:
        values = self._items()
        self._stack.append({})
        self._set(values)

    # --- what is called ---

    def _global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Unreadable("asks for something without a name")
        full = f"{_MODULES.get(module, module)}.{name}"
        if full not in _GLOBALS:
            raise Unreadable(self._asked(f"{module}.{name}"))
        self._stack.append(_Global(full))

    def _reduce(self) -> None:
        called, values = self._pop(2)
        if type(called) is not _Global or type(values) is not tuple:
            raise Unreadable(f"calls a {type(called).__name__}; it is not read, as it may run code")
        self._stack.append(_CALLS[called.name](self, *values) if called.name in _CALLS else self._no_call(called.name))

    def _no_call(self, name: str) -> Any:
        raise Unreadable(self._asked(f"a call of {name}"))

    def _encode(self, text: Any, encoding: Any = "latin1") -> bytes | Span:
        if encoding not in ("latin1", "latin-1"):
            raise Unreadable(f"asks for _codecs.encode to {str(encoding)[:50]!r}, but only latin1 is read")
        if type(text) is Span and text.encoding == "utf-8":
            return text.as_latin1()
        if type(text) is not str:
            raise Unreadable(f"encodes a {type(text).__name__}")
        self._spend(len(text))
        return text.encode("latin-1")

    def _no_bytes(self) -> bytes:
        return b""  # protocols below 3 know no bytes: these are the empty ones, others a call of encode

    def _reconstruct(self, kind: Any, shape: Any, code: Any) -> Array:
        if type(kind) is not _Global or kind.name != "numpy.ndarray":
            raise Unreadable("builds an array of another class than numpy.ndarray")
        return Array()  # its shape here is always (0,); the true one comes with its data

    def _dtype(self, code: Any, align: Any = False, copy: Any = True) -> _Type:
        if type(code) is bytes:
            code = code.decode("latin-1")
        if type(code) is not str or not re.fullmatch(r"[<>|=]?([biuf][1248]|b1|[SU][1-9]\d{0,2})", code):
            what = "arrays of Python objects may run code" if str(code).strip("<>|=").startswith("O") else "not read"
            raise Unreadable(f"has an array of dtype {str(code)[:50]!r}: {what}")
        return _Type(np.dtype(code))

    def _frombuffer(self, data: Any, dtype: Any, shape: Any, order: Any) -> Array:
        if type(dtype) is not _Type:
            raise Unreadable("has an array without dtype")
        array = Array()
        array.fill(self._data(data), dtype.dtype, shape, order == "F")
        return array

    def _scalar(self, dtype: Any, data: Any) -> Any:
        data = self._data(data)
        if type(dtype) is not _Type or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
            raise Unreadable("has a number that is none")
        return np.frombuffer(data, dtype.dtype, 1)[0].item()

    def _data(self, data: Any) -> bytes | Span:
        """The bytes of an array; texts are Python 2's."""
        if type(data) is Span:
            return data.as_latin1() if data.encoding == "utf-8" else data
        if type(data) is list:
            raise Unreadable("has an array of Python objects, which may run code; store numbers and texts as such")
        if type(data) is str:
            self._spend(len(data))
            return data.encode("latin-1")
        if type(data) is not bytes:
            raise Unreadable(f"has an array whose data are a {type(data).__name__}")
        return data

    def _build(self) -> None:
        target, state = self._pop(2)
        if type(target) is Array and type(state) is tuple and len(state) == 5:
            _, shape, dtype, fortran, data = state
            if type(dtype) is not _Type:
                raise Unreadable("has an array without dtype")
            target.fill(self._data(data), dtype.dtype, shape, bool(fortran))
        elif type(target) is _Type and type(state) is tuple and len(state) >= 5:
            order, plain = state[1], state[2:5] == (None, None, None)
            if not plain or order not in ("<", ">", "|", "=", b"<", b">", b"|", b"="):
                raise Unreadable("has an array of a compound dtype, which is not read")
            if order in (">", b">"):
                target.dtype = target.dtype.newbyteorder(">")
        else:
            raise Unreadable(f"sets the state of a {type(target).__name__}; it is not read, as it may run code")
        self._stack.append(target)

    # --- numbers and texts as lines (protocol 0) ---

    def _int_line(self) -> None:
        text = self._line()
        self._stack.append({"00": False, "01": True}[text] if text in ("00", "01") else int(text))

    def _text_line(self) -> None:
        text = self._line(self._size + 1)
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
            raise Unreadable("has a text without quotes")
        content: bytes = codecs.escape_decode(text[1:-1].encode("latin-1"))[0]
        self._stack.append(content.decode("latin-1"))

    def _unicode_line(self) -> None:
        line = self._line(self._size + 1)
        self._stack.append(line.encode("latin-1").decode("raw-unicode-escape"))

    def _long(self, count: int) -> None:
        if not 0 <= count <= _MOST_DIGITS:
            raise Unreadable("has a number of too many digits")
        self._stack.append(int.from_bytes(self._read(count), "little", signed=True))


_CALLS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _Machine._encode,
    "builtins.bytes": _Machine._no_bytes,
    "numpy.core.multiarray._reconstruct": _Machine._reconstruct,
    "numpy.core.multiarray.scalar": _Machine._scalar,
    "numpy.core.numeric._frombuffer": _Machine._frombuffer,
    "numpy.dtype": _Machine._dtype,
}


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda m: m._stack.append(make(m))


_OPERATIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m._read(1),  # PROTO
    b"\x95": lambda m: m._read(8),  # FRAME: lengths of what follows are checked one by one
    b"(": _push(lambda m: _MARK),
    b"N": _push(lambda m: None),
    b"\x88": _push(lambda m: True),
    b"\x89": _push(lambda m: False),
    b"K": _push(lambda m: m._number("<B")),
    b"M": _push(lambda m: m._number("<H")),
    b"J": _push(lambda m: m._number("<i")),
    b"\x8a": lambda m: m._long(m._number("<B")),
    b"\x8b": lambda m: m._long(m._number("<i")),
    b"I": _Machine._int_line,
    b"L": _push(lambda m: int(m._line().rstrip("L"))),
    b"F": _push(lambda m: float(m._line())),
    b"G": _push(lambda m: struct.unpack(">d", m._read(8))[0]),
    b"S": _Machine._text_line,
    b"V": _Machine._unicode_line,
    b"T": lambda m: m._string("<i", "latin-1"),
    b"U": lambda m: m._string("<B", "latin-1"),
    b"X": lambda m: m._string("<I", "utf-8"),
    b"\x8c": lambda m: m._string("<B", "utf-8"),
    b"\x8d": lambda m: m._string("<Q", "utf-8"),
    b"B": lambda m: m._string("<I", "bytes"),
    b"C": lambda m: m._string("<B", "bytes"),
    b"\x8e": lambda m: m._string("<Q", "bytes"),
    b"\x96": lambda m: m._string("<Q", "bytes"),  # BYTEARRAY8
    b"]": _push(lambda m: []),
    b"}": _push(lambda m: {}),
    b")": _push(lambda m: ()),
    b"l": _push(lambda m: m._items()),
    b"t": _push(lambda m: tuple(m._items())),
    b"\x85": _push(lambda m: tuple(m._pop(1))),
    b"\x86": _push(lambda m: tuple(m._pop(2))),
    b"\x87": _push(lambda m: tuple(m._pop(3))),
    b"d": _Machine._dictionary,
    b"a": lambda m: m._append(m._pop(1)),
    b"e": lambda m: m._append(m._items()),
    b"s": lambda m: m._set(m._pop(2)),
    b"u": lambda m: m._set(m._items()),
    b"p": lambda m: m._put(int(m._line())),
    b"q": lambda m: m._put(m._number("<B")),
    b"r": lambda m: m._put(m._number("<I")),
    b"\x94": lambda m: m._put(len(m._memo)),
    b"g": lambda m: m._get(int(m._line())),
    b"h": lambda m: m._get(m._number("<B")),
    b"j": lambda m: m._get(m._number("<I")),
    b"c": lambda m: m._global(m._line(), m._line()),
    b"\x93": lambda m: m._global(*m._pop(2)),
    b"R": _Machine._reduce,
    b"b": _Machine._build,
}
"""Operations by their byte, as `pickletools` names them."""
