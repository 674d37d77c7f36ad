"""Task `linear`: linear probes of frozen features.

The backbone stays in eval mode, features of centre views are computed once, and two linear classifiers are fitted to
all training labels: ridge regression in closed form, and multinomial logistic regression by L-BFGS with an L2 penalty,
as Kornblith, Shlens & Le (CVPR 2019) do. Neither has a step size, epochs or a random start, so two probes of the same
features agree. Features are standardised by the training images. The penalty is chosen on the val split where test
images are scored, and on a seeded fifth of the training images where val images are (or where there are none); either
way the classifier that is scored was then fitted to all training images and to no others. Ridge on the val split is
the value that the objective `linear` of a search maximises.

Legend: N training rows; n rows to classify; F features; Y classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcl.downstream import refusals
from hpcl.downstream.bench import Bench, Part
from hpcl.downstream.logistic import logistic_by_penalty
from hpcl.downstream.ridge import fit_ridge, ridge_by_penalty
from hpcl.downstream.scores import Encoder, Score
from hpcl.rng import generator, seed_of

PENALTIES = tuple(10.0**exponent for exponent in range(-5, 2))
"""Penalties of ridge regression tried, as multiples of the number of rows (features have variance 1)."""

LOGISTIC_PENALTIES = tuple(10.0**exponent for exponent in range(0, -6, -1))
"""Penalties of logistic regression tried; a small one's minimum is found faster from a larger one's."""

INNER_FRACTION = 0.2
"""Part of the training rows on which the penalty is chosen."""


class Rows(NamedTuple):
    """Features with labels."""

    features: Tensor
    """(n, F), any floating dtype."""
    labels: Tensor
    """(n,) long in 0..Y-1."""


def inner_split(train: Rows, seed: int) -> tuple[Rows, Rows]:
    """All but a seeded fifth of the rows, and that fifth, in a random order; the fifth of fewer than 5 is empty."""
    held = int(len(train.labels) * INNER_FRACTION)
    order = torch.randperm(len(train.labels), generator=generator(seed, "probe-split")).to(train.features.device)
    inner, rest = (Rows(train.features[ids], train.labels[ids]) for ids in (order[:held], order[held:]))
    return rest, inner


def choose_penalty(
    features: Tensor, labels: Tensor, num_classes: int, seed: int, choosing: Rows | None = None
) -> float:
    """Ridge regression's penalty per row, out of PENALTIES, that classifies other rows best.

    The larger penalty wins a tie; with fewer than 5 rows it is the middle one.

    Args:
        features: (N, F) training rows.
        labels: (N,) long in 0..num_classes-1.
        num_classes: Y.
        seed: of the fifth of the rows that is held out to choose by.
        choosing: rows to choose by instead; none is held out then.
    """
    train = Rows(features, labels)
    fitted, judge = inner_split(train, seed) if choosing is None else (train, choosing)
    if not len(judge.labels):
        return PENALTIES[len(PENALTIES) // 2]
    best, chosen = -1.0, PENALTIES[-1]
    for penalty, scores in ridge_by_penalty(*fitted, judge.features, num_classes, PENALTIES[::-1]):
        accuracy = _accuracy(scores, judge.labels)
        if accuracy > best:
            best, chosen = accuracy, penalty
    return chosen


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).double().mean())


@torch.no_grad()
def linear_probe_accuracy(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    num_classes: int,
    seed: int,
    choosing: Rows | None = None,
) -> float | None:
    """Fraction of the validation rows that a linear probe of the training rows classifies rightly, 0..1.

    The penalty is chosen on an inner part of the training rows, or on `choosing`; validation labels only score.

    Args:
        train, val: (N, F) and (n, F) backbone features (eval mode), any floating dtype.
        train_labels, val_labels: (N,) and (n,) long in 0..num_classes-1.
        num_classes: Y.
        seed: of the inner split.
        choosing: rows to choose the penalty by.

    Returns:
        None where it is undefined: no rows, or features that are not finite.
    """
    if not _is_defined(train, val, choosing):
        return None
    penalty = choose_penalty(train, train_labels, num_classes, seed, choosing) * len(train)
    return _accuracy(fit_ridge(train, train_labels, num_classes, penalty).scores(val), val_labels)


@torch.no_grad()
def logistic_probe_accuracy(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    num_classes: int,
    seed: int,
    choosing: Rows | None = None,
) -> float | None:
    """As :func:`linear_probe_accuracy`, by multinomial logistic regression."""
    if not _is_defined(train, val, choosing):
        return None
    penalties = LOGISTIC_PENALTIES
    if choosing is not None and len(choosing.labels):
        best, value = -1.0, 0.0
        both = torch.cat([choosing.features, val])
        for _, scores in logistic_by_penalty(train, train_labels, both, num_classes, penalties):
            accuracy = _accuracy(scores[: len(choosing.labels)], choosing.labels)
            if accuracy > best:
                best, value = accuracy, _accuracy(scores[len(choosing.labels) :], val_labels)
        return value
    rest, inner = inner_split(Rows(train, train_labels), seed)
    best, chosen = -1.0, penalties[len(penalties) // 2]
    if len(inner.labels):
        for penalty, scores in logistic_by_penalty(*rest, inner.features, num_classes, penalties):
            accuracy = _accuracy(scores, inner.labels)
            if accuracy > best:
                best, chosen = accuracy, penalty
    until = penalties[: penalties.index(chosen) + 1]
    *_, (_, scores) = logistic_by_penalty(train, train_labels, val, num_classes, until)
    return _accuracy(scores, val_labels)


def _is_defined(train: Tensor, val: Tensor, choosing: Rows | None) -> bool:
    parts = [train, val] if choosing is None else [train, val, choosing.features]
    return bool(len(train)) and bool(len(val)) and all(bool(part.isfinite().all()) for part in parts)


def refusal(bench: Bench) -> str | None:
    """Why linear probes cannot be measured on these images, and what to do; None where they can."""
    return refusals.without_known_classes(bench, "the linear probe")


def run(bench: Bench, encoders: Sequence[Encoder], seed: int) -> list[Score]:
    """Accuracy of both probes on the scored split of each encoder, ridge first.

    The seed only decides which `untrained` and `supervised` networks are measured: the inner fifth is that of
    ``data.split_seed``, as in training. A value is NaN where features are not finite.
    """
    truth, inner_seed = bench.labels(bench.split), seed_of(bench.config.data.split_seed, "probe")
    scores = []
    for encoder in encoders:
        train, scored = (_rows(bench, encoder, part, seed) for part in ("train", bench.split))
        choosing = _rows(bench, encoder, "val", seed) if _val_can_choose(bench) else None
        probes = (("ridge", linear_probe_accuracy), ("logistic regression", logistic_probe_accuracy))
        for setting, probe in probes:
            value = probe(*train, *scored, bench.num_classes, inner_seed, choosing)
            scores.append(
                Score(
                    task="linear",
                    setting=setting,
                    measure="accuracy",
                    encoder=encoder,
                    seed=seed,
                    value=math.nan if value is None else value,
                    count=len(truth),
                )
            )
    return scores


def _val_can_choose(bench: Bench) -> bool:
    """Whether test images are scored, so that val images may choose, and those have classes of training images."""
    labels = bench.images.labels
    assert labels is not None
    return bench.split == "test" and bool(np.isin(labels[bench.ids("val")], labels[bench.ids("train")]).any())


def _rows(bench: Bench, encoder: Encoder, part: Part, seed: int) -> Rows:
    return Rows(bench.features(encoder, part, seed), bench.labels(part))
