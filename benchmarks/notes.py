"""The research notes' observations once more: runs that show each of them or do not, the verdicts, and their charts.

    python benchmarks/notes.py                                               # the embedded digits, about 20 CPU-minutes
    python benchmarks/notes.py --data PATH/cifar10 --subset 0.1 --only ABC   # others; a small convnet all the same
    python benchmarks/notes.py --charts docs                                 # finished runs are not trained again

What is observed, by letter: A the ceiling of acc_proto, B acc_proto at growths, C the lowest loss_proto, D the plateau
and the window rule, E the two heads, F acc_inst and acc_proto. The rules stand in notes_rules.py, docs/notes.md has
what came of them. All runs of a seed and a batch go on from the same stage 1. `runs.csv` in the results folder has one
row per run and epoch, `verdicts.txt` the verdicts, `cost.json` CPU and wall seconds of each run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hpcl import presets
from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.files import read_object, write_text
from hpcl.search.machine import cpu_model
from hpcl.validation import validation_problems

if TYPE_CHECKING:
    import pandas as pd

BATCHES = (64, 256)
"""The notes' batch, and another to tell the batch from the number of classes."""
MULTIPLIER = 1.7
"""2, 4, 7, 12, 21, 36, 62, 106, 181, 308, 524, ..., up to a tenth of the training images."""
HOLD = 2
"""Epochs at a count of a sweep."""
HELD = (2, 7, 21, 62, 181)
"""Counts of the runs that are held at one, each for as many epochs as a sweep is at it."""
SETS = {"sweep": "ABCF", "held": "C", "rule": "DF", "head": "E"}
"""Which observations ask for which runs."""
EPOCHS = {"sweep": 0, "held": 2, "rule": 20, "head": 10}
"""Length of stage 3; of a sweep HOLD for each of its counts."""


@dataclass(frozen=True)
class Plan:
    """One run."""

    set: str
    seed: int
    batch: int = BATCHES[0]
    targets: str = "pcl"
    policy: str = "fixed"
    head: str = "v2"
    count: int | None = None
    """Of clusters, where it is held."""

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [self.set, self.targets, self.policy, self.head, f"b{self.batch}"]
        return "-".join([*parts, f"k{self.count}"] if self.count else parts) + f"-s{self.seed}"

    @property
    def prefix(self) -> str:
        """Folder of the stage 1 that it goes on from."""
        return f"stage1-b{self.batch}-s{self.seed}"


def plans(only: str, seeds: int) -> Iterator[Plan]:
    """All runs that these observations need, seed by seed."""
    wanted = {name for name, letters in SETS.items() if set(letters) & set(only)}
    for seed in range(seeds):
        if "sweep" in wanted:
            for targets in ("pcl", "adjusted", "unique"):
                yield Plan("sweep", seed, targets=targets)
            yield Plan("sweep", seed, batch=BATCHES[1])
        if "held" in wanted:
            yield from (Plan("held", seed, count=count) for count in HELD)
        if "rule" in wanted:
            for targets in ("pcl", "adjusted"):
                yield from (Plan("rule", seed, targets=targets, policy=policy) for policy in ("plateau", "window"))
        if "head" in wanted:
            yield from (Plan("head", seed, head=head, count=21) for head in ("v1", "v2"))


def base_config(options: argparse.Namespace) -> Config:
    """What all runs share: the preset's images and views, a small convnet, the notes' single level and plain ProtoNCE.

    Learning rates are constant, so that a change over a run is none of theirs.
    """
    config = presets.config(options.preset)
    values: dict[str, Any] = {
        "data.subset": options.subset,
        "model.backbone": "convnet",
        "model.width": options.width,
        "model.bn_splits": 1,
        "moco.queue": 1024,
        "moco.momentum": 0.99,
        "moco.temperature": 0.1,
        "stages.total": None,
        "clusters.levels": 1,
        "clusters.multiplier": MULTIPLIER,
        "growth.stages": (3,),
        "growth.hold": HOLD,
        "topk.mode": "none",
        "meters.views": 64,  # these meters are not looked at here
        "meters.images": 512,
        "meters.reference_clusters": 16,
        "meters.knn_every": 1000,  # at the end only
        "runtime.threads": 1,
    }
    if options.data is not None:
        values["data.source"] = options.data
    return config.with_values(values)


def config_of(plan: Plan, base: Config, num_images: int) -> Config:
    """The configuration of a run on so many training images."""
    rate = 0.03 * plan.batch / BATCHES[0]
    growing = EPOCHS[plan.set] or HOLD * len(counts(num_images))
    values: dict[str, Any] = {"seed": plan.seed, "optimizer.batch": plan.batch}
    for stage, epochs in {1: 4, 2: 1, 3: growing, 4: 0, 5: 0}.items():
        values |= {f"stages.stage{stage}.{field}": value for field, value in
                   (("epochs", epochs), ("lr", rate), ("schedule", "constant"))}  # fmt: skip
    values |= {"prototypes.targets": plan.targets, "growth.policy": plan.policy, "head.kind": plan.head}
    values["clusters.counts"] = None if plan.count is None else (plan.count,)
    return base.with_values(values)


