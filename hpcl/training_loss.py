"""What a method minimises in one step: its instance loss and its prototype loss, put together.

    L = L_inst + weight * mean over levels of L_proto

Which losses those are is the method's (:mod:`hpcl.methods`); the losses themselves stand in
:mod:`hpcl.losses`, the negatives they keep in :mod:`hpcl.selection`.

Legend: B global batch, b batch of this rank, D embedding, K queue keys, M clusters of a level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpcl.config import Config
from hpcl.dist import World
from hpcl.losses import Similarity, info_nce, nt_xent, proto_columns, proto_nce, topk_loss
from hpcl.methods import METHODS
from hpcl.prototypes import Level
from hpcl.rng import generator, seed_of
from hpcl.selection import instance_negatives, prototype_negatives, uniform

SUMS = ("loss", "loss_inst", "loss_proto", "acc_inst", "acc_proto")
"""What :func:`training_loss` gives, in this order, as means over this rank's queries."""


def training_loss(
    config: Config,
    world: World,
    query: Tensor,
    other: Tensor,
    queue: Tensor,
    cluster_ids: list[Tensor],
    levels: list[Level],
    similarity: Similarity,
    seed: int,
    view: int = 0,
) -> list[Tensor]:
    """Losses and accuracies of this rank's part of the batch, as in :data:`SUMS`.

    Args:
        config: names the method.
        world: whose part it is.
        query: (b, D) unit queries.
        other: (b, D) unit embeddings of the other views: momentum keys, or with negatives in the
            batch queries too, with gradient.
        queue: (K, D) unit keys; not used with negatives in the batch.
        cluster_ids: per level (B,) long, cluster of each image of the global batch.
        levels: cluster levels in use, coarse to fine; empty before prototypes.
        similarity: logits of the instance loss.
        seed: names the draws of this step.
        view: of the queries; each view selects its own negatives.
    """
    own = slice(world.rank * len(query), (world.rank + 1) * len(query))
    if METHODS[config.method].has_queue:
        keeps = (
            _instance_keeps(queue, cluster_ids, levels, own, seed_of(seed, "select-keys", view))
            if config.moco.select
            else []
        )
        inst, acc_inst = info_nce(query, other, queue, similarity, keeps)
    else:
        queries, others = world.all_gather_with_gradient(query), world.all_gather_with_gradient(other)
        inst, acc_inst = nt_xent(query, other, queries, others, own.start, similarity)
    if not levels:
        zero = torch.zeros_like(inst)
        return [inst, inst, zero, acc_inst, zero]
    per_level = [
        _level_loss(config, query, depth, cluster_ids[depth], levels, own, seed, view) for depth in range(len(levels))
    ]
    proto, acc_proto = torch.stack([torch.stack(pair) for pair in per_level]).mean(0)
    return [inst + config.prototypes.weight * proto, inst, proto, acc_inst, acc_proto]


def _instance_keeps(
    queue: Tensor,
    cluster_ids: list[Tensor],
    levels: list[Level],
    own: slice,
    seed: int,
) -> list[Tensor]:
    """(b, K) bool per level: the keys that are negatives of this rank's queries."""
    keeps = []
    for depth, (level, ids) in enumerate(zip(levels, cluster_ids, strict=True)):
        draw = uniform(seed_of(seed, "level", depth), len(ids), len(queue), queue.device)
        keeps.append(instance_negatives(queue, ids[own], level, draw[own]))
    return keeps


def _level_loss(
    config: Config,
    query: Tensor,
    depth: int,
    cluster_ids: Tensor,
    levels: list[Level],
    own: slice,
    seed: int,
    view: int,
) -> tuple[Tensor, Tensor]:
    """Prototype loss and acc_proto of one level: ProtoNCE, or the top-K loss where clusters are few."""
    options, topk, level = config.prototypes, config.topk, levels[depth]
    columns = proto_columns(
        cluster_ids,
        level.num_clusters,
        targets=options.targets,
        max_in_loss=options.max_in_loss,
        negatives=options.negatives,
        generator=generator(seed, "negatives", depth),
    )
    keep = None
    if options.select and depth:
        draw = uniform(
            seed_of(seed, "select-prototypes", depth, view), len(cluster_ids), level.num_clusters, query.device
        )
        keep = prototype_negatives(level, levels[depth - 1], cluster_ids[own], draw[own])
    loss, accuracy = proto_nce(
        query, level.prototypes, level.concentration, columns.ids, columns.target_of_image[own], keep
    )
    few = config.optimizer.batch if topk.max_clusters is None else topk.max_clusters
    if topk.mode != "none" and level.num_clusters <= few:
        near = topk_loss(
            query,
            level.prototypes,
            cluster_ids[own],
            k=topk.k,
            far_weight=topk.far_weight,
            margin=topk.margin,
            weights=topk.weights,
            far=topk.far,
        )
        loss = near if topk.mode == "replace" else loss + near
    return loss, accuracy
