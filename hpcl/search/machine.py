"""This machine: CPUs and GPUs as Ray would count them, and its processor's name; without ray or torch."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from hpcl.search.plan import Node


def local_node(assume_gpus: int | None = None, *, root: Path = Path("/")) -> Node:
    """This machine: CPUs this process may use, and its NVIDIA GPUs.

    Args:
        assume_gpus: count this many GPUs instead of those that are there.
        root: folder under which `sys` and `dev` are read; tests give another.
    """
    gpus = _visible_gpus(root) if assume_gpus is None else assume_gpus
    return Node(cpus=float(_usable_cpus(root)), gpus=float(gpus))


def cpu_model() -> str:
    """The processor's name, or its kind where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _usable_cpus(root: Path) -> int:
    """Cores that the affinity mask and the container's quota leave, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = None
    try:  # cgroup v2: "200000 100000" microseconds of CPU per period, or "max 100000"
        used, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()[:2]
        quota = None if used == "max" else int(used) / int(period)
    except (OSError, ValueError):
        try:  # cgroup v1; -1 means no quota
            folder = root / "sys/fs/cgroup/cpu"
            microseconds = int((folder / "cpu.cfs_quota_us").read_text())
            period_v1 = int((folder / "cpu.cfs_period_us").read_text())
            quota = microseconds / period_v1 if microseconds > 0 else None
        except (OSError, ValueError):
            quota = None
    return cores if quota is None else max(1, min(cores, int(quota)))


def _visible_gpus(root: Path) -> int:
    """NVIDIA devices, less those that CUDA_VISIBLE_DEVICES hides."""
    try:
        present = sum(1 for file in (root / "dev").iterdir() if re.fullmatch(r"nvidia\d+", file.name))
    except OSError:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    chosen = [name.strip() for name in visible.split(",")]
    return min(present, sum(1 for name in chosen if name and name not in ("-1", "NoDevFiles")))
