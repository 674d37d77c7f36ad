"""Randomness as a function: every random number is drawn from (seed, purpose, ids).

No code of this project reads a global generator. A draw names its purpose and
the stage, epoch, step or image it belongs to, so it is the same whether the run
is fresh, resumed, or follows another run in a reused process, and whatever other
draws happen before it.

Purposes in use: init (weights), order (of images in an epoch), step and in it view,
shuffle, negatives, select-keys (and in it level), select-prototypes, key- and query-layers (dropout), queue (first
keys), cluster, reference and fixed-views (meters), probe and probe-split (linear probe), untrained, episodes and
k-means (downstream tasks), downstream-order, -views and -layers (training by labels), labels and label-classes
(lists of labelled images), student and small-student, sgan, sgan-labelled, -unlabelled, -views and -noise,
voc-shots (images with few labels), detection-init, -order, -flip and -sample (of a detector), data-test,
data-val, data-subset and data-novel (splits); in a search sampler (a trial's draw), bracket (of ASHA) and
monitor (permutations).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_of(seed: int, purpose: str, *ids: int) -> int:
    """A 63-bit seed that depends on all arguments and nothing else.

    >>> seed_of(0, "order", 3, 17) == seed_of(0, "order", 3, 17)
    True
    >>> seed_of(0, "order", 3, 17) == seed_of(0, "order", 17, 3)
    False
    """
    text = "/".join([str(int(seed)), purpose, *(str(int(i)) for i in ids)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, *ids: int) -> torch.Generator:
    """A fresh CPU generator, seeded by :func:`seed_of`.

    Draws are made on the CPU also when training on a GPU, so that the same seed
    gives the same views, order and negatives on every device.
    """
    import torch

    return torch.Generator().manual_seed(seed_of(seed, purpose, *ids))
