"""How fast a MoCo training step is: this package beside lightly, its own networks alone, and the augmentation alone.

    python benchmarks/step.py                                    # synthetic colour images of 32x32
    python benchmarks/step.py --data PATH/cifar10 --repeats 10   # your own
    python benchmarks/step.py --view-sizes 32 84                 # augmentation at two sizes
    python benchmarks/step.py --backbone resnet18 --batch 512    # for a GPU

Prints images per second of CPU time (user and system, of all threads and loader workers) and of wall time, mean and
standard deviation of the repeats, in which all rows take turns; ratios are of each repeat. Targets stand beside them.

A step is: two augmented views of a batch, EMA, keys, queries, InfoNCE with a queue of 4,096, backward, SGD with
momentum and weight decay, enqueue. Two rows do this same work:

- `hpcl`: :class:`hpcl.step.Step` on a stage that trains everything, without prototypes; views are drawn and made in
  one batch on the device.
- `lightly`: its MoCoV2Transform, MoCoProjectionHead, NTXentLoss and update_momentum, put together as in its examples,
  on Pillow images through a DataLoader, with 0 and with 2 workers (`--workers`); the faster one counts.

The script checks that both train the same number of parameters and that both losses agree on the same queries, keys
and queue, and says so. Both take crop 0.2-1, flip 0.5, jitter 0.8 of 0.4/0.4/0.4/0.1, gray 0.2, no blur, and the same
normalisation. They differ where the packages do: lightly turns hue in HSV, this package in YIQ; this package also
measures acc_inst.

`networks alone` is the floor: keys, queries and backward on constant tensors; no images, loss, queue or optimizer.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import step_peers as peers
import torch
from PIL import Image
from torch import Tensor

from hpcl.augment import apply_views, draw_views
from hpcl.config import Config
from hpcl.data import DeviceImages, ImageSet, load
from hpcl.dist import World, choose_device
from hpcl.errors import UserError
from hpcl.heads import unit
from hpcl.losses import Cosine, info_nce
from hpcl.model import KeyQueue, MomentumPair, build_network
from hpcl.rng import generator
from hpcl.search.machine import cpu_model
from hpcl.sections import Augment
from hpcl.stages import make_plan
from hpcl.step import Step

WARM = 2
"""Steps before the clock starts, in every repeat."""
BLUR = 0.5
"""Probability of the blur in the augmentation's second table (MoCo v2)."""


@dataclass
class Row:
    """What is measured under one name: images per CPU second and per wall second, a value each repeat."""

    name: str
    take: Callable[[int, Clock], tuple[float, float]]
    """Does so many steps after warming up; gives CPU and wall seconds."""
    images: int
    """Images (or views) of a step."""
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def measure(self, steps: int, clock: Clock) -> None:
        """One repeat."""
        cpu, wall = self.take(steps, clock)
        self.cpu.append(self.images * steps / cpu)
        self.wall.append(self.images * steps / wall)


class Clock:
    """Reads CPU seconds, those of living child processes too, and wall seconds, when the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self) -> tuple[float, float]:
        """CPU seconds and wall seconds since some moment."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        cpu = time.process_time()
        if importlib.util.find_spec("psutil"):
            import psutil

            for child in psutil.Process().children(recursive=True):
                times = child.cpu_times()
                cpu += times.user + times.system
        return cpu, time.perf_counter()

    def time(self, work: Callable[[int], object], steps: int) -> tuple[float, float]:
        """CPU and wall seconds of `work(0)` .. `work(steps - 1)`, after warming up."""
        for step in range(WARM):
            work(step)
        cpu, wall = self.read()
        for step in range(steps):
            work(step)
        cpu_after, wall_after = self.read()
        return cpu_after - cpu, wall_after - wall


