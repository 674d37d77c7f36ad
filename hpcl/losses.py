"""The contrastive losses: InfoNCE, NT-Xent, ProtoNCE and the top-K prototype loss.

Functions of tensors alone; each is differentiable in the queries, computes in at
least float32 whatever autocast is on, and never waits for the device (the one
exception is named in :func:`proto_columns`). With several ranks the queries are
one rank's part of the batch, while the columns come from the global batch.

Legend: B global batch, b batch of one rank, D embedding, K keys in the queue,
M prototypes (clusters) of a level, n columns of ProtoNCE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Targets = Literal["unique", "adjusted", "pcl"]


class Similarity(Protocol):
    """Logits of pairs of unit vectors; a head may have its own, for several similarities at once."""

    def pairs(self, u: Tensor, v: Tensor) -> Tensor:
        """(..., n): of row i of (n, D) with row i of (n, D)."""
        ...

    def against(self, u: Tensor, v: Tensor) -> Tensor:
        """(..., n, m): of each of (n, D) with each of (m, D)."""
        ...


@dataclass(frozen=True)
class Cosine:
    """``u.v / T``."""

    temperature: float
    """T, above 0."""

    def pairs(self, u: Tensor, v: Tensor) -> Tensor:
        """(n,)."""
        return (u * v).sum(dim=1) / self.temperature

    def against(self, u: Tensor, v: Tensor) -> Tensor:
        """(n, m)."""
        return u @ v.T / self.temperature


def info_nce(
    q: Tensor, k: Tensor, queue: Tensor, similarity: Similarity, keeps: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """InfoNCE of each query against its own key and the queue, and its top-1 accuracy.

    ``L = mean_i -log( exp(q_i.k_i/T) / (exp(q_i.k_i/T) + sum_j exp(q_i.queue_j/T)) )``
    (He et al., 2020, eq. 1). A query counts as right if its own key is more similar
    than every key in the queue; a tie is a miss, so a collapsed encoder scores 0.

    Args:
        q: (b, D) unit queries.
        k: (b, D) unit keys, key i of the same image as query i.
        queue: (K, D) unit keys of other images, K >= 1. It is saved for the backward
            pass: enqueue after that.
        similarity: the logits, of the paper `Cosine(T)` [moco_t].
        keeps: (b, K) bool each, negatives that count in the loss (:mod:`hpcl.selection`), which is
            then the mean over them; none: all count.

    Returns:
        (loss, accuracy), scalars; accuracy in 0..1, without gradient.
    """
    with torch.autocast(q.device.type, enabled=False):
        q = _full(q)
        own, others = similarity.pairs(q, k.to(q.dtype)), similarity.against(q, queue.to(q.dtype))
        if not keeps:
            return contrast(own, others)
        losses, accuracies = zip(*(contrast(own, others, keep) for keep in keeps), strict=True)
        return torch.stack(losses).mean(), accuracies[0]


def contrast(own: Tensor, others: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``mean -log( exp(own) / (exp(own) + sum_j exp(others_j)) )`` of logits, and how often own is largest.

    Args:
        own: (...) logits of the positives.
        others: (..., K) logits of the negatives.
        keep: bool, broadcast to `others`: the negatives that the loss counts; None: all. A row
            without any has loss 0. The accuracy counts all of them, so that it means the same
            with and without a selection.

    Returns:
        (loss, accuracy), scalars; accuracy in 0..1, without gradient.
    """
    counted = others if keep is None else others.masked_fill(~keep, -math.inf)
    loss = (torch.logaddexp(own, counted.logsumexp(dim=-1)) - own).mean()
    right = own.detach() > others.detach().amax(dim=-1)
    return loss, right.to(loss.dtype).mean()


def nt_xent(
    first: Tensor, second: Tensor, all_first: Tensor, all_second: Tensor, start: int, similarity: Similarity
) -> tuple[Tensor, Tensor]:
    """NT-Xent of two views of each image against the other views of the batch, and its top-1 accuracy.

    ``l(i, j) = -log( exp(z_i.z_j/T) / sum_{k != i} exp(z_i.z_k/T) )``, the mean over both
    views of every image, j the other view of i's image and k over all 2 B views (Chen et al.,
    2020, SimCLR, eq. 1).

    Args:
        first, second: (b, D) unit embeddings of the two views of this rank's images.
        all_first, all_second: (B, D) the same of the whole batch; with gradient, as negatives
            move too.
        start: place of this rank's images among the B.
        similarity: the logits, of the paper `Cosine(T)`.

    Returns:
        (loss, accuracy), scalars; accuracy in 0..1, without gradient.

    Raises:
        ValueError: B is 1: there is nothing to contrast with.
    """
    if len(all_first) < 2:
        raise ValueError("the batch has 1 image, but must have at least 2")
    with torch.autocast(first.device.type, enabled=False):
        first, second = _full(first), _full(second)
        views = torch.cat([_full(all_first), _full(all_second)])
        anchors = torch.cat([first, second])
        own, others = similarity.pairs(anchors, torch.cat([second, first])), similarity.against(anchors, views)
        # of its 2 B views an image's own two are no negatives
        places = torch.arange(len(first), device=first.device).repeat(2) + start
        image_of_view = torch.arange(len(all_first), device=first.device).repeat(2)
        return contrast(own, others.masked_fill(image_of_view == places.unsqueeze(1), -math.inf))


