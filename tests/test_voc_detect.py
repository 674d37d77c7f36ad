"""Task `detection`: a Faster R-CNN on backbones of all kinds, trained on real digits with boxes."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_voc_classify import bench_of, colour
from voc_folders import digit_folder, digits, write_voc

from hpcl.config import Config
from hpcl.downstream.bench import Bench
from hpcl.downstream.voc import detect as voc_detect
from hpcl.downstream.voc.box_precision import overlaps
from hpcl.downstream.voc.data import VocData, read_voc
from hpcl.downstream.voc.detect import detect, refusal, run, train
from hpcl.downstream.voc.detector import PAPER, Recipe, build_detector, longest
from hpcl.model import build_network
from hpcl.sections import Model

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed (pip install 'hpcl[voc]')")

QUICK = Recipe(steps=14, lr=0.05, size=48, hidden=32, proposals=100, samples=32)


@pytest.fixture(scope="module")
def canvases(tmp_path_factory: pytest.TempPathFactory) -> VocData:
    counts = {"train": 40, "val": 4, "test": 12}
    return read_voc(digit_folder(tmp_path_factory.mktemp("voc"), counts, classes=(0, 1), size=(48, 72)))


@pytest.fixture
def bench(tiny: Config) -> Bench:
    return bench_of(tiny.model_copy(update={"model": Model(width=16, dim=16)}), digits())


def test_the_loss_falls(bench: Bench, canvases: VocData) -> None:
    steps: list[tuple[str, int, float]] = []
    before = {name: value.clone() for name, value in bench.network("trained", 0).state_dict().items()}
    first = run(
        bench, ["trained", "pixels", "sgan"], 0, canvases, recipe=QUICK, on_step=lambda *told: steps.append(told)
    )
    losses = [loss for _, _, loss in steps]
    assert [step for _, step, _ in steps] == list(range(14)) and {name for name, *_ in steps} == {"trained"}
    assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])
    setting = "Faster R-CNN, 14 steps of 4 images at 48 px"
    objects = sum(len(canvases.images[i].labels) for i in canvases.parts["test"])
    assert [(s.task, s.setting, s.measure, s.encoder, s.count) for s in first] == [
        ("detection", setting, measure, "trained", objects) for measure in ("AP50 (101-point)", "AP50 (11-point)")
    ]
    assert all(0 <= s.value <= 1 for s in first)
    assert all((value == before[name]).all() for name, value in bench.network("trained", 0).state_dict().items())


def test_all_is_the_same_again(bench: Bench, canvases: VocData) -> None:
    recipe = dataclasses.replace(QUICK, steps=3)

    def weights() -> torch.Tensor:
        trained = train(bench, "untrained", 0, canvases, canvases.parts["train"], recipe)
        return torch.cat([p.detach().flatten() for p in trained.detector.parameters()])

    first = weights()
    torch.rand(3)  # whatever the global generator's state is
    state = torch.get_rng_state()
    assert (weights() == first).all() and (torch.get_rng_state() == state).all()


@pytest.mark.slow
def test_digits_are_found(bench: Bench, canvases: VocData) -> None:
    recipe = Recipe(steps=400, lr=0.05, size=48, hidden=64)
    scores = run(bench, ["trained", "untrained"], 0, canvases, recipe=recipe)
    assert all(s.value > 0.5 for s in scores), scores


@pytest.mark.parametrize(
    ("model", "channels", "strides"),
    [
        (Model(backbone="resnet18", stem="imagenet"), 3, (4, 8, 16, 32, 64)),
        (Model(backbone="resnet18", stem="cifar", bn_splits=2), 1, (2, 4, 8, 16)),
        (Model(width=8), 1, (8,)),
    ],
)
def test_backbones(model: Model, channels: int, strides: tuple[int, ...], tiny: Config) -> None:
    network = build_network(model, tiny.head, channels, 0)
    mean, std = torch.full((channels,), 0.3), torch.full((channels,), 0.2)
    recipe = Recipe(size=64, channels=16, hidden=16, proposals=20, samples=8)
    detector: Any = build_detector(network, model, 2, mean, std, recipe, 0)
    assert detector.transform.image_mean == pytest.approx([0.3] * channels)
    own = network.backbone.state_dict()
    prefix = "backbone.layers." if model.backbone == "convnet" else "backbone.body."
    copied = {name: value for name, value in detector.state_dict().items() if name.startswith(prefix)}
    skip = len(prefix) if model.backbone != "convnet" else len("backbone.")
    assert copied and all((value == own[name[skip:]]).all() for name, value in copied.items())
    maps = detector.backbone(torch.zeros(2, channels, 64, 64))
    maps = list(maps.values()) if isinstance(maps, dict) else [maps]
    assert tuple(64 // m.shape[-1] for m in maps) == strides
    anchors = detector.rpn.anchor_generator.sizes
    assert min(anchors)[0] == pytest.approx(0.04 * 64) and max(anchors)[-1] == pytest.approx(0.64 * 64)
    # boxes of 40 x 40 on 64 x 64 with three images, which model.bn_splits would refuse
    target = {"boxes": torch.tensor([[4.0, 4.0, 44.0, 44.0]]), "labels": torch.tensor([2])}
    losses = detector([torch.rand(channels, 64, 64)] * 3, [target] * 3)
    torch.stack(list(losses.values())).sum().backward()
    trained = [p for name, p in detector.named_parameters() if name.startswith(prefix)]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_frozen_batch_norm_keeps_its_statistics(bench: Bench, canvases: VocData) -> None:
    network = bench.network("trained", 0)
    with torch.no_grad():
        for name, value in network.backbone.named_buffers():
            value.copy_(torch.tensor(2.0)) if name.endswith("running_var") else None
    recipe = Recipe(steps=2, size=48, hidden=16, proposals=20, samples=8, freeze_batch_norm=True)
    result = train(bench, "trained", 0, canvases, canvases.parts["train"], recipe)
    state = result.detector.state_dict()
    variances = [value for name, value in state.items() if name.endswith("running_var")]
    assert len(variances) == 3 and all((value == 2).all() for value in variances)
    weights = [name for name, _ in result.detector.named_parameters() if name.startswith("backbone")]
    assert len(weights) == 3  # the convolutions alone train


def test_boxes_follow_the_picture(bench: Bench, canvases: VocData) -> None:
    image_id = int(canvases.parts["test"][0])
    image = canvases.images[image_id]
    recipe = Recipe(size=96)
    pixels = voc_detect.picture(canvases, image_id, 3, recipe)
    assert pixels.shape == (3, 96, 144)
    for flip in (False, True):
        x, target = voc_detect._target(image, pixels, flip)
        for left, top, right, bottom in target["boxes"].round().int().tolist():
            digit = x[:, top:bottom, left:right]
            # bright within, and on every side of the box at its border
            assert digit.max() > 0.8
            assert all(edge.max() > 0.25 for edge in (digit[:, :4], digit[:, -4:], digit[..., :4], digit[..., -4:]))
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all() and (target["labels"] > 0).all()
    assert image.boxes.max() <= 72  # not changed by flipping


def test_a_long_image_is_bounded_and_found_boxes_are_in_its_pixels(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = np.zeros((40, 200), np.uint8)
    data = read_voc(write_voc(tmp_path, {"a": (wide, [("x", (11, 11, 20, 20), {})])}, {"test": ["a"]}))
    recipe = Recipe(size=48, hidden=16)
    assert tuple(voc_detect.picture(data, 0, 1, recipe).shape) == (1, 16, longest(recipe)) == (1, 16, 79)

    class Fixed(torch.nn.Module):
        """Finds the whole picture."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.transform = type("T", (), {"image_mean": [0.5]})

        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            sizes = [torch.tensor([[0.0, 0.0, *image.shape[:0:-1]]]) for image in images]
            return [{"boxes": s, "labels": torch.tensor([1]), "scores": torch.tensor([0.7])} for s in sizes]

    (found,) = detect(Fixed(), data, data.parts["test"], recipe)
    np.testing.assert_allclose(found.boxes, [[0, 0, 200, 40]], rtol=1e-6)
    assert found.labels.tolist() == [0]
    assert overlaps(found.boxes, np.array([[0, 0, 200, 40]], np.float32)) == pytest.approx(1)
    # the detector's own resizing changes nothing
    model: Any = build_detector(
        bench.network("trained", 0), bench.config.model, 1, *[torch.zeros(1) + 0.5] * 2, recipe, 0
    )
    images, _ = model.eval().transform([voc_detect.picture(data, 0, 1, recipe).float()])
    assert images.image_sizes == [(16, 79)]


