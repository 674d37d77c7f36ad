"""``search.json``: what a search ran with, on what hardware, and when."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hpcl
from hpcl.files import read_object, write_text
from hpcl.search.machine import cpu_model
from hpcl.search.plan import Plan

if TYPE_CHECKING:
    from hpcl.search.found import Found

_PACKAGES = ("torch", "ray", "optuna", "numpy", "faiss-gpu", "faiss-cpu", "pyarrow", "scikit-learn", "mlxtend")


class Looked(NamedTuple):
    """The images of a search."""

    line: str
    """What they are, in words."""
    digest: str
    """Hash of their content."""
    parts: dict[str, int]
    """Images of each split: train, val, test."""


class Record:
    """The file, from the start of a search to its end.

    Args:
        plan: the search.
        nodes: the cluster's machines (``ray.nodes()``).
        backbone: name of the user's own backbone.
        looked: the images, where they are ours to read.
        given: its runs were given, so that the same command goes on with them.
    """

    def __init__(
        self,
        plan: Plan,
        nodes: list[dict[str, Any]],
        backbone: str | None = None,
        looked: Looked | None = None,
        *,
        given: bool = False,
    ) -> None:
        space = plan.space
        self.command = _command(sys.argv[1:])
        self.resume_command = self.command if given else _command(_resuming(sys.argv[1:], plan.folder.name))
        self._path, self._start = plan.folder / "search.json", time.monotonic()
        self._facts: dict[str, Any] = {
            "name": plan.folder.name,
            "command": self.command,
            "started": self._started(),
            "seed": {"sampler": space.search.seed, "trials": space.base.seed},
            "trials_asked": space.search.trials,
            "trials_at_a_time": plan.concurrency.trials,
            "workers": space.resources.workers,
            "cpus_per_worker": plan.concurrency.cpus_per_worker,
            "gpus_per_worker": plan.concurrency.gpus_per_worker,
            "metric": space.search.metric,
            "mode": space.search.mode,
            "objective": space.search.objective,
            "rungs": list(plan.rungs),
            "factor": space.search.factor,
            "data": space.base.data.source,
            "data_hash": looked and looked.digest,
            "images": looked and looked.parts,
            "backbone": backbone or space.base.model.backbone,
            "versions": versions(),
            "commit": commit(),
            "hardware": hardware(nodes),
        }

    @property
    def seconds(self) -> float:
        """Since the search began."""
        return time.monotonic() - self._start

    def _started(self) -> str:
        """When the search began: as an earlier process of it wrote, else now."""
        with suppress(OSError, ValueError):
            started = read_object(self._path).get("started")
            if isinstance(started, str):
                return started
        return time.strftime("%Y-%m-%dT%H:%M:%S%z")

    def write(self, state: str, found: Found | None = None, before: float = 0.0) -> None:
        """Write the file: `state` is running, finished, interrupted, or failed (a bug).

        `before` is how long earlier processes ran the search, in seconds; the file has the sum.
        """
        self._facts["state"] = state
        if found is not None:
            self._facts |= {
                "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "seconds": round(before + self.seconds, 1),
                "trials": found.states,
                "epochs": found.epochs_trained,
                "gpu_hours": found.total("gpu_hours"),
                "cpu_hours": found.total("cpu_hours"),
                "prefixes": [
                    {name: row[name] for name in ("trial_id", "state", "epochs", "seconds", "gpu_hours", "cpu_hours")}
                    for row in found.prefixes
                ],
                "reason": found.reason,
                "notes": found.notes,
                "best": found.best_trial and found.best_trial["trial_id"],
            }
        write_text(self._path, json.dumps(self._facts, indent=2) + "\n")


def _command(arguments: list[str]) -> str:
    name = Path(sys.argv[0]).name
    return shlex.join([*(["python", name] if name.endswith(".py") else [name]), *arguments])


def _resuming(arguments: list[str], name: str) -> list[str]:
    """The arguments that go on with a search, from those that began it: its name in place of `--fresh`."""
    kept = _without(_without(arguments, "--warm-from"), "--fresh")  # the study has the earlier trials already
    return [*_without(kept, "--name"), "--name", name]


def _without(arguments: list[str], flag: str) -> list[str]:
    """The arguments without a flag and its values."""
    kept: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("-"):
            inside = argument.partition("=")[0] == flag
        if not inside:
            kept.append(argument)
        inside = inside and "=" not in argument
    return kept


def versions() -> dict[str, str]:
    """Versions of this package, Python and the packages whose numbers end up in the results."""
    found = {"hpcl": hpcl.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of the code that runs, with ``+changes`` if files differ from it; None outside a clone."""
    root = Path(hpcl.__file__).parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """This machine, and the resources of every node of the cluster (``ray.nodes()``)."""
    kept = ("CPU", "GPU", "memory")
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "ram_gb": round(_ram_bytes() / 1e9, 1),
        "gpus": _gpus(),
        "nodes": [
            {n: value for n, value in node["Resources"].items() if n in kept or n.startswith("accelerator_type:")}
            for node in nodes
        ],
    }


def _ram_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _gpus() -> list[str]:
    """Names of this machine's GPUs, asked of the driver so that no CUDA context is made here."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.splitlines() if line.strip()]
