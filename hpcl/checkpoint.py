"""Checkpoints: everything a run needs to go on as if it had never stopped.

One file, ``checkpoint.pt``, replaced atomically after the growth decision of every
epoch. It holds tensors and plain values only and is read with
``weights_only=True``, so that loading one runs no code.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.results import atomic_path
from hpcl.validation import validation_problems

CHECKPOINT_NAME = "checkpoint.pt"
FORMAT = 1
"""Raised when the content changes so that older files no longer fit."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a run's state atomically: a crash leaves the previous file as it was."""
    save_tensors(path, {"format": FORMAT, **state})


def save_tensors(path: Path, value: Any) -> None:
    """``torch.save``, atomically.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    content = io.BytesIO()  # torch's own writer raises a RuntimeError where the disk is full
    torch.save(value, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file, on the CPU.

    Raises:
        UserError: there is no such file, or it is not a checkpoint of this project.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the {CHECKPOINT_NAME} of a run or trial folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not one of its own
        raise UserError(
            f"{path}: not a readable checkpoint (another kind of file, or damaged); "
            f"give the {CHECKPOINT_NAME} of a run or trial folder, or another folder"
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path}: not a checkpoint of hpcl; give the {CHECKPOINT_NAME} of a run or trial folder")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: written in format {state['format']}, this version reads format {FORMAT}")
    return state


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
