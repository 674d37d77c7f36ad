"""Which checkpoint a run goes on from, and whether it may: its own, or that of a shared prefix.

A folder's own checkpoint must belong to the same configuration. A prefix's checkpoint
must agree on all that acted up to its end (:mod:`hpcl.prefix`); what had no part in it
yet, the MLP before stage 2 and growth before the first stage that grows, is the run's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcl.checkpoint import config_of, differing_fields, load_checkpoint
from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.prefix import acts_from, prefix_differences
from hpcl.stages import make_plan, stage_at, total_epochs

State = dict[str, Any]
"""A run's state, as in its checkpoint."""

_HEAD = ("query.mlp.", "key.mlp.")


def own_state(path: Path, fresh: State, config: Config) -> State:
    """The checkpoint of the run's own folder.

    Args:
        path: the checkpoint.
        fresh: the run's state before its first epoch.
        config: the run's configuration.

    Raises:
        UserError: it is another configuration's, or was trained on other images.
    """
    state = load_checkpoint(path)
    differing = differing_fields(config, config_of(state))
    if differing:
        raise UserError(
            f"{path}: belongs to another configuration (it differs at {', '.join(differing)}); "
            "give another folder (--folder), or the configuration this one was started with"
        )
    _check_images(path, state, fresh, "give another folder")
    return state


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
