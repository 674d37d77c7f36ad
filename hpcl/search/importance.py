"""How much each searched field mattered, by Optuna's PED-ANOVA and fANOVA, beside what chance alone would give.

An importance is never 0: with 20 trials a field that does nothing scores up to .34. So the same evaluator also scores
the same trials with their objectives dealt out anew at random, 39 times, and the noise floor is the largest importance
of any field in any of these deals. Where no field matters, the search's own objectives are one more such deal, and
each of the 40 is as likely as any other to hold the largest of all: so at most once in 40 searches a field is above
the floor by chance, all fields of the search considered at once, whatever n, ties and the fields' kinds. Read side by
side, the two methods name something by chance at most once in 20 searches.

- PED-ANOVA (Watanabe et al., IJCAI 2023): how unlike the values of the best quarter are to those of all trials.
- fANOVA (Hutter et al., ICML 2014): the part of the objective's variance that a field explains by itself, in a forest.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hpcl.results import Field
from hpcl.results.fields import shown
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
MOST = {"PED-ANOVA": 1000, "fANOVA": 100}
"""Trials that are looked at, at most; of more a seeded part. Both methods and all deals then take about 10 s."""
DEALS = 39
"""Random deals of the objectives for the noise floor: chance alone is above all of them once in DEALS + 1 searches."""
_TREES = 12
_TOP = 0.25
_CHOICES = 6
"""Values of a choice that fANOVA tells apart: its time doubles with each. Beyond, the rarest count as one."""
_LARGEST = 1e30
"""Numbers beyond this do not fit into a forest's float32; a field with such values is left out."""


@dataclass(frozen=True)
class Importance:
    """What one method says of the fields of a search."""

    method: Method
    fields: pd.DataFrame
    """Columns `field`, `importance` (0..1, their sum over the fields is 1), the largest first."""
    floor: float
    """Noise floor on the same scale (it may lie above 1): what is not above it may be chance."""
    n: int
    """Trials that were looked at."""
    deals: int
    """Random deals that the floor was made of: it is the largest importance in any of them, so where no field matters
    the most important one stays below it in `deals` of `deals` + 1 searches."""

    @property
    def told(self) -> list[str]:
        """Fields above the noise floor, the most important first."""
        return [str(row.field) for row in self.fields.itertuples() if row.importance > self.floor]

    def sentence(self) -> str:
        """What it says, in words."""
        floor = f"noise floor {self.floor:.2f}" if self.floor < 1 else "noise floor above all importance together"
        more = f"n = {self.n}, {floor}: chance stays below it in {self.deals} of {self.deals + 1} searches"
        if not self.told:
            return f"{self.method} tells no field from chance ({more})"
        return f"{self.method} tells from chance: {', '.join(self.told)} ({more})"


def importance(search: SearchResults, method: Method = "PED-ANOVA", *, seed: int = 0) -> Importance | None:
    """How much each searched field mattered for the objective among finished trials, and the noise floor.

    A field that did not act in a trial counts with the base's value, as the table has it. A number's field whose
    column holds no numbers (a list, a text) is left out.

    Args:
        search: its trials.
        method: one of :data:`METHODS`.
        seed: of the forest and the random deals; the same seed gives the same result.

    Returns:
        None where fewer than :data:`LEAST` trials finished with a finite objective, where their objectives are all
        equal, or no field has two values.
    """
    import numpy as np
    import pandas as pd

    trials = search.finished
    draw = np.random.default_rng(seed_of(seed, "importance", METHODS.index(method)))
    trials = trials[np.isfinite(trials["objective"].to_numpy(dtype=np.float64, na_value=np.nan))]
    if len(trials) > MOST[method]:
        trials = trials.iloc[np.sort(draw.choice(len(trials), MOST[method], replace=False))]
    values = _scaled(search.sign * trials["objective"].to_numpy(dtype=np.float64))
    columns = {
        f.path: (f, column)
        for f in search.fields.values()
        if f.column in trials and (column := _column(f, list(trials[f.column]), method)) is not None
    }
    if len(trials) < LEAST or not columns or values is None:
        return None
    with warnings.catch_warnings():
        # In a notebook tqdm, which Optuna imports, misses its widgets; PED-ANOVA says which end of a target it takes.
        warnings.simplefilter("ignore")
        points = _Points(columns)
        own = points.evaluate(method, values, seed)
        total = float(own.sum())
        if not total > 0:
            return None
        floor = max(float(points.evaluate(method, draw.permutation(values), seed).max()) for _ in range(DEALS))
    order = np.argsort(-own, kind="stable")
    table = pd.DataFrame({"field": [points.names[i] for i in order], "importance": own[order] / total})
    return Importance(method, table, floor / total, len(trials), DEALS)


