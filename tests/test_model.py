"""hpcl.model: frozen means frozen, the key side, heads, your own backbone, the queue."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpcl.errors import UserError
from hpcl.heads import unit
from hpcl.model import KeyQueue, MomentumPair, Network, build_network
from hpcl.sections import Head, Model
from hpcl.stages import StagePlan

SMALL = Model(width=4, dim=6)


def plan_of(stage: int, head: bool = True) -> StagePlan:
    return StagePlan(
        stage=stage,
        first_epoch=1,
        last_epoch=1,
        lr=0.1,
        schedule="constant",
        trains_encoder=stage not in (2, 4),
        uses_prototypes=stage > 1,
        uses_head=head and stage > 1,
        may_grow=stage in (3, 5),
        schedule_epochs=(1, 1),
    )


def images(count: int = 8, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, 12, 12, generator=torch.Generator().manual_seed(seed))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    after = module.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def train(pair: MomentumPair, plan: StagePlan, steps: int = 3) -> None:
    """Steps of a made-up contrast, as the trainer takes them, with momentum and weight decay."""
    optimizer = torch.optim.SGD(pair.set_stage(plan), lr=0.5, momentum=0.9, weight_decay=0.1)
    for step in range(steps):
        pair.ema(0.9, plan)
        with torch.no_grad():
            key = pair.key(images(seed=2 * step), plan.uses_head)
        query = pair.query(images(seed=2 * step + 1), plan.uses_head)
        optimizer.zero_grad(set_to_none=True)
        (-(query * key).sum()).backward()
        optimizer.step()


# ---------------------------------------------------------------- frozen means frozen


@pytest.mark.parametrize("attach", ["stack", "replace"])
@pytest.mark.parametrize("splits", [1, 2])
def test_stage_2_leaves_the_encoder_bit_identical_on_both_sides(attach: Any, splits: int) -> None:
    model = Model(width=4, dim=6, bn_splits=splits)
    pair = MomentumPair(build_network(model, Head(attach=attach, hidden=5), 1, seed=0))
    train(pair, plan_of(1))  # leaves gradients, momentum and train mode behind
    query, key = snapshot(pair.query), snapshot(pair.key)
    pair.train()  # whoever calls it, frozen parts stay in eval mode
    train(pair, plan_of(2))
    pair.train()
    train(pair, plan_of(2), steps=1)
    mlp = {name for name in query if name.startswith("mlp.")}
    assert mlp
    assert changed(query, pair.query) == mlp
    assert changed(key, pair.key) == mlp
    assert any("running_mean" in name for name in query)


def test_stage_1_leaves_the_mlp_alone_and_moves_the_rest() -> None:
    pair = MomentumPair(build_network(SMALL, Head(hidden=5), 1, seed=0))
    query, key = snapshot(pair.query), snapshot(pair.key)
    train(pair, plan_of(1))
    rest = {name for name in query if not name.startswith("mlp.")}
    assert changed(query, pair.query) == rest
    assert changed(key, pair.key) == rest


@pytest.mark.parametrize(("attach", "fc_moves"), [("stack", True), ("replace", False)])
def test_stage_3_trains_everything_in_use(attach: Any, fc_moves: bool) -> None:
    pair = MomentumPair(build_network(SMALL, Head(attach=attach, hidden=5), 1, seed=0))
    before = snapshot(pair.query)
    train(pair, plan_of(3))
    still = set(before) - changed(before, pair.query)
    assert still == (set() if fc_moves else {"fc.weight", "fc.bias"})


def test_without_an_mlp_all_stages_train_the_encoder() -> None:
    pair = MomentumPair(build_network(SMALL, Head(kind="none"), 1, seed=0))
    names = {id(p): n for n, p in pair.query.named_parameters()}
    assert {names[id(p)] for p in pair.set_stage(plan_of(3, head=False))} == set(names.values())
    with pytest.raises(ValueError, match="no MLP"):
        pair.query(images(), True)


def test_set_stage_gives_exactly_the_trainable_parameters_and_drops_old_gradients() -> None:
    pair = MomentumPair(build_network(SMALL, Head(hidden=5), 1, seed=0))
    train(pair, plan_of(3), steps=1)
    chosen = pair.set_stage(plan_of(2))
    assert pair.query.mlp is not None
    assert {id(p) for p in chosen} == {id(p) for p in pair.query.mlp.parameters()}
    assert {id(p) for p in pair.query.parameters() if p.requires_grad} == {id(p) for p in chosen}
    assert all(p.grad is None for p in pair.query.parameters())
    assert not pair.query.backbone.training
    assert not pair.key.backbone.training
    pair.set_stage(plan_of(3))
    assert all(p.requires_grad for p in pair.query.parameters())
    assert pair.query.backbone.training
    assert pair.key.backbone.training


def test_freezing_survives_eval_and_train_calls_of_a_wrapper() -> None:
    pair = MomentumPair(build_network(SMALL, Head(), 1, seed=0))
    pair.set_stage(plan_of(2))
    wrapper = nn.Sequential(pair.query)
    wrapper.eval()
    assert not any(m.training for m in pair.query.modules())
    wrapper.train()
    assert pair.query.mlp is not None
    assert pair.query.mlp.training
    assert not any(m.training for m in pair.query.backbone.modules())


# ---------------------------------------------------------------- the key side


def test_key_side_never_requires_grad() -> None:
    pair = MomentumPair(build_network(SMALL, Head(), 1, seed=0))
    for stage in (1, 2, 3, 4, 5):
        pair.set_stage(plan_of(stage))
        assert not any(p.requires_grad for p in pair.key.parameters())
        assert not pair.key(images(), use_head=stage > 1).requires_grad


def test_ema_equals_the_loop() -> None:
    pair = MomentumPair(build_network(SMALL, Head(), 1, seed=0)).double()
    with torch.no_grad():
        for i, p in enumerate(pair.query.parameters()):
            p.add_(0.1 * (i + 1))
    plan = plan_of(3)
    expected = [0.7 * k + 0.3 * q for q, k in zip(pair.query.parameters(), pair.key.parameters(), strict=True)]
    pair.ema(0.7, plan)
    for got, want in zip(pair.key.parameters(), expected, strict=True):
        torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-12, atol=0)


def test_key_batch_norm_statistics_come_from_its_own_forward() -> None:
    pair = MomentumPair(build_network(SMALL, Head(), 1, seed=0))
    plan = plan_of(1)
    pair.set_stage(plan)
    alone = copy.deepcopy(pair.key)
    pair.query(images(seed=1) + 3.0, False)
    before = snapshot(pair.key)
    pair.ema(0.0, plan)  # would copy, if it touched buffers
    assert changed(before, pair.key) == set()
    pair.key(images(seed=2), False)
    alone(images(seed=2), False)
    norms = [name for name in before if "running" in name]
    assert norms
    for name in norms:
        assert torch.equal(pair.key.state_dict()[name], alone.state_dict()[name])
        assert not torch.equal(pair.key.state_dict()[name], pair.query.state_dict()[name])


def test_copy_head_copies_the_mlp_only() -> None:
    pair = MomentumPair(build_network(SMALL, Head(), 1, seed=0))
    with torch.no_grad():
        for p in pair.query.parameters():
            p.add_(1.0)
    before = snapshot(pair.key)
    pair.copy_head()
    mlp = {name for name in before if name.startswith("mlp.")}
    assert changed(before, pair.key) == mlp
    assert all(torch.equal(pair.key.state_dict()[n], pair.query.state_dict()[n]) for n in mlp)
    MomentumPair(build_network(SMALL, Head(kind="none"), 1, seed=0)).copy_head()  # nothing to do, no error


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize("attach", ["stack", "replace"])
@pytest.mark.parametrize("kind", ["v1", "v2", "linear"])
def test_heads_follow_their_formula(kind: Any, attach: Any) -> None:
    network = build_network(SMALL, Head(kind=kind, attach=attach, hidden=5), 1, seed=3).eval()
    x = images()
    features = network.backbone(x)
    w = {name: value for name, value in network.state_dict().items() if not name.startswith("backbone")}
    encoded = features @ w["fc.weight"].T + w["fc.bias"]
    z = encoded if attach == "stack" else features
    if kind == "linear":
        out = z @ w["mlp.weight"].T + w["mlp.bias"]
    elif kind == "v1":
        out = z @ w["mlp.0.weight"].T + w["mlp.0.bias"]
        out = (out @ w["mlp.1.weight"].T + w["mlp.1.bias"]).clamp(min=0)
    else:
        out = (z @ w["mlp.0.weight"].T + w["mlp.0.bias"]).clamp(min=0)
        out = out @ w["mlp.2.weight"].T + w["mlp.2.bias"]
    torch.testing.assert_close(network.fc(network.backbone(x)), encoded)
    torch.testing.assert_close(network.project(features), out)
    torch.testing.assert_close(network.project(features, encoded), out)
    if kind == "v1":
        assert bool((network.project(features) >= 0).all())
    else:
        assert bool((network.project(features) < 0).any())
    got = network.spaces(x, use_head=True)
    torch.testing.assert_close(got.backbone, features)
    torch.testing.assert_close(got.encoder, encoded / encoded.norm(dim=1, keepdim=True))
    torch.testing.assert_close(got.embedding, out / out.norm(dim=1, keepdim=True))
    torch.testing.assert_close(network(x, use_head=True), got.embedding)
    torch.testing.assert_close(network(x, use_head=False), got.encoder)
    without = network.spaces(x, use_head=False)
    assert torch.equal(without.embedding, without.encoder)


def test_unit_keeps_double_lifts_half_and_survives_zero() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    want = torch.tensor([[0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(unit(x), want)
    assert unit(x.double()).dtype == torch.float64
    assert unit(x.bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------- building


def test_same_seed_same_weights_and_the_global_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    one = build_network(SMALL, Head(), 1, seed=5)
    torch.rand(3)
    torch.set_rng_state(before)
    two = build_network(SMALL, Head(), 1, seed=5)
    other = build_network(SMALL, Head(), 1, seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert changed(one.state_dict(), two) == set()
    assert {"fc.weight", "mlp.0.weight", "backbone.layers.0.weight"} <= changed(one.state_dict(), other)


class _Own(nn.Module):
    """A backbone of a user: BatchNorm, and random numbers drawn when first called (a lazy layer)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.last = nn.LazyLinear(7)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(x).flatten(1))
        return out


