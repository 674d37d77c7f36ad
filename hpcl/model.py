"""The network, its momentum twin and the queue of keys.

Legend: b batch of one rank; C H W image; F backbone features; D embedding;
K queue keys; B keys enqueued at once; S BatchNorm splits.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from hpcl.config import Head, Model
from hpcl.errors import UserError
from hpcl.rng import seed_of

if TYPE_CHECKING:
    from hpcl.stages import StagePlan


Backbone = nn.Module | Callable[[], nn.Module]
"""A user's own backbone, (b, C, H, W) -> (b, F), or a function that makes it."""


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that normalises S contiguous chunks of a batch apart, as if each lay on its own GPU.

    The running statistics move towards the mean of the chunks' statistics, which is
    what averaging the buffers of S ranks gives. In eval mode, and in the keys of its
    state dict, it is a plain ``BatchNorm2d``. (MoCo's CIFAR demo interleaves its chunks;
    here chunk s holds images s b/S .. (s+1) b/S, the part that rank s would hold.)
    """

    def __init__(self, num_features: int, splits: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True):
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (b, C, H, W).

        Raises:
            ValueError: in train mode, b is not a multiple of the number of splits.
        """
        if not self.training or self.splits == 1:
            return super().forward(x)
        self._check_input_dim(x)
        b, c, h, w = x.shape
        s = self.splits
        if b % s:
            raise ValueError(f"a batch of {b} images cannot be normalised in {s} equal parts (model.bn_splits)")
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        # chunk s becomes channels s*C .. (s+1)*C: one kernel normalises all chunks
        apart = x.reshape(s, b // s, c, h, w).transpose(0, 1).reshape(b // s, s * c, h, w)
        mean, var = self.running_mean.repeat(s), self.running_var.repeat(s)
        weight = None if self.weight is None else self.weight.repeat(s)
        bias = None if self.bias is None else self.bias.repeat(s)
        out = F.batch_norm(apart, mean, var, weight, bias, True, self.momentum, self.eps)
        with torch.no_grad():
            self.running_mean.copy_(mean.view(s, c).mean(0))
            self.running_var.copy_(var.view(s, c).mean(0))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        return out.reshape(b // s, s, c, h, w).transpose(0, 1).reshape(b, c, h, w)


def _split_batch_norm(module: nn.Module, splits: int) -> None:
    """Put a SplitBatchNorm2d in the place of every BatchNorm2d below `module`; weights and keys stay."""
    for name, child in module.named_children():
        if isinstance(child, SplitBatchNorm2d) or not isinstance(child, _BatchNorm):
            _split_batch_norm(child, splits)
            continue
        if type(child) is not nn.BatchNorm2d or child.momentum is None or child.running_mean is None:
            raise UserError(
                f"model.bn_splits is {splits}, but the backbone's layer {name} ({type(child).__name__}) cannot be "
                "split; use BatchNorm2d with running statistics and a fixed momentum, or set model.bn_splits to 1"
            )
        split = SplitBatchNorm2d(child.num_features, splits, child.eps, child.momentum, child.affine)
        split.load_state_dict(child.state_dict())
        split.train(child.training)
        setattr(module, name, split.to(child.running_mean.device, child.running_mean.dtype))


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
def _feature_dim(backbone: nn.Module, in_channels: int, image_size: tuple[int, int]) -> int:
    """F of a user's backbone, by one forward pass in eval mode, which leaves BatchNorm as it is."""
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


def _mlp(head: Head, in_features: int, dim: int) -> nn.Module | None:
    if head.kind == "none":
        return None
    if head.kind == "linear":
        return nn.Linear(in_features, dim)
    first, last = nn.Linear(in_features, head.hidden), nn.Linear(head.hidden, dim)
    return nn.Sequential(first, nn.ReLU(), last) if head.kind == "v2" else nn.Sequential(first, last, nn.ReLU())


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1, in float32 at least (half precision loses the length); a zero row stays zero."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


class Spaces(NamedTuple):
    """One batch in the three spaces, from one pass through the backbone."""

    backbone: Tensor
    """(b, F) features as the backbone gives them; kNN and probes use these."""
    encoder: Tensor
    """(b, D) unit: outputs of the fc."""
    embedding: Tensor
    """(b, D) unit: outputs of the MLP where it is in use, else the same as `encoder`."""


class Network(nn.Module):
    """Encoder (backbone and fc) and projection MLP; made by :func:`build_network`.

    ``head.attach: stack`` is ``mlp(fc(backbone(x)))``; ``replace`` is ``mlp(backbone(x))``
    once the MLP is in use, and the fc then stays as it is (stage 2 clusters with it).
    Frozen parts stay in eval mode whoever calls ``train()``, DDP included.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, dim: int, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.attach = head.attach
        self.fc = nn.Linear(feature_dim, dim)
        self.mlp = _mlp(head, dim if head.attach == "stack" else feature_dim, dim)
        self.frozen: tuple[str, ...] = ()

    def train(self, mode: bool = True) -> Network:
        """Train or eval mode; in train mode the frozen parts stay in eval mode."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def parts(self, plan: StagePlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the modules that this stage trains, and of those it freezes."""
        head_in_use = plan.uses_head and self.mlp is not None
        trained = {
            "backbone": plan.trains_encoder,
            "fc": plan.trains_encoder and not (head_in_use and self.attach == "replace"),
        }
        if self.mlp is not None:
            trained["mlp"] = head_in_use
        return tuple(n for n, t in trained.items() if t), tuple(n for n, t in trained.items() if not t)

    def project(self, features: Tensor, encoded: Tensor | None = None) -> Tensor:
        """(b, F) -> (b, D), the MLP's output, not normalised.

        Args:
            features: (b, F) backbone features.
            encoded: (b, D) the fc's output for them where it is known already.

        Raises:
            ValueError: the network has no MLP.
        """
        if self.mlp is None:
            raise ValueError("the network has no MLP (head.kind is none)")
        if self.attach == "stack":
            features = self.fc(features) if encoded is None else encoded
        projected: Tensor = self.mlp(features)
        return projected

    def forward(self, x: Tensor, use_head: bool) -> Tensor:
        """(b, C, H, W) -> (b, D) unit embeddings, through the MLP or (`use_head` false) the fc alone."""
        features = self.backbone(x)
        return unit(self.project(features) if use_head else self.fc(features))

    def spaces(self, x: Tensor, use_head: bool) -> Spaces:
        """All three spaces of a batch in one pass; call it in eval mode and without gradients."""
        features = self.backbone(x)
        encoded = self.fc(features)
        encoder = unit(encoded)
        return Spaces(features, encoder, unit(self.project(features, encoded)) if use_head else encoder)


def build_network(
    model: Model,
    head: Head,
    in_channels: int,
    seed: int,
    backbone: Backbone | None = None,
    image_size: tuple[int, int] = (32, 32),
) -> Network:
    """The network of a run, initialised from `seed`; torch's global generator is left as it was.

    Args:
        model: backbone, stem, D and BatchNorm splits.
        head: kind, place and width of the MLP.
        in_channels: C.
        seed: the run's seed.
        backbone: your own in place of ``model.backbone``. A module is copied with the weights it
            has, a function is called and draws from `seed`. All parameters will train.
        image_size: (H, W) of the pass that finds F of your own backbone; not used otherwise.

    Raises:
        UserError: unknown backbone; one that returns something else than (b, F); or one
            with a BatchNorm that ``model.bn_splits`` cannot split.
    """
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would seed the GPUs' generators too
        torch.default_generator.manual_seed(seed_of(seed, "init"))
        if backbone is not None:
            chosen = copy.deepcopy(backbone) if isinstance(backbone, nn.Module) else backbone()
            feature_dim = _feature_dim(chosen, in_channels, image_size)
        elif model.backbone == "convnet":
            chosen = ConvNet(in_channels, model.width)
            feature_dim = 4 * model.width
        else:
            chosen, feature_dim = _resnet(model, in_channels)
        if model.bn_splits > 1:
            _split_batch_norm(chosen, model.bn_splits)
        return Network(chosen, feature_dim, model.dim, head)


class MomentumPair(nn.Module):
    """Query network and its key twin, an exponential moving average of it (MoCo, He et al. 2020).

    The key side never requires a gradient. Its BatchNorm statistics come from its own
    forward passes and are not copied from the query side.
    """

    def __init__(self, query: Network) -> None:
        super().__init__()
        self.query = query
        self.key = copy.deepcopy(query).requires_grad_(False)

    def set_stage(self, plan: StagePlan) -> list[nn.Parameter]:
        """Freeze and thaw both sides for a stage; gives the parameters to optimise.

        Frozen parts require no gradient, lose the gradient they had, and stay in eval
        mode, so that neither weights nor BatchNorm statistics move. Make a fresh
        optimizer from the result and wrap for DDP anew: a reused one keeps moving
        frozen weights by momentum and weight decay.
        """
        trained, frozen = self.query.parts(plan)
        for side in (self.query, self.key):
            side.frozen = frozen
            side.train()
        self.query.zero_grad(set_to_none=True)
        self.query.requires_grad_(False)
        self.key.requires_grad_(False)
        parameters: list[nn.Parameter] = []
        for name in trained:
            parameters += self.query.get_submodule(name).requires_grad_(True).parameters()
        return parameters

    @torch.no_grad()
    def ema(self, momentum: float, plan: StagePlan) -> None:
        """key <- momentum * key + (1 - momentum) * query, over the parameters that the stage trains."""
        keys: list[Tensor] = []
        queries: list[Tensor] = []
        for name in self.query.parts(plan)[0]:
            keys += self.key.get_submodule(name).parameters()
            queries += self.query.get_submodule(name).parameters()
        torch._foreach_lerp_(keys, queries, 1.0 - momentum)

    def copy_query(self) -> None:
        """Make the key network equal to the query network, statistics too, where there is no momentum encoder."""
        self.key.load_state_dict(self.query.state_dict())

    def copy_head(self) -> None:
        """Make the key MLP equal to the query MLP (at the start of stage 2); nothing without an MLP."""
        if self.query.mlp is not None and self.key.mlp is not None:
            self.key.mlp.load_state_dict(self.query.mlp.state_dict())


class KeyQueue(nn.Module):
    """The last K keys, the negatives of InfoNCE [moco_k, pcl_r]; all zero until filled.

    ``keys`` (K, D) float32 is a buffer; the position of the oldest key travels in the state dict.
    Enqueue after ``backward()``: the loss keeps the keys it saw, and autograd refuses
    changed ones.
    """

    keys: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, dim))
        self.pointer = 0  # a plain number: as a tensor on the GPU it would cost a wait per step

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the B oldest keys with (B, D); any B wraps around the end exactly."""
        size = len(self.keys)
        skipped = max(0, len(keys) - size)  # these would be overwritten by the rest
        start = (self.pointer + skipped) % size
        keys = keys[skipped:].to(self.keys.dtype)
        until_end = min(len(keys), size - start)
        self.keys[start : start + until_end] = keys[:until_end]
        self.keys[: len(keys) - until_end] = keys[until_end:]
        self.pointer = (start + len(keys)) % size

    @torch.no_grad()
    def fill(self, keys: Tensor) -> None:
        """Replace all K keys by (K, D), oldest first.

        Raises:
            ValueError: another shape.
        """
        if keys.shape != self.keys.shape:
            raise ValueError(f"the queue holds {tuple(self.keys.shape)} keys, but was given {tuple(keys.shape)}")
        self.keys.copy_(keys)
        self.pointer = 0

    def get_extra_state(self) -> Tensor:
        """The position of the oldest key, as a tensor that every state-dict format can hold."""
        return torch.tensor(self.pointer)

    def set_extra_state(self, state: Tensor) -> None:
        """Put back what :meth:`get_extra_state` gave."""
        self.pointer = int(state)
