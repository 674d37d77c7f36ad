"""Task `detection`: a Faster R-CNN on the trained backbone, all of it trained on boxes, scored by AP50.

On a CPU the result is the same bit for bit from the same seed (one thread count, one torchvision). On a GPU it is
not: the gradient of RoIAlign is summed in whatever order its threads come.

Legend: C H W image; n boxes of one image; Y classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcl.data import Ids
from hpcl.downstream.bench import Bench
from hpcl.downstream.scores import Encoder, Score
from hpcl.downstream.voc.box_precision import MEASURES, Boxes, average_precisions, missing_library
from hpcl.downstream.voc.data import VocData, VocImage, used_parts
from hpcl.downstream.voc.detector import DEFAULT, Recipe, build_detector, can_detect, longest
from hpcl.rng import generator, seed_of

TASK = "detection"
MOMENTUM = 0.9


class Trained(NamedTuple):
    """A detector, and how its training went."""

    detector: nn.Module
    losses: list[float]
    """Sum of the four losses, one for each step; shorter than the recipe if the last is not finite."""

    @property
    def finite(self) -> bool:
        return all(math.isfinite(loss) for loss in self.losses)


def refusal(bench: Bench, voc: VocData | None) -> str | None:
    """Why the task cannot be run, and what it needs; None if it can."""
    if voc is None:
        return "needs images with boxes: a folder in VOC2007 form (--voc PATH)"
    problem = voc.missing(bench.split) or missing_library()
    if problem is None and not can_detect(bench.network("trained", 0)):
        problem = "needs a convnet or a torchvision ResNet, whose feature maps are known"
    train, scored = used_parts(bench.split)
    if problem is None and not any(len(voc.images[i].boxes) for i in voc.parts[train]):
        problem = f"{voc.root}: has no box in {train}"
    if problem is None and not any(not voc.images[i].difficult.all() for i in voc.parts[scored]):
        problem = f"{voc.root}: has no object in {scored} that is not difficult"
    return problem


def run(
    bench: Bench,
    encoders: Sequence[Encoder],
    seed: int,
    voc: VocData,
    *,
    recipe: Recipe = DEFAULT,
    on_step: Callable[[Encoder, int, float], None] | None = None,
) -> list[Score]:
    """AP50, mean over the classes with an object that counts, in the forms of :data:`.box_precision.MEASURES`.

    A value is NaN where training diverged. Encoders without a backbone (`pixels`, `sgan`) are passed over;
    detection from scratch is `untrained`.

    Args:
        bench: networks, and the mean and standard deviation of the images they were trained on.
        encoders: what is compared.
        seed: of untrained networks, heads, order, flips and samples of boxes: the same for all encoders.
        voc: images and boxes; :func:`refusal` must be None.
        recipe: how detectors are trained.
        on_step: called with encoder, step and loss.

    Raises:
        UserError: the library that scores is not installed.
    """
    train_ids, scored_ids = (voc.parts[part] for part in used_parts(bench.split))
    truth = [_truth(voc.images[i]) for i in scored_ids]
    setting = f"Faster R-CNN, {recipe.steps:,} steps of {recipe.batch} images at {recipe.size} px"
    objects = np.concatenate([voc.images[i].labels[~voc.images[i].difficult] for i in scored_ids])
    classes = len(np.unique(objects))
    if classes < len(voc.classes):
        setting += f", {classes} of {len(voc.classes)} classes"
    scores = []
    for encoder in encoders:
        if encoder in ("pixels", "sgan"):
            continue

        def told(step: int, loss: float, encoder: Encoder = encoder) -> None:
            if on_step is not None:
                on_step(encoder, step, loss)

        trained = train(bench, encoder, seed, voc, train_ids, recipe, told)
        values = np.full(len(MEASURES), math.nan)
        if trained.finite:
            found = detect(trained.detector, voc, scored_ids, recipe)
            values = np.nanmean(average_precisions(truth, found, len(voc.classes)), axis=0)
        scores += [
            Score(TASK, setting, measure, encoder, seed, float(value), len(objects))
            for measure, value in zip(MEASURES, values, strict=True)
        ]
    return scores


def train(
    bench: Bench,
    encoder: Encoder,
    seed: int,
    voc: VocData,
    ids: Ids,
    recipe: Recipe,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """A detector in eval mode, trained on these images with SGD; difficult objects too, as Detectron2 does.

    Images without box are left out. Half of the images of each step are flipped, on average.
    """
    images = bench.device_images
    network, device = bench.network(encoder, seed), images.device
    mean, std = images.mean.cpu(), images.std.cpu()
    detector = build_detector(network, bench.config.model, len(voc.classes), mean, std, recipe, seed).to(device)
    parameters = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, recipe.lr, momentum=MOMENTUM, weight_decay=recipe.weight_decay)
    losses: list[float] = []
    with_boxes = np.array([i for i in ids if len(voc.images[i].boxes)], dtype=np.int64)
    with _seeded(seed_of(seed, "detection-sample"), device), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for step, chosen in enumerate(_order(with_boxes, recipe, seed)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * _rate(step, recipe)
            flips = torch.rand(len(chosen), generator=generator(seed, "detection-flip", step)) < 0.5
            pictures = list(pool.map(lambda i: picture(voc, int(i), len(mean), recipe), chosen))
            inputs, targets = [], []
            for image_id, pixels, flip in zip(chosen, pictures, flips.tolist(), strict=True):
                x, target = _target(voc.images[image_id], pixels, flip)
                inputs.append(x.to(device))
                targets.append({name: value.to(device) for name, value in target.items()})
            loss = torch.stack(list(detector(inputs, targets).values())).sum()
            losses.append(float(loss.detach()))
            if on_step is not None:
                on_step(step, losses[-1])
            if not math.isfinite(losses[-1]):
                break
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
    return Trained(detector.eval(), losses)


@torch.no_grad()
def detect(detector: nn.Module, voc: VocData, ids: Ids, recipe: Recipe) -> list[Boxes]:
    """Found boxes of each image, in its own pixels: at most 100 with a score of at least 0.05 (torchvision's)."""
    device = next(detector.parameters()).device
    channels = len(detector.transform.image_mean)  # type: ignore[union-attr, arg-type]
    found = []
    for start in range(0, len(ids), recipe.batch):
        chosen = ids[start : start + recipe.batch]
        pictures = [picture(voc, int(i), channels, recipe) for i in chosen]
        results = detector([pixels.float().div_(255).to(device) for pixels in pictures])
        for image_id, pixels, result in zip(chosen, pictures, results, strict=True):
            boxes = result["boxes"].cpu().numpy() / _scale(voc.images[image_id], pixels)
            labels = result["labels"].cpu().numpy() - 1
            found.append(Boxes(boxes.astype(np.float32), labels, result["scores"].cpu().numpy()))
    return found


def picture(voc: VocData, image_id: int, channels: int, recipe: Recipe) -> Tensor:
    """uint8 (C, H, W): the shorter side at the recipe's size, unless the longer one would be too long; antialiased."""
    pixels = torch.from_numpy(voc.pixels(image_id, channels).copy())
    height, width = pixels.shape[1:]
    scale = min(recipe.size / min(height, width), longest(recipe) / max(height, width))
    shape = [max(1, round(height * scale)), max(1, round(width * scale))]
    return F.interpolate(pixels[None], shape, mode="bilinear", antialias=True)[0]


def _scale(image: VocImage, pixels: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """(4,) pixels of the picture per pixel of the image."""
    y, x = (picture / original for picture, original in zip(pixels.shape[1:], image.size, strict=True))
    return np.array([x, y, x, y], dtype=np.float32)


def _target(image: VocImage, pixels: Tensor, flip: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The picture in 0..1 and its boxes and labels (1..Y), perhaps mirrored."""
    boxes = torch.from_numpy(image.boxes * _scale(image, pixels))
    x = pixels.float().div_(255)
    if flip:
        x = x.flip(2)
        boxes = boxes[:, [2, 1, 0, 3]]
        boxes[:, [0, 2]] = pixels.shape[2] - boxes[:, [0, 2]]
    return x, {"boxes": boxes, "labels": torch.from_numpy(image.labels + 1)}


def _truth(image: VocImage) -> Boxes:
    return Boxes(image.boxes, image.labels, difficult=image.difficult)


def _order(ids: Ids, recipe: Recipe, seed: int) -> Iterator[Ids]:
    """The images of each step; each image once before any comes again."""
    queue = np.empty(0, dtype=np.int64)
    passes = 0
    for _ in range(recipe.steps):
        while len(queue) < recipe.batch:
            order = torch.randperm(len(ids), generator=generator(seed, "detection-order", passes)).numpy()
            queue, passes = np.concatenate([queue, ids[order]]), passes + 1
        yield queue[: recipe.batch]
        queue = queue[recipe.batch :]


def _rate(step: int, recipe: Recipe) -> float:
    """Part of the learning rate at a step: rises linearly, then falls by a cosine to 0."""
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torchvision draws boxes from the global generator of the device: seeded here, and put back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield
