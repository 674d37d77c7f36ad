"""Projection heads: the MLPs that stages 2 to 5 put behind the encoder.

Legend: b batch; F input features; D embedding; d' = D/C dimensions of one of C heads; n m rows of two batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcl.batchnorm import SplitBatchNorm1d
from hpcl.sections import Head

TAU_MIN = 0.01
"""Lowest temperature of a pair: logits of unit vectors then reach 100, where CLIP caps its learnt scale too (Radford
et al. 2021, section 2.5), since sharper ones make training unstable. ``head.temperature_max`` may not lie below."""


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1, in float32 at least (half precision loses the length); a zero row stays zero."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def make_head(head: Head, in_features: int, dim: int, bn_splits: int = 1) -> nn.Module | None:
    """The MLP of a kind, randomly initialised from the global generator; None for kind `none`.

    Args:
        head: kind, width and the numbers of `multi`.
        in_features: F of what it takes.
        dim: D, its output.
        bn_splits: parts of a batch that its BatchNorm normalises apart (``model.bn_splits``).
    """
    if head.kind == "none":
        return None
    if head.kind == "linear":
        return nn.Linear(in_features, dim)
    if head.kind == "simclr2":
        return deep_head(in_features, head.hidden, dim, bn_splits)
    if head.kind == "multi":
        return MultiHead(in_features, head.hidden, dim, head.heads, head.temperature_max)
    first, last = nn.Linear(in_features, head.hidden), nn.Linear(head.hidden, dim)
    return nn.Sequential(first, nn.ReLU(), last) if head.kind == "v2" else nn.Sequential(first, last, nn.ReLU())


def deep_head(in_features: int, hidden: int, dim: int, bn_splits: int = 1) -> nn.Sequential:
    """SimCLR v2's head of three layers: FC-BN-ReLU, FC-BN-ReLU, FC-BN (Chen et al. 2020, section 2).

    As its authors train it: no FC has a bias, since BatchNorm would take it away, and the last BatchNorm scales
    but does not shift, for the embedding is to lie around 0. Their hidden layers are as wide as the backbone's
    features; here ``head.hidden`` says how wide.

    Args:
        in_features: F.
        hidden: width of both hidden layers.
        dim: D.
        bn_splits: parts of a batch that are normalised apart.
    """

    def norm(features: int) -> nn.BatchNorm1d:
        return SplitBatchNorm1d(features, bn_splits) if bn_splits > 1 else nn.BatchNorm1d(features)

    layers: list[nn.Module] = []
    for width in (hidden, hidden):
        layers += [nn.Linear(in_features, width, bias=False), norm(width), nn.ReLU()]
        in_features = width
    last = norm(dim)
    last.register_parameter("bias", None)
    return nn.Sequential(*layers, nn.Linear(in_features, dim, bias=False), last)


class HeadOutputs(nn.Module):
    """Last layers of C heads side by side: (b, C hidden) -> (b, D) of C unit vectors, together of length 1."""

    def __init__(self, hidden: int, dim: int, heads: int) -> None:
        super().__init__()
        self.out_features = dim
        self.linears = nn.ModuleList(nn.Linear(hidden, dim // heads) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        """(b, C hidden) -> (b, D)."""
        parts = x.chunk(len(self.linears), dim=1)
        out = torch.stack([linear(part) for linear, part in zip(self.linears, parts, strict=True)], dim=1)
        return unit(out).flatten(1) / math.sqrt(len(self.linears))


class MultiHead(nn.Module):
    """C parallel heads FC-ReLU-FC and their temperatures (AMCL, Wang et al., ECCV 2024).

    (b, F) -> (b, D): each head gives a unit vector of d' = D/C dimensions; the embedding is all of them in a row
    over sqrt(C), and so of length 1 itself. For two embeddings u, v the similarity of head c, the dot product of its
    two unit vectors, is ``s_c = C u_c . v_c``, and ``u . v`` is the mean of the heads' similarities.

    The temperature of a pair is learnt: ``tau_c = tau_min + (tau_max - tau_min) sigmoid(-phi(u'_c) . phi(v'_c))``
    with u'_c the unit vector of head c, and phi an MLP d' -> d' that the heads share: what phi finds alike, becomes
    sharp.
    """

    def __init__(self, in_features: int, hidden: int, dim: int, heads: int, temperature_max: float) -> None:
        """
        Args:
            in_features: F.
            hidden: width of each head's hidden layer.
            dim: D, a multiple of `heads`.
            heads: C.
            temperature_max: tau_max, at least `TAU_MIN`.
        """
        super().__init__()
        self.num_heads, self.temperature_max = heads, temperature_max
        # the first layers of all heads, in a row: a Linear starts from its number of inputs alone
        self.first = nn.Linear(in_features, heads * hidden)
        self.relu = nn.ReLU()
        self.last = HeadOutputs(hidden, dim, heads)
        part = dim // heads
        self.phi = nn.Sequential(nn.Linear(part, part), nn.ReLU(), nn.Linear(part, part))

    def forward(self, x: Tensor) -> Tensor:
        """(b, F) -> (b, D), unit."""
        out: Tensor = self.last(self.relu(self.first(x)))
        return out

    def pair_logits(self, u: Tensor, v: Tensor, beta: float) -> Tensor:
        """Logits of each row with each other row, per head: ``s_c / tau_c - beta Omega(tau_c)``.

        ``Omega(tau) = d'/2 log tau + 1/tau`` stands for the logarithm of a Gaussian's normaliser and for its
        radius (maximum likelihood over the heads' posteriors). Where all temperatures are equal it is the same
        number in every logit, and InfoNCE does not see it.

        Args:
            u: (n, D) embeddings, as :meth:`forward` gives them.
            v: (m, D) the same way; keys of the queue, say.
            beta: weight of Omega, at least 0.

        Returns:
            (C, n, m).
        """
        mine, other = self._parts(u), self._parts(v)
        return self._logits(mine @ other.mT, self.phi(mine) @ self.phi(other).mT, beta)

    def paired_logits(self, u: Tensor, v: Tensor, beta: float) -> Tensor:
        """As :meth:`pair_logits`, of row i with row i alone: (n, D) and (n, D) -> (C, n)."""
        mine, other = self._parts(u), self._parts(v)
        return self._logits((mine * other).sum(2), (self.phi(mine) * self.phi(other)).sum(2), beta)

    def _parts(self, x: Tensor) -> Tensor:
        """(n, D) -> (C, n, d'), each head's unit vectors."""
        return (x.reshape(len(x), self.num_heads, -1) * math.sqrt(self.num_heads)).transpose(0, 1)

    def _logits(self, similarity: Tensor, likeness: Tensor, beta: float) -> Tensor:
        """From ``u'_c . v'_c`` and ``phi(u'_c) . phi(v'_c)``, in any shape."""
        part = self.last.out_features // self.num_heads
        tau = TAU_MIN + (self.temperature_max - TAU_MIN) * torch.sigmoid(-likeness)
        return similarity / tau - beta * (0.5 * part * tau.log() + 1 / tau)


@dataclass(frozen=True)
class HeadSimilarity:
    """Logits of the instance loss from several heads, one row each, with the temperatures they learn."""

    head: MultiHead
    beta: float
    """Weight of the penalty on temperatures, at least 0."""

    def pairs(self, u: Tensor, v: Tensor) -> Tensor:
        """(C, n): of row i of (n, D) with row i of (n, D)."""
        return self.head.paired_logits(u, v, self.beta)

    def against(self, u: Tensor, v: Tensor) -> Tensor:
        """(C, n, m): of each of (n, D) with each of (m, D)."""
        return self.head.pair_logits(u, v, self.beta)
