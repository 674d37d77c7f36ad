"""``hpcl retrain results/<name>``: the best of a search at full length, on all images, with several seeds.

A search compares many configurations once, briefly, and perhaps on a part of the images. Here its
best ones and the base's are trained again through the same machinery, without early stops and
without anything shared, and ``best.yaml`` becomes the best mean.

    results/<name>/
      retrain/            a folder like that of a search: journal, tables, trials/<id>-seed<seed>/
      retrain.parquet     one row per run
      best.yaml           the best by this evidence; best-search.yaml is what the search chose

The same command goes on after an interruption. More seeds or a larger top add to what is there;
another length or other images do not compare with it and are refused.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpcl.data_rules import data_problems
from hpcl.errors import UserError, harmless
from hpcl.files import read_object, refuse_links, write_text
from hpcl.results import RETRAIN_COLUMNS, retrain_schema, write_table
from hpcl.search import space as spaces
from hpcl.search.cli import INTERRUPTED
from hpcl.search.evidence import Evidence
from hpcl.search.folder import RECORD_NAME, SPACE_NAME, Choice, differences
from hpcl.search.found import Found
from hpcl.search.interrupt import interruptible
from hpcl.search.journal import JOURNAL_NAME, read_events
from hpcl.search.listed import Listed, Run
from hpcl.search.mirror import is_running
from hpcl.search.places import location, place, shown
from hpcl.search.plan import counted, duration
from hpcl.search.progress import say
from hpcl.search.record import Looked
from hpcl.search.retrained import FOLDER, Retrained, header, next_command, summary, write_best
from hpcl.search.runner import look_at_data, planned, with_full_path
from hpcl.search.session import Session
from hpcl.search.space import Space
from hpcl.search.status import read
from hpcl.search.storage import check, exists, fetch, push
from hpcl.search.tables import Row, Tables
from hpcl.search.trial import Job, TrainFunction
from hpcl.sections import STAGES
from hpcl.stages import stage_lengths


@dataclass(frozen=True)
class _Search:
    """The search that a retraining follows."""

    folder: Path
    space: Space
    tables: Tables
    record: Mapping[str, Any]
    """``search.json``."""
    state: str
    """How it ended, as `hpcl status` says."""

    @property
    def base(self) -> str:
        """Trial 0."""
        return next(trial_id for trial_id, trial in self.tables.trials.items() if trial["number"] == 0)

    def seconds_per_epoch(self) -> float | None:
        """What an epoch took, on as many images as the search had."""
        seconds = [row["seconds"] for row in self.tables.epochs if row["seconds"] and not row["shared"]]
        return sum(seconds) / len(seconds) if seconds else None


def retrain(
    folder: str | Path,
    *,
    top: int = 3,
    seeds: int = 3,
    epochs: int | None = None,
    data: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    train: TrainFunction | None = None,
    backbone: Callable[[], Any] | None = None,
    say: Callable[[str], None] = say,
) -> Retrained:
    """Train the best configurations of a search again, and rewrite its ``best.yaml`` by that evidence.

    Args:
        folder: ``results/<name>`` of a search that does not run, or its URI.
        top: finished trials, the best ones; the base's configuration (trial 0) is retrained besides.
        seeds: runs of each, with the seeds after the search's own: with that one the trials were chosen, so it
            would favour them.
        epochs: total epochs of a run, the stages in proportion; None: see :func:`retraining_space`.
        data: images in place of the search's.
        workers: processes that train a run together, in place of the search's.
        address: as in :func:`hpcl.search.run`, like `train`, `backbone` and `say`.

    Raises:
        UserError: it is no search that can be retrained, the images cannot be read or do not fit, or what was
            retrained there before had another length or other images; then nothing was written.
        KeyboardInterrupt: interrupted before the first run, or twice.
    """
    if top < 1 or seeds < 1:
        raise UserError(f"--top is {top} and --seeds {seeds}, but both must be at least 1")
    with interruptible():
        check(folder)
        search = _read(place(folder), train, backbone)
        space = retraining_space(search.space, epochs=epochs, data=data, workers=workers)
        out = search.folder.resolve() / FOLDER
        fetch(out)
        earlier = _earlier(out, space, search.tables.values)
        chosen = _chosen(search, top)
        runs = _runs(search, chosen, [space.base.seed + 1 + i for i in range(seeds)], earlier)
        space = replace(space, search=space.search.model_copy(update={"trials": len(runs)}))
        to_do = [run for run in runs if run.name not in earlier.trials or run.name in earlier.unfinished()]
        found = None
        if to_do:
            looked = None
            if train is None:
                from hpcl.trainer import fit

                train, looked = fit, _look(space, runs, say)
                if data is None and search.record.get("data_hash") not in (None, looked.digest):
                    say(f"note: the images at {space.base.data.source} have changed since the search")
            for line in _plan(search, space, chosen, runs, to_do, top, len(earlier.unfinished())):
                say(line)
            own = None if backbone is None else getattr(backbone, "__name__", type(backbone).__name__)
            with planned(space, out, address, say) as (plan, nodes):
                room = plan.concurrency
                job = Job(space, train, backbone, room)
                line = f"{min(room.trials, len(to_do))} at a time ({room.each(job.workers)} each)"
                same = data is None and workers is None
                say(line + (_forecast(search, space, to_do, earlier, room.trials) if same else ""))
                session = Session(plan, job, looked, nodes, own, say, listed=Listed(runs), address=address)
                try:
                    session.open(Choice(out, resume=True))
                    found, earlier = session.run(), session.tables
                finally:
                    session.close()
        return _conclude(search, space, runs, earlier, found)


def retraining_space(
    space: Space, *, epochs: int | None = None, data: str | None = None, workers: int | None = None
) -> Space:
    """What the runs of a retraining have in common: the space without stops, shared stages and limits.

    They train on all images (`data.subset` 1) at full length. That is `epochs`; else, where the
    search scaled the stages to a total, their lengths as they stand in the base (the notes' 150
    epochs where the base keeps them), as the total of all runs where lengths are searched; else
    the trial's own lengths. It is never shorter than the search.

    Raises:
        ConfigError: a value does not fit; names the flag.
    """
    stages = space.base.stages
    total, own = stages.total, sum(stages.of(stage).epochs for stage in STAGES)
    if total is not None and total < own:
        lengths = {f"stages.stage{stage}.epochs" for stage in STAGES}
        total = own if lengths & space.params.keys() else None
    limits = dict.fromkeys(("max_hours", "max_gpu_hours", "max_epochs", "grace"))
    search = space.search.model_copy(update={**limits, "share_prefix": False, "brackets": 1})
    base = space.base.with_values({"data.subset": 1.0, "stages.total": total})
    plain = replace(space, base=base, search=search)
    return with_full_path(spaces.with_overrides(plain, data=data, workers=workers, epochs=epochs))


def main(folder: str | Path, **options: Any) -> int:
    """``hpcl retrain``; returns the exit code.

    0: ``best.yaml`` holds the best by this evidence; 1: no run finished, or all failed alike; 3: results could not be
    written any more; 130: interrupted.

    Raises:
        UserError: as :func:`retrain`.
    """
    try:
        retrained = retrain(folder, **options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(harmless(summary(retrained)), flush=True)
    if retrained.found is not None and retrained.found.interrupted:
        return retrained.found.exit_code
    return 0 if retrained.best is not None else 1


# ---------------------------------------------------------------- before


def _read(folder: Path, train: TrainFunction | None, backbone: Callable[[], Any] | None) -> _Search:
    """The search in a folder, if it can be retrained."""
    full, where = folder.resolve(), location(folder)
    if full.name == FOLDER and exists(full.parent / JOURNAL_NAME):
        raise UserError(
            f"{where}: these are the runs of a retraining; give the search's own folder, {location(folder.parent)}"
        )
    status = read(folder)
    space, tables = status.plan.space, status.tables
    if status.state == "running":
        raise UserError(f"{where}: the search is still running; wait for its end, or end it with Ctrl-C")
    if not tables.ranking():
        counts = {state: tables.count(state) for state in ("finished", "stopped", "failed", "diverged", "running")}
        states = ", ".join(f"{n} {'cut short' if s == 'running' else s}" for s, n in counts.items() if n)
        raise UserError(
            f"{where}: no trial finished its schedule with a value of {tables.chosen_by()} ({states}), so there is "
            "nothing to retrain; go on with the search, with more --trials where it has ended"
        )
    if not any(trial["number"] == 0 for trial in tables.trials.values()):
        raise UserError(f"{where}: its {JOURNAL_NAME} has no trial with number 0, the base; put a copy of it back")
    record = read_object(folder / RECORD_NAME)
    known, used = space.base.model.backbone, record.get("backbone")
    call = "retrain it from Python: hpcl.search.retrain.retrain(folder"
    if backbone is None and used not in (None, known):
        # It is the folder's word, and somebody may paste it into Python.
        named = used if isinstance(used, str) and used.isidentifier() else "..."
        raise UserError(f"{where}: was searched with a backbone of your own ({used}); {call}, backbone={named})")
    if train is None and record.get("data_hash") is None:
        raise UserError(f"{where}: was searched with a train function of your own; {call}, train=...)")
    return _Search(folder, space, tables, record, status.state)


def _earlier(out: Path, space: Space, known: Mapping[str, Any]) -> Tables:
    """The runs that an earlier call began; empty tables where there was none. `known`: the search's trials.

    Raises:
        UserError: they run now, or do not compare with what is asked for now.
    """
    refuse_links(out.parent)
    journal, tables = out / JOURNAL_NAME, Tables(out, space)
    if not journal.is_file():
        return tables
    if is_running(out):
        raise UserError(f"{shown(out)}: a retraining is running there; wait for its end")
    refused, _ = differences(spaces.load(out / SPACE_NAME), space)
    if refused:
        raise UserError(
            "\n  ".join([f"{shown(out)}: holds runs that do not compare with these (there / here):", *refused])
            + "\ngive the same --epochs, --data and --workers again; or rename that folder, which begins anew"
        )
    tables.replay(read_events(journal))
    for name, values in tables.values.items():
        if "seed" not in values or _trial_of(name) not in known:
            raise UserError(
                f"{shown(journal)}: {name} is no run of this search's trials; rename its folder to begin anew"
            )
    return tables


def _chosen(search: _Search, top: int) -> list[str]:
    """The trials to retrain: the best ones, and the base's."""
    best = [trial["trial_id"] for trial in search.tables.ranking()[:top]]
    return best if search.base in best else [*best, search.base]


