"""kNN, linear probes, few-shot and clusters as tasks: on a run's checkpoint and real digits, and by hand cases."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from hpcl.checkpoint import load_checkpoint
from hpcl.config import Config
from hpcl.data import DeviceImages, ImageSet, load
from hpcl.dist import World
from hpcl.downstream import clusters, fewshot, knn, linear
from hpcl.downstream.bench import Bench, Split
from hpcl.downstream.fewshot import Episodes, draw_episodes, episode_accuracies, inner_products
from hpcl.downstream.scores import Encoder, Score
from hpcl.errors import UnreadableCheckpoint
from hpcl.pretrained import load_network
from hpcl.rng import seed_of

TASKS: tuple[Any, ...] = (knn, linear, fewshot, clusters)
ENCODERS: tuple[Encoder, ...] = ("trained", "untrained", "pixels")
NOVEL = (7, 8, 9)
"""Digits that the images of these tests have as novel classes."""

ALL_PENALTIES = linear.PENALTIES

Run = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    """405 training digits, and the images of the last three digits in val and test as novel."""
    images = load(Config.model_validate(TINY).data)
    assert images.labels is not None
    novel = np.isin(images.labels, NOVEL)

    def part(ids: Any, of_novel: bool) -> Any:
        return ids[novel[ids] == of_novel]

    return dataclasses.replace(
        images,
        train=part(images.train, False),
        val=part(images.val, False),
        test=part(images.test, False),
        novel_val=part(images.val, True),
        novel_test=part(images.test, True),
    )


def bench_of(run: Run, images: ImageSet, split: Split = "test", with_state: bool = False) -> Bench:
    config, network, _ = load_network(run[0] / "checkpoint.pt")
    state = load_checkpoint(run[0] / "checkpoint.pt") if with_state else None
    return Bench(config, network, images, World(0, 1, torch.device("cpu")), split=split, state=state)


@pytest.fixture(scope="module")
def bench(unbroken: Run, digits: ImageSet) -> Bench:
    return bench_of(unbroken, digits)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few episodes, and in linear probes few penalties and pixels of 14x14."""
    monkeypatch.setattr(fewshot, "EPISODES", 60)
    monkeypatch.setattr(linear, "LARGEST_SYSTEM", 200)
    monkeypatch.setattr(linear, "PENALTIES", (0.001, 0.1))
    monkeypatch.setattr(linear, "LOGISTIC_PENALTIES", (1.0, 0.1, 0.01))


def by_setting(scores: list[Score], measure: str = "accuracy") -> dict[tuple[Encoder, str], Score]:
    return {(score.encoder, score.setting): score for score in scores if score.measure == measure}


# ---------------------------------------------------------------- all tasks


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__.rpartition(".")[2])
def test_every_task_gives_finite_scores_of_every_encoder_and_the_same_again(
    task: Any, bench: Bench, unbroken: Run, digits: ImageSet
) -> None:
    assert task.refusal(bench) is None
    scores = task.run(bench, ENCODERS, 3)
    assert scores[0].encoder == "trained" and scores[0].measure in ("accuracy", "AMI")
    assert list(dict.fromkeys(score.encoder for score in scores)) == list(ENCODERS)
    assert all(score.is_finite and score.count > 0 and score.seed == 3 for score in scores)
    assert {score.task for score in scores} == {task.__name__.rpartition(".")[2]}
    keys = [(score.setting, score.measure, score.encoder) for score in scores]
    assert len(set(keys)) == len(keys)
    assert task.run(bench_of(unbroken, digits), ENCODERS, 3) == scores
    assert all(score.value <= 1 for score in scores)
    alone = task.run(bench, ("trained",), 3)
    assert alone == [score for score in scores if score.encoder == "trained"]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__.rpartition(".")[2])
