"""Task `voc`: linear SVMs on frozen features of images in VOC form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC
from test_voc_data import shared
from voc_folders import Box, digit_folder, digits, write_voc

from hpcl.config import Config
from hpcl.data import ImageSet
from hpcl.dist import current_world
from hpcl.downstream.bench import Bench
from hpcl.downstream.scores import Encoder
from hpcl.downstream.voc import classify as voc_classify
from hpcl.downstream.voc.average_precision import average_precision
from hpcl.downstream.voc.classify import Protocol, choose_cost, refusal, run
from hpcl.downstream.voc.data import VocData, read_voc
from hpcl.model import build_network

FEW = Protocol(costs=(1.0, 100.0), shots=(1, 4), draws=2)


def bench_of(config: Config, images: ImageSet, split: Literal["val", "test"] = "test") -> Bench:
    """A bench whose trained network has the weights of another seed than the untrained ones."""
    network = build_network(config.model, config.head, images.images.shape[1], seed=7)
    return Bench(config, network.eval(), images, current_world("cpu"), split=split)


def colour(images: ImageSet) -> ImageSet:
    pixels, mean, std = (np.repeat(a, 3, axis=1 if a.ndim > 1 else 0) for a in (images.images, images.mean, images.std))
    return dataclasses.replace(images, images=pixels, mean=mean, std=std)


@pytest.fixture(scope="module")
def canvases(tmp_path_factory: pytest.TempPathFactory) -> VocData:
    folder = digit_folder(tmp_path_factory.mktemp("voc"), {"train": 50, "val": 30, "test": 60}, size=(42, 84))
    return read_voc(folder)


def test_pixels_and_networks_of_gray_and_colour(tiny: Config, canvases: VocData) -> None:
    encoders: tuple[Encoder, ...] = ("trained", "untrained", "pixels", "sgan")
    for images in (digits(), colour(digits())):
        bench = bench_of(tiny, images)
        assert refusal(bench, canvases) is None
        scores = run(bench, encoders, 0, canvases, size=20, protocol=FEW)
        assert [(s.encoder, s.setting, s.measure) for s in scores] == [
            (encoder, setting, f"mAP ({form})")
            for encoder in encoders[:3]
            for setting in ("all labels", "1 positives a class", "4 positives a class")
            for form in ("11-point", "all-point")
        ]
        assert all(
            s.task == "voc" and s.count == 60 and (s.ci95 is None) == (s.setting == "all labels") for s in scores
        )
        chance = (canvases.presence[canvases.parts["test"]] == 1).mean()  # of any ranking, about
        assert all(s.value > chance + 0.1 for s in scores if s.setting == "all labels")
    assert scores[:6] == run(bench, ["trained"], 0, canvases, size=20, protocol=FEW)


def test_all_labels_equals_scikit_learns_grid_search(tiny: Config, canvases: VocData) -> None:
    bench = bench_of(tiny, digits())
    protocol = Protocol(costs=(1e-3, 0.1, 10.0, 1000.0), shots=())
    scores = run(bench, ["trained"], 0, canvases, size=42, protocol=protocol)

    def features(part: str) -> Any:
        images = np.stack([canvases.pixels(int(i), 1, 42) for i in canvases.parts[part]]) / 255
        x = (torch.from_numpy(images).float() - float(digits().mean[0])) / float(digits().std[0])
        with torch.no_grad():
            rows = bench.network("trained", 0).backbone(x).double().numpy()
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    aps = []
    for label in range(3):
        y, truth = (canvases.presence[canvases.parts[part], label] for part in ("trainval", "test"))
        svm = LinearSVC(
            class_weight={1: 2, -1: 1}, max_iter=10**6, tol=1e-8, random_state=0
        )  # the dual, as in the paper
        search = GridSearchCV(svm, {"C": protocol.costs}, cv=3, scoring="average_precision").fit(
            features("trainval"), y
        )
        aps.append(average_precision(search.decision_function(features("test")), truth == 1, "all-point"))
    assert scores[1].measure == "mAP (all-point)"
    assert scores[1].value == pytest.approx(np.mean(aps), abs=2e-3)


def test_costs_are_the_papers_and_the_smallest_of_equals_wins() -> None:
    protocol = Protocol()
    assert len(protocol.costs) == 26 and protocol.costs[0] == 1e-7 and protocol.costs[-1] == 100
    y = np.arange(12) % 3 == 0
    assert choose_cost(np.where(y, 1.0, -1.0)[:, None], y.astype(int), Protocol(costs=(0.1, 1.0, 10.0))) == 0.1
    one_positive = np.array([1, 0, 0, 0])
    assert choose_cost(np.eye(4), one_positive, protocol) == protocol.shot_cost  # cannot be cut in folds


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Features and labels of every SVM that decides."""
    seen: list[tuple[Any, Any]] = []
    decide: Callable[..., Any] = voc_classify._decide

    def spy(x: Any, y: Any, *rest: Any) -> Any:
        seen.append((x, y))
        return decide(x, y, *rest)

    monkeypatch.setattr(voc_classify, "_decide", spy)
    return seen