def _runs(search: _Search, chosen: Sequence[str], seeds: Sequence[int], earlier: Tables) -> list[Run]:
    """All runs, those of earlier calls first, as their numbers are; then seed by seed, so that a retraining that is
    cut short has something of every configuration."""
    values = search.tables.values
    runs = [Run(_trial_of(name), earlier.values[name]["seed"], values[_trial_of(name)]) for name in earlier.trials]
    new = [Run(trial, seed, values[trial]) for seed in seeds for trial in chosen]
    return runs + [run for run in new if run.name not in earlier.trials]


def _trial_of(name: str) -> str:
    return name.partition("-")[0]


def _look(space: Space, runs: Sequence[Run], say: Callable[[str], None]) -> Looked:
    """Load the images; what they are.

    Raises:
        UserError: they cannot be read, or a configuration does not fit them.
    """
    from hpcl.data import load

    looked = look_at_data(replace(space, params={}))  # the base; the others below, by themselves
    images = load(space.base.data)
    problems = [
        f"{images.source}: trial {trial}: {problem}"
        for trial, values in {run.trial: run.values for run in runs}.items()
        for problem in data_problems(space.config_for(values), len(images.train), space.resources.workers)
    ]
    if problems:
        raise UserError(*problems)
    say(looked.line)
    return looked


