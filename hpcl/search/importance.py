"""How much each searched field mattered, by Optuna's PED-ANOVA and fANOVA, beside what chance alone would give.

An importance is never 0: with 20 trials a field that does nothing scores up to .34. So the same evaluator also scores
the same trials with their objectives dealt out anew at random, some dozens of times. The noise floor is the value that
the largest importance of such a deal stays below in 95 of 100: a field above it is told from chance, all fields of the
search considered at once.

- PED-ANOVA (Watanabe et al., IJCAI 2023): how unlike the values of the best quarter are to those of all trials.
- fANOVA (Hutter et al., ICML 2014): the part of the objective's variance that a field explains by itself, in a forest.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hpcl.results.fields import Field, shown
from hpcl.rng import seed_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from hpcl.results import SearchResults

Method = Literal["PED-ANOVA", "fANOVA"]
METHODS: tuple[Method, ...] = ("PED-ANOVA", "fANOVA")

LEAST = 8
"""Finished trials below which nothing is computed."""
MOST = {"PED-ANOVA": 1000, "fANOVA": 150}
"""Trials that are looked at, at most; of more a seeded part (fANOVA's forest takes 20 s for 1,000)."""
DEALS = {"PED-ANOVA": 40, "fANOVA": 20}
"""Random deals of the objectives for the noise floor."""
_TREES = 16
_TOP = 0.25


@dataclass(frozen=True)
class Importance:
    """What one method says of the fields of a search."""

    method: Method
    fields: pd.DataFrame
    """Columns `field`, `importance` (0..1, their sum over the fields is 1), the largest first."""
    floor: float
    """Noise floor on the same scale (it may lie above 1): what is below it may be chance."""
    n: int
    """Trials that were looked at."""
    deals: int
    """Random deals that the floor was made of."""

    @property
    def told(self) -> list[str]:
        """Fields above the noise floor, the most important first."""
        return [str(row.field) for row in self.fields.itertuples() if row.importance > self.floor]

    def sentence(self) -> str:
        """What it says, in words."""
        floor = f"noise floor {self.floor:.2f}" if self.floor < 1 else "noise floor above all importance together"
        if not self.told:
            return f"{self.method} tells no field from chance (n = {self.n}, {floor})"
        return f"{self.method} tells from chance: {', '.join(self.told)} (n = {self.n}, {floor})"


def importance(search: SearchResults, method: Method = "PED-ANOVA", *, seed: int = 0) -> Importance | None:
    """How much each searched field mattered for the objective among finished trials, and the noise floor.

    A field that did not act in a trial counts with the base's value, as the table has it.

    Args:
        search: its trials.
        method: one of :data:`METHODS`.
        seed: of the forest and the random deals; the same seed gives the same result.

    Returns:
        None where fewer than :data:`LEAST` trials finished, or where their objectives are all equal.
    """
    import numpy as np

    trials = search.finished
    draw = np.random.default_rng(seed_of(seed, "importance", METHODS.index(method)))
    if len(trials) > MOST[method]:
        trials = trials.iloc[np.sort(draw.choice(len(trials), MOST[method], replace=False))]
    values = search.sign * trials["objective"].to_numpy(dtype=np.float64)
    fields = [f for f in search.fields.values() if f.column in trials and trials[f.column].nunique(dropna=True) > 1]
    if len(trials) < LEAST or not fields or np.ptp(values) == 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a notebook tqdm, which Optuna imports, misses its widgets
        import optuna  # noqa: F401
    points = _Points(trials, fields)
    own = points.evaluate(method, values, seed)
    total = float(own.sum()) or 1.0
    deals = DEALS[method]
    largest = [points.evaluate(method, draw.permutation(values), seed).max() for _ in range(deals)]
    order = np.argsort(-own, kind="stable")
    import pandas as pd

    table = pd.DataFrame({"field": [fields[i].path for i in order], "importance": own[order] / total})
    return Importance(method, table, float(np.quantile(largest, 0.95)) / total, len(trials), deals)


class _Points:
    """Trials as Optuna has them."""

    def __init__(self, trials: pd.DataFrame, fields: list[Field]) -> None:
        self.names = [f.path for f in fields]
        self.distributions = {f.path: _distribution(f, trials) for f in fields}
        columns = [_values(f, trials) for f in fields]
        self.params = [dict(zip(self.names, row, strict=True)) for row in zip(*columns, strict=True)]

    def evaluate(self, method: Method, values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
        """Raw importances in the order of the fields; larger values are better."""
        import numpy as np
        import optuna
        from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            level = optuna.logging.get_verbosity()
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            try:
                study = optuna.create_study(direction="maximize")
                study.add_trials(
                    [
                        optuna.trial.create_trial(params=p, distributions=self.distributions, value=float(v))
                        for p, v in zip(self.params, values, strict=True)
                    ]
                )
                evaluator: Any = (
                    PedAnovaImportanceEvaluator(target_quantile=_TOP)
                    if method == "PED-ANOVA"
                    else FanovaImportanceEvaluator(n_trees=_TREES, seed=seed)
                )
                found = evaluator.evaluate(study, params=self.names)
            finally:
                optuna.logging.set_verbosity(level)
        return np.array([max(0.0, float(found.get(name, 0.0))) for name in self.names])


def _distribution(f: Field, trials: pd.DataFrame) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if f.kind == "choice":
        return CategoricalDistribution(tuple(dict.fromkeys(_values(f, trials))))
    column = trials[f.column].dropna()  # a base outside of the range widens it
    low, high = min(f.low, float(column.min())), max(f.high, float(column.max()))
    log = f.log and low > 0
    if f.kind == "int":
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _values(f: Field, trials: pd.DataFrame) -> list[Any]:
    column = trials[f.column]
    if f.kind == "choice":
        return [shown(value) for value in column]
    middle = column.median()
    numbers = [float(middle if value != value or value is None else value) for value in column]
    return [round(number) for number in numbers] if f.kind == "int" else numbers
