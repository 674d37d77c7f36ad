"""What a trial costs besides its epochs: plain Tune, Ray Train in Tune, and this project, side by side.

    python benchmarks/overhead.py                    # 2 trials of 10 epochs of 1 s each: about 5 minutes on 2 cores
    python benchmarks/overhead.py --only hpcl-1 hpcl-2

One trial at a time; an epoch is a sleep, and with two workers also the sum of one number over the ranks. Each
line runs in a process and a Ray of its own, with the settings that Ray comes with, except for `hpcl`:

    Tune                a function that calls `tune.report`
    Tune, reuse         the same with `reuse_actors=True`
    Train in Tune       a `TorchTrainer` in a Tune function with a `TuneReportCallback`, as Ray's guide shows it
    hpcl                `hpcl.search.run`

    first step          seconds from the start of the search (Ray runs already) to the first epoch's first step
    next                seconds from the end of a trial's last epoch to the first step of the next trial, median
    report              seconds for which a report blocks rank 0, median; a worker that waits for its poll counts
    whole               time of the whole search over that of its epochs, minus 1
    first, later        what the first and a later trial lose of 50 epochs of 1 s: (start + 50 reports) / 50 s.
                        Ray Train's report waits out the rest of a 2-second poll, so take --seconds 1 for it
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

EPOCHS_OF_TARGET = 50
LINES: dict[str, str] = {
    "tune": "Tune",
    "reuse": "Tune, reuse",
    "train-1": "Train in Tune, 1 worker",
    "train-2": "Train in Tune, 2 workers",
    "hpcl-1": "hpcl, 1 worker",
    "hpcl-2": "hpcl, 2 workers",
}
CPUS_OF_A_WORKER = 0.9
"""Two workers and the trial beside them fit on 2 cores."""

Report = Callable[[dict[str, Any]], None]


def epochs(marks: str, trial: str, options: dict[str, Any], report: Report) -> None:
    """Train: sleep, report, and note the times on rank 0."""
    import torch  # which any trainer needs before its first step

    rank, ranks = 0, 1
    if torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for epoch in range(1, options["epochs"] + 1):
        if ranks > 1:
            torch.distributed.all_reduce(torch.ones(1))
        times = [time.time()]
        time.sleep(options["seconds"])
        times.append(time.time())
        report({"epoch": epoch, "acc_proto_ref": 0.5})
        times.append(time.time())
        if rank == 0:
            with open(marks, "a") as file:
                file.write(json.dumps([trial, *times]) + "\n")


# ---------------------------------------------------------------- one line each


def plain_tune(options: dict[str, Any], marks: str, folder: Path, reuse: bool) -> float:
    """Plain Tune; the seconds of the search."""
    import ray
    from ray import tune

    def trial(config: dict[str, Any]) -> None:
        epochs(marks, tune.get_context().get_trial_id(), options, tune.report)

    ray.init(log_to_driver=False)
    tuner = tune.Tuner(
        trial,
        tune_config=tune.TuneConfig(num_samples=options["trials"], max_concurrent_trials=1, reuse_actors=reuse),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    return timed(tuner.fit, marks)


def train_in_tune(options: dict[str, Any], marks: str, folder: Path, workers: int) -> float:
    """Ray Train in a Tune function, as in Ray's guide "Hyperparameter Tuning with Ray Tune"."""
    import ray
    from ray import train, tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    def work(config: dict[str, Any]) -> None:
        epochs(marks, config["trial"], options, train.report)

    def trial(config: dict[str, Any]) -> None:
        name = tune.get_context().get_trial_id()
        trainer = TorchTrainer(
            work,
            train_loop_config={"trial": name},
            scaling_config=train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": CPUS_OF_A_WORKER}),
            run_config=train.RunConfig(
                name=name,
                storage_path=str(folder / "train"),
                callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            ),
        )
        trainer.fit()

    ray.init(log_to_driver=False)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 0.01}),
        tune_config=tune.TuneConfig(num_samples=options["trials"], max_concurrent_trials=1),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    return timed(tuner.fit, marks)


SPACE = """
base: {{preset: embedded, stages: {{total: {epochs}}}}}
space:
  moco.temperature: {{float: [0.1, 1.0]}}
search: {{trials: {trials}, grace: null, sampler: random, max_concurrent: 1}}
resources: {{workers: {workers}, cpus_per_worker: {cpus}, gpus_per_worker: 0}}
"""