def _plan(
    search: _Search,
    space: Space,
    chosen: Sequence[str],
    runs: Sequence[Run],
    to_do: Sequence[Run],
    top: int,
    begun: int,
) -> list[str]:
    """What will be trained; `begun` of the runs were cut short."""
    finished = search.tables.ranking()
    number = min(top, len(finished))
    what = "its finished trial" if len(finished) == 1 else f"the best {number} of {len(finished)} finished trials"
    besides = "" if len(chosen) == number else f", and its base (trial {search.base}) to compare with"
    lines = [f"retraining {shown(search.folder)}: {what}{besides}"]
    if top > len(finished):
        lines.append(f"note: --top is {top}, but {counted(len(finished), 'trial')} finished; no more are retrained")
    if search.state != "finished":
        lines.append(f"note: the search itself has not ended ({search.state}); its best so far is what is retrained")
    for trial in dict.fromkeys([*chosen, *(run.trial for run in runs)]):
        seeds = ", ".join(str(run.seed) for run in to_do if run.trial == trial)
        row = search.tables.trials[trial]
        then = next((f"{search.tables.chosen_by()} {t['objective']:.4g}" for t in finished if t is row), row["state"])
        epochs = _epochs(space, search.tables.values[trial])
        todo = f"seed{'s' if ',' in seeds else ''} {seeds}" if seeds else "all seeds have ended"
        was = f"{then} after {row['epochs']} epochs in the search"
        lines.append(f"  trial {trial}  {todo}, {epochs} epochs  ({was}{', base' if trial == search.base else ''})")
    before = len(runs) - len(to_do)
    ended = f" ({begun} cut short before)" if begun else ""
    ended += f", {before} more have ended before" if before else ""
    subset = search.space.base.data.subset
    images = "" if subset == 1.0 else f", on all training images (the search used a part: data.subset {subset:g})"
    return [*lines, f"{counted(len(to_do), 'run')} to train{ended}{images}"]


