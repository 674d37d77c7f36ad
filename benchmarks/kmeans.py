"""How fast and how good bounded k-means is: this package beside faiss, scikit-learn and the exact k-means-constrained.

    OMP_NUM_THREADS=1 python benchmarks/kmeans.py                  # 60,000 points, 1,000 clusters
    OMP_NUM_THREADS=1 python benchmarks/kmeans.py --k 120 --repeats 5
    OMP_NUM_THREADS=1 python benchmarks/kmeans.py --ranks 2        # also shared by two processes
    OMP_NUM_THREADS=1 python benchmarks/kmeans.py --big            # only 1,280,000 points: several GB, 6 CPU minutes

Points are unit vectors around directions of unequal weight (two for each cluster), drawn by seed; before each run they
move a little, as the features of the next epoch do. Prints CPU seconds (user and system, of all threads) and wall
seconds, mean ± standard deviation of the repeats, in which the peers take turns; the inertia (sum of squared distances
to the clusters' means) beside that of faiss in the same repeat; the sizes and the share of the clusters outside the
bounds. All make 20 iterations from one start, on all points; warm starts make 4 from the labels of the points before
they moved. Then growth by splitting, from K / 1.7 clusters; then, on few points, the cost of our assignment beside the
least there is at the same centroids, by k-means-constrained's min-cost flow (`pip install "hpcl[bench]"`), whose own
result is shown, too. The last lines compare with the targets, which are set for the default sizes: where a search takes
milliseconds, the rest of an iteration counts.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hpcl.dist import World
from hpcl.errors import UserError
from hpcl.kmeans import bounded_kmeans, cluster_means, size_bounds, split_labels
from hpcl.nearest import nearest_centroid_search
from hpcl.search.machine import cpu_model

TOLERANCE = 1 / 3
COLD, WARM = 20, 4
GROWTH = 1.7
BIG = 1_280_000
CPU = torch.device("cpu")


@dataclass
class Runs:
    """What the repeats of one method gave."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    inertia: list[float] = field(default_factory=list)
    smallest: int = sys.maxsize
    largest: int = 0
    outside: list[float] = field(default_factory=list)

    def add(self, x: Tensor, num_clusters: int, method: Callable[[], Tensor | Callable[[], Tensor]]) -> Tensor:
        """Time a method that gives (N,) labels, or what gives them without being timed, and measure these."""
        cpu, wall = time.process_time(), time.perf_counter()
        found = method()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        labels = found if isinstance(found, Tensor) else found()
        means, sizes = cluster_means(x, labels, num_clusters)
        blocks = zip(torch.split(x, 2**16), torch.split(labels, 2**16), strict=True)
        self.inertia.append(sum(float((part - means[own]).square().sum()) for part, own in blocks))
        lo, hi = size_bounds(len(x), num_clusters, TOLERANCE)
        self.smallest, self.largest = min(self.smallest, int(sizes.min())), max(self.largest, int(sizes.max()))
        self.outside.append(float(((sizes < lo) | (sizes > hi)).double().mean()))
        return labels


def mixture(num_images: int, num_modes: int, dim: int, seed: int) -> Tensor:
    """(N, D) unit vectors around random directions; the largest mode has about 20 times the points of the smallest."""
    random = torch.Generator().manual_seed(seed)
    modes = torch.nn.functional.normalize(torch.randn(num_modes, dim, generator=random), dim=1)
    weights = 0.05 + torch.rand(num_modes, generator=random)
    x = modes[torch.multinomial(weights, num_images, replacement=True, generator=random)]
    x += torch.randn(x.shape, generator=random) / dim**0.5
    return torch.nn.functional.normalize(x, dim=1)


