"""The methods under one roof, each against its paper's equations written as loops."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import timeless
from torch import Tensor

from hpcl.config import Config
from hpcl.dist import World
from hpcl.heads import HeadSimilarity
from hpcl.hierarchy import Hierarchy
from hpcl.losses import Cosine, contrast, nt_xent
from hpcl.methods import METHODS, reads
from hpcl.optimizer import LARS
from hpcl.prefix import acts_from
from hpcl.prototypes import Level, make_level, parents
from hpcl.rng import generator, seed_of
from hpcl.sections import Head
from hpcl.selection import instance_negatives, membership, prototype_negatives, uniform
from hpcl.stages import learning_rate, make_plan
from hpcl.trainer import Trainer, fit
from hpcl.training_loss import training_loss
from hpcl.validation import field_paths

PEERS = ("moco", "pcl", "hcsc", "simclr")
ALONE = World(0, 1, torch.device("cpu"))
T, B, K, D, N = 0.2, 6, 9, 5, 60
COUNTS = (3, 7)


def unit(rows: int, seed: int) -> Tensor:
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1)


def some_levels() -> list[Level]:
    """Two levels, 3 and 7 prototypes of 60 images."""
    features = unit(N, 7)
    coarse, fine = (make_level(torch.arange(N) % count, features, count, T) for count in COUNTS)
    above = parents(fine.prototypes, coarse.prototypes)
    return [coarse, Level(fine.cluster_of_image, fine.prototypes, fine.concentration, fine.sizes, above)]


def config_of(method: str, **values: Any) -> Config:
    return Config.model_validate({"method": method}).with_values({"moco.temperature": T, **values})


def loss_of(config: Config, levels: list[Level], seed: int = 3) -> list[float]:
    """The five values of :func:`training_loss` for fixed vectors: queries 0, keys 1, queue 2."""
    ids = [level.cluster_of_image[:B] for level in levels]
    queue = unit(K, 2) if METHODS[config.method].has_queue else torch.zeros(0, D)
    similarity = Cosine(config.moco.temperature)
    values = training_loss(config, ALONE, unit(B, 0), unit(B, 1), queue, ids, levels, similarity, seed)
    return [float(value) for value in values]


def log_softmax(own: float, others: list[float]) -> float:
    """``log( exp(own) / (exp(own) + sum exp(others)) )``."""
    return math.log(math.exp(own) / (math.exp(own) + sum(math.exp(x) for x in others)))


# ---------------------------------------------------------------- what a method is


def test_defaults_stand_where_nothing_else_is_said() -> None:
    pcl = Config.model_validate({"method": "pcl"})
    assert (pcl.prototypes.targets, pcl.topk.mode, pcl.clusters.size_tolerance) == ("pcl", "none", None)
    kept = Config.model_validate({"method": "pcl", "prototypes": {"targets": "unique"}, "head": Head(hidden=8)})
    assert (kept.prototypes.targets, kept.head.hidden, kept.head.attach) == ("unique", 8, "replace")
    assert Config.model_validate({"method": "hcsc"}).clusters.nesting == "tree"
    assert Config.model_validate({"method": "hpcl"}) == Config()
    with pytest.raises(ValueError, match="method"):
        Config.model_validate({"method": "byol"})


def test_a_complete_configuration_changes_its_method_with_the_defaults() -> None:
    complete = Config.model_validate(Config().model_dump())
    for method in PEERS:
        changed = complete.with_values({"method": method})
        assert changed == Config.model_validate({"method": method})
        assert changed.with_values({"method": "hpcl"}) == complete
    own = complete.with_values({"clusters.size_tolerance": 0.5}).with_values({"method": "pcl"})
    assert own.clusters.size_tolerance == 0.5  # not the default, so it was meant
    assert complete.with_values({"method": "pcl", "topk.mode": "add"}).topk.mode == "add"


def test_what_a_method_reads_is_known_of_every_field() -> None:
    paths = field_paths(Config)
    assert all(reads("hpcl", path) for path in paths)
    unread = {method: [path for path in paths if not reads(method, path)] for method in PEERS}
    assert {"growth.window", "stages.stage3.lr"} <= set(unread["pcl"]) and "clusters.first" not in unread["pcl"]
    assert {"clusters.first", "topk.k", "density.parent", "moco.select"} <= set(unread["moco"])
    assert {"moco.queue", "moco.momentum", "moco.symmetric"} <= set(unread["simclr"])
    assert "clusters.backend" not in unread["simclr"] and "moco.temperature" not in unread["simclr"]


def test_peers_train_everything_in_one_schedule_with_the_head_from_the_start() -> None:
    plan = make_plan(config_of("pcl"))
    assert [p.stage for p in plan] == [1, 2, 3, 4, 5]
    assert all(p.trains_encoder and p.uses_head and not p.may_grow for p in plan)
    assert [p.uses_prototypes for p in plan] == [False, True, True, True, True]
    assert [p.continues for p in plan] == [False, True, True, True, True]
    assert {p.schedule_epochs for p in plan} == {(1, 150)}
    assert learning_rate(plan[3], 75, 150) == pytest.approx(plan[0].lr / 2)
    assert not any(p.uses_prototypes for p in make_plan(config_of("moco")))
    assert [p.schedule_epochs for p in make_plan(config_of("hpcl"))] == [
        (p.first_epoch, p.last_epoch) for p in make_plan(Config())
    ]


def test_from_where_fields_act_in_a_method() -> None:
    pcl, moco = config_of("pcl"), config_of("moco")
    assert [acts_from(p, pcl) for p in ("head.kind", "clusters.first", "stages.stage5.epochs")] == [1, 2, 1]
    assert [acts_from(p, pcl) for p in ("growth.window", "stages.stage3.lr")] == [5, 5]
    assert [acts_from(p, moco) for p in ("clusters.first", "moco.queue", "method")] == [5, 1, 1]


# ---------------------------------------------------------------- the losses, by loops


def test_moco_is_info_nce_alone() -> None:
    q, k, queue = unit(B, 0).numpy(), unit(B, 1).numpy(), unit(K, 2).numpy()
    wanted = np.mean([-log_softmax(q[i] @ k[i] / T, [q[i] @ n / T for n in queue]) for i in range(B)])
    loss, inst, proto, *_ = loss_of(config_of("moco"), [])
    assert loss == inst == pytest.approx(wanted, rel=1e-12) and proto == 0


def test_simclr_is_nt_xent() -> None:
    z = np.concatenate([unit(B, 0).numpy(), unit(B, 1).numpy()])
    total, right = 0.0, 0
    for i in range(2 * B):
        j = (i + B) % (2 * B)
        negatives = [z[i] @ z[k] / T for k in range(2 * B) if k not in (i, j)]
        total -= log_softmax(z[i] @ z[j] / T, negatives)
        right += all(z[i] @ z[j] / T > x for x in negatives)
    loss, _, _, accuracy, _ = loss_of(config_of("simclr"), [])
    assert loss == pytest.approx(total / (2 * B), rel=1e-12)
    assert accuracy == pytest.approx(right / (2 * B))


def test_nt_xent_of_equal_pairs_and_orthogonal_images_is_closed() -> None:
    axes = torch.eye(4, dtype=torch.float64)
    loss, accuracy = nt_xent(axes, axes, axes, axes, 0, Cosine(0.5))
    assert float(loss) == pytest.approx(math.log(1 + 6 * math.exp(-1 / 0.5))) and float(accuracy) == 1
    with pytest.raises(ValueError, match="at least 2"):
        nt_xent(axes[:1], axes[:1], axes[:1], axes[:1], 0, Cosine(0.5))


def test_pcl_is_info_nce_and_proto_nce_at_fixed_counts() -> None:
    levels, q = some_levels(), unit(B, 0).numpy()
    config = config_of("pcl", **{"prototypes.negatives": 100})
    expected = []
    for level in levels:
        c, phi, own = level.prototypes.numpy(), level.concentration.numpy(), level.cluster_of_image[:B].tolist()
        rest = [j for j in range(level.num_clusters) if j not in own]
        columns = [*own, *rest]  # eq. 11: the batch's prototypes, one per image, and r negatives
        for i in range(B):
            logits = [q[i] @ c[j] / phi[j] for j in columns]
            expected.append(-log_softmax(logits[i], logits[:i] + logits[i + 1 :]))
    loss, inst, proto, *_ = loss_of(config, levels)
    assert inst == pytest.approx(loss_of(config_of("moco"), [])[0], rel=1e-12)
    assert proto == pytest.approx(np.mean(expected), rel=1e-12)
    assert loss == pytest.approx(inst + proto)


def test_hcsc_is_both_losses_over_the_selected_negatives() -> None:
    levels, seed = some_levels(), 3
    q, k, queue = unit(B, 0).numpy(), unit(B, 1).numpy(), unit(K, 2).numpy()

    def member(x: np.ndarray, level: Level, cluster: int) -> float:
        c, phi = level.prototypes.numpy(), level.concentration.numpy()
        return math.exp(log_softmax(x @ c[cluster] / phi[cluster], [
            x @ c[j] / phi[j] for j in range(len(c)) if j != cluster
        ]))  # fmt: skip

    instance, proto, left_out = [], [], 0
    for depth, level in enumerate(levels):
        own, c, phi = level.cluster_of_image, level.prototypes.numpy(), level.concentration.numpy()
        draw = uniform(seed_of(seed_of(seed, "select-keys", 0), "level", depth), B, K, torch.device("cpu")).numpy()
        drawn = uniform(seed_of(seed, "select-prototypes", depth, 0), B, len(c), torch.device("cpu")).numpy()
        for i in range(B):
            mine = int(own[i])
            kept = [n for n in range(K) if draw[i, n] < 1 - member(queue[n], level, mine)]
            left_out += K - len(kept)
            instance.append(-log_softmax(q[i] @ k[i] / T, [q[i] @ queue[n] / T for n in kept]))
            others = [j for j in range(len(c)) if j != mine]
            if depth:  # the coarsest level keeps all
                above = int(level.parent[mine])
                others = [j for j in others if drawn[i, j] < 1 - member(c[j], levels[depth - 1], above)]
                left_out += len(c) - 1 - len(others)
            proto.append(-log_softmax(q[i] @ c[mine] / phi[mine], [q[i] @ c[j] / phi[j] for j in others]))
    assert left_out > 5
    loss, inst, prototype, *_ = loss_of(config_of("hcsc"), levels, seed)
    assert inst == pytest.approx(np.mean(instance), rel=1e-12)
    assert prototype == pytest.approx(np.mean(proto), rel=1e-12)
    assert loss == pytest.approx(inst + prototype)


# ---------------------------------------------------------------- HCSC's selection and tree


def test_keys_are_kept_as_often_as_they_lie_elsewhere() -> None:
    level, queue = some_levels()[1], unit(4, 11)
    own = torch.full((20_000,), 2)
    kept = instance_negatives(queue, own, level, uniform(5, 20_000, 4, torch.device("cpu")))
    wanted = 1 - membership(queue, level)[:, 2]
    assert torch.allclose(kept.double().mean(0), wanted, atol=0.015)
    assert torch.allclose(membership(queue, level).sum(1), torch.ones(4, dtype=torch.float64))


def test_the_own_prototype_always_counts_and_a_level_without_parents_is_refused() -> None:
    coarse, fine = some_levels()
    own = torch.tensor([0, 3, 6])
    keep = prototype_negatives(fine, coarse, own, torch.ones(3, 7))
    assert keep.sum() == 3 and bool(keep[torch.arange(3), own].all())
    with pytest.raises(ValueError, match="coarsest"):
        prototype_negatives(coarse, coarse, own, torch.ones(3, 3))


def test_a_negative_left_out_is_not_one_of_similarity_0_and_none_at_all_costs_nothing() -> None:
    own = torch.tensor([0.5], requires_grad=True)
    others = torch.tensor([[2.0, 1.0]], requires_grad=True)
    keep = torch.tensor([[True, False]])
    loss, accuracy = contrast(own, others, keep)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(1.5))) and float(accuracy) == 0
    assert loss.item() != pytest.approx(contrast(own, others * keep)[0].item())
    nothing, _ = contrast(own, others, torch.zeros(1, 2, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0 and own.grad.tolist() == [0] and others.grad.tolist() == [[0, 0]]


def test_a_tree_groups_prototypes_and_its_means_are_theirs(tiny: Config, tmp_path: Path) -> None:
    trainer = Trainer(tiny.with_values({"method": "hcsc", "clusters.counts": (2, 5, 11)}), tmp_path)
    features = torch.nn.functional.normalize(torch.randn(90, 4, generator=generator(0, "order")), dim=1)
    levels = trainer.hierarchy.cluster(features, features, stage=3, epoch=1, world=ALONE)
    assert [level.num_clusters for level in levels] == [2, 5, 11] and levels[0].parent is None
    for coarse, fine in itertools.pairwise(levels):
        assert torch.equal(coarse.cluster_of_image, fine.parent[fine.cluster_of_image])
        for j in range(coarse.num_clusters):
            mean = fine.prototypes[fine.parent == j].mean(0)
            assert torch.allclose(coarse.prototypes[j], mean / mean.norm(), atol=1e-6)


def test_levels_have_the_density_that_was_asked_for(tiny: Config, tmp_path: Path) -> None:
    features = torch.nn.functional.normalize(torch.randn(405, 16, generator=generator(0, "order")), dim=1)
    spreads = []
    for shrink in (0.0, 1.0):
        trainer = Trainer(tiny.with_values({"density.shrink": shrink, "clusters.first": 8}), tmp_path)
        level = trainer.hierarchy.cluster(features, features, stage=3, epoch=1, world=ALONE)[0]
        spreads.append(float(level.concentration.std()))
    assert spreads[0] > 1e-4 and spreads[1] < 1e-6


@pytest.mark.parametrize(("method", "counts"), [("hpcl", (30,)), ("pcl", (30, 51, 87))])
def test_a_tenth_of_the_images_bounds_growing_clusters_alone(
    tiny: Config, method: str, counts: tuple[int, ...]
) -> None:
    config = tiny.with_values({"method": method, "clusters.first": 30, "clusters.levels": 3})
    assert Hierarchy(config, 405).counts == counts


# ---------------------------------------------------------------- whole runs


def test_several_heads_learn_their_temperatures_where_the_head_is_in_use(tiny: Config, tmp_path: Path) -> None:
    trainer = Trainer(tiny.with_values({"head.kind": "multi", "stages.total": 5}), tmp_path)
    phi = trainer.pair.query.mlp.phi[0].weight
    before = phi.detach().clone()
    trainer.train_one_epoch(1)
    assert torch.equal(phi, before)  # stage 1 does not use the head
    trainer.train_one_epoch(2)
    assert not torch.equal(phi, before)
    q, k = unit(4, 0), unit(9, 1)
    similarity = trainer.step._similarity(trainer.plan[1])
    assert isinstance(similarity, HeadSimilarity) and isinstance(trainer.step._similarity(trainer.plan[0]), Cosine)
    u, v = (torch.randn(n, 16, generator=generator(n, "order")) for n in (len(q), len(k)))
    assert torch.equal(similarity.against(u, v), similarity.head.pair_logits(u, v, tiny.head.beta))
    assert similarity.pairs(u, u).shape == (4, 4)


def cut_after(epoch: int, config: Config, folder: Path) -> list[dict[str, Any]]:
    """Rows of a run that was interrupted after an epoch and gone on with."""

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, folder, report=stop)
    return fit(config, folder).rows


OPTIONS: dict[str, dict[str, Any]] = {
    "moco": {"head.kind": "multi", "optimizer.kind": "lars"},
    "pcl": {"clusters.features": "bank", "density.shrink": 0.5},
    "hcsc": {"clusters.counts": (2, 5, 11), "moco.symmetric": True},
    "simclr": {},
}


@pytest.mark.parametrize("method", PEERS)
def test_a_method_trains_resumes_and_forks_to_the_same_table(tiny: Config, tmp_path: Path, method: str) -> None:
    config = tiny.with_values({"stages.total": 6, "method": method, **OPTIONS[method]})
    whole = fit(config, tmp_path / "whole").rows
    assert whole[-1]["state"] == "finished" and not any(row.get("grew") for row in whole)
    assert all(row["clusters"] is None for row in whole) == (not METHODS[method].prototypes)

    assert timeless(cut_after(3, config, tmp_path / "cut")) == timeless(whole)
    fit(config, tmp_path / "prefix", until_stage=1)
    forked = fit(config, tmp_path / "fork", fork=tmp_path / "prefix" / "checkpoint.pt").rows
    assert timeless([row | {"shared": False} for row in forked]) == timeless(whole)


def test_the_optimizer_is_the_one_that_was_asked_for(tiny: Config, tmp_path: Path) -> None:
    for kind, wanted in (("sgd", torch.optim.SGD), ("lars", LARS)):
        trainer = Trainer(tiny.with_values({"optimizer.kind": kind}), tmp_path)
        trainer._prepare(trainer.plan[0])
        assert type(trainer._optimizer) is wanted


def test_without_a_momentum_encoder_the_key_network_is_the_query_network(tiny: Config, tmp_path: Path) -> None:
    trainer = Trainer(tiny.with_values({"method": "simclr", "stages.total": 5}), tmp_path)
    trainer.train_one_epoch(1)
    query, key = trainer.pair.query.state_dict(), trainer.pair.key.state_dict()
    assert all(torch.equal(query[name], key[name]) for name in query)
    assert len(trainer.queue.keys) == 0


def test_a_bank_holds_the_latest_keys_and_its_run_goes_on_as_unbroken(tiny: Config, tmp_path: Path) -> None:
    config = tiny.with_values({"clusters.features": "bank"})
    trainer = Trainer(config, tmp_path / "whole")
    rows = [trainer.train_one_epoch(epoch) for epoch in (1, 2)]
    assert trainer.step.bank is None  # stage 2 groups what the encoder knows
    trainer.train_one_epoch(3)
    bank = trainer.step.bank
    assert bank is not None and bank.shape == (405, 16)
    assert torch.allclose(bank.norm(dim=1), torch.ones(405), atol=1e-5)
    before, positions = bank.clone(), torch.arange(64)
    plan = trainer.plan[2]
    keys = trainer.step.keys(positions, plan, 99)
    trainer.step.take(trainer.pair.query, trainer._optimizer, positions, plan, [], 99)
    assert torch.equal(bank[64:], before[64:]) and torch.allclose(bank[:64], keys, atol=0.1)
    whole = fit(config, tmp_path / "unbroken").rows
    assert timeless(whole)[:2] == timeless(rows)

    assert timeless(cut_after(4, config, tmp_path / "cut")) == timeless(whole)
    assert timeless(whole)[3:] != timeless(fit(tiny, tmp_path / "forward").rows)[3:]
