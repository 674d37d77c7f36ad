"""What a checkpoint's representation is good for: downstream tasks, beside what they are compared with.

The walk of the data: checkpoint -> network and images (:class:`hpcl.downstream.bench.Bench`) -> tasks
(:mod:`hpcl.downstream.tasks`) -> rows of ``downstream.parquet`` -> one table (:mod:`hpcl.analysis.downstream`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hpcl
from hpcl.checkpoint import load_checkpoint
from hpcl.config import Config
from hpcl.data import load
from hpcl.dist import current_world
from hpcl.downstream import tasks
from hpcl.downstream.bench import Bench, Split
from hpcl.downstream.scores import BASELINES, VOC_TASKS, WITHOUT_SEED, Encoder
from hpcl.downstream.voc.data import VocData, read_voc
from hpcl.errors import UserError
from hpcl.files import hash_of, writing
from hpcl.pretrained import must_take, network_of
from hpcl.results import downstream_schema, read_rows, write_table

Row = dict[str, Any]
Say = Callable[[str], None]


def evaluate(
    checkpoints: Sequence[Path],
    names: Sequence[str],
    out: Path,
    *,
    data: str | None = None,
    voc: Path | None = None,
    seeds: int = 3,
    split: Split = "test",
    baselines: bool = True,
    say: Say = print,
) -> tuple[list[Row], dict[str, str]]:
    """Measure tasks, and append their rows to a table after each one.

    What they are compared with is measured once, with the first checkpoint.

    Args:
        checkpoints: of runs of one configuration that differ in their seed at most.
        names: of :data:`hpcl.downstream.scores.TASK_NAMES`.
        out: the table, columns as :data:`hpcl.results.DOWNSTREAM_COLUMNS`; made where it is missing.
        data: other images than those the checkpoints were trained on.
        voc: a folder in VOC form, for the tasks that need one.
        seeds: n, runs of each task, with seeds 0 to n - 1.
        split: the part that is scored.
        baselines: measure what it is compared with, too.
        say: takes a line at the end of each task.

    Returns:
        The new rows, and why tasks were left out, by name.

    Raises:
        UserError: a checkpoint, the images or the table do not fit.
    """
    names = list(dict.fromkeys(names))
    if out.suffix != ".parquet":
        raise UserError(f"--out is {out}, but must end with .parquet, which it is")
    rows_before(out)  # unreadable? then before anything is measured; so where nothing can be written
    _make_room(out)
    benches = _benches(checkpoints, data, split, out.parent / "labels")
    given = read_voc(voc) if voc is not None and set(names) & set(VOC_TASKS) else None
    say(benches[0].images.describe())
    if given is not None:
        say(given.describe())
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for name in names:
        reason = tasks.refusal(name, benches[0], given)
        if name == "sgan" and not baselines:
            reason = "it is a baseline, which --no-baselines leaves out"
        if reason:
            left_out[name] = reason
            say(f"{name:<9} not measured: {reason}")
            continue
        started, new = time.perf_counter(), []
        for number, (checkpoint, bench) in enumerate(zip(checkpoints, benches, strict=True)):
            encoders: tuple[Encoder, ...] = ("trained", *(BASELINES if baselines and number == 0 else ()))
            if bench.images.labels is None:  # the tasks on a folder in VOC form do without
                encoders = tuple(encoder for encoder in encoders if encoder != "supervised")
            for seed in range(seeds):
                if seed and name in WITHOUT_SEED:  # once is enough of what no seed has a say in
                    encoders = tuple(encoder for encoder in encoders if encoder not in ("trained", "pixels"))
                new += _measured(name, bench, encoders, seed, given, checkpoint) if encoders else []
        append(out, new)
        rows += new
        say(f"{name:<9} {len(new)} values in {time.perf_counter() - started:.0f} s")
    return rows, left_out


def _make_room(out: Path) -> None:
    """See that a table can be written: its folder is there, or made.

    Raises:
        StorageError: it can't.
    """
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out.parent))


def _benches(checkpoints: Sequence[Path], data: str | None, split: Split, label_folder: Path) -> list[Bench]:
    """A bench of each checkpoint; which images are labelled is kept in `label_folder`.

    Raises:
        UserError: a checkpoint is none, stands there twice, is another configuration's, or does not fit the images.
    """
    benches: list[Bench] = []
    seen: dict[str, Path] = {}
    first: tuple[Config, Path] | None = None
    for path in checkpoints:
        state = load_checkpoint(path)
        same = seen.setdefault(hash_of(path), path)
        if len(seen) <= len(benches):
            raise UserError(f"{path}: is the same checkpoint as {same}, which says nothing more; name each once")
        config, network, channels = network_of(state, path)
        if first and _sort(config) != _sort(first[0]):
            raise UserError(
                f"{path}: has another configuration than {first[1]}; several checkpoints are runs of one configuration "
                "with several seeds; evaluate others one by one"
            )
        first = first or (config, path)
        section = config.data if data is None else config.data.model_copy(update={"source": data})
        images = benches[0].images if benches else load(section)
        if data is None and images.content_hash != state["data"]["hash"]:  # its test part may have trained the network
            raise UserError(
                f"{images.source}: holds other images now than when {path} was trained; bring them back, or say with "
                "--data which images are meant"
            )
        must_take(network, channels, images)
        world = current_world("cpu" if config.runtime.device == "cpu" else "auto")
        network.to(world.device)
        lists = label_folder / images.content_hash[:8]  # other images with --data have lists of their own
        benches.append(Bench(config, network, images, world, split=split, state=state, label_folder=lists))
    return benches


def _sort(config: Config) -> dict[str, Any]:
    return config.model_dump(exclude={"seed", "runtime"})


def _measured(
    name: str, bench: Bench, encoders: tuple[Encoder, ...], seed: int, voc: VocData | None, checkpoint: Path
) -> list[Row]:
    started = time.perf_counter()
    scores = tasks.run(name, bench, encoders, seed, voc)
    on_voc = name in VOC_TASKS and voc is not None
    about = {
        "split": bench.split,
        "checkpoint": str(checkpoint),
        "checkpoint_hash": hash_of(checkpoint),
        "source": str(voc.root) if voc is not None and on_voc else bench.images.source,
        "data_hash": None if on_voc else bench.images.content_hash,
        "seconds": time.perf_counter() - started,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": hpcl.__version__,
    }
    columns = ("task", "setting", "measure", "encoder", "seed", "value", "ci95", "count")
    return [{name: getattr(score, name) for name in columns} | about for score in scores]


# --- the table ---------------------------------------------------------------------


def rows_before(out: Path) -> list[Row]:
    """The rows of a table that is there already; none where it is missing.

    Raises:
        UserError: the file is something else.
    """
    if not out.exists():
        return []
    try:
        return read_rows(out, downstream_schema())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{out}: is no table that `hpcl evaluate` wrote ({' '.join(str(error).split())[:200]}); "
            "name another with --out"
        ) from error


def append(out: Path, rows: Sequence[Row]) -> None:
    """Add rows to the table; a reader sees it before or after, never a part."""
    _make_room(out)
    with _alone(out.parent):
        write_table(out, [*rows_before(out), *rows], downstream_schema())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two that append at the same time must not lose one another's rows (where the file system has locks)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
