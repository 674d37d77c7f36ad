"""That a training step never waits for a GPU, shown without one: tensors without values, said to lie on one.

A step that waits each time cannot prepare the next one meanwhile. What waits is a value that Python asks for
(``.item()``, a mask that selects), which has no answer here, and a copy from the CPU that is not `non_blocking`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hpcl.config import Config
from hpcl.data import ImageSet
from hpcl.dist import World
from hpcl.model import KeyQueue, MomentumPair, build_network
from hpcl.prototypes import Level
from hpcl.stages import make_plan
from hpcl.step import Step

GPU = torch.device("cuda", 0)
BATCH, KEYS, IMAGES, SIDE = 8, 16, 64, 8


class Waits(TorchDispatchMode):
    """Keeps the shapes of what was copied from the CPU to the GPU with a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            target = torch.device(kwargs.get("device") or args[0].device)
            if target.type == "cuda" and args[0].device.type == "cpu":
                self.shapes.append(tuple(args[0].shape))
        return func(*args, **kwargs)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All tensors are without values; what needs a GPU's driver is left out: seeds, autocast, backward."""
    monkeypatch.setattr(Step, "_forward", lambda *arguments: nullcontext())
    monkeypatch.setattr(Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(torch, "equal", lambda one, other: True)  # of places on the CPU, whose values are known
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def waits(**changes: Any) -> list[tuple[int, ...]]:
    """What a step with prototypes waits for."""
    fixed = {"optimizer.batch": BATCH, "moco.queue": KEYS, "model.width": 4, "runtime.precision": "fp32"}
    config = Config().with_values(fixed | changes)
    with torch.device(GPU):
        network = build_network(config.model, config.head, 3, 0)
        with pytest.MonkeyPatch.context() as patch:  # parameters without values cannot be copied
            patch.setattr("copy.deepcopy", lambda net: build_network(config.model, config.head, 3, 0))
            pair = MomentumPair(network)
        queue = KeyQueue(KEYS, config.model.dim)
        held, mean, std = torch.zeros(IMAGES, 3, SIDE, SIDE, dtype=torch.uint8), torch.zeros(3), torch.ones(3)
        levels = [
            Level(torch.zeros(IMAGES, dtype=torch.long), torch.zeros(m, config.model.dim), torch.ones(m), torch.ones(m))
            for m in (5, 20)  # the top-K loss, and ProtoNCE
        ]
    batch = lambda ids: held.index_select(0, ids.to(GPU, non_blocking=True))  # noqa: E731 - as DeviceImages has it
    images: Any = SimpleNamespace(batch=batch, mean=mean, std=std, prefetches=False)
    ids, none = np.arange(IMAGES), np.array([], dtype=np.int64)
    one = np.ones(3, np.float32)
    data = ImageSet(np.zeros((IMAGES, 3, SIDE, SIDE), np.uint8), None, ids, none, none, (), "none", "", one, one)
    step = Step(config, pair, queue, data, images, World(0, 1, GPU))
    plan = make_plan(config)[2]
    optimizer = torch.optim.SGD(pair.set_stage(plan), lr=0.1)
    with Waits() as seen:
        out = step.take(pair.query, optimizer, torch.arange(BATCH), plan, levels, 1)
    assert out.device == GPU and out.shape == (5,)
    return seen.shapes


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(
    "changes",
    [{}, {"augment.blur": 0.5}, {"moco.symmetric": True}, {"model.bn_splits": 2}],
    ids=str,
)
def test_a_step_waits_for_nothing(changes: dict[str, Any]) -> None:
    assert waits(**changes) == []


@pytest.mark.usefixtures("nowhere")
def test_waits_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue, values = KeyQueue.enqueue, torch.arange(3)
    monkeypatch.setattr(KeyQueue, "enqueue", lambda queue, keys: (values.to(GPU), enqueue(queue, keys)))
    assert waits() == [(3,)]
    monkeypatch.setattr(KeyQueue, "enqueue", lambda queue, keys: keys.sum().item())
    with pytest.raises(DataDependentOutputException):
        waits()
