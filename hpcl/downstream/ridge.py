"""Ridge regression on class labels in closed form.

It has no step size, no epochs and no random start, so two probes of the same
features agree exactly; that is what a search needs to choose its best trial by.
Legend: N training rows; n rows to classify; F features; Y classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

ROWS_AT_ONCE = 8192
"""Rows held in float64 at a time; fewer where they are very long."""

COLUMNS_AT_ONCE = 4096
"""Columns of wide rows held in float64 at a time."""

WIDE = 2048
"""Features up to which the F x F system is solved in any case; a ResNet-50 has as many."""


def is_wide(features: Tensor) -> bool:
    """Whether (N, F) features are so many more than rows that the N x N system is solved instead."""
    return features.shape[1] > max(len(features), WIDE)


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """(F,) float64 mean and standard deviation of (N, F) features; 1 for a constant feature's deviation."""
    mean = features.mean(dim=0, dtype=torch.float64)
    square = torch.zeros_like(mean)
    for columns in _blocks(features):
        square[columns] = (features[:, columns].double() - mean[columns]).square().mean(dim=0)
    return mean, _scale(mean, square)


def _blocks(features: Tensor) -> list[slice]:
    return [slice(start, start + COLUMNS_AT_ONCE) for start in range(0, features.shape[1], COLUMNS_AT_ONCE)]


class Moments(NamedTuple):
    """What ridge regression needs to know of its training rows; float64."""

    mean: Tensor
    """(F,)"""
    scale: Tensor
    """(F,) standard deviation; 1 for a constant feature."""
    gram: Tensor
    """(F, F) sum of x x^T over standardised rows."""
    cross: Tensor
    """(F, Y) sum of x y^T, with y centred."""
    offset: Tensor
    """(Y,) mean of y, the scores of an average row."""


def moments(features: Tensor, labels: Tensor, num_classes: int) -> Moments:
    """Moments of (N, F) features and of their (N,) labels coded +1 for the own class, -1 for others."""
    x_mean = features.mean(dim=0, dtype=torch.float64)
    offset = _mean_sign(labels, num_classes)
    f = features.shape[1]
    gram = features.new_zeros((f, f), dtype=torch.float64)
    cross = features.new_zeros((f, num_classes), dtype=torch.float64)
    for rows, own in zip(torch.split(features, ROWS_AT_ONCE), torch.split(labels, ROWS_AT_ONCE), strict=True):
        x = rows.double() - x_mean
        y = functional.one_hot(own, num_classes).double() * 2.0 - 1.0 - offset
        gram += x.T @ x
        cross += x.T @ y
    scale = _scale(x_mean, gram.diagonal() / len(features))
    return Moments(x_mean, scale, gram / scale[:, None] / scale, cross / scale[:, None], offset)


def _mean_sign(labels: Tensor, num_classes: int) -> Tensor:
    """(Y,) mean over the labels of +1 for the own class, -1 for others."""
    return 2.0 * torch.bincount(labels, minlength=num_classes).double() / len(labels) - 1.0


def _scale(mean: Tensor, variance: Tensor) -> Tensor:
    # a constant feature's variance is rounding only; divided by it, noise would count as much as signal
    constant = variance <= 1e-12 * (mean.square() + variance)
    return torch.where(constant, torch.ones_like(variance), variance.sqrt())


