"""Where trained prefixes lie: ``results/prefixes/<key>/``, for all searches that need them.

The key says everything that a prefix depends on (:func:`hpcl.prefix.prefix_key`), so a
folder of that name is the right one whoever trained it. A prefix is trained in a working
folder of its search's own and gets its name by one rename when it is complete: a reader
never sees a part, a crash leaves the working folder to go on from, and of two searches
that train the same one the first to end gives it its name. In a store, where nothing can be
renamed at once, the table is copied last and says that the rest is there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcl.files import writing
from hpcl.results import epoch_schema, read_rows, write_table
from hpcl.search.places import is_remote
from hpcl.search.storage import copy, exists, fetch, push, remove

CHECKPOINT = "checkpoint.pt"
TABLE = "prefix.parquet"
"""The epochs' rows, with the columns of ``epochs.parquet``."""
ASK_EVERY = 3.0
"""Seconds between two questions to a store whether another search has trained a prefix."""


class PrefixStore:
    """The prefixes of a results folder.

    Args:
        root: ``results/prefixes``.
        owner: name of the search, for its working folders.
    """

    def __init__(self, root: Path, owner: str) -> None:
        self._root, self._owner = root, owner
        self._asked: dict[str, float] = {}
        """Key -> when a store was asked for it last."""

    def checkpoint(self, key: str) -> Path:
        """The checkpoint that trials go on from."""
        return self._root / key / CHECKPOINT

    def work(self, key: str) -> Path:
        """The folder in which this search trains it."""
        return self._root / f".{key}-{self._owner}"

    def rows(self, key: str, last_epoch: int) -> list[dict[str, Any]] | None:
        """Its epochs' rows; None where it is not there, or not up to this epoch."""
        if is_remote(self._root):
            if time.monotonic() - self._asked.get(key, -ASK_EVERY) < ASK_EVERY:
                return None
            self._asked[key] = time.monotonic()
            fetch(self._root / key, {TABLE})
        if not exists(self.checkpoint(key)):
            return None
        try:
            rows = read_rows(self._root / key / TABLE, epoch_schema())
        except (OSError, ValueError):  # none there, or none that can be read
            return None
        return rows if rows and rows[-1]["epoch"] == last_epoch else None

    def publish(self, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Give the complete working folder its name, unless another search was first."""
        work = self.work(key)
        write_table(work / TABLE, rows, epoch_schema())
        if is_remote(work):
            copy(work / CHECKPOINT, self.checkpoint(key))
            (self._root / key).mkdir(exist_ok=True)
            shutil.move(work / TABLE, self._root / key / TABLE)
            push(self._root / key, {TABLE})
            remove(work)
            self._asked.pop(key, None)
            return
        with writing(work):
            if self.rows(key, rows[-1]["epoch"]) is not None:
                shutil.rmtree(work, ignore_errors=True)
                return
            # What lies there and is not complete was made by hand, or copied in part.
            shutil.rmtree(self._root / key, ignore_errors=True)
            try:
                work.rename(self._root / key)
            except OSError:
                if self.rows(key, rows[-1]["epoch"]) is None:
                    raise
                shutil.rmtree(work, ignore_errors=True)
