"""LARS against its algorithm written as a loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hpcl.optimizer import LARS, TRUST, make_optimizer
from hpcl.sections import Optimizer

LR, MOMENTUM, DECAY = 0.3, 0.9, 0.01


def test_lars_is_the_algorithm() -> None:
    draws = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=draws, dtype=torch.float64)) for shape in [(4, 3), (5,)]]
    expected = [weight.detach().clone() for weight in weights]
    speed = [torch.zeros_like(weight) for weight in expected]
    optimizer = make_optimizer(weights, LR, Optimizer(kind="lars", momentum=MOMENTUM, weight_decay=DECAY))
    assert isinstance(optimizer, LARS)
    for _ in range(3):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=draws, dtype=torch.float64)
            step = weight.grad.clone()
            if step.dim() > 1:  # biases are neither scaled nor decayed
                step = step + DECAY * expected[i]
                step = step * TRUST * expected[i].square().sum().sqrt() / step.square().sum().sqrt()
            speed[i] = MOMENTUM * speed[i] + optimizer.param_groups[0]["lr"] * step
            expected[i] = expected[i] - speed[i]
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-12, atol=0)


def test_weights_or_gradients_of_0_are_not_scaled_and_none_is_left_alone() -> None:
    zero, still, none = (nn.Parameter(torch.full((2, 2), value)) for value in (0.0, 1.0, 2.0))
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zero, still, none], LR).step()
    assert zero.detach().flatten().tolist() == pytest.approx([-LR] * 4)
    assert bool((still == 1).all()) and bool((none == 2).all())


def test_its_state_travels() -> None:
    first, second = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    one, other = LARS([first], LR), LARS([second], LR)
    first.grad = torch.ones(3, 2)
    one.step()
    second.data.copy_(first.data)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    second.grad = first.grad.clone()
    one.step()
    other.step()
    assert torch.equal(first, second)