def moved(x: Tensor, seed: int) -> Tensor:
    """The same images an epoch later."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x + 0.5 * noise / x.shape[1] ** 0.5, dim=1)


def faiss_labels(x: Tensor, num_clusters: int, seed: int) -> Callable[[], Tensor]:
    """Plain faiss; its training leaves out the last search, which gives the labels, so that is not timed."""
    import faiss

    found = faiss.Kmeans(
        x.shape[1], num_clusters, niter=COLD, nredo=1, seed=seed, max_points_per_centroid=len(x),
        min_points_per_centroid=1,
    )  # fmt: skip
    found.train(x.numpy())
    return lambda: nearest_centroid_search("faiss", CPU)(x, torch.from_numpy(found.centroids))[0]


def sklearn_labels(x: Tensor, num_clusters: int, seed: int) -> Tensor:
    """scikit-learn's Lloyd from one k-means++ start."""
    from sklearn.cluster import KMeans

    found = KMeans(num_clusters, n_init=1, max_iter=COLD, tol=0.0, algorithm="lloyd", random_state=seed)
    return torch.from_numpy(found.fit(x.numpy()).labels_).long()


def our_labels(
    x: Tensor,
    num_clusters: int,
    seed: int,
    start: Tensor | None = None,
    iterations: int = COLD,
    world: World | None = None,
) -> Tensor:
    """Bounded k-means."""
    return bounded_kmeans(
        x, num_clusters, tolerance=TOLERANCE, seed=seed, iterations=iterations, labels=start, world=world
    ).labels


def compare(n: int, k: int, dim: int, repeats: int, with_sklearn: bool) -> tuple[dict[str, Runs], Tensor]:
    """Times and qualities of each method on the same points; and the last points."""
    before = mixture(n, 2 * k, dim, seed=0)
    start = our_labels(before, k, 0)
    names = ["faiss", *(["scikit-learn"] if with_sklearn else []), "ours, cold", "ours, warm"]
    runs = {name: Runs() for name in names}
    same: list[float] = []
    for seed in range(1, repeats + 1):
        x = moved(before, seed)
        runs["faiss"].add(x, k, lambda: faiss_labels(x, k, seed))  # noqa: B023 - called at once
        runs["ours, cold"].add(x, k, lambda: our_labels(x, k, seed))  # noqa: B023
        warm = runs["ours, warm"].add(x, k, lambda: our_labels(x, k, seed, start, WARM))  # noqa: B023
        same.append(float((warm == start).double().mean()))
        if with_sklearn:
            runs["scikit-learn"].add(x, k, lambda: sklearn_labels(x, k, seed))  # noqa: B023
    lo, hi = size_bounds(n, k, TOLERANCE)
    print(f"\n{n:,} x {dim}, K = {k:,}, sizes {lo}..{hi}, n = {repeats}")
    print(
        f"{'':<14}{'CPU s':>15}{'wall s':>15}{'CPU / faiss':>15}{'inertia - faiss, %':>20}{'sizes':>14}{'outside':>10}"
    )
    for name, each in runs.items():
        ratio, excess = against(runs["faiss"], each)
        sizes = f"{each.smallest}..{each.largest}"
        print(
            f"{name:<14}{shown(each.cpu):>15}{shown(each.wall):>15}{shown(ratio):>15}{shown(excess):>20}{sizes:>14}"
            f"{100 * statistics.mean(each.outside):>8.1f} %"
        )
    print(f"labels that a warm start kept: {shown([100 * each for each in same])} %", flush=True)
    return runs, x


def against(peer: Runs, ours: Runs) -> tuple[list[float], list[float]]:
    """CPU time over the peer's, and inertia above the peer's in percent, repeat by repeat."""
    ratio = [a / b for a, b in zip(ours.cpu, peer.cpu, strict=True)]
    excess = [100 * (a / b - 1) for a, b in zip(ours.inertia, peer.inertia, strict=True)]
    return ratio, excess


