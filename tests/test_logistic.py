"""Logistic regression and ridge regression of wide rows, against scikit-learn and their direct forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from torch import Tensor

from hpcl.downstream import linear, ridge
from hpcl.downstream.linear import Rows, choose_penalty, inner_split, linear_probe_accuracy, logistic_probe_accuracy
from hpcl.downstream.logistic import coordinates, fit_logistic, logistic_by_penalty, logistic_by_products


def blobs(count: int, dim: int, classes: int, seed: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Classes around centres that do not depend on the seed; features of unequal scale and mean, float64."""
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    x = (centres[labels] + spread * rng.normal(size=(count, dim))) * np.linspace(0.1, 5.0, dim) + 3.0
    return torch.from_numpy(x), torch.from_numpy(labels)


def standard(train: Tensor, rows: Tensor) -> Any:
    return ((rows - train.mean(0)) / train.std(0, correction=0)).numpy()


# ---------------------------------------------------------------- ridge regression of wide rows


@pytest.mark.parametrize("penalty", [0.3, 30.0])
def test_wide_ridge_equals_the_narrow_form_and_scikit_learn(penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = blobs(40, 90, 5, seed=0)
    rows, _ = blobs(30, 90, 5, seed=1)
    assert not ridge.is_wide(train)  # 90 features are few enough for the narrow form
    narrow = ridge.fit_ridge(train, labels, 5, penalty)
    monkeypatch.setattr(ridge, "WIDE", 16)
    monkeypatch.setattr(ridge, "COLUMNS_AT_ONCE", 32)  # several blocks, the last one smaller
    assert ridge.is_wide(train)
    wide = ridge.fit_ridge(train, labels, 5, penalty)
    for ours, theirs in zip(wide, narrow, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-8, atol=1e-10)
    theirs = RidgeClassifier(alpha=penalty).fit(standard(train, train), labels.numpy())
    decision = theirs.decision_function(standard(train, rows))
    np.testing.assert_allclose(wide.scores(rows).numpy(), decision, rtol=1e-7, atol=1e-9)
    ((_, scores),) = ridge.ridge_by_penalty(train, labels, rows, 5, [penalty / 40])
    np.testing.assert_allclose(scores.numpy(), decision, rtol=1e-7, atol=1e-9)


def test_wide_rows_choose_the_same_penalty_and_survive_constant_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = blobs(100, 150, 4, seed=2)
    val, truth = blobs(200, 150, 4, seed=3)
    train[:, 7] = val[:, 7] = 0.3
    narrow = choose_penalty(train, labels, 4, seed=1), linear_probe_accuracy(train, labels, val, truth, 4, seed=1)
    monkeypatch.setattr(ridge, "WIDE", 16)
    wide = choose_penalty(train, labels, 4, seed=1), linear_probe_accuracy(train, labels, val, truth, 4, seed=1)
    assert wide == narrow and wide[1] is not None and wide[1] > 0.3


# ---------------------------------------------------------------- one large problem


@pytest.mark.parametrize(("classes", "penalty"), [(2, 0.1), (5, 0.01), (5, 3.0)])
def test_logistic_regression_equals_scikit_learn(classes: int, penalty: float) -> None:
    train, labels = blobs(300, 12, classes, seed=4)
    rows, _ = blobs(100, 12, classes, seed=5)
    x, scored = coordinates(train, rows)
    found = fit_logistic(x, labels, classes, penalty, tolerance=1e-10)
    ours = torch.softmax(scored @ found[:-1] + found[-1], 1)
    # of 2 classes scikit-learn has one weight vector w, which costs |w|^2; ours are w / 2 and -w / 2, half as much
    c = (2 if classes == 2 else 1) / penalty / 300
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x.numpy(), labels.numpy())
    np.testing.assert_allclose(ours.numpy(), theirs.predict_proba(scored.numpy()), atol=1e-6)


def test_a_path_of_penalties_ends_where_each_alone_does_also_in_float32() -> None:
    train, labels = blobs(400, 20, 4, seed=6)
    rows, _ = blobs(100, 20, 4, seed=7)
    penalties = linear.LOGISTIC_PENALTIES
    x, scored = coordinates(train, rows)
    for penalty, scores in logistic_by_penalty(train.float(), labels, rows.float(), 4, penalties):
        found = fit_logistic(x, labels, 4, penalty, tolerance=1e-9)
        alone = torch.softmax(scored @ found[:-1] + found[-1], 1)
        np.testing.assert_allclose(torch.softmax(scores, 1).numpy(), alone.numpy(), atol=2e-3)
        assert scores.dtype == torch.float32


def test_wide_rows_have_the_same_logistic_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = blobs(40, 90, 3, seed=8)
    rows, _ = blobs(30, 90, 3, seed=9)
    penalties = (1.0, 0.01)
    narrow = [scores for _, scores in logistic_by_penalty(train, labels, rows, 3, penalties, 1e-9)]
    monkeypatch.setattr(ridge, "WIDE", 16)
    assert coordinates(train)[0].shape == (40, 39)  # centred rows span one dimension less than there are rows
    for (_, ours), theirs in zip(logistic_by_penalty(train, labels, rows, 3, penalties, 1e-9), narrow, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-5)


# ---------------------------------------------------------------- how the penalty is chosen


