"""Prototypes and concentrations against loops over the method's section 3."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hpcl.prototypes
from hpcl.prototypes import LEAST_CONCENTRATION, Level, balanced, concentration, make_level, parents

SEEDS = st.integers(0, 2**31)


def unit(rows: int, dim: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=draws, dtype=torch.float64), dim=1)


def assignment(images: int, clusters: int, seed: int = 0) -> Tensor:
    """Random clusters of which none is empty."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(clusters, (images,), generator=draws)
    labels[torch.randperm(images, generator=draws)[:clusters]] = torch.arange(clusters)
    return labels


def means_of(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    return torch.stack([x[labels == c].mean(0) for c in range(clusters)])


def concentration_loop(x: np.ndarray, labels: list[int], means: np.ndarray, temperature: float) -> list[float]:
    clusters = len(means)
    members = [[x[i] for i in range(len(x)) if labels[i] == c] for c in range(clusters)]
    phi = [0.0] * clusters
    for c in range(clusters):
        if len(members[c]) > 1:
            distances = [math.sqrt(float(((v - means[c]) ** 2).sum())) for v in members[c]]
            phi[c] = sum(distances) / len(distances) / math.log(len(distances) + 10)
    if sum(phi) / clusters < 1e-12:
        return [temperature] * clusters
    largest = max(phi)
    phi = [largest if len(members[c]) <= 1 else phi[c] for c in range(clusters)]
    low, high = np.percentile(phi, 10), np.percentile(phi, 90)
    phi = [min(max(value, low), high) for value in phi]
    mean = sum(phi) / clusters
    return [temperature * value / mean for value in phi]


@settings(deadline=None, max_examples=50)
@given(clusters=st.integers(1, 15), more=st.integers(0, 60), temperature=st.sampled_from([0.07, 1.0]), seed=SEEDS)
def test_concentration_is_the_formula(clusters: int, more: int, temperature: float, seed: int) -> None:
    x, labels = unit(clusters + more, 6, seed), assignment(clusters + more, clusters, seed)
    means = means_of(x, labels, clusters)
    phi = concentration(x, labels, means, temperature)
    wanted = concentration_loop(x.numpy(), labels.tolist(), means.numpy(), temperature)
    np.testing.assert_allclose(phi.numpy(), wanted, rtol=1e-9)
    assert phi.mean().item() == pytest.approx(temperature)


def test_concentration_in_float32_is_the_formula() -> None:
    x, labels = unit(400, 16).float(), assignment(400, 20)
    means = means_of(x, labels, 20)
    phi = concentration(x, labels, means, 0.1)
    assert phi.dtype == torch.float32
    wanted = concentration_loop(x.double().numpy(), labels.tolist(), means.double().numpy(), 0.1)
    np.testing.assert_allclose(phi.numpy(), wanted, rtol=1e-5)


def test_a_wide_cluster_gets_the_larger_phi_and_both_average_to_t() -> None:
    """Two clusters of four points at distances 0.1 and 0.3 from their means, before the clip 1 : 3."""
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    cross = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    x = torch.cat([centres[0] + 0.1 * cross, centres[1] + 0.3 * cross])
    labels = torch.tensor([0] * 4 + [1] * 4)
    phi = concentration(x, labels, centres, 0.2)
    # Percentiles of (1, 3) are 1.2 and 2.8; rescaled to mean 0.2.
    torch.testing.assert_close(phi, torch.tensor([0.12, 0.28], dtype=torch.float64))


def test_the_clip_bounds_outliers_at_the_10th_and_90th_percentile() -> None:
    x, labels = unit(2000, 8), assignment(2000, 40)
    for c, width in ((0, 1e-3), (1, 1e-3), (2, 1e-3)):
        members = labels == c
        x[members] = F.normalize(unit(1, 8, 5) + width * x[members], dim=1)
    phi = concentration(x, labels, means_of(x, labels, 40), 0.1)
    # The 10th percentile of 40 values stands at place 3.9: above the three narrow ones.
    assert phi[0] == phi[1] == phi[2] == phi.min() > 0.05
    assert (phi == phi.max()).sum() == 4


def test_clusters_of_one_image_get_the_largest_phi() -> None:
    x, labels = unit(62, 6), torch.cat([torch.arange(60) % 3, torch.tensor([3, 4])])
    phi = concentration(x, labels, means_of(x, labels, 5), 0.1)
    assert phi[3] == phi[4] == phi.max()
    assert phi[:3].min() < phi[3]


def test_an_empty_cluster_counts_as_one_of_one_image() -> None:
    x, labels = unit(60, 6), torch.arange(60) % 3
    means = torch.cat([means_of(x, labels, 3), torch.zeros(1, 6, dtype=torch.float64)])
    phi = concentration(x, labels, means, 0.1)
    assert phi[3] == phi.max()
    assert torch.isfinite(phi).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clusters", [1, 4, 30])
def test_collapsed_features_get_t_everywhere(clusters: int, dtype: torch.dtype) -> None:
    x = unit(1, 128).to(dtype).expand(30, 128)
    level = make_level(torch.arange(30) % clusters, x, clusters, 0.1)
    torch.testing.assert_close(level.concentration, torch.full((clusters,), 0.1, dtype=dtype))


def test_as_many_clusters_as_images_get_t_everywhere() -> None:
    level = make_level(torch.arange(9), unit(9, 4), 9, 0.3)
    torch.testing.assert_close(level.concentration, torch.full((9,), 0.3, dtype=torch.float64))


@pytest.mark.parametrize(("identical", "wanted"), [(19, 1.0), (10, LEAST_CONCENTRATION)])
def test_clusters_of_identical_images_leave_phi_above_zero(identical: int, wanted: float) -> None:
    """19 of 20: the clip brings all to 0, so T. 10 of 20: those ten get the floor, for a logit is divided by phi."""
    labels = torch.arange(80) % 20
    x = unit(80, 6)
    same = labels < identical
    x[same] = unit(20, 6, 1)[labels[same]]
    phi = make_level(labels, x, 20, 0.1).concentration
    torch.testing.assert_close(phi[:identical], torch.full((identical,), 0.1 * wanted, dtype=torch.float64))
    assert phi.mean().item() == pytest.approx(0.1, rel=2e-3)


@settings(deadline=None, max_examples=40)
@given(clusters=st.integers(1, 12), more=st.integers(0, 40), dim=st.sampled_from([2, 5, 70, 130]), seed=SEEDS)
def test_a_level_has_normalised_means_and_sizes(clusters: int, more: int, dim: int, seed: int) -> None:
    images = clusters + more
    x, labels = unit(images, dim, seed), assignment(images, clusters, seed)
    level = make_level(labels, x, clusters, 0.1)
    means = means_of(x, labels, clusters)
    torch.testing.assert_close(level.prototypes, means / means.norm(dim=1, keepdim=True))
    torch.testing.assert_close(level.prototypes.norm(dim=1), torch.ones(clusters, dtype=torch.float64))
    torch.testing.assert_close(level.concentration, concentration(x, labels, means, 0.1))
    assert level.sizes.tolist() == [labels.tolist().count(c) for c in range(clusters)]
    assert level.num_clusters == clusters
    assert level.cluster_of_image is labels


def test_a_level_is_the_same_bit_for_bit_and_follows_the_dtype() -> None:
    x, labels = unit(5000, 128).float().requires_grad_(), assignment(5000, 36)
    one, other = (make_level(labels, x, 36, 0.1) for _ in range(2))
    assert torch.equal(one.prototypes, other.prototypes)
    assert torch.equal(one.concentration, other.concentration)
    assert one.prototypes.dtype == one.concentration.dtype == torch.float32
    assert not one.prototypes.requires_grad
    assert not one.concentration.requires_grad


def test_rows_in_pieces_equal_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = unit(300, 10), assignment(300, 7)
    whole = make_level(labels, x, 7, 0.1)
    monkeypatch.setattr(hpcl.prototypes, "_ROWS", 32)
    monkeypatch.setattr(hpcl.prototypes, "_COLUMNS", 3)
    pieces = make_level(labels, x, 7, 0.1)
    assert torch.equal(whole.prototypes, pieces.prototypes)
    assert torch.equal(whole.concentration, pieces.concentration)


def test_stage_2_takes_prototypes_in_another_space_than_was_clustered() -> None:
    labels = assignment(50, 4)
    in_encoder, in_embedding = (make_level(labels, unit(50, dim, dim), 4, 0.1) for dim in (8, 16))
    assert in_encoder.prototypes.shape == (4, 8)
    assert in_embedding.prototypes.shape == (4, 16)
    assert torch.equal(in_encoder.sizes, in_embedding.sizes)


@pytest.mark.parametrize(("labels", "clusters"), [([0, 0, 2], 3), ([0, 1, 2], 2)])
def test_an_empty_or_excess_cluster_is_refused(labels: list[int], clusters: int) -> None:
    with pytest.raises(ValueError, match=f"but must fill all of {clusters}"):
        make_level(torch.tensor(labels), unit(3, 4), clusters, 0.1)


# ---------------------------------------------------------------- balanced density


def two_levels() -> list[Level]:
    x = unit(60, 6, 3)
    coarse, fine = (make_level(assignment(60, count, count), x, count, 0.2) for count in (4, 9))
    return [coarse, dataclasses.replace(fine, parent=parents(fine.prototypes, coarse.prototypes))]


def test_the_parent_is_the_nearest_prototype_above() -> None:
    coarse, fine = two_levels()
    assert fine.parent is not None
    for j, above in enumerate(fine.parent.tolist()):
        distances = [float((fine.prototypes[j] - c).norm()) for c in coarse.prototypes]
        assert distances[above] == min(distances)


@pytest.mark.parametrize(("shrink", "parent"), [(0.4, 0.0), (0.0, 0.3), (0.4, 0.3), (1.0, 0.0), (0.0, 1.0)])
def test_balanced_density_is_the_formula(shrink: float, parent: float) -> None:
    coarse, fine = two_levels()

    def rescaled(values: list[float]) -> list[float]:
        return [0.2 * value * len(values) / sum(values) for value in values]

    above = rescaled([phi ** (1 - shrink) for phi in coarse.concentration.tolist()])
    own = rescaled([phi ** (1 - shrink) for phi in fine.concentration.tolist()])
    assert fine.parent is not None
    blend = rescaled([(1 - parent) * phi + parent * above[c] for phi, c in zip(own, fine.parent.tolist(), strict=True)])
    found = balanced([coarse, fine], shrink, parent, 0.2)
    assert found[0].concentration.tolist() == pytest.approx(above, rel=1e-12)
    assert found[1].concentration.tolist() == pytest.approx(blend, rel=1e-12)
    assert torch.equal(found[1].prototypes, fine.prototypes)
    if shrink == 1:
        assert found[1].concentration.tolist() == pytest.approx([0.2] * 9)


def test_without_density_levels_are_as_they_were() -> None:
    levels = two_levels()
    assert all(a is b for a, b in zip(balanced(levels, 0.0, 0.0, 0.2), levels, strict=True))
