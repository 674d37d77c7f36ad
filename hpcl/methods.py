"""The methods under one roof: what each one is composed of.

The parts are the same for all: networks, views, queue, clusters, losses, meters. A method
says which of them act, and how:

    method   instance loss            prototypes              trained in     clusters
    moco     InfoNCE, queue           none                    one stage      none
    simclr   NT-Xent, in the batch    none                    one stage      none
    pcl      InfoNCE, queue           ProtoNCE, `pcl` targets one stage      fixed counts
    hcsc     InfoNCE, selected keys   ProtoNCE, selected      one stage      fixed counts, a tree
    hpcl     InfoNCE, queue           ProtoNCE or top-K       five stages    bounded, growing

What a method fixes is in :class:`Method`. What it merely prefers (`defaults`) is a field like
any other: it stands where the configuration says nothing else, and can be searched.

Sources: MoCo v2 (Chen, Fan, Girshick, He, 2020), SimCLR and SimCLR v2 (Chen, Kornblith,
Swersky, Norouzi, Hinton, 2020), PCL (Li, Zhou, Xiong, Hoi, ICLR 2021), HCSC (Guo, Xu, Chen,
Ni, Dong, Zhang, CVPR 2022); hpcl is the method of the research notes.

This module imports nothing: the configuration reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Name = Literal["hpcl", "moco", "pcl", "hcsc", "simclr"]


@dataclass(frozen=True)
class Method:
    """What a method fixes, and what it prefers."""

    instance: Literal["queue", "batch"] = "queue"
    """Negatives of the instance loss: a queue of momentum keys (InfoNCE), or the other views of
    the batch (NT-Xent), where the key network is a copy of the query network."""
    prototypes: bool = True
    """Whether there are clusters, and a prototype loss after stage 1."""
    staged: bool = False
    """The five stages of the notes. Else everything trains all the time and the head is in use from
    the first epoch: `stages.stage1` is the warm-up without prototypes, learning rate and schedule
    are those of stage 1 over the whole run, and only the sum of the other lengths counts."""
    grows: bool = False
    """Whether the growth policy is asked."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of fields, by dotted path, where the configuration sets none."""

    @property
    def has_queue(self) -> bool:
        """Whether there are momentum keys, and a queue of them."""
        return self.instance == "queue"


_PEER = {"head.attach": "replace"}
_PROTOTYPES = _PEER | {"topk.mode": "none", "clusters.size_tolerance": None}

METHODS: dict[str, Method] = {
    "hpcl": Method(staged=True, grows=True),
    "moco": Method(prototypes=False, defaults=_PEER),
    "pcl": Method(defaults=_PROTOTYPES | {"prototypes.targets": "pcl"}),
    "hcsc": Method(defaults=_PROTOTYPES | {"clusters.nesting": "tree", "moco.select": True, "prototypes.select": True}),
    "simclr": Method(instance="batch", prototypes=False, defaults=_PEER | {"head.kind": "simclr2"}),
}
"""Every method by its name."""


def reads(name: str, path: str) -> bool:
    """Whether a method reads the field at a dotted path at all.

    Example:
        >>> reads("moco", "clusters.first"), reads("moco", "moco.queue"), reads("simclr", "moco.queue")
        (False, True, False)
    """
    method = METHODS[name]
    section, _, rest = path.partition(".")
    if section in ("clusters", "prototypes", "topk", "density") or path == "moco.select":
        return method.prototypes or path == "clusters.backend"  # the meters cluster too
    if section == "growth":
        return method.grows
    if section == "stages" and rest.startswith("stage") and not rest.endswith(".epochs"):
        return method.staged or rest.startswith("stage1.")
    if section == "moco" and rest != "temperature":
        return method.has_queue
    return True
