"""Bounded k-means: Euclidean k-means whose cluster sizes are guaranteed to lie within bounds.

Lloyd's algorithm (Lloyd 1982) runs freely first; in its last iterations every
assignment is repaired: over-full clusters hand points on, clusters below the
lower bound receive some, always those points for which it costs least. The exact
assignment is a minimum-cost flow (Bradley, Bennett and Demiriz 2000, "Constrained
k-means clustering"); it takes tens of times longer, and on MNIST is about 0.1 %
cheaper (1 % where clusters lie far apart and differ much in size).

Legend: N images, D embedding, M clusters (prototypes) of a level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcl.dist import World
from hpcl.nearest import DISTANCES_AT_ONCE, Backend, Nearest, nearest_centroid_search, shared_by_ranks
from hpcl.rng import generator

BOUNDED_ITERATIONS = 5
"""Last iterations of a run that respect the size bounds; those before are free."""

HALVED_FROM = 2**14
"""Points, and 16 per cluster, from which a cold start's early iterations look at half of them (:func:`_half`)."""

MAX_ROUNDS = 64
"""Rounds of greedy moves; what is left then goes wherever there is room."""


@dataclass(frozen=True, eq=False)
class KMeans:
    """A clustering within its size bounds."""

    labels: Tensor
    """(N,) int64: cluster of each image, in 0..M-1."""
    centroids: Tensor
    """(M, D) float32: mean of each cluster's points, not normalised."""
    sizes: Tensor
    """(M,) int64: points per cluster, each within :func:`size_bounds`."""
    inertia: float
    """Sum over the points of the squared distance to their cluster's mean."""
    iterations: int
    """Lloyd iterations made; fewer than asked where the labels stopped changing."""


