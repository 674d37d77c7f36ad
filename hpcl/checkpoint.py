"""Checkpoints: everything a run needs to go on as if it had never stopped.

``checkpoint.pt`` is replaced atomically after the growth decision of every epoch, and
the one before stays beside it as ``checkpoint-previous.pt`` until the run ends: a file
that broke afterwards (cut off, or with bytes that flipped) is found out when it is read,
and costs one epoch. Both hold tensors and plain values only and are read with
``weights_only=True``, so that loading one runs no code.
"""

from __future__ import annotations

import errno
import io
import os
import pickletools
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from hpcl.config import Config
from hpcl.errors import StorageError, UnreadableCheckpoint, UserError
from hpcl.files import atomic_path
from hpcl.validation import validation_problems

CHECKPOINT_NAME = "checkpoint.pt"
_NAMES = ("torch._utils _rebuild_tensor_v2", "collections OrderedDict")
"""What a checkpoint's pickle names, besides the storages of tensors."""
FORMAT = 1
"""Raised when the content changes so that older files no longer fit."""


def previous_of(path: Path) -> Path:
    """Where :func:`save_checkpoint` keeps the checkpoint before `path`: ``<stem>-previous<suffix>`` beside it."""
    return path.with_stem(f"{path.stem}-previous")


def save_checkpoint(path: Path, state: dict[str, Any], through: Path | None = None) -> None:
    """Write a run's state; the file that was there stays beside it as :func:`previous_of`.

    A crash at any moment leaves a whole file under `path`. One that fails leaves it as it was.

    Args:
        path: the file.
        state: tensors and plain values.
        through: this process's folder of :func:`hpcl.files.claim`, so that it writes no more when another
            process goes on with the run.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
        TakenOver: another process has claimed the folder since.
    """
    _write(path, {"format": FORMAT, **state}, keep=previous_of(path), through=through)


def save_tensors(path: Path, value: Any) -> None:
    """``torch.save``, atomically.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    _write(path, value)


def _write(path: Path, value: Any, keep: Path | None = None, through: Path | None = None) -> None:
    content = io.BytesIO()  # torch's own writer raises a RuntimeError where the disk is full
    torch.save(value, content)
    with atomic_path(path, through) as temporary:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():  # the new one is on the disk now
            second = temporary.with_suffix(".kept.tmp")
            try:
                os.link(path, second)
            except FileNotFoundError:
                raise
            except OSError:  # no hard links here
                shutil.copyfile(path, second)
            os.replace(second, keep)
            second.unlink(missing_ok=True)  # where both were names of one file


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file, on the CPU.

    Raises:
        UnreadableCheckpoint: it is damaged, or no checkpoint.
        StorageError: its disk does not answer, or this user may not read it.
        UserError: there is no such file, or another version wrote it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the {CHECKPOINT_NAME} of a run or trial folder")
    try:
        _verify(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # many kinds, for a file that is damaged or not one of torch's
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # that one, too, comes of damage
            raise StorageError(
                f"{path}: cannot be read ({error}); see that its disk is there, and that this user may read it"
            ) from error
        raise UnreadableCheckpoint(
            f"{path}: not a readable checkpoint (another kind of file, or damaged); "
            f"give the {CHECKPOINT_NAME} of a run or trial folder, or another folder"
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path}: not a checkpoint of hpcl; give the {CHECKPOINT_NAME} of a run or trial folder")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: written in format {state['format']}, this version reads format {FORMAT}")
    if lacks := _lacks(state):
        raise UnreadableCheckpoint(
            f"{path}: not a readable checkpoint ({lacks}); give the {CHECKPOINT_NAME} of a run or trial folder"
        ) from ValueError(lacks)
    return state


def foreign(where: Path | str, holds: str) -> UnreadableCheckpoint:
    """The error for a checkpoint whose content, `holds`, is none that a run writes."""
    return UnreadableCheckpoint(
        f"{where}: holds {holds}, which no run writes; give the {CHECKPOINT_NAME} of a run or trial folder"
    )


def _lacks(state: dict[str, Any]) -> str | None:
    """What of a run's state is missing or of another kind; None where all is there that every reader uses."""
    data, rows, pair = state.get("data"), state.get("rows"), state.get("pair")
    shape = data.get("shape") if isinstance(data, dict) else None
    checks = {
        "config": isinstance(state.get("config"), dict),
        "backbone": isinstance(state.get("backbone", 0), str | None),
        "data": isinstance(data, dict) and all(isinstance(data.get(name), str) for name in ("source", "hash")),
        "data.shape": isinstance(shape, list) and len(shape) == 3 and all(isinstance(n, int) and n > 0 for n in shape),
        "pair": isinstance(pair, dict)
        and all(isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in pair.items()),
        "rows": isinstance(rows, list) and bool(rows) and all(_is_row(row) for row in rows),
    }
    wrong = [name for name, holds in checks.items() if not holds]
    return f"{', '.join(wrong)}: not what a run writes" if wrong else None


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(name), int) for name in ("epoch", "world_size"))


def _verify(path: Path) -> None:
    """Compare a file of ``torch.save`` with the checksums in it, which ``torch.load`` passes over.

    Raises:
        Exception: of some kind, where a byte differs in what is read of it.
    """
    with zipfile.ZipFile(path) as file:
        members = file.infolist()
        # Never compressed: what claims to hold more than the file is no checkpoint, and may be more than memory holds.
        if sum(member.file_size for member in members) > path.stat().st_size or any(m.external_attr for m in members):
            raise zipfile.BadZipFile("not as torch.save writes it")
        if damaged := file.testzip():
            raise zipfile.BadZipFile(f"{damaged} differs from its checksum")
        for member in members:
            if member.filename.endswith("/data.pkl"):
                _verify_names(file.read(member))


def _verify_names(content: bytes) -> None:
    """See that a pickle names nothing but tensors and dictionaries: `bytearray`, which torch lets through, may take
    any amount of memory.

    Raises:
        ValueError: it does.
    """
    for code, named, _ in pickletools.genops(content):
        if code.name == "GLOBAL":
            if named not in _NAMES and not re.fullmatch(r"torch [A-Z][A-Za-z0-9]*Storage", str(named)):
                raise ValueError(f"names {named}")
        elif code.name in ("STACK_GLOBAL", "INST"):
            raise ValueError(f"has a {code.name}")


def config_of(state: dict[str, Any]) -> Config:
    """The configuration a checkpoint was trained with.

    Raises:
        UserError: this version has other fields or bounds.
    """
    try:
        return Config.model_validate(state["config"])
    except ValidationError as error:
        problems = validation_problems(error, Config)
        raise UserError(*(f"the checkpoint's configuration: {problem.text}" for problem in problems)) from error


def differing_fields(ours: Config, theirs: Config) -> list[str]:
    """Dotted paths at which two configurations differ, those under ``runtime`` aside."""

    def walk(a: Any, b: Any, path: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [p for name in a for p in walk(a[name], b[name], f"{path}.{name}" if path else name)]
        return [] if a == b else [path]

    return walk(ours.model_dump(exclude={"runtime"}), theirs.model_dump(exclude={"runtime"}), "")
