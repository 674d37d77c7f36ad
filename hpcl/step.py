"""One training step (METHOD 1): EMA, keys, queries, losses, update, enqueue.

Where the method's negatives are the batch itself (SimCLR), both views go through the query
network with gradient, and there are no keys.

Everything random is drawn for the whole global batch from the step's seed and then
picked, so that R ranks compute what one rank would.

Legend: B global batch, b batch of this rank, R ranks (B = R b), D embedding,
K queue keys, M clusters of a level, C H W image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hpcl.augment import apply_views, draw_views
from hpcl.config import Config
from hpcl.data import DeviceImages, ImageSet
from hpcl.dist import World
from hpcl.heads import HeadSimilarity, MultiHead
from hpcl.losses import Cosine, Similarity
from hpcl.methods import METHODS
from hpcl.model import KeyQueue, MomentumPair
from hpcl.prototypes import Level
from hpcl.rng import generator, seed_of
from hpcl.stages import StagePlan
from hpcl.training_loss import training_loss


class Step:
    """Takes training steps; holds what they share: networks, queue, images."""

    def __init__(
        self, config: Config, pair: MomentumPair, queue: KeyQueue, data: ImageSet, images: DeviceImages, world: World
    ) -> None:
        self._config, self._pair, self._queue, self._images, self._world = config, pair, queue, images, world
        self._train_ids = torch.from_numpy(data.train)
        self._latest: tuple[Tensor, Tensor] | None = None
        self.bank: Tensor | None = None
        """(N, D) latest key of each training image, where a clustering asked for them; None: not kept."""
        self._shape = data.images.shape[1:]
        self.layout = torch.contiguous_format
        """Memory layout of the views."""
        precision = config.runtime.precision
        if precision == "auto":
            gpu = world.device.type == "cuda"
            precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
        self._precision = precision
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        """Type of parameters, features and losses."""

    def take(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        positions: Tensor,
        plan: StagePlan,
        levels: list[Level],
        seed: int,
    ) -> Tensor:
        """One step on the global batch.

        Args:
            net: the query network, wrapped for gradient averaging where there are ranks.
            optimizer: over the stage's trainable parameters.
            positions: (B,) positions of the batch among the training images, on the CPU.
            plan: the stage.
            levels: cluster levels in use; empty before prototypes.
            seed: names all random draws of the step.

        Returns:
            (5,) float64 values as in :data:`hpcl.training_loss.SUMS`, on the device: no host sync.
        """
        views = self._views_with_keys
        if views:
            self._pair.ema(self._config.moco.momentum, plan)
        keys = [self.keys(positions, plan, seed, key_view) for _, key_view in views]
        pairs = [
            (self._queries(net, positions, plan, seed, view), self._own(key))
            for (view, _), key in zip(views, keys, strict=True)
        ] or [(self._queries(net, positions, plan, seed, 0), self._queries(net, positions, plan, seed, 1))]
        on_device = positions.to(self._world.device, non_blocking=True)
        ids = [level.cluster_of_image[on_device] for level in levels]
        similarity = self._similarity(plan)
        terms = [
            training_loss(self._config, self._world, *pair, self._queue.keys, ids, levels, similarity, seed, view)
            for view, pair in enumerate(pairs)
        ]
        mean = torch.stack([torch.stack(term) for term in terms]).mean(0)
        optimizer.zero_grad(set_to_none=True)
        mean[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for key in keys:
            self._queue.enqueue(key)
        if self.bank is not None and keys:
            self.bank[on_device] = keys[0]
        return mean.detach().double()

    @torch.no_grad()
    def keys(self, positions: Tensor, plan: StagePlan, seed: int, view: int = 1) -> Tensor:
        """(B, D) unit key embeddings of the whole global batch, the same on every rank.

        With several ranks or BatchNorm splits the batch is encoded in shuffled order
        (MoCo's ShuffleBN): the statistics a key shares with its query would tell it apart.
        """
        place = self._key_places(len(positions), seed, view)
        with self._forward(seed, "key-layers", view):
            own: Tensor = self._pair.key(self._views(positions, self._own(place), seed, view), use_head=plan.uses_head)
        gathered = self._world.all_gather(own.to(self.dtype))
        keys = torch.empty_like(gathered)
        keys[place.to(gathered.device, non_blocking=True)] = gathered  # else every step waits for the GPU
        return keys

    def prefetch(self, positions: Tensor, seed: int) -> None:
        """Begin to fetch the images of a step to come, where batches come from the mapped file.

        Args:
            positions: (B,) as :meth:`take` will have them.
            seed: the same way.
        """
        if not self._images.prefetches:
            return
        places = [self._key_places(len(positions), seed, view) for _, view in self._views_with_keys]
        for place in (*places, torch.arange(len(positions))):
            self._images.prefetch(self._train_ids[positions[self._own(place)]])

    def _similarity(self, plan: StagePlan) -> Similarity:
        """Logits of the instance loss: cosine over T, or the heads' own where there are several."""
        mlp = self._pair.query.mlp
        if plan.uses_head and isinstance(mlp, MultiHead):
            return HeadSimilarity(mlp, self._config.head.beta)
        return Cosine(self._config.moco.temperature)

    @property
    def _views_with_keys(self) -> tuple[tuple[int, int], ...]:
        """(view of the queries, view of their keys) of each pass; none where the negatives are the batch."""
        if not METHODS[self._config.method].has_queue:
            return ()
        return ((0, 1), (1, 0)) if self._config.moco.symmetric else ((0, 1),)

    def _key_places(self, count: int, seed: int, view: int) -> Tensor:
        """(B,) order in which the keys of a view are encoded."""
        if self._config.moco.shuffle_keys and self._world.size * self._config.model.bn_splits > 1:
            return torch.randperm(count, generator=generator(seed, "shuffle", view))
        return torch.arange(count)

    def _raw(self, ids: Tensor) -> Tensor:
        """uint8 (b, C, H, W) of these images on the device; not to be written to.

        Queries and keys of a step are mostly the same images, so the latest are kept.
        """
        if self._latest is None or not torch.equal(self._latest[0], ids):
            self._latest = ids, self._images.batch(ids)
        return self._latest[1]

    def _queries(self, net: nn.Module, positions: Tensor, plan: StagePlan, seed: int, view: int) -> Tensor:
        """(b, D) unit query embeddings of this rank's part of the batch."""
        part = self._own(torch.arange(len(positions)))
        with self._forward(seed, "query-layers", view):
            out: Tensor = net(self._views(positions, part, seed, view), use_head=plan.uses_head)
        return out.to(self.dtype)

    def _views(self, positions: Tensor, part: Tensor, seed: int, view: int) -> Tensor:
        """(b, C, H, W) augmented images at the places `part` of the global batch."""
        channels, height, width = self._shape
        drawn = draw_views(self._config.augment, len(positions), height, width, channels, generator(seed, "view", view))
        raw = self._raw(self._train_ids[positions[part]])
        out = apply_views(raw, drawn.take(part).to(self._world.device), self._images.mean, self._images.std).to(
            self.dtype
        )
        return out.contiguous(memory_format=self.layout)

    def _own(self, rows: Tensor) -> Tensor:
        """This rank's part (b, ...) of rows of the global batch (B, ...)."""
        each = len(rows) // self._world.size
        return rows[self._world.rank * each : (self._world.rank + 1) * each]

    @contextmanager
    def _forward(self, seed: int, purpose: str, view: int) -> Iterator[None]:
        """Autocast where wanted, and a seed for layers that draw (dropout in a user's backbone)."""
        device, own_seed = self._world.device, seed_of(seed, purpose, view, self._world.rank)
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bf16"),
        ):
            torch.default_generator.manual_seed(own_seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(own_seed)
            yield
