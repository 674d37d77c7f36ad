"""An experiment folder of Ray Tune as a search: what its text files say, without Ray.

    <experiment>/experiment_state-*.json      how each trial ended
    <experiment>/<trial>/params.json          its configuration
    <experiment>/<trial>/result.json          a line per report; or progress.csv, which Tune writes besides

Pickled files (``tuner.pkl``, ``params.pkl``) could run code when they are read, and are not. So metric and mode, which
only they hold, are guessed from the names of this project's curves, or have to be said.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hpcl.errors import UserError
from hpcl.files import read_object, read_some
from hpcl.results.about import About, Mode, is_number
from hpcl.results.columns import EPOCH_COLUMNS, NO_CURVES, RETRAIN_COLUMNS, TRIAL_COLUMNS
from hpcl.results.fields import PREFIX, from_table, shown
from hpcl.results.frames import LARGEST, MOST_EPOCHS, sound_fields, to_frame
from hpcl.results.search import SearchResults, sign_of

_MOST = 2**30
_BOOKKEEPING = frozenset(
    {
        "timestamp", "training_iteration", "trial_id", "date", "time_this_iter_s", "time_total_s", "pid", "hostname",
        "node_ip", "time_since_restore", "iterations_since_restore", "checkpoint_dir_name", "done", "config",
        "should_checkpoint", "experiment_tag", "episodes_total", "timesteps_total", "timesteps_since_restore", "begun",
    }
)  # fmt: skip
"""What Tune itself puts into every report."""
_LIKELY = ("acc_proto_ref", "acc_proto", "inst_ref", "acc_inst", "nce_ref", "loss")
_SHOWN = 12
_FITS: dict[str, Callable[[Any], bool]] = {
    "int64": lambda value: is_number(value) and float(value).is_integer() and abs(value) < 2**53,
    "float64": is_number,
    "string": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
}
_TYPES = {column.name: _FITS[column.type] for column in EPOCH_COLUMNS}


def load_tune(folder: Path, metric: str | None = None, mode: Mode | None = None) -> SearchResults:
    """Read an experiment folder of Tune's; see :func:`hpcl.results.load_search`.

    A trial that ended without an error is `finished` where it came to the most reports of any, else `stopped`: which
    of the two Tune's own files do not say. Its objective is the metric's last value.

    Raises:
        UserError: no trial can be read there, or no curve is known to compare them by.
    """
    found = {each.name: each for each in sorted(folder.iterdir()) if each.is_dir() and _reports(each)}
    if not found:
        raise UserError(
            f"{folder}: not the results of a search; there is no trials.parquet, and no folder of a Tune trial in it "
            "(with result.json or progress.csv)"
        )
    notes = [
        "read from an experiment folder of Ray Tune: rungs, reasons, what trials shared and what they held are not in "
        "its files; hours are those of a trial, whatever it held"
    ]
    ends = _ends(folder, notes)
    trials: list[dict[str, Any]] = []
    epochs: list[dict[str, Any]] = []
    columns: dict[str, None] = {}
    other: dict[str, None] = {}
    for name, each in found.items():
        if name.startswith("prefix-"):  # what this project's trials share; no trial
            continue
        rows = _rows(each, notes, other)
        tune_id = next((str(row["_tune_id"]) for row in rows if row["_tune_id"]), name)
        done = "ended" if rows and rows[-1]["_done"] else "running"
        trials.append(
            {"trial_id": name, "number": len(trials), "state": ends.get(tune_id, done), **_config(each, rows)}
        )
        for row in rows:
            epochs.append({"trial_id": name, **{k: v for k, v in row.items() if not k.startswith("_")}})
            columns |= dict.fromkeys(epochs[-1])
    if not epochs:
        raise UserError(f"{folder}: its {len(found)} trials have reported nothing yet; look again later")
    if other:
        notes.append(f"{', '.join(other)}: here something else has this name, so it stands as reported.<name>")
    curves = [name for name in columns if name not in NO_CURVES and _is_curve(name, epochs)]
    metric = metric or next((name for name in _LIKELY if name in curves), None)
    if metric is None or metric not in curves:
        some = ", ".join(curves[:_SHOWN]) + (f" and {len(curves) - _SHOWN} more" if len(curves) > _SHOWN else "")
        said = f"has no curve {metric}" if metric else "does not say which curve its trials are compared by"
        raise UserError(f"{folder}: {said}; name one of these: {some or 'there are none'}")
    _finish(trials, epochs, metric)
    if any(trial["state"] == "stopped" for trial in trials):
        notes.append("a trial that ended after fewer reports than others counts as stopped; it may have been meant so")
    frame = to_frame(_table(trials), TRIAL_COLUMNS)
    fields = from_table(frame)
    sound_fields(frame, fields, notes)
    if mode is None and sign_of(metric) > 0 and re.search("loss|err|nll|perplexity", metric, re.IGNORECASE):
        mode = "min"
        notes.append(f"a lower {metric} is taken as better, by its name")
    about = About(folder.resolve().name, "tune", metric=metric, mode=mode, objective=metric, notes=tuple(notes))
    by_epoch = to_frame(_table(epochs), EPOCH_COLUMNS)
    return SearchResults(folder, about, fields, frame, by_epoch, to_frame(_table([]), RETRAIN_COLUMNS))


def _reports(trial: Path) -> bool:
    return (trial / "result.json").is_file() or (trial / "progress.csv").is_file()


def _ends(folder: Path, notes: list[str]) -> dict[str, str]:
    """Tune's id of a trial -> failed, running, or ended (how is told by its epochs)."""
    ends: dict[str, str] = {}
    for path in sorted(folder.glob("experiment_state-*.json")):
        try:
            for entry in read_object(path).get("trial_data") or ():
                trial = json.loads(entry[0]) if isinstance(entry, list) and entry else {}
                status = str(trial.get("status"))
                ends[str(trial.get("trial_id"))] = {"TERMINATED": "ended", "ERROR": "failed"}.get(status, "running")
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            notes.append(f"{path.name} cannot be read ({error}): which trials failed is not known")
    if not ends:
        notes.append("there is no experiment_state file: which trials failed is not known")
    return ends


