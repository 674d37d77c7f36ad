"""kNN and the linear probe against brute force and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcl.downstream import knn, linear, ridge
from hpcl.downstream.knn import knn_accuracy, knn_predict
from hpcl.downstream.linear import choose_penalty, linear_probe_accuracy
from hpcl.downstream.ridge import fit_ridge
from hpcl.rng import generator


def blobs(count: int, dim: int, classes: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Classes around centres that do not depend on the seed; features of unequal scale."""
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    x = (centres[labels] + spread * rng.normal(size=(count, dim))) * np.linspace(0.1, 5.0, dim) + 3.0
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


# ---------------------------------------------------------------- kNN


def loop_knn(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, classes: int) -> list[int]:
    """Wu et al. 2018, one query at a time."""
    rows, out = bank.double().tolist(), []
    for query in queries.double().tolist():
        length = math.sqrt(sum(a * a for a in query))
        cosines = []
        for row, label in zip(rows, labels.tolist(), strict=True):
            cos = sum(a * b for a, b in zip(query, row, strict=True)) / length / math.sqrt(sum(b * b for b in row))
            cosines.append((cos, label))
        votes = [0.0] * classes
        for cos, label in sorted(cosines, reverse=True)[:k]:
            votes[label] += math.exp(cos / temperature)
        out.append(votes.index(max(votes)))
    return out


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.07), (20, 0.5), (1000, 0.1)])
def test_knn_equals_brute_force(k: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels = blobs(120, 5, 4, seed=0)
    queries, truth = blobs(30, 5, 4, seed=1)
    want = loop_knn(bank, labels, queries, k, temperature, 4)
    assert knn_predict(bank, labels, queries, k, temperature, 4).tolist() == want
    accuracy = sum(a == b for a, b in zip(want, truth.tolist(), strict=True)) / 30
    assert knn_accuracy(bank, labels, queries, truth, k, temperature, 4) == pytest.approx(accuracy)
    monkeypatch.setattr(knn, "SIMILARITIES_AT_ONCE", 500)  # in chunks of four queries: the same
    assert knn_predict(bank, labels, queries, k, temperature, 4).tolist() == want


def test_knn_equals_scikit_learn() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, labels = blobs(800, 16, 5, seed=2, spread=2.0)
    queries, truth = blobs(300, 16, 5, seed=3, spread=2.0)
    theirs = neighbors.KNeighborsClassifier(
        n_neighbors=50, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.1)
    ).fit(bank.double().numpy(), labels.numpy())
    ours = knn_predict(bank.double(), labels, queries.double(), 50, 0.1, 5)
    assert (ours.numpy() == theirs.predict(queries.double().numpy())).all()
    accuracy = knn_accuracy(bank, labels, queries, truth, 50, 0.1, 5)
    assert accuracy == pytest.approx(theirs.score(queries.double().numpy(), truth.numpy()), abs=0.01)


def test_knn_small_temperature_does_not_overflow_and_undefined_is_none() -> None:
    bank, labels = blobs(50, 4, 3, seed=0, spread=0.1)
    assert knn_accuracy(bank, labels, bank, labels, 10, 1e-3, 3) == 1.0
    assert knn_accuracy(bank, labels, bank[:0], labels[:0], 10, 0.1, 3) is None
    assert knn_accuracy(bank[:0], labels[:0], bank, labels, 10, 0.1, 3) is None
    assert knn_accuracy(bank * float("nan"), labels, bank, labels, 10, 0.1, 3) is None


# ---------------------------------------------------------------- linear probe


@pytest.mark.parametrize("classes", [2, 6])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 300.0])
def test_ridge_equals_scikit_learn(classes: int, penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(ridge, "ROWS_AT_ONCE", 64)  # several chunks
    train, labels = blobs(300, 12, classes, seed=4, spread=3.0)
    val, _ = blobs(200, 12, classes, seed=5, spread=3.0)
    fitted = fit_ridge(train, labels, classes, penalty)
    x = train.double().numpy()
    mean, std = x.mean(0), x.std(0)
    theirs = linear_model.RidgeClassifier(alpha=penalty).fit((x - mean) / std, labels.numpy())
    standard = (val.double().numpy() - mean) / std
    scores = fitted.scores(val).numpy()
    decision = theirs.decision_function(standard)
    np.testing.assert_allclose(scores[:, 1] if classes == 2 else scores, decision, rtol=1e-6, atol=1e-8)
    assert (scores.argmax(1) == theirs.predict(standard)).all()


def test_penalty_is_the_best_of_a_direct_search() -> None:
    train, labels = blobs(200, 40, 5, seed=6, spread=4.0)
    chosen = choose_penalty(train, labels, 5, seed=3)
    order = torch.randperm(200, generator=generator(3, "probe-split"))
    inner, rest = order[:40], order[40:]
    accuracy = {}
    for penalty in linear.PENALTIES:
        scores = fit_ridge(train[rest], labels[rest], 5, penalty * 160).scores(train[inner])
        accuracy[penalty] = float((scores.argmax(1) == labels[inner]).double().mean())
    best = max(accuracy.values())
    assert chosen == max(p for p, a in accuracy.items() if a == best)
    assert min(accuracy.values()) < best  # the choice matters here


def test_probe_finds_linear_classes_is_deterministic_and_near_chance_on_noise() -> None:
    train, labels = blobs(400, 10, 4, seed=7, spread=0.3)
    val, truth = blobs(100, 10, 4, seed=8, spread=0.3)
    assert linear_probe_accuracy(train, labels, val, truth, 4, seed=0) == 1.0
    noise = torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    one = linear_probe_accuracy(noise, labels, noise[:100].flip(0), truth, 4, seed=0)
    two = linear_probe_accuracy(noise, labels, noise[:100].flip(0), truth, 4, seed=0)
    assert one == two
    assert one == pytest.approx(0.25, abs=0.15)


def test_probe_of_constant_collapsed_few_or_no_rows() -> None:
    train, labels = blobs(100, 6, 3, seed=9, spread=0.3)
    val, truth = blobs(60, 6, 3, seed=10, spread=0.3)
    with_constant = torch.cat([train, torch.full((100, 1), 0.3)], dim=1)
    val_constant = torch.cat([val, torch.full((60, 1), 0.3)], dim=1)
    assert linear_probe_accuracy(with_constant, labels, val_constant, truth, 3, 0) == 1.0
    collapsed = linear_probe_accuracy(torch.full((100, 6), 0.1), labels, torch.full((60, 6), 0.1), truth, 3, 0)
    assert collapsed == pytest.approx(float((truth == labels.bincount().argmax()).double().mean()))
    assert linear_probe_accuracy(train[:3], labels[:3], val, truth, 3, 0) is not None
    assert linear_probe_accuracy(train, labels, val[:0], truth[:0], 3, 0) is None
    assert linear_probe_accuracy(train[:0], labels[:0], val, truth, 3, 0) is None
    assert linear_probe_accuracy(train * float("inf"), labels, val, truth, 3, 0) is None
