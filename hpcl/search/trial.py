"""What runs inside a Tune trial: Ray Train around the trainer, its rows on their way to Tune.

One worker: Ray Train's in-process mode (``num_workers=0``). Tune reuses the process,
so the next trial starts in well under a second.

Several workers: a ``TorchTrainer`` with a worker group. Every epoch rank 0 hands its
row to the trial and waits for Tune's answer at the :class:`Gate`, so a stopped trial
trains no epoch beyond the one it was stopped at.

A trial's folder is ``trials/<trial id>/`` whatever process runs it: a retry of the
same trial finds the checkpoint there and goes on.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import train as ray_train
from ray import tune
from ray.train.torch import TorchTrainer

from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.results import clean, write_text
from hpcl.search.space import Space
from hpcl.validation import validation_problems

Row = dict[str, Any]
TrainFunction = Callable[..., Any]
"""``train(config, folder, *, report, objective, backbone)``, as :func:`hpcl.trainer.fit`; its result is not used."""

ERROR_FILE = "error.txt"
"""In a failed trial's folder: the error's first line, then the traceback of a bug."""


@dataclass(frozen=True)
class Job:
    """What all trials of a search share."""

    space: Space
    folder: str
    """``results/<name>``, seen by all nodes."""
    train: TrainFunction
    backbone: Callable[[], Any] | None
    workers: int
    cpus: float
    """CPUs of one worker."""
    gpus: float
    """GPUs of one worker."""


def run_trial(values: dict[str, Any], job: Job) -> None:
    """Train one sampled configuration; the function Tune calls.

    A user's mistake (data that do not fit the configuration) ends the trial as failed
    at once: a retry would meet it again. Any other exception is raised, so that Tune
    tries the trial once more in a fresh process.
    """
    folder = Path(job.folder) / "trials" / tune.get_context().get_trial_id()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        config = make_config(values, job)
        if job.workers == 1:
            _train_here(config, folder, job)
        else:
            _train_in_group(config, folder, job)
    except UserError as error:
        write_error(folder, error)
        tune.report({"state": "failed"})
    except Exception as error:
        write_error(folder, error)
        raise


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
    """Hand a row to Tune, which may stop the trial here; what was not measured is left out."""
    cleaned = {name: clean(value) for name, value in row.items()}
    tune.report({name: value for name, value in cleaned.items() if value is not None})


def write_error(folder: Path, error: BaseException) -> None:
    """Write ``error.txt``: what the error is, and for a bug where it came from."""
    trace = "".join(traceback.format_exception(error))
    text = str(error) if isinstance(error, UserError) else f"{first_line(error)}\n\n{trace}"
    write_text(folder / ERROR_FILE, f"{text.rstrip()}\n")


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


def _train_here(config: Config, folder: Path, job: Job) -> None:
    def loop() -> None:
        use_threads(job.cpus)
        job.train(config, folder, report=report_to_tune, objective=job.space.search.objective, backbone=job.backbone)

    TorchTrainer(
        loop,
        scaling_config=ray_train.ScalingConfig(num_workers=0),
        run_config=ray_train.RunConfig(name=folder.name, storage_path=str(folder.parent)),
    ).fit()


class Gate:
    """An actor between rank 0 and the trial: a row goes one way, then the word to go on the other."""

    def __init__(self) -> None:
        self._rows: asyncio.Queue[Row | None] = asyncio.Queue()
        self._answers: asyncio.Queue[None] = asyncio.Queue()

    async def submit(self, row: Row) -> None:
        """Rank 0: hand in a row; returns when the trial may go on."""
        await self._rows.put(row)
        await self._answers.get()

    async def next_row(self) -> Row | None:
        """The trial: the next row, or None when the workers have ended."""
        return await self._rows.get()

    async def go_on(self) -> None:
        """The trial: Tune did not stop it."""
        await self._answers.put(None)

    async def end(self) -> None:
        """No more rows will come."""
        await self._rows.put(None)


def _train_in_group(config: Config, folder: Path, job: Job) -> None:
    # Owned by this process: when Tune ends the trial, the gate and Train's controller die with it.
    gate: Any = ray.remote(num_cpus=0)(Gate).remote()
    resources = {"CPU": job.cpus, **({"GPU": job.gpus} if job.gpus else {})}
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config, "folder": folder, "job": job, "gate": gate},
        scaling_config=ray_train.ScalingConfig(
            num_workers=job.workers, use_gpu=job.gpus > 0, resources_per_worker=resources
        ),
        run_config=ray_train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            # Retries are Tune's: they start from the same checkpoint, in a fresh worker group.
            failure_config=ray_train.FailureConfig(max_failures=0, controller_failure_limit=3),  # type: ignore[call-arg]
        ),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the trial's own thread below
            failure.append(error)
        finally:
            gate.end.remote()

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while (row := ray.get(gate.next_row.remote())) is not None:
        report_to_tune(row)
        gate.go_on.remote()
    thread.join()
    if failure:
        causes = list(getattr(failure[0], "worker_failures", {}).values())
        mistakes = [cause for cause in causes if isinstance(cause, UserError)]
        raise mistakes[0] if mistakes else failure[0]


def _worker(payload: dict[str, Any]) -> None:
    """One rank of a worker group."""
    job: Job = payload["job"]
    leads = ray_train.get_context().get_world_rank() == 0

    def report(row: Row) -> None:
        if leads:
            ray.get(payload["gate"].submit.remote(row))
        ray_train.report({"epoch": row["epoch"]})

    use_threads(job.cpus)
    job.train(
        payload["config"], payload["folder"], report=report, objective=job.space.search.objective, backbone=job.backbone
    )
