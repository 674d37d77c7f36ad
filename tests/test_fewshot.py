"""Few-shot accuracy: the draw of episodes, both classifiers against scikit-learn and loops, and the task."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from benches import Run, bench_of, digits_with_novel
from conftest import TINY
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from hpcl.config import Config
from hpcl.data import ImageSet, load
from hpcl.downstream import fewshot
from hpcl.downstream.bench import Bench
from hpcl.downstream.fewshot import draw_episodes, episode_accuracies, inner_products


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return digits_with_novel()


@pytest.fixture(scope="module")
def bench(unbroken: Run, digits: ImageSet) -> Bench:
    return bench_of(unbroken, digits)


@pytest.fixture(autouse=True)
def few_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewshot, "EPISODES", 60)


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
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewshot, "LARGEST_TABLE", request.param)
    monkeypatch.setattr(fewshot, "FLOATS_AT_ONCE", 1000)  # a few episodes at a time
    monkeypatch.setattr(fewshot, "FITS_AT_ONCE", 4)


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
    drawn = draw_episodes(labels, 5, 5, 15, 100, 0)
    for classifier in fewshot.CLASSIFIERS:
        found = episode_accuracies(torch.nn.functional.normalize(noise, dim=1), drawn, classifier)
        assert float(found.mean()) == pytest.approx(0.2, abs=0.03)


def test_for_val_images_no_setting_is_named_that_gives_none(unbroken: Run) -> None:
    """`data.novel_classes` draws classes for the test alone."""
    images = load(Config.model_validate(TINY).data)
    told = {split: fewshot.refusal(bench_of(unbroken, images, split)) for split in ("val", "test")}
    assert "data.novel_classes" in (told["test"] or "") and "data.novel_classes" not in (told["val"] or "")
    assert "train on a source whose val split has other classes than its train split" in (told["val"] or "")
