"""Evaluation passes: the features of many images, without augmentation and without gradient.

Legend: n images, F backbone features, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from hpcl.augment import centre_view
from hpcl.data import DeviceImages
from hpcl.dist import World
from hpcl.model import Network, Spaces

_Chunk = Callable[[range], Tensor]

EVAL_BATCH = 500
"""Images per forward pass; part of the result's last bits, so the same for every run."""


class FeaturePass:
    """Runs networks in eval mode over images, shared among the ranks."""

    def __init__(self, images: DeviceImages, world: World, dtype: torch.dtype) -> None:
        self._images, self._world, self._dtype = images, world, dtype

    def of_images(self, network: Network, ids: np.ndarray, use_head: bool) -> Spaces:
        """Features of the centre views of the images with these ids, in their order, on every rank."""
        wanted = torch.from_numpy(np.asarray(ids))
        own = self._world.shard(len(wanted))

        def chunk(rows: range) -> Tensor:
            raw = self._images.batch(wanted[rows.start : rows.stop])
            if rows.stop < own.stop:
                self._images.prefetch(wanted[rows.stop : min(rows.stop + EVAL_BATCH, own.stop)])
            return centre_view(raw, self._images.mean, self._images.std).to(self._dtype)

        return self._run(network, len(wanted), use_head, chunk)

    def of_tensors(self, network: Network, inputs: Tensor, use_head: bool) -> Spaces:
        """Features of images (n, C, H, W) that are already normalised."""
        return self._run(network, len(inputs), use_head, lambda rows: inputs[rows.start : rows.stop])

    @torch.no_grad()
    def _run(self, network: Network, count: int, use_head: bool, chunk: _Chunk) -> Spaces:
        modes = [(module, module.training) for module in network.modules()]
        network.eval()
        own = self._world.shard(count)
        parts = [
            network.spaces(chunk(range(start, min(start + EVAL_BATCH, own.stop))), use_head)
            for start in range(own.start, max(own.stop, own.start + 1), EVAL_BATCH)  # at least one, if empty
        ]
        _restore(modes)
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        return Spaces(*(self._world.gather_shards(column, count) for column in columns))


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
