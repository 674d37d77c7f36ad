"""Task `knn`: weighted k-nearest-neighbour accuracy of frozen features.

Nothing is fitted and nothing is drawn: backbone features are scaled to length 1, all training images vote, and each
image of the scored split gets the class with most votes, which its k nearest training images by cosine give with weight
``exp(cosine / T)`` (Wu, Xiong, Yu & Lin, CVPR 2018). k = 200 and T = 0.1 are MoCo's CIFAR demonstration's; k = 20 and
T = 0.07 are the other usual pair (DINO's, Caron et al., ICCV 2021). With fewer training images than k all of them vote.

Legend: N bank images; n queries; F backbone features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hpcl.downstream import refusals
from hpcl.downstream.bench import Bench
from hpcl.downstream.scores import Encoder, Score

VOTES = ((200, 0.1), (20, 0.07))
"""(k, T) of each setting; the first is the primary one."""

SIMILARITIES_AT_ONCE = 1 << 24
"""Entries of the query-by-bank block held at a time (64 MiB in float32)."""


@torch.no_grad()
def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Class of each query by a weighted vote of its k nearest bank images (Wu et al., CVPR 2018).

    ``score_c = sum over the k nearest i of [label_i = c] exp(cos(query, i) / T)``.

    Args:
        bank: (N, F) features, of any length; scaled to length 1 here.
        bank_labels: (N,) long in 0..num_classes-1.
        queries: (n, F) features.
        k: neighbours; at most N are used.
        temperature: T > 0.
        num_classes: number of classes.

    Returns:
        (n,) long; the lower class where two score the same.
    """
    bank = F.normalize(bank, dim=1)
    queries = F.normalize(queries, dim=1)
    k = min(k, len(bank))
    predicted = []
    for part in torch.split(queries, max(1, SIMILARITIES_AT_ONCE // len(bank))):
        near, ids = (part @ bank.T).topk(k, dim=1)
        # the nearest gets weight 1: the same vote, and no overflow at small T
        weight = ((near - near[:, :1]) / temperature).exp().cpu()
        # the vote is small, and on a GPU the order of its sums would differ between runs
        votes = bank_labels[ids].cpu()
        predicted.append(weight.new_zeros(len(part), num_classes).scatter_add_(1, votes, weight).argmax(dim=1))
    return torch.cat(predicted).to(queries.device)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int,
    temperature: float,
    num_classes: int,
) -> float | None:
    """Fraction of queries that :func:`knn_predict` classifies rightly, 0..1.

    None where it is undefined: no queries, an empty bank, or features that are not finite.

    >>> bank, labels = torch.eye(2), torch.tensor([0, 1])
    >>> knn_accuracy(bank, labels, torch.tensor([[2.0, 0.1]]), torch.tensor([0]), 1, 0.1, 2)
    1.0
    """
    if not len(bank) or not len(queries):
        return None
    if not bool(bank.isfinite().all() & queries.isfinite().all()):
        return None
    predicted = knn_predict(bank, bank_labels, queries, k, temperature, num_classes)
    return float((predicted == query_labels).double().mean())


def refusal(bench: Bench) -> str | None:
    """Why kNN cannot be measured on these images, and what to do; None where it can."""
    return refusals.without_known_classes(bench, "kNN")


def run(bench: Bench, encoders: Sequence[Encoder], seed: int) -> list[Score]:
    """kNN accuracy on the scored split of each encoder, k = 200 first.

    The seed only decides which `untrained` and `supervised` networks are measured. A value is NaN where features are
    not finite.
    """
    scores = []
    labels, truth = bench.labels("train"), bench.labels(bench.split)
    for encoder in encoders:
        bank, queries = (bench.features(encoder, part, seed) for part in ("train", bench.split))
        for k, temperature in VOTES:
            value = knn_accuracy(bank, labels, queries, truth, k, temperature, bench.num_classes)
            scores.append(
                Score(
                    task="knn",
                    setting=f"k = {k}, T = {temperature}",
                    measure="accuracy",
                    encoder=encoder,
                    seed=seed,
                    value=math.nan if value is None else value,
                    count=len(truth),
                )
            )
    return scores
