"""Rows of downstream.parquet as one table: each value over its seeds, beside what it is compared with. No torch.

How far `trained` is from a baseline carries a 95 % interval. Its variance has these parts: between seeds (label lists,
episodes, random starts), which n seeds average; between checkpoints, likewise (all seeds of a checkpoint share it, so
they count as one); and of the images that were scored, the same ones for every seed, which they do not average. The
last is known of accuracies and episodes, not of AMI, mAP and AP50. The two encoders are taken as independent though
they are scored on the same images: an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hpcl.analysis.text import aligned, counted, one_line
from hpcl.downstream.scores import LABELS_USED, TASK_NAMES, VOC_TASKS, Encoder, Score
from hpcl.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Value:
    """One encoder's value in one line of the table."""

    mean: float
    sd: float | None
    """Between runs; None for a single run, or where all runs must give the same."""
    n: int
    """Runs: seeds times checkpoints."""
    ci95: float | None
    """Half-width of the mean's interval over episodes; None for tasks without."""
    variance: float
    """Of a single run, from the images that were scored; 0 where nothing is known of it."""
    between: tuple[tuple[float, int], ...]
    """Variance of the mean, and its degrees of freedom, from the choice of checkpoints and of seeds."""

    @property
    def text(self) -> str:
        """Such as ``.893``, ``.893 ± .012`` (sd), or ``.612 [± .004]`` (interval over episodes)."""
        if self.ci95 is not None:
            return f"{_short(self.mean)} [± {_short(self.ci95)}]"
        return _short(self.mean) if self.sd is None else f"{_short(self.mean)} ± {_short(self.sd)}"


@dataclass(frozen=True)
class Difference:
    """How far `trained` is above a baseline."""

    against: str
    """`untrained`, or `supervised` where that is what no training means."""
    value: float
    low: float | None
    """Ends of its 95 % interval; None where nothing is known of the spread."""
    high: float | None

    @property
    def text(self) -> str:
        """Such as ``+.102 [+.071, +.133]``."""
        known = "" if self.low is None or self.high is None else f" [{_signed(self.low)}, {_signed(self.high)}]"
        return f"{_signed(self.value)}{known}{'' if self.against == 'untrained' else f' ({self.against})'}"


@dataclass(frozen=True)
class Line:
    """One line of the table: a task, a setting and a measure."""

    task: str
    setting: str
    measure: str
    values: dict[Encoder, Value]
    count: int
    """Images or episodes, as far as known of objects, that one value was scored on."""
    gain: Difference | None
    """Against the untrained encoder; None where one of the two is missing."""


def lines(rows: Iterable[Row]) -> list[Line]:
    """The lines of the table, by task as in :data:`hpcl.downstream.scores.TASK_NAMES`, then as they were measured."""
    groups: dict[tuple[str, str, str], dict[Encoder, list[Row]]] = {}
    for row in rows:
        key = (row["task"], row["setting"], row["measure"])
        groups.setdefault(key, {}).setdefault(row["encoder"], []).append(row)
    order = {task: place for place, task in enumerate(TASK_NAMES)}
    found = []
    for (task, setting, measure), by_encoder in sorted(groups.items(), key=lambda group: order.get(group[0][0], 99)):
        values = {encoder: _value(own) for encoder, own in by_encoder.items()}
        count = next(iter(by_encoder.values()))[0]["count"]
        found.append(Line(task, setting, measure, values, count, _gain(values)))
    return found


def _value(rows: Sequence[Row]) -> Value:
    x = np.array([row["value"] for row in rows])
    episodes = [row["ci95"] for row in rows if row["ci95"] is not None]
    columns = ("task", "setting", "measure", "encoder", "seed", "value", "count", "ci95")
    variance = float(np.mean([Score(**{name: row[name] for name in columns}).variance for row in rows]))
    return Value(
        mean=float(x.mean()),
        sd=float(x.std(ddof=1)) if len(x) > 1 and np.ptp(x) > 0 else None,
        n=len(x),
        # each seed draws its own episodes, so their means are averaged like any others
        ci95=float(np.sqrt(np.square(episodes).sum())) / len(episodes) if episodes else None,
        variance=variance,
        between=tuple(part for name in ("checkpoint_hash", "seed") if (part := _between(rows, name))),
    )


def _between(rows: Sequence[Row], name: str) -> tuple[float, int] | None:
    """Variance of the mean over the checkpoints, or seeds, and its degrees of freedom; None where all give the same.

    With both, the part that is of neither alone counts twice: on the safe side.
    """
    groups: dict[Any, list[float]] = {}
    for row in rows:
        groups.setdefault(row.get(name), []).append(row["value"])
    means = np.array([np.mean(values) for values in groups.values()])
    if len(means) < 2 or np.ptp(means) <= 1e-12:
        return None
    return float(means.var(ddof=1)) / len(means), len(means) - 1