class Ridge(NamedTuple):
    """A fitted linear classifier."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    """(F, Y) on standardised features."""
    offset: Tensor
    """(Y,)"""

    def scores(self, features: Tensor) -> Tensor:
        """(n, F) -> (n, Y) float64; the largest is the predicted class."""
        at_once = min(ROWS_AT_ONCE, max(1, (1 << 26) // max(1, features.shape[1])))
        parts = [((rows.double() - self.mean) / self.scale) @ self.weight for rows in torch.split(features, at_once)]
        return torch.cat(parts) + self.offset


class Products:
    """Inner products of standardised wide rows, a block of columns at a time; float64."""

    def __init__(self, features: Tensor) -> None:
        """
        Args:
            features: (N, F) training rows, any floating dtype.
        """
        self._features = features
        self.mean, self.scale = standardisation(features)
        self.gram = self.with_rows(features)
        """(N, N) of the training rows with each other."""

    def with_rows(self, rows: Tensor) -> Tensor:
        """(n, N) of other (n, F) rows with the training rows."""
        found = rows.new_zeros((len(rows), len(self._features)), dtype=torch.float64)
        for columns in _blocks(self._features):
            found += self._block(rows, columns) @ self._block(self._features, columns).T
        return found

    def combine(self, factors: Tensor) -> Tensor:
        """(F, Y): sums of the training rows with (N, Y) factors."""
        found = factors.new_zeros((len(self.mean), factors.shape[1]))
        for columns in _blocks(self._features):
            found[columns] = self._block(self._features, columns).T @ factors
        return found

    def _block(self, rows: Tensor, columns: slice) -> Tensor:
        return (rows[:, columns].double() - self.mean[columns]) / self.scale[columns]


def dual_factors(products: Products, labels: Tensor, num_classes: int, penalty: float) -> Tensor:
    """(N, Y) factors of the training rows whose sum is the weight that :func:`fit_ridge` gives.

    An N x N system in place of F x F, and exact, since ``(X'X + a I)^-1 X'Y = X' (XX' + a I)^-1 Y``: ridge regression
    in dual variables (Saunders, Gammerman & Vovk, ICML 1998).

    Args:
        products: of the training rows.
        labels, num_classes, penalty: as of :func:`fit_ridge`.
    """
    targets = functional.one_hot(labels, num_classes).double() * 2.0 - 1.0 - _mean_sign(labels, num_classes)
    ridge = products.gram.clone()
    ridge.diagonal().add_(penalty)
    return torch.cholesky_solve(targets, torch.linalg.cholesky(ridge))


def fit_ridge(features: Tensor, labels: Tensor, num_classes: int, penalty: float) -> Ridge:
    """The classifier that minimises ``sum (x W + o - y)^2 + penalty * |W|^2``, intercept o free.

    Features are standardised first, y is +1 for the own class and -1 for others; this is
    scikit-learn's RidgeClassifier(alpha=penalty) on standardised features.

    Args:
        features: (N, F), any floating dtype.
        labels: (N,) long in 0..num_classes-1.
        num_classes: Y.
        penalty: alpha > 0, not scaled by N.
    """
    if is_wide(features):
        products = Products(features)
        weight = products.combine(dual_factors(products, labels, num_classes, penalty))
        return Ridge(products.mean, products.scale, weight, _mean_sign(labels, num_classes))
    m = moments(features, labels, num_classes)
    ridge = m.gram + penalty * torch.eye(len(m.gram), dtype=torch.float64, device=m.gram.device)
    return Ridge(m.mean, m.scale, torch.cholesky_solve(m.cross, torch.linalg.cholesky(ridge)), m.offset)


def ridge_by_penalty(
    features: Tensor, labels: Tensor, rows: Tensor, num_classes: int, penalties: Sequence[float]
) -> Iterator[tuple[float, Tensor]]:
    """Each penalty per training row, and the (n, Y) float64 scores that :func:`fit_ridge` then gives to `rows` (n, F).

    One eigendecomposition of the training rows' moments serves all penalties.
    """
    if is_wide(features):
        products = Products(features)
        between, offset = products.with_rows(rows), _mean_sign(labels, num_classes)
        for penalty in penalties:
            yield penalty, between @ dual_factors(products, labels, num_classes, penalty * len(features)) + offset
        return
    m = moments(features, labels, num_classes)
    values, vectors = torch.linalg.eigh(m.gram)
    values = values.clamp_min(0.0)
    turned = ((rows.double() - m.mean) / m.scale) @ vectors
    cross = vectors.T @ m.cross
    for penalty in penalties:
        yield penalty, turned @ (cross / (values + penalty * len(features))[:, None]) + m.offset
