"""Which negatives a query is contrasted with: HCSC's selection by the clusters (Guo et al., CVPR 2022).

A key that probably lies in the query's own cluster is no good negative, nor is a prototype
that probably lies below the same coarser prototype. Each is kept with the probability that
it does not, drawn anew at every step. What is not kept is left out of the sum over the
negatives; the authors' code multiplies its similarity by 0 instead, which leaves a negative
of similarity 0 there.

Legend: b queries, K keys in the queue, D embedding, M prototypes of a level, M' of the next coarser one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcl.prototypes import Level

_KEYS = 4096
"""Keys whose memberships in all prototypes are held at a time, to bound the memory."""


def uniform(seed: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) uniform in 0..1, drawn on the device: millions at each step are too many to carry there."""
    return torch.rand(rows, columns, generator=torch.Generator(device).manual_seed(seed), device=device)


@torch.no_grad()
def membership(x: Tensor, level: Level) -> Tensor:
    """(n, M): how probably each of (n, D) belongs to each prototype, ``softmax_c(x.c / phi_c)``; rows sum to 1."""
    with torch.autocast(x.device.type, enabled=False):
        scaled = level.prototypes / level.concentration.unsqueeze(1)
        return F.softmax(x.to(scaled.dtype) @ scaled.T, dim=1)


@torch.no_grad()
def instance_negatives(queue: Tensor, own: Tensor, level: Level, draw: Tensor) -> Tensor:
    """(b, K) bool: the keys that are negatives of each query, ``p(z_j; c) = 1 - membership of z_j in c``.

    Args:
        queue: (K, D) unit keys.
        own: (b,) long, prototype c of each query.
        level: the prototypes.
        draw: (b, K) uniform in 0..1: kept where it is below the probability.
    """
    parts = [membership(keys, level).T[own] for keys in torch.split(queue, _KEYS)]
    return draw < 1.0 - torch.cat(parts, dim=1)


@torch.no_grad()
def prototype_negatives(level: Level, above: Level, own: Tensor, draw: Tensor) -> Tensor:
    """(b, M) bool: the prototypes that count in each query's ProtoNCE, its own always.

    ``p(c_j; c) = 1 - membership of c_j in the parent of c``. The coarsest level has
    no parents, and keeps all: do not ask for it.

    Args:
        level: the prototypes c, with their `parent`.
        above: the next coarser level.
        own: (b,) long, prototype of each query.
        draw: (b, M) uniform in 0..1.

    Raises:
        ValueError: the level has no parents.
    """
    if level.parent is None:
        raise ValueError("the level has no parents: it is the coarsest, which keeps all its prototypes")
    keep = draw < 1.0 - membership(level.prototypes, above).T[level.parent[own]]
    return keep.scatter(1, own.unsqueeze(1), True)
