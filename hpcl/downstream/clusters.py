"""Task `clusters`: how well clusters of the training images agree with their labels.

Two kinds of clusters are compared with the labels of the training images. `k-means`, the same for every encoder: this
project's bounded k-means (:mod:`hpcl.kmeans`, a cold start by seed, sizes within the configuration's tolerance) of
backbone features scaled to length 1, with as many clusters as there are classes and as many as the finest level has.
`level`, of the trained network alone: the assignments that the checkpoint holds, whose prototypes the loss used.
Measures: AMI, adjusted mutual information (Vinh, Epps & Bailey 2010), 0 as by chance and 1 for the same partition; ARI,
adjusted Rand index (Hubert & Arabie 1985), likewise; purity, the share of images whose label is the most frequent one
of their cluster, which rises with the number of clusters by itself. Only training images are looked at.

Legend: N training images; F features; M clusters; Y classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from hpcl.checkpoint import foreign
from hpcl.downstream import refusals
from hpcl.downstream.bench import Bench
from hpcl.downstream.scores import Encoder, Score
from hpcl.hierarchy import saved_assignments
from hpcl.kmeans import bounded_kmeans
from hpcl.metrics import churn_ami
from hpcl.rng import seed_of
from hpcl.sections import Clusters
from hpcl.stages import make_plan, stage_at, total_epochs

ITERATIONS = 50
"""Lloyd iterations at most; a constant, so that trials with another ``clusters.iterations`` compare."""

TOLERANCE = 1 / 3
"""Bound on sizes (:func:`hpcl.kmeans.size_bounds`), the notes'; a constant for the same reason, whatever the method."""


MEASURES = ("AMI", "ARI", "purity")


def purity(labels: Tensor, clusters: Tensor) -> float:
    """Share of images whose label is the most frequent one of their cluster, above 0 and at most 1.

    Args:
        labels: (N,) long >= 0, N >= 1.
        clusters: (N,) long >= 0.

    >>> purity(Tensor([0, 0, 1, 1]).long(), Tensor([0, 0, 0, 1]).long())
    0.75
    """
    num_labels, num_clusters = int(labels.max()) + 1, int(clusters.max()) + 1
    table = (clusters * num_labels + labels).bincount(minlength=num_clusters * num_labels)
    return int(table.view(num_clusters, num_labels).amax(dim=1).sum()) / len(labels)


def agreement(labels: Tensor, clusters: Tensor) -> dict[str, float]:
    """`AMI`, `ARI` and `purity` of (N,) labels and clusters; NaN for an AMI that is undefined (one cluster, one class).

    AMI is :func:`hpcl.metrics.churn_ami`, equal to scikit-learn's; ARI is scikit-learn's.
    """
    from sklearn.metrics import adjusted_rand_score

    labels, clusters = labels.cpu(), clusters.cpu()
    ami = churn_ami(labels, clusters)
    return {
        "AMI": math.nan if ami is None else ami,
        "ARI": float(adjusted_rand_score(labels.numpy(), clusters.numpy())),
        "purity": purity(labels, clusters),
    }


def kmeans_labels(features: Tensor, num_clusters: int, options: Clusters, seed: int) -> Tensor:
    """(N,) long clusters, 0..M-1, of (N, F) finite features, which are scaled to length 1 here.

    Of the options the backend counts.
    """
    found = bounded_kmeans(
        functional.normalize(features, dim=1),
        num_clusters,
        tolerance=TOLERANCE,
        seed=seed_of(seed, "k-means", num_clusters),
        iterations=ITERATIONS,
        backend=options.backend,
    )
    return found.labels


def refusal(bench: Bench) -> str | None:
    """Why clusters cannot be compared with labels on these images, and what to do; None where they can."""
    return refusals.without_labels(bench, "the comparison of clusters with labels")


def run(bench: Bench, encoders: Sequence[Encoder], seed: int) -> list[Score]:
    """AMI, ARI and purity of each encoder's k-means with k = classes first, then of the finest count and of the levels.

    Levels are left out where there are none: without a checkpoint, in stage 1, or on other images than it was trained
    on. A value is NaN where features are not finite.

    Raises:
        UnreadableCheckpoint: the checkpoint's assignments are not those of a run on these images.
    """
    labels = bench.labels("train")
    levels = _levels(bench)
    counts = {"k-means, k = classes": len(set(labels.tolist()))}
    if levels:
        finest = int(levels[-1].max()) + 1
        if finest not in counts.values():
            counts["k-means, k = finest level"] = finest
    scores: list[Score] = []

    def add(encoder: Encoder, setting: str, clusters: Tensor | None) -> None:
        found = dict.fromkeys(MEASURES, math.nan) if clusters is None else agreement(labels, clusters)
        scores.extend(
            Score("clusters", setting, measure, encoder, seed, value, len(labels)) for measure, value in found.items()
        )

    for encoder in encoders:
        features = bench.features(encoder, "train", seed)
        finite = bool(features.isfinite().all())
        for setting, count in counts.items():
            add(encoder, setting, kmeans_labels(features, count, bench.config.clusters, seed) if finite else None)
        if encoder == "trained":
            for depth, level in enumerate(levels, 1):
                add(encoder, f"level {depth} of {len(levels)} ({int(level.max()) + 1} clusters)", level)
    return scores


def _levels(bench: Bench) -> list[Tensor]:
    """(N,) long assignments of the checkpoint's levels, coarse to fine; none where :func:`run` leaves them out."""
    state = bench.state
    if state is None or state["data"]["hash"] != bench.images.content_hash:
        return []
    where, stages, epoch = f"the checkpoint of {bench.images.source}", make_plan(bench.config), len(state["rows"])
    if epoch > total_epochs(stages):
        raise foreign(where, f"{epoch} epochs of {total_epochs(stages)}")
    if not stage_at(stages, epoch).uses_prototypes:
        return []
    return saved_assignments(state, len(bench.images.train), where)
