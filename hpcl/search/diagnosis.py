"""What the facts of a machine mean for a search, and what to do about it: facts in, sentences out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hpcl.search.facts import Disk, Gpu, Machine
from hpcl.search.plan import counted
from hpcl.search.probe import RAY_NEEDED

DRIVER_OF_CUDA = {12: 525, 13: 580}
"""Oldest NVIDIA driver for each major version of CUDA that torch is built for (NVIDIA's table of minor version
compatibility)."""

TRIAL_GB = (0.5, 1.2)
"""Memory of a trial of a small convnet, images apart: one worker, two workers."""
RAY_GB = 1.0
"""Memory of Ray itself."""

GB = 1e9
_FLAGS = {"results": "--results", "decoded images": "HPCL_CACHE"}
_NEEDS = f"a small one takes {TRIAL_GB[0]:g} to {TRIAL_GB[1]:g} GB, Ray {RAY_GB:g} GB"
_TORCH_LINES = "https://pytorch.org/get-started has the line for each CUDA version"
_INSTALL = "install this project again in a fresh virtual environment: pip install -e ."


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    level: Literal["ok", "note", "fault"]
    about: str
    """What was checked, in a word or two."""
    says: str
    """What is, and what it means."""
    do: str = ""
    """What to do about it; never empty for a fault."""


def of_machine(machine: Machine) -> list[Finding]:
    """What there is to say of one machine."""
    return [
        Finding("ok", "Python", f"{machine.python} ({machine.executable})"),
        *packages(machine),
        torch(machine),
        *gpus(machine),
        faiss(machine),
        ray(machine),
        memory(machine),
        *shm(machine),
        *disks(machine),
    ]


def packages(machine: Machine) -> list[Finding]:
    """The packages that this one needs."""
    if machine.packages:
        return [Finding("fault", "packages", "; ".join(machine.packages), _INSTALL)]
    return []


def torch(machine: Machine) -> Finding:
    """torch and torchvision."""
    found = machine.torch
    again = f"install both from one place: pip install --force-reinstall torch torchvision ({_TORCH_LINES})"
    if found.error:
        name = f"torch {found.version}".strip()
        return Finding("fault", "torch", f"{name} cannot be used ({found.error})", again)
    if found.torchvision:
        return Finding("fault", "torch", f"torchvision does not fit torch {found.version} ({found.torchvision})", again)
    build = f"for CUDA {found.cuda}" if found.cuda else f"for ROCm {found.hip}" if found.hip else "for CPUs only"
    return Finding("ok", "torch", f"{found.version}, built {build}; {counted(found.threads, 'thread')}")


def gpus(machine: Machine) -> list[Finding]:
    """GPUs, their driver, and whether torch can use them."""
    driver, found = machine.driver, machine.torch
    if found.error and not driver.gpus:
        return []  # torch's own fault says enough
    if found.gpus:
        return _usable_gpus(machine)
    cpus = f"trials train on {counted(machine.cpus, 'CPU core')}"
    if driver.error and not driver.gpus:
        text = f"NVIDIA's driver does not answer ({driver.error}): {cpus}"
        return [Finding("fault", "GPUs", text, "load the driver that fits its library: restart the machine")]
    if not driver.gpus and driver.on_bus:
        text = f"{counted(driver.on_bus, 'NVIDIA GPU')} on the bus, but no driver answers: {cpus}"
        how = "to use GPUs install NVIDIA's driver; in a container start it with --gpus all (NVIDIA Container Toolkit)"
        return [Finding("note", "GPUs", text, how)]
    if not driver.gpus:
        return [Finding("ok", "GPUs", f"none: {cpus}")]
    kinds = f"{_counted_names(driver.gpus)}, driver {driver.version or 'unknown'}"
    if found.error:
        return [Finding("note", "GPUs", f"{kinds}; torch could not be asked")]
    if _hides_all(machine.visible):
        shown = f"CUDA_VISIBLE_DEVICES={machine.visible}"
        return [Finding("note", "GPUs", f"{kinds}; {shown} hides them: {cpus}", "to use them: unset it")]
    if found.cuda is None and found.hip is None:
        text = f"{kinds}, but torch {found.version} is built for CPUs only: {cpus}"
        how = f"install a torch for CUDA: pip install --force-reinstall torch torchvision ({_TORCH_LINES})"
        return [Finding("fault", "GPUs", text, how)]
    major = int(found.cuda.split(".")[0]) if found.cuda else 0
    oldest, has = DRIVER_OF_CUDA.get(major, 0), int(driver.version.split(".")[0] or 0)
    if 0 < has < oldest:
        text = f"{kinds}, which is too old for torch's CUDA {found.cuda}: {cpus}"
        how = f"update the driver to {oldest} or newer"
        if fits := max((m for m, least in DRIVER_OF_CUDA.items() if least <= has), default=0):
            how += f", or install a torch for CUDA {fits} ({_TORCH_LINES})"
        return [Finding("fault", "GPUs", text, how)]
    if machine.visible is not None:
        text = f"{kinds}; with CUDA_VISIBLE_DEVICES={machine.visible} torch finds none ({found.reason})"
        return [Finding("fault", "GPUs", text, "name GPUs that are there (nvidia-smi -L), or unset it")]
    text = f"{kinds}, but torch {found.version} can use none ({found.reason or 'it does not say why'})"
    how = "restart the machine; if that does not help, update the driver (nvidia-smi shows it) and torch"
    return [Finding("fault", "GPUs", text, how)]


def _usable_gpus(machine: Machine) -> list[Finding]:
    driver, found = machine.driver, machine.torch
    findings = []
    for index, gpu in enumerate(found.gpus):
        if not runs_on(gpu, found.kinds):
            can = f"it has compute capability {gpu.capability[0]}.{gpu.capability[1]}"
            text = f"torch {found.version} has no kernels for GPU {index}, {gpu.name}: {can}"
            how = f"install a torch that has ({_TORCH_LINES}), or hide this GPU with CUDA_VISIBLE_DEVICES"
            findings.append(Finding("fault", "GPUs", text, how))
        elif gpu.error:
            text = f"GPU {index}, {gpu.name}, does not compute ({gpu.error})"
            how = "see nvidia-smi for other processes and errors; restart the machine, or hide it: CUDA_VISIBLE_DEVICES"
            findings.append(Finding("fault", "GPUs", text, how))
        elif gpu.free < 0.5 * gpu.total:
            text = f"GPU {index}, {gpu.name}, has {_gb(gpu.free)} of {_gb(gpu.total)} GB free: another process holds it"
            findings.append(Finding("note", "GPUs", text, "nvidia-smi shows which"))
    if driver.exclusive:
        text = "a GPU takes one process only (compute mode): resources.gpus_per_worker below 1 will not work"
        findings.append(Finding("note", "GPUs", text, "to allow it: nvidia-smi -c DEFAULT"))
    if len(driver.gpus) > len(found.gpus) and machine.visible is not None:
        text = f"{len(found.gpus)} of {len(driver.gpus)} are used: CUDA_VISIBLE_DEVICES={machine.visible}"
        findings.append(Finding("note", "GPUs", text, "to use all: unset it"))
    if not any(finding.level == "fault" for finding in findings):
        capability = ".".join(map(str, found.gpus[0].capability))
        names = _counted_names([gpu.name for gpu in found.gpus])
        least = _gb(min(gpu.total for gpu in found.gpus))
        text = f"{names}, {least} GB, compute capability {capability}, driver {driver.version or 'unknown'}"
        findings.insert(
            0, Finding("ok", "GPUs", f"{text}; torch computes on {'it' if len(found.gpus) == 1 else 'each'}")
        )
    return findings


def runs_on(gpu: Gpu, kinds: Iterable[str]) -> bool:
    """Whether kernels of these kinds run on a GPU: binaries of its major version, or PTX of an older one."""
    of_gpu = gpu.capability
    if of_gpu == (0, 0):
        return True  # not known
    for kind in kinds:
        if not (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", kind)):
            return True  # another maker's
        made_for = int(found[2]), int(found[3])
        if made_for == of_gpu:
            return True
        if not found[4] and made_for < of_gpu and (found[1] == "compute" or made_for[0] == of_gpu[0]):
            return True
    return False


def faiss(machine: Machine) -> Finding:
    """faiss, which assigns points to clusters on CPUs."""
    found = machine.faiss
    if found.missing:
        text = "is not installed: points are assigned to clusters with torch, which is slower on CPUs"
        return Finding("note", "faiss", text, "pip install faiss-cpu")
    if found.error:
        text = f"faiss {found.version}".strip() + f" cannot be used ({found.error})"
        how = "pip uninstall -y faiss-gpu faiss-cpu, then pip install faiss-cpu; or set clusters.backend to torch"
        return Finding("note" if machine.torch.gpus else "fault", "faiss", text, how)
    build = "with GPU support" if found.for_gpus else "for CPUs"
    return Finding("ok", "faiss", f"{found.version}, built {build}; a search found what it should")


def ray(machine: Machine) -> Finding:
    """The installed Ray."""
    found = machine.ray
    install = f'pip install "ray[default,tune,train]=={RAY_NEEDED}.*"'
    if found.version and not found.version.startswith(f"{RAY_NEEDED}."):
        return Finding("fault", "Ray", f"is {found.version}, but this project needs {RAY_NEEDED}", install)
    if found.error:
        return Finding("fault", "Ray", f"Ray {found.version}".strip() + f" cannot be used ({found.error})", install)
    if found.without_default:
        text = f"{found.version} lacks what ray[default] brings ({found.without_default}): no dashboard, no `ray up`"
        return Finding("fault", "Ray", text, install)
    if not found.lean:
        text = f"{found.version} is not as expected inside: trials of several workers start as Ray starts them, slowly"
        return Finding("note", "Ray", text, f"for the fast start: {install}")
    return Finding("ok", "Ray", f"{found.version}, [default] is there; trials of several workers start the fast way")


def memory(machine: Machine) -> Finding:
    """Memory."""
    if not machine.memory_total:
        return Finding("note", "memory", "the system does not say how much is free")
    text = f"{machine.memory_free / GB:.1f} of {machine.memory_total / GB:.1f} GB free"
    if machine.memory_free < (RAY_GB + TRIAL_GB[0]) * GB:
        how = "end what else runs on this machine, or use one with more"
        return Finding("fault", "memory", f"{text}: not enough for one trial ({_NEEDS})", how)
    if machine.memory_free < 0.1 * machine.memory_total:
        return Finding("note", "memory", f"{text}: Ray ends trials when it is 95 % full", "end what else runs here")
    return Finding("ok", "memory", f"{text}: room for about {counted(_room(machine), 'trial')} at a time ({_NEEDS})")


def memory_for(machine: Machine, trials: int) -> list[Finding]:
    """A note where memory may not do for so many trials at a time on a machine."""
    if not machine.memory_total or trials <= (room := _room(machine)):
        return []
    text = f"{machine.memory_free / GB:.1f} GB may be too little for {trials} trials at a time ({_NEEDS})"
    return [Finding("note", "memory", text, f"if trials run out of memory: --set search.max_concurrent={room}")]


def _room(machine: Machine) -> int:
    return max(1, int((machine.memory_free / GB - RAY_GB) / TRIAL_GB[1]))


def shm(machine: Machine) -> list[Finding]:
    """Shared memory."""
    if machine.shm_free is None:
        return []
    free = f"{machine.shm_free / GB:.1f} GB free"
    if machine.shm_free < 0.3 * GB:
        how = "start the container with --shm-size=1g (in Kubernetes: an emptyDir of medium Memory at /dev/shm)"
        return [Finding("note", "/dev/shm", f"{free}: Ray keeps its objects on disk instead, which is slower", how)]
    return [Finding("ok", "/dev/shm", free)]


def disks(machine: Machine) -> list[Finding]:
    """The disks that results, decoded images and Ray's files lie on."""
    findings = []
    known = [disk for disk in machine.disks if not disk.error]
    for device in dict.fromkeys(disk.device for disk in known):
        here = [disk for disk in known if disk.device == device]
        what = ", ".join(f"{disk.holds} ({disk.path})" for disk in here)
        findings.append(_disk(here[0], what, rays=any(disk.holds.startswith("Ray") for disk in here)))
    for disk in machine.disks:
        how = f"name another folder with {_FLAGS.get(disk.holds, 'RAY_TMPDIR')}"
        if disk.error:
            text = f"{disk.holds}: {disk.path} cannot be looked at ({disk.error})"
            findings.append(Finding("fault", "disk", text, f"see that its disk or server is there, or {how}"))
        elif not disk.writable and disk.holds != "results":  # which are tried out
            text = f"{disk.holds}: {disk.path} cannot be written by this user"
            findings.append(Finding("fault", "disk", text, f"give this user the right to write, or {how}"))
    return findings


def _disk(disk: Disk, what: str, *, rays: bool) -> Finding:
    how = "name another place: --results, HPCL_CACHE or RAY_TMPDIR"
    if not disk.total:
        return Finding("fault", "disk", f"{what}: no files can be kept there", how)
    free = f"{disk.free / GB:.1f} of {disk.total / GB:.0f} GB free for {what}"
    if disk.free < GB or not disk.files_left:
        lacks = free if disk.files_left else f"no file can be made any more (no inodes) for {what}"
        return Finding("fault", "disk", lacks, f"free space there, or {how}")
    if rays and disk.free < 0.05 * disk.total:
        text = f"{free}: over 95 % full, where Ray stops to put objects on disk"
        return Finding("note", "disk", text, "free space there, or move Ray's files: RAY_TMPDIR")
    if disk.free < 5 * GB:
        return Finding("note", "disk", f"{free}: a trial keeps its checkpoint and curves", "free space there")
    return Finding("ok", "disk", free)


def _hides_all(visible: str | None) -> bool:
    return visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles")


def _counted_names(names: Sequence[str]) -> str:
    return " + ".join(f"{count} x {name}" for name, count in Counter(names).items())


def _gb(amount: int) -> str:
    return f"{amount / GB:.0f}"
