"""Task `voc`: which objects are in an image, by linear SVMs on frozen features (Goyal et al., ICCV 2019).

The protocol is that of Goyal et al. ("Scaling and Benchmarking Self-Supervised Visual Representation Learning",
`fair_self_supervision_benchmark`), which MoCo- and PCL-type papers report as VOC07 mAP. One against the rest for each
class; squared hinge and L2 penalty; positives count twice; C by the mean average precision of 3 unshuffled folds of
the training images. What differs:

- The primal problem is solved, not the dual: the same optimum, without a random order.
- Images that hold a class only as a difficult object are left out for it in training too, as VOC's own code does.
  (There they train as negatives and are left out of the test; PCL's script counts them as negatives in both.)
- With few labels C is fixed: both scripts take the one that is best on the test images.

Legend: N images; F features; Y classes; k positives of a class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor

from hpcl.augment import centre_view
from hpcl.data import Ids
from hpcl.downstream.bench import Bench, flat_pixels
from hpcl.downstream.scores import Encoder, Score
from hpcl.downstream.voc.average_precision import FORMS, average_precision
from hpcl.downstream.voc.data import VocData, used_parts
from hpcl.features import FeaturePass
from hpcl.heads import unit
from hpcl.rng import seed_of

TASK = "voc"
_AT_ONCE = 64
"""Images decoded and passed at a time."""

_Floats = npt.NDArray[np.float64]
_Presence = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Protocol:
    """How the SVMs are trained; the defaults are those of the paper and its code."""

    costs: tuple[float, ...] = tuple(sorted({10.0**e for e in range(-7, 3)} | {0.5**e for e in range(4, 20)}))
    """C, of which the best is taken for each class; the smallest of equals."""
    folds: int = 3
    """Parts in which the training images are cut for choosing C, at most as many as there are positives."""
    positive_weight: float = 2.0
    """Weight of a positive's loss; a negative's is 1."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """k: positives of each class where labels are few; each comes with (Y - 1) k negatives."""
    draws: int = 5
    """Draws of such images; the value is their mean."""
    shot_cost: float = 0.5
    """C where labels are few (the default of PCL's script), or positives too few for two folds."""


class _Labels(NamedTuple):
    """Which images train and which are scored, what is in them, and the classes for which both are possible."""

    train: Ids
    scored: Ids
    in_train: _Presence
    """(N, Y) as :attr:`VocData.presence`."""
    in_scored: _Presence
    classes: list[int]

    def setting(self, text: str, used: int) -> str:
        """With the number of classes that count, if some are left out."""
        every = self.in_train.shape[1]
        return text if used == every else f"{text}, {used} of {every} classes"


class _Features(NamedTuple):
    """Of one encoder, rows of length 1."""

    train: _Floats
    scored: _Floats

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.train).all() and np.isfinite(self.scored).all())


def refusal(bench: Bench, voc: VocData | None) -> str | None:
    """Why the task cannot be run, and what it needs; None if it can."""
    if voc is None:
        return "needs images with annotations: a folder in VOC2007 form (--voc PATH)"
    missing = voc.missing(bench.split)
    if missing is None and not _labels(bench, voc).classes:
        train, scored = used_parts(bench.split)
        missing = (
            f"{voc.root}: has no class with an image that holds it and one that does not in {train}, and one that "
            f"holds it in {scored}"
        )
    return missing


def run(
    bench: Bench,
    encoders: Sequence[Encoder],
    seed: int,
    voc: VocData,
    *,
    size: int | None = None,
    protocol: Protocol = Protocol(),
) -> list[Score]:
    """Mean average precision over the classes, with all labels and with k positives a class, in both of VOC's forms.

    A value is NaN where an encoder's features are not finite. Encoders without features (`sgan`) are passed over.

    Args:
        bench: networks, and the mean and standard deviation of the images they were trained on.
        encoders: what is compared.
        seed: of untrained networks, and of the draws with few labels, which are the same for all encoders.
        voc: images and labels; :func:`refusal` must be None.
        size: side of the square to which images are resized and cut; None takes the shorter side of the training
            images. Some networks want more here than in training (FixRes, Touvron et al. 2019).
        protocol: how the SVMs are trained.
    """
    labels = _labels(bench, voc)
    encoders = [encoder for encoder in encoders if encoder != "sgan"]
    size = size or min(bench.images.images.shape[2:])
    ids = np.concatenate([labels.train, labels.scored])
    cut = len(labels.train)
    scores: list[Score] = []
    for encoder, found in features_of(bench, encoders, seed, voc, ids, size).items():
        rows = unit(found.double()).cpu().numpy()
        features = _Features(rows[:cut], rows[cut:])
        setting = labels.setting("all labels", len(labels.classes))
        aps = _all_labels(features, labels, protocol)
        scores += _scores(encoder, seed, setting, aps[None], labels)
        for k in protocol.shots:
            classes = [label for label in labels.classes if (labels.in_train[:, label] == 1).sum() >= k]
            if classes:
                draws = [_few_labels(features, labels, protocol, classes, k, seed, i) for i in range(protocol.draws)]
                setting = labels.setting(f"{k} positives a class", len(classes))
                scores += _scores(encoder, seed, setting, np.stack(draws), labels)
    return scores


