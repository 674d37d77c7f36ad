"""A Faster R-CNN (Ren et al. 2015, as torchvision builds it) on the backbone of a trained network.

Legend: C H W image; S strides of the feature maps in pixels; Y classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from hpcl.backbones import ConvNet
from hpcl.batchnorm import SplitBatchNorm2d
from hpcl.model import Network
from hpcl.rng import seed_of
from hpcl.sections import Model

LONGEST = 1333 / 800
"""Longer side of an image over the shorter one, at most: torchvision's and Detectron2's sizes."""
_ANCHORS = (32 / 800, 512 / 800)
"""Sides of the smallest and the largest anchor, as parts of an image's shorter side: torchvision's, for any size."""
_RATIOS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Recipe:
    """How a detector is made and trained; the defaults are for a CPU, `PAPER` is what MoCo trains on VOC."""

    steps: int = 300
    batch: int = 4
    """Images per step."""
    lr: float = 0.01
    """Of SGD with momentum 0.9; rises over `warmup` and then falls to 0 by a cosine."""
    size: int = 192
    """Shorter side of the images in pixels, in training and scoring."""
    warmup: float = 0.1
    """Part of the steps in which the learning rate rises from 0."""
    weight_decay: float = 1e-4
    clip: float = 10.0
    """Length of the gradient, at most."""
    proposals: int = 300
    """Boxes of the first stage that the second one sees, for an image."""
    samples: int = 64
    """Of these, boxes that train the second stage, for an image: a quarter on objects, if there are so many."""
    channels: int = 128
    """Of the feature pyramid (ResNets)."""
    hidden: int = 256
    """Width of the two layers that see a box."""
    freeze_batch_norm: bool = False
    """Leave the backbone's BatchNorm as it was trained: statistics, scale and shift. Only for trained backbones: one
    with random weights is then not normalised at all, and the comparison is not fair."""


DEFAULT = Recipe()
PAPER = Recipe(
    steps=24_000,
    batch=16,
    lr=0.02,
    size=800,
    warmup=100 / 24_000,
    proposals=1000,
    samples=512,
    channels=256,
    hidden=1024,
)
"""24,000 steps of 16 images on VOC07+12 (He et al., CVPR 2020, appendix), for GPUs. MoCo uses a ResNet-50's fourth
stage (C4) in place of the pyramid, shorter sides from 480 to 800 in training, and falls by steps, not by a cosine."""


class _Map(nn.Module):
    """The feature map of a `convnet`, before its mean over space: stride 8."""

    def __init__(self, backbone: ConvNet) -> None:
        super().__init__()
        self.layers = backbone.layers
        self.out_channels = backbone.feature_dim

    def forward(self, x: Tensor) -> Tensor:
        """(b, C, H, W) -> (b, 4 width, H / 8, W / 8)."""
        features: Tensor = self.layers(x)
        return features


def can_detect(network: Network) -> bool:
    """Whether the backbone's feature maps are known: a `convnet` or a torchvision ResNet."""
    from torchvision.models import ResNet

    return isinstance(network.backbone, ConvNet | ResNet)


def build_detector(
    network: Network, model: Model, num_classes: int, mean: Tensor, std: Tensor, recipe: Recipe, seed: int
) -> nn.Module:
    """A detector in train mode whose body is a copy of the network's backbone; everything else starts from `seed`.

    A ResNet's stages go through a feature pyramid (FPN, Lin et al. 2017): all four with stem `imagenet` (S 4 to 32),
    the last three with stem `cifar` (S 2 to 8; the first would be as large as the image); each with one level on top.
    `convnet` has one map (S 8), and anchors of all sizes on it.

    Args:
        network: not changed.
        model: its stem.
        num_classes: Y; the detector's labels are 1..Y, 0 is the background.
        mean: (C,) of the images that the network was trained on, in 0..1 units.
        std: (C,) the same way.
        recipe: sizes, and whether BatchNorm is frozen.
        seed: of the heads' weights.

    Raises:
        ValueError: another backbone (:func:`can_detect`).
    """
    import torch
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    backbone = copy.deepcopy(network.backbone).requires_grad_(True).train()
    for module in backbone.modules():
        if isinstance(module, SplitBatchNorm2d):
            module.splits = 1  # a batch of detection is small, and on one device
    if recipe.freeze_batch_norm:
        _freeze_batch_norm(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "detection-init"))
        body, levels = _body(backbone, network.feature_dim, model, recipe)
        sides = np.geomspace(*_ANCHORS, num=5 if levels == 1 else levels) * recipe.size
        sizes = (tuple(sides.tolist()),) if levels == 1 else tuple((side,) for side in sides.tolist())
        maps = ["0"] if levels == 1 else [str(i) for i in range(levels - 1)]  # no box is pooled from the level on top
        detector: nn.Module = FasterRCNN(
            body,
            min_size=recipe.size,
            max_size=longest(recipe),
            image_mean=mean.tolist(),
            image_std=std.tolist(),
            rpn_post_nms_top_n_train=recipe.proposals,
            rpn_post_nms_top_n_test=recipe.proposals,
            box_batch_size_per_image=recipe.samples,
            rpn_anchor_generator=AnchorGenerator(sizes, (_RATIOS,) * len(sizes)),
            box_roi_pool=MultiScaleRoIAlign(maps, output_size=7, sampling_ratio=2),
            box_head=TwoMLPHead(body.out_channels * 7 * 7, recipe.hidden),
            box_predictor=FastRCNNPredictor(recipe.hidden, num_classes + 1),
        )
    return detector.train()


def longest(recipe: Recipe) -> int:
    """The longer side of an image in pixels, at most."""
    return int(LONGEST * recipe.size)


def _body(backbone: nn.Module, feature_dim: int, model: Model, recipe: Recipe) -> tuple[Any, int]:
    """Module that gives the feature maps, and how many there are."""
    from torchvision.models import ResNet
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    if isinstance(backbone, ConvNet):
        return _Map(backbone), 1
    if not isinstance(backbone, ResNet):
        raise ValueError(f"the feature maps of a {type(backbone).__name__} are not known")
    stages = (2, 3, 4) if model.stem == "cifar" else (1, 2, 3, 4)
    names = {f"layer{stage}": str(i) for i, stage in enumerate(stages)}
    widths = [feature_dim // 2 ** (4 - stage) for stage in stages]
    return BackboneWithFPN(backbone, names, widths, recipe.channels), len(stages) + 1


def _freeze_batch_norm(module: nn.Module) -> None:
    """Put a FrozenBatchNorm2d with the same numbers in the place of every BatchNorm2d below `module`."""
    from torchvision.ops import FrozenBatchNorm2d

    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            state = child.state_dict()
            state.pop("num_batches_tracked", None)
            frozen.load_state_dict(state)
            setattr(module, name, frozen)
        else:
            _freeze_batch_norm(child)
