"""A trained network out of a checkpoint: to export it, or to measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from hpcl.backbones import count_features
from hpcl.checkpoint import config_of, load_checkpoint, save_tensors
from hpcl.config import Config
from hpcl.data import DeviceImages, ImageSet, load
from hpcl.dist import current_world
from hpcl.downstream.knn import knn_accuracy
from hpcl.errors import UserError
from hpcl.features import FeaturePass
from hpcl.model import Network, build_network

Side = Literal["query", "key"]


def export_backbone(checkpoint: Path, out: Path, side: Side = "query") -> tuple[str, list[str]]:
    """Write the backbone's state dict, with the names of torchvision or timm where it is one of theirs.

    ``torchvision.models.resnet18().load_state_dict(torch.load(out), strict=False)``
    then misses the fc alone (with stem `imagenet`; stem `cifar` has its own conv1), other networks of torchvision's
    their classifier; one of timm's loads into ``timm.create_model(name, num_classes=0)``. Gray images have a first
    convolution of their own: ``in_chans=1`` there.

    Returns:
        The backbone's name (the class of one given in Python), and the names of the tensors written.

    Raises:
        UserError: no such checkpoint, or `out` cannot be written.
    """
    content = load_checkpoint(checkpoint)
    state = _part(content["pair"], f"{side}.backbone.")
    if not state:
        raise UserError(f"{checkpoint}: holds no tensor of a backbone; give the checkpoint of a run or trial folder")
    save_tensors(out, state)
    return content["backbone"] or config_of(content).model.backbone, list(state)


def load_network(checkpoint: Path, side: Side = "query") -> tuple[Config, Network, int]:
    """A checkpoint's configuration, its network in eval mode on the CPU, and the channels C it takes.

    Raises:
        UserError: no such checkpoint, or its backbone was a module given in Python.
    """
    return network_of(load_checkpoint(checkpoint), checkpoint, side)


def network_of(state: dict[str, Any], checkpoint: Path, side: Side = "query") -> tuple[Config, Network, int]:
    """As :func:`load_network`, out of a checkpoint's content."""
    if state["backbone"] is not None:
        raise UserError(
            f"{checkpoint}: its backbone is {state['backbone']}, given in Python, which a checkpoint cannot rebuild; "
            "use `hpcl export` and load the state dict into your module"
        )
    config = config_of(state)
    channels, height, width = state["data"]["shape"]
    network = build_network(config.model, config.head, channels, config.seed, None, (height, width))
    try:
        network.load_state_dict(_part(state["pair"], f"{side}."))
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint}: its tensors are not those of its configuration ({' '.join(str(error).split())[:200]}); "
            "give another checkpoint"
        ) from error
    return config, network.eval(), channels


def must_take(network: Network, channels: int, images: ImageSet) -> None:
    """See that a network takes a source's images, by a pass with one; the network in eval mode on the CPU.

    Raises:
        UserError: they have other channels than it takes, or a size for which its backbone is not made.
    """
    has, height, width = images.images.shape[1:]
    if has != channels:
        raise UserError(f"{images.source}: has {has} channels, but the network takes {channels}")
    try:
        count_features(network.backbone, channels, (height, width))
    except Exception as error:  # each network has its own way of saying what does not fit
        raise UserError(
            f"{images.source}: has images of {height}x{width}, which the checkpoint's backbone cannot take "
            f"({' '.join(str(error).split())[:200]}); give images as large as those it was trained on"
        ) from error


def knn_of_checkpoint(
    checkpoint: Path,
    split: Literal["val", "test"] = "test",
    *,
    k: int = 200,
    temperature: float = 0.1,
    data: str | None = None,
) -> tuple[float, ImageSet]:
    """kNN accuracy (0..1) of a checkpoint's backbone: all training images vote on a held-out split.

    Args:
        checkpoint: a run's or trial's ``checkpoint.pt``.
        split: the images to classify.
        k: neighbours; at most the number of training images.
        temperature: of the vote.
        data: another source than the one it was trained on.

    Raises:
        UserError: no such checkpoint, no labels, or an empty split.
    """
    config, network, channels = load_network(checkpoint)
    section = config.data if data is None else config.data.model_copy(update={"source": data})
    images = load(section)
    ids = images.val if split == "val" else images.test
    if images.labels is None or not len(ids):
        raise UserError(
            f"{images.source}: has no labelled {split} images, which kNN needs; name another split or source"
        )
    must_take(network, channels, images)
    world = current_world("cpu" if config.runtime.device == "cpu" else "auto")
    network.to(world.device)
    passes = FeaturePass(DeviceImages(images, world.device), world, torch.float32)
    bank, queries = (passes.of_images(network, part, use_head=False).backbone for part in (images.train, ids))
    labels = torch.from_numpy(images.labels).to(world.device)
    accuracy = knn_accuracy(
        bank, labels[images.train], queries, labels[ids], min(k, len(bank)), temperature, len(images.classes)
    )
    assert accuracy is not None  # both splits are labelled and not empty
    return accuracy, images


def _part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
