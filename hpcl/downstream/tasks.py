"""The downstream tasks by name, and one of them as the objective of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from hpcl.config import Config
from hpcl.data import ImageSet
from hpcl.dist import World
from hpcl.downstream.bench import Bench
from hpcl.downstream.scores import VOC_TASKS, Encoder, Score
from hpcl.errors import UserError
from hpcl.model import build_network
from hpcl.rng import seed_of

if TYPE_CHECKING:
    from hpcl.downstream.voc.data import VocData


def _of(task: str, function: str) -> Callable[..., Any]:
    """`run` or `refusal` of a task's file, imported where it is asked for: some need scikit-learn or torchvision."""
    file = {"voc": "voc.classify", "detection": "voc.detect"}.get(task, task)
    found: Callable[..., Any] = getattr(import_module(f"hpcl.downstream.{file}"), function)
    return found


def refusal(task: str, bench: Bench, voc: VocData | None = None) -> str | None:
    """Why a task can't be measured on these images, and what to do about it; None where it can."""
    ask: Callable[..., str | None] = _of(task, "refusal")
    return ask(bench, voc) if task in VOC_TASKS else ask(bench)


def run(task: str, bench: Bench, encoders: Sequence[Encoder], seed: int, voc: VocData | None = None) -> list[Score]:
    """The scores of a task, those of `trained` first; see the task's own file for protocol and source."""
    measure: Callable[..., list[Score]] = _of(task, "run")
    found = measure(bench, encoders, seed, voc) if task in VOC_TASKS else measure(bench, encoders, seed)
    return [score for score in found if score.is_finite]


def objective(name: str, bench: Bench) -> float | None:
    """The first score of a task on validation images, for `search.objective` such as ``linear@val``.

    Args:
        name: one of :data:`hpcl.downstream.scores.OBJECTIVES`.
        bench: of the trained network, with split `val`. All trials of a search share the task's seed.

    Returns:
        None where features are not finite.

    Raises:
        UserError: the images do not serve this task.
        ValueError: the bench scores test images.
    """
    if bench.split != "val":
        raise ValueError(f"an objective is measured on val, never on {bench.split}")
    task = name.partition("@")[0]
    if reason := refusal(task, bench):
        raise UserError(_unfit(name, reason, bench.images))
    seed = seed_of(bench.config.data.split_seed, "probe")
    first = next((score.value for score in run(task, bench, ("trained",), seed)), math.nan)
    return first if math.isfinite(first) else None


def objective_problem(name: str, config: Config, images: ImageSet) -> str | None:
    """Why these images can't serve an objective, before anything is trained; None where they can."""
    channels, height, width = images.images.shape[1:]
    network = build_network(config.model, config.head, channels, config.seed, None, (height, width))
    bench = Bench(config, network, images, World(0, 1, torch.device("cpu")), split="val")
    reason = refusal(name.partition("@")[0], bench)
    return _unfit(name, reason, images) if reason else None


def _unfit(name: str, reason: str, images: ImageSet) -> str:
    return f"search.objective is {name}, but {images.source} {reason.removeprefix(f'{images.source}: ')}"
