"""Facts of a machine and of a cluster's node, as they travel between processes: what was seen, no judgement."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Seen = Literal["unasked", "same", "missing", "other", "refused", "silent", "unseen"]
"""How a node sees the folder of results: not asked; the same as the driver; there is no such folder; there is another
one; it refused (no permission, no such bucket); it did not answer; what the node wrote does not come to the driver."""


class Facts(BaseModel):
    """A value that travels between processes as JSON; what another version does not know is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Gpu(Facts):
    """A GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    free: int
    """Bytes."""
    total: int
    """Bytes."""
    error: str = ""
    """What a small product on it raised."""


class Driver(Facts):
    """NVIDIA's driver and hardware, as far as the system knows of them."""

    version: str = ""
    """Empty: no driver answers."""
    gpus: tuple[str, ...] = ()
    """Names, also of those that CUDA_VISIBLE_DEVICES hides."""
    exclusive: bool = False
    """Whether a GPU takes one process only (its compute mode)."""
    error: str = ""
    """What nvidia-smi said where it failed."""
    on_bus: int = 0
    """NVIDIA's devices on the PCI bus, with or without a driver."""


class Torch(Facts):
    """torch, as a fresh process finds it."""

    version: str = ""
    cuda: str | None = None
    """CUDA it was built for; None: a build without."""
    hip: str | None = None
    threads: int = 0
    kinds: tuple[str, ...] = ()
    """What its kernels were compiled for: sm_80, compute_90, ..."""
    gpus: tuple[Gpu, ...] = ()
    """Those it can use."""
    reason: str = ""
    """Its own words where it can use none."""
    torchvision: str = ""
    """What importing torchvision raised."""
    error: str = ""
    """Why nothing is known: not installed, crashed, did not answer."""


class Faiss(Facts):
    """faiss, as a fresh process finds it."""

    version: str = ""
    for_gpus: bool = False
    missing: bool = False
    """Not installed."""
    error: str = ""
    """What a small search raised, or how it ended the process."""


class RayFacts(Facts):
    """The installed Ray; it is not started."""

    version: str = ""
    without_default: str = ""
    """Why its dashboard cannot start, which is where ``ray[default]`` was not installed."""
    lean: bool = False
    """Whether `lean` knows its inside."""
    error: str = ""


class Disk(Facts):
    """Where something is kept."""

    holds: str
    """results, decoded images, or Ray's own files."""
    path: str
    error: str = ""
    """Why nothing more is known."""
    free: int = 0
    """Bytes that this user may still write."""
    total: int = 0
    device: int = 0
    """Equal for folders on the same disk."""
    writable: bool = False
    files_left: bool = True
    """Whether another file can be made (inodes)."""


class Machine(Facts):
    """One machine."""

    host: str
    python: str
    executable: str
    hpcl: str
    code: str
    """:func:`hpcl.prefix.code_version`."""
    cpus: int
    memory_free: int
    """Bytes, within the container's limit where there is one."""
    memory_total: int
    shm_free: int | None
    """Bytes of /dev/shm; None where there is none."""
    visible: str | None
    """CUDA_VISIBLE_DEVICES."""
    driver: Driver
    torch: Torch
    faiss: Faiss
    ray: RayFacts
    disks: tuple[Disk, ...] = ()
    packages: tuple[str, ...] = ()
    """What this package needs and is not there, such as "optuna 4.6 is installed, >=5.0,<6 is needed"."""


class DataFacts(Facts):
    """A source of images, as a node finds it."""

    error: str = ""
    """Why it cannot be read there; empty: it can."""
    slow: bool = False
    """Its files could not be looked through in time; nothing more is known."""
    files: int = 0
    digest: str = ""
    """Equal for equal names and sizes of files."""
    left_out: str = ""
    """The first entry of a folder that cannot be looked into, and why; empty: there is none."""


class ImageFacts(Facts):
    """Decoded images, as far as they are known before they are decoded."""

    count: int
    """Images, also those that turn out to be broken where not `exact`."""
    shape: tuple[int, int, int]
    """Channels, height and width in pixels; of the first image where not `exact`."""
    exact: bool
    """Whether they are decoded already."""

    @property
    def bytes(self) -> int:
        """Bytes of their mapped copy."""
        channels, height, width = self.shape
        return self.count * channels * height * width


class NodeFacts(Facts):
    """One node of the cluster."""

    name: str
    """Its address; with the beginning of its id where several have the same."""
    node_id: str
    here: bool
    """Whether the driver runs on it."""
    cpus: float
    gpus: float
    """GPUs that Ray counts there."""
    silent: str = ""
    """Why it gave no answer; empty: it answered. Nothing below is known where it did not."""
    ahead: float = 0.0
    """Seconds that its clock is ahead of the driver's, from what it read when it answered."""
    versions: dict[str, str] = Field(default_factory=dict)
    """python, hpcl, code, ray, torch: :func:`hpcl.search.probe.versions`."""
    token: bool = False
    """Whether its Ray asks for a token."""
    folder: Seen = "unasked"
    folder_error: str = ""
    data: DataFacts | None = None
    machine: Machine | None = None
