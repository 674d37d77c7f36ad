"""The methods side by side under one budget and one protocol: accuracy, seconds and memory of each, over seeds.

    python benchmarks/methods.py                                          # the five on the embedded digits, 3 seeds
    python benchmarks/methods.py --novel-classes 5 --set moco.queue=896   # few-shot as well
    python benchmarks/methods.py --data PATH/cifar10 --preset cifar --set data.subset=0.2 --methods moco hpcl --seeds 5
    python benchmarks/methods.py --arm hpcl --arm "hpcl head.kind=v1" --arm "hpcl clusters.features=bank"

An arm is a method and the fields in which it differs; `--methods` are arms that differ in nothing else. Prints means
± sd over seeds of what `hpcl evaluate` measures on test images with frozen backbone features (docs/downstream.md),
beside the same network with the random weights that it starts from. Then each arm minus the first one, paired by seed
(same initial backbone, order of images and episodes), with the 95 % t-interval of the mean: of seeds alone, other test
images would move it further. Finished runs stay in the results folder, and a second call takes them from there.

    kNN                k = 200, T = 0.1
    ridge, logistic    linear probes; their penalties are chosen on val images
    1-shot             5-way, nearest centroid, of classes that training never saw (--novel-classes, or the source's)
    CPU s              of training, all threads; every run has a process of its own
    clusters, meters   their shares of the epochs' wall seconds; all runs have the meters, and no method needs them
    MB, own            peak resident memory of the process up to the end of training; without the libraries
    rank               effective rank of the embeddings of fixed views, 1 to model.dim; 1 is collapse

Equal for all arms: images, epochs, batch, backbone, augmentation, momentum and weight decay, temperature T, tasks.
NOT equal:
- Passes through the network for an image and epoch: one with gradient and one without (moco, hpcl, pcl, hcsc; with
  clusters one more without, unless `clusters.features=bank`), two with gradient (simclr). So look at the seconds.
- hpcl trains in five stages, two of them its MLP alone (10 of the notes' 150 epochs), each with a schedule of its own;
  the others train everything with one cosine over all epochs, at the learning rate of stage 1.
- Negatives: the queue, or the other views in the batch (simclr). Heads and where they sit: METHODS in hpcl/methods.py.
- Counts of clusters: hpcl's grow from `clusters.first`; pcl and hcsc get N/50, half and a quarter of it (N training
  images, rounded down, at least 2), unless `clusters.counts` is set. A rule, not a choice by result; their papers'
  finest counts are N/13 and N/430 of ImageNet.
- No method's learning rate or temperature was tuned for the images; the defaults are MoCo's for CIFAR-10.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcl import presets
from hpcl.analysis.text import aligned, counted
from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.files import atomic_path, read_object
from hpcl.methods import METHODS, reads
from hpcl.search.machine import cpu_model
from hpcl.stages import make_plan, total_epochs
from hpcl.yamlio import Tree, assignment, did_you_mean, dump, parse, replaced, write

HERE = Path(__file__).resolve().parent
IMAGES_OF_A_CLUSTER = 50
"""Mean size of the finest clusters where the counts are fixed."""
EQUAL = ("data", "augment", "model.backbone", "model.width", "model.stem", "optimizer.batch")
"""Fields in which no arm may differ, besides the epochs."""
TITLES = {("knn", 0): "kNN", ("linear", 0): "ridge", ("linear", 1): "logistic", ("fewshot", 0): "1-shot"}
"""Which of a task's settings are shown, by their place, and as what."""

Measured = dict[str, Any]
"""What method_run.py writes."""


