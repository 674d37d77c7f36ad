"""What a run measures after each epoch, beside its own losses (METHOD 5).

The fixed-view meters are the same function for every trial: same images, same
views, same reference count, own random streams. kNN and the objective need labels.

Legend: N training images, Nr reference images, V fixed views, C H W image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcl import metrics
from hpcl.augment import apply_views, draw_views
from hpcl.config import Config
from hpcl.data import DeviceImages, ImageSet
from hpcl.dist import World
from hpcl.downstream.knn import knn_accuracy
from hpcl.downstream.linear import linear_probe_accuracy
from hpcl.features import FeaturePass
from hpcl.model import MomentumPair, Network, Spaces
from hpcl.prototypes import Level
from hpcl.rng import generator, seed_of
from hpcl.stages import StagePlan

Row = dict[str, Any]


class RunMeters:
    """Fixed views, kNN and objective of one run; keeps the reference level's warm start."""

    def __init__(
        self,
        config: Config,
        data: ImageSet,
        images: DeviceImages,
        passes: FeaturePass,
        world: World,
        dtype: torch.dtype,
    ) -> None:
        # Everything here is seeded by the data split, not by the run: trials of another
        # seed are measured on the same images and views.
        seed = config.data.split_seed
        chosen = metrics.meter_images(config.meters, len(data.train), seed)
        self._config, self._data, self._passes, self._device = config, data, passes, world.device
        self.positions = torch.from_numpy(chosen.reference)
        """(Nr,) positions among the training images that the reference level is clustered on."""
        self._view_rows = torch.from_numpy(chosen.views).to(world.device)
        self._count = metrics.reference_count(config.meters, len(data.train))
        self._labels: Tensor | None = None
        ids = torch.from_numpy(data.train[chosen.reference][chosen.views])
        raw = images.batch(ids)
        channels, height, width = data.images.shape[1:]
        self._views = [
            apply_views(
                raw,
                draw_views(
                    config.meters.augment, len(ids), height, width, channels, generator(seed, "fixed-views", which)
                ).to(world.device),
                images.mean,
                images.std,
            ).to(dtype)
            for which in (0, 1)
        ]

    def measure(self, pair: MomentumPair, plan: StagePlan, epoch: int, reference: Spaces, levels: list[Level]) -> Row:
        """Columns of one epoch that need no labels.

        Args:
            reference: key-side features of the images at :attr:`positions`.
            levels: the trial's own levels; empty before prototypes.

        Returns:
            Nothing, or None for every fixed-view meter, where features are not finite.
        """
        if not bool(reference.embedding.isfinite().all()):
            return {}
        level = metrics.reference_level(
            reference.embedding.float(),
            self._count,
            seed_of(self._config.data.split_seed, "reference", epoch),
            self._labels,
            self._config.clusters.backend,
        )
        self._labels = level.cluster_of_image
        query = self._passes.of_tensors(pair.query, self._views[0], plan.uses_head).embedding
        key = self._passes.of_tensors(pair.key, self._views[1], plan.uses_head).embedding
        own = level.cluster_of_image[self._view_rows]
        row: Row = dict(metrics.fixed_view_meters(query, key, own, level.prototypes.to(query.dtype), level.sizes))
        row["feature_std"] = metrics.feature_std(reference.embedding)
        row["effective_rank"] = metrics.effective_rank(reference.embedding)
        row["proto_bits_own"] = None
        if levels:
            finest = levels[-1]
            rows = self.positions.to(finest.cluster_of_image.device)[self._view_rows]
            row["proto_bits_own"] = metrics.proto_bits(
                query, finest.cluster_of_image[rows], finest.prototypes, finest.sizes, self._config.moco.temperature
            )
        return row

    def knn(self, query: Network) -> float | None:
        """kNN accuracy on the validation split; the bank is the reference images; None without labels."""
        data, options = self._data, self._config.meters
        if not self._can_classify:
            return None
        bank_ids = data.train[self.positions.numpy()]
        bank, val = (self._passes.of_images(query, ids, use_head=False).backbone for ids in (bank_ids, data.val))
        return knn_accuracy(
            bank,
            self._labels_of(bank_ids),
            val,
            self._labels_of(data.val),
            min(options.knn_k, len(bank)),
            options.knn_temperature,
            len(data.classes),
        )

    def linear_probe(self, query: Network) -> float | None:
        """Linear probe on backbone features, scored on the validation split, never on test; None without labels."""
        data = self._data
        if not self._can_classify:
            return None
        train, val = (self._passes.of_images(query, ids, use_head=False).backbone for ids in (data.train, data.val))
        seed = seed_of(self._config.data.split_seed, "probe")
        return linear_probe_accuracy(
            train, self._labels_of(data.train), val, self._labels_of(data.val), len(data.classes), seed
        )

    @property
    def _can_classify(self) -> bool:
        """Whether validation images have labels, of classes that training images have too."""
        data = self._data
        return data.labels is not None and bool(np.isin(data.labels[data.val], data.labels[data.train]).any())

    def _labels_of(self, ids: Any) -> Tensor:
        assert self._data.labels is not None
        return torch.from_numpy(self._data.labels[ids]).to(self._device)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the reference level's assignment."""
        return {"labels": None if self._labels is None else self._labels.to("cpu", torch.int32)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        labels = state["labels"]
        self._labels = None if labels is None else labels.to(self._device, torch.long)