def test_draws_hold_k_positives_and_are_the_same_for_all(
    tiny: Config, canvases: VocData, fitted: list[tuple[Any, Any]]
) -> None:
    bench = bench_of(tiny, digits())
    protocol = Protocol(costs=(1.0,), shots=(1, 2), draws=2)
    run(bench, ["trained"], 0, canvases, protocol=protocol)
    first = [(x, y) for x, y in fitted if len(y) < 20]
    assert [(int(y.sum()), int((1 - y).sum())) for _, y in first] == [(1, 2)] * 6 + [(2, 4)] * 6
    for (one, _), (two, _) in zip(first[:6], first[6:], strict=True):
        assert (one[0] == two[0]).all() and (one[1] == two[2]).all()  # a larger k holds the smaller
    assert (first[0][0] != first[3][0]).any()  # another draw
    fitted.clear()
    bench.network("untrained", 0).load_state_dict(bench.network("trained", 0).state_dict())
    run(bench, ["untrained"], 0, canvases, protocol=protocol)
    assert all((a == b).all() for (a, _), (b, _) in zip(first, [f for f in fitted if len(f[1]) < 20], strict=True))


def test_difficult_images_neither_train_nor_count(tmp_path: Path, tiny: Config, fitted: list[tuple[Any, Any]]) -> None:
    rng = np.random.default_rng(0)

    def image(*objects: tuple[str, int]) -> tuple[Any, list[Box]]:
        boxes: list[Box] = [(name, (1, 1, 20, 20), {"difficult": hard}) for name, hard in objects]
        return rng.integers(0, 255, (28, 28), dtype=np.uint8), boxes

    parts = {part: [f"{part}{i}" for i in range(12)] for part in ("trainval", "test")}
    kinds = [image(("cat", 0)), image(), image(("cat", 1)), image(("dog", 0), ("dog", 1))]
    images = {name: kinds[i % 4] for part in parts.values() for i, name in enumerate(part)}
    data = read_voc(write_voc(tmp_path, images, parts))
    # cat comes before dog, and has difficult ones alone in 3 images of 12: never negatives
    bench = bench_of(tiny, digits())
    scores = run(bench, ["trained"], 0, data, protocol=Protocol(costs=(1.0,), shots=()))
    assert sorted((len(y), int(y.sum())) for _, y in fitted) == [(9, 3), (12, 3)]
    assert scores[0].setting == "all labels, 2 of 20 classes"
    assert scores[0].value == 1.0  # the same four images are trained on and scored


def test_with_split_val_no_test_image_is_decoded(
    tiny: Config, canvases: VocData, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: set[int] = set()
    pixels = VocData.pixels

    def spy(self: VocData, image_id: int, *rest: Any) -> Any:
        decoded.add(image_id)
        return pixels(self, image_id, *rest)

    monkeypatch.setattr(VocData, "pixels", spy)
    scores = run(bench_of(tiny, digits(), "val"), ["pixels"], 0, canvases, protocol=Protocol(costs=(1.0,), shots=()))
    assert scores[0].count == 30
    assert decoded == {int(i) for i in canvases.parts["trainval"]}


def test_features_that_are_not_finite_have_no_value(tiny: Config, canvases: VocData) -> None:
    bench = bench_of(tiny, digits())
    with torch.no_grad():
        next(bench.network("trained", 0).backbone.parameters()).fill_(math.nan)
    scores = run(bench, ["trained"], 0, canvases, protocol=FEW)
    assert len(scores) == 6 and not any(s.is_finite for s in scores)


def test_refusals(tmp_path: Path, tiny: Config, canvases: VocData) -> None:
    bench = bench_of(tiny, digits())
    assert refusal(bench, None) == "needs images with annotations: a folder in VOC2007 form (--voc PATH)"
    gray, cat = np.zeros((28, 28), np.uint8), [("cat", (1, 1, 9, 9), {})]
    no_test = read_voc(write_voc(tmp_path / "a", {"a": (gray, cat)}, {"trainval": ["a"]}))
    assert "no image in ImageSets/Main/test.txt, but trainval is trained on and test scored" in str(
        refusal(bench, no_test)
    )
    no_negative = read_voc(write_voc(tmp_path / "b", {n: (gray, cat) for n in "ab"}, {"trainval": "a", "test": "b"}))
    assert "has no class with an image that holds it and one that does not in trainval" in str(
        refusal(bench, no_negative)
    )


def test_real_photos(tiny: Config) -> None:
    data = read_voc(shared("indoor"))
    bench = bench_of(tiny, colour(digits()))
    scores = run(bench, ["trained"], 0, data, size=64, protocol=Protocol(costs=(0.1, 10.0), shots=(1,), draws=2))
    assert [s.setting for s in scores[::2]] == ["all labels, 7 of 20 classes", "1 positives a class, 7 of 20 classes"]
    assert all(s.count == 30 and 0.1 < s.value < 1 for s in scores)


def test_the_interval_of_a_few_draws_is_students() -> None:
    labels = voc_classify._Labels(
        *([np.zeros(0, dtype=np.int64)] * 2), *([np.zeros((0, 2), dtype=np.int8)] * 2), [0, 1]
    )
    aps = np.array([0.5, 0.6, 0.4, 0.55, 0.45])[:, None, None] * np.ones((5, 2, 2))
    for score in voc_classify._scores("trained", 0, "1 positives a class", aps, labels):
        assert score.ci95 == pytest.approx(2.776445 * np.std(aps[:, 0, 0], ddof=1) / 5**0.5)
