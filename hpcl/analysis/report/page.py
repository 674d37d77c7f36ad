"""``hpcl report``: one self-contained HTML file with a search's answer first, and what it rests on below.

The page fetches nothing: styles, the script of the table, charts (SVG) and pictures (data URIs) are in the file, and
its content policy allows nothing else. Sections are made by `sections`, sentences of the first screen by `answer`.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpcl
from hpcl.analysis.leading import evidence_of
from hpcl.analysis.report.answer import Answer, answer
from hpcl.analysis.report.gallery import CSS, environment
from hpcl.analysis.report.parts import Section
from hpcl.analysis.report.sections import of_search
from hpcl.analysis.report.table import MOST_TEXT, Table, table
from hpcl.analysis.report.together import comparison
from hpcl.errors import harmless
from hpcl.files import may_write, write_text
from hpcl.results import SearchResults
from hpcl.results.load import load_searches
from hpcl.search.places import shown

MOST_BYTES = 2_000_000
"""Size of a page with one search; what is larger goes without pictures of prototypes."""
MARKER = "written by hpcl report"
"""Stands at the beginning of each page, so that nothing else is ever overwritten."""
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """What the page says of one search."""

    name: str
    about: str
    answer: Answer
    robust: str
    robust_by: str
    verdict: str
    next: list[str]
    notes: list[str]
    sections: list[Section]
    table: Table


def write_report(searches: Sequence[SearchResults], out: Path, *, galleries: bool = True) -> None:
    """Write the page of one or several searches, atomically.

    Args:
        searches: the first one's answer stands first; with several, a comparison follows it.
        out: the file.
        galleries: show what the best trial's prototypes hold, where its checkpoint and its images are still there.

    Raises:
        StorageError: `out` cannot be written.
    """
    text = render(searches, galleries=galleries)
    if galleries and len(text) > MOST_BYTES * len(searches):
        text = render(searches, galleries=False)
    write_text(out, text)


def render(searches: Sequence[SearchResults], *, galleries: bool = True) -> str:
    """The page as text; see :func:`write_report`."""
    names = ", ".join(harmless(search.about.name) for search in searches)
    return (
        environment()
        .get_template("page.html")
        .render(
            marker=MARKER,
            title=f"{names}: results",
            css=(_HERE / "page.css").read_text(encoding="utf-8") + CSS,
            script=(_HERE / "table.js").read_text(encoding="utf-8"),
            parts=[_part(search, galleries) for search in searches],
            comparison=comparison(searches) if len(searches) > 1 else None,
            footer=f"Written {time.strftime('%Y-%m-%d %H:%M')} by hpcl {hpcl.__version__} from "
            f"{', '.join(harmless(str(search.folder)) for search in searches)}.",
        )
    )


def _part(search: SearchResults, galleries: bool) -> Part:
    told, made = of_search(search, galleries=galleries)
    return Part(
        name=harmless(search.about.name),
        about=harmless(_about(search)),
        answer=answer(search),
        robust=told.robust,
        robust_by=told.by,
        verdict=told.verdict,
        next=_next(search),
        notes=[harmless(note if len(note) <= MOST_TEXT else f"{note[:MOST_TEXT]}...") for note in search.about.notes],
        sections=made,
        table=table(search),
    )


def _about(search: SearchResults) -> str:
    about = search.about
    gpus = (about.facts.get("hardware") or {}).get("gpus") if isinstance(about.facts.get("hardware"), dict) else None
    cpu = (about.facts.get("hardware") or {}).get("cpu") if isinstance(about.facts.get("hardware"), dict) else None
    parts = [
        f"search of {len(search.fields)} fields" if about.kind == "hpcl" else "an experiment of Ray Tune",
        f"images {about.data}" if about.data else "",
        f"begun {str(about.started)[:16].replace('T', ' ')}" if about.started else "",
        f"on {len(gpus)} GPUs" if isinstance(gpus, list) and gpus else f"on {cpu}" if cpu else "",
        f"{about.state}" if about.state not in ("finished", "unknown") else "",
    ]
    return "; ".join(part for part in parts if part)


def _next(search: SearchResults) -> list[str]:
    """The commands that come next; none for a folder of Tune's, which they do not take."""
    where = harmless(shlex.quote(shown(search.folder)))
    if search.about.kind == "tune":
        return []
    if search.best is None:
        return [f"hpcl status {where}"]
    retrain = [f"hpcl retrain {where} --top 3 --seeds 3"]
    if evidence := evidence_of(search):
        seeds = 2 * max(standing.n for standing in evidence.standings)
        untold = "is not more than" in (evidence.over_base() or "")
        retrain = [f"hpcl retrain {where} --top 3 --seeds {max(seeds, 3)}"] if untold else []
    train = [f"hpcl train {where}/best.yaml"] if (search.folder / "best.yaml").is_file() else []
    checkpoint = Path("trials", str(search.best["trial_id"]), "checkpoint.pt")
    good_for = [f"hpcl evaluate {where}/{checkpoint}"] if (search.folder / checkpoint).is_file() else []
    return [*retrain, *good_for, f"hpcl suggest {where}", *train]


def main(
    folders: Sequence[Path], out: Path | None, *, metric: str | None = None, mode: Any = None, galleries: bool = True
) -> None:
    """Load the folders, write the page, and print where it is.

    Args:
        folders: results folders, or experiment folders of Ray Tune.
        out: the page; None: ``report.html`` in the first folder.
        metric, mode: as in :func:`hpcl.results.load_search`.
        galleries: as in :func:`write_report`.

    Raises:
        UserError: a folder cannot be read (all of them are named), or `out` cannot be written.
    """
    searches = load_searches(folders, metric=metric, mode=mode)
    page = out or Path(folders[0]) / "report.html"
    may_write(page, MARKER, "hpcl report", "name another file with --out")
    write_report(searches, page, galleries=galleries)
    first = answer(searches[0])
    print(harmless(f"{first.headline}\nwritten: {page} ({page.stat().st_size / 1000:,.0f} kB)"), flush=True)
