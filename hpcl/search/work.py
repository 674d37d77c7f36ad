"""A trial's folder for the process that trains it, wherever the results lie.

Where all nodes see the results, that is the folder itself. Where they lie in a store, it is a
copy in this process's scratch folder: what an earlier process of the trial left is brought,
and each epoch is sent before its row is reported. So whatever is reported can be gone on
from, on any node.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcl.errors import StorageError, TakenOver
from hpcl.files import write_text, writing
from hpcl.results import read_rows
from hpcl.search.journal import JOURNAL_NAME
from hpcl.search.places import is_remote, location, place
from hpcl.search.storage import drop, exists, fetch, push

Row = dict[str, Any]
TABLE = "epochs.parquet"
ATTEMPT = "attempt"
"""In a store: the word of the process that trains the trial. One that was cut off, and wakes when another trains in its
place, finds there that it is to send nothing more; in a folder :func:`hpcl.files.claim` sees to that."""


def begin(given: Mapping[str, Any]) -> Path:
    """The folder of a trial, made where it is missing; of its files only those that :func:`bring` brings are there.

    Raises:
        StorageError: the results are not there, or cannot be written.
    """
    see(given)
    folder = place(given["folder"])
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def bring(given: Mapping[str, Any], attempt: str = "") -> tuple[Path, Path | None]:
    """The folder of a trial with all its files, and the checkpoint of the prefix that it goes on from.

    Args:
        given: the trial.
        attempt: a word of this process alone, which is to send the trial's files (:func:`keep`) from here on.

    Raises:
        StorageError: the store does not answer.
    """
    folder = begin(given)
    if attempt and is_remote(folder):
        write_text(folder / ATTEMPT, attempt)
        push(folder, {ATTEMPT})
    fetch(folder, deep=True)
    fork = None if given["fork"] is None else place(given["fork"])
    if fork:
        fetch(fork.parent, {fork.name})
    return folder, fork


def keep(given: Mapping[str, Any], attempt: str) -> None:
    """See to it that what was trained so far can be gone on from.

    Raises:
        StorageError: it cannot: the results are not there any more, or cannot be written.
        TakenOver: another process trains the trial since.
    """
    folder = place(given["folder"])
    if not is_remote(folder):
        see(given)
        return
    drop(folder / ATTEMPT)  # two of one second look alike
    fetch(folder, {ATTEMPT})
    if (folder / ATTEMPT).read_text() != attempt:
        raise TakenOver(f"{location(folder)}: another process trains there since; this one ends")
    push(folder, deep=True)


def set_aside(folder: Path) -> bool:
    """Rename checkpoints that cannot be read, so that the trial goes on from its prefix or the start.

    Returns:
        Whether there were any.

    Raises:
        StorageError: the results are not there any more, or cannot be written.
    """
    from hpcl.checkpoint import CHECKPOINT_NAME, previous_of

    path = folder / CHECKPOINT_NAME
    both = (path, previous_of(path))
    fetch(folder, {each.name for each in both})
    there = [each for each in both if each.exists()]
    for each in there:
        with writing(each):
            os.replace(each, each.with_stem(f"{each.stem}-damaged"))
    push(folder, deep=True)
    return bool(there)


def see(given: Mapping[str, Any]) -> None:
    """See that the search's results are there: an epoch that is saved beside them is lost.

    Raises:
        StorageError: they are not.
    """
    home = place(given["home"])
    if not exists(home / JOURNAL_NAME):
        raise StorageError(
            f"{location(home)}: is not there, seen from {platform.node()}; was its disk unmounted? Bring it back"
        )


def unreported(given: Mapping[str, Any], reported: int, epoch: int) -> list[Row]:
    """Rows of epochs that a trial trained and saved, but of which the search knows nothing.

    The driver's machine may have been lost with the rows of the last moment; a run that goes on
    repeats only its last row.

    Args:
        given: the trial.
        reported: epochs that this process has reported.
        epoch: of the row that is reported now.
    """
    known = max(reported, given["epochs"])
    if epoch <= known + 1:
        return []
    folder = place(given["folder"])
    fetch(folder, {TABLE})
    try:
        rows = read_rows(folder / TABLE)
    except (OSError, ValueError):  # a trainer that writes none
        return []
    kept = ("trial_id", "arrival", "clock")
    return [{name: row[name] for name in row if name not in kept} for row in rows if known < row["epoch"] < epoch]
