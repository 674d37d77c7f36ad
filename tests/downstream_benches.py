"""A bench with real digits and a small network, for the tests of downstream tasks."""

from __future__ import annotations

from typing import Any

import torch
from conftest import TINY

from hpcl.config import Config
from hpcl.data import ImageSet, load
from hpcl.dist import World
from hpcl.downstream.bench import Bench
from hpcl.model import build_network


def digits(split: str = "val", images: ImageSet | None = None, **changes: Any) -> Bench:
    """400 training images; `changes` are values at dotted paths, with __ for the dot."""
    config = Config.model_validate(TINY).with_values({name.replace("__", "."): v for name, v in changes.items()})
    images = images or load(config.data)
    channels, height, width = images.images.shape[1:]
    network = build_network(config.model, config.head, channels, 0, None, (height, width))
    return Bench(config, network.eval(), images, World(0, 1, torch.device("cpu")), split=split)  # type: ignore[arg-type]
