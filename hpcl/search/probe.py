"""Facts of the machine this runs on: GPUs and driver, torch, faiss, Ray, memory, disks. No judgement, see `diagnosis`.

What may crash, hang or change the process (torch, faiss, Ray) is looked at in processes of its own.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import hpcl
from hpcl.errors import UserError
from hpcl.files import cache_folder
from hpcl.prefix import code_version
from hpcl.search.cluster import ray_folder
from hpcl.search.facts import Disk, Driver, Faiss, Machine, RayFacts, Torch
from hpcl.search.machine import local_node
from hpcl.search.places import is_uri

_T = TypeVar("_T")

SECONDS = 120.0
"""Seconds that torch, faiss and Ray may each take to answer; imports from a cold network disk are slow."""

DISK_SECONDS = 30.0
"""Seconds for a folder to answer; one on a network disk whose server is gone keeps a process waiting for ever."""

RAY_NEEDED = "2.60"
"""The Ray this project is written for, as in pyproject.toml."""

_KILLED = {signal.SIGILL: "it uses an instruction that this CPU does not have", signal.SIGKILL: "out of memory?"}


def look(
    results: str | None = None, rays: Path | None = None, *, seconds: float = SECONDS, root: Path = Path("/")
) -> Machine:
    """Facts of this machine.

    Args:
        results: a folder of results whose disk is looked at; None, or a URI: none.
        rays: Ray's own folder; None: that of a Ray that is started for a search.
        seconds: that torch, faiss and Ray may each take.
        root: folder under which `sys`, `proc` and `dev` are read; tests give another.
    """
    torch, faiss, ray = _ask(("torch", "faiss", "ray"), seconds)
    free, total = _memory(root)
    return Machine(
        host=socket.gethostname(),
        python=platform.python_version(),
        executable=sys.executable,
        hpcl=hpcl.__version__,
        code=code_version(),
        cpus=int(local_node(0, root=root).cpus),
        memory_free=free,
        memory_total=total,
        shm_free=_free(root / "dev/shm"),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        driver=_driver(root),
        torch=Torch(**torch),
        faiss=Faiss(**faiss),
        ray=RayFacts(**ray),
        disks=tuple(_disks(results, rays or ray_folder())),
        packages=tuple(_packages()),
    )


def versions() -> dict[str, str]:
    """What all nodes must agree on, without importing any of it: python, hpcl, code, ray, torch."""
    return {
        "python": platform.python_version(),
        "hpcl": hpcl.__version__,
        "code": code_version(),
        **{name: _installed(name) for name in ("ray", "torch")},
    }


def python_here(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a Python process that finds this package, and nothing in the current folder."""
    paths = [str(Path(hpcl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return [sys.executable, "-P", *arguments], environment


def within(seconds: float, function: Callable[[], _T]) -> _T:
    """What the function gives, or raises; a dead network disk would keep it waiting for ever.

    Raises:
        TimeoutError: it has not come back; its thread is left to itself.
    """
    answer: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((function(), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def reason_of(error: Exception) -> str:
    """What the system said, without pyarrow's repetition of the path and without advice."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    text = first_line(error)
    return text.rpartition("; ")[0] or text if isinstance(error, UserError) else text


def first_line(text: object) -> str:
    """The first line of a text, or its type's name where it is empty; no longer than 300 letters."""
    lines = str(text).strip().splitlines()
    return (lines[0] if lines else type(text).__name__)[:300]


# ---------------------------------------------------------------- what another process is asked


def _ask(names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """What processes of their own say, each of one package; `error` where one says nothing."""
    until = time.monotonic() + seconds
    running: list[tuple[str, subprocess.Popen[str]]] = []
    try:
        for name in names:
            command, environment = python_here("-m", "hpcl.search.probe", name)
            pipe = subprocess.PIPE
            one = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
            )
            running.append((name, one))
        return [_said(name, one, max(1.0, until - time.monotonic()), seconds) for name, one in running]
    finally:
        for _, one in running:
            if one.poll() is None:
                one.kill()
                with suppress(subprocess.TimeoutExpired):  # it hangs inside the system
                    one.wait(timeout=5)


def _said(name: str, process: subprocess.Popen[str], left: float, seconds: float) -> dict[str, Any]:
    facts = {"version": _installed(name)}
    try:
        out, complaints = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        return facts | {"error": f"no answer within {seconds:g} s"}
    if process.returncode == 0 and out.strip():
        answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return answer
    if process.returncode < 0:
        number = signal.Signals(-process.returncode)
        meaning = f": {_KILLED[number]}" if number in _KILLED else ""
        return facts | {"error": f"the process was ended by {number.name}{meaning}"}
    last = complaints.strip().splitlines() or [f"exit code {process.returncode}"]
    return facts | {"error": last[-1][:300]}


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ModuleNotFoundError as error:
        return {"error": first_line(error)}
    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
    }
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a RuntimeError where it was built for another torch
        facts["torchvision"] = first_line(error)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            facts |= {"gpus": [_gpu(i) for i in range(torch.cuda.device_count())], "kinds": torch.cuda.get_arch_list()}
        elif torch.version.cuda or torch.version.hip:
            try:
                torch.cuda.init()  # type: ignore[no-untyped-call]
            except Exception as error:
                facts["reason"] = first_line(error)
            else:
                facts["reason"] = first_line(said[-1].message) if said else ""
    return facts


def _gpu(index: int) -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"name": f"GPU {index}", "capability": (0, 0), "free": 0, "total": 0}
    try:
        of_device = torch.cuda.get_device_properties(index)
        facts |= {"name": of_device.name, "capability": (of_device.major, of_device.minor)}
        facts["free"], facts["total"] = torch.cuda.mem_get_info(index)
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        if float((ones @ ones).sum()) != 64.0**3:
            facts["error"] = "a product of two matrices of ones came out wrong"
    except Exception as error:
        facts["error"] = first_line(error)
    return facts


def _faiss() -> dict[str, Any]:
    try:
        import faiss
    except ModuleNotFoundError as error:
        return {"missing": error.name == "faiss", "error": "" if error.name == "faiss" else first_line(error)}
    import numpy as np

    points = np.random.default_rng(0).random((256, 64), dtype=np.float32)
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    _, nearest = index.search(points, 1)
    right = bool((nearest[:, 0] == np.arange(len(points))).all())
    return {
        "version": faiss.__version__,
        "for_gpus": hasattr(faiss, "StandardGpuResources"),
        "error": "" if right else "a search for 256 points among themselves did not find them",
    }


def _ray() -> dict[str, Any]:
    try:
        import ray
        from ray._private.utils import get_dashboard_dependency_error
    except ImportError as error:
        return {"error": first_line(error), "version": _installed("ray")}
    if not ray.__version__.startswith(f"{RAY_NEEDED}."):
        return {"version": ray.__version__}
    from hpcl.search.lean import needs_dashboard

    missing = get_dashboard_dependency_error()
    return {
        "version": ray.__version__,
        "without_default": first_line(missing) if missing else "",
        "lean": not needs_dashboard(),
    }


_ASKED: Mapping[str, Callable[[], dict[str, Any]]] = {"torch": _torch, "faiss": _faiss, "ray": _ray}


# ---------------------------------------------------------------- what the system says


def _driver(root: Path) -> Driver:
    on_bus = sum(1 for device in (root / "sys/bus/pci/devices").glob("*") if _is_nvidia(device))
    fields = "name,driver_version,compute_mode"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except FileNotFoundError:
        error = ""
    except (OSError, subprocess.TimeoutExpired) as caught:
        error = f"nvidia-smi: {first_line(caught)}"
    else:
        rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
        if done.returncode == 0 and rows and all(len(row) == 3 for row in rows):
            names, version = tuple(row[0] for row in rows), rows[0][1]
            exclusive = any("exclusive" in row[2].lower() for row in rows)
            return Driver(version=version, gpus=names, exclusive=exclusive, on_bus=on_bus)
        error = f"nvidia-smi: {first_line(done.stdout or done.stderr or f'exit code {done.returncode}')}"
    try:  # where nvidia-smi is not installed
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    present = sum(1 for file in (root / "dev").glob("nvidia[0-9]*") if file.name[6:].isdecimal())
    return Driver(version=found[1] if found else "", gpus=("NVIDIA GPU",) * present, error=error, on_bus=on_bus)


def _is_nvidia(device: Path) -> bool:
    """Whether a device on the PCI bus is an NVIDIA GPU (display or 3D controller)."""
    try:
        kind = (device / "class").read_text().strip()
        return (device / "vendor").read_text().strip() == "0x10de" and kind.startswith(("0x0300", "0x0302"))
    except OSError:
        return False


def _memory(root: Path) -> tuple[int, int]:
    """Free and total bytes, of the container where it has a limit; zeros where the system does not say."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return 0, 0
    of = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest}
    free, total = of.get("MemAvailable", 0), of.get("MemTotal", 0)
    for folder, most, used in (
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit, now = (int((root / folder / name).read_text()) for name in (most, used))
        except (OSError, ValueError):  # "max" is no number
            continue
        if limit < total:
            return max(0, min(free, limit - now)), limit
    return free, total


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _disks(results: str | None, rays: Path) -> list[Disk]:
    folders = [("decoded images", cache_folder()), ("Ray's own files", rays)]
    if results is not None and not is_uri(results):
        folders.insert(0, ("results", Path(results)))
    found = []
    for holds, path in folders:
        try:
            facts = within(DISK_SECONDS, partial(_disk, path))
        except (OSError, TimeoutError) as error:
            facts = {"error": first_line(error)}
        found.append(Disk(holds=holds, path=str(path), **facts))
    return found


def _disk(path: Path) -> dict[str, Any]:
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is no folder")
    system = os.statvfs(there)
    return {
        "free": system.f_bavail * system.f_frsize,
        "total": system.f_blocks * system.f_frsize,
        "device": there.stat().st_dev,
        "writable": os.access(there, os.W_OK | os.X_OK),
        "files_left": not system.f_files or system.f_favail > 0,
    }


def _packages() -> list[str]:
    """Packages that this one needs and that are not there, or not in the version needed; Ray has a check of its own."""
    try:
        from packaging.requirements import Requirement

        needed = [Requirement(line) for line in metadata.requires("hpcl") or []]
    except (ImportError, metadata.PackageNotFoundError):  # run from a folder, not installed
        return []
    wrong = []
    for each in needed:
        if each.name == "ray" or (each.marker and not each.marker.evaluate({"extra": ""})):
            continue
        version = _installed(each.name)
        if not version and not each.name.startswith("faiss"):
            wrong.append(f"{each.name} is not installed")
        elif version and not each.specifier.contains(version, prereleases=True):
            wrong.append(f"{each.name} {version} is installed, {each.specifier} is needed")
    return wrong


def _installed(package: str) -> str:
    """A package's version; empty where it is not installed."""
    names = ("faiss-gpu", "faiss-cpu") if package == "faiss" else (package,)
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


if __name__ == "__main__":
    print(json.dumps(_ASKED[sys.argv[1]]()))
