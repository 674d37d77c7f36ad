"""What tests of training runs share: the tiny run's facts, processes of their own, rows and events to compare."""

from __future__ import annotations

import multiprocessing
import struct
from pathlib import Path
from typing import Any

from hpcl.results import TIME_COLUMNS

NUM_IMAGES = 405
"""Training images of the tiny run: a tenth of what two held-out tenths leave of 5,000."""

FORKS = multiprocessing.get_context("forkserver")
# What every run imports; torch._dynamo comes with the first optimizer and takes longest.
FORKS.set_forkserver_preload(["hpcl.trainer", "tensorboardX", "faiss", "torch.distributed", "torch._dynamo"])


def state(epochs: int, **more: Any) -> dict[str, Any]:
    """The least that a run's checkpoint after so many epochs holds."""
    rows = [{"epoch": epoch, "world_size": 1} for epoch in range(1, epochs + 1)]
    data = {"source": "none", "hash": "none", "shape": [1, 8, 8]}
    return {"config": {}, "backbone": None, "data": data, "pair": {}, "rows": rows, **more}


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the columns that differ between two runs of one seed."""
    return [{name: value for name, value in row.items() if name not in TIME_COLUMNS} for row in rows]


def run_in_process(target: Any, *arguments: Any) -> int:
    """Exit code of a function run in a process of its own."""
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(200)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def hparams(folder: Path) -> dict[str, Any]:
    """A run's searched values as TensorBoard's HPARAMS page reads them."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    (path,) = folder.glob("events.out.tfevents.*.hparams")
    content = path.read_bytes()
    found: dict[str, Any] = {}
    while content:
        (length,) = struct.unpack_from("Q", content)
        for value in Event.FromString(content[12 : 12 + length]).summary.value:
            assert value.tag == "_hparams_/session_start_info"
            data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
            for name, each in data.session_start_info.hparams.items():
                found[name] = getattr(each, str(each.WhichOneof("kind")))
        content = content[16 + length :]
    return found


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(epoch, value) of one chart as TensorBoard shows it: a file's first step takes back what older files have."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    points: list[tuple[int, float]] = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack_from("Q", content)
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point[0] < event.step]
            points += [(event.step, value.simple_value) for value in event.summary.value if value.tag == name]
    return points
