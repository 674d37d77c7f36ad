"""The configuration of one training run: one typed, frozen, documented model.

Every default is the value of the research notes where the notes give one
(stages 20/5/50/5/70, cluster multiplier 1.7), else a published CIFAR-scale
value (MoCo v2's CIFAR recipe). A field is addressed by its dotted path, for
example ``clusters.multiplier`` or ``stages.stage2.lr``; space files, ``--set``
and the result tables' ``config.<path>`` columns all use that path. The fields
themselves stand in :mod:`hpcl.sections`.

This module imports neither torch nor ray: ``--help`` and ``--dry-run`` read it.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hpcl.methods import METHODS, Name
from hpcl.sections import (
    HEAD_ONLY_STAGES,
    STAGES,
    Augment,
    Clusters,
    Data,
    Density,
    Growth,
    Head,
    Meters,
    Moco,
    Model,
    Optimizer,
    Prototypes,
    Runtime,
    Section,
    Stages,
    TopK,
)


class Config(Section):
    """Everything that determines one training run."""

    seed: Annotated[int, Field(ge=0)] = 0
    """All randomness of the run is a function of this seed (and of purpose, stage,
    epoch, step or image)."""
    method: Name = "hpcl"
    """What is trained: `hpcl`, or one of its peers `moco`, `pcl`, `hcsc`, `simclr`; what each is
    composed of, and its defaults of other fields, stand in :mod:`hpcl.methods`."""
    data: Data = Data()
    augment: Augment = Augment()
    model: Model = Model()
    head: Head = Head()
    moco: Moco = Moco()
    optimizer: Optimizer = Optimizer()
    stages: Stages = Stages()
    clusters: Clusters = Clusters()
    growth: Growth = Growth()
    prototypes: Prototypes = Prototypes()
    density: Density = Density()
    topk: TopK = TopK()
    meters: Meters = Meters()
    runtime: Runtime = Runtime()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_method(cls, tree: Any) -> Any:
        """Put a method's defaults where the tree says nothing."""
        name = tree.get("method") if isinstance(tree, dict) else None
        if not isinstance(name, str) or name not in METHODS:
            return tree
        tree = dict(tree)
        for path, value in METHODS[name].defaults.items():
            section, _, field = path.partition(".")
            given = tree.get(section, {})
            if isinstance(given, Section) and field not in given.model_fields_set:
                tree[section] = given.model_copy(update={field: value})
            elif isinstance(given, dict) and field not in given:
                tree[section] = {**given, field: value}
        return tree

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        problems = []
        method = METHODS[self.method]
        if method.has_queue and self.moco.queue % self.optimizer.batch:
            problems.append(
                f"moco.queue is {self.moco.queue}, but must be a multiple of optimizer.batch ({self.optimizer.batch})"
            )
        lengths = {s: self.stages.of(s).epochs for s in STAGES}
        if not any(lengths.values()):
            problems.append("stages: all five have 0 epochs, but at least one must train")
        active = sum(1 for epochs in lengths.values() if epochs)
        if self.stages.total is not None and self.stages.total < active:
            problems.append(f"stages.total is {self.stages.total}, but {active} stages need at least one epoch each")
        in_fc = method.prototypes and not method.staged and self.clusters.space == "encoder"
        if in_fc and self.head.attach == "replace" and self.head.kind != "none":
            problems.append(
                f"clusters.space is encoder, but with method {self.method} and head.attach replace the encoder's fc is "
                "never trained; use embedding, or attach: stack"
            )
        counts = self.clusters.counts
        if counts is not None and (not counts or any(b <= a for a, b in itertools.pairwise((0, *counts)))):
            problems.append(f"clusters.counts is {list(counts)}, but must rise from coarse to fine, from 1 on")
        if self.head.kind == "none":
            for stage in HEAD_ONLY_STAGES:
                if lengths[stage] and method.staged:
                    problems.append(
                        f"stages.stage{stage}.epochs is {lengths[stage]}, but must be 0 with head.kind none "
                        "(this stage trains nothing but the MLP)"
                    )
            if self.head.attach == "replace" and method.staged:
                problems.append("head.attach is replace, but head.kind none has no MLP to put in the fc's place")
        problems += self._uneven_heads()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _uneven_heads(self) -> list[str]:
        """Whether the embedding can be dealt out to the heads of kind `multi`: one dimension would be +1 or -1."""
        dim, heads = self.model.dim, self.head.heads
        if self.head.kind != "multi" or (dim % heads == 0 and dim >= 2 * heads):
            return []
        near = sorted({max(2, dim // heads) * heads, max(2, -(-dim // heads)) * heads})
        return [
            f"model.dim is {dim}, but must be a multiple of head.heads ({heads}) with head.kind multi, two dimensions "
            f"for each head at least ({' or '.join(map(str, near))} is near)"
        ]

    def at(self, path: str) -> Any:
        """The value at a dotted path, e.g. ``config.at("stages.stage2.lr")``.

        Raises:
            KeyError: no such field.
        """
        value: Any = self
        for name in path.split("."):
            if not isinstance(value, Section) or name not in type(value).model_fields:
                raise KeyError(path)
            value = getattr(value, name)
        return value

    def with_values(self, values: dict[str, Any]) -> Config:
        """A validated copy with the fields at these dotted paths replaced.

        Where `method` changes, fields that have the old method's defaults take the new one's.

        Raises:
            pydantic.ValidationError: a value does not fit its field.
            KeyError: no such field.
        """
        tree = self.model_dump()
        method = values.get("method", self.method)
        if isinstance(method, str) and method != self.method and method in METHODS:
            old = METHODS[self.method].defaults
            for path in {**old, **METHODS[method].defaults}:
                section, _, name = path.partition(".")
                info = type(getattr(self, section)).model_fields[name]
                if self.at(path) == old.get(path, info.default):
                    del tree[section][name]
        for path, value in values.items():
            self.at(path)
            *sections, name = path.split(".")
            node = tree
            for section in sections:
                node = node[section]
            node[name] = value
        return Config.model_validate(tree)


ACTS_FROM: dict[str, int | Literal["length", "growth", "head"]] = {
    **dict.fromkeys(("seed", "method", "data", "augment", "model", "moco", "optimizer", "meters", "runtime"), 1),
    **dict.fromkeys(("clusters", "prototypes", "density", "topk", "moco.select"), 2),
    "head": "head",
    "clusters.backend": 1,
    "growth": "growth",
    "growth.stages": 2,
    "stages.total": 1,
    **{f"stages.stage{s}": s for s in STAGES},
    **{f"stages.stage{s}.epochs": "length" for s in STAGES},
}
"""The first stage in which a field can change anything, by dotted path; the longest path
that a field begins with counts. Runs that agree on all fields up to a stage are the same
run up to its end (:mod:`hpcl.prefix` reads this, and knows what a method leaves unread).

`head`: stage 2, or 1 where the method has no stages.

`growth`: the first stage that grows and has epochs. `length`: that one or the stage itself,
whichever is first, since theta runs over the epochs of the whole run; with `stages.total`
1, which scales all lengths. `clusters.backend` is read by the meters too; `growth.stages`
can name stage 2."""
