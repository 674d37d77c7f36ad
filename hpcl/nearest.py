"""The nearest-centroid search of k-means: by faiss or torch, alone or shared by the ranks of a run.

Legend: n points, D embedding, m centroids, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hpcl.dist import World
from hpcl.errors import UserError

Backend = Literal["auto", "faiss", "torch"]

Nearest = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(points (n,D), centroids (m,D)) -> (id of the nearest centroid (n,), squared distance to it (n,))."""

DISTANCES_AT_ONCE = {"cpu": 2**21, "cuda": 2**27}
"""Entries of the distance matrix held at a time (float32): 8 MB stay in a CPU's cache."""


def nearest_centroid_search(backend: str, device: torch.device) -> Nearest:
    """The fastest exact search that is allowed and installed; a UserError if faiss is asked for in vain."""
    if backend not in ("auto", "faiss", "torch"):
        raise ValueError(f"backend is {backend!r}, but must be 'auto', 'faiss' or 'torch'")
    if backend == "torch" or device.type != "cpu":
        return _nearest_torch
    try:
        import faiss
    except (ImportError, RuntimeError):  # faiss-gpu without CUDA's libraries raises the latter
        if backend == "auto":
            return _nearest_torch
        raise UserError(
            "clusters.backend is faiss, but faiss is not installed; install faiss-cpu (or faiss-gpu), "
            "or set it to auto or torch"
        ) from None

    def nearest_faiss(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(torch.get_num_threads())  # a rank keeps to the cores it was given
        try:
            index = faiss.IndexFlatL2(points.shape[1])
            index.add(centroids.contiguous().numpy())
            cost, ids = index.search(points.contiguous().numpy(), 1)
        finally:
            faiss.omp_set_num_threads(threads)
        # faiss answers -1 where a distance overflows.
        return torch.from_numpy(ids[:, 0]).clamp_(min=0), torch.from_numpy(cost[:, 0]).clamp_(min=0)

    return nearest_faiss


def shared_by_ranks(nearest: Nearest, world: World) -> Nearest:
    """The same search, each rank doing a contiguous part of the points; every rank gets all answers.

    Every rank must call it, with the same number of points and of centroids, and with the same
    points up to rounding; the centroids are rank 0's. All ranks then hold the same bits, also
    where their CPUs or backends round differently. That is why a search too small to be worth
    sharing is shared as well: if each rank did it by itself, which takes no message, a tie decided
    differently would let the ranks make searches of different sizes from there on, and wait for
    each other forever. To let rank 0 do it and tell the others would only save one message of two.
    """
    if world.size == 1:
        return nearest

    def nearest_shared(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        if not len(points):  # on all ranks
            return nearest(points, centroids)
        part = world.shard(len(points))
        ids, cost = nearest(points[part.start : part.stop], world.broadcast(centroids.clone()))
        # In one message: the bits of the distances beside the ids, of which there are fewer than 2^31.
        both = torch.stack([ids.to(torch.int32), cost.contiguous().view(torch.int32)], dim=1)
        ids, cost = world.gather_shards(both, len(points)).unbind(1)
        return ids.to(torch.int64), cost.contiguous().view(torch.float32)

    return nearest_shared


def _nearest_torch(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid by ||c||^2 - 2 x.c, a block of points at a time."""
    rows = max(1, DISTANCES_AT_ONCE[points.device.type] // len(centroids))
    squared_norm = centroids.square().sum(1)
    blocks = torch.split(points, rows)
    found = [torch.addmm(squared_norm, block, centroids.T, alpha=-2).min(dim=1) for block in blocks]
    ids = torch.cat([f.indices for f in found])
    cost = torch.cat([f.values for f in found]) + points.square().sum(1)
    return ids, cost.clamp_(min=0)