def _epochs(space: Space, values: Mapping[str, Any]) -> int:
    return sum(stage_lengths(space.config_for(values).stages))


def _forecast(search: _Search, space: Space, to_do: Sequence[Run], earlier: Tables, at_a_time: int) -> str:
    """How long the runs take if an image takes as long as in the search."""
    pace = search.seconds_per_epoch()
    if pace is None:
        return ""
    left = sum(_epochs(space, run.values) - earlier.newest(run.name).get("epoch", 0) for run in to_do)
    seconds = left * pace / search.space.base.data.subset / min(at_a_time, len(to_do))
    return f", about {duration(seconds)} at the search's pace"


# ---------------------------------------------------------------- after


def _conclude(search: _Search, space: Space, runs: Sequence[Run], tables: Tables, found: Found | None) -> Retrained:
    """Write ``retrain.parquet``, ``best.yaml`` where all runs have ended, and what `search.json` keeps."""
    rows = _rows(search, runs, tables)
    write_table(search.folder / "retrain.parquet", rows, retrain_schema())
    evidence = Evidence(rows, base=search.base, chosen_by=tables.chosen_by(), searched_by=search.tables.chosen_by())
    state, best, then = "finished" if found is None else found.state, None, None
    if evidence.best is not None and state == "finished":
        trial = evidence.best.trial_id
        best = space.config_for(search.tables.values[trial])
        run = min((run for run in runs if run.trial == trial), key=lambda run: run.seed)
        best = best.with_values({"seed": run.seed})  # what that run has trained
        write_best(search.folder, best, header(search.folder.resolve().name, evidence, run, tables.trials[run.name]))
        then = next_command(search.folder, evidence, run, tables.trials[run.name])
    # Read anew: the search may have been gone on with meanwhile.
    fetch(search.folder, {RECORD_NAME})
    record = json.loads((search.folder / RECORD_NAME).read_text(encoding="utf-8"))
    record["retrained"] = {
        "state": state,
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data": space.base.data.source,
        "runs": len(rows),
        **{name: sum(row[name] for row in rows) for name in ("gpu_hours", "cpu_hours")},
        **evidence.facts(),
    }
    write_text(search.folder / RECORD_NAME, json.dumps(record, indent=2) + "\n")
    push(search.folder)
    return Retrained(search.folder, evidence, state, best, found, then)


def _rows(search: _Search, runs: Sequence[Run], tables: Tables) -> list[Row]:
    """One row per run, by trial and seed."""
    then = {trial["trial_id"]: trial["objective"] for trial in search.tables.ranking()}
    # Only values on one scale: see Tables.ranking.
    now = {trial["trial_id"]: trial["objective"] for trial in tables.ranking()}
    empty = {"state": "running", "epochs": 0, "seconds": 0.0, "gpu_hours": 0.0, "cpu_hours": 0.0}
    rows = []
    for run in sorted(runs, key=lambda run: (run.trial, run.seed)):
        trial = tables.trials.get(run.name, empty)
        row = {column.name: trial.get(column.name) for column in RETRAIN_COLUMNS}
        facts = {"trial_id": run.trial, "seed": run.seed, "objective": now.get(run.name)}
        rows.append({**row, **facts, "search_objective": then.get(run.trial)})
    return rows
