"""InfoNCE and ProtoNCE against loops over the formulas, closed forms, and the facts of the method's section 1."""

from __future__ import annotations

import doctest
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hpcl.losses
from hpcl.losses import Columns, Cosine, info_nce, pcl_ceiling, proto_columns, proto_nce, topk_loss

MODES = ("unique", "adjusted", "pcl")
SEEDS = st.integers(0, 2**31)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(rows: int, dim: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=rng(seed), dtype=torch.float64), dim=1)


def columns_of(ids: Tensor, clusters: int, targets: Any, *, most: int = 4096, negatives: int = 1024) -> Columns:
    return proto_columns(ids, clusters, targets, max_in_loss=most, negatives=negatives, generator=rng(7))


def value_and_gradient(q: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = q.clone().requires_grad_()
    loss, accuracy = proto_nce(q, *args)
    (gradient,) = torch.autograd.grad(loss, q)
    return loss.detach(), gradient, accuracy


# ---------------------------------------------------------------- InfoNCE


def info_nce_loop(q: np.ndarray, k: np.ndarray, queue: np.ndarray, temperature: float) -> tuple[float, float]:
    losses, right = [], 0
    for i in range(len(q)):
        own = float(q[i] @ k[i]) / temperature
        others = [float(q[i] @ key) / temperature for key in queue]
        losses.append(-math.log(math.exp(own) / (math.exp(own) + sum(math.exp(x) for x in others))))
        right += all(own > x for x in others)
    return float(np.mean(losses)), right / len(q)


@settings(deadline=None, max_examples=20)
@given(batch=st.integers(1, 7), keys=st.integers(1, 9), dim=st.integers(2, 6), seed=SEEDS)
def test_info_nce_is_the_formula(batch: int, keys: int, dim: int, seed: int) -> None:
    q, k, queue = unit(batch, dim, seed), unit(batch, dim, seed + 1), unit(keys, dim, seed + 2)
    loss, accuracy = info_nce(q, k, queue, Cosine(0.2))
    wanted_loss, wanted_accuracy = info_nce_loop(q.numpy(), k.numpy(), queue.numpy(), 0.2)
    assert loss.item() == pytest.approx(wanted_loss, rel=1e-9, abs=1e-12)
    assert accuracy.item() == pytest.approx(wanted_accuracy)


def test_info_nce_equals_cross_entropy_with_target_zero_in_value_and_gradient() -> None:
    k, queue = unit(16, 8, 1), unit(40, 8, 2)
    q = unit(16, 8, 0).requires_grad_()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / 0.1
    wanted = F.cross_entropy(logits, torch.zeros(16, dtype=torch.long))
    loss, _ = info_nce(q, k, queue, Cosine(0.1))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], torch.autograd.grad(wanted, q)[0])


def test_info_nce_closed_form_own_key_and_orthogonal_queue() -> None:
    axes = torch.eye(6, dtype=torch.float64)
    loss, accuracy = info_nce(axes[:2], axes[:2], axes[2:], Cosine(0.5))
    assert loss.item() == pytest.approx(math.log(1 + 4 * math.exp(-1 / 0.5)))
    assert accuracy.item() == 1.0


def test_info_nce_of_a_collapsed_encoder_is_log_of_the_count_and_never_right() -> None:
    same = unit(1, 8)
    loss, accuracy = info_nce(same.expand(4, 8), same.expand(4, 8), same.expand(15, 8), Cosine(0.1))
    assert loss.item() == pytest.approx(math.log(16))
    assert accuracy.item() == 0.0


