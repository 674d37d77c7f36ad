"""One training run, start to end: the loop of the method.

Per epoch (METHOD 1 to 5): enter a stage if one begins, cluster if prototypes are
in use, train on every batch, decide on growth, measure, save, report.

The outside world sees one seam, ``report(row)``: called on every rank after each
epoch's checkpoint is on disk, with the columns of :data:`hpcl.results.EPOCH_COLUMNS`.
It may never return (a search that stops the trial).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcl.checkpoint import CHECKPOINT_NAME, previous_of, save_checkpoint
from hpcl.compiled import compile_calls
from hpcl.config import Config
from hpcl.data import DeviceImages, load
from hpcl.data_rules import data_problems
from hpcl.dist import current_world
from hpcl.downstream.bench import Bench
from hpcl.downstream.scores import OBJECTIVES
from hpcl.downstream.tasks import objective as task_objective
from hpcl.errors import UserError
from hpcl.features import FeaturePass
from hpcl.files import claimed, refuse_links, write_text, writing
from hpcl.growth import make_policy
from hpcl.hierarchy import Hierarchy, describe
from hpcl.meters import RunMeters
from hpcl.methods import METHODS
from hpcl.model import Backbone, KeyQueue, MomentumPair, Network, Spaces, build_network
from hpcl.nearest import nearest_centroid_search
from hpcl.optimizer import make_optimizer
from hpcl.prototypes import Level
from hpcl.resume import Start, find_start, must_fit
from hpcl.rng import generator, seed_of
from hpcl.runlog import RunLog
from hpcl.stages import StagePlan, learning_rate, make_plan, stage_at, total_epochs
from hpcl.step import Step
from hpcl.training_loss import SUMS
from hpcl.yamlio import dump

Row = dict[str, Any]
Report = Callable[[Row], None]


@dataclass(frozen=True)
class Run:
    """What :func:`fit` gives back."""

    folder: Path
    rows: list[Row]
    """One dictionary per epoch, keys as in :data:`hpcl.results.EPOCH_COLUMNS`."""
    network: Network
    """The trained query network."""


def fit(
    config: Config,
    folder: Path | str = "runs/latest",
    *,
    backbone: Backbone | None = None,
    report: Report | None = None,
    objective: str | None = "auto",
    fork: Path | str | None = None,
    until_stage: int | None = None,
) -> Run:
    """Train one configuration; called again with the same folder, it goes on where it was.

    Args:
        config: the configuration; its `seed` determines the run.
        folder: where config, log, TensorBoard events, epoch table and checkpoint go.
        backbone: your own module, (b, C, H, W) -> (b, F), or a function that makes it;
            then `config.model.backbone` is not used.
        report: called after every epoch with its row, on every rank.
        objective: `auto` or `linear` measures a linear probe on the validation split at
            the end, where labels exist; a downstream task such as `finetune@val` that task;
            a column's name takes its last value; None: nothing.
        fork: a checkpoint of a run that agrees on all that acted in it (:mod:`hpcl.prefix`):
            where the folder has none yet, its epochs are taken over as `shared` and not trained.
        until_stage: train through the end of this stage only, for runs that fork from it.

    Raises:
        UserError: the data, the folder or the fork do not fit the configuration.
        ValueError: `until_stage` leaves nothing to train, or nothing for others to train.
    """
    trainer = Trainer(config, Path(folder), backbone=backbone, objective=objective)
    trainer.run(report or (lambda row: None), Path(fork) if fork else None, until_stage)
    return Run(Path(folder), trainer.rows, trainer.pair.query)


class Trainer:
    """The state of a run and the parts of its epochs."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        backbone: Backbone | None = None,
        objective: str | None = None,
    ) -> None:
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        self.config, self.folder, self.objective = config, folder, objective
        self.world = current_world(config.runtime.device)
        self.data = load(config.data)
        self.num_images = len(self.data.train)
        problems = data_problems(config, self.num_images, self.world.size)
        if problems:
            raise UserError(*(f"{self.data.source}: {problem}" for problem in problems))
        device = self.world.device
        nearest_centroid_search(config.clusters.backend, device)  # is it there? before any training

        images = self._images = DeviceImages(self.data, device)
        channels, height, width = self.data.images.shape[1:]
        network = build_network(config.model, config.head, channels, config.seed, backbone, (height, width))
        self._backbone_name = None if backbone is None else type(network.backbone).__name__
        self.pair = MomentumPair(network)
        self.method = METHODS[config.method]
        self.queue = KeyQueue(config.moco.queue if self.method.has_queue else 0, config.model.dim)
        self.step = Step(config, self.pair, self.queue, self.data, images, self.world)
        self.pair.to(device, self.step.dtype)
        self.queue.to(device, self.step.dtype)
        if backbone is None:  # a quarter faster, also on a CPU; but a module of one's own may call x.view(b, -1)
            self.pair.to(memory_format=torch.channels_last)
            self.step.layout = torch.channels_last
        if config.runtime.compile:
            compile_calls(self.pair.query, self.pair.key, device=device)

        self.plan = make_plan(config)
        self.total_epochs = total_epochs(self.plan)
        self.steps_per_epoch = self.num_images // config.optimizer.batch
        self.hierarchy = Hierarchy(config, self.num_images)
        self.policy = make_policy(config.growth, self.total_epochs, self.hierarchy.maximum)
        self.passes = FeaturePass(images, self.world, self.step.dtype)
        self.meters = RunMeters(config, self.data, images, self.passes, self.world, self.step.dtype)
        self.rows: list[Row] = []
        """One row per finished epoch."""
        self._net: nn.Module = self.pair.query
        self._optimizer: torch.optim.Optimizer = torch.optim.SGD(self.pair.query.parameters())
        self._key_spaces: Spaces | None = None

    # ---------------------------------------------------------------- the loop

    def run(self, report: Report, fork: Path | None = None, until_stage: int | None = None) -> None:
        """Train from the checkpoint in the folder, the one to fork from, or the start; see :func:`fit`."""
        end = self.total_epochs
        if until_stage is not None:
            end = sum(plan.epochs for plan in self.plan if plan.stage <= until_stage)
            if not 0 < end < self.total_epochs:
                raise ValueError(
                    f"until_stage is {until_stage}, but must end after the first epoch and before the last one "
                    f"(that would be after epoch {end} of {self.total_epochs})"
                )
        refuse_links(self.folder)
        with claimed(self.folder) if self.world.rank == 0 else nullcontext() as through:
            self.world.barrier()  # from here on no other process writes there
            self._go_on(report, fork, end, through)

    def _go_on(self, report: Report, fork: Path | None, end: int, through: Path | None) -> None:
        """Train up to an epoch; `through` is rank 0's folder of :func:`hpcl.files.claimed`."""
        start = self._load(fork)
        checkpoint = self.folder / CHECKPOINT_NAME
        log = RunLog(self.folder, len(self.rows) + 1, through) if self.world.rank == 0 else None
        try:
            if log:
                log.say(self.data.describe())
                log.say(self._images.describe())
                write_text(self.folder / "config.yaml", dump(self.config))
            if log and start:
                for line in start.told(self.world.size):
                    log.say(line)
            if log and start and start.forked:  # from here on the run needs its prefix no more
                log.add(self.rows)
                save_checkpoint(checkpoint, self._state(), through)
            if start:  # the last report may have been lost with the process that made it
                report(self.rows[-1] | ({"note": start.note} if start.note else {}))
            for epoch in range(len(self.rows) + 1, end + 1):
                row = self.train_one_epoch(epoch)
                self.rows.append(row)
                if log:  # the checkpoint last: what a crash leaves half written is then written again
                    log.add(self.rows)
                if log and row["state"] != "diverged":
                    save_checkpoint(checkpoint, self._state(), through)
                self.world.barrier()
                report(row)
                if row["state"] == "diverged":
                    break
            if log:
                with writing(self.folder):
                    previous_of(checkpoint).unlink(missing_ok=True)
        finally:
            self._images.close()
            if log:
                log.close()

    def train_one_epoch(self, epoch: int) -> Row:
        """One epoch, from clustering to the growth decision; gives its row."""
        started = time.perf_counter()
        plan = stage_at(self.plan, epoch)
        if epoch == plan.first_epoch:
            self._enter_stage(plan)
        previous = self.hierarchy.finest_labels
        levels = self._cluster(plan, epoch) if plan.uses_prototypes else []
        clustered = time.perf_counter()
        row = {"epoch": epoch, "stage": plan.stage, "state": "running", "shared": False, "world_size": self.world.size}
        row |= self._train_batches(plan, epoch, levels)
        trained = time.perf_counter()
        if row["loss"] is not None:
            row |= self._measure(plan, epoch, levels)
        if row.get("nce_ref") is None:  # a loss or, after the last step, the features are not finite
            row |= {**dict.fromkeys(SUMS), "state": "diverged"}
        else:
            row |= describe(levels, previous)
            row |= self._grow(plan, epoch, row)
            if epoch == self.total_epochs:
                row["state"] = "finished"
                row["objective"] = self._objective(row)
        ended = time.perf_counter()
        row |= {
            "seconds": ended - started,
            "seconds_cluster": clustered - started,
            "seconds_train": trained - clustered,
            "seconds_meters": ended - trained,
            "images_per_second": self.steps_per_epoch * self.config.optimizer.batch / (trained - clustered),
        }
        return row

    # ---------------------------------------------------------------- stages

    def _enter_stage(self, plan: StagePlan) -> None:
        """Freeze and thaw, and follow a change of the output space (METHOD 2)."""
        self.policy.clear()
        if plan.continues:
            return
        first = plan is self.plan[0]
        used_head = not first and self.plan[self.plan.index(plan) - 1].uses_head
        if plan.uses_head and not used_head:
            self.pair.copy_head()
        self._prepare(plan)
        if first or plan.uses_head != used_head:
            self._fill_queue(plan)
            self.step.bank = None  # its keys are of another space
        self._key_spaces = None

    def _prepare(self, plan: StagePlan) -> None:
        """What a stage needs whether it starts or is resumed: frozen parts, optimizer, gradient averaging."""
        self._optimizer = make_optimizer(self.pair.set_stage(plan), plan.lr, self.config.optimizer)
        self._net = self.pair.query
        if self.world.size > 1:
            # A wrap from before a freeze leaves gradients unreduced, so every stage wraps anew.
            # BatchNorm statistics stay per rank and are averaged before each eval pass and save.
            ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            with warnings.catch_warnings():  # torch 2.15 renames the argument, 2.11 does not know the new name
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                self._net = DistributedDataParallel(self.pair.query, device_ids=ids, broadcast_buffers=False)

    def _fill_queue(self, plan: StagePlan) -> None:
        """Fill the queue with the keys of random training images."""
        batch, size, seed = self.config.optimizer.batch, len(self.queue.keys), self.config.seed
        if not size:
            return
        positions = torch.randperm(self.num_images, generator=generator(seed, "queue", plan.stage))[:size]
        parts = [
            self.step.keys(part, plan, seed_of(seed, "queue", plan.stage, number))
            for number, part in enumerate(torch.split(positions, batch))
        ]
        self.queue.fill(torch.cat(parts))
        self.world.average_buffers(self.pair)

    # ---------------------------------------------------------------- parts of an epoch

    def _cluster(self, plan: StagePlan, epoch: int) -> list[Level]:
        """The levels of this epoch, from the key encoder's centre views of the training set."""
        space = self.config.clusters.space
        # in stage 2 the MLP is still random: images are grouped by what the encoder knows
        in_encoder = space == "encoder" or (space == "auto" and plan.stage == 2 and self.method.staged)
        if self.config.clusters.features == "bank" and not in_encoder:
            if self.step.bank is None:  # from here on every step keeps its keys there
                self.step.bank = self._features(plan).embedding.clone()
            features = embeddings = self.step.bank
        else:
            spaces = self._features(plan)
            features, embeddings = spaces.encoder if in_encoder else spaces.embedding, spaces.embedding
        return self.hierarchy.cluster(
            features,
            embeddings,
            stage=plan.stage,
            epoch=epoch,
            world=self.world,
        )

    def _features(self, plan: StagePlan) -> Spaces:
        """Key-side features of all training images, computed once between two changes of the weights."""
        if self._key_spaces is None:
            self._key_spaces = self.passes.of_images(self.pair.key, self.data.train, plan.uses_head)
        return self._key_spaces

    def _train_batches(self, plan: StagePlan, epoch: int, levels: list[Level]) -> Row:
        """All batches of an epoch; gives mean losses, accuracies and the last learning rate.

        All losses are None if one of them is not finite.
        """
        batch, seed = self.config.optimizer.batch, self.config.seed
        order = torch.randperm(self.num_images, generator=generator(seed, "order", plan.stage, epoch))
        start, last = plan.schedule_epochs
        num_steps = self.steps_per_epoch * (last - start + 1)
        done = (epoch - start) * self.steps_per_epoch
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.world.device)
        rate = plan.lr

        def drawn(step: int) -> tuple[Tensor, int]:
            return order[step * batch : (step + 1) * batch], seed_of(seed, "step", plan.stage, epoch, step)

        for step in range(self.steps_per_epoch):
            rate = learning_rate(plan, done + step, num_steps)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            if step + 1 < self.steps_per_epoch:
                self.step.prefetch(*drawn(step + 1))
            positions, step_seed = drawn(step)
            sums += self.step.take(self._net, self._optimizer, positions, plan, levels, step_seed)
        self._key_spaces = None
        self.world.average_buffers(self.pair)
        if not self.method.has_queue:
            self.pair.copy_query()
        means = self.world.all_reduce_sum(sums) / (self.steps_per_epoch * self.world.size)
        row: Row = dict(zip(SUMS, means.tolist(), strict=True))
        if not all(math.isfinite(value) for value in row.values()):
            row = dict.fromkeys(row)
        elif not levels:
            row |= {"loss_proto": None, "acc_proto": None}
        return row | {"lr": rate}

    def _grow(self, plan: StagePlan, epoch: int, row: Row) -> Row:
        """Ask the growth policy, and follow it (METHOD 4)."""
        if not plan.may_grow:
            return {}
        decision = self.policy.update(epoch, row["acc_proto"], row["acc_inst"], next_finest=self.hierarchy.next_finest)
        if decision.grow:
            self.hierarchy.grow()
        return {"grew": decision.grow, "growth_reason": decision.reason, "theta": decision.theta}

    def _measure(self, plan: StagePlan, epoch: int, levels: list[Level]) -> Row:
        """The meters of METHOD 5."""
        positions = self.meters.positions
        if len(positions) == self.num_images:
            reference = self._features(plan)  # the next epoch clusters on the same
        else:
            reference = self.passes.of_images(self.pair.key, self.data.train[positions.numpy()], plan.uses_head)
        row = self.meters.measure(self.pair, plan, epoch, reference, levels)
        every = self.config.meters.knn_every
        if every and (epoch % every == 0 or epoch == self.total_epochs):
            row["knn"] = self.meters.knn(self.pair.query)
        return row

    def _objective(self, row: Row) -> float | None:
        if self.objective in ("auto", "linear"):
            return self.meters.linear_probe(self.pair.query)
        if self.objective in OBJECTIVES:
            bench = Bench(
                self.config, self.pair.query, self.data, self.world, split="val", device_images=self._images,
                state=self._state() | {"rows": [*self.rows, row]},
            )  # fmt: skip
            return task_objective(self.objective, bench)
        value: float | None = row.get(self.objective) if self.objective else None
        return value

    # ---------------------------------------------------------------- checkpoint

    def _state(self) -> dict[str, Any]:
        """Everything the next epoch depends on; taken after the growth decision."""
        return {
            "config": self.config.model_dump(mode="json"),
            "backbone": self._backbone_name,
            "data": {
                "source": self.data.source,
                "hash": self.data.content_hash,
                "shape": list(self.data.images.shape[1:]),
            },
            "pair": self.pair.state_dict(),
            "queue": self.queue.state_dict(),
            "bank": self.step.bank,
            "optimizer": self._optimizer.state_dict(),
            "growth": self.policy.state_dict(),
            "hierarchy": self.hierarchy.state_dict(),
            "meters": self.meters.state_dict(),
            "rows": self.rows,
        }

    def _load(self, fork: Path | None) -> Start | None:
        """Load the folder's checkpoint, else the one to fork from, if any."""
        start = find_start(self.folder, fork, self._state(), self.config, self.world)
        if start is None:
            return None
        state = start.state
        try:
            self.pair.load_state_dict(state["pair"])
        except RuntimeError as error:  # only a backbone given in Python can differ under an equal configuration
            ours = self._backbone_name or self.config.model.backbone
            raise UserError(
                f"{start.path}: belongs to a run with another backbone than this {ours}; give its backbone, "
                "or another folder"
            ) from error
        with must_fit(start.path):
            self.queue.load_state_dict(state["queue"])
            bank = state.get("bank")
            self.step.bank = None if bank is None else bank.to(self.world.device, self.step.dtype)
            self.policy.load_state_dict(state["growth"])
            self.hierarchy.load_state_dict(state["hierarchy"])
            self.meters.load_state_dict(state["meters"])
        self.rows = state["rows"]
        self._prepare(stage_at(self.plan, len(self.rows)))
        with must_fit(start.path):
            self._optimizer.load_state_dict(state["optimizer"])
        return start._replace(state={"rows": self.rows})  # the rest is not kept for the run's life
