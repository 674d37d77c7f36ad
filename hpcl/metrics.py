"""Meters: curves that are the same function for every trial, and signs of collapse.

All are pure functions of features. A value that is undefined (too few rows,
features that are not finite) is None, never 0 or NaN.
Legend: N images; V fixed views; M clusters of the reference level; D embedding.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hpcl.kmeans import bounded_kmeans
from hpcl.rng import generator
from hpcl.sections import Meters

METER_TEMPERATURE = 0.1
"""T of `nce_ref` and of `proto_bits`; a constant, so that trials with another T compare."""

REFERENCE_CLUSTERS = 100
"""Clusters of the reference level where the images suffice for them."""

IMAGES_PER_REFERENCE_CLUSTER = 40
"""Fewer images than this per cluster lower the reference count."""

REFERENCE_TOLERANCE = 1 / 3
"""Size bounds of the reference level: they make a collapsed encoder score about 1/M."""

COLD_ITERATIONS, WARM_ITERATIONS = 20, 4
"""Lloyd iterations of the reference level; constants, for the same reason."""


class MeterImages(NamedTuple):
    """Which training images the meters look at; positions 0..N-1, sorted."""

    reference: NDArray[np.int64]
    """(Nr,) positions among the training images that the reference level is clustered on."""
    views: NDArray[np.int64]
    """(V,) positions within `reference` of the images with fixed views."""


def meter_images(meters: Meters, num_images: int, seed: int) -> MeterImages:
    """The fixed subsets: at most `images` for the reference level, of them min(views, N/8) with views.

    >>> [len(part) for part in meter_images(Meters(), 4000, seed=0)]
    [4000, 500]
    """
    draw = generator(seed, "reference")
    usable = min(meters.images, num_images)
    reference = torch.randperm(num_images, generator=draw)[:usable].sort().values
    views = torch.randperm(usable, generator=draw)[: max(1, min(meters.views, num_images // 8, usable))].sort().values
    return MeterImages(reference.numpy(), views.numpy())


def reference_count(meters: Meters, num_images: int) -> int:
    """M: `reference_clusters`, or by default 100, or a 40th of the clustered images where that is fewer (>= 2).

    >>> reference_count(Meters(), 50_000), reference_count(Meters(), 3_000)
    (100, 75)
    """
    if meters.reference_clusters is not None:
        return meters.reference_clusters
    usable = min(meters.images, num_images)
    return max(min(2, usable), min(REFERENCE_CLUSTERS, usable // IMAGES_PER_REFERENCE_CLUSTER))


class ReferenceLevel(NamedTuple):
    """The clusters that the comparable meters refer to."""

    cluster_of_image: Tensor
    """(Nr,) long; warm start of the next epoch's level."""
    prototypes: Tensor
    """(M, D) unit: normalised means of the clusters."""
    sizes: Tensor
    """(M,) long, within a third of the mean size."""


def reference_level(
    features: Tensor,
    num_clusters: int,
    seed: int,
    labels: Tensor | None = None,
    backend: Literal["auto", "faiss", "torch"] = "auto",
) -> ReferenceLevel:
    """Cluster the reference images; sizes are bounded, so a collapsed encoder cannot look good.

    Args:
        features: (Nr, D) unit float32, key embeddings of the centre views (eval mode).
        num_clusters: M, see :func:`reference_count`.
        seed: from a stream of its own.
        labels: (Nr,) long, the previous epoch's `cluster_of_image`, or None.
        backend: nearest-centroid search: auto, faiss or torch.

    Raises:
        ValueError: features that are not finite.
    """
    found = bounded_kmeans(
        features,
        num_clusters,
        tolerance=REFERENCE_TOLERANCE,
        seed=seed,
        iterations=COLD_ITERATIONS if labels is None else WARM_ITERATIONS,
        labels=labels,
        backend=backend,
    )
    return ReferenceLevel(found.labels, F.normalize(found.centroids.to(features), dim=1), found.sizes)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)


@torch.no_grad()
def proto_bits(
    q: Tensor, own: Tensor, prototypes: Tensor, sizes: Tensor, temperature: float = METER_TEMPERATURE
) -> float | None:
    """Information in bits that queries carry about their cluster: ``(H(C) - CE) / ln 2``.

    CE is the cross-entropy of the logits ``q . c_j / T`` with the own cluster as target,
    H(C) the entropy of the cluster sizes in nats. 0 at chance with equal sizes, at most
    log2 M; negative where confident and wrong.

    Args:
        q: (V, D) unit queries.
        own: (V,) long, cluster of each query's image.
        prototypes: (M, D) unit.
        sizes: (M,) long, images per cluster.
        temperature: T.
    """
    if not len(q) or not _finite(q, prototypes):
        return None
    ce = float(F.cross_entropy((q @ prototypes.T).double() / temperature, own))
    return (_entropy(sizes) - ce) / math.log(2)


def _entropy(sizes: Tensor) -> float:
    """Entropy in nats of counts (M,)."""
    p = sizes.double() / sizes.sum()
    return float(torch.special.entr(p).sum())


