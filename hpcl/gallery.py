"""The prototypes of a checkpoint as images: which lie nearest to each, and how pure, wide and nested they are.

A checkpoint holds the assignments of its last clustering, coarse to fine; the prototypes are their means among the
embeddings of its key network (:func:`hpcl.prototypes.make_level`, as in training). The assignments are those of the
last epoch's start, the network is that of its end. Where clusters grew at that end, the coarsest level of the epoch is
no longer in the checkpoint, and the new finest one not yet.

Nesting is not strict: a finer level starts from the coarser one and then moves freely (METHOD 3). A prototype's parent
is therefore the one that most of its images belong to, and the share of those that do is given.

Legend: N training images, D embedding, M prototypes of a level, n images shown of a prototype.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpcl.checkpoint import foreign, load_checkpoint
from hpcl.data import DataError, DeviceImages, Ids, ImageSet, load
from hpcl.dist import current_world
from hpcl.errors import UserError
from hpcl.features import FeaturePass
from hpcl.hierarchy import saved_assignments
from hpcl.metrics import churn_ami
from hpcl.pretrained import load_network
from hpcl.prototypes import make_level
from hpcl.sections import Data
from hpcl.stages import make_plan, stage_at, total_epochs

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class GalleryPrototype:
    """One prototype and the images nearest to it."""

    number: int
    """0..M-1 within its level; pages count from 1."""
    size: int
    """Training images assigned to it; at least 1."""
    nearest: Ids
    """(n,) int64 places in `ImageSet.images` of the assigned images nearest to it, nearest first."""
    cosine: Floats
    """(n,) their cosine to the prototype, -1..1, falling."""
    concentration: float
    """phi, its temperature in the loss: smaller where its images lie closer together; the level's mean is T."""
    parent: int | None
    """Number in the level above of the prototype that most of its images belong to, the lowest of equals; None in the
    coarsest level."""
    parent_share: float | None
    """Share of its images that do, above 0 and at most 1."""
    label: int | None
    """Most frequent label of its images (the lowest of equals), a place in `ImageSet.classes`; None without labels."""
    class_name: str | None
    """The name of that class, as the data source gives it."""
    purity: float | None
    """Share of its images that have this label, above 0 and at most 1."""


@dataclass(frozen=True, eq=False)
class GalleryLevel:
    """One level of prototypes."""

    prototypes: tuple[GalleryPrototype, ...]
    """M of them, by number."""
    purity: float | None
    """Share of all training images whose label is their prototype's most frequent one; None without labels. Rises with
    M by itself: it is 1 where every image has its own prototype."""
    ami: float | None
    """Adjusted mutual information of the assignment with the labels, 0 as by chance and 1 the same; None without
    labels, or where it is not defined (:func:`hpcl.metrics.churn_ami`)."""


@dataclass(frozen=True, eq=False)
class Gallery:
    """All prototypes of a checkpoint."""

    levels: tuple[GalleryLevel, ...]
    """Coarse to fine; at least one."""
    num_images: int
    """N: each level's sizes add up to it."""
    epoch: int
    """Epochs that were trained."""
    stage: int
    """Stage of the last one, 2..5."""
    temperature: float
    """T, the mean of each level's concentrations."""
    grew: bool
    """Whether clusters grew at the end of the last epoch: then a level coarser than these was in use in it."""


