"""The top-K prototype loss against a loop over the formula, and its limits in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpcl.losses import topk_loss


def unit(rows: int, dim: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=draws, dtype=torch.float64), dim=1)


def topk_loop(
    q: np.ndarray, c: np.ndarray, own: list[int], k: int, far_weight: float, margin: float, weights: str, far: str
) -> float:
    clusters, losses = len(c), []
    for i in range(len(q)):
        d2 = [float(((q[i] - c[j]) ** 2).sum()) for j in range(clusters)]
        near_count = max(1, min(k, clusters - 1))
        others = sorted((j for j in range(clusters) if j != own[i]), key=lambda j: d2[j])
        near, rest = [own[i], *others[: near_count - 1]], others[near_count - 1 :]
        w = {
            "inverse": [1 / (d2[j] + 1e-6) for j in near],
            "softmax": [math.exp(-d2[j]) for j in near],
            "uniform": [1.0 for _ in near],
        }[weights]
        attraction = sum(wj / sum(w) * d2[j] for wj, j in zip(w, near, strict=True))
        repulsion = sum(max(0.0, margin - d2[j]) for j in rest)
        if far == "mean" and rest:
            repulsion /= len(rest)
        losses.append(attraction + far_weight * repulsion)
    return float(np.mean(losses))


@settings(deadline=None, max_examples=80)
@given(
    clusters=st.integers(1, 9),
    k=st.integers(1, 10),
    weights=st.sampled_from(["inverse", "softmax", "uniform"]),
    far=st.sampled_from(["mean", "sum"]),
    margin=st.sampled_from([0.5, 2.0, 4.0]),
    seed=st.integers(0, 2**31),
)
def test_topk_is_the_formula(clusters: int, k: int, weights: Any, far: Any, margin: float, seed: int) -> None:
    q, prototypes = unit(6, 4, seed), unit(clusters, 4, seed + 1)
    own = torch.randint(clusters, (6,), generator=torch.Generator().manual_seed(seed))
    loss = topk_loss(q, prototypes, own, k, 0.3, margin, weights, far)
    wanted = topk_loop(q.numpy(), prototypes.numpy(), own.tolist(), k, 0.3, margin, weights, far)
    assert loss.item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_topk_with_one_prototype_is_the_squared_distance() -> None:
    q, prototype = unit(5, 4), unit(1, 4, 1)
    loss = topk_loss(q, prototype, torch.zeros(5, dtype=torch.long), 3, 10.0, 2.0)
    torch.testing.assert_close(loss, ((q - prototype) ** 2).sum(1).mean())


def test_topk_keeps_one_far_prototype_at_large_k() -> None:
    """K' = min(K, M - 1): of two prototypes the other one repels, whatever K is."""
    axes = torch.eye(2, dtype=torch.float64)
    loss = topk_loss(axes[:1], axes, torch.tensor([0]), k=5, far_weight=0.5, margin=3.0)
    assert loss.item() == pytest.approx(0.5 * (3.0 - 2.0))


def test_topk_attracts_the_assigned_prototype_even_if_it_is_the_farthest() -> None:
    prototypes = torch.eye(4, dtype=torch.float64)
    q = F.normalize(torch.tensor([[3.0, 2.0, 1.0, -1.0]], dtype=torch.float64), dim=1).requires_grad_()
    loss = topk_loss(q, prototypes, torch.tensor([3]), k=1, far_weight=0.0, margin=1.0)
    torch.testing.assert_close(loss, ((q - prototypes[3:]) ** 2).sum())
    (gradient,) = torch.autograd.grad(loss, q)
    assert gradient[0, 3] < 0
    assert gradient[0, :3].abs().max() == 0


def test_topk_weights_carry_no_gradient_and_far_ones_repel_within_the_margin() -> None:
    prototypes = unit(6, 4, 1)
    q = unit(1, 4).requires_grad_()
    own = torch.tensor([2])
    (gradient,) = torch.autograd.grad(topk_loss(q, prototypes, own, 2, 0.4, 2.5), q)
    with torch.no_grad():
        d2 = 2 - 2 * (q @ prototypes.T)[0]
        other = min((j for j in range(6) if j != 2), key=lambda j: float(d2[j]))
        w = torch.stack([1 / (d2[2] + 1e-6), 1 / (d2[other] + 1e-6)])
        w = w / w.sum()
        wanted = -2 * (w[0] * prototypes[2] + w[1] * prototypes[other])
        for j in set(range(6)) - {2, other}:
            wanted = wanted + 0.4 / 4 * 2 * prototypes[j] * (d2[j] < 2.5)
    torch.testing.assert_close(gradient[0], wanted)


def test_topk_is_finite_on_top_of_a_prototype() -> None:
    prototypes = unit(4, 4)
    q = prototypes.float().requires_grad_()
    loss = topk_loss(q, prototypes, torch.arange(4), 2, 0.1, 1.0)
    (gradient,) = torch.autograd.grad(loss, q)
    assert 0 <= loss < 1e-3
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0, but must be >= 1"),
        ({"weights": "linear"}, "weights is 'linear', but must be inverse, softmax or uniform"),
        ({"far": "max"}, "far is 'max', but must be mean or sum"),
    ],
)
def test_topk_refuses_what_it_does_not_know(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"k": 2, "far_weight": 0.1, "margin": 1.0} | change
    with pytest.raises(ValueError, match=message):
        topk_loss(unit(2, 4), unit(3, 4), torch.tensor([0, 1]), **arguments)
