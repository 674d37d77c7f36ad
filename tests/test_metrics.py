"""hpcl.metrics: each meter against a loop or closed form; chance, perfection and collapse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hpcl import metrics
from hpcl.sections import Meters


def unit_rows(count: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def loop_meters(q: Tensor, k: Tensor, own: Tensor, prototypes: Tensor, sizes: Tensor) -> dict[str, float]:
    """METHOD section 5, one view at a time."""
    right_proto = right_inst = ce = nce = 0.0
    v, m = len(q), len(prototypes)
    for i in range(v):
        cos = [float(q[i].double() @ prototypes[j].double()) for j in range(m)]
        right_proto += cos[int(own[i])] == max(cos)
        ce += math.log(sum(math.exp(c / 0.1) for c in cos)) - cos[int(own[i])] / 0.1
        pair = [float(q[i].double() @ k[j].double()) for j in range(v)]
        right_inst += pair[i] == max(pair)
        nce += math.log(sum(math.exp(c / 0.1) for c in pair)) - pair[i] / 0.1
    p = [int(s) / int(sizes.sum()) for s in sizes]
    h = -sum(x * math.log(x) for x in p)
    return {
        "acc_proto_ref": right_proto / v,
        "proto_bits": (h - ce / v) / math.log(2),
        "inst_ref": right_inst / v,
        "nce_ref": nce / v,
    }


def test_fixed_view_meters_equal_the_loop() -> None:
    k = unit_rows(40, 6, 0)
    q = F.normalize(k + 0.3 * unit_rows(40, 6, 1), dim=1)
    own = torch.arange(40) % 5
    prototypes, sizes = unit_rows(5, 6, 2), torch.tensor([9, 7, 8, 10, 6])
    got = metrics.fixed_view_meters(q, k, own, prototypes, sizes)
    assert got == pytest.approx(loop_meters(q, k, own, prototypes, sizes), rel=1e-5)
    assert 0.2 < (got["inst_ref"] or 0) <= 1.0


@settings(deadline=None, max_examples=25)
@given(m=st.integers(1, 12), seed=st.integers(0, 1000))
def test_proto_bits_is_at_most_log2_of_the_count(m: int, seed: int) -> None:
    q, prototypes = unit_rows(30, 8, seed), unit_rows(m, 8, seed + 1)
    own = (q @ prototypes.T).argmax(1)  # as good as it gets
    sizes = torch.randint(1, 20, (m,), generator=torch.Generator().manual_seed(seed))
    bits = metrics.proto_bits(q, own, prototypes, sizes)
    assert bits is not None
    assert bits <= math.log2(m) + 1e-9


def test_proto_bits_reaches_log2_of_the_count_and_is_0_at_chance() -> None:
    prototypes, sizes = torch.eye(8), torch.full((8,), 5)
    own = torch.arange(8).repeat(3)
    best = metrics.proto_bits(prototypes[own], own, prototypes, sizes)
    assert best == pytest.approx(3.0 - math.log2(1 + 7 * math.exp(-10)), abs=1e-6)
    nothing = F.normalize(torch.ones(24, 8), dim=1)  # as near to each prototype
    assert metrics.proto_bits(nothing, own, prototypes, sizes) == pytest.approx(0.0, abs=1e-6)
    wrong = metrics.proto_bits(prototypes[(own + 1) % 8], own, prototypes, sizes)
    assert wrong is not None
    assert wrong < 0


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_collapsed_encoder_scores_chance_not_100_percent(noise: float) -> None:
    same = F.normalize(torch.ones(600, 16) + noise * torch.randn(600, 16, generator=torch.Generator()), dim=1)
    level = metrics.reference_level(same, 10, seed=0)
    assert level.sizes.sum() == 600
    assert int(level.sizes.max()) <= 80
    views = torch.arange(0, 600, 4)
    # the other view of a collapsed encoder says nothing about the image
    q = F.normalize(torch.ones(150, 16) + noise * torch.randn(150, 16, generator=torch.Generator()), dim=1)
    got = metrics.fixed_view_meters(q, same[views], level.cluster_of_image[views], level.prototypes, level.sizes)
    assert got["acc_proto_ref"] == pytest.approx(0.1, abs=0.08)
    assert got["proto_bits"] == pytest.approx(0.0, abs=0.1)
    assert got["inst_ref"] == pytest.approx(1 / 150, abs=0.03)
    assert got["nce_ref"] == pytest.approx(math.log(150), abs=1e-3)


def test_separated_clusters_score_100_percent() -> None:
    kind = torch.arange(300) % 6
    features = F.normalize(torch.eye(6)[kind] + 0.05 * unit_rows(300, 6, 3), dim=1)
    level = metrics.reference_level(features, 6, seed=1)
    q = F.normalize(torch.eye(6)[kind] + 0.05 * unit_rows(300, 6, 4), dim=1)
    got = metrics.fixed_view_meters(q, features, level.cluster_of_image, level.prototypes, level.sizes)
    assert got["acc_proto_ref"] == 1.0
    assert (got["proto_bits"] or 0) > 2.4
    torch.testing.assert_close(level.prototypes.norm(dim=1), torch.ones(6))
    raw = torch.stack([features[level.cluster_of_image == j].mean(0) for j in range(6)])
    torch.testing.assert_close(level.prototypes, F.normalize(raw, dim=1))
    again = metrics.reference_level(features, 6, seed=1, labels=level.cluster_of_image)
    assert torch.equal(again.cluster_of_image, level.cluster_of_image)


def test_diverged_or_missing_views_are_none_not_nan() -> None:
    x, own, sizes = unit_rows(4, 3, 0), torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)
    bad = x.clone()
    bad[2, 1] = float("nan")
    nothing = {"acc_proto_ref": None, "proto_bits": None, "inst_ref": None, "nce_ref": None}
    assert metrics.fixed_view_meters(bad, x, own, x, sizes) == nothing
    assert metrics.fixed_view_meters(x, bad, own, x, sizes) == nothing
    assert metrics.fixed_view_meters(x[:0], x[:0], own[:0], x, sizes) == nothing
    assert metrics.proto_bits(bad, own, x, sizes) is None
    assert metrics.feature_std(bad) is None
    assert metrics.feature_std(x[:1]) is None
    assert metrics.effective_rank(bad) is None
    assert metrics.effective_rank(torch.zeros(5, 3)) is None
    assert metrics.effective_rank(torch.zeros(0, 3)) is None
    with pytest.raises(ValueError, match="not finite"):
        metrics.reference_level(bad, 2, seed=0)


def test_feature_std_and_effective_rank_at_their_ends() -> None:
    collapsed = F.normalize(torch.ones(50, 8), dim=1)
    assert metrics.feature_std(collapsed) == pytest.approx(0.0, abs=1e-6)
    assert metrics.effective_rank(collapsed) == pytest.approx(1.0, abs=1e-5)
    even = torch.cat([torch.eye(8), -torch.eye(8)])
    assert metrics.feature_std(even) == pytest.approx(1.0)
    assert metrics.effective_rank(even) == pytest.approx(8.0)
    plane = torch.zeros(20, 8)
    plane[:10, 0] = plane[10:, 1] = 1.0
    assert metrics.effective_rank(plane) == pytest.approx(2.0, abs=1e-5)
    x = unit_rows(30, 5, 0)
    singular = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = singular / singular.sum()
    assert metrics.effective_rank(x) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert metrics.effective_rank(x.T) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert metrics.feature_std(x) == pytest.approx(x.numpy().std(axis=0).mean() * math.sqrt(5))


def test_size_entropy() -> None:
    assert metrics.size_entropy(torch.tensor([4, 4, 4])) == pytest.approx(1.0)
    assert metrics.size_entropy(torch.tensor([1, 3])) == pytest.approx(
        -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    )
    assert metrics.size_entropy(torch.tensor([5, 0])) == 0.0
    assert metrics.size_entropy(torch.tensor([5])) is None


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 80), ka=st.integers(1, 12), kb=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_churn_equals_scikit_learn(n: int, ka: int, kb: int, seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, ka, n), rng.integers(0, kb, n)
    b = np.where(rng.random(n) < 0.5, a, b)
    got = metrics.churn_ami(torch.from_numpy(a), torch.from_numpy(b))
    if got is None:  # both can only agree; scikit-learn says 1
        assert len(set(a)) == len(set(b))
        assert len(set(a)) in (1, n)
    else:
        assert got == pytest.approx(sklearn.adjusted_mutual_info_score(a, b), abs=1e-9)


def test_churn_of_equal_renumbered_random_and_missing_assignments() -> None:
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.integers(0, 50, 5000))
    assert metrics.churn_ami(a, a) == pytest.approx(1.0)
    assert metrics.churn_ami(a, 49 - a) == pytest.approx(1.0)
    assert metrics.churn_ami(a, torch.from_numpy(rng.integers(0, 50, 5000))) == pytest.approx(0.0, abs=0.01)
    assert metrics.churn_ami(None, a) is None
    assert metrics.churn_ami(a[:10], a) is None
    assert metrics.churn_ami(torch.zeros(9), torch.zeros(9)) is None


def test_reference_count_and_images() -> None:
    assert metrics.reference_count(Meters(), 50_000) == 100
    assert metrics.reference_count(Meters(), 4_000) == 100
    assert metrics.reference_count(Meters(), 2_000) == 50
    assert metrics.reference_count(Meters(images=400), 50_000) == 10
    assert metrics.reference_count(Meters(), 30) == 2
    assert metrics.reference_count(Meters(), 1) == 1
    assert metrics.reference_count(Meters(reference_clusters=7), 50_000) == 7
    chosen = metrics.meter_images(Meters(images=3000), 50_000, seed=4)
    assert len(chosen.reference) == len(set(chosen.reference.tolist())) == 3000
    assert len(chosen.views) == len(set(chosen.views.tolist())) == 1000
    assert int(chosen.views.max()) < 3000
    assert int(chosen.reference.max()) < 50_000
    assert (np.diff(chosen.reference) > 0).all()
    again, other = (
        metrics.meter_images(Meters(images=3000), 50_000, 4),
        metrics.meter_images(Meters(images=3000), 50_000, 5),
    )
    assert (again.reference == chosen.reference).all()
    assert (again.views == chosen.views).all()
    assert (other.reference != chosen.reference).any()
    assert len(metrics.meter_images(Meters(), 800, seed=0).views) == 100
    assert len(metrics.meter_images(Meters(), 3, seed=0).views) == 1