def test_what_diverges_has_no_value(bench: Bench, canvases: VocData) -> None:
    with torch.no_grad():
        next(bench.network("trained", 0).backbone.parameters()).fill_(math.nan)
    scores = run(bench, ["trained"], 0, canvases, recipe=QUICK)
    assert len(scores) == 2 and not any(s.is_finite for s in scores)


def test_colour_networks_and_the_split_of_a_search(tiny: Config, canvases: VocData) -> None:
    recipe = Recipe(steps=2, size=32, hidden=16, proposals=20, samples=8)
    (score, _) = run(bench_of(tiny, colour(digits()), "val"), ["untrained"], 3, canvases, recipe=recipe)
    assert score.count == sum(len(canvases.images[i].labels) for i in canvases.parts["val"])


def test_refusals(tmp_path: Path, bench: Bench, canvases: VocData, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(bench, canvases) is None
    assert refusal(bench, None) == "needs images with boxes: a folder in VOC2007 form (--voc PATH)"
    empty, box = np.zeros((9, 9), np.uint8), [("cat", (1, 1, 9, 9), {"difficult": 1})]
    parts = {"trainval": ["a"], "test": ["b"]}
    no_box = read_voc(write_voc(tmp_path / "a", {"a": (empty, []), "b": (empty, box)}, parts))
    assert "has no box in trainval" in str(refusal(bench, no_box))
    hard = read_voc(write_voc(tmp_path / "b", {"a": (empty, box), "b": (empty, box)}, parts))
    assert "has no object in test that is not difficult" in str(refusal(bench, hard))
    own = bench_of(bench.config, digits())
    own.network("trained", 0).backbone = torch.nn.Flatten()
    assert "needs a convnet or a torchvision ResNet" in str(refusal(own, canvases))
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert "pip install 'hpcl[voc]'" in str(refusal(bench, canvases))


def test_the_papers_recipe_is_mocos() -> None:
    assert (PAPER.steps, PAPER.batch, PAPER.lr, PAPER.size, longest(PAPER)) == (24_000, 16, 0.02, 800, 1333)
