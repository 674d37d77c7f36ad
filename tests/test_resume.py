"""A search that is interrupted, killed and gone on with: real Ray processes, the scripted trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from rungs import decide_again

from hpcl import load_config
from hpcl.results import read_rows
from hpcl.search.journal import read_events

pytestmark = pytest.mark.timeout(900)
"""Four searches one after another; on a busy machine Ray takes a minute to start."""

SPACE = """
base: {preset: embedded, model: {dim: 16}, stages: {total: 12}}
space:
  optimizer.weight_decay: {float: [1.0e-8, 1.0], log: true}
search: {trials: 16, grace: 2, factor: 2, startup: 3, max_concurrent: 2, seed: 3}
"""
"""Who comes first to a rung passes it, so the first trial there is the first to finish. While its 12 epochs run, the
other place ends at most six trials: enough are left for three more processes to break off in."""
TRIALS = 16

DRIVER = """
import sys, time, functools
sys.path[:0] = [{tests!r}]
import scripted
from hpcl.search import cli, runner

def slow(config, folder, report, **options):
    def wait(row):
        with open(folder / "trained", "a") as file:
            file.write(f"{{row['epoch']}} {{row['shared']}}\\n")
        report(row)
        time.sleep({pause})
    scripted.train(config, folder, wait, **options)

runner.run = functools.partial(runner.run, train=slow)
sys.argv = ["run_search.py", *{arguments!r}]
raise SystemExit(cli.main())
"""


def start(arguments: list[str], pause: float = 0.15) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(tests=tests, arguments=arguments, pause=pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))},
    )


def until(process: subprocess.Popen[str], beginning: str, times: int = 1, word: str = "") -> str:
    """What it prints, up to the line with this beginning and this word (the nth)."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        times -= line.startswith(beginning) and word in line
        if not times:
            return "".join(lines)
    raise AssertionError("".join(lines))


class Story:
    """A search in four processes: Ctrl-C, kill -9, Ctrl-C twice, and the end."""

    def __init__(self, results: Path) -> None:
        space = results / "scripted.yaml"
        space.write_text(SPACE)
        self.folder = results / "scripted"
        self.command = ["--space", str(space), "--results", str(results)]
        self.cut: list[dict[str, Any]] = []
        """The journal's trials' states after each of the first three."""

        first = start(self.command)
        self.first = until(first, "[", word=" finished ")
        first.send_signal(signal.SIGINT)
        self.first += first.communicate(timeout=300)[0]
        self.first_code = first.returncode
        self.record = json.loads((self.folder / "search.json").read_text())
        self.look()

        second = start(self.command)  # the same command again
        self.second = until(second, "[", 2)
        second.kill()
        second.communicate(timeout=60)
        self.look()

        third = start(self.command)
        self.third = until(third, "[")
        third.send_signal(signal.SIGTERM)
        self.third += until(third, "interrupted: ")
        third.send_signal(signal.SIGTERM)
        self.third += third.communicate(timeout=300)[0]
        self.third_code = third.returncode
        self.look()

        last = start([*self.command, "--name", "scripted"], pause=0.0)
        self.last = last.communicate(timeout=400)[0]
        self.last_code = last.returncode

    def look(self) -> None:
        ends = [e for e in read_events(self.folder / "journal.jsonl") if e["event"] == "end"]
        self.cut.append({e["trial"]: e["state"] for e in ends})

    @property
    def trials(self) -> list[dict[str, Any]]:
        return read_rows(self.folder / "trials.parquet")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    yield Story(tmp_path_factory.mktemp("results"))


def test_the_first_ctrl_c_finishes_the_epochs_and_says_how_to_go_on(story: Story) -> None:
    assert story.first_code == 130, story.first
    assert "interrupted: the running epochs are finished and saved" in story.first
    assert "interrupted after" in story.first and "best     trial" in story.first and "Traceback" not in story.first
    resume = next(line for line in story.first.splitlines() if line.startswith("resume "))
    assert resume.split()[1:3] == ["python", "run_search.py"] and resume.endswith("--name scripted")
    assert story.record["state"] == "interrupted"


def test_the_second_ends_at_once(story: Story) -> None:
    assert story.third_code == 130 and "Traceback" not in story.third, story.third


def test_the_same_command_goes_on_to_the_end(story: Story) -> None:
    assert "going on with " in story.second and "going on with " in story.last
    assert story.last_code == 0, story.last
    states = Counter(trial["state"] for trial in story.trials)
    assert sum(states.values()) == TRIALS and states["running"] == 0 and states["finished"] >= 1
    assert json.loads((story.folder / "search.json").read_text())["state"] == "finished"
    assert load_config(story.folder / "best.yaml").model.dim == 16


def test_no_ended_trial_was_touched_again(story: Story) -> None:
    events = read_events(story.folder / "journal.jsonl")
    ends = Counter(event["trial"] for event in events if event["event"] == "end")
    assert set(ends.values()) == {1} and len(ends) == TRIALS
    assert all(cut for cut in story.cut)  # each process ended some
    final = {trial["trial_id"]: trial["state"] for trial in story.trials}
    for cut in story.cut:
        assert cut.items() <= final.items()
    ended: set[str] = set()
    for event in events:
        assert event.get("trial") not in ended
        if event["event"] == "end":
            ended.add(event["trial"])


def test_rows_are_whole_and_at_most_one_epoch_a_trial_was_lost_each_time(story: Story) -> None:
    rows = read_rows(story.folder / "epochs.parquet")
    for trial in story.trials:
        epochs = [row["epoch"] for row in rows if row["trial_id"] == trial["trial_id"]]
        assert epochs == list(range(1, trial["epochs"] + 1))
        lines = (story.folder / "trials" / trial["trial_id"] / "trained").read_text().splitlines()
        trained = Counter(int(line.split()[0]) for line in lines)
        # The last row is repeated where a trial goes on, and nothing before it is trained again.
        assert sum(trained.values()) - len(trained) <= 3 and set(epochs) <= set(trained)


def test_decisions_are_those_of_one_search(story: Story) -> None:
    rows = read_rows(story.folder / "epochs.parquet")
    rungs = json.loads((story.folder / "search.json").read_text())["rungs"]
    again = decide_again(rows, [rungs], 2, metric="acc_proto_ref")
    stopped = {t["trial_id"]: t["epochs"] for t in story.trials if t["state"] == "stopped"}
    assert stopped == dict(again.stops)
    recorded = [e for e in read_events(story.folder / "journal.jsonl") if e["event"] == "rung"]
    assert [(e["trial"], e["bracket"], e["rung"], e["value"]) for e in recorded] == again.rungs


def test_optuna_was_told_the_truth(story: Story) -> None:
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(story.folder / "optuna.journal"))
    )
    study = optuna.load_study(study_name="scripted", storage=storage)
    told = {t.user_attrs["trial"]: t for t in study.trials if t.user_attrs.get("state") != "lost"}
    names = {"finished": "COMPLETE", "stopped": "PRUNED"}
    assert {name: t.state.name for name, t in told.items()} == {t["trial_id"]: names[t["state"]] for t in story.trials}
    assert not any(t.state.name == "RUNNING" for t in study.trials)
    for row in read_rows(story.folder / "epochs.parquet"):
        assert told[row["trial_id"]].intermediate_values[row["epoch"]] == row["acc_proto_ref"]
