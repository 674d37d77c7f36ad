"""hpcl.heads: each head by its formula, its layers by number, several heads and their temperatures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from downstream_benches import digits
from pydantic import ValidationError
from runs import timeless
from torch import Tensor, nn
from torch.nn import functional as F

from hpcl.batchnorm import SplitBatchNorm
from hpcl.config import Config
from hpcl.downstream.recipes import FINE_TUNE
from hpcl.downstream.supervised import Classifier, train_classifier
from hpcl.heads import TAU_MIN, MultiHead, deep_head, make_head
from hpcl.model import MomentumPair, build_network
from hpcl.pretrained import load_network
from hpcl.sections import Head, Model
from hpcl.stages import make_plan
from hpcl.trainer import fit

SMALL = Model(width=4, dim=6)
KINDS = ["v1", "v2", "linear", "none", "simclr2", "multi"]


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# ---------------------------------------------------------------- SimCLR v2's head


def test_the_deep_head_is_three_layers_with_batch_norm() -> None:
    head = deep_head(5, 4, 3).double()
    with torch.no_grad():
        for number, parameter in enumerate(head.parameters()):
            parameter.add_(drawn(*parameter.shape, seed=number))
    assert [type(m).__name__ for m in head] == [*("Linear", "BatchNorm1d", "ReLU") * 2, "Linear", "BatchNorm1d"]
    assert sorted(name for name, _ in head.named_parameters()) == [
        "0.weight", "1.bias", "1.weight", "3.weight", "4.bias", "4.weight", "6.weight", "7.weight",
    ]  # fmt: skip
    weights = {name: value.detach() for name, value in head.named_parameters()}
    z = x = drawn(7, 5, seed=9)
    for linear, norm in ((0, 1), (3, 4), (6, 7)):
        z = z @ weights[f"{linear}.weight"].T
        z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() * weights[f"{norm}.weight"]
        if norm != 7:  # the last one neither shifts nor has a ReLU
            z = (z + weights[f"{norm}.bias"]).clamp(min=0)
    torch.testing.assert_close(head(x), z)
    torch.testing.assert_close(head(x).mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.float()(x.float()).isfinite().all()


@pytest.mark.parametrize("kind", ["simclr2", "multi"])
def test_stage_1_leaves_the_head_alone_and_stage_2_trains_nothing_else(kind: Any) -> None:
    config = Config(model=Model(width=4, dim=6), head=Head(kind=kind, hidden=5, heads=3))
    first, second = make_plan(config)[:2]
    pair = MomentumPair(build_network(config.model, config.head, 1, seed=0))

    def train(plan: Any) -> tuple[set[str], set[str]]:
        before = snapshot(pair.query), snapshot(pair.key)
        optimizer = torch.optim.SGD(pair.set_stage(plan), lr=0.5)
        for _ in range(2):
            pair.ema(0.9, plan)
            query, key = pair.query(images(), plan.uses_head), pair.key(images() + 0.1, plan.uses_head)
            if plan.uses_head and isinstance(pair.query.mlp, MultiHead):
                loss = pair.query.mlp.pair_logits(query, key, 0.1).logsumexp(2).mean()
            else:
                loss = -(query * key).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return changed(before[0], pair.query), changed(before[1], pair.key)

    mlp = {name for name in pair.query.state_dict() if name.startswith("mlp.")}
    assert mlp and not mlp & set().union(*train(first))  # its statistics stay, too
    assert not changed({name: pair.query.state_dict()[name] for name in mlp}, nn.ModuleDict({"mlp": pair.key.mlp}))
    query, key = train(second)
    assert query == mlp and key == mlp
    pair.copy_head()
    assert all(torch.equal(pair.query.state_dict()[name], pair.key.state_dict()[name]) for name in mlp)


def test_parts_of_a_batch_are_normalised_apart_in_the_head() -> None:
    whole = build_network(SMALL, Head(kind="simclr2"), 1, seed=0).double()
    split = build_network(Model(width=4, dim=6, bn_splits=2), Head(kind="simclr2"), 1, seed=0).double()
    x = images().double()
    want = torch.cat([whole(part, use_head=True) for part in x.chunk(2)])
    torch.testing.assert_close(split(x, use_head=True), want, rtol=1e-9, atol=1e-9)


def test_a_run_with_batch_norm_in_its_head_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    config = Config.model_validate(TINY).with_values(
        {"head.kind": "simclr2", "head.attach": "replace", "stages.total": 5, "data.subset": 0.05, "moco.queue": 64}
    )

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    whole = fit(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "run", report=stop)
    assert timeless(fit(config, tmp_path / "run").rows) == timeless(whole.rows)
    _, network, _ = load_network(tmp_path / "run" / "checkpoint.pt")
    assert changed(whole.network.state_dict(), network) == set()
    steps = [int(network.state_dict()[f"{part}.1.num_batches_tracked"]) for part in ("backbone.layers", "mlp")]
    assert steps == [3 * 3, 4 * 3]  # 3 in each stage: the backbone in 1, 3 and 5, the head in 2 to 5


# ---------------------------------------------------------------- layers by number


@pytest.mark.parametrize("attach", ["stack", "replace"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_by_number(kind: Any, attach: Any) -> None:
    if kind == "none" and attach == "replace":
        return
    network = build_network(SMALL, Head(kind=kind, attach=attach, hidden=5, heads=3), 1, seed=3).eval()
    x = images()
    hiddens = network.hiddens(x)
    widths = {"v1": [6], "v2": [5, 6], "linear": [6], "none": [6], "simclr2": [5, 5, 6], "multi": [15, 6]}[kind]
    assert [h.shape[1] for h in hiddens] == [16, *widths]
    assert torch.equal(hiddens[0], network.backbone(x))
    last = network.fc(hiddens[0]) if kind == "none" else network.project(hiddens[0])
    assert torch.equal(hiddens[-1], last)
    assert all(bool((h >= 0).all()) for h in hiddens[1:-1])  # each but the last ends with its ReLU
    without = network.hiddens(x, use_head=False)
    assert len(without) == 2 and torch.equal(without[1], network.fc(hiddens[0]))
    if kind == "simclr2":
        mlp: Any = network.mlp
        inner = network.fc(hiddens[0]) if attach == "stack" else hiddens[0]
        assert torch.equal(hiddens[1], mlp[1](mlp[0](inner)).relu())
        assert torch.equal(hiddens[2], mlp[4](mlp[3](hiddens[1])).relu())


@pytest.mark.parametrize(
    ("kind", "attach", "layers", "want", "width"),
    [
        ("simclr2", "stack", 0, "", 32),
        ("simclr2", "stack", 1, "Linear Linear BatchNorm1d ReLU", 12),
        ("simclr2", "replace", 1, "Linear BatchNorm1d ReLU", 12),
        ("simclr2", "replace", 2, "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU", 12),
        ("simclr2", "replace", 3, "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU", 16),
        ("multi", "replace", 1, "Linear ReLU", 24),
        ("multi", "replace", 2, "Linear ReLU HeadOutputs ReLU", 16),
    ],
)
def test_fine_tuning_from_any_layer(kind: str, attach: str, layers: int, want: str, width: int) -> None:
    bench = digits(head__kind=kind, head__attach=attach, head__hidden=12, head__heads=2, model__bn_splits=2)
    network = bench.network("trained", 0)
    classifier = Classifier(network, 10, layers)
    kinds = " ".join(type(module).__name__.removeprefix("Split") for module in classifier.head)
    assert (kinds, classifier.out.in_features) == (want, width)
    assert {m.splits for m in classifier.modules() if isinstance(m, SplitBatchNorm)} == {1}
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        classifier.eval().out.reset_parameters()
        torch.testing.assert_close(classifier(x), classifier.out(network.eval().hiddens(x)[layers].relu()))


def test_a_deep_head_is_fine_tuned_from_its_first_layer() -> None:
    bench = digits(head__kind="simclr2")
    network = bench.network("trained", 0)
    before = snapshot(network)
    recipe = replace(FINE_TUNE, steps=4, batch=32, least_epochs=0)
    classifier = train_classifier(bench, network, bench.labelled(0.1, 0), recipe, 0)
    moved = changed(before, classifier.network)
    kept = {name for name in before if name.startswith(("backbone", "fc", "mlp.0", "mlp.1"))}
    assert kept <= moved and not any(name.startswith(("mlp.3", "mlp.4", "mlp.6", "mlp.7")) for name in moved)
    with pytest.raises(ValueError, match="head_layers is 4, but must be 0, 1, 2 or 3"):
        Classifier(network, 10, 4)


def test_the_kind_of_head_changes_nothing_before_it() -> None:
    """Runs that differ in their head alone share stage 1."""
    networks = [build_network(SMALL, Head(kind=kind, heads=3), 1, seed=0) for kind in KINDS]
    for network in networks[1:]:
        for part in ("backbone", "fc"):
            assert changed(networks[0].get_submodule(part).state_dict(), network.get_submodule(part)) == set()


# ---------------------------------------------------------------- several heads


def multi(dim: int = 6, heads: int = 3, temperature_max: float = 0.2) -> MultiHead:
    torch.manual_seed(0)
    head = make_head(Head(kind="multi", hidden=5, heads=heads, temperature_max=temperature_max), 7, dim)
    assert isinstance(head, MultiHead)
    with torch.no_grad():
        for parameter in head.phi.parameters():
            parameter.mul_(3)  # temperatures that differ
    return head.double()


def test_heads_side_by_side_equal_heads_apart() -> None:
    head = multi()
    x = drawn(4, 7)
    parts = []
    for c in range(3):
        rows = slice(5 * c, 5 * (c + 1))
        hidden = (x @ head.first.weight[rows].T + head.first.bias[rows]).clamp(min=0)
        out = head.last.linears[c](hidden)
        parts.append(out / out.norm(dim=1, keepdim=True))
    got = head(x)
    torch.testing.assert_close(got, torch.cat(parts, 1) / math.sqrt(3))
    torch.testing.assert_close(got.norm(dim=1), torch.ones(4, dtype=torch.float64))
    # the mean of the heads' similarities is that of the embeddings
    similar = torch.stack([part @ part.T for part in parts])
    torch.testing.assert_close(got @ got.T, similar.mean(0))
    network = build_network(SMALL, Head(kind="multi", hidden=5, heads=3), 1, seed=0)
    torch.testing.assert_close(network(images(), use_head=True), network.project(network.backbone(images())))


@pytest.mark.parametrize(("dim", "heads", "beta"), [(6, 3, 1e-4), (6, 3, 0.3), (8, 2, 0.05)])
def test_logits_of_pairs_equal_the_formula(dim: int, heads: int, beta: float) -> None:
    head = multi(dim, heads)
    u, v = head(drawn(4, 7)), head(drawn(5, 7, seed=1))
    got, each = head.pair_logits(u, v, beta), head.paired_logits(u, v[:4], beta)
    assert got.shape == (heads, 4, 5) and each.shape == (heads, 4)
    (w1, b1), (w2, b2) = ((layer.weight.tolist(), layer.bias.tolist()) for layer in (head.phi[0], head.phi[2]))
    part = dim // heads

    def affine(weight: list[list[float]], bias: list[float], x: list[float]) -> list[float]:
        return [sum(a * b for a, b in zip(row, x, strict=True)) + c for row, c in zip(weight, bias, strict=True)]

    def phi(x: list[float]) -> list[float]:
        return affine(w2, b2, [max(0.0, a) for a in affine(w1, b1, x)])

    taus = []
    for c in range(heads):
        for i in range(4):
            for j in range(5):
                mine, other = (
                    [a * math.sqrt(heads) for a in row[c * part : (c + 1) * part].tolist()] for row in (u[i], v[j])
                )
                alike = sum(a * b for a, b in zip(phi(mine), phi(other), strict=True))
                tau = 0.01 + (0.2 - 0.01) / (1 + math.exp(alike))
                omega = part / 2 * math.log(tau) + 1 / tau
                similarity = sum(a * b for a, b in zip(mine, other, strict=True))
                assert got[c, i, j].item() == pytest.approx(similarity / tau - beta * omega, rel=1e-9)
                if i == j:
                    assert each[c, i].item() == pytest.approx(got[c, i, j].item(), rel=1e-9)
                taus.append(tau)
    assert 0.01 < min(taus) < 0.8 * max(taus) < 0.2


def test_gradients_reach_heads_and_temperatures() -> None:
    head = multi()
    u, v = head(drawn(4, 7)), head(drawn(4, 7, seed=1))
    loss = F.cross_entropy(head.pair_logits(u, v, 0.1).flatten(0, 1), torch.arange(4).repeat(3))
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in head.parameters())
    flat = torch.nn.utils.parameters_to_vector(head.phi.parameters()).detach()
    u, v = u.detach(), v.detach()

    def value(weights: Tensor) -> Tensor:
        torch.nn.utils.vector_to_parameters(weights, head.phi.parameters())
        return F.cross_entropy(head.pair_logits(u, v, 0.1).flatten(0, 1), torch.arange(4).repeat(3)).detach()

    got = torch.cat([p.grad.flatten() for p in head.phi.parameters() if p.grad is not None])
    for at in range(0, len(flat), 3):
        step = torch.zeros_like(flat)
        step[at] = 1e-6
        slope = (value(flat + step) - value(flat - step)) / 2e-6
        assert slope.item() == pytest.approx(got[at].item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1e-4, 0.5])
def test_with_one_temperature_each_head_is_plain_info_nce(beta: float) -> None:
    """Omega is then the same number in every logit, which the softmax does not see."""
    flat = multi(temperature_max=TAU_MIN)
    constant = multi()
    with torch.no_grad():
        constant.phi[2].weight.zero_()
        constant.phi[2].bias.zero_()
    for head, tau in ((flat, TAU_MIN), (constant, (0.2 + TAU_MIN) / 2)):
        u, v = head(drawn(4, 7)), head(drawn(5, 7, seed=1))
        logits = head.pair_logits(u, v, beta)
        targets = torch.tensor([0, 4, 1, 2])
        for c in range(3):
            mine, other = (F.normalize(x[:, 2 * c : 2 * c + 2], dim=1) for x in (u, v))
            want = F.cross_entropy(mine @ other.T / tau, targets)
            torch.testing.assert_close(F.cross_entropy(logits[c], targets), want, rtol=1e-8, atol=1e-8)


def test_what_phi_finds_alike_is_sharp() -> None:
    head = multi(dim=4, heads=2)
    with torch.no_grad():  # phi is relu
        for layer in (head.phi[0], head.phi[2]):
            layer.weight.copy_(9 * torch.eye(2))
            layer.bias.zero_()
    u = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    got = head.pair_logits(u, u, 0.0)
    want = torch.tensor([[1 / TAU_MIN, 0.0], [0.0, 1 / TAU_MIN]], dtype=torch.float64)
    torch.testing.assert_close(got, torch.stack([want, want]))
    # and -Omega alone: the likely temperature of a Gaussian is as small as its dimensions ask
    same = head.pair_logits(u, u, 1.0) - got
    assert same[0, 0, 0].item() == pytest.approx(-(math.log(TAU_MIN) + 1 / TAU_MIN))
    assert same[0, 0, 1].item() == pytest.approx(-(math.log(0.105) + 1 / 0.105))


# ---------------------------------------------------------------- settings


def test_the_embedding_must_be_dealt_out_evenly() -> None:
    def of(dim: int, heads: int) -> Config:
        return Config(model=Model(dim=dim), head=Head(kind="multi", heads=heads))

    assert of(128, 4).head.heads == 4 and of(6, 3).model.dim == 6
    with pytest.raises(
        ValidationError, match=r"model.dim is 128, but must be a multiple of head.heads \(3\).*126 or 129"
    ):
        of(128, 3)
    with pytest.raises(
        ValidationError, match=r"model.dim is 3, but .* two dimensions for each head at least \(6 is near"
    ):
        of(3, 3)
    Config(model=Model(dim=128), head=Head(heads=3))  # another kind does not ask


def test_the_lowest_temperature_is_the_bound_of_the_highest() -> None:
    assert Head(temperature_max=TAU_MIN).temperature_max == TAU_MIN
    with pytest.raises(ValidationError, match="temperature_max"):
        Head(temperature_max=math.nextafter(TAU_MIN, 0))
