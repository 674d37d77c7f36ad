"""What all downstream tasks share: the images, the encoders that are compared, and their features, computed once.

Legend: N images; n images of a part; F features; D embedding; Y classes.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcl.augment import centre_view
from hpcl.config import Config
from hpcl.data import DeviceImages, Ids, ImageSet
from hpcl.dist import World
from hpcl.downstream.labels import label_list
from hpcl.downstream.scores import Encoder
from hpcl.features import EVAL_BATCH, FeaturePass
from hpcl.model import Network, build_network
from hpcl.rng import seed_of

Part = Literal["train", "val", "test", "novel"]
"""Images of a kind; `novel` are those of classes that never occur in training."""

Split = Literal["val", "test"]

PIXEL_SIDE = 32
"""Side to which larger images are averaged where pixels are the features: 60,000 of 3 x 84 x 84 would take 5 GB."""


class Bench:
    """One trained network, its images, and what it is compared with."""

    def __init__(
        self,
        config: Config,
        network: Network,
        images: ImageSet,
        world: World,
        *,
        split: Split = "test",
        state: dict[str, Any] | None = None,
        device_images: DeviceImages | None = None,
        label_folder: Path | None = None,
    ) -> None:
        """
        Args:
            config: of the run; says how the network is built and images are augmented.
            network: the query network; left in the mode it is in.
            images: labelled images of the shape the network takes.
            world: device, and ranks that share feature passes.
            split: the part that is scored. With `val` nothing ever looks at test images.
            state: the checkpoint's content, for tasks about its prototypes.
            device_images: `images` on the device, where a caller holds them there already.
            label_folder: where lists of labelled images are kept and read; None: they are drawn only.
        """
        self.config, self.images, self.world, self.split, self.state = config, images, world, split, state
        self.device_images = device_images or DeviceImages(images, world.device)
        self.label_folder = label_folder
        self.kept: dict[Hashable, Any] = {}
        """What tasks made for this bench and share, such as a fine-tuned network; keys begin with the maker's name."""
        self._trained = network
        self._networks: dict[tuple[Encoder, int], Network] = {}
        self._features: dict[tuple[Encoder, int, Part], Tensor] = {}

    @property
    def num_classes(self) -> int:
        """Y, the classes of the source; some may have no image in a part."""
        return len(self.images.classes)

    def ids(self, part: Part) -> Ids:
        """Sorted places of a part's images; `novel` follows the scored split."""
        if part == "novel":
            found: Ids = self.images.novel_val if self.split == "val" else self.images.novel_test
        else:
            found = getattr(self.images, part)
        return found

    def labelled(self, fraction: float, seed: int) -> Ids:
        """Sorted places of the training images that count as labelled (:mod:`hpcl.downstream.labels`).

        Raises:
            UserError: there is a list for this fraction and seed in the folder, but not for these images.
        """
        key = ("labels", fraction, seed)
        if key not in self.kept:
            self.kept[key] = label_list(self.images, fraction, seed, self.label_folder)
        ids: Ids = self.kept[key]
        return ids

    def labels(self, part: Part) -> Tensor:
        """(n,) long on the device, 0..Y-1."""
        assert self.images.labels is not None
        return torch.from_numpy(self.images.labels[self.ids(part)]).to(self.world.device)

    def network(self, encoder: Encoder, seed: int) -> Network:
        """The network of `trained`, `untrained` (starts from `seed`) or `supervised` (on all training labels).

        Raises:
            ValueError: another encoder, which has none.
        """
        if encoder == "trained":
            return self._trained
        if (encoder, seed) not in self._networks:
            self._networks[encoder, seed] = self._make(encoder, seed)
        return self._networks[encoder, seed]

    def features(self, encoder: Encoder, part: Part, seed: int) -> Tensor:
        """(n, F) float32 on the device: backbone features in eval mode of a part's centre views.

        For `pixels` the normalised images themselves, F = C H W (:func:`flat_pixels`).
        """
        key = (encoder, 0 if encoder in ("trained", "pixels") else seed, part)
        if key not in self._features:
            self._features[key] = self.features_of(encoder, self.ids(part), seed)
        return self._features[key]

    def features_of(self, encoder: Encoder, ids: Ids, seed: int) -> Tensor:
        """As :meth:`features`, of any images; not kept."""
        if encoder == "pixels":
            rows = self.device_images
            parts = [
                flat_pixels(centre_view(rows.batch(ids[start : start + EVAL_BATCH]), rows.mean, rows.std))
                for start in range(0, max(1, len(ids)), EVAL_BATCH)
            ]
            return torch.cat(parts)
        network = self.network(encoder, seed)
        passes = FeaturePass(self.device_images, self.world, next(network.parameters()).dtype)
        return passes.of_images(network, ids, use_head=False).backbone.float()

    def untrained(self, seed: int) -> Network:
        """A fresh copy of the network with random weights, on the device."""
        channels, height, width = self.images.images.shape[1:]
        network = build_network(
            self.config.model, self.config.head, channels, seed_of(seed, "untrained"), None, (height, width)
        )
        return network.to(self.world.device)

    def _make(self, encoder: Encoder, seed: int) -> Network:
        if encoder == "untrained":
            return self.untrained(seed).eval()
        if encoder == "supervised":
            from hpcl.downstream.supervised import train_from_scratch

            return train_from_scratch(self, np.asarray(self.ids("train")), seed).network
        raise ValueError(f"{encoder} has no network")


def flat_pixels(images: Tensor) -> Tensor:
    """(n, C, H, W) float -> (n, F): the images, averaged to at most PIXEL_SIDE x PIXEL_SIDE, as vectors."""
    side = [min(PIXEL_SIDE, length) for length in images.shape[2:]]
    small = images if list(images.shape[2:]) == side else F.interpolate(images, side, mode="area")
    return small.flatten(1)
