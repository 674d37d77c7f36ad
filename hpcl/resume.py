"""Which checkpoint a run goes on from, and whether it may: its own, or that of a shared prefix.

A folder's own checkpoint must belong to the same configuration; where the newest cannot
be read, the one before it is used. A prefix's checkpoint must agree on all that acted up
to its end (:mod:`hpcl.prefix`); what had no part in it yet, the MLP before stage 2 and
growth before the first stage that grows, is the run's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hpcl.checkpoint import (
    CHECKPOINT_NAME,
    config_of,
    differing_fields,
    load_checkpoint,
    previous_of,
)
from hpcl.config import Config
from hpcl.dist import World
from hpcl.errors import UnreadableCheckpoint, UserError
from hpcl.files import writing
from hpcl.prefix import acts_from, prefix_differences
from hpcl.stages import make_plan, stage_at, total_epochs

State = dict[str, Any]
"""A run's state, as in its checkpoint."""

_HEAD = ("query.mlp.", "key.mlp.")


class Start(NamedTuple):
    """What a run begins with."""

    path: Path
    """The checkpoint."""
    state: State
    forked: bool
    """Whether it is another run's, with its rows marked as shared."""
    note: str
    """Why it is not the newest one of the run's folder; empty where it is."""

    def told(self, ranks: int) -> list[str]:
        """Lines for the log of a run that goes on with so many ranks."""
        before, epochs = self.state["rows"][-1]["world_size"], len(self.state["rows"])
        lines = [f"epochs 1 to {epochs} are those of {self.path}"] if self.forked else []
        if self.note:
            lines.append(self.note)
        if before != ranks:
            lines.append(f"processes: {before} up to epoch {epochs}, {ranks} from here on")
        return lines


def find_start(folder: Path, fork: Path | None, fresh: State, config: Config, world: World) -> Start | None:
    """The checkpoint that a run goes on from: its folder's, else the one to fork from, else None.

    Called on every rank. A checkpoint that cannot be read is replaced by the one before it.

    Args:
        folder: the run's folder.
        fork: the checkpoint of a prefix, for a folder that has none.
        fresh: the run's state before its first epoch.
        config: the run's configuration.
        world: the ranks that train the run.

    Raises:
        UnreadableCheckpoint: none can be read.
        UserError: it does not fit the run, or the ranks do not find the same.
    """
    path = folder / CHECKPOINT_NAME
    with writing(folder):  # which may have gone with its disk
        start = _own(path, fresh, config)
    if start is None and fork is not None:
        start = Start(fork, forked_state(fork, fresh, config), True, "")
    epochs = torch.tensor([len(start.state["rows"]) if start else 0], device=world.device)
    found = world.all_gather(epochs).tolist()
    if len(set(found)) > 1:
        raise UserError(
            f"{folder}: the processes that train together find checkpoints of different epochs in it "
            f"({', '.join(map(str, found))}, in order of rank); use a folder that is the same on all their machines"
        )
    if world.rank == 0:
        with writing(folder):
            if start and start.note:
                os.replace(previous_of(path), path)
            for left in folder.glob(f".{path.name}.*.tmp"):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)
    return start


@contextmanager
def must_fit(path: Path) -> Iterator[None]:
    """Around what takes its state out of a checkpoint.

    Raises:
        UnreadableCheckpoint: it is not there, or not as this run has it.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # of the device, and not of the file
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UnreadableCheckpoint(
            f"{path}: does not hold what this run needs ({type(error).__name__}: {error}); put one back from a copy, "
            f"or remove {path.parent} to train the run anew"
        ) from error


def _own(path: Path, fresh: State, config: Config) -> Start | None:
    """The newest checkpoint in the run's folder that can be read; None where it has none.

    Raises:
        UnreadableCheckpoint: none can be read.
        UserError: it is another configuration's, or was trained on other images.
    """
    before = previous_of(path)
    broken: dict[Path, str] = {} if path.exists() else {path: "is missing"}
    there = [each for each in (path, before) if each.exists()]
    for source in there:
        try:
            state = load_checkpoint(source)
        except UnreadableCheckpoint as error:
            broken[source] = f"cannot be read ({error.__cause__})"
            continue
        _check_own(source, state, fresh, config)
        epochs = len(state["rows"])
        note = f"{path.name} {broken[path]}: went on from {before.name}, after epoch {epochs}" if broken else ""
        return Start(source, state, False, note)
    if not there:
        return None
    raise UnreadableCheckpoint(
        f"{' and '.join(f'{source} {why}' for source, why in broken.items())}; "
        f"put one back from a copy, or remove {path.parent} to train the run anew"
    )


def _check_own(path: Path, state: State, fresh: State, config: Config) -> None:
    differing = differing_fields(config, config_of(state))
    if differing:
        raise UserError(
            f"{path}: belongs to another configuration (it differs at {', '.join(differing)}); "
            "give another folder (--folder), or the configuration this one was started with"
        )
    _check_images(path, state, fresh, "give another folder")


def forked_state(path: Path, fresh: State, config: Config) -> State:
    """The state with which a run goes on from another run's checkpoint; its rows are marked as shared.

    Args:
        path: the checkpoint of a prefix.
        fresh: the run's state before its first epoch.
        config: the run's configuration.

    Raises:
        UserError: there is no checkpoint; it differs in a field that acted in it, in the
            images or in the backbone; or it leaves nothing to train.
    """
    state = load_checkpoint(path)
    theirs = config_of(state)
    epochs = len(state["rows"])
    stage = stage_at(make_plan(theirs), epochs).stage
    differing = prefix_differences(config, theirs, stage)
    if differing:
        raise UserError(
            f"{path}: was trained through stage {stage} with other values than this run's: {', '.join(differing)}; "
            "fork from a prefix that agrees with the run on them, or train it from the start"
        )
    _check_images(path, state, fresh, "train the run from the start")
    if state["backbone"] != fresh["backbone"]:
        used, given = (s["backbone"] or config.model.backbone for s in (state, fresh))
        raise UserError(f"{path}: was trained with the backbone {used}, this run has {given}; give the same")
    if epochs >= total_epochs(make_plan(config)):
        raise UserError(f"{path}: already holds all {epochs} epochs of this run; fork from a shorter one")
    if stage < acts_from("head.kind", config):  # not used yet, and the run may have another one
        head = {name: value for name, value in fresh["pair"].items() if name.startswith(_HEAD)}
        state["pair"] = head | {name: x for name, x in state["pair"].items() if not name.startswith(_HEAD)}
    if stage < acts_from("growth.policy", config):
        state["growth"] = fresh["growth"]
    state["rows"] = [row | {"shared": True} for row in state["rows"]]
    return state


def _check_images(path: Path, state: State, fresh: State, remedy: str) -> None:
    if state["data"]["hash"] != fresh["data"]["hash"]:
        raise UserError(f"{path}: was trained on other images than {fresh['data']['source']} holds now; {remedy}")
