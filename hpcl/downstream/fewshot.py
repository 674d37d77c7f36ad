"""Task `fewshot`: few-shot classification of classes that training never saw, on frozen features.

An episode draws 5 novel classes (all, where there are fewer), and of each 1 or 5 labelled images and 15 others to
classify (5-way 1-shot and 5-shot of Vinyals et al., NeurIPS 2016); the value is the mean accuracy over 2,000 episodes
drawn by seed, with the usual 95 % interval ``1.96 sd / sqrt(episodes)``. The backbone is not adapted. `nearest
centroid` is CL2N of SimpleShot (Wang, Chao, Weinberger & van der Maaten 2019): features are centred by the mean of the
training images and scaled to length 1, and the class whose labelled images' mean is nearest in Euclidean distance wins.
`logistic regression`, the slower check, is fitted anew in each of the same episodes to features scaled to length 1,
with scikit-learn's ``C = 1`` (Tian et al., ECCV 2020).

Legend: n novel images; F features; E episodes; Y ways; s shots; q queries of a class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hpcl.downstream import refusals
from hpcl.downstream.bench import Bench
from hpcl.downstream.logistic import logistic_by_products
from hpcl.downstream.scores import Encoder, Score
from hpcl.rng import generator

WAY, SHOTS, QUERIES = 5, (1, 5), 15

EPISODES = 2000

STRENGTH = 1.0
"""scikit-learn's C of logistic regression."""

KEYS_AT_ONCE = 1 << 24
"""Random numbers that are drawn at a time (64 MiB)."""

FLOATS_AT_ONCE = 1 << 24
"""Entries of the episodes' features that are held at a time (64 MiB in float32)."""

FITS_AT_ONCE = 250
"""Episodes whose logistic regressions are fitted at a time: some 100 MiB."""

LARGEST_TABLE = 2048
"""Novel images up to which all inner products are computed first, once, and episodes look them up."""


class Episodes(NamedTuple):
    """E draws of labelled and of unlabelled images; places 0..n-1 among the novel images, long."""

    support: Tensor
    """(E, Y, s): the labelled images of each class, which stand in random order."""
    query: Tensor
    """(E, Y, q): the images to classify, of the same classes in the same order."""


