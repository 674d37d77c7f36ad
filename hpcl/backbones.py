"""Backbones by name, randomly initialised and without a classifier: (b, C, H, W) -> (b, F).

Legend: b batch of one rank; C H W image; F backbone features.
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hpcl.errors import UserError
from hpcl.sections import Model


class ConvNet(nn.Module):
    """A backbone for CPUs: three 3x3 convolutions of stride 2 with BatchNorm and ReLU, then the mean over space.

    (b, C, H, W) float -> (b, 4 width).
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (width, 2 * width, 4 * width):
            layers += [
                nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
            in_channels = channels
        self.layers = nn.Sequential(*layers)
        self.feature_dim = in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(b, C, H, W) -> (b, 4 width), each feature >= 0."""
        features: Tensor = self.layers(x).mean(dim=(2, 3))
        return features


def named_backbone(model: Model, in_channels: int, image_size: tuple[int, int]) -> tuple[nn.Module, int]:
    """The backbone that ``model.backbone`` names, and its number F of features; draws from the global generator.

    Args:
        model: backbone, stem and width.
        in_channels: C.
        image_size: (H, W) of the images it will see.

    Raises:
        UserError: unknown name.
    """
    if model.backbone == "convnet":
        return ConvNet(in_channels, model.width), 4 * model.width
    return _resnet(model, in_channels)


def _resnet(model: Model, in_channels: int) -> tuple[nn.Module, int]:
    """A torchvision ResNet without its fc, randomly initialised, and its number F of features.

    Its state dict has torchvision's keys; with stem `cifar` only the shape of ``conv1.weight`` differs.
    """
    name = model.backbone
    try:
        import torchvision
    except ImportError as error:
        raise UserError(f"model.backbone is {name}, which needs torchvision; install it or use convnet") from error
    models = torchvision.models
    resnets = [n for n in models.list_models() if models.get_model_builder(n).__module__ == models.resnet.__name__]
    names = ["convnet", *resnets]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"model.backbone is {name}, but must be one of {', '.join(names)}{hint}")
    network = models.get_model(name, weights=None)
    width = network.conv1.out_channels
    if model.stem == "cifar":
        network.conv1 = nn.Conv2d(in_channels, width, 3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif in_channels != 3:
        network.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    feature_dim = int(network.fc.in_features)
    network.fc = nn.Identity()
    return network, feature_dim


@torch.no_grad()
def count_features(backbone: nn.Module, in_channels: int, image_size: tuple[int, int]) -> int:
    """F of a backbone, by one forward pass in eval mode, which leaves BatchNorm as it is.

    Raises:
        UserError: it returns something else than (b, F).
    """
    modes = {module: module.training for module in backbone.modules()}
    some = next(iter(backbone.parameters()), torch.empty(0))
    backbone.eval()
    # a lazy module has no dtype to follow before this very pass
    kind = torch.float32 if is_lazy(some) else some.dtype
    out = backbone(torch.zeros(1, in_channels, *image_size, device=some.device, dtype=kind))
    for module, training in modes.items():
        module.training = training
    if not isinstance(out, Tensor) or out.dim() != 2:
        got = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise UserError(
            f"the backbone returns {got} for one image of {in_channels}x{image_size[0]}x{image_size[1]}, "
            "but must return features of shape (batch, F)"
        )
    return out.shape[1]