@pytest.mark.parametrize("probe", [linear_probe_accuracy, logistic_probe_accuracy])
def test_the_penalty_is_chosen_by_other_rows_and_all_training_rows_are_fitted(probe: Any) -> None:
    train, labels = (part[:80] for part in blobs(400, 40, 5, seed=10, spread=4.0))
    judges, test = (Rows(*blobs(200, 40, 5, seed=seed, spread=4.0)) for seed in (11, 12))
    by_penalty, penalties = logistic_by_penalty, linear.LOGISTIC_PENALTIES
    if probe is linear_probe_accuracy:
        by_penalty, penalties = ridge.ridge_by_penalty, linear.PENALTIES[::-1]

    def accuracies(fitted: Rows, rows: Rows) -> dict[float, float]:
        return {
            penalty: float((scores.argmax(1) == rows.labels).double().mean())
            for penalty, scores in by_penalty(*fitted, rows.features, 5, penalties)
        }

    def best(found: dict[float, float]) -> float:
        return max(penalty for penalty, accuracy in found.items() if accuracy == max(found.values()))

    own = Rows(train, labels)
    scored = accuracies(own, test)
    assert min(scored.values()) < max(scored.values())  # the choice matters here
    by_others, by_inner = best(accuracies(own, judges)), best(accuracies(*inner_split(own, 3)))
    assert scored[by_others] != scored[by_inner]
    assert probe(*own, *test, 5, 3, judges) == scored[by_others]
    assert probe(*own, *test, 5, 3) == scored[by_inner]


def test_the_inner_split_is_seeded_and_disjoint() -> None:
    rows = Rows(torch.arange(23.0)[:, None], torch.arange(23))
    rest, inner = inner_split(rows, 0)
    assert len(inner.labels) == 4 and sorted([*rest.labels.tolist(), *inner.labels.tolist()]) == list(range(23))
    assert torch.equal(inner.features[:, 0].long(), inner.labels)
    assert torch.equal(inner_split(rows, 0)[1].labels, inner.labels)
    assert not torch.equal(inner_split(rows, 1)[1].labels, inner.labels)


def test_logistic_probe_of_few_none_or_infinite_rows() -> None:
    train, labels = blobs(60, 6, 3, seed=13, spread=0.3)
    val, truth = blobs(50, 6, 3, seed=14, spread=0.3)
    assert logistic_probe_accuracy(train, labels, val, truth, 3, 0) == 1.0
    assert logistic_probe_accuracy(train[:4], labels[:4], val, truth, 3, 0) is not None
    assert logistic_probe_accuracy(train, labels, val[:0], truth[:0], 3, 0) is None
    assert logistic_probe_accuracy(train[:0], labels[:0], val, truth, 3, 0) is None
    assert logistic_probe_accuracy(train, labels, val, truth, 3, 0, Rows(train * math.inf, labels)) is None
    same = torch.full((60, 6), 0.1)
    collapsed = logistic_probe_accuracy(same, labels, same[:50], truth, 3, 0)
    assert collapsed == pytest.approx(float((truth == labels.bincount().argmax()).double().mean()))


# ---------------------------------------------------------------- many small problems


@pytest.mark.parametrize(("shot", "classes", "strength"), [(1, 5, 1.0), (5, 5, 1.0), (3, 2, 1.0), (5, 3, 100.0)])
def test_many_small_problems_equal_scikit_learn_one_by_one(shot: int, classes: int, strength: float) -> None:
    draw = torch.Generator().manual_seed(shot)
    labels = torch.arange(classes).repeat_interleave(shot)
    centres = torch.randn(6, classes, 30, generator=draw, dtype=torch.float64)
    rows = centres[:, labels] + torch.randn(6, len(labels), 30, generator=draw, dtype=torch.float64)
    rows, queries = (
        torch.nn.functional.normalize(x, dim=2)
        for x in (rows, torch.randn(6, 11, 30, generator=draw, dtype=torch.float64))
    )
    found = logistic_by_products(rows @ rows.mT, queries @ rows.mT, labels, classes, strength)
    for x, q, ours in zip(rows, queries, found, strict=True):
        c = 2 * strength if classes == 2 else strength
        theirs = LogisticRegression(C=c, tol=1e-12, max_iter=10_000).fit(x.numpy(), labels.numpy())
        np.testing.assert_allclose(torch.softmax(ours, 1).numpy(), theirs.predict_proba(q.numpy()), atol=1e-6)


def test_steps_that_overshoot_are_shortened() -> None:
    """Far rows and a weak penalty, at which Newton's own steps run away."""
    labels = torch.arange(3).repeat_interleave(4)
    x = torch.randn(40, 12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    found = torch.softmax(logistic_by_products(x @ x.mT, x @ x.mT, labels, 3, 1e4), 2)
    for i in (0, 23):  # the second is one that runs away
        theirs = LogisticRegression(C=1e4, tol=1e-9, max_iter=100_000).fit(x[i].numpy(), labels.numpy())
        np.testing.assert_allclose(found[i].numpy(), theirs.predict_proba(x[i].numpy()), atol=1e-4)


def test_equal_rows_are_no_singular_problem() -> None:
    labels = torch.arange(3).repeat_interleave(2)
    products = torch.ones(1, 6, 6, dtype=torch.float64)
    found = torch.softmax(logistic_by_products(products, torch.ones(1, 4, 6).double(), labels, 3, 1.0), 2)
    np.testing.assert_allclose(found.numpy(), np.full((1, 4, 3), 1 / 3), atol=1e-6)
