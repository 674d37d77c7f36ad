"""`hpcl retrain`: what it trains, what it says of it, and the best.yaml that it writes."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import scripted
from test_evidence import evidence

import hpcl.search
from hpcl import Config, load_config
from hpcl.cli import main as cli_main
from hpcl.errors import ConfigError, UserError
from hpcl.results import read_rows, retrain_schema
from hpcl.search.cluster import connected
from hpcl.search.folder import differences
from hpcl.search.journal import Journal, read_events
from hpcl.search.listed import Listed, Run
from hpcl.search.retrain import retrain, retraining_space
from hpcl.search.retrained import BEST, BEST_OF_SEARCH, Retrained, header, next_command, summary, write_best
from hpcl.search.space import Space, apply_overrides, from_tree
from hpcl.search.tables import Tables
from hpcl.stages import stage_lengths
from hpcl.yamlio import read_tree, write


def make(text: str, *changes: str) -> Space:
    return apply_overrides(from_tree(read_tree(text), name="scripted"), changes)


# ---------------------------------------------------------------- best.yaml


def test_best_yaml_says_by_what_and_keeps_the_searchs_own_once(tmp_path: Path) -> None:
    told = evidence(t0000=(0.2, [0.2, 0.3]), t0001=(0.1, [0.5, 0.6]), t0002=(0.3, [0.7, "diverged"]))
    row, run = {"state": "finished", "epochs": 30}, Run("0001", 0, {})
    write(tmp_path / BEST, Config(), "Best of the 3 finished trials of search demo: trial 0002.")
    own = (tmp_path / BEST).read_bytes()
    for seed in (7, 8):
        write_best(tmp_path, Config(seed=seed), header("demo", told, run, row))
        assert (tmp_path / BEST_OF_SEARCH).read_bytes() == own
        assert load_config(tmp_path / BEST) == Config(seed=seed)
    text = (tmp_path / BEST).read_text()
    assert text.startswith("# Retrained: trial 0001 of search demo, the best mean of 3 configurations.\n")
    for words in (
        "linear probe 0.5500 ± 0.0707 (n = 2)",
        "in the search: linear probe 0.1",
        "Next is trial 0000 with 0.2500 ± 0.0707 (n = 2): the difference of 0.3000 is more than its standard error",
        "Left out: trial 0002, 0.7000 (n = 1 of 2); seed 1 diverged: out of luck.",
        "The base (trial 0000): 0.2500 ± 0.0707 (n = 2).",
        "Kendall's tau 0.33 (n = 3",
        "Trained already, through 30 epochs: retrain/trials/0001-seed0/",
    ):
        assert words in text
    # The search went on and chose another one: that is kept now.
    write(tmp_path / BEST, Config(), "Best of the 9 finished trials of search demo: trial 0008.")
    write_best(tmp_path, Config(), header("demo", told, run, row))
    assert "trial 0008" in (tmp_path / BEST_OF_SEARCH).read_text().splitlines()[0]


def test_the_next_command_is_about_the_run_that_is_there(tmp_path: Path) -> None:
    run, curve = Run("0001", 3, {}), evidence("nce_ref", t0001=(0.1, [0.5]))
    there, lost = {"state": "finished", "epochs": 3}, {"state": "failed", "epochs": 1}
    probe = evidence(t0001=(0.1, [0.5]))
    checkpoint = tmp_path / "retrain" / "trials" / "0001-seed3" / "checkpoint.pt"
    assert next_command(tmp_path, probe, run, there) == f"hpcl knn {checkpoint}"
    assert next_command(tmp_path, curve, run, there) == f"hpcl export {checkpoint} backbone.pt"
    assert next_command(tmp_path, probe, run, lost) == f"hpcl train {tmp_path / 'best.yaml'}"


# ---------------------------------------------------------------- what is trained

SPACE = """
base: {preset: embedded, data: {subset: 0.5}, model: {dim: 16}, optimizer: {weight_decay: 1.0}, stages: {total: 12}}
space:
  optimizer.weight_decay: {float: [1.0e-8, 1.0], log: true}
search: {trials: 4, grace: null, max_concurrent: 2, max_hours: 1, seed: 2}
"""

LENGTHS = """
base: {preset: embedded, data: {subset: 0.5}}
space:
  stages.stage3.epochs: {int: [10, 100]}
