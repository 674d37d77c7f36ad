"""The network, its momentum twin and the queue of keys.

Legend: b batch of one rank; C H W image; F backbone features; D embedding;
K queue keys; B keys enqueued at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hpcl.backbones import count_features, named_backbone
from hpcl.batchnorm import split_batch_norm
from hpcl.heads import MultiHead, make_head, unit
from hpcl.rng import seed_of
from hpcl.sections import Head, Model

if TYPE_CHECKING:
    from hpcl.stages import StagePlan


Backbone = nn.Module | Callable[[], nn.Module]
"""A user's own backbone, (b, C, H, W) -> (b, F), or a function that makes it."""


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

    def __init__(self, backbone: nn.Module, feature_dim: int, dim: int, head: Head, bn_splits: int = 1) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.attach = head.attach
        self.fc = nn.Linear(feature_dim, dim)
        self.mlp = make_head(head, dim if head.attach == "stack" else feature_dim, dim, bn_splits)
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

    def head_layers(self, use_head: bool = True) -> list[nn.Sequential]:
        """What lies behind the backbone, layer by layer; the modules are shared, not copied.

        Linear layers without a ReLU between them are one layer (with attach `stack` the fc and the MLP's first);
        BatchNorm and ReLU belong to the layer before them. So there is one layer with head kind `v1`, `linear` or
        `none`, and there are two with `v2` and `multi`, three with `simclr2`.

        Args:
            use_head: with the MLP; else the fc alone.
        """
        mlp = self.mlp if use_head else None
        modules: list[nn.Module] = [] if mlp is not None and self.attach == "replace" else [self.fc]
        if isinstance(mlp, MultiHead):
            modules += [mlp.first, mlp.relu, mlp.last]
        elif mlp is not None:
            modules += [*mlp] if isinstance(mlp, nn.Sequential) else [mlp]
        layers: list[list[nn.Module]] = [[]]
        for number, module in enumerate(modules, start=1):
            layers[-1].append(module)
            if isinstance(module, nn.ReLU) and number < len(modules):
                layers.append([])
        return [nn.Sequential(*layer) for layer in layers]

    def hiddens(self, x: Tensor, use_head: bool = True) -> list[Tensor]:
        """Every layer's output by number: 0 the backbone's features (b, F), then those of :meth:`head_layers`.

        The last one is the head's output (b, D), not normalised.
        """
        outputs: list[Tensor] = [self.backbone(x)]
        for layer in self.head_layers(use_head):
            outputs.append(layer(outputs[-1]))
        return outputs

    def project(self, features: Tensor, encoded: Tensor | None = None) -> Tensor:
        """(b, F) -> (b, D), the MLP's output, not normalised (but that of kind `multi` has length 1).

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
        model: backbone, stem, D and BatchNorm splits (those of the MLP too).
        head: kind, place and width of the MLP.
        in_channels: C.
        seed: the run's seed.
        backbone: your own in place of ``model.backbone``. A module is copied with the weights it
            has, a function is called and draws from `seed`. All parameters will train.
        image_size: (H, W) of the images: networks that are made for one size are made for this one, and a pass
            with such an image finds F where it is not known.

    Raises:
        UserError: unknown backbone; one that cannot take such images, or returns something else than
            (b, F); or one with a BatchNorm that ``model.bn_splits`` cannot split.
    """
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would seed the GPUs' generators too
        torch.default_generator.manual_seed(seed_of(seed, "init"))
        if backbone is not None:
            chosen = copy.deepcopy(backbone) if isinstance(backbone, nn.Module) else backbone()
            feature_dim = count_features(chosen, in_channels, image_size)
        else:
            chosen, feature_dim = named_backbone(model, in_channels, image_size)
        if model.bn_splits > 1:
            split_batch_norm(chosen, model.bn_splits)
        return Network(chosen, feature_dim, model.dim, head, model.bn_splits)


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