def gallery_of(checkpoint: Path, images: int = 8, data: str | None = None) -> tuple[Gallery, ImageSet]:
    """The prototypes of a checkpoint with the images nearest to each, and the image set they are places in.

    The same checkpoint and images give the same gallery.

    Args:
        checkpoint: a run's or trial's ``checkpoint.pt``.
        images: to be given of each prototype, at most; 1 or more.
        data: where the images that it was trained on lie now, if not where they lay then.

    Raises:
        UserError: no such checkpoint; it has no prototypes yet (stage 1); its backbone was a module given in Python;
            or the images are gone or have changed.
        UnreadableCheckpoint: its assignments are not those of a run on these images.
        ValueError: `images` is below 1.
    """
    if images < 1:
        raise ValueError(f"images is {images}, but must be >= 1")
    config, network, _ = load_network(checkpoint, "key")
    state = load_checkpoint(checkpoint)
    epoch = len(state["rows"])
    stages = make_plan(config)
    if epoch > total_epochs(stages):
        raise foreign(checkpoint, f"{epoch} epochs of {total_epochs(stages)}")
    plan = stage_at(stages, epoch)
    if not any(stage.uses_prototypes for stage in stages):
        raise UserError(
            f"{checkpoint}: has no prototypes: it is of method {config.method} and of stages that have none; "
            "give the checkpoint of a run with prototypes (hpcl, pcl or hcsc)"
        )
    if not plan.uses_prototypes:
        raise UserError(
            f"{checkpoint}: has no prototypes yet: it stands after epoch {epoch}, in stage 1, and clustering begins "
            "with stage 2; train the run on, or give a checkpoint of a later stage"
        )
    found = _images_of(
        checkpoint, config.data if data is None else config.data.model_copy(update={"source": data}), state
    )
    assignments = saved_assignments(state, len(found.train), checkpoint)
    world = current_world("cpu" if config.runtime.device == "cpu" else "auto")
    passes = FeaturePass(DeviceImages(found, world.device), world, torch.float32)
    embeddings = passes.of_images(network.to(world.device), found.train, plan.uses_head).embedding.cpu()
    levels: list[GalleryLevel] = []
    for depth, assignment in enumerate(assignments):
        level = make_level(assignment, embeddings, int(assignment.max()) + 1, config.moco.temperature)
        own = zip(torch.split(embeddings, _ROWS), torch.split(assignment, _ROWS), strict=True)
        cosine = torch.cat([(rows * level.prototypes[ids]).sum(1) for rows, ids in own])
        coarser = assignments[depth - 1].numpy() if depth else None
        levels.append(
            _describe(assignment.numpy(), cosine.numpy(), level.concentration.numpy(), coarser, found, images)
        )
    in_use = str(state["rows"][-1].get("level_clusters")).split("/")
    return (
        Gallery(
            levels=tuple(levels),
            num_images=len(found.train),
            epoch=epoch,
            stage=plan.stage,
            temperature=config.moco.temperature,
            grew=len(in_use) > len(levels),  # of a single level none is dropped
        ),
        found,
    )


_ROWS = 65_536
"""Rows whose cosines are taken at a time, to bound the memory."""


def _images_of(checkpoint: Path, section: Data, state: dict[str, Any]) -> ImageSet:
    """The images that a checkpoint's assignments are about."""
    remedy = f"a gallery shows the images that {checkpoint} was trained on: say with --data where they lie now"
    try:
        found = load(section)
    except DataError as error:
        raise UserError(*error.problems, remedy) from error
    if found.content_hash != state["data"]["hash"]:
        raise UserError(f"{found.source}: holds other images now than at the training; {remedy}")
    return found


def _describe(
    assignment: Ids, cosine: Floats, concentration: Floats, coarser: Ids | None, data: ImageSet, images: int
) -> GalleryLevel:
    """One level from its assignment (N,), each image's cosine to its prototype (N,), phi (M,) and the level above."""
    count = len(concentration)
    # Members of each prototype beside one another, nearest first, equals by their place.
    order = np.lexsort((-cosine, assignment))
    members = np.split(order, np.cumsum(np.bincount(assignment, minlength=count))[:-1])
    labels = None if data.labels is None else data.labels[data.train]
    prototypes = []
    for number, own in enumerate(members):
        parent = None if coarser is None else _majority(coarser[own])
        label = None if labels is None else _majority(labels[own])
        prototypes.append(
            GalleryPrototype(
                number=number,
                size=len(own),
                nearest=data.train[own[:images]],
                cosine=cosine[own[:images]],
                concentration=float(concentration[number]),
                parent=parent[0] if parent else None,
                parent_share=parent[1] / len(own) if parent else None,
                label=label[0] if label else None,
                class_name=data.classes[label[0]] if label else None,
                purity=label[1] / len(own) if label else None,
            )
        )
    if labels is None:
        return GalleryLevel(tuple(prototypes), None, None)
    right = sum(_majority(labels[own])[1] for own in members)
    ami = churn_ami(torch.from_numpy(labels), torch.from_numpy(assignment))
    return GalleryLevel(tuple(prototypes), right / len(assignment), ami)


def _majority(values: Ids) -> tuple[int, int]:
    """The most frequent value (the lowest of equals) and how often it occurs."""
    counts = np.bincount(values)
    value = int(counts.argmax())
    return value, int(counts[value])
