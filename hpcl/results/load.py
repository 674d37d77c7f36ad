"""A whole results folder in memory: tidy pandas frames and what is known about the search.

    search = load_search("results/clusters")
    search.trials.sort_values("objective")        # one row per trial
    search.epochs.query("trial_id == '0003'")     # one row per trial and epoch
    search.curves("acc_proto_ref")                # (trials, epochs) array, NaN where there is none

Neither Ray nor torch is needed, and nothing is run or unpickled: Parquet, JSON and YAML are read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hpcl.errors import UserError
from hpcl.results.about import Mode, read_about
from hpcl.results.columns import EPOCH_COLUMNS, NO_CURVES, RETRAIN_COLUMNS, TRIAL_COLUMNS
from hpcl.results.fields import from_space, from_table
from hpcl.results.frames import read_frame, sound_epochs, sound_fields, sound_trials, to_frame
from hpcl.results.search import SearchResults


def load_search(path: str | os.PathLike[str], *, metric: str | None = None, mode: Mode | None = None) -> SearchResults:
    """Read a results folder, or an experiment folder of Ray Tune as far as its files go.

    Args:
        path: ``results/<name>``; it may be of a search that runs, was cut short, or was made by an older version.
            Or a folder of Tune's, with a folder per trial that has ``result.json`` or ``progress.csv``.
        metric: curve by which trials are compared, where the folder does not say it, or another one.
        mode: its better end, where its name does not tell.

    Returns:
        The frames have all documented columns, also those that the files lack (then empty).

    Raises:
        UserError: there is no such folder, nothing in it can be read, or it has no such curve.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give that of a search, results/<name>")
    if not (folder / "trials.parquet").is_file():
        from hpcl.results.tune import load_tune

        return load_tune(folder, metric, mode)
    search = _own(folder)
    if metric is None and mode is None:
        return search
    known = [name for name in search.measured(search.numeric) if name not in NO_CURVES]
    if metric is not None and metric not in known:
        raise UserError(f"{folder}: has no curve {metric}; there are: {', '.join(known) or 'none'}")
    about = replace(search.about, metric=metric or search.about.metric, mode=mode)
    return replace(search, about=about)


def load_searches(
    paths: Sequence[str | os.PathLike[str]], *, metric: str | None = None, mode: Mode | None = None
) -> list[SearchResults]:
    """Several folders by :func:`load_search`.

    Raises:
        UserError: none is given, or some cannot be read; names all of them.
    """
    found: list[SearchResults] = []
    problems: list[str] = []
    for path in paths:
        try:
            found.append(load_search(path, metric=metric, mode=mode))
        except UserError as error:
            problems += error.problems
    if problems or not paths:
        raise UserError(*(problems or ["give the folder of a search, results/<name>"]))
    return found


def _own(folder: Path) -> SearchResults:
    import pyarrow as pa

    notes: list[str] = []
    trials = sound_trials(folder / "trials.parquet", read_frame(folder / "trials.parquet", TRIAL_COLUMNS), notes)
    if (folder / "epochs.parquet").is_file():
        epochs = sound_epochs(read_frame(folder / "epochs.parquet", EPOCH_COLUMNS), trials, notes)
    else:
        epochs = to_frame(pa.table({}), EPOCH_COLUMNS)
        notes.append("there is no epochs.parquet: no curves can be shown")
    retrained = folder / "retrain.parquet"
    retrain = read_frame(retrained, RETRAIN_COLUMNS) if retrained.is_file() else to_frame(pa.table({}), RETRAIN_COLUMNS)
    retrain = retrain.dropna(subset=["trial_id", "seed"]).reset_index(drop=True)
    about, space = read_about(folder, epochs, notes)
    fields = from_space(space) or from_table(trials)
    before = len(notes)
    sound_fields(trials, fields, notes)
    about = replace(about, notes=(*about.notes, *notes[before:]))
    return SearchResults(folder, about, fields, trials, epochs, retrain)