def counts(num_images: int) -> list[int]:
    """The counts of a sweep."""
    from hpcl.growth import next_count

    found = [2]
    while (following := next_count(found[-1], MULTIPLIER)) <= num_images // 10:
        found.append(following)
    return found


def train(plan: Plan, base: Config, num_images: int, folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, which is trained where it has not been yet; its cost is noted."""
    from hpcl.checkpoint import CHECKPOINT_NAME
    from hpcl.trainer import fit

    def timed(name: str, config: Config, **more: Any) -> list[dict[str, Any]]:
        cpu, wall = time.process_time(), time.perf_counter()
        rows = fit(config, folder / name, **more).rows
        if name not in costs:
            costs[name] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
            write_text(folder / "cost.json", json.dumps(costs, indent=1))
        return rows

    costs: dict[str, Any] = read_object(folder / "cost.json") if (folder / "cost.json").exists() else {}
    if not (folder / plan.name / CHECKPOINT_NAME).exists():
        first = config_of(Plan("sweep", plan.seed, plan.batch), base, num_images)  # nothing else acts in stage 1
        timed(plan.prefix, first, objective=None, until_stage=1)
    probed = "auto" if plan.set in ("rule", "head") else None
    config = config_of(plan, base, num_images)
    return timed(plan.name, config, objective=probed, fork=folder / plan.prefix / CHECKPOINT_NAME)


def table_of(runs: list[tuple[Plan, list[dict[str, Any]]]]) -> pd.DataFrame:
    """One row per run and epoch with prototypes, as the rules read it."""
    import pandas as pd
    from notes_verdict import COLUMNS

    rows = [{**vars(plan), **row} for plan, rows in runs for row in rows if row["clusters"] is not None]
    return pd.DataFrame(rows).reindex(columns=[*COLUMNS, "grew", "growth_reason"])


def machine() -> str:
    """Processor, number of cores and versions."""
    import torch

    return f"{os.cpu_count()} cores of an {cpu_model()}, 1 thread, no GPU used, torch {torch.__version__}"


def main() -> int:
    """The command line; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="SOURCE", help="labelled images (default: those of the preset)")
    parser.add_argument("--preset", default="embedded", choices=presets.names(), help="augmentation and size of them")
    parser.add_argument("--subset", type=float, default=1.0, help="part of the training images (default: all)")
    parser.add_argument("--width", type=int, default=16, help="of the convnet (default: %(default)s)")
    parser.add_argument("--only", default="ABCDEF", help="observations, by letter (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/notes"), help="where runs are kept")
    parser.add_argument("--charts", type=Path, help="where the charts go (default: the results folder)")
    parser.add_argument("--name", default="notes", help="what the charts' names begin with (default: %(default)s)")
    options = parser.parse_args()
    try:
        return replay(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except ValidationError as error:
        for problem in validation_problems(error, Config):
            print(f"these options do not fit: {problem.text}", file=sys.stderr)
        return 2


def replay(options: argparse.Namespace) -> int:
    """Train what is missing, judge and draw; the exit status."""
    unknown = set(options.only) - set("ABCDEF")
    if unknown or not options.only or options.seeds < 1:
        raise UserError(f"--only {options.only} --seeds {options.seeds}: letters of ABCDEF, and at least one seed")
    import notes_plots
    from notes_rules import verdicts

    from hpcl.data import load

    base = base_config(options)
    data = load(base.data)
    print(f"{data.describe()}\n{machine()}", flush=True)
    if len(data.classes) < 2:
        raise UserError(f"{data.source}: has no labels, but the observations are of the number of classes")
    wanted = list(plans(options.only, options.seeds))
    runs = []
    for number, plan in enumerate(wanted, 1):
        begun = time.perf_counter()
        rows = train(plan, base, len(data.train), options.results)
        runs.append((plan, rows))
        took = time.perf_counter() - begun
        print(f"{number} of {len(wanted)}: {plan.name}, {rows[-1]['state']}, {took:.0f} s", flush=True)
    table = table_of(runs)
    table.to_csv(options.results / "runs.csv", index=False)
    cost = read_object(options.results / "cost.json")
    spent = [sum(run[what] for run in cost.values()) / 60 for what in ("cpu", "wall")]
    found = [str(verdict) for verdict in verdicts(table, BATCHES, len(data.classes))]
    about = f"{len(cost)} runs, {spent[0]:.1f} CPU-minutes, {spent[1]:.1f} minutes"
    text = "\n".join([data.describe(), machine(), about, "", *found, ""])
    write_text(options.results / "verdicts.txt", text)
    print(f"\n{text}")

    for file in notes_plots.write(table, BATCHES, len(data.classes), options.charts or options.results, options.name):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
