"""The report's page: what it says first, what it rests on, and that nothing in it can do harm."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import write_search

from hpcl.analysis.report.answer import answer
from hpcl.analysis.report.page import main, render
from hpcl.analysis.report.table import STATIC_ROWS, table
from hpcl.errors import UserError
from hpcl.results import SearchResults, load_search, retrain_schema, write_table


def a_search(folder: Path, trials: int = 24, seed: int = 0, **more: Any) -> SearchResults:
    """A search of so many trials in which a low temperature is good and the curves tell it."""
    draw = np.random.default_rng(seed)
    fields = {"moco.temperature": draw.uniform(0.05, 0.5, trials), "clusters.first": draw.integers(2, 33, trials),
              "topk.mode": draw.choice(["add", "none"], trials)}  # fmt: skip
    objective = 0.9 - fields["moco.temperature"] + 0.01 * draw.standard_normal(trials)
    rise = 1 - np.exp(-np.arange(1, 13) / 4)
    curve = np.clip(objective[:, None] * rise + 0.01 * draw.standard_normal((trials, 12)), 0.01, 0.99)
    curves = {"acc_proto_ref": curve, "acc_proto": 1 - curve, "nce_ref": 4 - 3 * curve, "acc_inst": curve**2,
              "knn": curve, "clusters": np.full((trials, 12), 8.0), "stage": np.full((trials, 12), 3.0)}  # fmt: skip
    return write_search(folder, curves, objective, fields, **more)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> SearchResults:
    """A search with trials that finished, were stopped and diverged."""
    return a_search(tmp_path_factory.mktemp("report") / "s", rungs=[4.0], stopped={3: 4, 5: 4}, diverged={7: 2})


@pytest.fixture(scope="module")
def text(search: SearchResults) -> str:
    """Its page."""
    return render([search], galleries=False)


class _Page(HTMLParser):
    """Tags that would load something, run something, or that a text smuggled in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts = self.svgs = 0
        self.ids: list[str] = []
        self.outside: list[str] = []
        self.strange: list[str] = []
        self.alts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.scripts += tag == "script"
        if tag == "svg":
            self.svgs += 1
            self.alts.append(given.get("aria-label") or "")
        if given.get("id"):
            self.ids.append(str(given["id"]))
        for name in ("src", "href", "action", "data"):
            value = given.get(name) or ""
            if value and not value.startswith(("#", "data:")):
                self.outside.append(value)
        self.strange += [name for name, _ in attrs if name.startswith("on")]
        self.strange += [tag] * (tag in ("iframe", "object", "embed", "form", "base", "link"))


def test_the_first_screen_answers_before_anything_else(search: SearchResults, text: str) -> None:
    best = search.best
    assert best is not None
    body = text[text.index("<body>") :]
    first = body[: body.index("<nav")]
    assert f"Trial {best['trial_id']}: linear probe {best['objective']:.4f}" in first
    for said in ("the base (trial 0000)", "How sure?", "luckiest", "Cost", "CPU-hours", "Do the curves agree?"):
        assert said in first, said
    assert "Which curve to stop on?" in first
    assert "early stopping saved" in first


def test_the_page_loads_nothing_and_holds_every_section(text: str) -> None:
    page = _Page(text)
    assert not page.outside and not page.strange and page.scripts == 2  # the data of the table, and its script
    assert len(page.ids) == len(set(page.ids)), "an id stands twice"
    for section in (
        "best",
        "progress",
        "curves",
        "clusters",
        "importance",
        "slices",
        "parallel",
        "audit",
        "failures",
        "trials",
    ):
        assert section in page.ids, section
    assert page.svgs >= 9 and all(page.alts)
    assert "mathdefault" not in text  # a tick that is written as a formula
    assert "default-src 'none'" in text and "http:" not in text and "https:" not in text
    assert len(text) < 2_000_000


def test_numbers_in_charts_are_not_cut_off(search: SearchResults, text: str) -> None:
    least = search.trials["config.moco.temperature"].min()
    assert f">{least:.3g}<" in text and f"{least:.3g}" in re.sub(
        r"<[^>]*>", " ", text
    )  # an end of the axis, 0.05x, with all its digits


