"""Losses of the semi-supervised GAN against their direct formulas, and its networks and training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from downstream_benches import digits
from torch import Tensor

from hpcl.downstream import sgan
from hpcl.downstream.recipes import SGAN, SganRecipe
from hpcl.downstream.sgan_model import (
    Discriminator,
    Generator,
    class_loss,
    discriminator_loss,
    fake_class_loss,
    feature_loss,
    fooling_loss,
    generator_loss,
    real_or_not_loss,
    some_class_loss,
)

FORMS = [SGAN, replace(SGAN, form="k_logit"), replace(SGAN, spectral_norm=True)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_losses_equal_their_direct_formulas() -> None:
    real, fake = drawn(5), drawn(7, seed=1)
    d_real, d_fake = real.sigmoid(), fake.sigmoid()
    assert real_or_not_loss(real, fake).item() == pytest.approx(float(-d_real.log().mean() - (1 - d_fake).log().mean()))
    assert fooling_loss(fake).item() == pytest.approx(float(-d_fake.log().mean()))
    logits, labels = drawn(6, 4, seed=2), torch.tensor([0, 1, 2, 0, 1, 2])
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    assert class_loss(logits, labels).item() == pytest.approx(float(-p[torch.arange(6), labels].log().mean()))
    assert fake_class_loss(logits).item() == pytest.approx(float(-p[:, 3].log().mean()))
    assert some_class_loss(logits).item() == pytest.approx(float(-(1 - p[:, 3]).log().mean()))
    assert feature_loss(real[:, None], fake[:, None]).item() == pytest.approx(float((real.mean() - fake.mean()) ** 2))


def test_k_logits_say_real_as_z_over_z_plus_1() -> None:
    # Salimans et al. 2016: D = Z / (Z + 1), Z the sum of exp over K logits
    real, fake = drawn(5, 3), drawn(7, 3, seed=1)
    z_real, z_fake = real.exp().sum(1), fake.exp().sum(1)
    want = -(z_real / (z_real + 1)).log().mean() - (1 - z_fake / (z_fake + 1)).log().mean()
    assert real_or_not_loss(real.logsumexp(1), fake.logsumexp(1)).item() == pytest.approx(float(want))
    judge = Discriminator(replace(SGAN, form="k_logit"), 3, (1, 12, 12)).eval()
    verdict = judge(drawn(4, 1, 12, 12).float())
    assert torch.allclose(verdict.validity, verdict.classes.exp().sum(1).log(), atol=1e-5)
    # K + 1 classes whose last logit is fixed to 0 are the same thing
    padded = torch.cat([real, torch.zeros(5, 1, dtype=torch.float64)], 1)
    assert some_class_loss(padded).item() == pytest.approx(float(-(z_real / (z_real + 1)).log().mean()))


def test_losses_are_finite_and_right_at_logits_of_10_000() -> None:
    big = torch.tensor([1e4, -1e4])
    assert real_or_not_loss(big[:1], big[1:]).item() == 0.0
    assert real_or_not_loss(big[1:], big[:1]).item() == 2e4
    assert fooling_loss(big).item() == 5e3
    sure = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    assert some_class_loss(sure).item() == 0.0
    assert fake_class_loss(sure).item() == 2e4
    wrong = torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    loss = some_class_loss(wrong) + class_loss(wrong, torch.tensor([0]))
    assert loss.item() == 3e4  # 1e4, the better of the two true classes, and 2e4
    (gradient,) = torch.autograd.grad(loss, wrong)
    assert gradient.isfinite().all()
    assert gradient.tolist() == [[-1.0, -1.0, 2.0]]


def test_undecided_networks_have_the_loss_of_a_coin() -> None:
    judge = Discriminator(SGAN, 3, (1, 16, 16)).eval()
    for head in judge.heads.values():
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    verdict = judge(torch.zeros(2, 1, 16, 16))
    loss = discriminator_loss("two_head", verdict, torch.tensor([0, 2]), verdict, verdict)
    assert loss.item() == pytest.approx((2 * math.log(2) + math.log(4) + math.log(4 / 3) + math.log(4)) / 4)
    assert generator_loss("two_head", verdict, verdict).item() == pytest.approx(math.log(2))
    loss = discriminator_loss("k_logit", verdict, torch.tensor([0, 2]), verdict, verdict)
    assert loss.item() == pytest.approx(2 * math.log(2) + math.log(4))
    assert generator_loss("k_logit", verdict, verdict).item() == 0.0


@pytest.mark.parametrize("recipe", FORMS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 84, 84), (1, 9, 13)])
def test_networks_fit_any_images(recipe: SganRecipe, shape: tuple[int, int, int]) -> None:
    maker, judge = Generator(8, 4, shape), Discriminator(replace(recipe, width=4), 5, shape)
    images = maker(torch.randn(3, 8))
    assert images.shape == (3, *shape)
    assert images.abs().max() <= 1
    verdict = judge(images)
    assert verdict.classes.shape == (3, 6 if recipe.form == "two_head" else 5)
    assert verdict.validity.shape == (3,)
    for norm in (m for net in (maker, judge) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        assert norm.eps == 1e-5


def test_spectral_norm_bounds_every_layer() -> None:
    judge = Discriminator(replace(SGAN, spectral_norm=True, width=4), 5, (1, 28, 28)).train()
    for _ in range(30):  # the power iteration goes on with each pass in train mode
        judge(torch.zeros(2, 1, 28, 28))
    layers = [m for m in judge.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 6
    for layer in layers:
        largest = torch.linalg.svdvals(layer.weight.detach().flatten(1))[0]
        assert largest.item() == pytest.approx(1.0, abs=0.05)


SHORT = replace(SGAN, steps=30, batch=32, width=8, latent=16)


@pytest.mark.parametrize("form", ["two_head", "k_logit"])
def test_it_learns_digits_and_is_the_same_by_seed(form: str) -> None:
    bench = digits()
    recipe = replace(SHORT, form=form)
    scores = sgan.run(bench, ("trained", "pixels"), 0, recipe)
    end = "" if form == "two_head" else ", k_logit"
    assert [(s.encoder, s.setting) for s in scores] == [
        ("sgan", f"1 %{end}"),
        ("sgan", f"10 %{end}"),
    ]
    assert scores[1].value > 0.2  # chance is 0.1
    assert {s.count for s in scores} == {450}
    first = sgan.train_sgan(bench, bench.labelled(0.01, 0), replace(recipe, steps=2), 0)
    torch.manual_seed(5)  # the global generator has no say, and is left as it was
    state = torch.get_rng_state()
    again = sgan.train_sgan(bench, bench.labelled(0.01, 0), replace(recipe, steps=2), 0)
    assert (torch.get_rng_state() == state).all()
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_baseline_only() -> None:
    assert sgan.run(digits(), ("trained",), 0, SHORT) == []
