"""What a search ran on and with: versions, commit and hardware, for ``search.json``."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import hpcl

_PACKAGES = ("torch", "ray", "optuna", "numpy", "faiss-gpu", "faiss-cpu", "pyarrow", "scikit-learn", "mlxtend")


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
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "ram_gb": round(_ram_bytes() / 1e9, 1),
        "gpus": _gpus(),
        "nodes": [
            {name: value for name, value in node["Resources"].items() if name in ("CPU", "GPU", "memory")}
            for node in nodes
        ],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


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