search: {grace: 5, max_epochs: 99}
"""


def epochs_of(space: Space, **values: Any) -> int:
    return sum(stage_lengths(space.config_for({path.replace("__", "."): v for path, v in values.items()}).stages))


def test_full_length_is_that_of_the_stages_and_all_images_are_used() -> None:
    full = retraining_space(make(SPACE))
    assert full.base.data.subset == 1.0 and full.base.stages.total is None and full.epochs == 150
    assert (full.search.grace, full.search.max_hours, full.search.share_prefix) == (None, None, False)
    assert full.params == make(SPACE).params and full.search.objective == make(SPACE).search.objective
    assert retraining_space(make(SPACE), epochs=30).epochs == 30
    longer = make(SPACE, "stages.total=300")
    assert retraining_space(longer).epochs == 300  # never shorter than the search
    own = make(SPACE, "stages.total=null", "stages.stage1.epochs=7")
    assert retraining_space(own).epochs == 137
    assert retraining_space(make(SPACE), workers=2).resources.workers == 2


def test_searched_lengths_keep_one_total_where_the_search_had_one() -> None:
    full = retraining_space(make(LENGTHS))
    assert epochs_of(full, stages__stage3__epochs=10) == epochs_of(full, stages__stage3__epochs=100) == 150
    free = retraining_space(make(LENGTHS, "stages.total=null"))
    assert epochs_of(free, stages__stage3__epochs=10) == 110
    assert full.search.grace is None and full.search.max_epochs is None


def test_a_flag_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--epochs 3: .*stages.total is 3"):
        retraining_space(make(SPACE), epochs=3)
    with pytest.raises(ConfigError, match="--workers 3"):
        retraining_space(make(SPACE), workers=3)


def test_more_runs_compare_and_another_length_does_not() -> None:
    a, b = (retraining_space(make(SPACE), epochs=n) for n in (30, 31))
    assert differences(a, apply_overrides(a, ["search.trials=99"]))[0] == []
    assert differences(a, b)[0] == ["stages.total: 30 there, 31 here"]


def test_runs_are_handed_out_with_their_seed_and_name() -> None:
    listed = Listed([Run("0003", 7, {"model.dim": 16}), Run("0003", 8, {"model.dim": 16})])
    assert listed.ask(1) == ({"model.dim": 16, "seed": 8}, None) and listed.name(1) == "0003-seed8"


# ---------------------------------------------------------------- refusals


def searched(folder: Path, states: list[str], *, data_hash: str | None = "abc", backbone: str = "convnet") -> Path:
    """The folder of a search that ended, with trials in these states."""
    space = make(SPACE)
    folder.mkdir()
    write(folder / "space.yaml", space.to_tree())
    record = {"hardware": {"nodes": [{"CPU": 2.0}]}, "data_hash": data_hash, "backbone": backbone}
    (folder / "search.json").write_text(json.dumps(record))
    journal = Journal(folder / "journal.jsonl")
    tables = Tables(folder, space, journal)
    tables.session(command="python run_search.py", gpus=0.0, cpus=1.0)
    for number, state in enumerate(states):
        trial = f"{number:04d}"
        tables.begin(trial, number, {"optimizer.weight_decay": 1.0})
        tables.add(trial, {"epoch": 1, "stage": 1, "state": state, "acc_proto_ref": 0.1 * number, "objective": 0.5})
        tables.end(trial, state, "for a reason")
    tables.conclude("finished", "all trials have ended")
    journal.close()
    return folder


@pytest.mark.parametrize(
    ("states", "facts", "words"),
    [
        (["stopped", "failed"], {}, r"no trial finished .*\(1 stopped, 1 failed\)"),
        (["finished"], {"backbone": "mine"}, r"backbone of your own \(mine\).*backbone=mine"),
        (["finished"], {"data_hash": None}, "train function of your own"),
    ],
)
def test_what_cannot_be_retrained_is_refused(
    states: list[str], facts: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = searched(tmp_path / "demo", states, **facts)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=words):
        retrain(folder)
    assert sorted(folder.iterdir()) == before


def test_other_folders_are_refused_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = searched(tmp_path / "demo", ["finished"])
    searched(folder / "retrain", ["finished"])
    for given, words in (
        (tmp_path / "none", "there is no such folder"),
        (tmp_path, "no search was run here"),
        (folder / "retrain", f"give the search's own folder, {folder}"),
    ):
        monkeypatch.setattr(sys, "argv", ["hpcl", "retrain", str(given)])
        with pytest.raises(SystemExit) as exit_:
            cli_main()
        assert exit_.value.code == 2 and words in capsys.readouterr().err
    journal = Journal(folder / "journal.jsonl")
    try:
        with pytest.raises(UserError, match="still running"):
            retrain(folder)
    finally:
        journal.close()
    with pytest.raises(UserError, match="--seeds 0"):
        retrain(folder, seeds=0)


# ---------------------------------------------------------------- through Ray


def worse(config: Config) -> float:
    """The objective of the retraining here: the other way round than in the search, and by seed."""
    return 1.0 - scripted.probe(config) + 0.001 * config.seed**2


def train(config: Config, folder: Path, report: Callable[[dict[str, Any]], None], **options: Any) -> None:
    """The scripted trainer; on all images another objective, and no seed 3 for the base."""
    with open(folder / "processes", "a") as file:
        file.write(f"{config.data.subset} {config.seed}\n")
    if config.seed == 3 and config.optimizer.weight_decay == 1.0:
        raise UserError("not this seed; choose another")

    def change(row: dict[str, Any]) -> None:
        if row["objective"] is not None and config.data.subset == 1.0:
            row["objective"] = worse(config)
        report(row)

    scripted.train(config, folder, change, **options)


@dataclass
class Step:
    """One call of `retrain`, and the folder as it was after it."""

    result: Retrained
    said: list[str]
    folder: Path
    rows: list[dict[str, Any]] = field(init=False)
    record: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = read_rows(self.folder / "retrain.parquet")
        self.record = json.loads((self.folder / "search.json").read_text())["retrained"]


class Story:
    """A search; then its best 2 with 2 seeds; then more of both, interrupted and gone on with."""

    def __init__(self, results: Path) -> None:
        self.folder = results / "demo"
        with connected(None):
            self.found = hpcl.search.run(make(SPACE), name="demo", results=results, train=train, say=lambda line: None)
            self.own = (self.folder / BEST).read_bytes()
            self.first = self.step("first", top=2, seeds=2)
            self.cut = self.step("cut", top=3, seeds=3, interrupt=True)
            self.more = self.step("more", top=3, seeds=3)
        self.again = self.step("again", top=1, seeds=1)  # without Ray

    def step(self, name: str, *, top: int, seeds: int, interrupt: bool = False) -> Step:
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            if interrupt and line.startswith("["):
                signal.raise_signal(signal.SIGINT)

        result = retrain(self.folder, top=top, seeds=seeds, epochs=14, train=train, say=say)
        copy = self.folder.with_name(f"after {name}")
        shutil.copytree(self.folder, copy, ignore=shutil.ignore_patterns("tune*"))
        return Step(result, said, copy)

    @property
    def ranking(self) -> list[str]:
        """The search's trials, the best first."""
        return [t["trial_id"] for t in sorted(self.found.trials, key=lambda t: -t["objective"])]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    yield Story(tmp_path_factory.mktemp("results"))


