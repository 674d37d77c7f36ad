"""Backbones by name, randomly initialised and without a classifier: (b, C, H, W) -> (b, F).

Legend: b batch of one rank; C H W image; F backbone features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hpcl.backbone_names import TIMM, name_problem
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

    Of torchvision's and timm's networks everything is kept up to the classifying layers, maps are averaged over
    space, and the state dict has the library's keys.

    Args:
        model: backbone, stem and width.
        in_channels: C.
        image_size: (H, W) of the images it will see.

    Raises:
        UserError: no such backbone, or one that cannot take images of this size.
    """
    name = model.backbone
    if name == "convnet":
        return ConvNet(in_channels, model.width), 4 * model.width
    if problem := name_problem(name):
        raise UserError(problem)
    try:
        from torchvision.models import get_model_builder, resnet
    except ImportError as error:  # timm needs it as well
        raise UserError(f"model.backbone is {name}, which needs torchvision; install it or use convnet") from error
    if not name.startswith(TIMM) and get_model_builder(name).__module__ == resnet.__name__:
        return _resnet(model, in_channels)
    make = _from_timm if name.startswith(TIMM) else _from_torchvision
    try:
        network = make(name.removeprefix(TIMM), in_channels, image_size)
        if model.stem == "cifar":
            _set_cifar_stem(network)
        return network, count_features(network, in_channels, image_size)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each network has its own way of saying what does not fit
        shape = f"{in_channels}x{image_size[0]}x{image_size[1]}"
        raise UserError(
            f"model.backbone is {name}, which cannot take images of {shape} ({' '.join(str(error).split())[:200]}); "
            "set data.size to a size that it takes, or use another backbone"
        ) from error


def _resnet(model: Model, in_channels: int) -> tuple[nn.Module, int]:
    """A torchvision ResNet without its fc, and F.

    Its state dict has torchvision's keys; with stem `cifar` only the shape of ``conv1.weight`` differs.
    """
    from torchvision.models import get_model

    network: Any = get_model(model.backbone, weights=None)
    if model.stem == "cifar":
        _set_cifar_stem(network, in_channels)
    else:
        if in_channels != 3:
            width = network.conv1.out_channels
            network.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        _draw(network.conv1)
    feature_dim = int(network.fc.in_features)
    network.fc = nn.Identity()
    return network, feature_dim


def _set_cifar_stem(network: nn.Module, in_channels: int | None = None) -> None:
    """A 3x3 convolution of stride 1 and no pooling, in a network whose ``conv1`` and ``maxpool`` are a ResNet's.

    Of a deep stem (several 3x3 convolutions) the first one's stride becomes 1. Other networks stay as they are.

    Args:
        network: changed in place.
        in_channels: C; None: as many as now.
    """
    stem: Any = getattr(network, "conv1", None)
    first = stem[0] if isinstance(stem, nn.Sequential) else stem
    if not isinstance(first, nn.Conv2d) or not isinstance(getattr(network, "maxpool", None), nn.Module):
        return
    if first is stem:
        channels = first.in_channels if in_channels is None else in_channels
        network.conv1 = nn.Conv2d(channels, first.out_channels, 3, stride=1, padding=1, bias=False)
        _draw(network.conv1)
    else:
        first.stride = (1, 1)
    network.maxpool = nn.Identity()


def _draw(convolution: nn.Module) -> None:
    """New weights, as torchvision's ResNets start."""
    assert isinstance(convolution, nn.Conv2d)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")


def _from_torchvision(name: str, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """A classifier of torchvision's without its classifying layers.

    Layers in front of the first linear one that are no dropout, such as ConvNeXt's last LayerNorm, stay. VGG and
    AlexNet lose all three linear layers, which hold most of their weights and only see 7x7 or 6x6 maps.
    """
    from torchvision.models import get_model

    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # else they return more than one output when training
    elif name.startswith("vit_"):
        options = {"image_size": image_size[0]}
    elif name.startswith("maxvit_"):
        options = {"input_size": image_size}
    network: nn.Module = get_model(name, weights=None, **options)
    place = next(child for child in ("fc", "head", "heads", "classifier") if hasattr(network, child))
    kept = nn.Sequential()
    for key, layer in _layers(network.get_submodule(place)):
        if isinstance(layer, nn.Conv2d):  # SqueezeNet's, which sees a map
            kept.add_module(key, nn.AdaptiveAvgPool2d(1))
        if isinstance(layer, nn.Linear | nn.Conv2d):
            break
        if not isinstance(layer, nn.Dropout):
            kept.add_module(key, layer)
    setattr(network, place, kept)
    if isinstance(getattr(network, "dropout", None), nn.Dropout):
        network.dropout = nn.Identity()
    if isinstance(getattr(network, "avgpool", None), nn.AdaptiveAvgPool2d):
        network.avgpool = nn.AdaptiveAvgPool2d(1)
    if in_channels != 3:
        _take_channels(network, in_channels)
    return network


def _layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [*module.named_children()] if isinstance(module, nn.Sequential) else [("0", module)]


@torch.no_grad()
def _take_channels(network: nn.Module, in_channels: int) -> None:
    """Give the first convolution C inputs: the network computes what it would if all three were the mean of the C."""
    place, old = next((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    new.weight.copy_(old.weight.sum(1, keepdim=True).expand_as(new.weight) / in_channels)
    if new.bias is not None and old.bias is not None:
        new.bias.copy_(old.bias)
    parent, _, key = place.rpartition(".")
    setattr(network.get_submodule(parent), key, new)


def _from_timm(name: str, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """A network of timm's without its classifier; one that is made for one size of images is made for theirs."""
    import timm

    facts = timm.models.get_pretrained_cfg(name)
    options: dict[str, Any] = {"img_size": image_size} if facts is not None and facts.fixed_input_size else {}
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_channels, **options)
    return network


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
