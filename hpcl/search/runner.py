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

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import FIFOScheduler

from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.search import space as spaces
from hpcl.search.asha import CurveASHA
from hpcl.search.check import space_problems
from hpcl.search.cluster import connected, logged_to
from hpcl.search.plan import DRIVER_CPUS, Node, Plan, make_plan, results_folder
from hpcl.search.progress import Follow, say
from hpcl.search.record import Record
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
    chosen_by: str
    """What the best trial is best in: `linear probe`, or the name of a curve."""
    seconds: float
    interrupted: bool
    """Whether the search was cut short (Ctrl-C or SIGTERM)."""

    def count(self, state: str) -> int:
        """Trials in a state."""
        return sum(1 for trial in self.trials if trial["state"] == state)

    @property
    def states(self) -> dict[str, int]:
        """State -> trials in it; those that were cut short are `running`."""
        return {state: self.count(state) for state in ("finished", "stopped", "failed", "diverged", "running")}


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
        train: what trains a trial, with the arguments of :func:`hpcl.trainer.fit` (the default).
        backbone: makes your own module, (b, C, H, W) -> (b, F), in each trial.
        say: prints one line.

    Raises:
        UserError: the folder exists, no cluster answers, it has no room for one trial, or
            the data do not fit; then nothing was written.
    """
    if not isinstance(space, Space):
        space = spaces.load(space)
    folder = results_folder(space, name, results)
    space = with_full_path(space)
    if train is None:
        say(look_at_data(space))
    say("starting Ray ..." if address is None else f"connecting to Ray at {address} ...")
    with connected(address, workers=space.resources.workers) as nodes:
        machines = [Node(n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0)) for n in nodes]
        plan = make_plan(space, machines, cluster=address or "this machine", folder=folder)
        each = f"{space.resources.workers} x {plan.concurrency.cpus_per_worker:g} CPUs"
        each += f" + {plan.concurrency.gpus_per_worker:g} GPUs" if plan.concurrency.gpus_per_worker else ""
        say(f"search {folder.name}: {space.search.trials} trials, {plan.concurrency.trials} at a time ({each} each)")
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made ({error.strerror}); choose another with --results or --name"
            ) from None
        write(folder / "space.yaml", space.to_tree(), f"The space as it was searched in {folder.name}.")
        own = None if backbone is None else getattr(backbone, "__name__", type(backbone).__name__)
        record = Record(plan, nodes, own)
        record.write("running")
        if train is None:
            from hpcl.trainer import fit

            train = fit
        try:
            tables, interrupted = _search(plan, train, backbone, say)
        except BaseException:
            record.write("failed")
            raise
        found = _conclude(plan, tables, record.seconds, interrupted, own)
        record.write("interrupted" if interrupted else "finished", found)
    return found


def with_full_path(space: Space) -> Space:
    """The space with the full path of its images: other machines, and `best.yaml` in another folder, find them too."""
    source = Path(space.base.data.source).expanduser()
    if space.base.data.source == "mnist5k" or not source.exists():
        return space
    return replace(space, base=space.base.with_values({"data.source": str(source.resolve())}))


def look_at_data(space: Space) -> str:
    """Load the base's images once, so that trials find them decoded; a line that says what they are.

    Raises:
        UserError: the images cannot be read, or what the space asks for does not fit them.
    """
    from hpcl.data import load

    images = load(space.base.data)
    problems = space_problems(space, rules=True, images=len(images.train))
    if images.labels is None or not len(images.val):
        problems += [
            f"{space.tree.where(('search', name))}: search.{name} is {value}, but there are no validation images "
            "with labels to measure it on; choose another"
            for name, value in (("metric", space.search.metric), ("objective", space.search.objective))
            if value in ("knn", "linear")
        ]
    if problems:
        raise UserError(*(f"{images.source}: {problem}" for problem in problems))
    return images.describe()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the search as Ctrl-C does; afterwards both act as before, for Tune leaves its own handler."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    follow = Follow(tables, plan, reasons, sampler.numbers, say=say)
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
            # Not Tune's CSV: its columns are those of the first row, which has no clusters yet.
            callbacks=[follow, JsonLoggerCallback()],  # type: ignore[no-untyped-call]
        ),
    )
    try:
        with logged_to(folder / "ray.log"), _ended_by_signals():
            tuner.fit()
    except KeyboardInterrupt:
        return tables, True
    finally:
        tables.write()
    # Tune takes the first Ctrl-C itself and returns as if all were done.
    return tables, len(tables.trials) < search.trials or tables.count("running") > 0


def _trial_id(trial: Any) -> str:
    return str(trial.trial_id)


def _conclude(plan: Plan, tables: Tables, seconds: float, interrupted: bool, backbone: str | None) -> Found:
    """Choose the best trial and write ``best.yaml``."""
    best_trial = tables.best()
    best = plan.space.config_for(tables.values[best_trial["trial_id"]]) if best_trial else None
    trials = sorted(tables.trials.values(), key=lambda trial: trial["number"])
    found = Found(plan.folder, trials, tables.epochs, best_trial, best, tables.chosen_by(), seconds, interrupted)
    if best_trial and best:
        write(plan.folder / "best.yaml", best, _header(plan.space, found, best_trial, backbone))
    return found


def _header(space: Space, found: Found, best: Row, backbone: str | None) -> str:
    states = ", ".join(f"{count} {state}" for state, count in found.states.items() if count)
    values = {found.chosen_by: best["objective"], space.search.metric: best.get("metric")}
    measured = ", ".join(f"{name} {value:.6g}" for name, value in values.items() if value is not None)
    use = "Train it: hpcl train best.yaml"
    if backbone:
        use = f"Found with a backbone of your own ({backbone}). Train it: hpcl.fit(config, folder, backbone=...)"
    return (
        f"Best of the {found.count('finished')} finished trials of search {found.folder.name}: trial "
        f"{best['trial_id']} (number {best['number']}).\n"
        f"After {best['epochs']} epochs: {measured}.\n"
        f"The search: {len(found.trials)} trials ({states}), sampler seed {space.search.seed}; "
        f"written {time.strftime('%Y-%m-%d %H:%M:%S')}.\n{use}"
    )


def first_error(found: Found) -> str | None:
    """The text of the first failed trial's ``error.txt``."""
    for trial in found.trials:
        path = found.folder / "trials" / trial["trial_id"] / ERROR_FILE
        if trial["state"] == "failed" and path.is_file():
            text: str = path.read_text(encoding="utf-8")
            return text
    return None