@dataclass(frozen=True)
class Arm:
    """A method, and the fields that differ."""

    text: str
    config: Config
    untrained: bool = False

    def folder(self, results: Path, seed: int) -> Path:
        """Where a run of it stays: a name for the eye, and a hash of all that determines it."""
        what = dump(self.config.model_copy(update={"seed": seed}))
        if self.untrained:  # one for all arms
            what = dump({"seed": seed, "data": self.config.data.model_dump(), "model": self.config.model.model_dump()})
        name = re.sub(r"[^a-z0-9.]+", "-", self.text.lower()).strip("-")[:80]
        return results / f"{name}-seed{seed}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """The arms that the command line names, in its order.

    Raises:
        UserError: a method or field that is none, a field the method does not read, or another budget.
    """
    shared = [("--set", text) for text in options.set]
    shared += [("--data", f"data.source={options.data}")] if options.data else []
    shared += [("--epochs", f"stages.total={options.epochs}")] if options.epochs is not None else []
    shared += [("--novel-classes", f"data.novel_classes={options.novel_classes}")] if options.novel_classes else []
    preset = options.preset or ("cifar" if options.data else "embedded")
    arms, problems = [], []
    for text in options.arm or options.methods or METHODS:
        try:
            arms.append(_arm(text, presets.tree(preset), shared, "--arm" if options.arm else "--methods"))
        except UserError as error:
            problems += [line for line in str(error).splitlines() if line not in problems]
    if options.arm and options.methods:
        problems.append("--arm and --methods: give one of them, arms say their method themselves")
    if options.seeds < 1:
        problems.append(f"--seeds is {options.seeds}, but must be 1 or more")
    if options.out and options.out.suffix != ".parquet":
        problems.append(f"--out is {options.out}, but must end with .parquet, which it is")
    names = [arm.text for arm in arms]
    problems += [f"{name}: is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    problems = problems or [problem for arm in arms[1:] for problem in _budget_problems(arms[0], arm)]
    if problems:
        raise UserError(*problems)
    return arms


def _arm(text: str, tree: Tree, shared: Sequence[tuple[str, str]], flag: str) -> Arm:
    try:
        name, *own = shlex.split(text) or [""]
    except ValueError as error:
        raise UserError(f"{flag} {text}: {error}") from None
    if name not in METHODS:
        raise UserError(f"{flag} {text}: must begin with one of {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
    values = {}
    for where, given in (*shared, *((f"{flag} {text}", given) for given in own)):
        path, value = assignment(given, where)
        if path in ("seed", "method"):
            raise UserError(f"{where}: {path} is not set here, but with {'--seeds' if path == 'seed' else '--arm'}")
        if given in own and not reads(name, path):
            raise UserError(f"{where}: {name} does not read {path}")
        values[path] = (where, value)
    return Arm(" ".join([name, *own]), replaced(parse(Config, Tree({**tree.value, "method": name})), values))


def _budget_problems(first: Arm, arm: Arm) -> list[str]:
    problems = [
        f"{arm.text}: {path} differs from that of {first.text}, but must be the same for all; give it with --set"
        for path in EQUAL
        if arm.config.at(path) != first.config.at(path)
    ]
    ours, theirs = (total_epochs(make_plan(each.config)) for each in (arm, first))
    if ours != theirs:
        problems.append(f"{arm.text}: has {ours} epochs and {first.text} {theirs}, but the budget must be the same")
    return problems


def fixed_counts(num_images: int) -> tuple[int, ...]:
    """Counts of clusters, coarse to fine, where they do not grow: a quarter, half and all of N/50.

    >>> fixed_counts(4050)
    (20, 40, 81)
    """
    finest = max(2, num_images // IMAGES_OF_A_CLUSTER)
    return tuple(sorted({max(2, finest // part) for part in (1, 2, 4)}))


def fitted(arms: Sequence[Arm]) -> tuple[list[Arm], str]:
    """The arms with their counts of clusters, and a line about the images.

    Raises:
        UserError: an arm does not fit the images, or they have no labels to measure by.
    """
    from method_run import bench_of  # torch, which the command line's mistakes need not wait for

    from hpcl.data import load
    from hpcl.data_rules import data_problems
    from hpcl.downstream.tasks import refusal

    images = load(arms[0].config.data)
    bench = bench_of(arms[0].config, images, None)
    problems = [reason for task in ("knn", "linear") if (reason := refusal(task, bench))]
    found = []
    for arm in arms:
        method, config = METHODS[arm.config.method], arm.config
        if method.prototypes and not method.grows and config.clusters.counts is None:
            config = config.with_values({"clusters.counts": fixed_counts(len(images.train))})
        problems += [f"{arm.text}: {problem}" for problem in data_problems(config, len(images.train))]
        found.append(Arm(arm.text, config))
    if problems:
        raise UserError(*problems)
    return found, images.describe()


def run(arm: Arm, seed: int, results: Path) -> Measured:
    """What a run of an arm came to, out of its folder or from a process of its own.

    Raises:
        UserError: the process failed; it has said why.
    """
    folder = arm.folder(results, seed)
    file = folder / "measured.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "config.yaml", arm.config.model_copy(update={"seed": seed}))
        command = [sys.executable, str(HERE / "method_run.py"), str(folder)]
        done = subprocess.run([*command, "--untrained"] if arm.untrained else command)
        if done.returncode:
            raise UserError(
                f"{arm.text}, seed {seed}: the process ended with {done.returncode}; its folder is {folder}"
            )
    return read_object(file)


# ---------------------------------------------------------------- what is printed


def values_of(runs: Sequence[Measured]) -> list[dict[str, float]]:
    """Per run its shown scores by title."""
    found = []
    for measured in runs:
        by_task: dict[str, list[float]] = {}
        for score in measured["scores"]:
            by_task.setdefault(score["task"], []).append(score["value"])
        found.append({title: by_task[task][i] for (task, i), title in TITLES.items() if i < len(by_task.get(task, []))})
    return found


def table(found: dict[str, list[Measured]]) -> list[str]:
    """Lines: a row per arm with its accuracies and costs."""
    titles = _titles(found)
    gpu = any(each["gpu_memory"] for runs in found.values() for each in runs)
    rows = [["", *titles, "CPU s", "wall s", "clusters", "meters", "MB", "own", *(["GPU MB"] if gpu else []), "rank"]]
    for name, runs in found.items():
        values = values_of(runs)
        row = [name, *(_spread([each[title] for each in values if title in each], 3) for title in titles)]
        trained = [each for each in runs if each["state"] != "untrained"]
        if trained:
            wall = sum(each["wall"] for each in trained)
            row += [_spread([each[key] for each in trained], 0) for key in ("cpu", "wall")]
            row += [f"{sum(each[key] for each in trained) / wall:.0%}" for key in ("wall_cluster", "wall_meters")]
            known = [each for each in trained if each["memory"] is not None]
            row += [_spread([each["memory"] for each in known], 0)]
            row += [_spread([each["memory"] - each["memory_before"] for each in known], 0)]
            row += (
                [_spread([each["gpu_memory"] for each in trained if each["gpu_memory"] is not None], 0)] if gpu else []
            )
            row.append(_spread([each["effective_rank"] for each in trained if each["effective_rank"]], 1))
        diverged = [each["seed"] for each in runs if each["state"] == "diverged"]
        row += [""] * (len(rows[0]) - len(row))
        rows.append([*row[:-1], f"{row[-1]} diverged: seed {', '.join(map(str, diverged))}" if diverged else row[-1]])
    return aligned(rows)


def differences(found: dict[str, list[Measured]]) -> list[str]:
    """Lines: each trained arm minus the first, paired by seed, with the 95 % t-interval; none for one arm."""
    trained = {name: values_of(runs) for name, runs in found.items() if runs[0]["state"] != "untrained"}
    if len(trained) < 2:
        return []
    first, *others = trained
    titles = _titles(found)
    rows = [[f"minus {first} [95 %]", *titles]]
    for name in others:
        pairs = list(zip(trained[name], trained[first], strict=True))
        rows.append([name, *(_difference([a[t] - b[t] for a, b in pairs if t in a and t in b]) for t in titles)])
    return aligned(rows)


def _difference(values: Sequence[float]) -> str:
    from scipy import stats

    if len(values) < 2:
        return _signed(values[0]) if values else ""
    mean, half = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    half *= float(stats.t.ppf(0.975, len(values) - 1))
    return f"{_signed(mean)} [{_signed(mean - half)}, {_signed(mean + half)}]"


def _titles(found: dict[str, list[Measured]]) -> list[str]:
    return [t for t in TITLES.values() if any(t in values for runs in found.values() for values in values_of(runs))]


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {_number(statistics.stdev(values), digits)}" if len(values) > 1 else ""
    return _number(statistics.mean(values), digits) + spread


def _number(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return text.removeprefix("0") if digits == 3 else text  # accuracies without the zero before the point


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:+.3f}"


def machine(found: dict[str, list[Measured]]) -> str:
    """Where it ran, as one line."""
    import torch

    every = [each for runs in found.values() for each in runs if each["state"] != "untrained"]
    parts = [
        f"{cpu_model()} with {os.cpu_count()} cores",
        *{each["device"] for each in every if each["device"] != "cpu"},
        f"threads {'/'.join(map(str, sorted({each['threads'] for each in every})))}",
        f"load {min(each['load'] for each in every):.1f} to {max(each['load'] for each in every):.1f}",
        f"torch {torch.__version__}, Python {platform.python_version()}",
        f"hpcl {'/'.join(sorted({each['version'] for each in every}))}",
    ]
    return "; ".join(parts)


def write_rows(out: Path, found: dict[str, list[Measured]]) -> None:
    """One row per run: arm, seed, shown scores, costs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"arm": name, **{key: value for key, value in run.items() if key != "scores"}, **values}
        for name, runs in found.items()
        for run, values in zip(runs, values_of(runs), strict=True)
    ]
    with atomic_path(out) as path:
        pq.write_table(
            pa.Table.from_pylist(
                rows, pa.unify_schemas([pa.Table.from_pylist([r]).schema for r in rows], promote_options="permissive")
            ),
            path,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="SOURCE", help="labelled images; default: the embedded digits")
    parser.add_argument("--preset", help="what all arms begin with (default: embedded, with --data cifar)")
    parser.add_argument("--set", metavar="PATH=VALUE", nargs="+", action="extend", default=[], help="for all arms")
    parser.add_argument("--methods", nargs="+", help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--arm", action="append", help="a method and fields that differ, in quotes; several times")
    parser.add_argument("--epochs", type=int, help="of every run, the stages scaled (default: the preset's)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm, seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument("--novel-classes", type=int, metavar="N", help="classes kept out of training, for few-shot")
    parser.add_argument("--results", type=Path, default=Path("results/methods"), help="folder of the runs")
    parser.add_argument("--out", type=Path, metavar="FILE.parquet", help="also write a row per run")
    options = parser.parse_args(arguments)
    try:
        arms, about = fitted(arms_of(options))
        every = [Arm("untrained", arms[0].config, untrained=True), *arms]
        found: dict[str, list[Measured]] = {arm.text: [] for arm in every}
        for seed in range(options.seeds):  # arms in turn, so that what else the machine does falls on all alike
            for arm in every:
                measured = run(arm, seed, options.results)
                found[arm.text].append(measured)
                shown = "  ".join(f"{title} {value:.3f}" for title, value in values_of([measured])[0].items())
                print(
                    f"{arm.text}, seed {seed}: {measured['state']}  {shown}  {measured['cpu']:.0f} CPU s",
                    file=sys.stderr,
                    flush=True,
                )
        if options.out:
            write_rows(options.out, found)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {options.results}", file=sys.stderr)
        return 130
    config = arms[0].config
    print(about)
    print(
        f"{total_epochs(make_plan(config))} epochs, batch {config.optimizer.batch}, {config.model.backbone}, "
        f"{counted(options.seeds, 'seed')}; {machine(found)}\n"
    )
    print("\n".join(table(found)))
    if compared := differences(found):
        print("\n" + "\n".join(compared))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
