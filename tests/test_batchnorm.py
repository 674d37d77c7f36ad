"""hpcl.batchnorm: parts of a batch are normalised as if each were a batch of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcl.batchnorm import SplitBatchNorm1d, SplitBatchNorm2d, SplitBatchNormAct2d, split_batch_norm
from hpcl.errors import UserError
from hpcl.model import build_network
from hpcl.sections import Head, Model

SMALL = Model(width=4, dim=6)


@pytest.mark.parametrize(
    ("plain", "split", "places"),
    [
        (nn.BatchNorm2d(5), SplitBatchNorm2d(5, splits=3), (3, 4)),
        (nn.BatchNorm1d(5), SplitBatchNorm1d(5, splits=3), ()),
    ],
)
def test_split_batch_norm_equals_batch_norm_on_each_chunk(plain: Any, split: Any, places: tuple[int, ...]) -> None:
    torch_rng = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, *places, generator=torch_rng, dtype=torch.float64, requires_grad=True)
    plain, split = plain.double(), split.double()
    with torch.no_grad():
        plain.weight.copy_(torch.rand(5, generator=torch_rng))
        plain.bias.copy_(torch.rand(5, generator=torch_rng))
    split.load_state_dict(plain.state_dict())  # same keys
    slope = torch.randn(12, 5, *places, generator=torch_rng, dtype=torch.float64)
    for _ in range(2):
        start = copy.deepcopy(plain)
        outs, means, variances = [], [], []
        for chunk in x.chunk(3):  # contiguous: images 0..3, 4..7, 8..11
            one = copy.deepcopy(start)
            outs.append(one(chunk))
            state = one.state_dict()
            means.append(state["running_mean"])
            variances.append(state["running_var"])
        want = torch.cat(outs)
        got = split(x)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        (grad_want,) = torch.autograd.grad((want * slope).sum(), x)
        (grad_got,) = torch.autograd.grad((got * slope).sum(), x)
        torch.testing.assert_close(grad_got, grad_want, rtol=1e-9, atol=1e-11)
        plain.state_dict()["running_mean"].copy_(torch.stack(means).mean(0))
        plain.state_dict()["running_var"].copy_(torch.stack(variances).mean(0))
        torch.testing.assert_close(split.running_mean, plain.running_mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(split.running_var, plain.running_var, rtol=1e-12, atol=1e-14)
    assert int(split.state_dict()["num_batches_tracked"]) == 2
    plain.eval(), split.eval()
    odd = x[:7].detach()  # in eval mode any batch size will do
    torch.testing.assert_close(split(odd), plain(odd), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="7 images cannot be normalised in 3"):
        split.train()(odd)


def test_splits_replace_every_batch_norm_and_keep_keys_and_weights() -> None:
    plain = build_network(SMALL, Head(kind="simclr2"), 1, seed=0)
    split = build_network(Model(width=4, dim=6, bn_splits=4), Head(kind="simclr2"), 1, seed=0)
    kinds = [type(m) for m in split.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert kinds == [SplitBatchNorm2d] * 3 + [SplitBatchNorm1d] * 3
    ours, theirs = split.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_batch_norm_that_cannot_be_split_is_an_error() -> None:
    own = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.BatchNorm1d(4))
    with pytest.raises(UserError, match="bn_splits is 2, but the backbone's layer 2 \\(BatchNorm1d\\)"):
        build_network(Model(bn_splits=2), Head(), 1, seed=0, backbone=own)


def test_networks_of_timm_are_split_too() -> None:
    layers = pytest.importorskip("timm.layers")
    draw = torch.Generator().manual_seed(0)
    norm = layers.BatchNormAct2d(4, act_layer=nn.PReLU, inplace=False)  # an activation with a weight of its own
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Conv2d(4, 3, 3), layers.BatchNormAct2d(3)).double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    split = copy.deepcopy(plain)
    split_batch_norm(split, 2)
    assert isinstance(split[1], SplitBatchNormAct2d) and split.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(6, 2, 7, 7, generator=draw, dtype=torch.float64)
    halves = [copy.deepcopy(plain), copy.deepcopy(plain)]
    want = torch.cat([net(part) for net, part in zip(halves, x.chunk(2), strict=True)])
    got = split(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got.square().sum().backward()
    want.square().sum().backward()  # gradients of the two halves lie apart
    for ours, one, other in zip(split.parameters(), *(net.parameters() for net in halves), strict=True):
        assert ours.grad is not None and one.grad is not None and other.grad is not None
        torch.testing.assert_close(ours.grad, one.grad + other.grad, rtol=1e-9, atol=1e-9)
    for name, value in split.state_dict().items():
        mean: Tensor = sum(net.state_dict()[name] for net in halves) / 2
        torch.testing.assert_close(value, mean.to(value.dtype), rtol=1e-12, atol=1e-12)