def images_of(options: argparse.Namespace) -> ImageSet:
    """The user's colour images, or noise: neither package's speed depends on what is in an image."""
    if options.data is not None:
        data = load(Config().data.model_copy(update={"source": options.data, "size": options.size}))
        if data.images.shape[1] != 3:
            raise UserError(f"{options.data}: images have {data.images.shape[1]} channel, but colour images are needed")
        return data
    count = 2 * options.queue
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, options.size, options.size), dtype=np.uint8)
    none = np.array([], dtype=np.int64)
    mean, std = np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32)
    return ImageSet(pixels, None, np.arange(count), none, none, (), "synthetic", "", mean, std)


class Ours:
    """This package's step and its floor, on one network."""

    def __init__(self, config: Config, data: ImageSet, device: torch.device) -> None:
        self.config, self.batch, self.count = config, config.optimizer.batch, len(data.train)
        size = data.images.shape[2]
        network = build_network(config.model, config.head, 3, config.seed)
        self.pair, self.queue = MomentumPair(network), KeyQueue(config.moco.queue, config.model.dim)
        world = World(0, 1, device)
        self.step = Step(config, self.pair, self.queue, data, DeviceImages(data, device), world)
        self.pair.to(device, self.step.dtype)
        self.queue.to(device, self.step.dtype)
        self.pair.to(memory_format=torch.channels_last)
        self.step.layout = torch.channels_last  # as the trainer does
        self.plan = next(plan for plan in make_plan(config) if plan.stage == 3)
        self.parameters = self.pair.set_stage(self.plan)
        options = config.optimizer
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=0.06, momentum=options.momentum, weight_decay=options.weight_decay
        )
        draw = generator(0, "queue")
        self.queue.fill(unit(torch.randn(self.queue.keys.shape, generator=draw)))
        self.order = torch.randperm(self.count, generator=draw)
        views = torch.randn(2, self.batch, 3, size, size, generator=draw).to(device, self.step.dtype)
        self.views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        self.gradient = torch.randn(self.batch, config.model.dim, generator=draw).to(device) / self.batch

    def take(self, number: int) -> None:
        """One step of training."""
        positions = self.order[torch.arange(number * self.batch, (number + 1) * self.batch) % self.count]
        self.step.take(self.pair.query, self.optimizer, positions, self.plan, [], number)

    def take_networks(self, number: int) -> None:
        """Forward, forward and backward of a step, and nothing else."""
        bf16 = precision_of(self.config, self.views[0].device) == "bf16"
        with torch.autocast(self.views[0].device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                self.pair.key(self.views[1], use_head=True)
            query = self.pair.query(self.views[0], use_head=True)
        self.optimizer.zero_grad(set_to_none=True)
        query.backward(self.gradient)


def precision_of(config: Config, device: torch.device) -> str:
    """`bf16` or `fp32`, as the step chooses."""
    if config.runtime.precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return config.runtime.precision


def config_of(options: argparse.Namespace) -> Config:
    """The configuration of both steps."""
    return Config().with_values(
        {
            "head.attach": "replace",  # the MLP on the backbone's features, as lightly's head is
            "optimizer.batch": options.batch,
            "moco.queue": options.queue,
            "model.backbone": options.backbone,
            "runtime.precision": options.precision,
        }
    )


def lightly_step(ours: Ours, config: Config, data: ImageSet, device: torch.device) -> peers.LightlyStep:
    """lightly's step on the same images, with a copy of our backbone."""
    network, normalize = ours.pair.query, {"mean": data.mean.tolist(), "std": data.std.tolist()}
    pixels = data.images[data.train[: 2 * config.moco.queue]]
    precision = precision_of(config, device)
    return peers.LightlyStep(network.backbone, network.feature_dim, config, pixels, normalize, device, precision)


def lightly_row(step: peers.LightlyStep, workers: int, batch: int) -> Row:
    """lightly's step with so many loader workers, which start before the clock does."""

    def take(steps: int, clock: Clock) -> tuple[float, float]:
        # batches to spare: workers that fetch ahead are as busy in the last step as in the first
        with closing(step.batches(WARM + steps + 2 * workers + 1, workers)) as batches:
            return clock.time(lambda _: step.take(next(batches)), steps)

    return Row(f"lightly, {workers} workers", take, batch)


def same_work(ours: Ours, theirs: peers.LightlyStep) -> str:
    """One line that says what both have in common.

    Raises:
        RuntimeError: they do not do the same.
    """
    counts = [sum(p.numel() for p in parameters) for parameters in (ours.parameters, theirs.parameters)]
    if counts[0] != counts[1]:
        raise RuntimeError(f"the networks differ: {counts[0]:,} and {counts[1]:,} trained parameters")
    queue, draw = ours.queue.keys, generator(1, "queue")
    query, noise = (unit(torch.randn(64, queue.shape[1], generator=draw)).to(queue) for _ in range(2))
    key = unit(0.2 * query + noise)  # not so alike that the loss is 0
    theirs.criterion.memory_bank.bank = queue.clone()
    own = info_nce(query, key, queue, Cosine(ours.config.moco.temperature))[0].item()
    other = theirs.criterion(query, key).item()
    if abs(own - other) > 1e-4 * abs(other):
        raise RuntimeError(f"the losses differ on the same keys: {own} and {other}")
    return f"{counts[0]:,} trained parameters in both; InfoNCE of the same keys {own:.4f} and {other:.4f}"


def augmentation_rows(
    pixels: npt.NDArray[np.uint8], augment: Augment, data: ImageSet, device: torch.device, missing: set[str]
) -> list[Row]:
    """Views of a batch of images: by this package, kornia and torchvision."""
    batch, channels, size, _ = pixels.shape
    images = torch.from_numpy(pixels).to(device)
    mean, std = (torch.from_numpy(values).to(device) for values in (data.mean, data.std))
    pictures = [Image.fromarray(image) for image in np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))]
    normalize = {"mean": data.mean.tolist(), "std": data.std.tolist()}
    view = peers.torchvision_view(augment, size, normalize)

    def ours(number: int) -> Tensor:
        drawn = draw_views(augment, batch, size, size, channels, generator(number, "view"))
        return apply_views(images, drawn.to(device), mean, std)

    works: dict[str, Callable[[int], object]] = {"hpcl": ours}
    if "kornia" not in missing:
        kornia = peers.kornia_views(augment, size, mean, std)
        works["kornia"] = lambda _: kornia(images)
    works["Pillow, one by one"] = lambda _: torch.stack([view(picture) for picture in pictures])
    return [
        Row(name, lambda steps, clock, work=work: clock.time(work, steps), batch)  # type: ignore[misc]
        for name, work in works.items()
    ]