def test_losses_compute_in_float32_under_autocast() -> None:
    q, k, queue = (unit(8, 16, s).float() for s in range(3))
    own = torch.arange(8)

    def losses(x: Tensor) -> list[Tensor]:
        proto = proto_nce(x, queue, torch.full((8,), 0.1), own, own)[0]
        return [info_nce(x, k, queue, Cosine(0.1))[0], proto, topk_loss(x, queue, own, 3, 0.1, 1.0)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = losses(q)
    assert all(torch.equal(a, b) for a, b in zip(inside, losses(q), strict=True))
    assert all(x.dtype == torch.float32 for x in [*inside, *losses(q.bfloat16())])


# ---------------------------------------------------------------- columns


def columns_loop(ids: list[int], clusters: int, targets: str, most: int) -> tuple[list[int], list[int]]:
    """Positive columns and targets as the notes and PCL write them down."""
    if targets == "unique":
        positives = list(range(clusters)) if clusters <= most else sorted(set(ids))
        return positives, [positives.index(i) for i in ids]
    if targets == "pcl":
        return ids, list(range(len(ids)))
    return ids, [ids.index(i) for i in ids]


@settings(deadline=None, max_examples=60)
@given(
    clusters=st.integers(1, 40),
    batch=st.integers(1, 24),
    negatives=st.integers(0, 30),
    most=st.sampled_from([1, 8, 100]),
    targets=st.sampled_from(MODES),
    seed=SEEDS,
)
def test_columns_are_positives_then_distinct_negatives(
    clusters: int, batch: int, negatives: int, most: int, targets: Any, seed: int
) -> None:
    ids = torch.randint(clusters, (batch,), generator=rng(seed))
    columns = columns_of(ids, clusters, targets, most=most, negatives=negatives)
    positives, wanted_target = columns_loop(ids.tolist(), clusters, targets, most)
    assert columns.ids[: len(positives)].tolist() == positives
    assert columns.target_of_image.tolist() == wanted_target
    assert torch.equal(columns.ids[columns.target_of_image], ids)

    sampled = columns.ids[len(positives) :].tolist()
    available = set(range(clusters)) - set(positives)
    assert len(sampled) == len(set(sampled)) == min(negatives, len(available))
    assert set(sampled) <= available


def test_the_notes_example_of_adjusted_labels() -> None:
    columns = columns_of(torch.tensor([2, 2, 2, 1, 0]), 3, "adjusted", negatives=0)
    assert columns.target_of_image.tolist() == [0, 0, 0, 3, 4]


def test_negatives_are_uniform_over_the_prototypes_outside_the_batch() -> None:
    ids, draws = torch.tensor([0, 0, 5]), rng(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        columns = proto_columns(ids, 10, "unique", max_in_loss=1, negatives=2, generator=draws)
        counts[columns.ids[2:]] += 1
    assert counts[[0, 5]].sum() == 0
    expected = 2000 * 2 / 8
    chi2 = ((counts[[1, 2, 3, 4, 6, 7, 8, 9]] - expected) ** 2 / expected).sum()
    assert chi2 < 24.3  # 99.9 % point at 7 degrees of freedom


def test_the_same_generator_state_gives_every_rank_the_same_columns() -> None:
    ids = torch.randint(500, (32,), generator=rng(0))
    one, other = (columns_of(ids, 500, "unique", most=10, negatives=64) for _ in range(2))
    assert torch.equal(one.ids, other.ids)


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="targets is 'first', but must be unique, adjusted or pcl"):
        columns_of(torch.tensor([0]), 1, "first")


# ---------------------------------------------------------------- ProtoNCE


def proto_nce_loop(
    q: np.ndarray, prototypes: np.ndarray, phi: np.ndarray, columns: list[int], target: list[int]
) -> tuple[float, float]:
    losses, right = [], 0
    for i in range(len(q)):
        logits = [float(q[i] @ prototypes[c]) / float(phi[c]) for c in columns]
        losses.append(-math.log(math.exp(logits[target[i]]) / sum(math.exp(x) for x in logits)))
        best_prototype = max(columns, key=lambda c: float(q[i] @ prototypes[c]) / float(phi[c]))
        right += columns.index(best_prototype) == target[i]
    return float(np.mean(losses)), right / len(q)


@settings(deadline=None, max_examples=40)
@given(
    clusters=st.integers(1, 12),
    batch=st.integers(1, 10),
    negatives=st.integers(0, 20),
    targets=st.sampled_from(MODES),
    most=st.sampled_from([1, 100]),
    seed=SEEDS,
)
def test_proto_nce_is_the_formula_for_every_k_from_1(
    clusters: int, batch: int, negatives: int, targets: Any, most: int, seed: int
) -> None:
    q, prototypes = unit(batch, 5, seed), unit(clusters, 5, seed + 1)
    phi = 0.1 + torch.rand(clusters, generator=rng(seed), dtype=torch.float64)
    ids = torch.randint(clusters, (batch,), generator=rng(seed + 2))
    columns = columns_of(ids, clusters, targets, most=most, negatives=negatives)
    loss, accuracy = proto_nce(q, prototypes, phi, columns.ids, columns.target_of_image)
    wanted_loss, wanted_accuracy = proto_nce_loop(
        q.numpy(), prototypes.numpy(), phi.numpy(), columns.ids.tolist(), columns.target_of_image.tolist()
    )
    assert loss.item() == pytest.approx(wanted_loss, rel=1e-9, abs=1e-12)
    assert accuracy.item() == pytest.approx(wanted_accuracy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("clusters", "negatives"), [(1, 1024), (4, 1024), (300, 16)])
def test_pcl_and_adjusted_have_one_loss_and_gradient_but_not_one_accuracy(
    clusters: int, negatives: int, dtype: torch.dtype
) -> None:
    q, prototypes = unit(64, 16).to(dtype), unit(clusters, 16, 1).to(dtype)
    phi = (0.1 + 0.1 * torch.rand(clusters, generator=rng())).to(dtype)
    ids = torch.randint(clusters, (64,), generator=rng(3))
    q = F.normalize(q + 2 * prototypes[ids], dim=1)
    pcl, adjusted = (columns_of(ids, clusters, t, negatives=negatives) for t in ("pcl", "adjusted"))
    assert torch.equal(pcl.ids, adjusted.ids)
    one = value_and_gradient(q, prototypes, phi, pcl.ids, pcl.target_of_image)
    other = value_and_gradient(q, prototypes, phi, adjusted.ids, adjusted.target_of_image)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one[1], other[1], rtol=tolerance, atol=tolerance)
    assert one[2] < other[2]