def _rows(trial: Path, notes: list[str], other: dict[str, None]) -> list[dict[str, Any]]:
    """The reports of a trial by epoch; of an epoch that was reported twice (a retry) the later one.

    `other` takes the names that hold something else than this project's columns of these names.
    """
    rows: dict[int, dict[str, Any]] = {}
    for count, report in enumerate(_read(trial, notes), start=1):
        if "begun" in report and "epoch" not in report:
            continue  # this project's sign of life before the first epoch
        epoch = report.get("epoch", report.get("training_iteration", count))
        if not is_number(epoch) or not 1 <= epoch <= MOST_EPOCHS:
            continue
        row: dict[str, Any] = {}
        for name, value in _flat(report).items():
            if name.split(".")[0] in _BOOKKEEPING:
                continue
            value = None if isinstance(value, float) and not abs(value) < LARGEST else value
            # What this project means by a name may be something else there: stage: "warmup".
            fits = value is None or name not in _TYPES or _TYPES[name](value)
            row[name if fits else f"reported.{name}"] = value
            other |= {} if fits else {name: None}
        took: tuple[Any, ...] = (row.get("seconds"), report.get("time_this_iter_s"))
        row["seconds"] = next((float(each) for each in took if is_number(each) and each >= 0), None)
        rows[int(epoch)] = {**row, "epoch": int(epoch), "clock": row.get("clock") or float(epoch), "shared": False,
                            "_tune_id": report.get("trial_id"), "_config": report.get("config"),
                            "_done": report.get("done") is True}  # fmt: skip
    return [rows[epoch] for epoch in sorted(rows)]


def _read(trial: Path, notes: list[str]) -> Iterator[Mapping[str, Any]]:
    path = trial / "result.json"
    if path.is_file():
        try:
            content = read_some(path, _MOST)
        except OSError as error:
            notes.append(f"{trial.name}/result.json cannot be read ({error})")
            return
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                report = json.loads(line)
            except (ValueError, RecursionError):
                notes.append(f"{trial.name}/result.json: line {number} is no JSON and was left out")
                continue
            if isinstance(report, dict):
                yield report
        return
    import pandas as pd

    try:
        for report in pd.read_csv(trial / "progress.csv").to_dict("records"):
            yield {str(name): value for name, value in report.items()}
    except (OSError, ValueError) as error:
        notes.append(f"{trial.name}/progress.csv cannot be read ({error})")


def _config(trial: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial's configuration as columns ``config.<path>``."""
    try:
        config: Any = read_object(trial / "params.json")
    except (OSError, ValueError):
        config = next((row["_config"] for row in rows if isinstance(row["_config"], dict)), {})
    if isinstance(config.get("values"), dict) and {"trial", "folder", "home"} <= set(config):
        config = config["values"]  # a job of this project
    return {PREFIX + path: value for path, value in _flat(config).items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; Tune's CSV has slashes."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = prefix + str(name).replace("/", ".")
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, path + ".")
        else:
            flat[path] = value if value is None or isinstance(value, (bool, int, float, str)) else shown(value)
    return flat


def _is_curve(name: str, epochs: list[dict[str, Any]]) -> bool:
    values = [row[name] for row in epochs if row.get(name) is not None]
    return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _finish(trials: list[dict[str, Any]], epochs: list[dict[str, Any]], metric: str) -> None:
    """Give each trial what follows from its reports."""
    of_trial: dict[str, list[dict[str, Any]]] = {}
    for row in epochs:
        of_trial.setdefault(row["trial_id"], []).append(row)
    longest = max(rows[-1]["epoch"] for rows in of_trial.values())
    for trial in trials:
        rows = of_trial.get(trial["trial_id"], [])
        last = rows[-1] if rows else {}
        values = [row[metric] for row in rows if row.get(metric) is not None]
        trial["epochs"] = last.get("epoch", 0)
        trial["metric"] = values[-1] if values else None
        trial["seconds"] = math.fsum(row.get("seconds") or 0.0 for row in rows)
        if trial["state"] in ("ended", "running") and last.get("state") in ("finished", "diverged"):
            trial["state"] = last["state"]  # this project's rows say it
        elif trial["state"] == "ended":
            trial["state"] = "finished" if trial["epochs"] == longest else "stopped"
        trial["objective"] = last.get(metric) if trial["state"] == "finished" else None
        trial["gpu_hours"], trial["cpu_hours"] = 0.0, trial["seconds"] / 3600
    # Nothing says in which order reports came: trial by trial is as good as any.
    for arrival, row in enumerate(epochs):
        row["arrival"] = arrival


def _table(rows: list[dict[str, Any]]) -> Any:
    """Rows as an Arrow table; a column whose values are of several kinds becomes text."""
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row)
    arrays = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, ValueError, TypeError):
            texts = [None if value is None else shown(value) for value in values]
            # A lone surrogate, which JSON can hold, is no text that a table could.
            arrays[name] = pa.array([text and text.encode("utf-8", "replace").decode() for text in texts])
    return pa.table(arrays)
