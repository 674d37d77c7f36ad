"""Clusters against labels: measures by hand cases and scikit-learn, k-means of encoders, levels of a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import Run, bench_of, by_setting
from conftest import TINY
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from hpcl.config import Config
from hpcl.data import ImageSet, load
from hpcl.downstream import clusters
from hpcl.errors import UnreadableCheckpoint
from hpcl.trainer import fit


def test_agreement_of_hand_cases_and_against_scikit_learn() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert clusters.agreement(labels, 1 - labels) == pytest.approx({"AMI": 1.0, "ARI": 1.0, "purity": 1.0})
    assert clusters.purity(labels, torch.tensor([0, 0, 1, 1, 1, 2])) == 5 / 6
    assert clusters.purity(labels, torch.zeros(6).long()) == 0.5
    assert clusters.purity(labels * 4, torch.tensor([0, 9, 9, 9, 9, 0])) == 4 / 6 - 1 / 6
    alone = clusters.agreement(torch.zeros(4).long(), torch.zeros(4).long())
    assert math.isnan(alone["AMI"]) and alone["purity"] == 1.0
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randint(5, (300,), generator=draw), torch.randint(7, (300,), generator=draw)
    b = torch.where(torch.rand(300, generator=draw) < 0.4, a, b)
    found = clusters.agreement(a, b)
    assert found["AMI"] == pytest.approx(adjusted_mutual_info_score(a, b), abs=1e-9)
    assert found["ARI"] == pytest.approx(adjusted_rand_score(a, b))
    loop = sum(max(Counter(a[b == cluster].tolist()).values()) for cluster in set(b.tolist()))
    assert found["purity"] == loop / 300


def test_levels_are_the_checkpoints_and_kmeans_is_that_of_every_encoder(unbroken: Run) -> None:
    images = load(Config.model_validate(TINY).data)
    assert images.labels is not None
    bench = bench_of(unbroken, images, "val", with_state=True)
    scores = clusters.run(bench, ("trained", "pixels"), 0)
    assert bench.state is not None
    (level,) = bench.state["hierarchy"]["labels"]
    names = ["k-means, k = classes", "k-means, k = finest level", "level 1 of 1 (7 clusters)"]
    assert [score.setting for score in scores] == [n for n in [*names, *names[:2]] for _ in clusters.MEASURES]
    found = by_setting(scores, "AMI")
    truth = images.labels[images.train]
    assert found["trained", names[2]].value == pytest.approx(adjusted_mutual_info_score(truth, level), abs=1e-9)
    assert all(score.count == len(truth) for score in scores)
    for encoder in ("trained", "pixels"):
        features = bench.features(encoder, "train", 0)
        own = clusters.kmeans_labels(features, 10, bench.config.clusters, 0)
        assert int(own.bincount(minlength=10).min()) >= len(truth) // 10 * 2 // 3  # the configuration's bounds
        assert torch.equal(own, clusters.kmeans_labels(features * 7.0, 10, bench.config.clusters, 0))
        value = adjusted_mutual_info_score(truth, own)
        assert found[encoder, names[0]].value == pytest.approx(value, abs=1e-9)
    others = by_setting(clusters.run(bench, ("pixels",), 1), "AMI")
    assert others["pixels", names[0]].value != found["pixels", names[0]].value  # the start is drawn by seed


def test_levels_of_other_images_or_of_stage_1_are_left_out_and_strange_ones_refused(unbroken: Run) -> None:
    images = load(Config.model_validate(TINY).data)
    bench = bench_of(unbroken, images, with_state=True)
    assert bench.state is not None

    def settings(changed: dict[str, Any], of: ImageSet = images) -> set[str]:
        bench.state, bench.images = changed, of
        return {score.setting for score in clusters.run(bench, ("trained",), 0)}

    state = bench.state
    plain = {"k-means, k = classes"}
    assert len(settings(state)) == 3
    assert settings(state, dataclasses.replace(images, content_hash="other")) == plain
    assert settings(state | {"rows": state["rows"][:1], "hierarchy": {"position": 0, "labels": []}}) == plain
    with pytest.raises(UnreadableCheckpoint, match="mnist5k: holds an assignment of 7 images, but there are 405"):
        settings(state | {"hierarchy": {"labels": [torch.zeros(7)]}})
    with pytest.raises(UnreadableCheckpoint, match="holds 16 epochs of 8"):
        settings(state | {"rows": state["rows"] * 2})


def test_a_run_of_one_epoch_can_be_chosen_by_its_clusters(tmp_path: Path) -> None:
    tiny = TINY | {"stages": {f"stage{number}": {"epochs": int(number == 1)} for number in range(1, 6)}}
    rows = fit(Config.model_validate(tiny), tmp_path, objective="clusters@val").rows
    assert rows[-1]["objective"] > 0


def test_the_lengths_of_features_do_not_count_for_clusters() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(200, 8, generator=draw) + 1
    lengths = torch.tensor([0.01, 100.0])[torch.randint(2, (200, 1), generator=draw)]
    options = Config.model_validate(TINY).clusters
    found = [clusters.kmeans_labels(rows, 4, options, 0) for rows in (features, features * lengths)]
    assert clusters.agreement(*found)["AMI"] > 0.99