def test_the_best_and_the_base_are_trained_with_each_seed_in_full(story: Story) -> None:
    chosen = [*story.ranking[:2], "0000"]
    assert story.ranking[-1] == "0000"  # the script's base is the worst in the search
    assert {(row["trial_id"], row["seed"]) for row in story.first.rows} == {(t, s) for t in chosen for s in (1, 2)}
    assert pq.read_table(story.first.folder / "retrain.parquet").schema.equals(retrain_schema())
    for row in story.first.rows:
        folder = story.first.folder / "retrain" / "trials" / f"{row['trial_id']}-seed{row['seed']}"
        assert (folder / "processes").read_text() == f"1.0 {row['seed']}\n"
        assert (row["state"], row["epochs"]) == ("finished", 14)
        trial = next(t for t in story.found.trials if t["trial_id"] == row["trial_id"])
        assert row["search_objective"] == trial["objective"]
        wd = trial["config.optimizer.weight_decay"]
        assert row["objective"] == pytest.approx(
            worse(Config().with_values({"optimizer.weight_decay": wd, "seed": row["seed"]}))
        )
    assert not (story.first.folder / "retrain" / "optuna.journal").exists()
    assert not (story.first.folder / "retrain" / BEST).exists()
    epochs = read_rows(story.first.folder / "retrain" / "epochs.parquet")
    assert len(epochs) == 6 * 14 and not any(row["shared"] for row in epochs)


