"""How long and how fast the downstream networks train: every constant in one place.

Learning rates and steps were chosen on MNIST-5k with the embedded preset's network, by accuracy on validation images
and on training images whose labels were not given, never on test images. A GPU can afford more:
``scaled(FINE_TUNE, 4)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum .9, a linear warm-up, then a cosine to 0."""

    steps: int
    """Updates, before the two bounds below."""
    batch: int
    """Images per update; drawn from endless shuffles, so never fewer, however few images there are."""
    lr_trunk: float
    """Largest learning rate of the backbone."""
    lr_head: float
    """Largest learning rate of the kept layers of the head and of the new classifier."""
    weight_decay: float
    """L2 penalty."""
    least_epochs: float = 0.0
    """Passes over the images at least: 40,000 images get more steps than 40."""
    most_epochs: float = 1000.0
    """Passes over the images at most."""
    head_layers: int = 1
    """Layers of the projection head that stay (:func:`hpcl.downstream.supervised.head_start`): 0 to 2, with head kind
    `simclr2` 0 to 3. SimCLR v2 keeps one; with the small convnet none is better at 1 % of the labels, for trained and
    untrained networks alike."""
    warmup: float = 0.1
    """Part of the steps with a rising learning rate."""
    temperature: float = 1.0
    """tau of distillation; not used elsewhere."""

    def steps_for(self, count: int) -> int:
        """Updates on so many images: `steps`, but within the bounds in epochs; at least 1."""
        least = math.ceil(self.least_epochs * count / self.batch)
        most = math.ceil(self.most_epochs * count / self.batch)
        return max(1, min(max(self.steps, least), most))


FINE_TUNE = Recipe(steps=300, batch=64, lr_trunk=0.3, lr_head=0.3, weight_decay=1e-4, least_epochs=20)
"""SimCLR v2's fine-tuning (Chen et al. 2020, section 2), with SGD in place of LARS."""

FROM_SCRATCH = Recipe(steps=300, batch=64, lr_trunk=0.3, lr_head=0.3, weight_decay=1e-4, least_epochs=20)
"""The same network from random weights."""

DISTILL = Recipe(steps=300, batch=128, lr_trunk=0.3, lr_head=0.3, weight_decay=1e-4, least_epochs=8)
"""Students on all training images, without labels."""


@dataclass(frozen=True)
class SganRecipe:
    """Adam with (0.5, 0.999), as in DCGAN (Radford et al. 2016) and in the notes."""

    form: Literal["two_head", "k_logit"] = "two_head"
    """`two_head`: a validity head and one of K + 1 classes (the notes); `k_logit`: K logits that say both, and
    feature matching (Salimans et al. 2016)."""
    spectral_norm: bool = False
    """Divide the discriminator's weights by their largest singular value (Miyato et al. 2018), without BatchNorm."""
    steps: int = 300
    """Updates of each network."""
    batch: int = 64
    """Labelled, unlabelled and generated images per update, each."""
    lr: float = 1e-3
    """Largest learning rate of both networks; falls to 0 in the last half."""
    latent: int = 64
    """Numbers that the generator starts from."""
    width: int = 16
    """Channels of the discriminator's first layer (then twice, four, eight times)."""
    dropout: float = 0.25
    """Part of the discriminator's channels that is left out, as in the notes."""


SGAN = SganRecipe()


def scaled(recipe: Recipe, times: float) -> Recipe:
    """A recipe with so many times the steps and passes."""
    return replace(
        recipe,
        steps=max(1, round(recipe.steps * times)),
        least_epochs=recipe.least_epochs * times,
        most_epochs=recipe.most_epochs * times,
    )
