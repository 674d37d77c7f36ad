"""What runs inside a Tune trial: Ray Train around the trainer, its rows on their way to Tune.

One worker: Ray Train's in-process mode (``num_workers=0``). Tune reuses the process,
so the next trial starts in well under a second.

Several workers: a worker group (:mod:`hpcl.search.lean`). Every epoch rank 0 hands its
row to the trial and all ranks wait for Tune's answer, so a stopped trial trains no epoch
beyond the one it was stopped at.

A trial's folder is ``trials/<trial id>/`` whatever process runs it (:mod:`hpcl.search.work`):
a retry of the same trial finds the checkpoint there and goes on. A prefix that trials share
is trained in the same way, up to the end of its last stage.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray import train as ray_train
from ray import tune
from ray.train.torch import TorchTrainer

from hpcl.config import Config
from hpcl.errors import StorageError, TakenOver, UnreadableCheckpoint, UserError
from hpcl.files import write_text
from hpcl.runlog import write_hparams
from hpcl.search.failures import machine_lost, out_of_memory_advice, repeated
from hpcl.search.lean import run_group
from hpcl.search.places import place, told
from hpcl.search.plan import Concurrency
from hpcl.search.space import Space
from hpcl.search.storage import drop, fetch, push, remove
from hpcl.search.work import begin, bring, keep, see, set_aside, unreported
from hpcl.validation import validation_problems

Row = dict[str, Any]
TrainFunction = Callable[..., Any]
"""``train(config, folder, *, report, objective, backbone, fork, until_stage)``, as :func:`hpcl.trainer.fit`; its
result is not used."""

ERROR_FILE = "error.txt"
"""In a failed trial's folder: the error's first line, the epoch it came after, then the traceback of a bug."""
STORAGE = "storage"
"""`state` that a trial reports which cannot save; `reason` says why. The search then ends, to be gone on with."""


@dataclass(frozen=True)
class Job:
    """What all trials of a search share."""

    space: Space
    train: TrainFunction
    backbone: Callable[[], Any] | None
    room: Concurrency

    @property
    def workers(self) -> int:
        """Processes that train a trial together."""
        return self.space.resources.workers

    @property
    def cpus(self) -> float:
        """CPUs of one worker."""
        return self.room.cpus_per_worker

    @property
    def gpus(self) -> float:
        """GPUs of one worker."""
        return self.room.gpus_per_worker


def run_trial(given: dict[str, Any], job: Job) -> None:
    """Train one sampled configuration, or a prefix; the function Tune calls.

    A user's mistake (data that do not fit the configuration), memory that does not suffice and an
    error that came back at the same epoch end the trial as failed at once: another try would
    meet it again. Any other exception is raised, so that Tune tries again in a fresh process.
    Where nothing can be saved the trial has not failed: it goes on when the search does.

    Args:
        given: see :class:`hpcl.search.queue.WorkQueue`.
        job: what all trials share.
    """
    tune.report({"begun": True})  # whose process this is: a trial that hangs is killed from outside
    try:
        _run(given, job)
    except StorageError as error:
        tune.report({"state": STORAGE, "reason": str(error)})
    except TakenOver:  # nobody listens to this process any more
        pass
    finally:
        drop(place(given["folder"]))


def _run(given: dict[str, Any], job: Job) -> None:
    folder = begin(given)
    fetch(folder, {ERROR_FILE})
    if before := read_error(folder):
        remove(folder / ERROR_FILE)
    newest = 0
    config: Config | None = None

    def report(row: Row) -> None:
        nonlocal newest
        for earlier in unreported(given, newest, row["epoch"]):
            report_to_tune(earlier)
        newest = row["epoch"]
        report_to_tune(row)

    def failed(error: BaseException) -> None:
        see(given)  # else it may have failed for want of its files
        write_error(folder, error, newest)
        push(folder, {ERROR_FILE})

    try:
        config = make_config(given["values"], job)
        values = {path: config.at(path) for path in job.space.params}
        if given["until"] is None and (shown := write_hparams(folder, values)):  # a trial, not a prefix
            push(folder, {shown.name})
        options = {
            "objective": job.space.search.objective if given["until"] is None else None,
            "backbone": job.backbone,
            "until_stage": given["until"],
        }
        if job.workers == 1:
            _train_here(config, given, job, report, options)
        else:
            _train_in_group(config, given, job, report, options)
    except (StorageError, TakenOver):
        raise
    except UserError as error:
        failed(error)
        if isinstance(error, UnreadableCheckpoint) and set_aside(folder):
            raise  # the next attempt goes on from the prefix, or begins anew
        tune.report({"state": "failed"})
    except Exception as error:
        advice = out_of_memory_advice(error, config, job.gpus) if config else None
        failed(UserError(advice) if advice else error)
        line = first_line(error)
        again = machine_lost(line) or not (before and repeated(line, before[0], newest, before[1]))
        if advice is None and again:
            raise
        tune.report({"state": "failed"})


def make_config(values: dict[str, Any], job: Job) -> Config:
    """The trial's configuration.

    Raises:
        UserError: the sampled values break a rule of the configuration.
    """
    try:
        config = job.space.config_for(values)
    except ValidationError as error:
        raise UserError(*(problem.text for problem in validation_problems(error, Config))) from None
    if not job.gpus and config.runtime.device == "auto":
        return config.with_values({"runtime.device": "cpu"})
    return config


def report_to_tune(row: Row) -> None:
    """Hand a row to Tune, which may stop the trial here; what was not measured is left out, a NaN is not."""
    tune.report({name: value for name, value in row.items() if value is not None})


def write_error(folder: Path, error: BaseException, epoch: int) -> None:
    """Write ``error.txt``: what the error is, after which epoch, and for a bug where it came from."""
    trace = "".join(traceback.format_exception(error))
    mistake = isinstance(error, UserError)
    first, *more = str(error).splitlines() if mistake else [first_line(error)]
    lines = [first, f"after epoch {epoch}", *more, *([] if mistake else ["", trace.rstrip()])]
    write_text(folder / ERROR_FILE, told("\n".join(lines) + "\n"))


def read_error(folder: Path) -> tuple[str, int] | None:
    """First line and epoch of the error in a trial's folder; None where there is none."""
    try:
        lines = (folder / ERROR_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return None
    first, epoch, *_ = [*lines, "", ""]
    number = re.fullmatch(r"after epoch (\d{1,9})", epoch)
    return first, int(number[1]) if number else -1


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message; a worker's own error instead of Ray's wrapper."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return first_line(next(iter(failures.values())))
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return first_line(cause)
    lines = str(error).strip().splitlines()
    name = "" if isinstance(error, UserError) else type(error).__name__
    return ": ".join(part for part in (name, lines[0] if lines else "") if part)


def use_threads(cpus: float) -> None:
    """Let torch's operators in this thread use as many threads as the worker has CPUs."""
    import torch

    torch.set_num_threads(max(1, int(cpus + 0.1)))


def _train_here(
    config: Config, given: dict[str, Any], job: Job, report: Callable[[Row], None], options: dict[str, Any]
) -> None:
    folder = place(given["folder"])
    payload = {"config": config, "given": given, "job": job, "options": options}
    TorchTrainer(
        lambda: _worker(payload, report),
        scaling_config=ray_train.ScalingConfig(num_workers=0),
        run_config=ray_train.RunConfig(name=folder.name, storage_path=str(folder.parent)),
    ).fit()


def _train_in_group(
    config: Config, given: dict[str, Any], job: Job, report: Callable[[Row], None], options: dict[str, Any]
) -> None:
    folder = place(given["folder"])
    run_group(
        _worker,
        {"config": config, "given": given, "job": job, "options": options},
        workers=job.workers,
        holds=job.room.worker,
        name=folder.name,
        storage_path=str(folder.parent),
        on_row=report,
    )


def _worker(payload: dict[str, Any], report: Callable[[Row], None]) -> None:
    """One rank, in its own process where there are several; rank 0 writes the trial's files."""
    job, given = payload["job"], payload["given"]
    use_threads(job.cpus)
    leads = job.workers == 1 or ray_train.get_context().get_world_rank() == 0
    attempt = os.urandom(8).hex() if leads else ""
    folder, fork = bring(given, attempt)

    def report_saved(row: Row) -> None:
        if leads:
            keep(given, attempt)
        report(row)

    try:
        job.train(payload["config"], folder, report=report_saved, fork=fork, **payload["options"])
        if leads:
            keep(given, attempt)
    finally:
        drop(folder)