def test_nothing_looks_at_test_images_or_their_labels_for_the_val_split(
    task: Any, unbroken: Run, digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert digits.labels is not None
    hidden = np.concatenate([digits.test, digits.novel_test])
    pixels, labels = digits.images.copy(), digits.labels.copy()
    pixels[hidden] = 255 - pixels[hidden]
    labels[hidden] = 10**6  # no class: an index out of range wherever it is used
    poisoned = dataclasses.replace(digits, images=pixels, labels=labels)
    seen: list[int] = []
    batch = DeviceImages.batch

    def watched(self: DeviceImages, ids: Any) -> Any:
        seen.extend(torch.as_tensor(ids).tolist())
        return batch(self, ids)

    monkeypatch.setattr(DeviceImages, "batch", watched)
    clean, scores = (task.run(bench_of(unbroken, images, "val"), ENCODERS, 0) for images in (digits, poisoned))
    assert scores == clean and all(score.is_finite for score in scores)
    assert seen and not set(seen) & set(hidden.tolist())
    task.run(bench_of(unbroken, digits, "test"), ENCODERS, 0)  # and the watch does see them
    assert bool(set(seen) & set(hidden.tolist())) == (task is not clusters)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__.rpartition(".")[2])
def test_features_that_are_not_finite_give_no_number(task: Any, unbroken: Run, digits: ImageSet) -> None:
    bench = bench_of(unbroken, digits)
    with torch.no_grad():
        next(bench.network("trained", 0).parameters()).fill_(math.nan)
    scores = task.run(bench, ("trained", "pixels"), 0)
    assert [score.is_finite for score in scores] == [score.encoder == "pixels" for score in scores]


@pytest.mark.parametrize(
    ("changes", "task", "says"),
    [
        ({"labels": None}, knn, "has no labels, which kNN needs; give a source with one folder per class"),
        ({"labels": None}, linear, "has no labels, which the linear probe needs"),
        ({"labels": None}, fewshot, "has no labels, which few-shot classification needs"),
        ({"labels": None}, clusters, "has no labels, which the comparison of clusters with labels needs"),
        ({"train": 1}, clusters, "1 class has training images, but .* needs 2 or more"),
        ({"test": None}, knn, "has no test images, which kNN is scored on; set data.test_fraction above 0"),
        ({"test": "novel_test"}, linear, "no class of its test images has training images, so the linear probe cannot"),
        ({"novel_test": None}, fewshot, r"number of test classes that training never saw is 0, .*novel_classes=5"),
        ({"novel_test": "test"}, fewshot, "number of test classes that training never saw is 0"),
        (
            {"novel_test": [(7, 50), (8, 19), (9, 19)]},
            fewshot,
            r"2 of its 3 novel test classes have fewer than 20 images \(5 labelled and 15",
        ),
    ],
)
def test_what_images_lack_is_said(
    changes: dict[str, Any], task: Any, says: str, unbroken: Run, digits: ImageSet
) -> None:
    assert digits.labels is not None
    (name, value), *_ = changes.items()
    new: Any = value
    if name == "train":
        new = digits.train[digits.labels[digits.train] == value]
    elif name == "novel_test" and isinstance(value, list):
        own = digits.labels[digits.novel_test]
        new = np.sort(np.concatenate([digits.novel_test[own == label][:count] for label, count in value]))
    elif name != "labels":
        new = np.empty(0, dtype=np.int64) if value is None else getattr(digits, value)
    sentence = task.refusal(bench_of(unbroken, dataclasses.replace(digits, **{name: new})))
    assert sentence is not None and sentence.startswith("mnist5k: ") and re.search(says, sentence), sentence


# ---------------------------------------------------------------- kNN and linear probes


