"""What runs inside a Tune trial: Ray Train around the trainer, its rows on their way to Tune.

One worker: Ray Train's in-process mode (``num_workers=0``). Tune reuses the process,
so the next trial starts in well under a second.

Several workers: a worker group (:mod:`hpcl.search.lean`). Every epoch rank 0 hands its
row to the trial and all ranks wait for Tune's answer, so a stopped trial trains no epoch
beyond the one it was stopped at.

A trial's folder is ``trials/<trial id>/`` whatever process runs it: a retry of the
same trial finds the checkpoint there and goes on. A prefix that trials share is trained
in the same way, up to the end of its last stage.
"""

from __future__ import annotations

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
from hpcl.errors import UserError
from hpcl.results import write_text
from hpcl.search.failures import out_of_memory_advice, repeated
from hpcl.search.lean import run_group
from hpcl.search.space import Space
from hpcl.validation import validation_problems

Row = dict[str, Any]
TrainFunction = Callable[..., Any]
"""``train(config, folder, *, report, objective, backbone, fork, until_stage)``, as :func:`hpcl.trainer.fit`; its
result is not used."""

ERROR_FILE = "error.txt"
"""In a failed trial's folder: the error's first line, the epoch it came after, then the traceback of a bug."""


@dataclass(frozen=True)
class Job:
    """What all trials of a search share."""

    space: Space
    train: TrainFunction
    backbone: Callable[[], Any] | None
    workers: int
    cpus: float
    """CPUs of one worker."""
    gpus: float
    """GPUs of one worker."""


def run_trial(given: dict[str, Any], job: Job) -> None:
    """Train one sampled configuration, or a prefix; the function Tune calls.

    A user's mistake (data that do not fit the configuration), memory that does not suffice and an
    error that came back at the same epoch end the trial as failed at once: another try would
    meet it again. Any other exception is raised, so that Tune tries again in a fresh process.

    Args:
        given: see :class:`hpcl.search.queue.WorkQueue`: `trial`, `values`, `folder`, `fork`, `until`.
        job: what all trials share.
    """
    folder = Path(given["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    before = read_error(folder)
    (folder / ERROR_FILE).unlink(missing_ok=True)
    newest = 0
    config: Config | None = None

    def report(row: Row) -> None:
        nonlocal newest
        newest = row["epoch"]
        report_to_tune(row)

    try:
        config = make_config(given["values"], job)
        options = {
            "objective": job.space.search.objective if given["until"] is None else None,
            "backbone": job.backbone,
            "fork": given["fork"] and Path(given["fork"]),
            "until_stage": given["until"],
        }
        if job.workers == 1:
            _train_here(config, folder, job, report, options)
        else:
            _train_in_group(config, folder, job, report, options)
    except UserError as error:
        write_error(folder, error, newest)
        tune.report({"state": "failed"})
    except Exception as error:
        advice = out_of_memory_advice(error, config, job.gpus) if config else None
        write_error(folder, UserError(advice) if advice else error, newest)
        if advice is None and not (before and repeated(first_line(error), before[0], newest, before[1])):
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
    write_text(folder / ERROR_FILE, "\n".join(lines) + "\n")


def read_error(folder: Path) -> tuple[str, int] | None:
    """First line and epoch of the error in a trial's folder; None where there is none."""
    try:
        lines = (folder / ERROR_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    epoch = lines[1].removeprefix("after epoch ") if len(lines) > 1 else ""
    return lines[0], int(epoch) if epoch.isdecimal() else -1


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


def _train_here(config: Config, folder: Path, job: Job, report: Callable[[Row], None], options: dict[str, Any]) -> None:
    def loop() -> None:
        use_threads(job.cpus)
        job.train(config, folder, report=report, **options)

    TorchTrainer(
        loop,
        scaling_config=ray_train.ScalingConfig(num_workers=0),
        run_config=ray_train.RunConfig(name=folder.name, storage_path=str(folder.parent)),
    ).fit()


def _train_in_group(
    config: Config, folder: Path, job: Job, report: Callable[[Row], None], options: dict[str, Any]
) -> None:
    run_group(
        _worker,
        {"config": config, "folder": folder, "job": job, "options": options},
        workers=job.workers,
        cpus=job.cpus,
        gpus=job.gpus,
        name=folder.name,
        storage_path=str(folder.parent),
        on_row=report,
    )


def _worker(payload: dict[str, Any], report: Callable[[Row], None]) -> None:
    """One rank of a worker group."""
    job: Job = payload["job"]
    use_threads(job.cpus)
    job.train(payload["config"], payload["folder"], report=report, **payload["options"])
