"""Training a whole network by labels: from random weights, or from what was learnt without them.

Legend: N images of the source; n images to train on; b batch; C H W image; F backbone features; Y classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcl.augment import apply_views, centre_view, draw_views
from hpcl.batchnorm import SplitBatchNorm
from hpcl.data import Ids
from hpcl.downstream.bench import Bench
from hpcl.downstream.recipes import FROM_SCRATCH, Recipe
from hpcl.features import EVAL_BATCH
from hpcl.heads import HeadOutputs
from hpcl.model import Network
from hpcl.rng import generator, seed_of
from hpcl.stages import make_plan

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of the augmented images (b, C, H, W) and their (b,) places among the N images."""


MOST_GRADIENT = 1.0
"""Norm to which a step's gradient is cut: a new layer on few images starts with steps that would kill its ReLUs."""


class Classifier(nn.Module):
    """A copy of a network's backbone and of the first layers of its head, then a new linear layer.

    (b, C, H, W) float -> (b, Y) logits. The new layer starts at 0, so that its first gradient does not
    disturb what lies below, and no class is preferred at the start.
    """

    def __init__(self, network: Network, num_classes: int, head_layers: int = 1, *, head_in_use: bool = True) -> None:
        """
        Args:
            network: left as it is.
            num_classes: Y.
            head_layers: as in :func:`head_start`.
            head_in_use: whether the MLP was ever trained; else the fc counts as the whole head.
        """
        super().__init__()
        self.network = copy.deepcopy(network).float()
        self.network.frozen = ()
        self.network.requires_grad_(True)
        for module in self.network.modules():
            if isinstance(module, SplitBatchNorm):
                module.splits = 1  # they keep keys from being told by their batch; there are no keys here
        self.head, width = head_start(self.network, head_layers if head_in_use else min(head_layers, 1), head_in_use)
        with torch.random.fork_rng(devices=[]):  # the weights that zeros replace are drawn from the global generator
            self.out = nn.Linear(width, num_classes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.out.to(next(self.network.parameters()).device)

    def forward(self, x: Tensor) -> Tensor:
        """(b, C, H, W) -> (b, Y) logits."""
        logits: Tensor = self.out(self.head(self.network.backbone(x)))
        return logits

    def trunk(self) -> list[nn.Parameter]:
        """The backbone's parameters."""
        return list(self.network.backbone.parameters())

    def top(self) -> list[nn.Parameter]:
        """Those of the kept layers of the head, and of the new layer."""
        return [*self.head.parameters(), *self.out.parameters()]


def head_start(network: Network, layers: int, head_in_use: bool = True) -> tuple[nn.Sequential, int]:
    """The first layers of a network's projection head, from the backbone's features on, and their width.

    SimCLR v2 (Chen et al. 2020, section 2) keeps the head's first linear layer and the ReLU behind it, of three. What
    this is here, for one layer:

    ======================  ==============================================================
    head.kind               kept after the backbone
    ======================  ==============================================================
    simclr2, attach stack   fc, Linear, BatchNorm, ReLU (there is no ReLU between fc and Linear:
                            together they are one linear layer, as in the paper's head)
    simclr2, attach replace Linear, BatchNorm, ReLU: the paper's own (the fc is not in use)
    v2, attach stack        fc, Linear, ReLU; attach replace: Linear, ReLU
    v1, attach stack        fc, Linear, Linear, ReLU: the whole head, since this is where its
                            first ReLU stands; attach replace: the same without fc
    linear                  fc, Linear, ReLU; attach replace: Linear, ReLU. The head has no ReLU
                            of its own; without one the new layer would add nothing to it
    multi                   the first layers of all heads side by side, as with v2
    none, or MLP never used fc, ReLU
    ======================  ==============================================================

    Args:
        network: whose modules are shared, not copied.
        layers: 0: nothing, the classifier takes the backbone's features (SimCLR v1); 1: the table; 2: the
            whole head and a ReLU behind it (differs from 1 with v2 and multi only), but of simclr2 the first
            two layers; 3: the whole head of simclr2 and a ReLU behind it.
        head_in_use: whether the MLP was trained.

    Raises:
        ValueError: the head has not so many layers.
    """
    found = network.head_layers(use_head=head_in_use)
    allowed = range(max(2, len(found)) + 1)
    if layers not in allowed:
        *rest, last = map(str, allowed)
        raise ValueError(f"head_layers is {layers}, but must be {', '.join(rest)} or {last}")
    if not layers:
        return nn.Sequential(), network.feature_dim
    kept = [module for layer in found[:layers] for module in layer]
    if not isinstance(kept[-1], nn.ReLU):
        kept.append(nn.ReLU())
    width = next(int(module.out_features) for module in reversed(kept) if isinstance(module, nn.Linear | HeadOutputs))
    return nn.Sequential(*kept), width


def head_in_use(bench: Bench) -> bool:
    """Whether any stage of the run trained the MLP (the notes' stage 1 does not)."""
    return any(stage.uses_head for stage in make_plan(bench.config))


def new_classifier(bench: Bench, network: Network, recipe: Recipe) -> Classifier:
    """A classifier on a copy of a network, not trained."""
    return Classifier(network, bench.num_classes, recipe.head_layers, head_in_use=head_in_use(bench))


def train_classifier(bench: Bench, network: Network, ids: Ids, recipe: Recipe, seed: int) -> Classifier:
    """The network trained by the labels of some images, cross-entropy; in eval mode.

    Args:
        bench: images, their labels and augmentation, device.
        network: where it starts; left as it is.
        ids: (n,) places of the images whose labels may be seen.
        recipe: how long and how fast.
        seed: of order, views and layers that draw.
    """
    assert bench.images.labels is not None
    labels = torch.from_numpy(bench.images.labels).to(bench.world.device)
    classifier = new_classifier(bench, network, recipe)

    def loss(views: Tensor, places: Tensor) -> Tensor:
        return F.cross_entropy(classifier(views), labels[places])

    descend(bench, classifier, ids, recipe, seed, loss)
    return classifier


def train_from_scratch(bench: Bench, ids: Ids, seed: int, recipe: Recipe = FROM_SCRATCH) -> Classifier:
    """As :func:`train_classifier`, from the random weights of ``bench.untrained(seed)``."""
    return train_classifier(bench, bench.untrained(seed), ids, recipe, seed)


def descend(bench: Bench, model: Classifier, ids: Ids, recipe: Recipe, seed: int, loss: Loss) -> None:
    """Minimise a loss over random crops and flips of some images; leaves the model in eval mode.

    Each process computes all of it, without the other ranks. Nothing waits for the device.

    Args:
        bench: images, their augmentation, device.
        model: trained in place.
        ids: (n,) places of the images.
        recipe: how long and how fast.
        seed: of order, views and layers that draw.
        loss: of views and places, through the model.
    """
    groups = [{"params": model.trunk(), "lr": recipe.lr_trunk}, {"params": model.top(), "lr": recipe.lr_head}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    parameters = [*model.trunk(), *model.top()]
    steps = recipe.steps_for(len(ids))
    batches = endless(ids, recipe.batch, seed)
    device = bench.world.device
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_layers(device, seed)
        for step in range(steps):
            factor = rate(step, steps, recipe.warmup)
            for group, lr in zip(optimizer.param_groups, (recipe.lr_trunk, recipe.lr_head), strict=True):
                group["lr"] = lr * factor
            places = next(batches)
            views = augmented(bench, places, seed_of(seed, "downstream-views", step))
            optimizer.zero_grad(set_to_none=True)
            with autocast(bench):
                value = loss(views, places.to(device, non_blocking=True))
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, MOST_GRADIENT)
            optimizer.step()
    model.eval()


def rate(step: int, steps: int, warmup: float) -> float:
    """Learning rate of a step (from 0) as a factor in (0, 1]: a linear rise over a part of the steps, then a cosine."""
    rise = int(warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def endless(ids: Ids, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of places out of one shuffle after the other, cut without regard to where a shuffle ends.

    So each has exactly `batch` places, and each image occurs as often as any other, give or take one.
    """
    images = torch.from_numpy(ids)
    left, epoch = images[:0], 0
    while True:
        while len(left) < batch:
            order = torch.randperm(len(images), generator=generator(seed, "downstream-order", epoch))
            left, epoch = torch.cat([left, images[order]]), epoch + 1
        yield left[:batch]
        left = left[batch:]


def augmented(bench: Bench, places: Tensor, seed: int) -> Tensor:
    """(b, C, H, W) float32: random crops and flips of the run's own ranges, no other change (SimCLR v2).

    Whether mirrored images are the same thing is the run's to say: of digits they are not.
    """
    augment = bench.config.augment.model_copy(update={"jitter": 0.0, "gray": 0.0, "blur": 0.0})
    channels, height, width = bench.images.images.shape[1:]
    drawn = draw_views(augment, len(places), height, width, channels, torch.Generator().manual_seed(seed))
    rows = bench.device_images
    out = apply_views(rows.batch(places), drawn.to(bench.world.device), rows.mean, rows.std)
    return out.contiguous(memory_format=torch.channels_last) if out.is_cuda else out


def seed_layers(device: torch.device, seed: int) -> None:
    """Seed layers that draw, such as dropout in a user's backbone; only within torch's ``fork_rng``."""
    own = seed_of(seed, "downstream-layers")
    torch.default_generator.manual_seed(own)
    if device.type == "cuda":
        torch.cuda.manual_seed(own)


def autocast(bench: Bench) -> torch.autocast:
    """bfloat16 where the run trained in it: ``runtime.precision`` says so, or is `auto` on a GPU that has it."""
    kind, precision = bench.world.device.type, bench.config.runtime.precision
    auto = precision == "auto" and kind == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=auto or precision == "bf16")


@torch.no_grad()
def logits_of(bench: Bench, classifier: Classifier, ids: Ids) -> Tensor:
    """(n, Y) float32 logits of the centre views of some images; the classifier in eval mode."""
    rows = bench.device_images
    parts = [
        classifier(centre_view(rows.batch(ids[start : start + EVAL_BATCH]), rows.mean, rows.std)).float()
        for start in range(0, max(1, len(ids)), EVAL_BATCH)
    ]
    return torch.cat(parts)


def accuracy(bench: Bench, classifier: Classifier) -> float:
    """Fraction of the scored images that are classified rightly, 0..1."""
    ids = bench.ids(bench.split)
    return float((logits_of(bench, classifier, ids).argmax(1) == bench.labels(bench.split)).double().mean())
