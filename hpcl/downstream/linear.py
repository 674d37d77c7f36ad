"""Linear probe of frozen features: ridge regression in closed form.

It has no step size, no epochs and no random start, so two probes of the same
features agree exactly; that is what a search needs to choose its best trial by.
Legend: N training rows; n rows to classify; F features; Y classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpcl.rng import generator

PENALTIES = tuple(10.0**exponent for exponent in range(-5, 2))
"""Penalties tried, as multiples of the number of rows (features have variance 1)."""

INNER_FRACTION = 0.2
"""Part of the training rows on which the penalty is chosen."""

ROWS_AT_ONCE = 8192
"""Rows held in float64 at a time."""


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
    count = torch.bincount(labels, minlength=num_classes).double()
    offset = 2.0 * count / len(labels) - 1.0
    f = features.shape[1]
    gram = features.new_zeros((f, f), dtype=torch.float64)
    cross = features.new_zeros((f, num_classes), dtype=torch.float64)
    for rows, own in zip(torch.split(features, ROWS_AT_ONCE), torch.split(labels, ROWS_AT_ONCE), strict=True):
        x = rows.double() - x_mean
        y = torch.nn.functional.one_hot(own, num_classes).double() * 2.0 - 1.0 - offset
        gram += x.T @ x
        cross += x.T @ y
    variance = gram.diagonal() / len(features)
    # a constant feature's variance is rounding only; divided by it, noise would count as much as signal
    constant = variance <= 1e-12 * (x_mean.square() + variance)
    scale = torch.where(constant, torch.ones_like(variance), variance.sqrt())
    return Moments(x_mean, scale, gram / scale[:, None] / scale, cross / scale[:, None], offset)


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
        parts = [
            ((rows.double() - self.mean) / self.scale) @ self.weight for rows in torch.split(features, ROWS_AT_ONCE)
        ]
        return torch.cat(parts) + self.offset


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
    m = moments(features, labels, num_classes)
    ridge = m.gram + penalty * torch.eye(len(m.gram), dtype=torch.float64, device=m.gram.device)
    return Ridge(m.mean, m.scale, torch.cholesky_solve(m.cross, torch.linalg.cholesky(ridge)), m.offset)


def choose_penalty(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> float:
    """The penalty per row, out of PENALTIES, that classifies a seeded fifth of the rows best.

    One eigendecomposition of the other rows' moments serves all penalties. The larger
    penalty wins a tie; with fewer than 5 rows it is the middle one.
    """
    held = int(len(features) * INNER_FRACTION)
    if not held:
        return PENALTIES[len(PENALTIES) // 2]
    order = torch.randperm(len(features), generator=generator(seed, "probe-split")).to(features.device)
    inner, rest = order[:held], order[held:]
    m = moments(features[rest], labels[rest], num_classes)
    values, vectors = torch.linalg.eigh(m.gram)
    values = values.clamp_min(0.0)
    turned = ((features[inner].double() - m.mean) / m.scale) @ vectors
    cross = vectors.T @ m.cross
    best, chosen = -1.0, PENALTIES[-1]
    for penalty in reversed(PENALTIES):
        scores = turned @ (cross / (values + penalty * len(rest))[:, None]) + m.offset
        accuracy = float((scores.argmax(dim=1) == labels[inner]).double().mean())
        if accuracy > best:
            best, chosen = accuracy, penalty
    return chosen


@torch.no_grad()
def linear_probe_accuracy(
    train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, num_classes: int, seed: int
) -> float | None:
    """Fraction of the validation rows that a linear probe of the training rows classifies rightly, 0..1.

    The penalty is chosen on an inner part of the training rows; validation labels only score.

    Args:
        train, val: (N, F) and (n, F) backbone features (eval mode), any floating dtype.
        train_labels, val_labels: (N,) and (n,) long in 0..num_classes-1.
        num_classes: Y.
        seed: of the inner split.

    Returns:
        None where it is undefined: no rows, or features that are not finite.
    """
    if not len(train) or not len(val) or not bool(train.isfinite().all() & val.isfinite().all()):
        return None
    penalty = choose_penalty(train, train_labels, num_classes, seed) * len(train)
    scores = fit_ridge(train, train_labels, num_classes, penalty).scores(val)
    return float((scores.argmax(dim=1) == val_labels).double().mean())
