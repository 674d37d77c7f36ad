"""Two processes (gloo) cluster together: the labels of one process, and in step also where they round differently."""

from __future__ import annotations

import datetime
import pickle
import traceback
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from runs import FORKS
from test_kmeans import assert_valid, gaussians
from torch import Tensor

from hpcl.config import Config
from hpcl.dist import World
from hpcl.hierarchy import Hierarchy
from hpcl.kmeans import KMeans, bounded_kmeans, split_labels
from hpcl.nearest import nearest_centroid_search, shared_by_ranks

SIZE = 2
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
NUM_IMAGES, NUM_CLUSTERS = 1501, 50  # parts of unequal length

Found = dict[str, Any]


def points() -> Tensor:
    """Unit vectors without ties: (N, 32), of modes so unequal that plain k-means breaks the bounds."""
    return gaussians(NUM_IMAGES, 32, modes=30, spread=0.6)


def clusterings(x: Tensor, backend: Any, world: World) -> dict[str, KMeans]:
    """A cold start, a warm one from it on points that have moved a little, and one after a split."""

    def run(start: Tensor | None, count: int, iterations: int, *, of: Tensor = x) -> KMeans:
        return bounded_kmeans(
            of, count, tolerance=0.2, seed=3, iterations=iterations, labels=start, backend=backend, world=world
        )

    cold = run(None, NUM_CLUSTERS, 20)
    moved = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    warm = run(cold.labels, NUM_CLUSTERS, 4, of=moved)
    halves = world.broadcast(split_labels(x, cold.labels, NUM_CLUSTERS, 85, seed=0))
    return {"cold": cold, "warm": warm, "split": run(halves, 85, 4)}


def levels(x: Tensor, config: Config, world: World) -> list[list[Tensor]]:
    """Labels of each level of a hierarchy at a first clustering, a second one, and after growth."""
    hierarchy = Hierarchy(config, len(x))
    labels = []
    for epoch in range(3):
        if epoch == 2:
            hierarchy.grow()
        labels.append([level.cluster_of_image for level in hierarchy.cluster(x, x, stage=3, epoch=epoch, world=world)])
    return labels


def a_bit_off(x: Tensor, world: World) -> Tensor:
    """The points as a rank with another arithmetic would hold them; exaggerated, so that decisions do change."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(world.rank))
    return x + 1e-3 * noise * (world.rank > 0)


def tasks(config: Config, world: World) -> Found:
    """What each of the ranks does."""
    x = points()
    nearest = shared_by_ranks(nearest_centroid_search("torch", CPU), world)
    off = a_bit_off(x, world)
    return {
        "faiss": clusterings(x, "auto", world),
        "torch": clusterings(x, "torch", world),
        "few points": [nearest(x[:count], x[5:9] + world.rank) for count in range(4)],
        "off": clusterings(off, "torch" if world.rank else "auto", world),
        "levels": levels(x, config, world),
        "levels off": levels(off, config, world),
    }


def _rank(rank: int, store: str, config: Config, pipe: Connection) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Ranks that are out of step end with an error instead of waiting for half an hour.
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=patience)
    found: Found | str
    try:
        found = tasks(config, World(rank, SIZE, CPU))
    except Exception:
        found = traceback.format_exc()
    pipe.send_bytes(pickle.dumps(found))  # send would share the tensors' memory, which ends with this process
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def config() -> Config:
    """Three levels that grow from 10, 20 and 40 clusters."""
    return Config().with_values({"clusters.first": 10, "clusters.multiplier": 2.0, "clusters.levels": 3})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, config: Config) -> list[Found]:
    """What each rank found."""
    store = str(tmp_path_factory.mktemp("kmeans") / "store")
    ends = [FORKS.Pipe() for _ in range(SIZE)]
    processes = [
        FORKS.Process(target=_rank, args=(rank, store, config, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(ends)
    ]
    for process in processes:
        process.start()
    found = []
    for ours, _ in ends:
        assert ours.poll(200), "a rank hangs"
        found.append(pickle.loads(ours.recv_bytes()))
    for process in processes:
        process.join(60)
    assert not any(isinstance(each, str) for each in found), "\n".join(str(each) for each in found)
    return found


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("start", ["cold", "warm", "split"])
def test_ranks_find_the_labels_of_one_process(ranks: list[Found], backend: str, start: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    alone = clusterings(points(), "auto" if backend == "faiss" else "torch", ALONE)[start]
    for found in ranks:
        result = found[backend][start]
        assert torch.equal(result.labels, alone.labels) and result.iterations == alone.iterations
        assert result.inertia == pytest.approx(alone.inertia, rel=1e-6)
        torch.testing.assert_close(result.centroids, alone.centroids)


@pytest.mark.parametrize("count", range(4))
def test_a_search_with_fewer_points_than_ranks_is_answered(ranks: list[Found], count: int) -> None:
    """With rank 0's centroids, whatever the others pass."""
    x = points()
    ids, cost = nearest_centroid_search("torch", CPU)(x[:count], x[5:9])
    for found in ranks:
        assert found["few points"][count][0].tolist() == ids.tolist()
        torch.testing.assert_close(found["few points"][count][1], cost)


@pytest.mark.parametrize("start", ["cold", "warm", "split"])
def test_ranks_that_compute_differently_stay_in_step_and_within_bounds(ranks: list[Found], start: str) -> None:
    """One rank has other digits and another backend: alone it decides differently, together they do not."""
    first, second = (found["off"][start] for found in ranks)
    assert torch.equal(first.labels, second.labels)
    x = points()
    moved = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert_valid(first, moved if start == "warm" else x, NUM_CLUSTERS if start != "split" else 85, 0.2)
    second_alone = clusterings(a_bit_off(x, World(1, SIZE, CPU)), "torch", ALONE)[start]
    assert not torch.equal(second_alone.labels, second.labels)


def test_levels_of_ranks_are_those_of_one_process(ranks: list[Found], config: Config) -> None:
    alone = levels(points(), config, ALONE)
    assert [int(labels.max()) + 1 for labels in alone[2]] == [20, 40, 80]
    for found in ranks:
        for ours, theirs in zip(found["levels"], alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_levels_are_the_same_on_ranks_that_compute_differently(ranks: list[Found]) -> None:
    first, second = (found["levels off"] for found in ranks)
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
