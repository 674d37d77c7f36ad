"""A trial's folder for the process that trains it, wherever the results lie.

Where all nodes see the results, that is the folder itself. Where they lie in a store, it is a
copy in this process's scratch folder: what an earlier process of the trial left is brought,
and each epoch is sent before its row is reported. So whatever is reported can be gone on
from, on any node.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcl.errors import StorageError
from hpcl.results import read_rows, writing
from hpcl.search.journal import JOURNAL_NAME
from hpcl.search.places import is_remote, location, place
from hpcl.search.storage import exists, fetch, push

Row = dict[str, Any]
TABLE = "epochs.parquet"


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


def bring(given: Mapping[str, Any]) -> tuple[Path, Path | None]:
    """The folder of a trial with all its files, and the checkpoint of the prefix that it goes on from.

    Raises:
        StorageError: the store does not answer.
    """
    folder = begin(given)
    fetch(folder, deep=True)
    fork = None if given["fork"] is None else place(given["fork"])
    if fork:
        fetch(fork.parent, {fork.name})
    return folder, fork


def keep(given: Mapping[str, Any]) -> None:
    """See to it that what was trained so far can be gone on from.

    Raises:
        StorageError: it cannot: the results are not there any more, or cannot be written.
    """
    folder = place(given["folder"])
    if is_remote(folder):
        push(folder, deep=True)
    else:
        see(given)


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
