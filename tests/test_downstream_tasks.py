"""kNN and linear probes as tasks, and what all tasks have in common: on a run's checkpoint and real digits."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from benches import Run, bench_of, by_setting, digits_with_novel
from conftest import TINY
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from hpcl.augment import centre_view
from hpcl.config import Config
from hpcl.data import DeviceImages, ImageSet, load
from hpcl.downstream import clusters, fewshot, knn, linear
from hpcl.downstream.bench import Bench, flat_pixels
from hpcl.downstream.scores import Encoder
from hpcl.rng import seed_of

TASKS: tuple[Any, ...] = (knn, linear, fewshot, clusters)
ENCODERS: tuple[Encoder, ...] = ("trained", "untrained", "pixels")
ALL_PENALTIES = linear.PENALTIES


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return digits_with_novel()


@pytest.fixture(scope="module")
def bench(unbroken: Run, digits: ImageSet) -> Bench:
    return bench_of(unbroken, digits)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few episodes, few penalties in linear probes, and pixels of 14x14."""
    monkeypatch.setattr(fewshot, "EPISODES", 60)
    monkeypatch.setattr("hpcl.downstream.bench.PIXEL_SIDE", 14)
    monkeypatch.setattr(linear, "PENALTIES", (0.001, 0.1))
    monkeypatch.setattr(linear, "LOGISTIC_PENALTIES", (1.0, 0.1, 0.01))


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


@pytest.mark.parametrize("case", ["test", "val", "test without val", "test with a val of other classes"])
def test_only_val_images_choose_and_only_for_the_test_split(
    case: str, unbroken: Run, digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    val = {"test without val": digits.val[:0], "test with a val of other classes": digits.novel_val}.get(
        case, digits.val
    )
    split: Any = case.split()[0]
    bench = bench_of(unbroken, dataclasses.replace(digits, val=val), split)
    asked = []

    def probe(*arguments: Any) -> float:
        asked.append(arguments)
        return 0.5

    monkeypatch.setattr(linear, "linear_probe_accuracy", probe)
    monkeypatch.setattr(linear, "logistic_probe_accuracy", probe)
    linear.run(bench, ("untrained",), 2)
    assert len(asked) == 2
    for x, y, scored, truth, _, _, choosing in asked:
        assert torch.equal(x, bench.features("untrained", "train", 2)) and torch.equal(y, bench.labels("train"))
        assert torch.equal(scored, bench.features("untrained", split, 2)) and torch.equal(truth, bench.labels(split))
        assert (choosing is not None) == (case == "test")
        if choosing is not None:
            assert torch.equal(choosing.features, bench.features("untrained", "val", 2))
            assert torch.equal(choosing.labels, bench.labels("val"))


def test_large_images_are_averaged_where_pixels_are_the_features(unbroken: Run, digits: ImageSet) -> None:
    bench = bench_of(unbroken, digits)
    rows = bench.features("pixels", "val", 0)
    images = bench.device_images
    whole = centre_view(images.batch(bench.ids("val")), images.mean, images.std)
    assert rows.shape == (len(whole), 196)
    assert float(rows[5, 15]) == pytest.approx(float(whole[5, 0, 2:4, 2:4].mean()), rel=1e-5)
    assert bench.features("trained", "val", 0).shape[1] == 32
    assert torch.equal(flat_pixels(whole[..., :14, :10]), whole[..., :14, :10].flatten(1))  # no side is larger


def test_the_seed_of_the_probe_is_that_of_the_data(unbroken: Run, digits: ImageSet) -> None:
    bench = bench_of(unbroken, digits, "val")
    one, two = (linear.run(bench, ("trained", "pixels"), seed) for seed in (0, 1))
    assert [score.value for score in one] == [score.value for score in two]
    train, val = (linear.Rows(bench.features("trained", part, 0), bench.labels(part)) for part in ("train", "val"))
    want = linear.linear_probe_accuracy(*train, *val, 10, seed_of(bench.config.data.split_seed, "probe"))
    assert one[0].value == want