def size_bounds(num_images: int, num_clusters: int, tolerance: float | None) -> tuple[int, int]:
    """The smallest and the largest permitted cluster size.

    lo = max(1, floor((1 - tau) N/M)), hi = ceil((1 + tau) N/M): the notes' mean plus
    or minus sigma, with sigma = tau times the mean. Some assignment meets the bounds
    for every M <= N.

    Args:
        num_images: N.
        num_clusters: M, in 1..N.
        tolerance: tau, in 0..1; None asks for non-empty clusters only: (1, N).

    Raises:
        ValueError: M is not in 1..N, or tau not in 0..1.

    >>> size_bounds(4000, 100, 1 / 3)
    (26, 54)
    """
    if not 1 <= num_clusters <= num_images:
        raise ValueError(f"num_clusters is {num_clusters}, but must be in 1..{num_images} (the number of images)")
    if tolerance is None:
        return 1, num_images
    if not 0.0 <= tolerance <= 1.0:
        raise ValueError(f"tolerance is {tolerance}, but must be in 0..1, or None for free sizes")
    mean = num_images / num_clusters
    # Rounded, because 1/3 is not exact in binary: (1 - 1/3) * 3 must floor to 2. The outer
    # min and max only matter for a tolerance within rounding of 0.
    lo = min(math.floor(round((1 - tolerance) * mean, 9)), num_images // num_clusters)
    hi = max(math.ceil(round((1 + tolerance) * mean, 9)), -(-num_images // num_clusters))
    return max(1, lo), min(hi, num_images)


def bounded_kmeans(
    x: Tensor,
    num_clusters: int,
    *,
    tolerance: float | None,
    seed: int,
    iterations: int,
    labels: Tensor | None = None,
    backend: Backend = "auto",
    world: World | None = None,
) -> KMeans:
    """Clusters whose sizes are within :func:`size_bounds`, on every call and for every input.

    Minimises sum_i ||x_i - c_label(i)||^2 subject to lo <= size_j <= hi. Equal points,
    a collapsed encoder and M = N are all valid inputs. The result depends on the
    arguments, and on the device and backend through rounding, and on nothing else.

    Args:
        x: (N, D) points, usually unit vectors; anything but float32 is converted.
        num_clusters: M, in 1..N.
        tolerance: tau of :func:`size_bounds`.
        seed: decides the start of a cold run; a warm start does not use it.
        iterations: Lloyd iterations at most, >= 1; the last few are bounded. Of many points
            a cold start's first ones look at half.
        labels: (N,) clusters to start from (warm start); cluster j stays cluster j.
        backend: nearest-centroid search on CPU: faiss, torch, or faiss where installed.
            On a GPU it is always torch.
        world: ranks that share the nearest-centroid searches (:func:`shared_by_ranks`), in which nearly
            all of the time is spent. All of them must make this call, with the same arguments; all get
            the same labels, and centroids and inertia that are equal up to rounding. What decides how
            many points the next search has are the answers of the searches and whole numbers made of
            them, so that the ranks stay in step on unequal machines, too. None: this process alone.

    Raises:
        ValueError: an argument is out of range, or x is not finite.
        UserError: faiss was asked for and is not installed.

    >>> x = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [9.0]])
    >>> bounded_kmeans(x, 2, tolerance=0.0, seed=0, iterations=10).sizes
    tensor([3, 3])
    """
    points = _checked_points(x)
    # Centred, because ||x||^2 - 2 x.c + ||c||^2 loses its digits where all points are close together.
    x = points - points.mean(dim=0)
    bounds = size_bounds(len(x), num_clusters, tolerance)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, but must be >= 1")
    nearest = nearest_centroid_search(backend, x.device)
    if world is not None:
        nearest = shared_by_ranks(nearest, world)

    num_bounded = min(iterations, BOUNDED_ITERATIONS)
    num_free = iterations - num_bounded
    num_early, early = 0, x
    found: tuple[Tensor, Tensor] | None = None
    if labels is None:
        centroids, found = _spread_centroids(x, num_clusters, seed, nearest)
        if num_free >= 2 and len(x) >= max(HALVED_FROM, 16 * num_clusters):
            half = _half(len(x), seed).to(x.device)
            num_early, early, found = num_free // 2, x[half], (found[0][half], found[1][half])
    else:
        labels = _checked_labels(labels, x, num_clusters)
        centroids, sizes = cluster_means(x, labels, num_clusters)
        _restart_empty(centroids, sizes, x, _squared_distance(x, centroids, labels))

    previous: Tensor | None = None
    iterations_made = 0
    phases = ((early, num_early, False), (x, num_free - num_early, False), (x, num_bounded, True))
    for some, num_iterations, is_bounded in phases:
        for _ in range(num_iterations):
            labels, cost = found or nearest(some, centroids)
            found = None
            if is_bounded:
                _repair(labels, cost, x, centroids, bounds, nearest)
            if previous is not None and torch.equal(labels, previous):
                break
            previous = labels
            centroids, sizes = cluster_means(some, labels, num_clusters)
            _restart_empty(centroids, sizes, some, cost)
            iterations_made += 1
    assert labels is not None
    inertia = float(_squared_distance(x, centroids, labels).sum(dtype=torch.float64))
    centroids, sizes = cluster_means(points, labels, num_clusters)
    return KMeans(labels, centroids, sizes, inertia, iterations_made)


def split_labels(x: Tensor, labels: Tensor, num_clusters_now: int, num_clusters_new: int, *, seed: int) -> Tensor:
    """Labels with more clusters, made by halving the widest ones; a start for :func:`bounded_kmeans`.

    A cluster's width is its sum of squared distances to its mean. Each is cut at the
    median of its points along their leading direction: one half keeps the cluster's
    id, the other gets the next free one; clusters that are not split keep their
    points. Where more than twice the clusters are asked for, halves are split again.

    Args:
        x: (N, D) points.
        labels: (N,) clusters, in 0..num_clusters_now-1.
        num_clusters_now: M before.
        num_clusters_new: M after, in num_clusters_now..N.
        seed: start of the power iteration that finds the leading directions.

    Returns:
        (N,) int64 clusters, in 0..num_clusters_new-1. None of the new ones is empty.

    Raises:
        ValueError: a count or a label is out of range, or x is not finite.
    """
    x = _checked_points(x)
    labels = _checked_labels(labels, x, num_clusters_now).clone()
    if not num_clusters_now <= num_clusters_new <= len(x):
        raise ValueError(f"num_clusters_new is {num_clusters_new}, but must be in {num_clusters_now}..{len(x)}")
    num_clusters, cuts = num_clusters_now, 0
    while num_clusters < num_clusters_new:
        means, sizes = cluster_means(x, labels, num_clusters)
        width = group_sums(_squared_distance(x, means, labels)[:, None], labels, num_clusters).squeeze(1)
        can_split = sizes >= 2
        num_splits = min(num_clusters_new - num_clusters, int(can_split.sum()))
        widest = width.masked_fill(~can_split, -1.0).argsort(descending=True, stable=True)[:num_splits]

        part_of_cluster = torch.full_like(sizes, -1)
        part_of_cluster[widest] = torch.arange(num_splits, device=x.device)
        points = (part_of_cluster[labels] >= 0).nonzero().squeeze(1)
        part = part_of_cluster[labels[points]]
        offset = x[points] - means[labels[points]]
        along = _leading_coordinate(offset, part, num_splits, seed + cuts)
        is_upper_half = 2 * _rank_within(part, along) >= sizes[widest][part]
        labels[points[is_upper_half]] = num_clusters + part[is_upper_half]
        num_clusters, cuts = num_clusters + num_splits, cuts + 1
    return labels


def cluster_means(x: Tensor, labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Mean (M, D) and size (M,) of each cluster of the points x (N, D); an empty one's mean is 0."""
    sizes = labels.bincount(minlength=num_clusters)
    return group_sums(x, labels, num_clusters) / sizes.clamp(min=1)[:, None], sizes


def _repair(
    labels: Tensor, cost: Tensor, x: Tensor, centroids: Tensor, bounds: tuple[int, int], nearest: Nearest
) -> None:
    """Moves the cheapest points until every cluster's size is within bounds.

    Overwrites labels (N,) and cost (N,), the squared distance of each point to its centroid.
    """
    lo, hi = bounds
    sizes = labels.bincount(minlength=len(centroids))
    _transfer(labels, cost, x, centroids, (sizes - hi).clamp(min=0), (hi - sizes).clamp(min=0), nearest)
    sizes = labels.bincount(minlength=len(centroids))
    _transfer(labels, cost, x, centroids, (sizes - lo).clamp(min=0), (lo - sizes).clamp(min=0), nearest)


def _transfer(
    labels: Tensor, cost: Tensor, x: Tensor, centroids: Tensor, surplus: Tensor, room: Tensor, nearest: Nearest
) -> None:
    """Moves points from clusters with surplus to clusters with room, until one of them is used up.

    In each round every point of a cluster with surplus looks at the nearest centroid
    with room; its regret is the rise in squared distance. A cluster offers as many
    points as it has surplus, a target accepts as many as it has room, least regret
    first. A round either ends the transfer or fills at least one target.

    Args:
        surplus: (M,) points each cluster should or may give.
        room: (M,) points each cluster should or may take; 0 where there is surplus.
    """
    num_clusters = len(centroids)
    left = int(torch.minimum(surplus.sum(), room.sum()))
    target = torch.full_like(labels, -1)
    target_cost = torch.empty_like(cost)
    for _ in range(MAX_ROUNDS):
        if not left:
            return
        points = (surplus[labels] > 0).nonzero().squeeze(1)
        # Targets only ever close, so a point's choice stays the best one while it is open.
        is_closed = room[target[points]] == 0
        looking = points[is_closed | (target[points] < 0)]
        open_ids = (room > 0).nonzero().squeeze(1)
        choice, target_cost[looking] = nearest(x[looking], centroids[open_ids])
        target[looking] = open_ids[choice]

        regret = target_cost - cost
        offered = points[_rank_within(labels[points], regret[points]) < surplus[labels[points]]]
        moved = offered[_rank_within(target[offered], regret[offered]) < room[target[offered]]]
        surplus = surplus - labels[moved].bincount(minlength=num_clusters)
        room = room - target[moved].bincount(minlength=num_clusters)
        labels[moved], cost[moved] = target[moved], target_cost[moved]
        is_slow = 200 * len(moved) < left
        left -= len(moved)
        if is_slow:
            break

    # Many (nearly) equal points fill one target after the other; where that would take
    # too many rounds, one place is about as good as another.
    rest = (_rank_within(labels, target_cost - cost) < surplus[labels]).nonzero().squeeze(1)
    places = torch.arange(num_clusters, device=x.device).repeat_interleave(room)
    count = min(len(rest), len(places))
    labels[rest[:count]] = places[:count]


def _rank_within(group: Tensor, key: Tensor) -> Tensor:
    """Position of each element among those of its group, by ascending key; ties by index.

    >>> _rank_within(torch.tensor([0, 1, 0, 0]), torch.tensor([3.0, 9.0, 1.0, 2.0]))
    tensor([2, 0, 0, 1])
    """
    order = key.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    counts = group.bincount()
    start = counts.cumsum(0) - counts
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - start[group[order]]
    return rank


def _spread_centroids(
    x: Tensor, num_clusters: int, seed: int, nearest: Nearest
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """M distinct points of x, far from each other: k-means++ in doubling batches.

    k-means++ (Arthur and Vassilvitskii 2007) draws each next centroid with a
    probability proportional to the squared distance from those drawn; here as many
    are drawn at once as there are already, which costs as much as one iteration.

    Returns:
        The points (M, D), and what the first iteration would search for: the nearest of
        them (N,) and the squared distance to it (N,).
    """
    random = generator(seed, "cluster")
    chosen = torch.randint(len(x), (1,), generator=random).to(x.device)
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    cost = torch.full((len(x),), math.inf, device=x.device)
    num_searched = 0
    while True:
        ids, found = nearest(x, x[chosen[num_searched:]])
        labels = torch.where(found < cost, ids + num_searched, labels)
        cost = torch.minimum(cost, found)
        num_searched = len(chosen)
        if num_searched == num_clusters:
            return x[chosen], (labels, cost)
        # The n smallest of Exp(1)/w are a draw without repetition with weights w; the small
        # constant lets equal points, with w = 0, be drawn when nothing else is left.
        key = torch.empty(len(x)).exponential_(generator=random).to(x.device) / (cost + 1e-30)
        key[chosen] = math.inf
        count = min(len(chosen), num_clusters - len(chosen))
        chosen = torch.cat([chosen, key.argsort(stable=True)[:count]])


def _half(num_images: int, seed: int) -> Tensor:
    """Ids (N // 2,) of the points that the first half of a cold start's free iterations look at, ascending.

    Centroids that still travel far are found as well from half of the points: the
    inertia at the end differs by chance (within 0.5 % both ways on mixtures of
    8,192 to 200,000 points), and the run takes 6 to 17 % less time.
    """
    random = generator(seed, "cluster", 1)
    return torch.randperm(num_images, generator=random)[: num_images // 2].sort().values


def _restart_empty(centroids: Tensor, sizes: Tensor, x: Tensor, cost: Tensor) -> None:
    """Puts the centroid of each empty cluster, in place, on one of the points farthest from theirs."""
    empty = (sizes == 0).nonzero().squeeze(1)
    if len(empty):
        centroids[empty] = x[cost.argsort(descending=True, stable=True)[: len(empty)]]


def _leading_coordinate(offset: Tensor, group: Tensor, num_groups: int, seed: int) -> Tensor:
    """Coordinate of each point along its group's direction of largest variance.

    Power iteration on every group's covariance at once; a rough direction is enough.
    offset (n, D) holds the points minus their group's mean, group (n,) the groups.
    """
    direction = torch.randn(num_groups, offset.shape[1], generator=generator(seed, "split")).to(offset.device)
    for _ in range(8):
        along = (offset * direction[group]).sum(1, keepdim=True)
        direction = torch.nn.functional.normalize(group_sums(offset * along, group, num_groups), dim=1)
    return (offset * direction[group]).sum(1)


def group_sums(x: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sums (num_groups, D) of the rows of x (N, D) in each group, always added in the same order."""
    if x.device.type == "cpu":
        return x.new_zeros(num_groups, x.shape[1]).index_add_(0, group, x)
    # On a GPU index_add_ adds in an order that changes from run to run.
    sizes = group.bincount(minlength=num_groups)
    return torch.segment_reduce(x[group.argsort(stable=True)], "sum", lengths=sizes, axis=0)


def _squared_distance(x: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Squared distance (N,) of each point to the centroid of its own cluster."""
    rows = max(1, DISTANCES_AT_ONCE["cpu"] // x.shape[1])
    blocks = zip(torch.split(x, rows), torch.split(labels, rows), strict=True)
    return torch.cat([(points - centroids[own]).square().sum(1) for points, own in blocks])


def _checked_points(x: Tensor) -> Tensor:
    if x.ndim != 2 or not x.shape[0] or not x.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (N, D) with N, D >= 1")
    x = x.detach().to(torch.float32).contiguous()
    if not bool(x.isfinite().all()):
        raise ValueError("x has entries that are not finite: the features to cluster have diverged")
    return x


def _checked_labels(labels: Tensor, x: Tensor, num_clusters: int) -> Tensor:
    if labels.shape != x.shape[:1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, but must be ({len(x)},): one per point")
    labels = labels.to(device=x.device, dtype=torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_clusters:
        raise ValueError(f"labels lie in {low}..{high}, but must be in 0..{num_clusters - 1}")
    return labels