def ours(options: dict[str, Any], marks: str, folder: Path, workers: int) -> float:
    """This project's search, with `epochs` in the place of its trainer."""
    import hpcl.search
    from hpcl.results import EPOCH_COLUMNS
    from hpcl.search.cluster import connected
    from hpcl.search.space import from_tree
    from hpcl.yamlio import read_tree

    def train(config: Any, folder: Path, *, report: Report, **others: Any) -> None:
        def full(row: dict[str, Any]) -> None:
            last = row["epoch"] == options["epochs"]
            others = {"stage": 1, "state": "finished" if last else "running", "objective": 0.5 if last else None}
            report({**{column.name: None for column in EPOCH_COLUMNS}, **row, **others, "seconds": 0.1})

        epochs(marks, folder.name, options, full)

    text = SPACE.format(workers=workers, cpus=CPUS_OF_A_WORKER, **options)
    space = from_tree(read_tree(text), name="overhead")
    with connected(None, workers=workers):
        return timed(lambda: hpcl.search.run(space, results=folder, train=train, say=lambda line: None), marks)


def timed(search: Callable[[], Any], marks: str) -> float:
    """Run a search; its seconds. The time at which it began is the first line of the marks."""
    began = time.time()
    with open(marks, "a") as file:
        file.write(json.dumps(["", began]) + "\n")
    search()
    return time.time() - began


def measure(line: str, options: dict[str, Any], marks: str, folder: Path) -> float:
    """Run the search of one line in this process."""
    if line in ("tune", "reuse"):
        return plain_tune(options, marks, folder, line == "reuse")
    kind, workers = line.split("-")
    return (train_in_tune if kind == "train" else ours)(options, marks, folder, int(workers))


# ---------------------------------------------------------------- the table


def read_marks(path: Path) -> tuple[float, list[list[list[float]]]]:
    """When the search began, and per trial, in order, the three times of each epoch."""
    (_, began), *marks = [json.loads(line) for line in path.read_text().splitlines()]
    trials: dict[str, list[list[float]]] = {}
    for trial, *times in marks:
        trials.setdefault(trial, []).append(times)
    return began, sorted(trials.values())


def row_of(line: str, whole: float, began: float, trials: list[list[list[float]]], options: dict[str, Any]) -> str:
    """One line of the table."""
    first = trials[0][0][0] - began
    following = [after[0][0] - before[-1][2] for before, after in pairwise(trials)]
    report = median(reported - trained for times in trials for _, trained, reported in times)
    lost = whole / (options["trials"] * options["epochs"] * options["seconds"]) - 1
    numbers = f"{first:8.1f} s {median(following):8.2f} s {1000 * report:7.1f} ms {lost:8.1%}"
    shares = [(start + EPOCHS_OF_TARGET * report) / EPOCHS_OF_TARGET for start in (first, median(following))]
    return f"{LINES[line]:26}{numbers} {shares[0]:8.1%} {shares[1]:8.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--epochs", type=int, default=10, help="epochs of a trial, at least 5 (default: 10)")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of an epoch (default: 1)")
    parser.add_argument("--trials", type=int, default=2, help="trials, at least 2 (default: 2)")
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES), help="lines of the table")
    parser.add_argument("--marks", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.epochs < 5 or chosen.trials < 2 or chosen.seconds <= 0:
        parser.error("--epochs must be >= 5, --trials >= 2 and --seconds > 0")
    options = {name: getattr(chosen, name) for name in ("epochs", "seconds", "trials")}
    if chosen.marks:
        print(measure(chosen.only[0], options, chosen.marks, Path(chosen.marks).parent))
        return
    from ray import __version__

    print(f"{options['trials']} trials of {options['epochs']} x {options['seconds']:g} s, one at a time")
    print(f"ray {__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the first line")
    print(f"{'':26}{'first step':>10} {'next':>10} {'report':>10} {'whole':>8} {'first':>8} {'later':>8}")
    for line in chosen.only:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            marks = Path(folder) / "marks.jsonl"
            arguments = [f"--{name}={value}" for name, value in options.items()]
            done = subprocess.run(
                [sys.executable, __file__, *arguments, "--only", line, "--marks", str(marks)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(f"{LINES[line]}: {done.stderr[-3000:]}")
            whole = float(done.stdout.split()[-1])
            load = f"   (load {os.getloadavg()[0]:.1f})"
            print(row_of(line, whole, *read_marks(marks), options) + load, flush=True)


if __name__ == "__main__":
    main()