def test_a_backbone_of_your_own_is_measured_copied_and_left_alone() -> None:
    own = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before, state = snapshot(own), torch.get_rng_state()
    network = build_network(SMALL, Head(), 3, seed=0, backbone=own)
    assert network.feature_dim == 5
    assert network.fc.weight.shape == (6, 5)
    assert network.backbone is not own
    assert network.backbone.training
    assert changed(before, own) == set()
    assert changed(before, network.backbone) == set()  # its weights and statistics are kept
    assert torch.equal(torch.get_rng_state(), state)
    lazy = build_network(SMALL, Head(), 3, seed=0, backbone=_Own(), image_size=(8, 10))
    assert lazy.feature_dim == 7
    assert torch.equal(torch.get_rng_state(), state)
    assert lazy(torch.zeros(2, 3, 8, 10), use_head=True).shape == (2, 6)
    assert torch.equal(lazy.backbone.state_dict()["norm.running_mean"], torch.zeros(3))


def test_a_function_that_makes_a_backbone_draws_from_the_seed() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))

    def weight(seed: int) -> Tensor:
        torch.rand(1)  # whatever state the global generator is in
        value: Tensor = build_network(SMALL, Head(), 3, seed, make, (2, 2)).state_dict()["backbone.1.weight"]
        return value

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