def test_best_yaml_is_the_best_mean_in_full(story: Story) -> None:
    best, step = load_config(story.first.folder / BEST), story.first
    assert step.result.best == best and step.result.state == "finished"
    assert (best.optimizer.weight_decay, best.seed) == (1.0, 1)  # the base: the order is the other way round here
    assert best.data.subset == 1.0 and sum(stage_lengths(best.stages)) == 14
    assert (step.folder / BEST_OF_SEARCH).read_bytes() == story.own
    assert step.record["best"] == "0000" and step.record["state"] == "finished"
    assert (step.record["kendall_tau"], step.record["kendall_n"]) == (-1.0, 3)
    means = {c["trial"]: c["mean"] for c in step.record["configurations"]}
    for trial, mean in means.items():
        values = [row["objective"] for row in step.rows if row["trial_id"] == trial]
        assert mean == pytest.approx(sum(values) / 2)
    assert json.loads((step.folder / "search.json").read_text())["state"] == "finished"  # of the search, as it was
    text = summary(step.result)
    assert "done after" in text and "Kendall's tau -1.00 (n = 3; so few tell little)" in text
    assert f"hpcl knn {step.result.folder}/retrain/trials/0000-seed1/checkpoint.pt" in text


def test_the_plan_comes_first(story: Story) -> None:
    said = story.first.said
    assert f"retraining {story.folder}: the best 2 of 4 finished trials, and its base" in said[0]
    assert said[1].startswith(f"  trial {story.ranking[0]}  seeds 1, 2, 14 epochs  (linear probe")
    assert "6 runs to train" in said[4] and "data.subset 0.5" in said[4] and said[5] == "starting Ray ..."
    assert said[6].startswith("2 at a time (1 x ")
    assert "6 more have ended before" in "\n".join(story.cut.said)


def test_more_of_both_adds_to_what_is_there(story: Story) -> None:
    assert len(story.more.rows) == 4 * 3
    before = {(row["trial_id"], row["seed"]): row for row in story.first.rows}
    after = {(row["trial_id"], row["seed"]): row for row in story.more.rows}
    assert before.items() <= after.items()
    for trial, seed in before:  # nothing was trained twice
        folder = story.more.folder / "retrain" / "trials" / f"{trial}-seed{seed}"
        assert len((folder / "processes").read_text().splitlines()) == 1


def test_a_lost_seed_is_shown_and_costs_the_first_place(story: Story) -> None:
    lost = [row for row in story.more.rows if row["state"] != "finished"]
    assert [(row["trial_id"], row["seed"], row["state"]) for row in lost] == [("0000", 3, "failed")]
    assert lost[0]["objective"] is None and lost[0]["stop_reason"] == "not this seed; choose another"
    second = story.ranking[-2]
    assert story.more.record["best"] == second
    assert story.more.record["configurations"][0]["lost"] == ["seed 3 failed: not this seed; choose another"]
    text = summary(story.more.result)
    assert "left out  trial 0000, though ahead: seed 3 failed" in text and f"best      trial {second} " in text
    assert "(n = 2 of 3)" in text
    trial = next(t for t in story.found.trials if t["trial_id"] == second)
    best = load_config(story.more.folder / BEST)
    assert best.optimizer.weight_decay == trial["config.optimizer.weight_decay"]
    assert (story.more.folder / BEST_OF_SEARCH).read_bytes() == story.own


def test_interrupted_it_leaves_best_yaml_and_says_how_to_go_on(story: Story) -> None:
    cut = story.cut
    assert cut.result.state == cut.record["state"] == "interrupted" and cut.result.best is None
    assert (cut.folder / BEST).read_bytes() == (story.first.folder / BEST).read_bytes()
    open_ = [row for row in cut.rows if row["state"] == "running"]
    assert 3 <= len(open_) <= 5 and len(cut.rows) == 12
    text = summary(cut.result)
    assert "\nresume    " in text and "seed 3 to come" in text and "not all runs have ended" in text


def test_the_same_again_goes_on_to_the_end(story: Story) -> None:
    assert story.more.result.state == "finished" and all(row["state"] != "running" for row in story.more.rows)
    ended = {(r["trial_id"], r["seed"]): r["objective"] for r in story.cut.rows if r["state"] != "running"}
    assert ended.items() <= {(r["trial_id"], r["seed"]): r["objective"] for r in story.more.rows}.items()
    events = read_events(story.more.folder / "retrain" / "journal.jsonl")
    ends = [event["trial"] for event in events if event["event"] == "end"]
    assert len(ends) == len(set(ends)) == 12


def test_with_nothing_to_train_it_tells_what_is_known(story: Story) -> None:
    assert story.again.said == [] and story.again.result.found is None
    assert story.again.rows == story.more.rows
    assert story.again.record["configurations"] == story.more.record["configurations"]
    assert "nothing to train" in summary(story.again.result)


def test_another_length_is_refused_with_what_differs(story: Story) -> None:
    with pytest.raises(UserError, match=r"(?s)do not compare.*stages.total: 14 there, 15 here.*rename that folder"):
        retrain(story.folder, top=1, seeds=1, epochs=15, train=train)