def _gain(values: dict[Encoder, Value]) -> Difference | None:
    against = next((name for name in ("untrained", "supervised") if name in values), None)
    if "trained" not in values or against is None:
        return None
    a, b = values["trained"], values[against]
    parts: list[tuple[float, float]] = [part for v in (a, b) for part in v.between]
    parts += [(v.variance, math.inf) for v in (a, b) if v.variance]
    total = sum(variance for variance, _ in parts)
    if not total:
        return Difference(against, a.mean - b.mean, None, None)
    rate = sum(variance**2 / df for variance, df in parts)
    degrees = total**2 / rate if rate else 1e9  # Welch and Satterthwaite's
    half = float(stats.t.ppf(0.975, degrees)) * math.sqrt(total)
    return Difference(against, a.mean - b.mean, a.mean - b.mean - half, a.mean - b.mean + half)


COLUMNS: tuple[Encoder, ...] = ("trained", "untrained", "pixels", "supervised", "sgan")
NOTES = (
    "± is the standard deviation over seeds and checkpoints, absent where all runs give the same or there is one;",
    "[±] a 95 % interval over episodes, or over draws of labelled images;",
    "the difference's 95 % interval is of seeds, of checkpoints and, for accuracies alone, of the scored images,",
    "the encoders taken as independent.",
)


def alike(rows: Sequence[Row], checkpoint_hash: str | None = None) -> list[Row]:
    """The rows of one checkpoint on the part and the images that were scored last; those without a value left out.

    Rows of other checkpoints or images lie in the same table, and a mean over them says nothing.

    Args:
        rows: of a table, in its order.
        checkpoint_hash: of the checkpoint; None: that of the last row.
    """
    valued = [row for row in rows if None not in (row["value"], row["seed"], row["count"], *map(row.get, _NAMES))]
    own = [row for row in valued if checkpoint_hash in (None, row["checkpoint_hash"])]
    found: list[Row] = []
    for on_voc in (False, True):
        of_kind = [row for row in own if (row["task"] in VOC_TASKS) is on_voc]
        last = [tuple(row[name] for name in _SCORED) for row in of_kind[-1:]]
        found += [row for row in of_kind if tuple(row[name] for name in _SCORED) in last]
    return [row for row in found if row["split"] == own[-1]["split"]]


_NAMES = ("task", "setting", "measure", "encoder")
_SCORED = ("split", "checkpoint_hash", "source", "data_hash")


def newest(rows: Iterable[Row]) -> list[Row]:
    """The rows without those that were measured again later, of the same checkpoint and images."""
    what = ("task", "setting", "measure", "encoder", "seed", "split", "checkpoint_hash", "source", "data_hash")
    return list({tuple(row[name] for name in what): row for row in rows}.values())


def grid(found: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table, a column per encoder that was measured."""
    shown = [name for name in COLUMNS if any(name in line.values for line in found)]
    gains = any(line.gain for line in found)
    head = ["task", "setting", "measure", *shown, *(["over untrained [95 %]"] if gains else [])]
    cells = [
        [
            line.task,
            line.setting,
            line.measure,
            *(line.values[name].text if name in line.values else "" for name in shown),
            *([line.gain.text if line.gain else ""] if gains else []),
        ]
        for line in found
    ]
    return head, cells


def table(found: Sequence[Line]) -> str:
    """The lines as text, those of a task below its name, and what the figures mean."""
    head, cells = grid(found)
    rows: list[list[str]] = [["", *head[3:]]]
    begun: set[str] = set()
    for line, (task, setting, measure, *values) in zip(found, cells, strict=True):
        if task not in begun:
            begun.add(task)
            rows.append([f"{task} (n = {line.count:,})", *([""] * len(values))])
        rows.append([f"  {setting}{'' if line.measure == 'accuracy' else f': {measure}'}", *values])
    return "\n".join([*aligned(rows), "", *_notes(found)])


def _notes(found: Sequence[Line]) -> list[str]:
    """What the signs mean that occur in the table."""
    values = [value for line in found for value in line.values.values()]
    spread, episodes = any(v.sd is not None for v in values), any(v.ci95 is not None for v in values)
    shown = (spread, episodes, *[any(line.gain for line in found)] * (len(NOTES) - 2))
    return ["n is what one value was scored on: images, episodes or objects", *compress(NOTES, shown)]


def _short(value: float) -> str:
    """Three decimals without the zero before the point."""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:+.3f}"


def main(checkpoints: Sequence[Path], names: Sequence[str], out: Path, **options: Any) -> None:
    """Measure, add the rows to `out`, and print one table; options as of :func:`hpcl.evaluate.evaluate`."""
    from hpcl.evaluate import evaluate

    rows, left_out = evaluate(checkpoints, names, out, say=lambda text: print(one_line(text), flush=True), **options)
    if rows:
        print(f"\n{table(lines(rows))}")
    labels = [f"{name:<9} {LABELS_USED[name]}" for name in dict.fromkeys(names) if name not in left_out]
    if labels:
        print("\n".join(["", "labels that were used, besides those of the images that were scored:", *labels]))
    if not rows:
        raise UserError(f"none of the tasks could be measured ({', '.join(names)}); see above what they need")
    print("\n" + one_line(f"{counted(len(rows), 'row')} added to {out}"))