def test_knn_of_the_task_equals_scikit_learn(bench: Bench) -> None:
    found = by_setting(knn.run(bench, ("trained", "pixels"), 0))
    assert [setting for _, setting in found] == 2 * ["k = 200, T = 0.1", "k = 20, T = 0.07"]
    for encoder in ("trained", "pixels"):
        train, test = (bench.features(encoder, part, 0).double().numpy() for part in ("train", "test"))
        for k, t in ((200, 0.1), (20, 0.07)):
            theirs = KNeighborsClassifier(
                n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda d, t=t: np.exp((1 - d) / t)
            ).fit(train, bench.labels("train").numpy())
            score = found[encoder, f"k = {k}, T = {t}"]
            accuracy = theirs.score(test, bench.labels("test").numpy())
            assert score.value == pytest.approx(accuracy, abs=1.5 / score.count)  # a tie at the k-th place may differ
            assert score.count == len(bench.ids("test"))


def test_on_the_val_split_ridge_is_the_objective_of_training_and_knn_its_curve(
    unbroken: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "PENALTIES", ALL_PENALTIES)
    config = Config.model_validate(TINY)
    run = bench_of(unbroken, load(config.data), "val")
    scores = linear.run(run, ("trained",), seed=5)
    assert [score.setting for score in scores] == ["ridge", "logistic regression"]
    assert scores[0].value == unbroken[1][-1]["objective"]
    assert knn.run(run, ("trained",), seed=5)[0].value == unbroken[1][-1]["knn"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_test_images_are_scored_with_the_penalty_that_val_images_choose(encoder: Encoder, bench: Bench) -> None:
    x, val, test = (linear._rows(bench, encoder, part, 0).features.double() for part in ("train", "val", "test"))
    train, labels = x.numpy(), bench.labels("train").numpy()
    mean, std = train.mean(0), np.where(train.std(0) < 1e-9, 1.0, train.std(0))
    best, value = -1.0, 0.0
    for penalty in linear.LOGISTIC_PENALTIES:
        fitted = LogisticRegression(C=1 / penalty / len(train), max_iter=2000, tol=1e-6).fit(
            (train - mean) / std, labels
        )
        accuracy = fitted.score((val.numpy() - mean) / std, bench.labels("val").numpy())
        if accuracy > best:
            best, value = accuracy, fitted.score((test.numpy() - mean) / std, bench.labels("test").numpy())
    found = by_setting(linear.run(bench, (encoder,), 0))[encoder, "logistic regression"]
    assert found.value == pytest.approx(value, abs=0.01) and found.count == len(test)


def test_large_images_are_averaged_for_the_probe_alone(
    unbroken: Run, digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(unbroken, digits)
    rows = linear._rows(bench, "pixels", "val", 0).features
    images = bench.features("pixels", "val", 0).view(-1, 28, 28)
    assert rows.shape == (len(images), 196)
    assert float(rows[5, 15]) == pytest.approx(float(images[5, 2:4, 2:4].mean()), rel=1e-5)
    assert linear._rows(bench, "trained", "val", 0).features.shape[1] == 32
    monkeypatch.setattr(linear, "LARGEST_SYSTEM", len(digits.train))  # so many training images are as few
    assert torch.equal(linear._rows(bench, "pixels", "val", 0).features, images.flatten(1))


# ---------------------------------------------------------------- few-shot


def test_episodes_are_disjoint_distinct_and_seeded() -> None:
    labels = torch.tensor([3] * 22 + [5] * 20 + [6] * 40 + [9] * 21)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    drawn = draw_episodes(labels, 3, 5, 15, 200, seed=1)
    assert drawn.support.shape == (200, 3, 5) and drawn.query.shape == (200, 3, 15)
    for support, query in zip(drawn.support, drawn.query, strict=True):
        images = torch.cat([support, query], dim=1)
        assert len(set(images.flatten().tolist())) == 3 * 20
        own = labels[images]
        assert (own == own[:, :1]).all() and len(set(own[:, 0].tolist())) == 3
    again, other = (draw_episodes(labels, 3, 5, 15, 200, seed=seed) for seed in (1, 2))
    assert torch.equal(again.support, drawn.support) and torch.equal(again.query, drawn.query)
    assert not torch.equal(other.support, drawn.support)


def test_episodes_are_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewshot, "KEYS_AT_ONCE", 5000)  # in many parts
    labels = torch.tensor([0] * 8 + [1] * 6 + [2] * 12 + [3] * 6)
    drawn = draw_episodes(labels, 2, 1, 4, 6000, seed=0)
    pairs = Counter(tuple(sorted(labels[support].flatten().tolist())) for support in drawn.support)
    assert len(pairs) == 6
    assert all(abs(count - 1000) < 5 * math.sqrt(1000) for count in pairs.values())
    first = Counter(labels[drawn.support[:, 0, 0]].tolist())
    assert all(abs(first[label] - 1500) < 5 * math.sqrt(1500) for label in range(4))
    for images, each in ((drawn.support, 1), (drawn.query, 4)):
        counts = images.flatten().bincount(minlength=32)
        for place, label in enumerate(labels.tolist()):
            want = 6000 / 2 * each / int((labels == label).sum())  # each class is in half of the episodes
            assert abs(int(counts[place]) - want) < 5 * math.sqrt(want)


@pytest.fixture(params=[fewshot.LARGEST_TABLE, 0], ids=["looked up", "computed"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fewshot, "LARGEST_TABLE", request.param)
    monkeypatch.setattr(fewshot, "FLOATS_AT_ONCE", 1000)  # a few episodes at a time
    monkeypatch.setattr(fewshot, "FITS_AT_ONCE", 4)
    yield


def novel_features(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    return bench.features("trained", "novel", 0).double(), bench.labels("novel")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # scikit-learn's variance of one image a class
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("shot", [1, 5])
def test_nearest_centroid_equals_a_slow_loop_and_scikit_learn(shot: int, bench: Bench) -> None:
    raw, labels = novel_features(bench)
    centre = bench.features("trained", "train", 0).double().mean(0)
    drawn = draw_episodes(labels, 3, shot, 15, 12, seed=0)
    unit = torch.nn.functional.normalize(raw - centre, dim=1)
    found = episode_accuracies(unit, drawn, "nearest centroid")
    rows = ((raw - centre) / (raw - centre).norm(dim=1, keepdim=True)).numpy()
    for accuracy, support, query in zip(found.tolist(), drawn.support.numpy(), drawn.query.numpy(), strict=True):
        right = 0
        means = [sum(rows[i] for i in own) / shot for own in support]
        for label, own in enumerate(query):
            for i in own:
                distances = [float(((rows[i] - mean) ** 2).sum()) for mean in means]
                right += distances.index(min(distances)) == label
        assert accuracy == pytest.approx(right / 45)
        theirs = NearestCentroid().fit(rows[support.ravel()], np.repeat(np.arange(3), shot))
        assert accuracy == pytest.approx(theirs.score(rows[query.ravel()], np.repeat(np.arange(3), 15)))


@pytest.mark.usefixtures("table")
def test_logistic_episodes_equal_scikit_learn(bench: Bench) -> None:
    raw, labels = novel_features(bench)
    unit = torch.nn.functional.normalize(raw, dim=1)
    drawn = draw_episodes(labels, 3, 5, 15, 10, seed=0)
    found = episode_accuracies(unit, drawn, "logistic regression")
    for accuracy, support, query in zip(found.tolist(), drawn.support.numpy(), drawn.query.numpy(), strict=True):
        theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(
            unit.numpy()[support.ravel()], np.repeat(np.arange(3), 5)
        )
        assert accuracy == pytest.approx(theirs.score(unit.numpy()[query.ravel()], np.repeat(np.arange(3), 15)))


@pytest.mark.usefixtures("table")
def test_products_are_those_of_the_images(bench: Bench) -> None:
    raw, labels = novel_features(bench)
    drawn = draw_episodes(labels, 2, 5, 15, 9, seed=3)
    parts = list(inner_products(raw, drawn))
    assert len(parts) > 1
    support, query = (torch.cat(part) for part in zip(*parts, strict=True))
    want = torch.einsum("eqf,esf->eqs", raw[drawn.query.flatten(1)], raw[drawn.support.flatten(1)])
    np.testing.assert_allclose(query.numpy(), want.numpy(), rtol=1e-9)
    np.testing.assert_allclose(support[4, 3, 7], raw[drawn.support[4, 0, 3]] @ raw[drawn.support[4, 1, 2]], rtol=1e-9)


def test_the_interval_is_that_of_the_episodes(bench: Bench) -> None:
    value, ci95 = fewshot.mean_and_ci95(torch.tensor([0.2, 0.4, 0.9]))
    assert value == pytest.approx(0.5) and ci95 == pytest.approx(1.96 * math.sqrt(0.13) / math.sqrt(3))
    scores = fewshot.run(bench, ("trained",), 0)
    raw, labels = bench.features("trained", "novel", 0), bench.labels("novel")
    unit = torch.nn.functional.normalize(raw - bench.features("trained", "train", 0).mean(0), dim=1)
    each = episode_accuracies(unit, draw_episodes(labels, 3, 1, 15, 60, 0), "nearest centroid").numpy()
    assert scores[0].value == pytest.approx(each.mean()) and scores[0].count == 60
    assert scores[0].ci95 == pytest.approx(1.96 * each.std(ddof=1) / math.sqrt(60))
    assert [score.setting for score in scores] == [
        "3-way 1-shot, nearest centroid",
        "3-way 1-shot, logistic regression",
        "3-way 5-shot, nearest centroid",
        "3-way 5-shot, logistic regression",
    ]
    assert scores[2].value > scores[0].value > 0.4  # more examples help; a third is chance


def test_classes_with_too_few_images_and_seen_ones_are_left_out(unbroken: Run, digits: ImageSet) -> None:
    assert digits.labels is not None
    own = digits.labels[digits.novel_test]
    few = np.concatenate([digits.novel_test[own != 8], digits.novel_test[own == 8][:19], digits.test])
    bench = bench_of(unbroken, dataclasses.replace(digits, novel_test=np.sort(few)))
    assert fewshot.left_out(bench) == [digits.classes[8]] and fewshot.refusal(bench) is None
    assert fewshot.run(bench, ("pixels",), 0)[0].setting == "2-way 1-shot, nearest centroid"
    pure = dataclasses.replace(digits, novel_test=digits.novel_test[own != 8])
    assert fewshot.run(bench, ("pixels",), 0) == fewshot.run(bench_of(unbroken, pure), ("pixels",), 0)


def test_chance_on_noise_is_one_in_way() -> None:
    labels = torch.arange(5).repeat_interleave(30)
    noise = torch.randn(150, 64, generator=torch.Generator().manual_seed(0))
    drawn = Episodes(*draw_episodes(labels, 5, 5, 15, 100, 0))
    for classifier in fewshot.CLASSIFIERS:
        found = episode_accuracies(torch.nn.functional.normalize(noise, dim=1), drawn, classifier)
        assert float(found.mean()) == pytest.approx(0.2, abs=0.03)


# ---------------------------------------------------------------- clusters


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


def test_the_seed_of_the_probe_is_that_of_the_data(unbroken: Run, digits: ImageSet) -> None:
    bench = bench_of(unbroken, digits, "val")
    one, two = (linear.run(bench, ("trained", "pixels"), seed) for seed in (0, 1))
    assert [score.value for score in one] == [score.value for score in two]
    train, val = (linear.Rows(bench.features("trained", part, 0), bench.labels(part)) for part in ("train", "val"))
    want = linear.linear_probe_accuracy(*train, *val, 10, seed_of(bench.config.data.split_seed, "probe"))
    assert one[0].value == want
