"""Trials that fail: which errors are the same, which are not worth a retry, and what to do without memory.

Two error lines are the same error when they agree once numbers, addresses and ids are
masked: a process id, a trial's number or the bytes asked for say where and how much, not what.
Nothing here needs torch or ray; their errors are known by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from hpcl.config import Config
from hpcl.validation import show

_MASKED = re.compile(
    r"""
      \b0x[0-9a-f]+                                        # an address
    | (?<![0-9a-z])[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![0-9a-z])
    | (?<![0-9a-z])[0-9a-f]{8,}(?![0-9a-z])                # Ray's ids of nodes, actors, objects
    | \btmp[0-9a-z_]{6,}                                   # a temporary file
    | \d+(\.\d+)?(e[+-]?\d+)?
    """,
    re.IGNORECASE | re.VERBOSE,
)
_ASKED = re.compile(r"(?:tried to allocate|unable to allocate) ([\d.]+ \w+)", re.IGNORECASE)
_GPU_FULL = re.compile(r"(CUDA|HIP).*out of memory|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation", re.IGNORECASE)
_MACHINE_LOST = re.compile(
    r"node has died|node was (terminated|preempted|drained)|node \w+ .{0,40}\bdead|actor is temporarily unavailable"
    r"|ActorUnavailableError|NodeDiedError|its machine was lost",
    re.IGNORECASE,
)
_HOST_FULL = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory", re.IGNORECASE)

MOST_LOSSES = 10
"""Machines that a trial may lose at one and the same epoch."""


def same_error(first_lines: Sequence[str | None], n: int) -> str | None:
    """The error with which the first `n` trials to end all failed, so that the search can end early.

    Args:
        first_lines: of the trials in the order of their ending: the first line of a failed
            trial's error, None for a trial that ended otherwise.
        n: trials that must agree, at least 1.

    Returns:
        The first trial's line as it is; None where fewer trials ended, one of them did not
        fail, or the errors differ.

    Example:
        >>> same_error(["OSError: [pid 71] no data", "OSError: [pid 83] no data"], 2)
        'OSError: [pid 71] no data'
    """
    lines = first_lines[:n]
    if not lines or len(lines) < n or any(line is None for line in lines):
        return None
    return lines[0] if len({masked(line) for line in lines if line is not None}) == 1 else None


def repeated(first_line: str, previous_first_line: str | None, epochs: int, previous_epochs: int | None) -> bool:
    """Whether a retry failed as the attempt before it did, so that one more would fail too.

    Args:
        first_line: first line of the error.
        previous_first_line: that of the attempt before; None: it was the first attempt.
        epochs: epochs that were trained when it failed.
        previous_epochs: the same of the attempt before. Where the retry came further, the
            error does not belong to the epoch, and another retry may come further still.
    """
    if previous_first_line is None:
        return False
    return epochs == previous_epochs and masked(first_line) == masked(previous_first_line)


def machine_lost(error: str) -> bool:
    """Whether an error, with all that Ray says of it, comes of a machine that was lost and not of the trial.

    Example:
        >>> machine_lost("The actor died because its node has died. Node Id: 4f1c")
        True
    """
    return bool(_MACHINE_LOST.search(error))


class Attempts:
    """How often each trial is tried again.

    Args:
        retries: failures of a trial after which it goes on; a machine that was lost is none.
    """

    def __init__(self, retries: int) -> None:
        self._retries = retries
        self._failed: Counter[str] = Counter()
        self._lost: dict[str, tuple[int, int]] = {}
        """Trial -> the epoch it had come to when it last lost its machine, and how often it has lost it there."""

    def failed(self, trial: str, epoch: int, *, lost: bool) -> bool:
        """A trial broke off after this epoch; tells whether it is to go on.

        Args:
            trial: its id.
            epoch: epochs that it had come to.
            lost: its machine was lost with it. That costs no attempt, unless it happens
                :data:`MOST_LOSSES` times without an epoch in between: it may be the trial
                that brings machines down.
        """
        if not lost:
            self._failed[trial] += 1
            return self._failed[trial] <= self._retries
        before, times = self._lost.get(trial, (-1, 0))
        self._lost[trial] = (epoch, times + 1 if epoch == before else 1)
        return self._lost[trial][1] < MOST_LOSSES


def masked(line: str) -> str:
    """An error line with `#` in place of numbers, addresses, ids and names of temporary files.

    Example:
        >>> masked("actor 3fa90c21d07e at 0x7f3a died, 12.5 GiB used")
        'actor # at # died, # GiB used'
    """
    return _MASKED.sub("#", " ".join(line.split()))


def out_of_memory_advice(error: BaseException, config: Config, gpus: float) -> str | None:
    """One line: that memory ran out, and what to lower, with the present values.

    Args:
        error: a trial's error; Ray's wrapper around a worker's error is looked into.
        config: the trial's configuration.
        gpus: GPUs of one of its workers: 0, a fraction where trials share a GPU, or more.

    Returns:
        The line; None where the error is another one.
    """
    for cause in reversed(list(_causes(error))):
        text = str(cause)
        kinds = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(cause).__mro__}
        asked = f" (tried to allocate {found[1]})" if (found := _ASKED.search(text)) else ""
        if "torch.OutOfMemoryError" in kinds or (isinstance(cause, RuntimeError) and _GPU_FULL.search(text)):
            return f"CUDA out of memory{asked}: lower {_fields(config)}, or {_more_gpu(gpus)}"
        full = isinstance(cause, MemoryError) or "ray.OutOfMemoryError" in kinds
        if full or (isinstance(cause, RuntimeError) and _HOST_FULL.search(text)):
            fewer = "run fewer trials at a time (search.max_concurrent)"
            advice = f"{fewer}" if gpus else f"lower {_fields(config)}, or {fewer}"
            return f"the machine is out of memory{asked}: {advice}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what Ray's wrappers of it hold, from the outside in."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        failures = getattr(current, "worker_failures", None)
        inner = [*(failures or {}).values(), getattr(current, "cause", None), current.__cause__]
        waiting += [found for found in inner if isinstance(found, BaseException)]


def _fields(config: Config) -> str:
    """The fields that set how much memory a trial takes, those that take the most first."""
    paths = ["optimizer.batch", "model.width" if config.model.backbone == "convnet" else "model.backbone"]
    paths += ["data.size"] if config.data.size is not None else []
    shown = [f"{path} ({show(config.at(path))})" for path in [*paths, "moco.queue", "meters.images"]]
    most = show(config.clusters.maximum) if config.clusters.maximum else "null, a tenth of the training images"
    return f"{', '.join(shown)} or clusters.maximum ({most})"


def _more_gpu(gpus: float) -> str:
    if gpus < 1:
        return f"give a trial more of a GPU (resources.gpus_per_worker {gpus:.6g})"
    return "share the batch among more GPUs (resources.workers)"
