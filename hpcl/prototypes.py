"""Prototypes of one cluster level: its means, their concentrations and its sizes.

Sums over clusters are done in float64 and in a fixed order on every device, so
that the same assignment gives the same prototypes bit for bit.

Legend: N images, D embedding, M prototypes (clusters) of the level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcl.kmeans import group_sums

COLLAPSED = 1e-12
"""Mean concentration below which the clusters have no width, and all get T."""

LEAST_CONCENTRATION = 1e-3
"""Least phi as a fraction of T. Only clusters of identical points come below: their
phi is 0 even after the clip if more than a tenth of the clusters are such, and a
logit is divided by it."""

_ROWS = 65_536
"""Rows whose distances are taken at a time, to bound the memory."""

_COLUMNS = 64
"""Columns summed in float64 at a time, to bound the memory."""


@dataclass(frozen=True, eq=False)
class Level:
    """One level of clusters over the training images, as the losses use it."""

    cluster_of_image: Tensor
    """(N,) long, cluster of each training image."""
    prototypes: Tensor
    """(M, D) unit vectors: the normalised means of the clusters."""
    concentration: Tensor
    """(M,) phi, the temperature of each prototype; mean T."""
    sizes: Tensor
    """(M,) long, images in each cluster; at least 1."""
    parent: Tensor | None = None
    """(M,) long, prototype of the next coarser level above each; None on the coarsest."""

    @property
    def num_clusters(self) -> int:
        """M."""
        return len(self.prototypes)


def make_level(
    cluster_of_image: Tensor,
    embeddings: Tensor,
    num_clusters: int,
    temperature: float,
    centroids: Tensor | None = None,
) -> Level:
    """The level that an assignment makes in the space of these embeddings.

    The embeddings need not be what was clustered: stage 2 clusters the encoder's
    outputs and takes prototypes and concentrations among the MLP's outputs.

    Args:
        cluster_of_image: (N,) long, 0..M-1, no cluster empty.
        embeddings: (N, D) unit vectors, float32 or float64.
        num_clusters: M.
        temperature: T, mean of the concentrations.
        centroids: (M, D) centres, not normalised; None: the means of the clusters.

    Raises:
        ValueError: a cluster is empty.
    """
    embeddings = embeddings.detach()
    sizes = torch.bincount(cluster_of_image, minlength=num_clusters)
    empty = torch.nonzero(sizes == 0).flatten().tolist()
    if empty or len(sizes) != num_clusters:
        raise ValueError(
            f"cluster_of_image has {len(sizes)} clusters with {empty} empty, but must fill all of {num_clusters}"
        )
    if centroids is None:
        centroids = _sums(embeddings, cluster_of_image, num_clusters) / sizes.unsqueeze(1)
    return Level(
        cluster_of_image=cluster_of_image,
        prototypes=F.normalize(centroids, dim=1).to(embeddings.dtype),
        concentration=concentration(embeddings, cluster_of_image, centroids, temperature),
        sizes=sizes,
    )


def parents(prototypes: Tensor, above: Tensor) -> Tensor:
    """(M,) long: the nearest of the prototypes above (M', D) for each of (M, D), by cosine."""
    return (prototypes @ above.T).argmax(dim=1)


def balanced(levels: Sequence[Level], shrink: float, parent: float, temperature: float) -> list[Level]:
    """The levels with concentrations that differ less and follow those above (the notes' balanced density).

    ``phi <- phi^(1 - b)``, rescaled to mean T; then from coarse to fine
    ``phi_c <- (1 - beta) phi_c + beta phi_parent(c)``, rescaled again.

    Args:
        levels: coarse to fine, each but the first with its `parent`.
        shrink: b in 0..1; 0 leaves phi as it is.
        parent: beta in 0..1; 0 leaves phi as it is.
        temperature: T, above 0.
    """
    if not shrink and not parent:
        return list(levels)
    result: list[Level] = []
    for level in levels:
        phi = level.concentration.double() ** (1.0 - shrink)
        phi = phi * (temperature / phi.mean())
        if result and level.parent is not None:
            phi = (1.0 - parent) * phi + parent * result[-1].concentration.double()[level.parent]
            phi = phi * (temperature / phi.mean())
        result.append(replace(level, concentration=phi.to(level.concentration.dtype)))
    return result


def concentration(features: Tensor, cluster_of_image: Tensor, centroids_raw: Tensor, temperature: float) -> Tensor:
    """phi of each cluster: how wide it is, scaled to mean T (Li et al., 2021, eq. 12).

    1. ``phi_c = mean |v - c| / ln(|c| + 10)`` over the cluster's images v, with c the
       raw mean, not the unit prototype, and ``|c|`` the cluster's size;
    2. if the mean phi is below 1e-12, phi = T for all (collapsed features);
    3. clusters of at most one image get the largest phi;
    4. clip to the 10th and 90th percentile, rescale to mean T.

    Where identical images leave a phi at 0 after the clip, it is raised to a
    thousandth of T, so that logits stay finite; only then is the mean above T.

    Args:
        features: (N, D) unit vectors.
        cluster_of_image: (N,) long, 0..M-1.
        centroids_raw: (M, D) means of the clusters, not normalised.
        temperature: T, above 0.

    Returns:
        (M,) in the dtype of `features`, above 0.
    """
    num_clusters = len(centroids_raw)
    sizes = torch.bincount(cluster_of_image, minlength=num_clusters)
    centroids = centroids_raw.to(features.dtype)
    distances = torch.cat(
        [
            torch.linalg.vector_norm(rows - centroids[ids], dim=1)
            for rows, ids in zip(torch.split(features, _ROWS), torch.split(cluster_of_image, _ROWS), strict=True)
        ]
    )
    sums = _sums(distances.unsqueeze(1), cluster_of_image, num_clusters).squeeze(1)
    several = sizes > 1
    phi = torch.where(several, sums / sizes.clamp_min(1) / torch.log(sizes.double() + 10.0), 0.0)
    wide = phi.mean() >= COLLAPSED
    phi = torch.where(several, phi, phi.max())
    low, high = torch.quantile(phi, torch.tensor([0.1, 0.9], dtype=phi.dtype, device=phi.device))
    phi = phi.clamp(low, high)
    # The clip alone can bring all to 0: one wide cluster among many of identical images.
    mean = phi.mean()
    phi = temperature * phi / mean.clamp_min(COLLAPSED)
    phi = torch.where(wide & (mean >= COLLAPSED), phi, temperature)
    return phi.clamp_min(LEAST_CONCENTRATION * temperature).to(features.dtype)


def _sums(x: Tensor, cluster_of_image: Tensor, num_clusters: int) -> Tensor:
    """(M, D) float64 sums of the rows (N, D) of each cluster; a few columns at a time to save memory."""
    parts = [group_sums(part.double(), cluster_of_image, num_clusters) for part in torch.split(x, _COLUMNS, dim=1)]
    return torch.cat(parts, dim=1)
