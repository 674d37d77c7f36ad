"""Task `sgan`: a semi-supervised GAN from scratch, with the same few labels as the other tasks.

A baseline only: it uses the same images and the same lists of labelled images as :mod:`hpcl.downstream.finetune`, but
nothing of the trained network. The discriminator sees labelled images, all training images without labels, and what
the generator makes; its class head, over the K true classes, is what is scored. See
:mod:`hpcl.downstream.sgan_model` for the networks and losses.
Legend: b batch; K classes; C H W image; Z numbers that the generator starts from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hpcl.augment import centre_view
from hpcl.data import Ids
from hpcl.downstream.bench import Bench
from hpcl.downstream.finetune import refusal
from hpcl.downstream.labels import FRACTIONS, percent
from hpcl.downstream.recipes import SGAN, SganRecipe
from hpcl.downstream.scores import Encoder, Score
from hpcl.downstream.sgan_model import Discriminator, Generator, discriminator_loss, generator_loss
from hpcl.downstream.supervised import augmented, endless, seed_layers
from hpcl.features import EVAL_BATCH
from hpcl.rng import generator, seed_of

__all__ = ["TASK", "refusal", "run", "train_sgan"]

TASK = "sgan"

_SETTLING = 20
"""Batches of training images, at most, that BatchNorm's statistics are taken from in the end."""


def run(bench: Bench, encoders: Sequence[Encoder], seed: int, recipe: SganRecipe = SGAN) -> list[Score]:
    """One score per fraction of labels, encoder `sgan`; nothing where `trained` alone is asked for.

    Args:
        bench: images, and the part that is scored.
        encoders: what is compared; the GAN is one more baseline beside them.
        seed: of the lists of labelled images, the random starts, and the training.
        recipe: form, length and speed; one that differs in form is named in the setting.
    """
    if tuple(encoders) == ("trained",):
        return []
    kind = ("" if recipe.form == "two_head" else f", {recipe.form}") + (", spectral norm" * recipe.spectral_norm)
    ids, labels = bench.ids(bench.split), bench.labels(bench.split)
    scores = []
    for fraction in FRACTIONS:
        discriminator, _ = train_sgan(bench, bench.labelled(fraction, seed), recipe, seed)
        value = float((classes_of(bench, discriminator, ids) == labels).double().mean())
        scores.append(Score(TASK, f"{percent(fraction)}{kind}", "accuracy", "sgan", seed, value, len(ids)))
    return scores


def train_sgan(bench: Bench, labelled: Ids, recipe: SganRecipe, seed: int) -> tuple[Discriminator, Generator]:
    """Both networks after training, in eval mode.

    Real images are seen as in task `finetune`: random crops and flips. Labelled and unlabelled ones pass the
    discriminator together, generated ones apart, so that BatchNorm does not mix the two.

    Args:
        bench: images and their augmentation, device.
        labelled: (n,) places of the images whose labels may be seen.
        recipe: form, length and speed.
        seed: of everything that is drawn.
    """
    assert bench.images.labels is not None
    device, shape = bench.world.device, bench.images.images.shape[1:]
    labels = torch.from_numpy(bench.images.labels).to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_layers(device, seed_of(seed, "sgan"))
        judge = Discriminator(recipe, bench.num_classes, shape).to(device)
        maker = Generator(recipe.latent, recipe.width, shape).to(device)
        optimizers = [torch.optim.Adam(net.parameters(), recipe.lr, (0.5, 0.999)) for net in (judge, maker)]
        known = endless(labelled, recipe.batch, seed_of(seed, "sgan-labelled"))
        others = endless(np.asarray(bench.ids("train")), recipe.batch, seed_of(seed, "sgan-unlabelled"))
        for step in range(recipe.steps):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, 2 * (1 - step / recipe.steps))
            places = torch.cat([next(known), next(others)])
            images = unnormalised(bench, augmented(bench, places, seed_of(seed, "sgan-views", step)))
            noise = torch.randn(recipe.batch, recipe.latent, generator=generator(seed, "sgan-noise", step))
            _step(recipe, judge, maker, optimizers, images, labels[places[: recipe.batch].to(device)], noise.to(device))
        judge.eval()
        maker.eval()
        _settle(bench, judge)
    return judge, maker


def _step(
    recipe: SganRecipe,
    judge: Discriminator,
    maker: Generator,
    optimizers: list[torch.optim.Adam],
    images: Tensor,
    labels: Tensor,
    noise: Tensor,
) -> None:
    """One update of the discriminator, then one of the generator by the discriminator as it is now.

    Args:
        recipe: says the form.
        judge, maker: discriminator and generator.
        optimizers: of the two, in this order.
        images: (2 b, C, H, W) in [-1, 1], the labelled half first.
        labels: (b,) of the labelled half.
        noise: (b, Z).
    """
    made = maker(noise)
    of_real = judge(images)
    labelled, real = (type(of_real)(*half) for half in zip(*(part.chunk(2) for part in of_real), strict=True))
    loss = discriminator_loss(recipe.form, labelled, labels, real, judge(made.detach()))
    optimizers[0].zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizers[0].step()
    judge.requires_grad_(False)
    loss = generator_loss(recipe.form, real, judge(made))
    judge.requires_grad_(True)
    optimizers[1].zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizers[1].step()


def unnormalised(bench: Bench, views: Tensor) -> Tensor:
    """Normalised images (b, C, H, W) back to pixel values, in [-1, 1] as the generator's."""
    rows = bench.device_images
    return (views * rows.std[:, None, None] + rows.mean[:, None, None]) * 2 - 1


@torch.no_grad()
def classes_of(bench: Bench, judge: Discriminator, ids: Ids) -> Tensor:
    """(n,) long: the likeliest of the K true classes of some images' centre views; in eval mode."""
    parts = [
        judge(_centre(bench, ids[start : start + EVAL_BATCH])).classes[:, : bench.num_classes].argmax(1)
        for start in range(0, max(1, len(ids)), EVAL_BATCH)
    ]
    return torch.cat(parts)


def _centre(bench: Bench, ids: Ids) -> Tensor:
    rows = bench.device_images
    return unnormalised(bench, centre_view(rows.batch(ids), rows.mean, rows.std))


@torch.no_grad()
def _settle(bench: Bench, judge: Discriminator) -> None:
    """Take BatchNorm's statistics anew from training images, without dropout: those kept are of generated ones too."""
    norms = [module for module in judge.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    order = endless(np.asarray(bench.ids("train")), EVAL_BATCH, 0)
    for _ in range(min(_SETTLING, -(-len(bench.ids("train")) // EVAL_BATCH))):
        judge(_centre(bench, next(order).numpy()))
    for norm in norms:
        norm.eval()
