"""The cluster levels of a run: how many, what each starts from, and their prototypes.

METHOD 3: L consecutive counts of the sequence are in use at once; growth moves
the window of counts by one, so every level keeps the assignment of the level
that had its count, and only the finest is new: it is split from the old finest.

With ``clusters.nesting: tree`` the finest level alone is clustered; each coarser one
groups the prototypes below it (HCSC, Guo et al. 2022).

Legend: N training images, D embedding, M clusters of a level, L levels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hpcl import metrics
from hpcl.checkpoint import foreign
from hpcl.config import Config
from hpcl.dist import World
from hpcl.growth import level_counts
from hpcl.kmeans import bounded_kmeans, cluster_means, split_labels
from hpcl.methods import METHODS
from hpcl.prototypes import Level, balanced, make_level, parents
from hpcl.rng import seed_of


class Hierarchy:
    """Levels in use, coarse to fine, and the assignments the next clustering starts from."""

    def __init__(self, config: Config, num_images: int) -> None:
        self._config = config
        self._options = config.clusters
        most = max(1, num_images // 10) if METHODS[config.method].grows else num_images
        self.maximum = min(config.clusters.maximum or most, num_images)
        """Largest count of the finest level."""
        self._position = 0
        self._labels: list[Tensor] = []

    @property
    def counts(self) -> tuple[int, ...]:
        """Clusters per level, coarse to fine; levels above `maximum` are left out (one always stays)."""
        if self._options.counts is not None:
            return self._options.counts
        counts = self._counts_at(self._position)
        return tuple(c for c in counts if c <= self.maximum) or (min(counts[0], self.maximum),)

    @property
    def next_finest(self) -> int:
        """Count of the finest level after one more growth."""
        return self._counts_at(self._position + 1)[-1]

    def grow(self) -> None:
        """Move the counts by one; every assignment goes to the level that has its count now."""
        self._position += 1
        self._labels = self._labels[1:] or self._labels

    def cluster(self, features: Tensor, embeddings: Tensor, *, stage: int, epoch: int, world: World) -> list[Level]:
        """Cluster the training images at every level.

        Args:
            features: (N, D) unit vectors of the space that is clustered.
            embeddings: (N, D) unit vectors of the space prototypes live in.
            stage, epoch: name the random stream.
            world: the ranks, which all hold the same features and labels; they share the nearest-centroid
                searches, and the assignment is rank 0's.

        Returns:
            One level per count, coarse to fine.
        """
        counts, tree = self.counts, self._options.nesting == "tree"
        labels: list[Tensor] = []
        for depth in [len(counts) - 1] if tree else range(len(counts)):
            parent = labels[-1] if labels else None
            seed = self._seed(stage, epoch, depth)
            labels.append(world.broadcast(self._assign(features, counts[depth], depth, parent, seed, world)))
        temperature, density = self._config.moco.temperature, self._config.density
        if tree:
            levels = self._tree(labels[-1], features, embeddings, stage, epoch, world)
        else:
            levels = [
                make_level(assignment, embeddings, count, temperature)
                for assignment, count in zip(labels, counts, strict=True)
            ]
            for depth in range(1, len(levels)):
                above = parents(levels[depth].prototypes, levels[depth - 1].prototypes)
                levels[depth] = replace(levels[depth], parent=above)
        self._labels = [level.cluster_of_image for level in levels]
        return balanced(levels, density.shrink, density.parent, temperature)

    def _tree(
        self, finest: Tensor, features: Tensor, embeddings: Tensor, stage: int, epoch: int, world: World
    ) -> list[Level]:
        """Levels coarse to fine, each coarser one grouping the prototypes of the one below.

        They are grouped in the space that is clustered. A coarse prototype is the mean of those
        below it, each counted once.
        """
        counts, temperature = self.counts, self._config.moco.temperature
        levels = [make_level(finest, embeddings, counts[-1], temperature)]
        centres = levels[0].prototypes
        if features is not embeddings:
            centres = make_level(finest, features, counts[-1], temperature).prototypes
        for depth in reversed(range(len(counts) - 1)):
            below = levels[0]
            groups = bounded_kmeans(
                centres,
                counts[depth],
                tolerance=None,
                seed=self._seed(stage, epoch, depth),
                iterations=self._options.iterations,
                backend=self._options.backend,
            ).labels
            groups = world.broadcast(groups)
            levels[0] = replace(below, parent=groups)
            means, _ = cluster_means(below.prototypes, groups, counts[depth])
            levels.insert(0, make_level(groups[below.cluster_of_image], embeddings, counts[depth], temperature, means))
            centres = normalize(cluster_means(centres, groups, counts[depth])[0], dim=1)
        return levels

    def _seed(self, stage: int, epoch: int, depth: int) -> int:
        return seed_of(self._config.seed, "cluster", stage, epoch, depth)

    def _assign(
        self, features: Tensor, count: int, depth: int, parent: Tensor | None, seed: int, world: World
    ) -> Tensor:
        """One level: from its own last assignment, else split from the level above, else from scratch."""
        start: Tensor | None = None
        if self._options.warm:
            previous = self._labels[depth] if depth < len(self._labels) else None
            known = previous if previous is not None else (self._labels[-1] if self._labels else parent)
            if known is not None:
                start = known.to(features.device)
                present = int(start.max()) + 1
                if present != count:
                    # Which half of a cluster a point falls into is a matter of rounding: rank 0 decides.
                    is_first = world.rank == 0
                    start = split_labels(features, start, present, count, seed=seed) if is_first else start.clone()
                    world.broadcast(start)
        result = bounded_kmeans(
            features,
            count,
            tolerance=self._options.size_tolerance,
            seed=seed,
            iterations=self._options.iterations if start is None else self._options.warm_iterations,
            labels=start,
            backend=self._options.backend,
            world=world,
        )
        return result.labels

    @property
    def finest_labels(self) -> Tensor | None:
        """(N,) assignment of the finest level at the last clustering."""
        return self._labels[-1] if self._labels else None

    def _counts_at(self, position: int) -> tuple[int, ...]:
        return level_counts(self._options.first, self._options.multiplier, position, self._options.levels)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the position in the count sequence and the assignments."""
        return {"position": self._position, "labels": [x.to("cpu", torch.int32) for x in self._labels]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._position = int(state["position"])
        self._labels = [x.to(torch.long) for x in state["labels"]]


def describe(levels: list[Level], previous: Tensor | None) -> dict[str, Any]:
    """Columns of an epoch about the cluster levels in use; `previous` is the last assignment of the finest."""
    if not levels:
        return {"clusters": None, "level_clusters": None}
    finest = levels[-1]
    return {
        "clusters": finest.num_clusters,
        "level_clusters": "/".join(str(level.num_clusters) for level in levels),
        "size_min": int(finest.sizes.min()),
        "size_max": int(finest.sizes.max()),
        "size_entropy": metrics.size_entropy(finest.sizes),
        "churn_ami": metrics.churn_ami(previous, finest.cluster_of_image),
    }


def saved_assignments(state: dict[str, Any], num_images: int, where: Path | str) -> list[Tensor]:
    """(N,) long assignment of the training images at each level of a checkpoint, coarse to fine, checked.

    Args:
        state: of :func:`hpcl.checkpoint.load_checkpoint`.
        num_images: N.
        where: the checkpoint, for the message.

    Raises:
        UnreadableCheckpoint: there is none, or not such as a run on N images writes.
    """
    try:
        assignments = [x.to(torch.long) for x in state["hierarchy"]["labels"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise foreign(where, f"no assignments ({type(error).__name__}: {error})") from error
    if not assignments:
        raise foreign(where, "no assignments")
    for x in assignments:
        if x.shape != (num_images,):
            raise foreign(where, f"an assignment of {len(x.flatten())} images, but there are {num_images}")
        # A number that is no cluster's would be asked for memory: as many clusters as it says.
        if int(x.min()) < 0 or int(x.max()) >= num_images or not bool(x.bincount().all()):
            raise foreign(where, "an assignment with clusters that are empty or do not exist")
    return assignments
