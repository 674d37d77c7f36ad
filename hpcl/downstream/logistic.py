"""Multinomial logistic regression: one large problem by L-BFGS, and many small ones at once by Newton's method.

Both find the minimum of a strictly convex function, so the result depends neither on a start nor on a seed.
L-BFGS is torch's own, since it runs where the features lie; scikit-learn's, which it equals, computes on the CPU alone
and there takes between half as long (128 features) and as long (784).

Legend: N training rows; n rows to classify; F features; Y classes; E problems of S
training rows each and q to classify; d = S + 1 weights of a class in such a problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hpcl.downstream.ridge import Products, is_wide, standardisation

ITERATIONS = 300
"""L-BFGS iterations of one penalty, at most."""

TOLERANCE = 1e-5
"""Largest entry of the gradient at which L-BFGS stops."""

NEWTON_STEPS = 50
"""At most; 5 to 10 is usual."""


def coordinates(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Rows in which a linear classifier with an L2 penalty is the same as in (N, F) `train`, standardised by it.

    Where F is far above N these are the N coordinates within the span of the training rows, since weights outside it
    only cost: (N, N) and (n, N) rows for `train` and `others` (n, F); else (N, F) and (n, F). In the dtype of `train`.
    """
    if not is_wide(train):
        mean, scale = standardisation(train)
        return tuple(((rows.double() - mean) / scale).to(train.dtype) for rows in (train, *others))
    products = Products(train)
    values, vectors = torch.linalg.eigh(products.gram)
    kept = values > 1e-10 * values[-1].clamp_min(1e-300)
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    turned = [vectors * root, *(products.with_rows(rows) @ vectors / root for rows in others)]
    return tuple(rows.to(train.dtype) for rows in turned)


@torch.no_grad()
def fit_logistic(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    penalty: float,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """(F + 1, Y) weights and, last, intercepts that minimise ``mean cross-entropy + penalty / 2 |W|^2``.

    The intercepts are free; scikit-learn's ``C`` is ``1 / (penalty N)``. It computes in the dtype of x.

    Args:
        x: (N, F) rows, best of mean 0 and variance 1.
        labels: (N,) long in 0..num_classes-1.
        num_classes: Y.
        penalty: above 0.
        start: (F + 1, Y) to begin from, or None for 0.
        tolerance: largest entry of the gradient at which it stops.
    """
    found = x.new_zeros(x.shape[1] + 1, num_classes) if start is None else start.clone()
    targets = functional.one_hot(labels, num_classes).to(x.dtype)
    search = torch.optim.LBFGS(
        [found],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=1e-9 * tolerance,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def loss() -> float:
        weight = found[:-1]
        log_p = torch.log_softmax(x @ weight + found[-1], dim=1)
        error = (log_p.exp() - targets) / len(x)
        found.grad = torch.cat([x.T @ error + penalty * weight, error.sum(dim=0, keepdim=True)])
        return float(-log_p.gather(1, labels[:, None]).mean() + penalty / 2 * weight.square().sum())

    search.step(loss)  # type: ignore[no-untyped-call]
    return found.detach()


def logistic_by_penalty(
    train: Tensor,
    labels: Tensor,
    rows: Tensor,
    num_classes: int,
    penalties: Sequence[float],
    tolerance: float = TOLERANCE,
) -> Iterator[tuple[float, Tensor]]:
    """Each penalty, best from large to small, and the (n, Y) scores that its classifier gives to `rows` (n, F).

    Args:
        train: (N, F), standardised here.
        labels: (N,) long in 0..num_classes-1.
        tolerance: as of :func:`fit_logistic`.
    """
    x, scored = coordinates(train, rows)
    found: Tensor | None = None
    for penalty in penalties:
        found = fit_logistic(x, labels, num_classes, penalty, found, tolerance)
        yield penalty, scored @ found[:-1] + found[-1]


@torch.no_grad()
def logistic_by_products(support: Tensor, query: Tensor, labels: Tensor, num_classes: int, strength: float) -> Tensor:
    """(E, q, Y) scores of E small classifiers that minimise ``strength * sum of cross-entropies + |W|^2 / 2``.

    `strength` is scikit-learn's ``C``; intercepts are free. Only inner products of rows are needed: the rows are
    replaced by their coordinates in the span of the S training rows. Newton's method, each step halved until the
    function does not rise.

    Args:
        support: (E, S, S) inner products of the training rows of each problem, float64.
        query: (E, q, S) of the rows to classify with them, float64.
        labels: (S,) long in 0..num_classes-1, the same in each problem.
        num_classes: Y.
        strength: above 0.
    """
    values, vectors = torch.linalg.eigh(support)
    root = values.clamp_min(1e-12 * values[:, -1:].clamp_min(1e-300)).sqrt()
    ones = support.new_ones(len(support), 1, 1)
    x = torch.cat([vectors * root[:, None], ones.expand(-1, support.shape[1], 1)], dim=2)
    rows = torch.cat([query @ vectors / root[:, None], ones.expand(-1, query.shape[1], 1)], dim=2)
    width = x.shape[2]
    shrink = x.new_ones(width)
    shrink[-1] = 0.0
    targets = functional.one_hot(labels, num_classes).to(x)

    def value_at(theta: Tensor) -> Tensor:
        log_p = torch.log_softmax(x @ theta, dim=2)
        return -strength * (log_p * targets).sum(dim=(1, 2)) + (theta.square() * shrink[:, None]).sum(dim=(1, 2)) / 2

    theta = x.new_zeros(len(x), width, num_classes)
    value = value_at(theta)
    for _ in range(NEWTON_STEPS):
        p = torch.softmax(x @ theta, dim=2)
        gradient = strength * x.mT @ (p - targets) + shrink[:, None] * theta
        if float(gradient.abs().max()) < 1e-9 * max(1.0, strength):
            break
        step = torch.cholesky_solve(
            gradient.mT.reshape(len(x), -1, 1), torch.linalg.cholesky(_curvature(x, p, strength, shrink))
        )
        step = step.view(len(x), num_classes, width).mT
        length = x.new_ones(len(x), 1, 1)
        for _ in range(30):
            moved = value_at(theta - length * step)
            rises = moved > value + 1e-12 * value.abs()
            if not bool(rises.any()):
                break
            length = torch.where(rises[:, None, None], length / 2, length)
        theta, value = theta - length * step, moved
    return rows @ theta


def _curvature(x: Tensor, p: Tensor, strength: float, shrink: Tensor) -> Tensor:
    """(E, Y d, Y d) second derivatives by weights of the same class side by side, for x (E, S, d) and p (E, S, Y)."""
    count, _, width = x.shape
    classes = p.shape[2]
    between = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]  # (E, S, Y, Y)
    squares = x[..., :, None] * x[..., None, :]  # (E, S, d, d)
    blocks = between.flatten(2).mT @ squares.flatten(2)  # (E, Y Y, d d)
    full = blocks.view(count, classes, classes, width, width).transpose(2, 3).reshape(count, classes * width, -1)
    full *= strength
    full.diagonal(dim1=1, dim2=2).add_(shrink.repeat(classes))
    # A constant added to all intercepts changes nothing; the gradient has no part along it, so neither has the step.
    intercepts = torch.arange(width - 1, classes * width, width, device=x.device)
    full[:, intercepts[:, None], intercepts] += strength
    return full
