"""The search's command line: plans, refusals and exit codes, without starting Ray."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcl.errors import UserError
from hpcl.search import cli
from hpcl.search.space import from_tree, load, with_overrides
from hpcl.yamlio import read_tree

ROOT = Path(__file__).parents[1]
SMOKE = str(ROOT / "search_spaces" / "smoke.yaml")


def test_dry_run_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    results = str(tmp_path / "r")
    code = (
        "import sys\nfrom hpcl.search.cli import main\n"
        f"code = main(['--space', {SMOKE!r}, '--results', {results!r}, '--dry-run', '--assume-gpus', '4'])\n"
        "print(code, [n for n in ('torch', 'ray', 'optuna', 'numpy', 'pyarrow') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert "clusters.multiplier" in done.stdout and "4 GPUs" in done.stdout
    assert not (tmp_path / "r").exists()


def test_flags_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trials", "40", "--epochs", "16", "--seed", "7", "--name", "mine", "--set", "search.factor=4"]
    assert cli.main(["--space", SMOKE, "--dry-run", *flags]) == 0
    out = capsys.readouterr().out
    assert "40 of 16 epochs" in out and "seed 7" in out and "results/mine" in out and "1 in 4" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--space", "nowhere.yaml"], "nowhere.yaml"),
        (["--space", SMOKE, "--set", "clusters.frist=4"], "did you mean clusters.first"),
        (["--space", SMOKE, "--set", "nonsense"], "path=value"),
        (["--space", SMOKE, "--trials", "0"], "--trials 0"),
        (["--space", SMOKE, "--name", "a/b", "--dry-run"], "--name a/b"),
        (
            ["--space", SMOKE, "--results", str(ROOT), "--name", "a" * 300, "--dry-run"],
            "cannot be made (File name too long)",
        ),
        (["--space", SMOKE, "--set", "resources.cpus_per_worker=99999", "--dry-run"], "1 x 99999 CPUs = 99999"),
        (["--space", SMOKE, "--assume-gpus", "2"], "--dry-run"),
        (["--space", SMOKE, "--dry-run", "--assume-gpus", "-1"], "--assume-gpus -1"),
        (["--space", SMOKE, "--dry-run", "--address", "auto"], "--address"),
    ],
)
def test_a_users_mistake_exits_2_without_a_traceback(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_an_existing_name_is_refused(dry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    (tmp_path / "old").mkdir()
    assert cli.main(["--space", SMOKE, "--results", str(tmp_path), "--name", "old", *dry]) == 2
    assert "--name" in capsys.readouterr().err


def test_the_plan_says_that_images_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--space", SMOKE, "--dry-run", "--data", "nowhere"]) == 0
    assert "there are no images at nowhere here" in capsys.readouterr().out


def test_an_address_where_no_cluster_answers_is_refused_at_once() -> None:
    pytest.importorskip("ray")
    from hpcl.search.cluster import _free_port, connected

    for address in (f"127.0.0.1:{_free_port()}", "nonsense"):
        with pytest.raises(UserError, match=f"--address {address}: no Ray cluster answers there"), connected(address):
            pass


def test_labels_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    runner = pytest.importorskip("hpcl.search.runner")
    from PIL import Image

    for number in range(40):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    text = (
        "base: {optimizer: {batch: 8}, moco: {queue: 8}, meters: {reference_clusters: 4}}\n"
        "space: {clusters.first: {int: [2, 4]}}\nsearch: {metric: METRIC, objective: OBJECTIVE}"
    )

    def look(metric: str, objective: str) -> str:
        tree = read_tree(text.replace("METRIC", metric).replace("OBJECTIVE", objective), "s.yaml")
        return runner.look_at_data(with_overrides(from_tree(tree), data=str(tmp_path))).line

    assert "40 images 1x8x8, unlabelled" in look("nce_ref", "auto")
    with pytest.raises(UserError) as caught:
        look("knn", "linear")
    assert [problem.partition(", but")[0] for problem in caught.value.problems] == [
        f"{tmp_path}: s.yaml:3:18: search.metric is knn",
        f"{tmp_path}: s.yaml:3:34: search.objective is linear",
    ]


def test_images_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = pytest.importorskip("hpcl.search.runner")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "mnist5k").mkdir()  # the embedded images, whatever lies here
    for source, full in (("images", str(tmp_path / "images")), ("mnist5k", "mnist5k"), ("none", "none")):
        assert runner.with_full_path(with_overrides(load(SMOKE), data=source)).base.data.source == full


def test_the_next_command_can_be_pasted() -> None:
    found_in = pytest.importorskip("hpcl.search.found")
    space = load(SMOKE)
    costs = {"gpu_hours": 0.0, "cpu_hours": 0.25}
    row = {"trial_id": "a", "number": 0, "state": "finished", "objective": 0.5, **costs}
    found = found_in.Found(
        folder=Path("results/two words").resolve(),
        trials=[row],
        epochs=[],
        prefixes=[],
        epochs_trained=8,
        best_trial=row,
        best=space.base,
        chosen_by="linear probe",
        seconds=75.0,
        state="finished",
        reason=found_in.ALL_ENDED,
        notes=["look here"],
        command="python run_search.py --name 'two words'",
    )

    def text(**changes: Any) -> str:
        said: str = found_in.summary(space, dataclasses.replace(found, **changes))
        return said

    assert "best     trial a with linear probe 0.5" in text()
    assert "8 epochs trained, 0.25 CPU-hours" in text() and "note     look here" in text()
    assert shlex.split(text().splitlines()[-1])[-1].endswith("results/two words/best.yaml")
    other = {"trial_id": "b", "number": 1, "state": "finished", "objective": 0.75, **costs, "gpu_hours": 2.0}
    better = text(trials=[row, other], best_trial=other)
    assert "base     trial a: linear probe 0.5" in better and "2 GPU-hours" in better
    stopped = {**row, "state": "stopped", "stop_reason": "epoch 8: too low", "objective": None}
    assert "base     trial a: stopped, epoch 8: too low" in text(trials=[stopped, other], best_trial=other)
    cut = {**row, "state": "running", "stop_reason": None, "objective": 0.5}
    early = text(trials=[cut, other], best_trial=other, state="interrupted", reason="interrupted")
    assert "base     trial a: cut short" in early and early.splitlines()[1].startswith("interrupted after 1 min 15 s")
    assert early.splitlines()[-1] == "resume   python run_search.py --name 'two words'"
    assert "3 GPU-hours are used up" in text(reason="3 GPU-hours are used up")
    assert "no finished trial has a value of linear probe" in text(best_trial=None, best=None)


def test_the_first_signal_asks_for_a_gentle_end_and_the_second_ends_at_once() -> None:
    from hpcl.search.interrupt import Draining, ended_by_signals, interruptible

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    draining, said = Draining(), []
    with pytest.raises(KeyboardInterrupt), ended_by_signals(draining, said.append):
        os.kill(os.getpid(), signal.SIGTERM)
        assert draining() and draining.interrupted and len(said) == 1
        os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_budget_that_is_used_up_leaves_ctrl_c_its_meaning() -> None:
    from hpcl.search.interrupt import Draining, ended_by_signals

    draining = Draining()
    draining.ask("2 hours are used up")
    with pytest.raises(KeyboardInterrupt), ended_by_signals(draining, lambda text: None):
        os.kill(os.getpid(), signal.SIGINT)
        assert draining.interrupted and draining.reason == "2 hours are used up"
        os.kill(os.getpid(), signal.SIGINT)


def test_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcl.search.record import _command, _resuming

    monkeypatch.setattr("sys.argv", ["/x/run_search.py"])
    given = ["--space", "a b.yaml", "--fresh", "--warm-from", "results/a", "results/b", "--set", "seed=1", "--name=x"]
    wanted = "python run_search.py --space 'a b.yaml' --set seed=1 --name x-2"
    assert _command(_resuming(given, "x-2")) == wanted


def test_interrupt_before_the_first_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = pytest.importorskip("hpcl.search.runner")

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    assert cli.main(["--space", SMOKE]) == 130


def test_unknown_flag_is_an_error_of_the_user() -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--space", SMOKE, "--trails", "3"])
    assert ended.value.code == 2