def test_several_seeds_speak_before_the_one_run(tmp_path: Path) -> None:
    search = a_search(tmp_path / "s", trials=12)
    best = str(search.best["trial_id"])
    rows = [
        {
            "trial_id": trial,
            "seed": seed,
            "state": "finished",
            "objective": value + 0.01 * seed,
            "search_objective": 0.5,
            "epochs": 12,
        }
        for trial, value in ((best, 0.6), ("0000", 0.8))
        for seed in range(3)
    ]
    write_table(tmp_path / "s" / "retrain.parquet", rows, retrain_schema())
    said = answer(load_search(tmp_path / "s"))
    assert said.headline.startswith("Trial 0000: linear probe 0.8100 ± 0.0100 (n = 3)") and best in said.headline
    assert "is more than its standard error" in said.sure


def test_the_page_is_about_the_trial_that_leads_by_its_seeds(tmp_path: Path) -> None:
    search = a_search(tmp_path / "s", trials=12)
    first, second, third = search.finished["trial_id"].iloc[:3]
    rows = [
        {"trial_id": trial, "seed": seed, "state": state, "objective": value, "search_objective": 0.5, "epochs": 12}
        for trial, seed, state, value in (
            (first, 0, "finished", 0.9), (first, 1, "diverged", None), (second, 0, "finished", 0.6),
            (second, 1, "finished", 0.61), (third, 0, "finished", 0.7), (third, 1, "finished", 0.71),
        )
    ]  # fmt: skip
    write_table(tmp_path / "s" / "retrain.parquet", rows, retrain_schema())
    search = load_search(tmp_path / "s")
    said = answer(search)
    assert said.headline.startswith(f"Trial {third}: ") and f"trial {first} was ahead" in said.headline
    assert f"Trial {first} is left out, though ahead: seed 1 diverged" in said.sure
    text = render([search], galleries=False)
    assert f"<th>trial {third}</th>" in text and f">best ({third})<" in text
    assert "By the median over seeds" in text


def test_what_was_picked_out_of_many_must_lie_further_ahead(tmp_path: Path) -> None:
    """A difference of 2.2 standard errors is told from chance between two trials, not for the best of 36."""
    said = {}
    for trials in (2, 36):
        objective = np.r_[0.85, np.full(trials - 2, 0.85), 0.90]
        curves = {"acc_proto_ref": np.tile(objective[:, None], (1, 3))}
        write_search(tmp_path / str(trials), curves, objective, {"moco.temperature": np.linspace(0.1, 0.2, trials)})
        path = tmp_path / str(trials) / "search.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"images": {"val": 450}}))
        said[trials] = answer(load_search(tmp_path / str(trials))).sure
    assert "2.3 of its standard errors" in said[2] and "more than the luckiest" in said[2]
    assert "2.3 of its standard errors" in said[36] and "chance alone" in said[36]


def test_savings_are_those_of_trials_that_were_stopped(tmp_path: Path) -> None:
    search = a_search(tmp_path / "s", trials=8, rungs=[6.0], stopped={1: 6, 2: 6}, diverged={3: 1, 4: 1})
    assert "early stopping saved 17% of the epochs" in answer(search).cost  # 12 of 4 x 12 + 2 x 12


def test_long_texts_are_cut_so_that_the_page_stays_small(tmp_path: Path) -> None:
    search = a_search(tmp_path / "s", trials=16, diverged={3: 5})
    frame = search.trials.copy()
    frame["stop_reason"] = "x" * 100_000
    frame.to_parquet(tmp_path / "s" / "trials.parquet")
    path = tmp_path / "s" / "search.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"notes": ["y" * 1_000_000]}))
    text = render([load_search(tmp_path / "s")], galleries=False)
    assert len(text) < 600_000 and "yyyy..." in text and "y" * 400 not in text


def test_the_images_of_the_probe_say_how_sure_one_run_is(tmp_path: Path) -> None:
    a_search(tmp_path / "s")
    path = tmp_path / "s" / "search.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": {"val": 450}}))
    search = load_search(tmp_path / "s")
    p, q = float(search.best["objective"]), float(search.base_trial["objective"])
    error = np.sqrt((p * (1 - p) + q * (1 - q)) / 450)
    assert f"{abs(p - q) / error:.1f} of its standard errors ({error:.4f}" in answer(search).sure


def test_a_search_without_a_finished_trial_has_a_page_too(tmp_path: Path) -> None:
    search = a_search(tmp_path / "s", trials=4, rungs=[4.0], stopped={0: 4, 1: 4, 2: 4, 3: 4})
    text = render([search], galleries=False)
    assert "No best configuration: no trial finished its schedule" in text and "It cannot be told" in text


