"""Several searches in one page: the best of all together, and all side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcl.analysis.charts import compare as charts
from hpcl.analysis.charts.look import listed
from hpcl.analysis.compare import compare
from hpcl.analysis.report.parts import draw
from hpcl.analysis.robust import robust_best
from hpcl.errors import UserError, harmless
from hpcl.results import SearchResults


@dataclass(frozen=True)
class Comparison:
    """Several searches side by side."""

    answer: str
    """The best of all together, and by what; or why they cannot be taken together."""
    svg: str
    text: str


def comparison(searches: Sequence[SearchResults]) -> Comparison:
    """Several searches side by side: the best so far over what they cost, and the table of ``hpcl compare``."""
    found = compare(searches)
    names = listed([search.about.name for search in searches])
    alt = f"Best so far over the hours spent, for {names}"
    over = draw(charts.best_over_hours(found), alt)
    alt = f"Where the winners of {names} lie in the ranges"
    places = draw(charts.winning_places(found), alt)
    return Comparison(
        answer=_together(searches),
        svg=f"<figure>{over.svg}</figure><figure>{places.svg}</figure>",
        text=harmless("\n".join(found.lines())),
    )


def _together(searches: Sequence[SearchResults]) -> str:
    try:
        found = robust_best(searches)
    except UserError as error:
        return harmless(f"They cannot be taken together: {'; '.join(error.problems)}")
    return harmless(f"Of all together {found.best.name}: {found.evidence()}.")
