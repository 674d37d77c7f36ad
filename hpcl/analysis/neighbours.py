"""What a configuration is worth by its neighbours: one run's luck is averaged out. Numbers in, numbers out.

A finished trial's objective is its configuration's worth plus the luck of that run. The worth is taken as a Gaussian
process over the space (Rasmussen and Williams, 2006, chapter 2): configurations that are near one another are worth
about the same. Two readings of "near" stand side by side, near in all fields at once (a Matern 5/2 kernel of the
distance) and alike in single fields (the mean of such kernels over fields), each with several lengths and several
shares of luck in the variance. With 10 or 50 trials the data do not single out one of them, so none is chosen: each
counts by its marginal likelihood. What all other trials say of one is then mixed with its own run.

Legend: d fields; n trials.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Lengths of the kernels, in units of the typical distance of two random configurations."""
NOISE = (0.05, 0.15, 0.3, 0.5, 0.7, 0.9)
"""Shares of the variance of objectives that are luck, or what else neighbours do not explain."""
TYPICAL = 1 / 6
"""Mean squared distance of two random positions in [0, 1]."""
NEAR = 0.5
"""Correlation of worth from which on a trial counts as a neighbour."""
MOST_OWN = 0.5
"""Weight of a trial's own run in its estimate, at most.

A process that may bend at any length can follow one lucky run as if it were a peak. With this bound a peak of one trial
stands no higher than half way between what its neighbours say and what it had itself."""


@dataclass(frozen=True)
class Smoothed:
    """Worth of each configuration by all trials together; float64 (n,) each, in units of the objective."""

    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    """Standard error of the mean."""
    own: NDArray[np.float64]
    """Weight of a trial's own run in its mean beside what all others say, 0..MOST_OWN."""
    neighbours: NDArray[np.int64]
    """Other trials whose worth correlates with it by at least NEAR."""
    unexplained: float
    """Share of the variance of objectives that neighbours do not explain, 0..1: the mean of NOISE after these trials.

    Not the share of luck: in 8 fields or more, a wavy landscape without any luck gives what pure luck gives (0.6 to
    0.8), up to 120 trials at least; and with 8 trials any landscape gives nearly that.
    """

    def choose(self) -> int:
        """The trial of the best lower end, mean - sd: good by what is known, rather than by what could be."""
        return int(np.argmax(self.mean - self.sd))


def smooth(distances: NDArray[np.float64], values: NDArray[np.float64]) -> Smoothed:
    """Worth of n configurations of which each was run once.

    Args:
        distances: float64 (d, n, n), distance of two trials in each field, 0 for equal and 1 over the whole range.
        values: float64 (n,), finite objectives of any size, larger is better.
    """
    d, n = len(distances), len(values)
    unit = float(np.abs(values).max(initial=0.0)) or 1.0  # so that squares neither overflow nor vanish
    centre, scale = float((values / unit).mean()), float((values / unit).std())
    if n < 2 or d == 0 or scale < 1e-12 * max(abs(centre), 1e-12):
        zeros = np.zeros(n)
        return Smoothed(
            np.asarray(values, dtype=np.float64), zeros, zeros + min(MOST_OWN, 1 / n), np.full(n, n - 1), 1.0
        )
    z = (values / unit - centre) / scale
    identity = np.eye(n)
    together = np.sqrt((distances**2).sum(axis=0) / (d * TYPICAL))
    kernels = [_matern(together / length) for length in LENGTHS]
    if d > 1:
        single = [distance / np.sqrt(TYPICAL) for distance in distances]
        kernels += [np.mean([_matern(each / length) for each in single], axis=0) for length in LENGTHS]
    logs, means, variances, own = [], [], [], []
    for kernel in kernels:
        for noise in NOISE:
            factor = cho_factor((1 - noise) * kernel + noise * identity, lower=True)
            inverse = np.diag(cho_solve(factor, identity))
            solved = cho_solve(factor, z)
            # What all others say of a trial, and how sure of it (Rasmussen and Williams, 2006, equation 5.12) ...
            others, doubt = z - solved / inverse, np.maximum(1 / inverse - noise, 0.0)
            # ... is mixed with its own run by their variances, but for no more than MOST_OWN of it.
            weight = np.minimum(doubt / (doubt + noise), MOST_OWN)
            means.append(others + weight * (z - others))
            variances.append((1 - weight) ** 2 * doubt + weight**2 * noise)
            own.append(weight)
            logs.append(-0.5 * z @ solved - np.log(np.diag(factor[0])).sum())
    share = np.exp(np.array(logs) - max(logs))
    share /= share.sum()
    mean = share @ np.array(means)
    variance = share @ (np.array(variances) + np.array(means) ** 2) - mean**2
    correlation = np.tensordot(share.reshape(len(kernels), -1).sum(axis=1), np.array(kernels), axes=1)
    return Smoothed(
        mean=unit * (centre + scale * mean),
        sd=unit * (scale * np.sqrt(np.maximum(variance, 0.0))),
        own=share @ np.array(own),
        neighbours=(correlation >= NEAR).sum(axis=1) - 1,
        unexplained=float(share.reshape(len(kernels), -1).sum(axis=0) @ np.array(NOISE)),
    )


def _matern(r: NDArray[np.float64]) -> NDArray[np.float64]:
    """Matern 5/2 correlation at distances r >= 0."""
    s = np.sqrt(5.0) * r
    return np.asarray((1 + s + s**2 / 3) * np.exp(-s))
