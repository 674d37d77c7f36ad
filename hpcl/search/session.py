"""One process's part of a search: from opening its folder, through Ray Tune, to the last file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from importlib import metadata
from typing import Any

from ray import tune
from ray.tune.logger import JsonLoggerCallback

from hpcl.errors import StorageError, UserError
from hpcl.prefix import code_version, prefix_key
from hpcl.search.asha import StageASHA
from hpcl.search.clock import StageClock
from hpcl.search.cluster import logged_to
from hpcl.search.elastic import Room, alive_nodes, machines
from hpcl.search.folder import Choice
from hpcl.search.found import ALL_ENDED, Found, header
from hpcl.search.interrupt import Draining, ended_by_signals
from hpcl.search.journal import JOURNAL_NAME, Journal, read_events
from hpcl.search.lean import Shape, trial_resources
from hpcl.search.listed import Listed
from hpcl.search.live import Course, Live, is_terminal, view
from hpcl.search.mirror import Mirror
from hpcl.search.monitor import Monitor
from hpcl.search.places import is_remote, location, shown
from hpcl.search.plan import DRIVER_CPUS, Plan, counted
from hpcl.search.prefixes import PrefixNode
from hpcl.search.progress import Follow, say
from hpcl.search.queue import Prefixes, WorkQueue, report
from hpcl.search.record import Looked, Record
from hpcl.search.sampler import JOURNAL_NAME as STUDY_NAME
from hpcl.search.sampler import Sampler
from hpcl.search.storage import storage_trouble
from hpcl.search.store import PrefixStore
from hpcl.search.tables import Tables
from hpcl.search.trial import Job, first_line, run_trial
from hpcl.search.warm import Warm
from hpcl.stages import stage_lengths
from hpcl.yamlio import write

NO_DATA = "none"
"""In place of the images' hash where the caller's own function trains."""


class Session:
    """One process's part of a search, from opening its folder to the last file."""

    def __init__(
        self,
        plan: Plan,
        job: Job,
        looked: Looked | None,
        nodes: list[dict[str, Any]],
        own: str | None,
        say: Callable[[str], None],
        listed: Listed | None = None,
        address: str | None = None,
    ) -> None:
        self.plan, self.job, self._say = plan, job, say
        self._data_hash = looked.digest if looked else NO_DATA
        self.space, self.folder = plan.space, plan.folder
        self._own, self._listed = own, listed
        self._record = Record(plan, nodes, own, looked, given=listed is not None)
        self.draining = Draining()
        self._held = ExitStack()
        self._course = Course()
        self._room = self._measure_room(address)
        self._clock = StageClock(self.space.base, self.space.search.clock)
        self._lengths: dict[str, tuple[int, int, int, int, int]] = {}

    def _measure_room(self, address: str | None) -> Room:
        """Trials at a time: on a cluster it follows the machines that join and leave."""
        search, room = self.space.search, self.plan.concurrency
        most = search.trials if search.max_concurrent == "auto" else min(search.trials, search.max_concurrent)
        if address is None:
            return Room(room, self.job.workers, most=room.trials)
        return Room(
            room,
            self.job.workers,
            most=most,
            ahead=search.ahead,
            look=lambda: machines(alive_nodes()),
            changed=lambda have, trials: self._say(f"the cluster has {have} now: {counted(trials, 'trial')} at a time"),
        )

    # ---------------------------------------------------------------- its folder

    def open(self, choice: Choice) -> None:
        """Make the folder, or take in what an earlier process wrote there; see :meth:`close`."""
        self._mirror = Mirror(self.folder, new=not choice.resume)
        self._held.callback(self._mirror.close)
        try:
            self.folder.mkdir(parents=True, exist_ok=choice.resume or is_remote(self.folder))
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be made ({error.strerror}); choose another with --results or --name"
            ) from None
        self.journal = Journal(self.folder / JOURNAL_NAME, self._mirror)
        self._held.callback(self.journal.close)
        what = "retrained" if self._listed else "searched"
        write(self.folder / "space.yaml", self.space.to_tree(), f"The space as it was {what} in {self.folder.name}.")
        self.tables = Tables(self.folder, self.space, self.journal)
        events = read_events(self.folder / JOURNAL_NAME)
        self.tables.replay(events)
        for event in events:
            self._course.take(event)
        room = self.plan.concurrency
        self.tables.session(
            command=self._record.resume_command,
            gpus=room.gpus_per_worker * self.job.workers,
            cpus=room.cpus_per_worker * self.job.workers,
        )
        self._end_complete_trials()
        self.sampler = self._listed or self._open_study()
        for row in self.tables.epochs:  # those of the last moment may be missing in the study
            report(self.tables, self.sampler, row)
        known = {
            number: (trial, self.tables.state_of(trial), self.tables.trials[trial]["metric"])
            for trial, number in self.tables.optuna.items()
        }
        copies = self.sampler.reconcile({number: (state, value) for number, (_, state, value) in known.items()})
        for number, copy in copies.items():
            self.tables.retold(known[number][0], copy)
        self._record.write("running")
        self._mirror.sync(all_files=True)  # before a trial is drawn: without its space no search is gone on with
        if not self._listed:
            self._greet(choice)

    def _open_study(self) -> Sampler:
        search = self.space.search
        return Sampler(
            self.space,
            startup=self.plan.startup,
            journal=self.folder / STUDY_NAME,
            name=self.folder.name,
            kind=search.sampler,
            told=search.told,
        )

    def _greet(self, choice: Choice) -> None:
        room, trials = self.plan.concurrency, self.space.search.trials
        each = room.each(self.job.workers)
        if choice.resume:
            ended = len(self.tables.trials) - self.tables.count("running")
            self._say(
                f"going on with {shown(self.folder)}: {ended} of {trials} trials have ended, "
                f"{self.tables.count('running')} go on from their checkpoints"
            )
            for change in choice.changes:
                self._say(f"  changed: {change}")
        self._say(f"search {self.folder.name}: {trials} trials, {room.trials} at a time ({each} each)")

    def _end_complete_trials(self) -> None:
        """A process that was killed between a trial's last row and its end left that to us."""
        for trial in self.tables.unfinished():
            row = self.tables.newest(trial)
            if row.get("state") == "finished":
                self.tables.end(trial, "finished", f"all {row['epoch']} epochs trained")
            elif row.get("state") == "diverged":
                self.tables.end(trial, "diverged", f"epoch {row['epoch']}: the loss is not finite")

    def warm(self, warm: Warm) -> None:
        """Tell the sampler of earlier searches' trials."""
        self.sampler.add_finished(warm.points)
        for line in warm.lines:
            self._say(line)

    def close(self) -> None:
        """Give the folder free; safe to call twice, and where it was not opened."""
        self._held.close()

    # ---------------------------------------------------------------- running

    def run(self) -> Found:
        """Run what is left of the search, and write its files."""
        try:
            self._tune()
        except KeyboardInterrupt:
            self.draining.ask("interrupted", interrupted=True)
        except BaseException as error:
            if (trouble := storage_trouble(error)) is None:
                with suppress(StorageError):
                    self.tables.conclude("failed", first_line(error))
                    self._record.write("failed")
                    self.tables.write()
                raise
            self.draining.ask(trouble, interrupted=True, instead=True)
        return self._conclude()

    def _tune(self) -> None:
        space, room, draining = self.space, self.plan.concurrency, self.draining
        search, workers = space.search, self.job.workers
        queue = WorkQueue(
            self.tables,
            self.sampler,
            trials=search.trials,
            at_a_time=self._room,
            folder=self.folder,
            prefixes=self._prefixes(),
            closed=draining,
        )
        scheduler = StageASHA(
            search.metric,
            search.mode,
            total=self._clock.total,
            grace=search.grace,
            factor=search.factor,
            fork=self.plan.fork,
            min_peers=search.min_peers,
            brackets=search.brackets,
            seed=search.seed,
            clock=self._time,
            ledger=self.tables,
            draining=draining,
            exhausted=lambda: queue.exhausted,
        )
        scheduler.restore(
            self.tables.rungs, ended={t for t, row in self.tables.trials.items() if row["state"] != "running"}
        )
        monitor = Monitor(list(space.params), len(self.plan.rungs), search.trials)
        live = Live() if self._say is say and is_terminal() else None
        if live:
            self._say = live.say
        follow = Follow(
            self.tables,
            self.plan,
            self.plan.budget,
            monitor,
            draining,
            queue,
            say=self._say,
            course=self._course,
            live=live,
        )
        follow.look_at_budget()
        group = Shape(workers, room.worker)
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(run_trial, job=self.job),
                tune.PlacementGroupFactory([room.worker]) if workers == 1 else trial_resources(group, DRIVER_CPUS),
            ),
            tune_config=tune.TuneConfig(
                search_alg=queue,
                scheduler=scheduler,
                num_samples=-1,  # the queue says when it is at its end
                reuse_actors=True,
                trial_dirname_creator=_trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune" if len(self.tables.sessions) == 1 else f"tune-{len(self.tables.sessions)}",
                storage_path=str(self.folder),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=search.retries),
                stop=_AtTheEnd(draining, follow),
                # Not Tune's CSV: its columns are those of the first row, which has no clusters yet.
                callbacks=[follow, JsonLoggerCallback()],  # type: ignore[no-untyped-call]
            ),
        )
        with live or nullcontext(), logged_to(self.folder / "ray.log"), ended_by_signals(draining, self._say):
            tuner.fit()
            if live:
                live.update(view(self.tables, self.plan, self._course, running=False))

    def _time(self, trial: str, epoch: int) -> float:
        """The clock of a trial or prefix."""
        if trial not in self._lengths:
            self._lengths[trial] = stage_lengths(self.space.config_for(self.tables.values[trial]).stages)
        return self._clock.time(self._lengths[trial], epoch)

    def _prefixes(self) -> Prefixes | None:
        if self.plan.prefixes is None:
            return None
        job = self.job
        on_gpu = job.gpus > 0 and self.space.base.runtime.device != "cpu"
        environment: dict[str, str | int] = {
            "data": self._data_hash,
            "code": code_version(),
            "ranks": job.workers,
            "device": "cuda" if on_gpu else "cpu",
            "dtype": self.space.base.runtime.precision,
            "threads": max(1, int(job.cpus + 0.1)),  # the order of a sum on the CPU
            "torch": metadata.version("torch"),
        }
        if job.backbone is not None or self._data_hash == NO_DATA:
            # What a user's own function does is not known: its prefixes are for this search only.
            environment["search"] = f"{location(self.folder)} {self.tables.sessions[0]['time']}"

        def key(node: PrefixNode) -> str:
            return prefix_key(self.space.config_for(node.values), node.stage, environment)

        store = PrefixStore(self.folder.parent / "prefixes", self.folder.name)
        return Prefixes(self.plan.prefixes, store, key, self._time)

    # ---------------------------------------------------------------- its end

    def _conclude(self) -> Found:
        """Choose the best trial and write all files; where they cannot be written, the search is interrupted."""
        tables, draining = self.tables, self.draining
        if not draining() and (tables.unfinished() or len(tables.trials) < self.space.search.trials):
            draining.ask("interrupted", interrupted=True)  # Tune ended its loop by itself, as it does at SIGUSR1
        state = "interrupted" if draining.interrupted else "failed" if draining.at_once else "finished"
        found = self._found(state, draining.reason or ALL_ENDED)
        try:
            if state != "interrupted":
                self.sampler.close_running()
            tables.conclude(state, found.reason)
            tables.write()
            if found.best_trial and found.best and not self._listed:
                write(self.folder / "best.yaml", found.best, header(self.space, found, found.best_trial, self._own))
            self._record.write(state, found, self.tables.seconds_before())
            self._mirror.sync(all_files=True)
        except StorageError as error:
            told = draining.interrupted and found.reason != "interrupted"  # what came first is the cause
            reason = found.reason if told else str(error)
            return replace(found, state="interrupted", reason=reason)
        return found

    def _found(self, state: str, reason: str) -> Found:
        tables = self.tables
        best_trial = tables.best()
        return Found(
            folder=self.folder,
            trials=sorted(tables.trials.values(), key=lambda trial: trial["number"]),
            epochs=tables.epochs,
            prefixes=list(tables.prefixes.values()),
            epochs_trained=tables.epochs_trained(),
            best_trial=best_trial,
            best=self.space.config_for(tables.values[best_trial["trial_id"]]) if best_trial else None,
            chosen_by=tables.chosen_by(),
            seconds=self._record.seconds,
            state=state,
            reason=reason,
            notes=tables.notes,
            command=self._record.resume_command,
        )


class _AtTheEnd(tune.Stopper):
    """Ends Tune's loop when the search is to end and no trial has an epoch left to finish."""

    def __init__(self, draining: Draining, follow: Follow) -> None:
        self._draining, self._follow = draining, follow

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._draining() and (self._draining.at_once or self._follow.idle)


def _trial_id(trial: Any) -> str:
    return str(trial.config["trial"])