def draw_episodes(labels: Tensor, way: int, shot: int, queries: int, count: int, seed: int) -> Episodes:
    """Episodes whose classes, and the images of each class, are uniform draws without repetition.

    Args:
        labels: (n,) long on the CPU; each class that occurs has `shot` + `queries` images or more.
        way: Y, at most the number of classes that occur.
        shot, queries: images per class.
        count: E.
        seed: of the draw.
    """
    classes, sizes = (torch.from_numpy(found) for found in np.unique(labels.numpy(), return_counts=True))
    places = torch.full((len(classes), int(sizes.max())), -1)
    for row, label in zip(places, classes, strict=True):
        own = (labels == label).nonzero().squeeze(1)
        row[: len(own)] = own
    draw = generator(seed, "episodes", shot)
    order = torch.rand(count, len(classes), generator=draw, dtype=torch.float64).argsort(dim=1)[:, :way]
    at_once = max(1, KEYS_AT_ONCE // (way * places.shape[1]))
    parts = []
    for chosen in torch.split(order, at_once):
        key = torch.rand(*chosen.shape, places.shape[1], generator=draw)
        key[torch.arange(places.shape[1]) >= sizes[chosen][..., None]] = math.inf
        first = key.topk(shot + queries, dim=2, largest=False).indices
        parts.append(places[chosen].gather(2, first))
    images = torch.cat(parts)
    return Episodes(images[..., :shot], images[..., shot:])


def inner_products(features: Tensor, episodes: Episodes) -> Iterator[tuple[Tensor, Tensor]]:
    """(E, Y s, Y s) between labelled images, and (E, Y q, Y s) of queries with them, some episodes at a time.

    Args:
        features: (n, F) of the novel images.
        episodes: on the same device; classes side by side in the results.
    """
    support, query = episodes.support.flatten(1), episodes.query.flatten(1)
    if len(features) <= LARGEST_TABLE:
        table = features @ features.T
        at_once = max(1, FLOATS_AT_ONCE // ((support.shape[1] + query.shape[1]) * support.shape[1]))
        for own, asked in zip(torch.split(support, at_once), torch.split(query, at_once), strict=True):
            yield table[own[:, :, None], own[:, None]], table[asked[:, :, None], own[:, None]]
        return
    at_once = max(1, FLOATS_AT_ONCE // ((support.shape[1] + query.shape[1]) * features.shape[1]))
    for own, asked in zip(torch.split(support, at_once), torch.split(query, at_once), strict=True):
        known = features[own]
        yield known @ known.mT, features[asked] @ known.mT


def centroid_predictions(support: Tensor, query: Tensor, way: int) -> Tensor:
    """(E, Y q) long, 0..Y-1: the class whose mean labelled image is nearest, ``argmin |mean|^2 - 2 x . mean``.

    Args:
        support, query: of :func:`inner_products`.
        way: Y.
    """
    e, s = len(support), support.shape[1] // way
    length = support.view(e, way, s, way, s).diagonal(dim1=1, dim2=3).mean(dim=(1, 2))  # (E, Y)
    cosine = query.view(e, -1, way, s).mean(dim=3)
    return (length[:, None] - 2 * cosine).argmin(dim=2)


def logistic_predictions(support: Tensor, query: Tensor, way: int) -> Tensor:
    """(E, Y q) long, 0..Y-1, of :func:`hpcl.downstream.logistic.logistic_by_products`; arguments as above."""
    labels = torch.arange(way, device=support.device).repeat_interleave(support.shape[1] // way)
    parts = [
        logistic_by_products(own.double(), asked.double(), labels, way, STRENGTH).argmax(dim=2)
        for own, asked in zip(torch.split(support, FITS_AT_ONCE), torch.split(query, FITS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts)


CLASSIFIERS = {"nearest centroid": centroid_predictions, "logistic regression": logistic_predictions}


def mean_and_ci95(accuracies: Tensor) -> tuple[float, float]:
    """Mean of (E,) accuracies, E >= 2, and half-width ``1.96 sd / sqrt(E)`` of its 95 % interval (sd by E - 1)."""
    x = accuracies.double()
    return float(x.mean()), 1.96 * float(x.std()) / math.sqrt(len(x))


@torch.no_grad()
def episode_accuracies(features: Tensor, episodes: Episodes, classifier: str) -> Tensor:
    """(E,) float64 on the CPU: fraction of each episode's queries that are classified rightly.

    Args:
        features: (n, F) of the novel images, as the classifier takes them.
        episodes: drawn of them.
        classifier: of CLASSIFIERS.
    """
    way, queries = episodes.query.shape[1:]
    truth = torch.arange(way, device=features.device).repeat_interleave(queries)
    there = Episodes(*(places.to(features.device) for places in episodes))
    found = [
        (CLASSIFIERS[classifier](support, query, way) == truth).double().mean(dim=1).cpu()
        for support, query in inner_products(features, there)
    ]
    return torch.cat(found)


def refusal(bench: Bench) -> str | None:
    """Why few-shot accuracy cannot be measured on these images, and what to do; None where it can."""
    if sentence := refusals.without_labels(bench, "few-shot classification"):
        return sentence
    source, least = bench.images.source, max(SHOTS) + QUERIES
    usable, small = _novel_classes(bench)
    if len(usable) + len(small) < 2:
        drawn = f"train with data.novel_classes={WAY}, or on" if bench.split == "test" else "train on"
        return (
            f"{source}: the number of {bench.split} classes that training never saw is {len(usable) + len(small)}, but "
            "few-shot classification needs 2 or more (accuracy on classes seen in training would leak); "
            f"{drawn} a source whose {bench.split} split has other classes than its train split"
        )
    if len(usable) < 2:
        return (
            f"{source}: {len(small)} of its {len(usable) + len(small)} novel {bench.split} classes have fewer than "
            f"{least} images ({max(SHOTS)} labelled and {QUERIES} to classify), but few-shot classification needs 2 "
            "classes that have them; give more images of these classes"
        )
    return None


def left_out(bench: Bench) -> list[str]:
    """Names of the novel classes that have too few images for an episode, sorted."""
    return sorted(bench.images.classes[label] for label in _novel_classes(bench)[1])


def _novel_classes(bench: Bench) -> tuple[list[int], list[int]]:
    """Classes of the novel images that no training image has: those with enough images, and those with too few."""
    images = bench.images
    assert images.labels is not None
    found, counts = np.unique(images.labels[bench.ids("novel")], return_counts=True)
    novel = ~np.isin(found, images.labels[images.train])
    enough = counts >= max(SHOTS) + QUERIES
    return found[novel & enough].tolist(), found[novel & ~enough].tolist()


def run(bench: Bench, encoders: Sequence[Encoder], seed: int) -> list[Score]:
    """Few-shot accuracy of each encoder: 1-shot before 5-shot, nearest centroid before logistic regression.

    All encoders meet the same episodes. Classes with fewer than 20 images are left out (:func:`left_out`). A value is
    NaN where features are not finite.
    """
    usable = torch.tensor(_novel_classes(bench)[0], device=bench.world.device)
    labels = bench.labels("novel")
    rows = torch.isin(labels, usable)
    labels, way = labels[rows].cpu(), min(WAY, len(usable))
    episodes = {shot: draw_episodes(labels, way, shot, QUERIES, EPISODES, seed) for shot in SHOTS}
    scores = []
    for encoder in encoders:
        novel = bench.features(encoder, "novel", seed)[rows]
        centre = bench.features(encoder, "train", seed).mean(dim=0)
        prepared = {
            "nearest centroid": functional.normalize(novel - centre, dim=1),
            "logistic regression": functional.normalize(novel, dim=1),
        }
        finite = all(bool(features.isfinite().all()) for features in prepared.values())
        for shot, drawn in episodes.items():
            for classifier, features in prepared.items():
                found = episode_accuracies(features, drawn, classifier) if finite else torch.full((EPISODES,), math.nan)
                value, ci95 = mean_and_ci95(found)
                scores.append(
                    Score(
                        task="fewshot",
                        setting=f"{way}-way {shot}-shot, {classifier}",
                        measure="accuracy",
                        encoder=encoder,
                        seed=seed,
                        value=value,
                        count=EPISODES,
                        ci95=ci95,
                    )
                )
    return scores