@dataclass(frozen=True)
class Columns:
    """The prototypes that ProtoNCE contrasts in one batch, and where each image's own stands."""

    ids: Tensor
    """(n,) long, prototype of each column."""
    target_of_image: Tensor
    """(B,) long, target column of each image of the global batch; a rank takes its part."""


def proto_columns(
    batch_ids: Tensor,
    num_clusters: int,
    targets: Targets,
    max_in_loss: int,
    negatives: int,
    generator: torch.Generator,
) -> Columns:
    """The columns of ProtoNCE at one level, for the whole batch of all ranks.

    - `unique`: each prototype once, target = the image's own. All M prototypes where
      M <= `max_in_loss`; else the batch's, in ascending order, and sampled negatives.
    - `pcl`: one column per image of the batch, in its order, target i for image i,
      then sampled negatives (Li et al., 2021, `main_pcl.py`). Images that share a
      prototype repeat it, and each counts the others' columns as wrong.
    - `adjusted`: the columns of `pcl`, target = the first that holds the image's
      prototype (seed 001). Loss and gradient equal `pcl`'s, for the target column
      holds the same vector; the accuracy does not.

    Negatives are drawn without repetition among the prototypes that no image of the
    batch belongs to, as many as there are and at most `negatives`.

    Args:
        batch_ids: (B,) long, cluster of each image of the global batch. On a GPU,
            sampled negatives cost one wait for the device; CPU tensors cost none.
        num_clusters: M, at least 1.
        targets: `unique`, `pcl` or `adjusted`.
        max_in_loss: largest M of which `unique` takes all prototypes.
        negatives: r, at least 0 [pcl_r].
        generator: CPU generator of the sample; the same on every rank.

    Raises:
        ValueError: unknown `targets`.
    """
    device, batch = batch_ids.device, len(batch_ids)
    if targets not in ("unique", "adjusted", "pcl"):
        raise ValueError(f"targets is {targets!r}, but must be unique, adjusted or pcl")
    if targets == "unique" and num_clusters <= max_in_loss:
        return Columns(torch.arange(num_clusters, device=device), batch_ids)

    in_batch = torch.zeros(num_clusters, dtype=torch.bool, device=device)
    in_batch[batch_ids] = True
    # At most B prototypes are in the batch, so r + B candidates hold r others if there are r.
    candidates = torch.randperm(num_clusters, generator=generator)[: negatives + batch].to(device)
    sampled = candidates[~in_batch[candidates]][:negatives]

    if targets == "unique":
        positives, target = torch.unique(batch_ids, sorted=True, return_inverse=True)
    else:
        positives, target = batch_ids, torch.arange(batch, device=device)
        if targets == "adjusted":
            target = _first_column(batch_ids, num_clusters)[batch_ids]
    return Columns(torch.cat([positives, sampled]), target)