def features_of(
    bench: Bench, encoders: Sequence[Encoder], seed: int, voc: VocData, ids: Ids, size: int
) -> dict[Encoder, Tensor]:
    """(N, F) float32 backbone features of these images for each encoder; every image is decoded once.

    Of `pixels` the normalised image itself (:func:`hpcl.downstream.bench.flat_pixels`).
    """
    images = bench.device_images
    channels = len(images.mean)
    passes = FeaturePass(images, bench.world, torch.float32)
    parts: dict[Encoder, list[Tensor]] = {encoder: [] for encoder in encoders}
    for start in range(0, len(ids), _AT_ONCE):
        raw = np.stack([voc.pixels(int(i), channels, size) for i in ids[start : start + _AT_ONCE]])
        inputs = centre_view(torch.from_numpy(raw).to(images.device), images.mean, images.std)
        for encoder, found in parts.items():
            if encoder == "pixels":
                found.append(flat_pixels(inputs))
            else:
                network = bench.network(encoder, seed)
                found.append(passes.of_tensors(network, inputs, use_head=False).backbone.float())
    return {encoder: torch.cat(found) for encoder, found in parts.items()}


def _labels(bench: Bench, voc: VocData) -> _Labels:
    train, scored = (voc.parts[part] for part in used_parts(bench.split))
    in_train, in_scored = voc.presence[train], voc.presence[scored]
    usable = (in_train == 1).any(0) & (in_train == -1).any(0) & (in_scored == 1).any(0)
    return _Labels(train, scored, in_train, in_scored, np.flatnonzero(usable).tolist())


def _scores(encoder: Encoder, seed: int, setting: str, aps: _Floats, labels: _Labels) -> list[Score]:
    """One row for each form, from (draws, classes, forms) average precisions."""
    values = aps.mean(1)
    scores = []
    for form, of_draw in zip(FORMS, values.T, strict=True):
        draws = len(of_draw)  # few, so Student's t: 2.78 for five
        error = float(of_draw.std(ddof=1)) / math.sqrt(draws) if draws > 1 else None
        ci95 = None if error is None else float(stats.t.ppf(0.975, draws - 1)) * error
        value, count = float(of_draw.mean()), len(labels.scored)
        scores.append(Score(TASK, setting, f"mAP ({form})", encoder, seed, value, count, ci95))
    return scores


def _all_labels(features: _Features, labels: _Labels, protocol: Protocol) -> _Floats:
    """(classes, forms) average precision with all training labels."""

    def decide(label: int) -> _Floats:
        rows = np.flatnonzero(labels.in_train[:, label])
        x, y = features.train[rows], (labels.in_train[rows, label] == 1).astype(int)
        return _decide(x, y, choose_cost(x, y, protocol), features.scored, protocol)

    return _aps(decide, features, labels, labels.classes)


def _few_labels(
    features: _Features, labels: _Labels, protocol: Protocol, classes: list[int], k: int, seed: int, draw: int
) -> _Floats:
    """(classes, forms) average precision with k positives and (Y - 1) k negatives, drawn for each class apart.

    The draw is the same for every encoder, and holds those of smaller k.
    """
    negatives = max(1, len(labels.classes) - 1) * k

    def decide(label: int) -> _Floats:
        rng = np.random.default_rng(seed_of(seed, "voc-shots", draw, label))
        held, others = (rng.permutation(np.flatnonzero(labels.in_train[:, label] == sign)) for sign in (1, -1))
        rows = np.concatenate([held[:k], others[:negatives]])
        y = (np.arange(len(rows)) < k).astype(int)
        return _decide(features.train[rows], y, protocol.shot_cost, features.scored, protocol)

    return _aps(decide, features, labels, classes)


def _aps(decide: Callable[[int], _Floats], features: _Features, labels: _Labels, classes: list[int]) -> _Floats:
    """(classes, forms) average precision of each class's decisions; NaN where features are not finite."""
    aps = np.full((len(classes), len(FORMS)), math.nan)
    if not features.finite:
        return aps
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # liblinear lets go of the interpreter lock
        decisions = list(pool.map(decide, classes))
    for i, (label, decision) in enumerate(zip(classes, decisions, strict=True)):
        rows = np.flatnonzero(labels.in_scored[:, label])  # difficult ones are neither found nor missed
        for j, form in enumerate(FORMS):
            aps[i, j] = average_precision(decision[rows], labels.in_scored[rows, label] == 1, form)
    return aps


def choose_cost(x: _Floats, y: npt.NDArray[np.int_], protocol: Protocol) -> float:
    """C with the best mean average precision (scikit-learn's) over the folds of these rows alone.

    Args:
        x: (N, F) features.
        y: (N,) 1 for positives, 0 for negatives.
        protocol: costs and folds. With fewer than two positives or negatives it is `shot_cost`.
    """
    from sklearn.model_selection import cross_val_score

    folds = min(protocol.folds, int(y.sum()), int((1 - y).sum()))
    if folds < 2:
        return protocol.shot_cost
    means = [
        cross_val_score(_svm(cost, protocol), x, y, cv=folds, scoring="average_precision").mean()
        for cost in protocol.costs
    ]
    return protocol.costs[int(np.argmax(means))]


def _decide(x: _Floats, y: npt.NDArray[np.int_], cost: float, scored: _Floats, protocol: Protocol) -> _Floats:
    """(n,) distances of the scored rows from the SVM's border, in its units."""
    decisions: _Floats = _svm(cost, protocol).fit(x, y).decision_function(scored)
    return decisions


def _svm(cost: float, protocol: Protocol) -> Any:
    from sklearn.svm import LinearSVC

    # settings of the paper's code, but for dual
    return LinearSVC(C=cost, class_weight={1: protocol.positive_weight, 0: 1.0}, dual=False, tol=1e-4, max_iter=2000)
