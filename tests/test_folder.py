"""Which folder a search uses: new, gone on with, or refused; nothing is made by choosing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hpcl.errors import UserError
from hpcl.search import space as spaces
from hpcl.search.folder import MAY_DIFFER, choose_folder, differences
from hpcl.search.journal import JOURNAL_NAME, Journal
from hpcl.search.params import Resources, Search
from hpcl.yamlio import read_tree, write

FIELDS = "clusters.first: {int: [2, 32], log: true}\n  topk.mode: {choice: [add, none]}\n"


def space_of(fields: str = FIELDS, *changes: str, name: str = "mine", trials: int = 16) -> spaces.Space:
    text = f"name: {name}\nbase: {{preset: embedded}}\nspace:\n  {fields}\nsearch: {{trials: {trials}, grace: 4}}\n"
    return spaces.apply_overrides(spaces.from_tree(read_tree(text, "s.yaml")), changes)


def leave(folder: Path, space: spaces.Space, state: str, *, age: int = 0) -> Path:
    """A search as a process that ended `age` seconds ago left it."""
    folder.mkdir(parents=True)
    journal = Journal(folder / JOURNAL_NAME)
    journal.append("trial", trial="0000", number=0, values={}, optuna=0, shared=None)
    journal.close()
    write(folder / "space.yaml", space.to_tree())
    if state:
        (folder / "search.json").write_text(json.dumps({"state": state}))
    when = (folder / JOURNAL_NAME).stat().st_mtime - age
    os.utime(folder / JOURNAL_NAME, (when, when))
    return folder


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_the_first_search_gets_the_name_of_the_space(tmp_path: Path) -> None:
    space = space_of()
    for results in (tmp_path, tmp_path / "not" / "yet", str(tmp_path)):
        choice = choose_folder(space, None, results)
        assert (choice.folder, choice.resume, choice.changes) == (Path(results) / "mine", False, ())
    assert choose_folder(space, "other", tmp_path).folder == tmp_path / "other"
    assert listing(tmp_path) == []


@pytest.mark.parametrize("state", ["interrupted", "failed", "running", ""])
@pytest.mark.parametrize("name", [None, "mine"])
def test_an_unfinished_search_goes_on(tmp_path: Path, state: str, name: str | None) -> None:
    space = space_of()
    leave(tmp_path / "mine", space, state)
    before = listing(tmp_path)
    choice = choose_folder(space, name, tmp_path)
    assert (choice.folder, choice.resume, choice.changes) == (tmp_path / "mine", True, ())
    assert choose_folder(space, name, tmp_path, fresh=True).folder == tmp_path / "mine-2"
    assert not choose_folder(space, name, tmp_path, fresh=True).resume
    assert listing(tmp_path) == before


def test_a_finished_search_is_left_alone(tmp_path: Path) -> None:
    space = space_of()
    leave(tmp_path / "mine", space, "finished", age=10)
    assert choose_folder(space, None, tmp_path).folder == tmp_path / "mine-2"
    leave(tmp_path / "mine-2", space, "finished")
    choice = choose_folder(space, None, tmp_path)
    assert (choice.folder, choice.resume) == (tmp_path / "mine-3", False)
    assert choose_folder(space_of("topk.k: {int: [1, 3]}"), None, tmp_path).folder == tmp_path / "mine-3"
    with pytest.raises(UserError, match=r"mine: this search has finished; more --trials than 16 go on with it"):
        choose_folder(space, "mine", tmp_path)


def test_more_trials_or_a_larger_budget_go_on_with_a_finished_search_by_name(tmp_path: Path) -> None:
    old = space_of(FIELDS, "search.max_hours=2")
    leave(tmp_path / "mine", old, "finished")
    for change, there, here in (
        ("search.trials=17", "16", "17"),
        ("search.max_hours=3", "2.0", "3.0"),
        ("search.max_hours=null", "2.0", "null"),
    ):
        choice = choose_folder(spaces.apply_overrides(old, [change]), "mine", tmp_path)
        assert (choice.folder, choice.resume) == (tmp_path / "mine", True)
        assert choice.changes == (f"{change.partition('=')[0]}: {there} there, {here} here",)
    for less in ("search.trials=15", "search.max_hours=1", "search.max_epochs=9"):
        with pytest.raises(UserError, match="has finished"):
            choose_folder(spaces.apply_overrides(old, [less]), "mine", tmp_path)
    more = spaces.apply_overrides(old, ["search.trials=17"])
    assert choose_folder(more, None, tmp_path).folder == tmp_path / "mine-2"  # without a name: a new one
    with pytest.raises(UserError, match="holds a finished search of another space"):
        choose_folder(spaces.apply_overrides(more, ["search.seed=1"]), "mine", tmp_path)


def test_the_newest_unfinished_search_of_the_space_goes_on(tmp_path: Path) -> None:
    space = space_of()
    leave(tmp_path / "mine", space, "interrupted", age=30)
    leave(tmp_path / "mine-2", space, "interrupted", age=10)
    leave(tmp_path / "mine-10", space, "interrupted", age=20)
    leave(tmp_path / "mine-3", space, "finished")
    leave(tmp_path / "mine-4", space_of(name="mine-4"), "interrupted")  # another search's own name
    leave(tmp_path / "mine-0", space, "interrupted")
    assert choose_folder(space, None, tmp_path).folder == tmp_path / "mine-2"
    assert choose_folder(space, None, tmp_path, fresh=True).folder == tmp_path / "mine-5"
    other = space_of("topk.k: {int: [1, 3]}")
    assert choose_folder(other, None, tmp_path).folder == tmp_path / "mine-5"  # the newest has finished
    leave(tmp_path / "mine-5", other, "interrupted", age=-10)
    assert choose_folder(other, None, tmp_path).folder == tmp_path / "mine-5"
    assert choose_folder(space, None, tmp_path).folder == tmp_path / "mine-2"
    with pytest.raises(UserError, match="mine-5: holds an unfinished search of another space"):
        choose_folder(space_of("topk.k: {int: [1, 4]}"), None, tmp_path)


def test_without_the_first_folder_the_others_still_count(tmp_path: Path) -> None:
    space = space_of()
    leave(tmp_path / "mine-2", space, "interrupted")
    assert choose_folder(space, None, tmp_path).folder == tmp_path / "mine-2"
    assert choose_folder(space, "mine", tmp_path).folder == tmp_path / "mine"


@pytest.mark.parametrize("name", [None, "mine"])
def test_another_space_of_the_name_is_refused_field_by_field(tmp_path: Path, name: str | None) -> None:
    leave(tmp_path / "mine", space_of(), "interrupted")
    fields = "clusters.first: {int: [2, 16], log: true}\n  topk.k: {int: [1, 3]}"
    other = space_of(fields, "moco.temperature=0.2", "search.metric=nce_ref", "search.trials=20", "resources.workers=2")
    with pytest.raises(UserError) as caught:
        choose_folder(other, name, tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("mine: holds an unfinished search of another space (there / here):")
    assert lines[1:-1] == [
        "  moco.temperature: 0.1 there, 0.2 here",
        "  space: clusters.first: {int: [2, 32], log: true} there, {int: [2, 16], log: true} here",
        "  space: topk.mode: {choice: [add, none]} there, not searched here",
        "  space: topk.k: not searched there, {int: [1, 3]} here",
        "  search.metric: acc_proto_ref there, nce_ref here",
        "  resources.workers: 1 there, 2 here",
    ]
    assert lines[-1] == "give --fresh to start beside it, or another --name"
    assert choose_folder(other, name, tmp_path, fresh=True).folder == tmp_path / "mine-2"


def test_differences_behind_the_sixth_digit_or_the_sixtieth_letter_are_seen() -> None:
    def choices(last: int) -> spaces.Space:
        return space_of(f"clusters.first: {{choice: [{', '.join(map(str, range(100, 130)))}, {last}]}}")

    assert differences(choices(200), choices(200)) == ([], [])
    (text,), _ = differences(choices(200), choices(201))
    assert text.count("200") == 1 and text.count("201") == 1
    (text,), _ = differences(space_of(FIELDS, "moco.temperature=0.1"), space_of(FIELDS, "moco.temperature=0.10000001"))
    assert text == "moco.temperature: 0.1 there, 0.10000001 here"


def test_what_may_differ_is_told_and_let_through(tmp_path: Path) -> None:
    leave(tmp_path / "mine", space_of(), "interrupted")
    changes = {
        "search.trials": 9, "search.max_hours": 1.5, "search.max_gpu_hours": 2.0, "search.max_epochs": 99,
        "search.max_concurrent": 1, "search.ahead": 4, "search.retries": 0, "search.hung_after": 50,
        "search.give_up_after": 5, "resources.cpus_per_worker": 0.5, "resources.gpus_per_worker": 1,
        "resources.accelerator_type": "A100",
    }  # fmt: skip
    assert set(changes) == MAY_DIFFER
    choice = choose_folder(space_of(FIELDS, *(f"{k}={v}" for k, v in changes.items())), None, tmp_path)
    assert choice.resume
    assert {text.partition(":")[0] for text in choice.changes} == set(changes)
    assert choice.changes[0] == "search.trials: 16 there, 9 here"
    others = {*(f"search.{f}" for f in Search.model_fields), *(f"resources.{f}" for f in Resources.model_fields)}
    for path in others - MAY_DIFFER - {"search.mode"}:
        new = {
            "search.metric": "knn", "search.objective": "knn", "search.clock": "epoch", "search.sampler": "random",
            "search.told": "complete", "search.share_prefix": "false",
        }.get(path, "2")  # fmt: skip
        factor = "3" if path == "search.factor" else new
        refused, _ = differences(space_of(), space_of(FIELDS, f"{path}={factor}"))
        assert [text.partition(":")[0] for text in refused] == [path]


def test_more_trials_that_would_move_the_fork_are_refused(tmp_path: Path) -> None:
    fields = "growth.theta_start: {float: [0.0, 0.5]}\n  topk.k: {int: [1, 10]}"
    leave(tmp_path / "mine", space_of(fields, trials=16), "interrupted")
    assert choose_folder(space_of(fields, trials=18), None, tmp_path).resume
    with pytest.raises(UserError) as caught:
        choose_folder(space_of(fields, trials=20), None, tmp_path)
    assert "shared stages (they follow from search.trials): 1 there, 1 to 2 here" in str(caught.value)


def test_the_same_images_by_another_path_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    absolute, relative, other = (
        spaces.with_overrides(space_of(), data=source) for source in (str(tmp_path / "a"), "a", "b")
    )
    assert differences(absolute, relative) == ([], [])
    assert differences(absolute, other)[0] == [f"data.source: {tmp_path}/a there, {tmp_path}/b here"]
    assert differences(space_of(), space_of(name="else")) == ([], [])


@pytest.mark.parametrize("name", [None, "mine"])
def test_a_running_search_is_refused(tmp_path: Path, name: str | None) -> None:
    space = space_of()
    journal = Journal(leave(tmp_path / "mine", space, "running") / JOURNAL_NAME)
    with pytest.raises(UserError, match="mine: a search is running there; wait for it, give --fresh, or another"):
        choose_folder(space, name, tmp_path)
    assert choose_folder(space, name, tmp_path, fresh=True).folder == tmp_path / "mine-2"
    journal.close()
    assert choose_folder(space, name, tmp_path).resume


@pytest.mark.parametrize("name", [None, "mine"])
def test_what_is_not_a_search_is_refused(tmp_path: Path, name: str | None) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "trials.parquet").touch()  # of an older version
    with pytest.raises(UserError, match=r"mine: is there already, but holds no search that can go on \(no journal"):
        choose_folder(space_of(), name, tmp_path)
    assert choose_folder(space_of(), name, tmp_path, fresh=True).folder == tmp_path / "mine-2"
    (tmp_path / "mine-2").touch()  # a file
    assert choose_folder(space_of(), name, tmp_path, fresh=True).folder == tmp_path / "mine-3"


def test_a_space_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    folder = leave(tmp_path / "mine", space_of(), "interrupted")
    (folder / "space.yaml").write_text("base: {preset: embeded}\nspace: {topk.k: {int: [1, 3]}}\n")
    with pytest.raises(UserError, match=r"mine: its space.yaml cannot be read by this version \(.*embeded"):
        choose_folder(space_of(), None, tmp_path)
    (folder / "space.yaml").unlink()
    with pytest.raises(UserError, match=r"space.yaml cannot be read"):
        choose_folder(space_of(), None, tmp_path)  # trials were drawn of a space nobody knows


def test_a_search_that_was_killed_as_it_began_goes_on(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    Journal(tmp_path / "mine" / JOURNAL_NAME).close()
    for name in (None, "mine"):
        choice = choose_folder(space_of(), name, tmp_path)
        assert (choice.folder, choice.resume) == (tmp_path / "mine", True)


def test_names_that_cannot_be_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--name a/b: must be text that can name a folder"):
        choose_folder(space_of(), "a/b", tmp_path)
    for fresh in (True, False):
        with pytest.raises(UserError, match=r"cannot be made \(File name too long\); choose another with --results"):
            choose_folder(space_of(), "a" * 300, tmp_path, fresh=fresh)
