"""What a run writes into its folder besides its checkpoint: log, table and TensorBoard events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcl.files import writing
from hpcl.results import EPOCH_COLUMNS, epoch_schema, write_table

_CHARTS = {c.name: c for c in EPOCH_COLUMNS if c.type in ("float64", "int64") and c.name not in ("epoch", "arrival")}


HPARAMS = ".hparams"
"""How the name of the file with a run's searched values ends."""


class RunLog:
    """``log.txt``, ``epochs.parquet`` and tensorboardX events of one run folder."""

    def __init__(self, folder: Path, first_epoch: int, through: Path | None = None) -> None:
        """Open the files; events from `first_epoch` on replace those of an interrupted epoch.

        The table is written through a folder of :func:`hpcl.files.claim`.

        Raises:
            StorageError: the folder cannot be written.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder, self._through = folder, through
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / "log.txt", "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
            # Not its SummaryWriter: that writes in a thread of its own, which does not outlive a full disk.
            self._events = EventsWriter(str(folder / "events"), f".{first_epoch}")
            self._event(first_epoch, session_log=SessionLog(status=SessionLog.START))

    def say(self, text: str) -> None:
        """One line with the time in front."""
        with writing(self._folder):
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._file.flush()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Record the newest row; `rows` are all rows of the run so far."""
        from tensorboardX.proto.summary_pb2 import Summary

        row = rows[-1]
        self.say(describe_epoch(row))
        points = {name: row[name] for name in _CHARTS if row.get(name) is not None}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in points.items()]
        self._event(row["epoch"], summary=Summary(value=values))
        named = [{**r, "trial_id": self._folder.name} for r in rows]
        write_table(self._folder / "epochs.parquet", named, epoch_schema(), self._through)

    def _event(self, epoch: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with writing(self._folder):
            self._events.write_event(Event(wall_time=time.time(), step=epoch, **content))
            self._events.flush()

    def close(self) -> None:
        """Close the files; safe to call twice."""
        with writing(self._folder):
            self._events.close()
            self._file.close()


def write_hparams(folder: Path, values: Mapping[str, Any]) -> Path | None:
    """Write a run's searched values for TensorBoard's HPARAMS page, beside its events; None where they are there.

    Only the values: which curves are its metrics and what the others' values are, TensorBoard finds for itself, so that
    runs of different searches stand in one table.

    Raises:
        StorageError: the folder cannot be written.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import hparams

    with writing(folder):
        if any(folder.glob(f"*{HPARAMS}")):
            return None
        shown = {path: str(value) if isinstance(value, (list, tuple)) else value for path, value in values.items()}
        _, start, _ = hparams(shown, {})
        events = EventsWriter(str(folder / "events"), HPARAMS)
        events.write_event(Event(wall_time=time.time(), step=0, summary=start))
        events.close()
        return Path(events._file_name)


def describe_epoch(row: dict[str, Any]) -> str:
    """One readable line for an epoch's row."""

    def number(name: str, digits: int = 4) -> str:
        value = row.get(name)
        return "-" if value is None else f"{value:.{digits}f}"

    parts = [
        f"epoch {row['epoch']:>3}  stage {row['stage']}",
        f"loss {number('loss', 3)}",
        f"acc_inst {number('acc_inst')}",
        f"acc_proto {number('acc_proto')}",
        f"acc_proto_ref {number('acc_proto_ref')}",
        f"knn {number('knn')}",
        f"clusters {row.get('level_clusters') or '-'}",
        f"{number('seconds', 1)} s",
    ]
    if row.get("state") == "diverged":
        parts.append("DIVERGED: the loss is not finite")
    if row.get("note"):
        parts.append(row["note"])
    if row.get("growth_reason"):
        parts.append(("grows: " if row.get("grew") else "keeps: ") + row["growth_reason"])
    return "  ".join(parts)