class _Points:
    """Trials as Optuna has them; their objectives come with each evaluation."""

    def __init__(self, columns: dict[str, tuple[Field, list[Any]]]) -> None:
        import optuna

        self.names = list(columns)
        distributions = {path: _distribution(f, column) for path, (f, column) in columns.items()}
        rows = zip(*(column for _, column in columns.values()), strict=True)
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            self._study = optuna.create_study(direction="maximize")
            self._study.add_trials(
                [
                    optuna.trial.create_trial(
                        params=dict(zip(self.names, row, strict=True)), distributions=distributions, value=0.0
                    )
                    for row in rows
                ]
            )
        finally:
            optuna.logging.set_verbosity(level)

    def evaluate(self, method: Method, values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
        """Raw importances in the order of the fields; larger values are better."""
        import numpy as np
        from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator

        evaluator: Any = PedAnovaImportanceEvaluator(target_quantile=_TOP)
        sign = -1.0  # it looks at the trials with the lowest target
        if method == "fANOVA":
            evaluator, sign = FanovaImportanceEvaluator(n_trees=_TREES, seed=seed), 1.0
        try:
            found = evaluator.evaluate(
                self._study, params=self.names, target=lambda trial: sign * float(values[trial.number])
            )
        except RuntimeError:  # no tree has drawn two different objectives
            found = {}
        return np.array([max(0.0, float(found.get(name, 0.0))) for name in self.names])


def _scaled(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The values between 0 and 1, as squares of tiny or huge ones leave a float's range; None: no two differ."""
    import numpy as np

    most = float(np.abs(values).max(initial=0.0))
    if most == 0:
        return None
    values = values / most
    width = float(np.ptp(values))
    return (values - values.min()) / width if width > 0 else None


def _distribution(f: Field, column: list[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if f.kind == "choice":
        return CategoricalDistribution(tuple(dict.fromkeys(column)))
    low, high = min(column), max(column)
    if abs(f.low) <= _LARGEST and abs(f.high) <= _LARGEST:
        low, high = min(low, f.low), max(high, f.high)  # a base outside of the range widens it
    if f.kind == "int":
        low, high = math.floor(low), math.ceil(high)
        return IntDistribution(low, high, log=f.log and low >= 1)
    return FloatDistribution(low, high, log=f.log and low > 0)


def _column(f: Field, values: list[Any], method: Method) -> list[Any] | None:
    """The values of a field in the trials as Optuna takes them; None where they tell nothing, or are of another kind.

    A number that is not known counts as the median of the others.
    """
    import numpy as np

    if f.kind == "choice":
        texts = [shown(value) for value in values]
        frequent = Counter(texts).most_common()
        if method == "fANOVA" and len(frequent) > _CHOICES:
            rest = {text for text, _ in frequent[_CHOICES - 1 :]}
            texts = ["(others)" if text in rest else text for text in texts]
        return texts if len(set(texts)) > 1 else None
    numbers = np.array([_number(value) for value in values])
    known = np.isfinite(numbers)
    if not known.any() or np.abs(numbers[known]).max() > _LARGEST:
        return None
    numbers[~known] = np.median(numbers[known])
    if f.kind == "int":
        numbers = numbers.round()
    if len(set(numbers)) < 2:
        return None
    return [int(number) for number in numbers] if f.kind == "int" else [float(number) for number in numbers]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
