"""A whole search: space in, results folder out.

results/<name>/
  space.yaml search.json     what was searched, with what, on what, when
  trials.parquet epochs.parquet   schemas in hpcl.results
  best.yaml                  the best configuration, for `hpcl train`
  trials/<id>/               config, log, TensorBoard events, checkpoint of a trial
  tune/                      Ray Tune's own experiment folder
  ray.log                    what Ray had to say
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback
from ray.tune.schedulers import FIFOScheduler

from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.results import write_text
from hpcl.search import facts
from hpcl.search import space as spaces
from hpcl.search.asha import CurveASHA
from hpcl.search.cluster import connected, logged_to
from hpcl.search.plan import DRIVER_CPUS, Node, Plan, make_plan
from hpcl.search.progress import Follow, say
from hpcl.search.sampler import TPESearch
from hpcl.search.space import Space
from hpcl.search.tables import Row, Tables
from hpcl.search.trial import ERROR_FILE, Job, TrainFunction, run_trial
from hpcl.yamlio import write

RETRIES = 1
"""Times a trial whose process broke off is tried again, from its checkpoint."""


@dataclass(frozen=True)
class Found:
    """What a search leaves behind."""

    folder: Path
    """``results/<name>``."""
    trials: list[Row]
    """Rows of ``trials.parquet``."""
    epochs: list[Row]
    """Rows of ``epochs.parquet``, in the order in which the scheduler saw them."""
    best_trial: Row | None
    """The best trial among those that finished their schedule."""
    best: Config | None
    """Its configuration."""
    seconds: float
    interrupted: bool
    """Whether the search was cut short (Ctrl-C)."""

    def count(self, state: str) -> int:
        """Trials in a state."""
        return sum(1 for trial in self.trials if trial["state"] == state)


def run(
    space: Space | str | Path,
    *,
    name: str | None = None,
    results: str | Path = "results",
    address: str | None = None,
    train: TrainFunction | None = None,
    backbone: Callable[[], Any] | None = None,
    say: Callable[[str], None] = say,
) -> Found:
    """Search a space; returns when all trials have ended.

    Args:
        space: a checked space or the path of a space file.
        name: name of the results folder; None: the space's name and the time.
        results: folder of all results.
        address: a running Ray cluster as in ``ray.init``; None: Ray starts on this machine.
        train: what trains a trial, with the arguments of :func:`hpcl.trainer.train` (the default).
        backbone: makes your own module, (b, C, H, W) -> (b, F), in each trial.
        say: prints one line.

    Raises:
        UserError: the folder exists, the cluster has no room for one trial, or the data
            do not fit; then nothing was written.
    """
    if not isinstance(space, Space):
        space = spaces.load(space)
    folder = free_folder(space, name, results)
    if train is None:
        say(look_at_data(space))
    with connected(address, workers=space.resources.workers) as nodes:
        machines = [Node(n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0)) for n in nodes]
        plan = make_plan(space, machines, cluster=address or "this machine", folder=folder)
        each = f"{space.resources.workers} x {plan.concurrency.cpus_per_worker:g} CPUs"
        each += f" + {plan.concurrency.gpus_per_worker:g} GPUs" if plan.concurrency.gpus_per_worker else ""
        say(f"search {folder.name}: {space.search.trials} trials, {plan.concurrency.trials} at a time ({each} each)")
        folder.mkdir(parents=True)
        write(folder / "space.yaml", space.to_tree(), f"The space as it was searched in {folder.name}.")
        record = Record(folder, space, plan, nodes)
        record.write("running")
        if train is None:
            from hpcl.trainer import train as trainer

            train = trainer
        try:
            tables, interrupted = _search(plan, train, backbone, say)
        except BaseException:
            record.write("failed")
            raise
        found = _conclude(space, plan, tables, record.seconds, interrupted)
        record.write("interrupted" if interrupted else "finished", found)
    return found


def free_folder(space: Space, name: str | None, results: str | Path) -> Path:
    """The results folder of a search to be, which must not exist yet.

    Raises:
        UserError: there is such a folder, or the name is none.
    """
    if name is not None:
        spaces.with_overrides(space, name=name)
    folder = Path(results).expanduser().resolve() / (name or f"{space.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists():
        raise UserError(
            f"{folder}: there are results of this name already; give another with --name, or remove the folder"
        )
    return folder


def look_at_data(space: Space) -> str:
    """Load the base's images once, so that trials find them decoded; a line that says what they are.

    Raises:
        UserError: the images cannot be read, or the base does not fit them.
    """
    from hpcl.config import data_problems
    from hpcl.data import load

    images = load(space.base.data)
    problems = data_problems(space.base, len(images.train), space.resources.workers)
    if problems:
        raise UserError(*(f"{images.source}: {problem}" for problem in problems))
    return images.describe()


def _search(
    plan: Plan, train: TrainFunction, backbone: Callable[[], Any] | None, say: Callable[[str], None]
) -> tuple[Tables, bool]:
    """Run all trials; the tables, and whether the search was cut short."""
    space, folder, room = plan.space, plan.folder, plan.concurrency
    search, workers = space.search, space.resources.workers
    job = Job(space, str(folder), train, backbone, workers, room.cpus_per_worker, room.gpus_per_worker)
    scheduler: Any = FIFOScheduler()  # type: ignore[no-untyped-call]
    if plan.rungs:
        scheduler = CurveASHA(
            search.metric, search.mode, epochs=space.epochs, grace=plan.rungs[0], factor=search.factor
        )
    sampler = TPESearch(space, plan.startup)
    tables = Tables(folder, space)
    reasons = getattr(scheduler, "reasons", {})
    follow = Follow(tables, folder, reasons, sampler.numbers, asked=search.trials, say=say)
    alone = {"cpu": room.cpus_per_worker, "gpu": room.gpus_per_worker}
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_trial, job=job),
            # Beside a worker group the trial itself only waits.
            alone if workers == 1 else {"cpu": DRIVER_CPUS},
        ),
        tune_config=tune.TuneConfig(
            search_alg=sampler,
            scheduler=scheduler,
            num_samples=search.trials,
            max_concurrent_trials=room.trials,
            reuse_actors=workers == 1,
            trial_dirname_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[follow, CSVLoggerCallback(), JsonLoggerCallback()],  # type: ignore[no-untyped-call]
        ),
    )
    try:
        with logged_to(folder / "ray.log"):
            tuner.fit()
    except KeyboardInterrupt:
        return tables, True
    finally:
        tables.write()
    # Tune takes the first Ctrl-C itself and returns as if all were done.
    return tables, len(tables.trials) < search.trials or tables.count("running") > 0


def _trial_id(trial: Any) -> str:
    return str(trial.trial_id)


def _conclude(space: Space, plan: Plan, tables: Tables, seconds: float, interrupted: bool) -> Found:
    """Choose the best trial and write ``best.yaml``."""
    best_trial, best = tables.best(), None
    trials = sorted(tables.trials.values(), key=lambda trial: trial["number"])
    found = Found(plan.folder, trials, tables.epochs, best_trial, None, seconds, interrupted)
    if best_trial is not None:
        best = space.config_for(tables.values[best_trial["trial_id"]])
        write(plan.folder / "best.yaml", best, _header(space, found, best_trial))
    return Found(plan.folder, trials, tables.epochs, best_trial, best, seconds, interrupted)


def _header(space: Space, found: Found, best: Row) -> str:
    states = ", ".join(f"{found.count(state)} {state}" for state in ("finished", "stopped", "failed", "diverged"))
    metric = f"; {space.search.metric} {best['metric']:.4g}" if best.get("metric") is not None else ""
    return (
        f"Best of the {found.count('finished')} finished trials of search {found.folder.name}: trial "
        f"{best['trial_id']} (number {best['number']}).\n"
        f"Objective ({space.search.objective}) {best['objective']:.6g}{metric}, after {best['epochs']} epochs.\n"
        f"The search: {len(found.trials)} trials ({states}), sampler seed {space.search.seed}; "
        f"written {time.strftime('%Y-%m-%d %H:%M:%S')}.\n"
        "Train it: hpcl train best.yaml"
    )


def first_error(found: Found) -> str | None:
    """The text of the first failed trial's ``error.txt``."""
    for trial in found.trials:
        path = found.folder / "trials" / trial["trial_id"] / ERROR_FILE
        if trial["state"] == "failed" and path.is_file():
            text: str = path.read_text(encoding="utf-8")
            return text
    return None