def test_unique_is_the_cross_entropy_over_all_k_in_value_and_gradient() -> None:
    prototypes, phi = unit(21, 8, 1), 0.1 + torch.rand(21, generator=rng(), dtype=torch.float64)
    ids = torch.randint(21, (64,), generator=rng(2))
    columns = columns_of(ids, 21, "unique")
    q = unit(64, 8)
    loss, gradient, accuracy = value_and_gradient(q, prototypes, phi, columns.ids, columns.target_of_image)

    q = q.requires_grad_()
    logits = q @ prototypes.T / phi
    wanted = F.cross_entropy(logits, ids)
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, q)[0])
    assert accuracy == (logits.argmax(dim=1) == ids).double().mean()


def test_unique_changes_the_gradient_where_prototypes_repeat() -> None:
    q, prototypes, phi = unit(64, 8), unit(4, 8, 1), torch.full((4,), 0.1, dtype=torch.float64)
    ids = torch.randint(4, (64,), generator=rng(2))
    gradients = []
    for targets in ("unique", "adjusted"):
        columns = columns_of(ids, 4, targets)
        gradients.append(value_and_gradient(q, prototypes, phi, columns.ids, columns.target_of_image)[1])
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


def test_unique_has_no_floor_where_pcl_keeps_the_log_of_the_repeats() -> None:
    prototypes, phi = torch.eye(4, dtype=torch.float64), torch.full((4,), 1e-2, dtype=torch.float64)
    ids = torch.arange(64) % 4
    q = prototypes[ids]
    losses = {}
    for targets in MODES:
        columns = columns_of(ids, 4, targets)
        losses[targets] = proto_nce(q, prototypes, phi, columns.ids, columns.target_of_image)[0].item()
    assert losses["unique"] == pytest.approx(0, abs=1e-12)
    assert losses["pcl"] == pytest.approx(math.log(16))
    assert losses["adjusted"] == pytest.approx(math.log(16))


