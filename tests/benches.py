"""A run's checkpoint and real digits as a bench of downstream tasks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import TINY

from hpcl.checkpoint import load_checkpoint
from hpcl.config import Config
from hpcl.data import ImageSet, load
from hpcl.dist import World
from hpcl.downstream.bench import Bench, Split
from hpcl.downstream.scores import Encoder, Score
from hpcl.pretrained import load_network

Run = tuple[Path, list[dict[str, Any]]]

NOVEL = (7, 8, 9)
"""Digits that are novel classes in :func:`digits_with_novel`."""


def digits_with_novel() -> ImageSet:
    """Some 280 training digits below 7; the last three digits are novel in val and test."""
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
    """The network of a run's checkpoint on these images, on the CPU."""
    config, network, _ = load_network(run[0] / "checkpoint.pt")
    state = load_checkpoint(run[0] / "checkpoint.pt") if with_state else None
    return Bench(config, network, images, World(0, 1, torch.device("cpu")), split=split, state=state)


def by_setting(scores: list[Score], measure: str = "accuracy") -> dict[tuple[Encoder, str], Score]:
    """The scores of one measure by encoder and setting."""
    return {(score.encoder, score.setting): score for score in scores if score.measure == measure}