class Record:
    """``search.json``: what a search ran with, on and when."""

    def __init__(self, folder: Path, space: Space, plan: Plan, nodes: list[dict[str, Any]]) -> None:
        self._path, self._start = folder / "search.json", time.monotonic()
        self._facts: dict[str, Any] = {
            "name": folder.name,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seed": {"sampler": space.search.seed, "trials": space.base.seed},
            "trials_asked": space.search.trials,
            "trials_at_a_time": plan.concurrency.trials,
            "workers": space.resources.workers,
            "cpus_per_worker": plan.concurrency.cpus_per_worker,
            "gpus_per_worker": plan.concurrency.gpus_per_worker,
            "metric": space.search.metric,
            "mode": space.search.mode,
            "objective": space.search.objective,
            "rungs": list(plan.rungs),
            "factor": space.search.factor,
            "data": space.base.data.source,
            "versions": facts.versions(),
            "commit": facts.commit(),
            "hardware": facts.hardware(nodes),
        }

    @property
    def seconds(self) -> float:
        """Since the search began."""
        return time.monotonic() - self._start

    def write(self, state: str, found: Found | None = None) -> None:
        """Write the file: `state` is running, finished, interrupted, or failed (a bug)."""
        self._facts["state"] = state
        if found is not None:
            states = ("finished", "stopped", "failed", "diverged", "running")
            self._facts |= {
                "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "seconds": round(self.seconds, 1),
                "trials": {name: found.count(name) for name in states},
                "epochs": len(found.epochs),
                "best": found.best_trial and found.best_trial["trial_id"],
            }
        write_text(self._path, json.dumps(self._facts, indent=2) + "\n")