def test_parts_of_the_ranks_average_to_the_whole_batch() -> None:
    q, prototypes, phi = unit(32, 8), unit(12, 8, 1), torch.full((12,), 0.1, dtype=torch.float64)
    ids = torch.randint(12, (32,), generator=rng(2))
    for targets in MODES:
        columns = columns_of(ids, 12, targets, negatives=3)
        whole = value_and_gradient(q, prototypes, phi, columns.ids, columns.target_of_image)
        parts = [
            value_and_gradient(q[part], prototypes, phi, columns.ids, columns.target_of_image[part])
            for part in (slice(0, 16), slice(16, 32))
        ]
        torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, whole[0])
        torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]) / 2, whole[1])
        torch.testing.assert_close((parts[0][2] + parts[1][2]) / 2, whole[2])


@pytest.mark.parametrize(("clusters", "batch"), [(1, 8), (2, 64), (4, 64), (36, 64), (308, 64)])
def test_perfect_queries_reach_the_pcl_ceiling_on_average(clusters: int, batch: int) -> None:
    """Monte Carlo of the ceiling with perfect queries, and 1 in the two other modes."""
    prototypes = F.normalize(torch.randn(clusters, 24, generator=rng(1)), dim=1)
    phi, draws = torch.full((clusters,), 0.1), rng(2)
    accuracies: list[float] = []
    for _ in range(100):
        ids = torch.randint(clusters, (batch,), generator=draws)
        for targets in MODES if len(accuracies) < 3 else ("pcl",):
            columns = columns_of(ids, clusters, targets)
            accuracy = proto_nce(prototypes[ids], prototypes, phi, columns.ids, columns.target_of_image)[1].item()
            assert targets == "pcl" or accuracy == 1.0
        accuracies.append(accuracy)
        assert accuracy == pytest.approx(len(set(ids.tolist())) / batch)
    spread = float(np.std(accuracies)) / math.sqrt(len(accuracies))
    assert np.mean(accuracies) == pytest.approx(pcl_ceiling(clusters, batch), abs=4 * spread + 1e-6)


@pytest.mark.parametrize(("clusters", "batch"), [(1, 3), (2, 5), (3, 4), (6, 2)])
def test_the_pcl_ceiling_is_the_exact_mean_over_all_batches(clusters: int, batch: int) -> None:
    prototypes, phi = torch.eye(clusters, dtype=torch.float64), torch.full((clusters,), 0.1)
    accuracies: list[float] = []
    for assignment in product(range(clusters), repeat=batch):
        ids = torch.tensor(assignment)
        columns = columns_of(ids, clusters, "pcl")
        accuracies.append(proto_nce(prototypes[ids], prototypes, phi, columns.ids, columns.target_of_image)[1].item())
    assert np.mean(accuracies) == pytest.approx(pcl_ceiling(clusters, batch), rel=1e-12)


def test_pcl_ceiling_figures() -> None:
    assert pcl_ceiling(4, 64) == pytest.approx(0.0625, abs=1e-6)
    assert pcl_ceiling(1, 64) == 1 / 64
    assert pcl_ceiling(7, 1) == pytest.approx(1.0)
    assert pcl_ceiling(10**12, 64) == pytest.approx(1.0, abs=1e-9)
    for k, batch in ((2, 8), (36, 64), (308, 512)):
        assert pcl_ceiling(k, batch) == pytest.approx(k / batch * (1 - (1 - 1 / k) ** batch))
    with pytest.raises(ValueError, match="k is 0"):
        pcl_ceiling(0, 64)


def test_the_examples_in_the_docstrings_run() -> None:
    result = doctest.testmod(hpcl.losses)
    assert result.attempted > 0
    assert result.failed == 0