def test_all_trials_are_in_the_page_and_the_best_stand_first(tmp_path: Path) -> None:
    search = a_search(tmp_path / "s", trials=60, rungs=[4.0], stopped=dict.fromkeys(range(10, 30), 4))
    made = table(search)
    rows = json.loads(gzip.decompress(base64.b64decode(made.data)))
    assert (len(rows), made.count, len(made.rows)) == (60, 60, STATIC_ROWS)
    names = [column["name"] for column in made.columns]
    assert [row[0] for row in rows[:40]] == search.finished["trial_id"].tolist()
    values = [row[names.index("objective")] for row in rows]
    assert values[:40] == sorted(values[:40], reverse=True) and values[40:] == [None] * 20
    assert made.columns[names.index("objective")]["title"] == "linear probe"


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    folder = tmp_path / "<b>bold a$\\frac$"  # of which a $ would begin a formula
    search = a_search(folder, diverged={3: 5})
    table_path = folder / "trials.parquet"
    frame = search.trials.copy()
    frame["stop_reason"] = frame["stop_reason"].where(frame["state"] != "diverged", evil)
    frame["config.topk.mode"] = frame["config.topk.mode"].replace("add", evil)
    frame.to_parquet(table_path)
    space = (folder / "space.yaml").read_text().replace("add", json.dumps(evil))
    (folder / "space.yaml").write_text(space)
    facts = json.loads((folder / "search.json").read_text())
    (folder / "search.json").write_text(json.dumps(facts | {"notes": [evil], "data": evil, "command": evil}))
    text = render([load_search(folder)], galleries=False)
    page = _Page(text)
    assert page.scripts == 2 and not page.outside and not page.strange
    assert "<b>bold" not in text and "&lt;b&gt;bold" in text


def test_several_searches_stand_side_by_side_with_ids_of_their_own(tmp_path: Path) -> None:
    text = render([a_search(tmp_path / "one", trials=9), a_search(tmp_path / "two", trials=9, seed=1)], galleries=False)
    page = _Page(text)
    assert len(page.ids) == len(set(page.ids)) and "compare" in page.ids and not page.outside
    assert {"s1-trials", "s2-trials"} <= set(page.ids)


def test_the_same_tables_give_the_same_page(search: SearchResults, text: str) -> None:
    one, two = (re.sub(r"Written [^<]*", "", page) for page in (text, render([search], galleries=False)))
    assert one == two


def test_the_command_writes_it_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_search(tmp_path / "s", trials=6)
    main([tmp_path / "s"], None, galleries=False)
    assert (tmp_path / "s" / "report.html").read_text().rstrip().endswith("</html>")
    assert "linear probe" in capsys.readouterr().out
    main([tmp_path / "s"], None, galleries=False)  # its own page is written again
    with pytest.raises(UserError, match="is a folder, but must be a file"):
        main([tmp_path / "s"], tmp_path, galleries=False)
    before = (tmp_path / "s" / "trials.parquet").read_bytes()
    with pytest.raises(UserError, match="is there already, and not written by `hpcl report`"):
        main([tmp_path / "s"], tmp_path / "s" / "trials.parquet", galleries=False)
    assert (tmp_path / "s" / "trials.parquet").read_bytes() == before
    with pytest.raises(UserError) as caught:
        main([tmp_path / "gone", tmp_path / "away"], tmp_path / "r.html")
    assert len(caught.value.problems) == 2 and not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("clusters@val", "was chosen on training images: the labels"),
        ("knn@val", "was chosen on validation images, whose"),
    ],
)
def test_the_labels_that_chose_are_those_of_the_images_that_were_looked_at(
    objective: str, words: str, tmp_path: Path
) -> None:
    a_search(tmp_path / "s")
    path = tmp_path / "s" / "search.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"objective": objective}))
    assert words in answer(load_search(tmp_path / "s")).labels


def test_a_trial_whose_method_has_no_clusters_is_not_said_to_have_kept_them(tmp_path: Path) -> None:
    found = a_search(tmp_path / "s", trials=6)
    best = found.finished.sort_values("objective")["trial_id"].iloc[-1]
    assert f"Trial {best} grew not at all." in render([found], galleries=False)
    found.epochs.loc[found.epochs["trial_id"] == best, "clusters"] = np.nan
    page = render([found], galleries=False)
    assert f"Trial {best} has no clusters." in page and f"Trial {best} grew" not in page