def grow(x: Tensor, k: int, repeats: int) -> dict[int, list[float]]:
    """Inertia above a cold start's, in percent, by the iterations after splitting K / 1.7 clusters into K."""
    few = max(1, round(k / GROWTH))
    steps = (1, 2, 4, 6)
    excess: dict[int, list[float]] = {step: [] for step in steps}
    cpu: dict[int, list[float]] = {step: [] for step in steps}
    for seed in range(1, repeats + 1):
        cold = Runs()
        cold.add(x, k, lambda: our_labels(x, k, seed))  # noqa: B023 - called at once
        coarse = our_labels(x, few, seed)
        for step in steps:
            grown = Runs()
            grown.add(x, k, lambda: our_labels(x, k, seed, split_labels(x, coarse, few, k, seed=seed), step))  # noqa: B023
            excess[step] += against(cold, grown)[1]
            cpu[step] += against(cold, grown)[0]
    print(f"\ngrowth from {few:,} to {k:,} by splitting, beside {COLD} cold iterations, n = {repeats}")
    print(f"{'iterations':<14}{'CPU / cold':>15}{'inertia - cold, %':>20}")
    for step in steps:
        print(f"{step:<14}{shown(cpu[step]):>15}{shown(excess[step]):>20}", flush=True)
    return excess


def exact(n: int, k: int, modes: int, dim: int, repeats: int) -> list[float] | None:
    """Percent by which our converged assignment costs more than the cheapest at its centroids; None: no peer."""
    try:
        from k_means_constrained import KMeansConstrained
        from k_means_constrained.k_means_constrained_ import minimum_cost_flow_problem_graph, solve_min_cost_flow_graph
    except ImportError:
        print('\nleft out: the exact assignment; it needs k-means-constrained: pip install "hpcl[bench]"')
        return None
    lo, hi = size_bounds(n, k, TOLERANCE)
    ours, peer = Runs(), Runs()
    above: list[float] = []
    for seed in range(1, repeats + 1):
        x = mixture(n, modes, dim, seed)
        whole = KMeansConstrained(k, size_min=lo, size_max=hi, n_init=1, max_iter=COLD, tol=0.0, random_state=seed)
        peer.add(x, k, lambda: torch.from_numpy(whole.fit(x.numpy()).labels_).long())  # noqa: B023 - called at once
        ours.add(x, k, lambda: our_labels(x, k, seed))  # noqa: B023
        found = bounded_kmeans(x, k, tolerance=TOLERANCE, seed=seed, iterations=100)
        squared = torch.cdist(x.double(), found.centroids.double()).square()
        # Costs are rounded to thousandths there: in thousandths, the sum is right to 1e-6.
        graph = minimum_cost_flow_problem_graph(x.numpy(), found.centroids.numpy(), 1000 * squared.numpy(), lo, hi)
        best = torch.from_numpy(solve_min_cost_flow_graph(*graph)).long()
        cost = [float(squared.gather(1, labels[:, None]).sum()) for labels in (found.labels, best)]
        above.append(100 * (cost[0] / cost[1] - 1))
    ratio, excess = against(peer, ours)
    print(f"\n{n:,} x {dim} around {modes} directions, K = {k:,}, sizes {lo}..{hi}, n = {repeats}")
    print(f"k-means-constrained: {shown(peer.cpu)} CPU s; it minimises the sum of distances that are not squared")
    print(f"ours:                {shown(ours.cpu)} CPU s, {shown(ratio, 4)} of it, inertia {shown(excess)} % above its")
    print(f"converged, above the least cost at the same centroids: {shown(above, 4)} %", flush=True)
    return above