def proto_nce(
    q: Tensor,
    prototypes: Tensor,
    concentration: Tensor,
    columns: Tensor,
    target: Tensor,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ProtoNCE of each query at one level, and its top-1 accuracy.

    ``L = mean_i -log( exp(q_i.c_s/phi_s) / sum_j exp(q_i.c_j/phi_j) )`` with s the
    prototype of the target column and j over all columns (Li et al., 2021, eq. 11).
    A query is right if the FIRST column of the prototype with the largest logit is
    its target: where columns repeat (`pcl`), one image per prototype can be right,
    and accuracy has the ceiling :func:`pcl_ceiling`.

    Args:
        q: (b, D) unit queries.
        prototypes: (M, D) unit, without gradient.
        concentration: (M,) phi of each prototype, above 0.
        columns: (n,) long, `Columns.ids`.
        target: (b,) long, this rank's part of `Columns.target_of_image`.
        keep: (b, M) bool, the prototypes that count in a query's loss (:mod:`hpcl.selection`),
            its own always; None: all. The accuracy counts all.

    Returns:
        (loss, accuracy), scalars; accuracy in 0..1, without gradient.
    """
    with torch.autocast(q.device.type, enabled=False):
        q = _full(q)
        scaled = (_full(prototypes) / _full(concentration).unsqueeze(1))[columns].to(q.dtype)
        logits = q @ scaled.T
        counted = logits if keep is None else logits.masked_fill(~keep[:, columns], -math.inf)
        loss = F.cross_entropy(counted, target)
        # Equal columns may differ in the last bit of the product, so argmax alone
        # could name any of them.
        first = _first_column(columns, len(prototypes))
        right = first[columns[logits.detach().argmax(dim=1)]] == target
    return loss, right.to(loss.dtype).mean()


def topk_loss(
    q: Tensor,
    prototypes: Tensor,
    own: Tensor,
    k: int,
    far_weight: float,
    margin: float,
    weights: Literal["inverse", "softmax", "uniform"] = "inverse",
    far: Literal["mean", "sum"] = "mean",
    eps: float = 1e-6,
) -> Tensor:
    """Top-K prototype loss: the K nearest prototypes attract, the others repel.

    ``L_i = sum_{near} w d^2 + lambda mean_{far} max(0, alpha - d^2)``,
    ``d^2 = |q - c|^2 = 2 - 2 q.c`` (seed 001, which sums over the far ones). Near are
    the query's own prototype and its nearest others, K' = max(1, min(K, M - 1)) in
    all; far is the rest, which counts 0 where it is empty (M = 1). The weights sum
    to 1 and carry no gradient.

    Args:
        q: (b, D) unit queries.
        prototypes: (M, D) unit, without gradient, M >= 1.
        own: (b,) long, cluster of each query.
        k: K, at least 1.
        far_weight: lambda, at least 0; useful in 0.01..1.
        margin: alpha, squared distance; useful in 0.5..2 (unrelated vectors sit at 2).
        weights: `inverse` 1/(d^2 + eps), `softmax` exp(-d^2), or `uniform`.
        far: `mean`, or the notes' `sum`, which grows with M.
        eps: keeps `inverse` finite at distance 0.

    Returns:
        Scalar, mean over the queries, at least 0.

    Raises:
        ValueError: k < 1, or unknown `weights` or `far`.
    """
    if k < 1:
        raise ValueError(f"k is {k}, but must be >= 1")
    if far not in ("mean", "sum"):
        raise ValueError(f"far is {far!r}, but must be mean or sum")
    num_clusters = len(prototypes)
    num_near = max(1, min(k, num_clusters - 1))
    with torch.autocast(q.device.type, enabled=False):
        q = _full(q)
        squared = (2.0 - 2.0 * q @ prototypes.to(q.dtype).T).clamp_min(0.0)
        # The own prototype goes first in the order, however far it lies.
        order = squared.detach().scatter(1, own.unsqueeze(1), -1.0)
        near_ids = order.topk(num_near, dim=1, largest=False).indices
        near = squared.gather(1, near_ids)
        attraction = (_near_weights(near.detach(), weights, eps) * near).sum(dim=1)

        is_near = torch.zeros_like(squared, dtype=torch.bool).scatter(1, near_ids, True)
        repulsion = (margin - squared).clamp_min(0.0).masked_fill(is_near, 0.0).sum(dim=1)
        if far == "mean":
            repulsion = repulsion / max(1, num_clusters - num_near)
        return (attraction + far_weight * repulsion).mean()


def pcl_ceiling(k: int, batch: int) -> float:
    """Largest expected acc_proto in `pcl` mode: ``(k/B) (1 - (1 - 1/k)^B)``.

    Only one image per prototype can be right, and a batch of B images spread evenly
    over k clusters holds k (1 - (1 - 1/k)^B) different ones on average. The notes'
    5.3 % at 4 clusters and a batch of 64 was this ceiling, not a failure to learn.

    Args:
        k: clusters, at least 1.
        batch: B, images in the global batch, at least 1.

    Returns:
        A fraction in 0..1.

    Example:
        >>> round(pcl_ceiling(4, 64), 4)
        0.0625
    """
    if k < 1 or batch < 1:
        raise ValueError(f"k is {k} and batch is {batch}, but both must be >= 1")
    if k == 1:
        return 1 / batch
    # expm1 and log1p keep the digits that 1 - (1 - 1/k)^B loses at large k.
    return -(k / batch) * math.expm1(batch * math.log1p(-1 / k))


def _near_weights(near: Tensor, weights: str, eps: float) -> Tensor:
    """(b, K') weights of the near prototypes, rows summing to 1."""
    if weights == "inverse":
        return F.normalize(1.0 / (near + eps), p=1.0, dim=1)
    if weights == "softmax":
        return F.softmax(-near, dim=1)
    if weights == "uniform":
        return torch.full_like(near, 1.0 / near.shape[1])
    raise ValueError(f"weights is {weights!r}, but must be inverse, softmax or uniform")


def _first_column(columns: Tensor, num_clusters: int) -> Tensor:
    """(M,) long: first place of each prototype among the columns (n,), n where it has none."""
    places = torch.arange(len(columns), device=columns.device)
    start = torch.full((num_clusters,), len(columns), device=columns.device)
    return start.scatter_reduce(0, columns, places, reduce="amin")


def _full(x: Tensor) -> Tensor:
    """At least float32: half-precision logits tie, and ties make accuracies lie."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
