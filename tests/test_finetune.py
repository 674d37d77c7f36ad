"""Training by few labels and distillation: closed forms, what stays as it was, and that it learns."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from downstream_benches import digits
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from hpcl.batchnorm import SplitBatchNorm2d
from hpcl.data import load
from hpcl.downstream import distill, finetune
from hpcl.downstream.distill import distillation_loss, smaller
from hpcl.downstream.recipes import DISTILL, FINE_TUNE, FROM_SCRATCH, Recipe, scaled
from hpcl.downstream.supervised import (
    Classifier,
    accuracy,
    augmented,
    endless,
    head_in_use,
    logits_of,
    rate,
    train_classifier,
    train_from_scratch,
)
from hpcl.model import Network

SHORT = replace(FINE_TUNE, steps=6, batch=32, least_epochs=0)


def kinds(classifier: Classifier) -> str:
    return " ".join(type(m).__name__ for m in classifier.head)


# ---------------------------------------------------------------- the classifier


@pytest.mark.parametrize(
    ("kind", "attach", "layers", "want", "width"),
    [
        ("v2", "stack", 1, "Linear Linear ReLU", 12),
        ("v2", "replace", 1, "Linear ReLU", 12),
        ("v2", "stack", 2, "Linear Linear ReLU Linear ReLU", 16),
        ("v1", "stack", 1, "Linear Linear Linear ReLU", 16),
        ("v1", "replace", 1, "Linear Linear ReLU", 16),
        ("linear", "stack", 1, "Linear Linear ReLU", 16),
        ("linear", "replace", 1, "Linear ReLU", 16),
        ("v2", "stack", 0, "", 32),
    ],
)
def test_what_is_kept_of_each_head(kind: str, attach: str, layers: int, want: str, width: int) -> None:
    bench = digits(head__kind=kind, head__attach=attach, head__hidden=12)
    network = bench.network("trained", 0)
    classifier = Classifier(network, 10, layers)
    assert (kinds(classifier), classifier.out.in_features) == (want, width)
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        classifier.eval().out.reset_parameters()
        features = network.backbone(x)
        if kind == "v2" and layers == 1:  # by hand: the first half of what `project` does
            assert isinstance(network.mlp, nn.Sequential)
            inner = network.fc(features) if attach == "stack" else features
            features = network.mlp[1](network.mlp[0](inner))
        elif kind == "v1":
            features = network.project(features)
        elif layers:
            features = network.project(features).relu()
        assert torch.allclose(classifier(x), classifier.out(features), atol=1e-6)


def test_a_head_that_was_never_trained_is_left_out() -> None:
    stages = {f"stages__stage{s}__epochs": 0 for s in (2, 3, 4, 5)}
    assert head_in_use(digits())
    assert not head_in_use(digits(**stages))
    classifier = Classifier(digits().network("trained", 0), 10, head_in_use=False)
    assert kinds(classifier) == "Linear ReLU"
    with pytest.raises(ValueError, match="head_layers is 3, but must be 0, 1 or 2"):
        Classifier(digits().network("trained", 0), 10, 3)


def test_a_frozen_network_is_copied_and_trained_whole() -> None:
    bench = digits()
    network = bench.network("trained", 0)
    network.frozen = ("backbone", "fc")
    network.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    classifier = train_classifier(bench, network, bench.labelled(0.1, 0), SHORT, 0)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    moved = {name for name, value in classifier.network.state_dict().items() if not torch.equal(before[name], value)}
    assert {name for name in before if name.startswith(("backbone", "fc", "mlp.0"))} <= moved
    assert not any(name.startswith("mlp.2") for name in moved)  # the head's second layer is not in use
    assert not any(module.training for module in classifier.modules())


def test_splits_of_batch_norm_are_undone_in_the_copy() -> None:
    bench = digits(model__bn_splits=8)
    classifier = train_classifier(
        bench, bench.network("trained", 0), bench.labelled(0.01, 0), replace(SHORT, batch=3), 0
    )
    splits = [m.splits for m in classifier.modules() if isinstance(m, SplitBatchNorm2d)]
    assert splits == [1, 1, 1]
    assert {m.splits for m in bench.network("trained", 0).modules() if isinstance(m, SplitBatchNorm2d)} == {8}


# ---------------------------------------------------------------- recipe, order, views


def test_steps_follow_the_images_within_bounds() -> None:
    recipe = Recipe(100, 50, 0.1, 0.1, 0.0, least_epochs=4, most_epochs=200)
    assert [recipe.steps_for(n) for n in (1, 10, 40, 1000, 40_000)] == [4, 40, 100, 100, 3200]
    assert scaled(recipe, 3).steps_for(1000) == 300
    assert scaled(recipe, 3).steps_for(40_000) == 9600
    assert Recipe(0, 50, 0.1, 0.1, 0.0).steps_for(0) == 1


@given(st.integers(1, 30), st.integers(1, 70))
def test_batches_are_full_and_use_each_image_equally(count: int, batch: int) -> None:
    ids = np.arange(100, 100 + count)
    batches = list(itertools.islice(endless(ids, batch, 1), 5))
    assert {len(b) for b in batches} == {batch}
    times = torch.bincount(torch.cat(batches) - 100, minlength=count)
    assert times.max() - times.min() <= 1


def test_learning_rate_rises_and_falls() -> None:
    rates = [rate(step, 100, 0.1) for step in range(100)]
    assert rates[:11] == pytest.approx([(i + 1) / 11 for i in range(10)] + [1.0])
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5)
    assert rate(0, 1, 0.1) == 1.0


def test_views_are_crops_without_flips_or_colours_where_the_run_says_so() -> None:
    bench = digits(augment__crop_scale=(1.0, 1.0), augment__crop_ratio=(1.0, 1.0))
    places = torch.from_numpy(bench.images.train[:5])
    rows = bench.device_images
    plain = (rows.batch(places).float() / 255 - rows.mean[:, None, None]) / rows.std[:, None, None]
    assert torch.allclose(augmented(bench, places, 3), plain, atol=1e-5)
    mirrored = digits(augment__crop_scale=(1.0, 1.0), augment__crop_ratio=(1.0, 1.0), augment__flip=1.0)
    assert torch.allclose(augmented(mirrored, places, 3), plain.flip(3), atol=1e-5)


# ---------------------------------------------------------------- the task finetune


def test_scores_in_order_and_each_learns_digits() -> None:
    bench = digits(data__subset=1.0)
    short = replace(FINE_TUNE, steps=50, batch=32, least_epochs=0, head_layers=0)
    scores = finetune.run(bench, ("untrained", "trained", "supervised", "pixels", "sgan"), 0, short, short)
    assert [(s.encoder, s.setting) for s in scores] == [
        (e, f"{p} %") for e in ("supervised", "trained", "pixels") for p in (1, 10)
    ]
    assert {(s.task, s.measure, s.count, s.seed) for s in scores} == {("finetune", "accuracy", 450, 0)}
    assert all(s.value > 0.2 for s in scores)  # chance is 0.1
    assert scores[-1].value > scores[-2].value + 0.1  # ten times the labels
    assert next(s for s in scores if s.encoder == "trained").setting == "1 %"


def test_the_same_by_seed_and_trained_once_per_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = digits(), digits()
    one = finetune.teacher(first, "supervised", 0.1, 0, SHORT, SHORT)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    two = finetune.teacher(second, "supervised", 0.1, 0, SHORT, SHORT)
    assert (torch.get_rng_state() == state).all()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    other = finetune.teacher(second, "supervised", 0.1, 1, SHORT, SHORT)
    assert not torch.equal(other.out.weight, two.out.weight)
    monkeypatch.setattr(finetune, "train_from_scratch", None)
    assert finetune.teacher(first, "supervised", 0.1, 0, SHORT, SHORT) is one


def test_only_training_images_are_learnt_from_and_only_val_is_scored() -> None:
    images = load(digits().config.data)
    poisoned = images.images.copy()
    poisoned[images.test] = 255 - poisoned[images.test][::-1]
    labels = images.labels.copy()  # type: ignore[union-attr]
    labels[images.test] = 9
    other = digits(images=replace(images, images=poisoned, labels=labels))
    clean = digits(images=images)
    short = replace(SHORT, steps=3)
    for task in (finetune, distill):
        rest = [short] * (2 if task is finetune else 3)
        a, b = (task.run(bench, ("trained", "pixels"), 0, *rest) for bench in (clean, other))  # type: ignore[attr-defined]
        assert a == b
    # and the check can fail: scored on test, the labels do matter
    assert finetune.run(digits("test", other.images), ("pixels",), 0) != finetune.run(digits("test"), ("pixels",), 0)


def test_training_on_all_labels_serves_the_bench() -> None:
    bench = digits()
    short = replace(FROM_SCRATCH, steps=1, least_epochs=0)
    classifier = train_from_scratch(bench, bench.images.train, 0, short)
    assert isinstance(classifier.network, Network)
    assert logits_of(bench, classifier, bench.images.val[:0]).shape == (0, 10)
    assert 0 <= accuracy(bench, classifier) <= 1


def test_pixels_in_few_numbers_are_the_same_classifier() -> None:
    bench = digits()
    ids = bench.labelled(0.1, 0)
    rows, queries = (bench.features_of("pixels", i, 0).double().numpy() for i in (ids, bench.images.val))
    assert bench.images.labels is not None
    direct = LogisticRegression(C=finetune.PIXEL_INVERSE_PENALTY, max_iter=1000, tol=1e-8)
    want = direct.fit(rows, bench.images.labels[ids]).decision_function(queries)
    few, turned = finetune.in_few_numbers(rows, queries)
    assert few.shape == (40, 40)
    got = direct.fit(few, bench.images.labels[ids]).decision_function(turned)
    assert np.abs(want - got).max() < 1e-3
    assert finetune.pixel_accuracy(bench, 0.1, 0) == pytest.approx(
        float((want.argmax(1) == bench.images.labels[bench.images.val]).mean()), abs=0.005
    )
    assert finetune.in_few_numbers(rows[:, :30], queries[:, :30])[0].shape == (40, 30)


def test_what_cannot_be_measured_is_said() -> None:
    images = load(digits().config.data)
    assert images.labels is not None
    assert finetune.refusal(digits()) is None
    assert distill.refusal(digits()) is None
    cases = {
        "has no labels, which training by few labels needs": replace(images, labels=None),
        "has no val images, which training by few labels is scored on": replace(images, val=images.val[:0]),
        "1 class has training images, but training by few labels needs 2": replace(
            images, labels=np.zeros_like(images.labels)
        ),
        "no class of its val images has training images": replace(
            images, labels=np.where(np.isin(np.arange(5000), images.val), 9, images.labels % 9)
        ),
    }
    for words, strange in cases.items():
        assert words in str(finetune.refusal(digits(images=strange)))


# ---------------------------------------------------------------- distillation


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_distillation_equals_the_sum_over_classes_and_its_gradient(tau: float) -> None:
    student, teacher = drawn(4, 3).requires_grad_(), drawn(4, 3, seed=1).requires_grad_()
    loss = distillation_loss(student, teacher, tau)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p_t, p_s = ([math.exp(v / tau) / sum(math.exp(u / tau) for u in row) for v in row] for row in (t, s))
        total -= sum(a * math.log(b) for a, b in zip(p_t, p_s, strict=True))
    assert loss.item() == pytest.approx(total / 4)
    loss.backward()  # type: ignore[no-untyped-call]
    want = ((student / tau).softmax(1) - (teacher / tau).softmax(1)) / (4 * tau)
    assert torch.allclose(student.grad, want.detach())  # type: ignore[arg-type]
    assert teacher.grad is None


def test_distillation_from_a_sure_teacher_is_cross_entropy_and_from_oneself_entropy() -> None:
    student, labels = drawn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    sure = 1e4 * nn.functional.one_hot(labels, 5).double()
    assert distillation_loss(student, sure, 1.0).item() == pytest.approx(
        nn.functional.cross_entropy(student, labels).item()
    )
    p = (student / 2).softmax(1)
    assert distillation_loss(student, student, 2.0).item() == pytest.approx(float(-(p * p.log()).sum(1).mean()))
    # temperature scales both logits, and nothing else
    assert distillation_loss(3 * student, 3 * sure, 3.0).item() == distillation_loss(student, sure, 1.0).item()
    assert distillation_loss(student.bfloat16(), sure.bfloat16(), 1.0).dtype == torch.float32


def test_smaller_students() -> None:
    model = digits().config.model
    assert smaller(model)[0] == "convnet, width 4"
    for name, want in {
        "resnet18": "convnet, width 32",
        "resnet34": "convnet, width 32",
        "resnet50": "resnet18",
        "wide_resnet101_2": "resnet18",
        "resnext50_32x4d": "resnet18",
    }.items():
        assert smaller(model.model_copy(update={"backbone": name}))[0] == want


def test_students_learn_from_the_teacher_alone() -> None:
    bench = digits(data__subset=0.5)
    images = bench.images
    assert images.labels is not None
    short = replace(FINE_TUNE, steps=120, batch=32, least_epochs=0, head_layers=0)
    learner = replace(DISTILL, steps=100, batch=64, least_epochs=0, head_layers=0)
    scores = distill.run(bench, ("trained", "pixels"), 0, learner, short, short)
    assert [(s.encoder, s.setting) for s in scores] == [
        ("trained", "self, 10 %"),
        ("trained", "smaller (convnet, width 4), 10 %"),
    ]
    assert all(s.value > 0.25 for s in scores)  # chance is 0.1
    teacher = finetune.teacher(bench, "trained", 0.1, 0, short, short)
    few = replace(learner, steps=3)
    first = distill.distil(bench, teacher, bench.network("trained", 0), few, 0)
    forgotten = digits(images=replace(images, labels=np.zeros_like(images.labels)), data__subset=0.5)
    again = distill.distil(forgotten, teacher, bench.network("trained", 0), few, 0)
    assert torch.equal(first.out.weight, again.out.weight)
