"""One run of methods.py in a process of its own: trains what a folder's config.yaml says, and measures what came of it.

    python benchmarks/method_run.py FOLDER [--untrained]

Writes `measured.json`, whose keys are those of :class:`Measured`. Called again it goes on where it was; the CPU seconds
of an epoch that was cut short are lost. Memory is noted at the end of training, before anything is evaluated.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import hpcl
from hpcl.checkpoint import CHECKPOINT_NAME
from hpcl.config import Config
from hpcl.data import ImageSet, load
from hpcl.dist import current_world
from hpcl.downstream import tasks
from hpcl.downstream.bench import Bench
from hpcl.errors import UserError
from hpcl.files import read_object, write_text
from hpcl.model import build_network
from hpcl.pretrained import load_network
from hpcl.trainer import fit
from hpcl.yamlio import load as load_yaml

CONFIG, COSTS, MEASURED = "config.yaml", "costs.json", "measured.json"
TASKS = ("knn", "linear", "fewshot")


@dataclass
class Measured:
    """What one run cost and came to."""

    seed: int
    state: str = "untrained"
    """`finished`, `diverged`, or `untrained`."""
    epochs: int = 0
    cpu: float = 0.0
    """CPU seconds of :func:`hpcl.trainer.fit`, all threads."""
    wall: float = 0.0
    """Seconds of all epochs."""
    wall_cluster: float = 0.0
    """Of these: feature passes and clustering."""
    wall_meters: float = 0.0
    """Of these: meters, which no method needs."""
    memory: float | None = None
    """Peak of the process's resident memory in MB up to the end of training, mapped images included.

    None: the system does not say."""
    memory_before: float | None = None
    """Resident memory in MB before training: the libraries."""
    gpu_memory: float | None = None
    """Peak of torch's allocations on the GPU in MB; None without one."""
    effective_rank: float | None = None
    """Of the embeddings of the fixed views after the last epoch, 1 to D; 1 is collapse."""
    load: float = 0.0
    """Load average of the machine (one minute) at the end of training."""
    threads: int = 0
    device: str = "cpu"
    version: str = hpcl.__version__
    scores: list[dict[str, Any]] = field(default_factory=list)
    """Of the tasks on test images, each with task, setting, value and count."""


def train(config: Config, folder: Path) -> Measured:
    """Train to the end, and what that cost."""
    file = folder / COSTS
    known: dict[str, Any] = read_object(file) if file.exists() else {"epoch": 0, "cpu": 0.0, "memory": 0.0}
    known.setdefault("before", resident("VmRSS"))
    started = time.process_time()

    def note(row: dict[str, Any]) -> None:
        nonlocal started
        now = time.process_time()
        if row["epoch"] > known["epoch"]:
            known.update(epoch=row["epoch"], cpu=known["cpu"] + now - started)
            known["memory"] = max(known["memory"], resident("VmHWM") or 0.0)
            write_text(file, json.dumps(known))
        started = now

    rows = fit(config, folder, report=note, objective=None).rows
    on_gpu = current_world(config.runtime.device).device.type == "cuda"
    return Measured(
        seed=config.seed,
        state=rows[-1]["state"],
        epochs=len(rows),
        cpu=known["cpu"],
        wall=sum(row["seconds"] for row in rows),
        wall_cluster=sum(row["seconds_cluster"] for row in rows),
        wall_meters=sum(row["seconds_meters"] for row in rows),
        memory=known["memory"] or None,
        memory_before=known["before"],
        gpu_memory=torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
        effective_rank=rows[-1].get("effective_rank"),
        load=os.getloadavg()[0],
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
    )


def resident(which: str) -> float | None:
    """Resident memory of this process in MB, `VmRSS` now or `VmHWM` at its peak; None where the system does not say.

    Not `ru_maxrss`, which begins with what the process that started this one held.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{which}:")), None)


def bench_of(config: Config, images: ImageSet, folder: Path | None) -> Bench:
    """A bench on test images: of the run in a folder, or of a network that has not been trained."""
    world = current_world(config.runtime.device)
    if folder is not None:
        _, network, _ = load_network(folder / CHECKPOINT_NAME)
    else:
        channels, height, width = images.images.shape[1:]
        network = build_network(config.model, config.head, channels, config.seed, None, (height, width)).eval()
    return Bench(config, network.to(world.device), images, world, split="test")


def scores_of(bench: Bench, seed: int) -> list[dict[str, Any]]:
    """The tasks' scores of the bench's network; those that the images do not serve are left out."""
    found = []
    for name in TASKS:
        if tasks.refusal(name, bench) is None:
            for score in tasks.run(name, bench, ("trained",), seed):
                found.append({key: getattr(score, key) for key in ("task", "setting", "value", "count")})
    return found


def main(arguments: list[str]) -> int:
    """Train, evaluate, write; 2 for a mistake of the user."""
    folder, untrained = Path(arguments[0]), "--untrained" in arguments
    try:
        config = load_yaml(Config, folder / CONFIG)
        measured = Measured(seed=config.seed) if untrained else train(config, folder)
        if measured.state != "diverged":
            bench = bench_of(config, load(config.data), None if untrained else folder)
            measured.scores = scores_of(bench, config.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # which methods.py, that had it too, speaks of
        return 130
    write_text(folder / MEASURED, json.dumps(dataclasses.asdict(measured), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
