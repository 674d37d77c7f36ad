"""What the rules of notes_rules.py have in common: the table they read, the answers they give, and the words for them.

Legend: k clusters of a level, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

COLUMNS = (
    "set", "targets", "policy", "head", "batch", "seed", "epoch", "stage", "clusters", "acc_proto", "acc_inst",
    "loss_proto", "knn", "objective",
)  # fmt: skip
"""Of the table. `set` is `sweep` (growth every second epoch), `held` (one count, few epochs), `rule` (grown by the
policy) or `head` (one count, many epochs); the others name what was varied and, from `epoch` on, the run's columns."""

Answer = Literal["confirmed", "in part", "not confirmed", "not seen here"]

MOST = 2 / 3
"""Share of seeds, or of growths, that counts as "most"."""


@dataclass(frozen=True)
class Verdict:
    """What came of one observation."""

    name: str
    """Such as `A1`."""
    answer: Answer
    rule: str
    """What had to be seen, in words."""
    figures: str
    """What was seen."""

    def __str__(self) -> str:
        return f"{self.name}: {self.answer}\n  rule: {self.rule}\n  seen: {self.figures}"


def answer(by_seed: Sequence[bool], together: bool = False) -> Answer:
    """The answer where each seed does or does not show it, and the seeds taken together do or do not."""
    if not len(by_seed):
        return "not seen here"
    if all(by_seed):
        return "confirmed"
    return "in part" if together or sum(by_seed) / len(by_seed) >= MOST else "not confirmed"


def part(table: pd.DataFrame, **values: object) -> pd.DataFrame:
    """The rows with these values, of the stage that grows where the set is not `head`."""
    for column, value in values.items():
        table = table[table[column] == value]
    return table if values.get("set") == "head" else table[table["stage"] == 3]


def growths(table: pd.DataFrame) -> pd.DataFrame:
    """Every step from an epoch to the next of the same run: seed, old and new count, change of both accuracies."""
    steps = []
    for seed, run in table.sort_values("epoch").groupby("seed"):
        old, new = run.iloc[:-1], run.iloc[1:]
        steps.append(
            pd.DataFrame(
                {
                    "seed": seed,
                    "old": old["clusters"].to_numpy(),
                    "new": new["clusters"].to_numpy(),
                    "proto": new["acc_proto"].to_numpy() - old["acc_proto"].to_numpy(),
                    "inst": new["acc_inst"].to_numpy() - old["acc_inst"].to_numpy(),
                }
            )
        )
    return pd.concat(steps) if steps else pd.DataFrame(columns=["seed", "old", "new", "proto", "inst"])


def pcl_floor(k: int, batch: int) -> float:
    """Loss in nats of `pcl` targets when every image lies at its prototype and far from all others.

    The mean of log m, where m - 1 ~ Binomial(B - 1, 1/k) others of the batch share the prototype of an image and count
    as wrong.
    """
    shared = np.arange(batch)
    return float((stats.binom.pmf(shared, batch - 1, 1 / k) * np.log1p(shared)).sum())


def by_count(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean over the epochs at a count: one row per count, one column per seed."""
    return table.pivot_table(index="clusters", columns="seed", values=column, aggfunc="mean")


def judged(rule: Callable[..., Verdict], given: Answer, figures: str, name: str) -> Verdict:
    """The verdict of a rule, whose docstring says it in words."""
    return Verdict(name, given, " ".join((rule.__doc__ or "").split()), figures)


def spread(values: Sequence[float] | pd.Series, digits: int = 3) -> str:
    """Mean ± sd (n) of the values that are there."""
    known = [float(value) for value in values if np.isfinite(value)]
    sd = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{sd} (n = {len(known)})" if known else "nothing (n = 0)"


def share_of(hits: Sequence[bool] | pd.Series) -> str:
    return f"{int(np.sum(hits))} of {len(hits)}"
