"""What runs next: prefixes that trials share, trials that were cut short, new trials.

Tune asks :meth:`WorkQueue.suggest` for one job after another. A drawn trial waits until
the prefix it goes on from is there; meanwhile that prefix, and the ones it goes on from
itself, are handed out as jobs of their own, each once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from hpcl.search.asha import finite
from hpcl.search.listed import Listed
from hpcl.search.places import location
from hpcl.search.prefixes import PrefixNode, PrefixPlan
from hpcl.search.sampler import Sampler
from hpcl.search.storage import exists
from hpcl.search.store import CHECKPOINT, PrefixStore
from hpcl.search.tables import PREFIX, Tables


@dataclass(frozen=True)
class Prefixes:
    """The prefixes of a search, and where they are kept."""

    plan: PrefixPlan
    store: PrefixStore
    key: Callable[[PrefixNode], str]
    """The key of a node, :func:`hpcl.prefix.prefix_key` of the configuration and the machine."""
    time: Callable[[str, int], float]
    """(prefix id, epoch) -> its time on this search's clock."""


class WorkQueue(Searcher):
    """Hands jobs to Tune, and tells Optuna how trials went.

    A job is Tune's configuration of a trial: ``trial`` (our id), ``values`` (by config path),
    ``folder``, ``fork`` (a checkpoint or None), ``until`` (the last stage, or None), ``home`` (the
    search's folder) and ``epochs`` (of which the search has rows). Folders are paths or URIs.

    Args:
        tables: what the search knows; trials in it that have not ended are handed out again.
        sampler: draws new trials, or hands out given ones.
        trials: trials in all.
        at_a_time: jobs at a time, as it is now.
        folder: ``results/<name>``.
        prefixes: None where nothing is shared.
        closed: True as soon as nothing new is to be started.
    """

    def __init__(
        self,
        tables: Tables,
        sampler: Sampler | Listed,
        *,
        trials: int,
        at_a_time: Callable[[], int],
        folder: Path,
        prefixes: Prefixes | None = None,
        closed: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(metric=tables.metric)
        self._tables, self._sampler = tables, sampler
        self._asked, self._at_a_time, self._folder = trials, at_a_time, folder
        self._prefixes, self._closed = prefixes, closed
        self._resumed = tables.unfinished()
        self._held: list[str] = []
        """Drawn trials that wait for their prefix."""
        self._begun: set[str] = set()
        """Those of them that have a checkpoint of their own."""
        self._live: dict[str, str] = {}
        """Tune's trial id -> ours, of the jobs that Tune has."""
        self._nodes: dict[str, PrefixNode] = {}
        """Prefix id -> its node, of those in work."""
        self._there: set[str] = set()
        """Prefixes that are known to be complete."""
        self._broken: set[str] = set()
        """Prefixes that could not be trained; their trials train everything themselves."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy of its settings, which nobody reads back."""
        return {}

    # ---------------------------------------------------------------- Tune asks

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is text
        """The next job; None where nothing can start now, FINISHED where nothing will."""
        if self._closed():
            return str(Searcher.FINISHED)
        at_a_time = self._at_a_time()
        if len(self._live) >= at_a_time:
            return None
        while True:
            job = self._ready()
            if job is not None:
                self._live[trial_id] = job["trial"]
                return job
            if len(self._held) >= at_a_time or not self._hold_next():
                break
        return None if self._held or self._live else str(Searcher.FINISHED)

    @property
    def exhausted(self) -> bool:
        """Whether there is nothing left to hand out, unless a trial breaks off."""
        waits = self._held or self._resumed or len(self._tables.trials) < self._asked
        return self._closed() or not waits

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a running trial's newest value on to Optuna."""
        report(self._tables, self._sampler, self._tables.newest(self._live.get(trial_id, "")))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A job ended: publish a prefix, tell Optuna of a trial; one that was cut short goes on another time."""
        ours = self._live.pop(trial_id, None)
        if ours is None:
            return
        if ours.startswith(PREFIX):
            if not error:  # else it may be tried again
                self._end_prefix(ours, failed=(result or {}).get("state") == "failed")
        else:
            report(self._tables, self._sampler, self._tables.newest(ours))
            self.tell(ours)

    def tell(self, trial: str) -> None:
        """Tell Optuna how a trial ended, if it has."""
        state = self._tables.state_of(trial)
        if trial in self._tables.optuna and state != "running":
            self._sampler.tell(self._tables.optuna[trial], state, finite(self._tables.trials[trial]["metric"]))

    def has(self, trial_id: str) -> bool:
        """Whether Tune has this job (by Tune's id)."""
        return trial_id in self._live

    def again(self, ours: str) -> None:
        """Hand a job out once more that Tune gave up; prefixes are handed out for the trials that wait for them."""
        if not ours.startswith(PREFIX):
            self._resumed.append(ours)

    def give_up(self, ours: str) -> None:
        """A job of Tune's ended with an error and is not tried again."""
        if ours in self._nodes:
            self._end_prefix(ours, failed=True)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it."""

    # ---------------------------------------------------------------- what is next

    def _ready(self) -> dict[str, Any] | None:
        """A held trial whose prefix is there, else the first prefix that one waits for."""
        waiting: list[PrefixNode] = []
        for trial in self._held:
            node = self._node_of(trial)
            if node is None or self._is_there(node):
                self._held.remove(trial)
                return self._job(trial, self._folder / "trials" / trial, node, None)
            waiting.append(node)
        for node in waiting:
            while node.parent is not None and not self._is_there(node.parent):
                node = node.parent
            prefix = self._id(node)
            if prefix not in self._live.values():
                self._tables.begin(prefix, 0, node.values)
                self._nodes[prefix] = node
                return self._job(prefix, self._shared.store.work(self._shared.key(node)), node.parent, node.stage)
        return None

    def _hold_next(self) -> bool:
        """Take a trial that was cut short, or draw a new one; False where there is none left."""
        if self._resumed:
            self._hold(self._resumed.pop(0))
            return True
        number = len(self._tables.trials)
        if number >= self._asked:
            return False
        values, optuna = self._sampler.ask(number)
        trial = self._sampler.name(number)
        self._tables.begin(trial, number, values, optuna=optuna)
        self._hold(trial)
        return True

    def _hold(self, trial: str) -> None:
        if self._prefixes is not None and exists(self._folder / "trials" / trial / CHECKPOINT):
            self._begun.add(trial)
        self._held.append(trial)

    def _job(self, ours: str, folder: Path, parent: PrefixNode | None, until: int | None) -> dict[str, Any]:
        """Tune's configuration of a trial or prefix that goes on from `parent`."""
        fork = None
        if parent is not None:
            self._tables.fork(ours, self._id(parent))
            fork = location(self._shared.store.checkpoint(self._shared.key(parent)))
        self._tables.sync()
        return {
            "trial": ours,
            "values": self._tables.values[ours],
            "folder": location(folder),
            "fork": fork,
            "until": until,
            "home": location(self._folder),
            "epochs": self._tables.newest(ours).get("epoch", 0),
        }

    # ---------------------------------------------------------------- prefixes

    @property
    def _shared(self) -> Prefixes:
        assert self._prefixes is not None  # asked only where there are nodes
        return self._prefixes

    def _id(self, node: PrefixNode) -> str:
        return f"{PREFIX}{self._shared.key(node)}"

    def _node_of(self, trial: str) -> PrefixNode | None:
        """The prefix that a trial goes on from; None where it goes on from its own checkpoint or starts by itself."""
        if self._prefixes is None or trial in self._begun:
            return None
        node = self._prefixes.plan.node_for(self._tables.values[trial])
        above = node
        while above is not None:
            if self._id(above) in self._broken:
                return None
            above = above.parent
        return node

    def _is_there(self, node: PrefixNode) -> bool:
        """Whether a prefix is complete; rows of one that another search trained are taken over."""
        prefix = self._id(node)
        if prefix in self._there and exists(self._shared.store.checkpoint(self._shared.key(node))):
            return True
        rows = self._shared.store.rows(self._shared.key(node), node.last_epoch)
        if rows is None:
            return False
        self._there.add(prefix)
        self._tables.begin(prefix, 0, node.values)
        for row in rows:
            self._tables.add(prefix, {**row, "shared": True, "clock": self._shared.time(prefix, row["epoch"])})
        self._tables.end(prefix, "finished", "trained by another search")
        return True

    def _end_prefix(self, prefix: str, *, failed: bool) -> None:
        node = self._nodes.pop(prefix)
        row = self._tables.newest(prefix)
        if not failed and row.get("state") == "running" and row["epoch"] == node.last_epoch:
            self._tables.sync()  # that it was trained here is known before others find it
            self._shared.store.publish(self._shared.key(node), self._tables.prefix_rows(prefix))
            self._tables.end(prefix, "finished", f"trained through stage {node.stage}")
        elif not self._closed() or failed:  # it failed, diverged, or did not train what it was to train
            self._broken.add(prefix)
            self._tables.end(prefix, "failed", "could not be trained; its trials train the stage themselves")


def report(tables: Tables, sampler: Sampler | Listed, row: Mapping[str, Any]) -> None:
    """Tell Optuna the metric in a row of a trial, at its time on the clock."""
    number, value = tables.optuna.get(row.get("trial_id", "")), finite(row.get(tables.metric))
    if number is not None and value is not None:
        # The clock counts epochs of the base's schedule; where lengths are not searched it is the epoch.
        sampler.report(number, value, math.ceil((row["clock"] or row["epoch"]) - 1e-9))
