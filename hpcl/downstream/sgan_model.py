"""Networks and losses of the semi-supervised GAN (Odena 2016; Salimans et al. 2016).

All losses take logits, never probabilities. Legend: b batch; K classes; C H W image; Z numbers that the generator
starts from; F features of the discriminator; s = log of the sum of exp over the K logits, lse for short.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from hpcl.downstream.recipes import SganRecipe


class Verdict(NamedTuple):
    """What the discriminator says of a batch."""

    classes: Tensor
    """(b, K) logits of form `k_logit`; (b, K + 1) of `two_head`, the last for generated images."""
    validity: Tensor
    """(b,) logit of being real: the other head of `two_head`; s of `k_logit`."""
    features: Tensor
    """(b, F) what the heads take; matched by the generator of `k_logit`."""


class Generator(nn.Module):
    """Numbers to images: (b, Z) -> (b, C, H, W) in [-1, 1], of any size; two doublings as in the notes.

    The convolutions come before the doublings where they can, at a quarter of the cost.
    """

    def __init__(self, latent: int, width: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width_pixels = shape
        half = (math.ceil(height / 2), math.ceil(width_pixels / 2))
        self.start = (4 * width, math.ceil(height / 4), math.ceil(width_pixels / 4))
        self.first = nn.Linear(latent, math.prod(self.start))
        self.layers = nn.Sequential(
            nn.BatchNorm2d(4 * width),
            nn.ReLU(inplace=True),
            nn.Upsample(size=half),
            nn.Conv2d(4 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(inplace=True),
            nn.Upsample(size=(height, width_pixels)),
            nn.Conv2d(2 * width, channels, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        """(b, Z) -> (b, C, H, W)."""
        images: Tensor = self.layers(self.first(z).unflatten(1, self.start))
        return images


class Discriminator(nn.Module):
    """Images in [-1, 1] to a verdict: (b, C, H, W) of any size; four halvings as in the notes."""

    def __init__(self, recipe: SganRecipe, num_classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        for depth in range(4):
            out = recipe.width << depth
            convolution = nn.Conv2d(channels, out, 3, stride=2, padding=1)
            layers += [spectral_norm(convolution) if recipe.spectral_norm else convolution]
            if depth and not recipe.spectral_norm:  # BatchNorm would scale away what the spectral norm bounds
                layers.append(nn.BatchNorm2d(out))
            layers += [nn.LeakyReLU(0.2, inplace=True), nn.Dropout2d(recipe.dropout)]
            channels, height, width = out, math.ceil(height / 2), math.ceil(width / 2)
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.num_classes, self.form = num_classes, recipe.form
        features = channels * height * width
        heads = {"classes": nn.Linear(features, num_classes + (recipe.form == "two_head"))}
        if recipe.form == "two_head":
            heads["validity"] = nn.Linear(features, 1)
        self.heads = nn.ModuleDict({n: spectral_norm(h) if recipe.spectral_norm else h for n, h in heads.items()})

    def forward(self, images: Tensor) -> Verdict:
        """(b, C, H, W) -> what it says of them."""
        features: Tensor = self.layers(images)
        classes: Tensor = self.heads["classes"](features)
        validity = self.heads["validity"](features)[:, 0] if self.form == "two_head" else classes.logsumexp(1)
        return Verdict(classes, validity, features)


def real_or_not_loss(validity_real: Tensor, validity_fake: Tensor) -> Tensor:
    """``- mean log D(real) - mean log(1 - D(fake))`` with D = sigmoid(validity), as softplus: exact at any size.

    With form `k_logit` the validity is s, so D = e^s / (e^s + 1), which is Salimans et al.'s Z / (Z + 1).

    Args:
        validity_real, validity_fake: (b,) logits.
    """
    return F.softplus(-validity_real).mean() + F.softplus(validity_fake).mean()


def fooling_loss(validity_fake: Tensor) -> Tensor:
    """``- mean log D(fake)``: what the generator of `two_head` minimises (not log(1 - D), whose slope dies)."""
    return F.softplus(-validity_fake).mean()


def class_loss(classes: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of labelled images, (b, K) or (b, K + 1) logits and (b,) long: the only place of a label."""
    return F.cross_entropy(classes, labels)


def fake_class_loss(classes: Tensor) -> Tensor:
    """``- mean log p(class K)`` of generated images from (b, K + 1) logits."""
    return (classes.logsumexp(1) - classes[:, -1]).mean()


def some_class_loss(classes: Tensor) -> Tensor:
    """``- mean log(1 - p(class K))`` of real images without label, from (b, K + 1) logits: one of the K it is.

    ``log(1 - p_K)`` is lse of the K logits less lse of all.
    """
    return (classes.logsumexp(1) - classes[:, :-1].logsumexp(1)).mean()


def feature_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``mean over F of (mean f(real) - mean f(fake))^2``: what the generator of `k_logit` minimises (feature matching).

    Args:
        real: (b, F) features of real images; no gradient goes there.
        fake: (b, F) those of generated ones.
    """
    return (real.detach().mean(0) - fake.mean(0)).square().mean()


def discriminator_loss(
    form: Literal["two_head", "k_logit"], labelled: Verdict, labels: Tensor, real: Verdict, fake: Verdict
) -> Tensor:
    """What the discriminator minimises.

    `k_logit`: cross-entropy of the labelled images and real-or-not of the others (Salimans et al. 2016, section 5).
    `two_head`: the notes' mean over both heads and over real and generated images, except that only labelled
    images have a class; of real images without one the K+1-class head learns that they are not of class K.

    Args:
        form: of the discriminator.
        labelled: verdict on images with a label.
        labels: (b,) long, theirs.
        real: verdict on real images, their labels unknown.
        fake: verdict on generated images.
    """
    whether = real_or_not_loss(real.validity, fake.validity)
    supervised = class_loss(labelled.classes, labels)
    if form == "k_logit":
        return supervised + whether
    return (whether + supervised + some_class_loss(real.classes) + fake_class_loss(fake.classes)) / 4


def generator_loss(form: Literal["two_head", "k_logit"], real: Verdict, fake: Verdict) -> Tensor:
    """What the generator minimises: :func:`fooling_loss` of `two_head`, :func:`feature_loss` of `k_logit`."""
    if form == "k_logit":
        return feature_loss(real.features, fake.features)
    return fooling_loss(fake.validity)
