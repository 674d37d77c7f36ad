"""Task `finetune`: accuracy when only 1 % or 10 % of the training images are labelled.

SimCLR v2 (Chen et al. 2020, section 2): the network that learnt without labels is trained on, as a whole and from
the first layer of its projection head, by the few labels there are. Which layer that is for each head:
:func:`hpcl.downstream.supervised.head_start`.

An untrained network that is fine-tuned is a network trained from scratch, so `untrained` and `supervised` are one
thing here, given once as `supervised`. `pixels` is logistic regression on the same labelled images.
Legend: n labelled images; F pixel values; Y classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from hpcl.downstream import refusals
from hpcl.downstream.bench import Bench
from hpcl.downstream.labels import FRACTIONS, percent
from hpcl.downstream.recipes import FINE_TUNE, FROM_SCRATCH, Recipe
from hpcl.downstream.scores import Encoder, Score
from hpcl.downstream.supervised import Classifier, accuracy, train_classifier, train_from_scratch

TASK = "finetune"

PIXEL_INVERSE_PENALTY = 0.01
"""C of the logistic regression on normalised pixels; between 0.001 and 10 it hardly matters on MNIST-5k."""

_Rows = npt.NDArray[np.float64]


def refusal(bench: Bench) -> str | None:
    """Why nothing can be measured, with what to do; None if it can."""
    return refusals.without_known_classes(bench, "training by few labels")


def asked(encoders: Sequence[Encoder], known: Sequence[Encoder]) -> list[Encoder]:
    """Those of the encoders that a task gives, once each, with `supervised` in the place of `untrained`."""
    wanted: list[Encoder] = ["supervised" if name == "untrained" else name for name in encoders]
    return [name for name in dict.fromkeys(wanted) if name in known]


def run(
    bench: Bench,
    encoders: Sequence[Encoder],
    seed: int,
    fine_tune: Recipe = FINE_TUNE,
    from_scratch: Recipe = FROM_SCRATCH,
) -> list[Score]:
    """One score per encoder and fraction; `trained` at 1 % is the task's value.

    Args:
        bench: images, networks, and the part that is scored; no other image is looked at but the training ones.
        encoders: of `trained`, `untrained` or `supervised` (the same), `pixels`; others give nothing.
        seed: of the lists of labelled images, the random starts, and the training.
        fine_tune: of the trained network.
        from_scratch: of the supervised one.
    """
    scores = []
    for encoder in asked(encoders, ("trained", "supervised", "pixels")):
        for fraction in FRACTIONS:
            if encoder == "pixels":
                value = pixel_accuracy(bench, fraction, seed)
            else:
                value = accuracy(bench, teacher(bench, encoder, fraction, seed, fine_tune, from_scratch))
            setting = percent(fraction)
            scores.append(Score(TASK, setting, "accuracy", encoder, seed, value, len(bench.ids(bench.split))))
    return scores


def teacher(
    bench: Bench,
    encoder: Encoder,
    fraction: float,
    seed: int,
    fine_tune: Recipe = FINE_TUNE,
    from_scratch: Recipe = FROM_SCRATCH,
) -> Classifier:
    """The network after training by a fraction of the labels, in eval mode; trained once per bench.

    Args:
        bench: where it is kept.
        encoder: `trained` (fine-tuned) or `supervised` (from scratch).
        fraction: of the training images.
        seed: of the list of labelled images, the random start, and the training.
        fine_tune, from_scratch: the recipe of the one and of the other.
    """
    recipe = fine_tune if encoder == "trained" else from_scratch
    key = (TASK, encoder, fraction, seed, recipe)
    if key not in bench.kept:
        ids = bench.labelled(fraction, seed)
        if encoder == "trained":
            bench.kept[key] = train_classifier(bench, bench.network("trained", seed), ids, recipe, seed)
        else:
            bench.kept[key] = train_from_scratch(bench, ids, seed, recipe)
    classifier: Classifier = bench.kept[key]
    return classifier


def pixel_accuracy(bench: Bench, fraction: float, seed: int) -> float:
    """Accuracy of logistic regression on the normalised pixels of the labelled images."""
    ids = bench.labelled(fraction, seed)
    assert bench.images.labels is not None
    rows = bench.features_of("pixels", ids, seed).cpu().double().numpy()
    queries = bench.features("pixels", bench.split, seed).cpu().double().numpy()
    rows, queries = in_few_numbers(rows, queries)
    model = LogisticRegression(C=PIXEL_INVERSE_PENALTY, max_iter=500).fit(rows, bench.images.labels[ids])
    return float(model.score(queries, bench.labels(bench.split).cpu().numpy()))


def in_few_numbers(rows: _Rows, queries: _Rows) -> tuple[_Rows, _Rows]:
    """Both turned into the space that (n, F) rows span, where that is smaller: n numbers instead of F.

    A linear model with an L2 penalty gives the same scores there: its weights are a sum of rows anyway.
    """
    if len(rows) >= rows.shape[1]:
        return rows, queries
    basis, _ = np.linalg.qr(rows.T)
    return rows @ basis, queries @ basis
