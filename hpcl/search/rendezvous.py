"""torch's process group on loopback, for a worker group whose ranks are all on this machine.

torch's store, in which the ranks find one another, listens on every interface and asks for
no password. Here rank 0 opens the socket itself, on 127.0.0.1, and the ranks talk there too.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

from ray import train as ray_train
from ray.train.torch import TorchConfig

HOST = "127.0.0.1"
_door: socket.socket | None = None
"""Where the store of this process is going to listen."""


class LoopbackConfig(TorchConfig):
    """As Ray Train's, but nothing of the process group can be reached from another machine."""

    @property
    def backend_cls(self) -> type[Any]:
        return _Loopback


class _Loopback(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        port = worker_group.execute_single(0, _open)
        worker_group.execute(_join, port, "nccl" if gpus else "gloo", backend_config.timeout_s)


def _open() -> int:
    """Open rank 0's socket; its port."""
    global _door
    _door = socket.create_server((HOST, 0))
    port: int = _door.getsockname()[1]
    return port


def _join(port: int, backend: str, timeout_s: int) -> None:
    """Make this rank's process group, and say in the environment what torchrun would."""
    global _door
    from torch.distributed import TCPStore, init_process_group  # type: ignore[attr-defined]

    context = ray_train.get_context()
    rank, size, timeout = context.get_world_rank(), context.get_world_size(), timedelta(seconds=timeout_s)
    places = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": context.get_local_rank(), "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(place) for name, place in {**places, "NODE_RANK": 0, "MASTER_PORT": port}.items()}
    os.environ["MASTER_ADDR"] = HOST
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    for library in ("GLOO", "NCCL"):  # else the address of this machine's name
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    listens = _door.detach() if _door else None
    _door = None
    store = TCPStore(HOST, port, size, rank == 0, timeout, multi_tenant=True, master_listen_fd=listens)
    init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