def share(rank: int, size: int, store: str, n: int, k: int, dim: int, repeats: int) -> None:
    """One of the processes that cluster together; rank 0 prints."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    x = moved(mixture(n, 2 * k, dim, seed=0), 1)
    alone, together = Runs(), Runs()
    for seed in range(1, repeats + 1):
        dist.barrier()
        if rank == 0:
            labels = alone.add(x, k, lambda: our_labels(x, k, seed))  # noqa: B023 - called at once
        dist.barrier()
        shared = together.add(x, k, lambda: our_labels(x, k, seed, world=World(rank, size, CPU)))  # noqa: B023
        if rank == 0:
            same = 100 * float((labels == shared).double().mean())
    if rank == 0:
        print(f"\ncold start on one process beside {size} that share the searches, n = {repeats}, one thread each")
        print(
            f"wall {shown(alone.wall)} s and {shown(together.wall)} s; CPU of the first {shown(together.cpu)} s; ",
            end="",
        )
        print(f"equal labels in the last: {same:.2f} %", flush=True)
    dist.destroy_process_group()


def big(k: int, dim: int) -> None:
    """A training set like ImageNet's, once; ten times the clusters by the cost of one search."""
    runs, x = compare(BIG, k, dim, 1, with_sklearn=False)
    nearest = nearest_centroid_search("auto", CPU)
    seconds = {}
    for count, part in ((k, BIG), (10 * k, BIG // 10)):
        before = time.process_time()
        nearest(x[:part], x[-count:])
        seconds[count] = (time.process_time() - before) * BIG / part
    for name in ("ours, cold", "ours, warm"):
        searches = runs[name].cpu[0] / seconds[k]
        print(f"{name}: {searches:.1f} times one search of {seconds[k]:.1f} CPU s; ", end="")
        print(f"K = {10 * k:,}: {seconds[10 * k]:.0f} CPU s a search, so about {searches * seconds[10 * k]:,.0f}")


def shown(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def verdict(what: str, value: float, most: float) -> None:
    """One line: a target, what was measured, whether it is met."""
    print(f"{'met   ' if value <= most else 'MISSED'} {what}: {value:.2f}, at most {most}")


def main() -> int:
    """The command line; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=60_000, help="points (default: %(default)s)")
    parser.add_argument("--k", type=int, default=1000, help="clusters (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="dimensions (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="also cluster with so many processes (default: none)")
    parser.add_argument(
        "--big", action="store_true", help=f"only {BIG:,} points, once, and ten times --k by one search"
    )
    options = parser.parse_args()
    try:
        problems = [f"--{name} is {getattr(options, name)}, but must be >= 1" for name in ("dim", "repeats", "ranks")
                    if getattr(options, name) < 1]  # fmt: skip
        n = BIG if options.big else options.n
        if not 1 <= options.k <= n // 10:
            problems.append(f"--k is {options.k}, but must be in 1..{n // 10} (a tenth of the points)")
        if problems:
            raise UserError(*problems)
        nearest_centroid_search("faiss", CPU)
        measure(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def measure(options: argparse.Namespace) -> None:
    """All of it, in order."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    print(f"{datetime.date.today()}, {cpu_model()}, torch {torch.__version__}, faiss {faiss.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads{load}")
    if options.big:
        big(options.k, options.dim)
        return
    n, k, dim, repeats = options.n, options.k, options.dim, options.repeats
    runs, x = compare(n, k, dim, repeats, with_sklearn=True)
    grown = grow(x, k, repeats)
    above = [exact(4000, 40, modes, dim, repeats) for modes in (80, 20)]
    if options.ranks > 1:
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            torch.multiprocessing.spawn(share, (options.ranks, store, n, k, dim, repeats), options.ranks)
    print()
    mean = statistics.mean
    for name, most_time, most_inertia in (("ours, cold", 1.3, 1.5), ("ours, warm", 0.5, 1.0)):
        ratio, excess = (mean(values) for values in against(runs["faiss"], runs[name]))
        verdict(f"{name}: CPU time over that of faiss", ratio, most_time)
        verdict(f"{name}: inertia above that of faiss, %", excess, most_inertia)
        verdict(f"{name}: clusters outside the bounds", sum(runs[name].outside), 0)
    verdict(
        "growth: inertia above a cold start within 6 iterations, %", min(mean(each) for each in grown.values()), 0.0
    )
    for data, each in zip(("", ", modes far apart and larger than the bounds"), above, strict=True):
        if each is not None:
            verdict(f"largest cost above the least at converged centroids, %{data}", max(each), 0.2)


if __name__ == "__main__":
    raise SystemExit(main())