def resized(pixels: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """uint8 (n, C, size, size)."""
    if pixels.shape[2:] == (size, size):
        return pixels
    values = torch.nn.functional.interpolate(torch.from_numpy(pixels).float(), (size, size), mode="bilinear")
    return values.clamp(0, 255).to(torch.uint8).numpy()


def shown(values: list[float], digits: int = 0) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread}"


def table(title: str, rows: list[Row]) -> None:
    """Print the rows of a table."""
    print(f"\n{title:<30}{'/ CPU s':>20}{'/ wall s':>20}")
    for row in rows:
        print(f"{row.name:<30}{shown(row.cpu):>20}{shown(row.wall):>20}")


def ratio(name: str, over: Row, under: Row, aim: str, scale: float = 1.0, digits: int = 2) -> None:
    """Print one row over another, repeat by repeat."""
    pairs = [(over.cpu, under.cpu), (over.wall, under.wall)]
    cells = [shown([scale * a / b for a, b in zip(*pair, strict=True)], digits) for pair in pairs]
    print(f"{name:<30}{cells[0]:>20}{cells[1]:>20}  {aim}", flush=True)


def machine(device: torch.device, options: argparse.Namespace) -> str:
    """One line: processor or GPU, versions, load."""
    name = cpu_model()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {name}"
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("torch", "torchvision", "pillow", "lightly", "kornia")
                if importlib.util.find_spec("PIL" if p == "pillow" else p)]  # fmt: skip
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {', '.join(versions)}; "
        f"load {os.getloadavg()[0]:.1f}; n = {options.repeats} of {options.steps} steps"
    )


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="images per step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=4096, help="keys in the queue (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps per repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of all rows")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; default: its own choice")
    parser.add_argument("--backbone", default="convnet", help="convnet or a torchvision ResNet (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="of lightly's loader (default: 0 2)")
    parser.add_argument("--view-sizes", type=int, nargs="+", help="sides for the augmentation; default: --size")
    parser.add_argument("--data", metavar="SOURCE", help="colour images; default: synthetic")
    options = parser.parse_args(arguments)
    least = {"batch": 2, "queue": 1, "steps": 1, "repeats": 1}
    small = [name for name in least if getattr(options, name) < least[name]]
    problems = [f"--{name} is {getattr(options, name)}, but must be >= {least[name]}" for name in small]
    problems += [f"--workers has {number}, but must be >= 0" for number in options.workers if number < 0]
    if not {"batch", "queue"} & set(small) and options.queue % options.batch:
        problems.append(f"--queue is {options.queue}, but must be a multiple of --batch ({options.batch})")
    options.view_sizes = options.view_sizes or [options.size]
    problems += [f"a side is {side}, but must be >= 8" for side in (options.size, *options.view_sizes) if side < 8]
    if problems:
        raise UserError(*problems)
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; 2 for a mistake of the user."""
    try:
        options = options_of(arguments)
        device = choose_device(options.device)
        data = images_of(options)
        if options.threads:
            torch.set_num_threads(options.threads)
        measure(options, device, data)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def measure(options: argparse.Namespace, device: torch.device, data: ImageSet) -> None:
    """All tables."""
    config = config_of(options)
    missing = {name for name in ("lightly", "kornia", "psutil") if importlib.util.find_spec(name) is None}
    side = data.images.shape[2]
    print(f"a step of {options.batch} images of {side}x{side} ({data.source}), {options.backbone}")
    print(machine(device, options))
    for name in sorted(missing):
        print(f"left out: all rows that need {name}; install it with: pip install 'hpcl[bench]'")
    clock, ours = Clock(device), Ours(config, data, device)
    floor = Row("networks alone", lambda steps, clock: clock.time(ours.take_networks, steps), options.batch)
    own = Row("hpcl, a step", lambda steps, clock: clock.time(ours.take, steps), options.batch)
    theirs: list[Row] = []
    if not missing & {"lightly", "psutil"}:
        step = lightly_step(ours, config, data, device)
        print(same_work(ours, step))
        theirs = [lightly_row(step, workers, options.batch) for workers in dict.fromkeys(options.workers)]
    views = {
        (side, blur): augmentation_rows(
            resized(data.images[data.train[: options.batch]], side),
            config.augment.model_copy(update={"blur": blur}),
            data,
            device,
            missing,
        )
        for side in dict.fromkeys((options.size, *options.view_sizes))
        for blur in (0.0, BLUR)
    }
    for repeat in range(options.repeats):
        print(f"repeat {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
        for row in (floor, own, *theirs, *(row for rows in views.values() for row in rows)):
            row.measure(options.steps, clock)
    table("images", [floor, own, *theirs])
    gpu = device.type == "cuda"
    for row in theirs:
        ratio(f"hpcl / {row.name}", own, row, "" if gpu else "aimed at, for the faster: >= 1.5")
    ratio("hpcl of networks alone, %", own, floor, "aimed at (wall): >= 80" if gpu else "", 100, 0)
    alone = views[options.size, 0.0][0]
    ratio("its augmentation, %", own, alone, "aimed at (wall): <= 5" if gpu else "", 200, 1)
    for (side, blur), rows in views.items():
        table(f"views, {side}x{side}, blur {blur:g}", rows)
        for row in rows[1:]:
            ratio(f"hpcl / {row.name.split(',')[0]}", rows[0], row, "")


if __name__ == "__main__":
    raise SystemExit(main())