@torch.no_grad()
def fixed_view_meters(q: Tensor, k: Tensor, own: Tensor, prototypes: Tensor, sizes: Tensor) -> dict[str, float | None]:
    """The comparable meters of one epoch, on the fixed views.

    - `acc_proto_ref`: fraction of queries whose nearest prototype by cosine is their own
      cluster's; about 1/M for a collapsed encoder.
    - `proto_bits`: see :func:`proto_bits`.
    - `inst_ref`: fraction of queries whose nearest of all V keys is their own image's.
    - `nce_ref`: InfoNCE in nats of the same pairs at T = 0.1; lower is better, ln V at chance.

    Args:
        q: (V, D) unit, one fixed view of each image through the query encoder (eval mode).
        k: (V, D) unit, the other view through the key encoder (eval mode).
        own: (V,) long, reference cluster of each image.
        prototypes: (M, D) unit, of the reference level.
        sizes: (M,) long, of the reference level.
    """
    names = ("acc_proto_ref", "proto_bits", "inst_ref", "nce_ref")
    if not len(q) or not _finite(q, k, prototypes):
        return dict.fromkeys(names)
    images = torch.arange(len(q), device=q.device)
    pairs = q @ k.T
    nearest = (q @ prototypes.T).argmax(dim=1)
    return {
        "acc_proto_ref": float((nearest == own).double().mean()),
        "proto_bits": proto_bits(q, own, prototypes, sizes),
        "inst_ref": float((pairs.argmax(dim=1) == images).double().mean()),
        "nce_ref": float(F.cross_entropy(pairs.double() / METER_TEMPERATURE, images)),
    }


@torch.no_grad()
def feature_std(features: Tensor) -> float | None:
    """Mean over dimensions of the standard deviation of (N, D) unit rows, times sqrt(D).

    0 where all rows are equal (collapse), 1 where they fill the sphere evenly, never more;
    None for fewer than 2 rows. As in SimSiam (Chen & He 2021), figure 2.
    """
    if len(features) < 2 or not _finite(features):
        return None
    return float(features.double().std(dim=0, correction=0).mean()) * math.sqrt(features.shape[1])


@torch.no_grad()
def effective_rank(features: Tensor) -> float | None:
    """``exp(H(p))`` with p the singular values of (N, D) features over their sum; 1..min(N, D).

    Roy & Vetterli 2007; RankMe (Garrido et al. 2023). Rows are not centred, so a
    collapsed encoder has rank 1. None for no rows or rows that are all zero.
    """
    if not features.numel() or not _finite(features):
        return None
    x = features.double()
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    total = float(singular.sum())
    if total == 0.0:
        return None
    return math.exp(float(torch.special.entr(singular / total).sum()))


def size_entropy(sizes: Tensor) -> float | None:
    """Entropy of the cluster sizes (M,) over its maximum ln M: 1 for equal sizes; None for M = 1."""
    if len(sizes) < 2 or int(sizes.sum()) == 0:
        return None
    return min(1.0, _entropy(sizes) / math.log(len(sizes)))


def churn_ami(previous: Tensor | None, current: Tensor) -> float | None:
    """Adjusted mutual information of two assignments (N,) long: 1 the same clusters, 0 as by chance.

    ``(MI - E) / ((H1 + H2) / 2 - E)`` with E the mean of MI over random assignments of the
    same sizes (Vinh, Epps & Bailey 2010). Numbering does not matter and the numbers of
    clusters may differ. None without a previous assignment of the same images, or where
    the two can only be the same (one cluster each, or one image per cluster).

    Equal to scikit-learn's adjusted_mutual_info_score, whose E takes a term per pair of
    clusters (12 s for 45,000 images in 4,500); here pairs of equal sizes share a term.
    """
    if previous is None or len(previous) != len(current) or not len(current):
        return None
    _, a = np.unique(previous.cpu().numpy(), return_inverse=True)
    _, b = np.unique(current.cpu().numpy(), return_inverse=True)
    n = len(a)
    rows, columns = np.bincount(a), np.bincount(b)
    cells, together = np.unique(a.astype(np.int64) * len(columns) + b, return_counts=True)
    expected_together = rows[cells // len(columns)] * (columns[cells % len(columns)] / n)
    mutual = float((together / n * np.log(together / expected_together)).sum())
    entropy = float(sum(-(s / n * np.log(s / n)).sum() for s in (rows, columns))) / 2
    expected = _expected_mutual_information(rows, columns)
    if entropy - expected < 1e-12:
        return None
    return (mutual - expected) / (entropy - expected)


def _expected_mutual_information(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> float:
    """E of :func:`churn_ami`, in nats: the hypergeometric mean of MI given both assignments' sizes."""
    n = int(rows.sum())
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    row_sizes, row_counts = np.unique(rows, return_counts=True)
    column_sizes, column_counts = np.unique(columns, return_counts=True)
    total = 0.0
    for a, num_a in zip(row_sizes, row_counts, strict=True):
        for b, num_b in zip(column_sizes, column_counts, strict=True):
            t = np.arange(max(1, a + b - n), min(a, b) + 1)  # images the two clusters may share
            log_p = (
                log_factorial[a]
                + log_factorial[b]
                + log_factorial[n - a]
                + log_factorial[n - b]
                - log_factorial[n]
                - log_factorial[t]
                - log_factorial[a - t]
                - log_factorial[b - t]
                - log_factorial[n - a - b + t]
            )
            shared = t / n * np.log(t * (n / a / b))
            total += float(num_a * num_b * (shared * np.exp(log_p)).sum())
    return total
