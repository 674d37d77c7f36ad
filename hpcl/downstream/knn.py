"""Weighted k-nearest-neighbour accuracy of frozen features.

Legend: N bank images; n queries; F backbone features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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