def test_a_backbone_that_returns_maps_is_an_error() -> None:
    with pytest.raises(UserError, match=r"returns a tensor of shape \(1, 4, 32, 32\).* must return features of shape"):
        build_network(SMALL, Head(), 3, seed=0, backbone=nn.Conv2d(3, 4, 3, padding=1))


def test_a_network_moves_to_double_and_back_from_a_state_dict() -> None:
    network = build_network(SMALL, Head(), 1, seed=0).double().eval()
    assert network(images().double(), True).dtype == torch.float64
    other: Network = build_network(SMALL, Head(), 1, seed=1).double().eval()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(images().double(), True), network(images().double(), True))


# ---------------------------------------------------------------- the queue


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 21), max_size=8))
def test_queue_equals_a_ring_written_one_key_at_a_time(size: int, batches: list[int]) -> None:
    queue = KeyQueue(size, 2)
    ring, place, number = [[0.0, 0.0]] * size, 0, 0
    for count in batches:
        keys = []
        for _ in range(count):
            number += 1
            keys.append([float(number), -float(number)])
            ring[place] = keys[-1]
            place = (place + 1) % size
        queue.enqueue(torch.tensor(keys).view(-1, 2))
        assert queue.keys.tolist() == ring
        assert queue.pointer == place


def test_queue_fill_and_state_dict() -> None:
    queue = KeyQueue(4, 2)
    queue.enqueue(torch.ones(3, 2))
    queue.fill(torch.arange(8.0).view(4, 2))
    assert queue.pointer == 0
    queue.enqueue(torch.full((1, 2), 9.0))
    assert queue.keys.tolist() == [[9, 9], [2, 3], [4, 5], [6, 7]]
    resumed = KeyQueue(4, 2)
    resumed.load_state_dict(queue.state_dict())
    assert resumed.pointer == 1
    assert torch.equal(resumed.keys, queue.keys)
    assert all(isinstance(value, Tensor) for value in queue.state_dict().values())
    with pytest.raises(ValueError, match=r"holds \(4, 2\) keys, but was given \(3, 2\)"):
        queue.fill(torch.zeros(3, 2))
