"""The ranks of one training run, and the few collective operations it needs.

With one rank every operation is the identity and no process group exists.
Legend: R ranks; b rows on one rank; B = R b rows over all ranks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcl.errors import UserError


@dataclass(frozen=True)
class World:
    """This process' place among the ranks, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    def all_gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks in rank order: (b, ...) on each rank -> (R b, ...). No gradient."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def all_gather_with_gradient(self, x: Tensor) -> Tensor:
        """As :meth:`all_gather`; each rank's rows get the sum of all ranks' gradients for them.

        For a loss that compares a rank's rows with everybody's, averaged over the ranks.
        """
        if self.size == 1:
            return x
        gathered: Tensor = _GatherRows.apply(x, self)
        return gathered

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum over ranks of a tensor of equal shape."""
        if self.size == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's values on every rank; `x` gives shape and dtype and is written in place."""
        if self.size > 1:
            dist.broadcast(x, src=0)
        return x

    def average_buffers(self, module: nn.Module) -> None:
        """Average the BatchNorm statistics of modules in train mode over the ranks, in place.

        The key encoder is not wrapped by DDP and the query encoder is wrapped without
        buffer broadcast; running statistics are linear in the batch statistics, so the
        mean over R ranks equals one rank with ``bn_splits = R``. Modules in eval mode
        (frozen ones) are left bit-identical.
        """
        if self.size == 1:
            return
        for part in module.modules():
            for buffer in part.buffers(recurse=False):
                if part.training and buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.size

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def shard(self, count: int) -> range:
        """The contiguous part of ``range(count)`` that falls to this rank (sizes differ by at most 1)."""
        per, extra = divmod(count, self.size)
        start = self.rank * per + min(self.rank, extra)
        return range(start, start + per + (self.rank < extra))

    def gather_shards(self, x: Tensor, count: int) -> Tensor:
        """Put together rows computed by :meth:`shard`: (own part, ...) -> (count, ...) on every rank."""
        if self.size == 1:
            return x
        longest = -(-count // self.size)
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: len(x)] = x
        rows = self.all_gather(padded).view(self.size, longest, *x.shape[1:])
        sizes = [count // self.size + (r < count % self.size) for r in range(self.size)]
        return torch.cat([rows[r, :n] for r, n in enumerate(sizes)])


class _GatherRows(torch.autograd.Function):
    """The autograd function of :meth:`World.all_gather_with_gradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world, ctx.rows = world, len(x)
        return world.all_gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        start = ctx.world.rank * ctx.rows
        return ctx.world.all_reduce_sum(gradient)[start : start + ctx.rows], None


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; the local rank picks among several GPUs.

    Raises:
        UserError: `cuda` was asked for and there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("runtime.device is cuda, but torch sees no GPU; set it to auto or cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local_rank % torch.cuda.device_count())


_joined = False
"""Whether this process's group was made here."""


def current_world(device: str = "auto") -> World:
    """The world of this process: a process group if one exists or torchrun announced one, else alone.

    A group that is made here stays for the runs that follow, until :func:`leave_world`.
    """
    global _joined
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # else every rank also opens the first GPU, and barriers guess
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        _joined = True
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), chosen)
    return World(0, 1, chosen)


def leave_world() -> None:
    """End the process group that :func:`current_world` made, if any; for a process that trains no more.

    Not after an error: other ranks may wait for this one, and learn of it by its end.
    """
    global _joined
    if _joined and dist.is_initialized():
        dist.destroy_process_group()
    _joined = False
