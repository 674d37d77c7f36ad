"""The search's command line: plans, refusals and exit codes, without starting Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcl.search import cli

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
        (["--space", SMOKE, "--set", "resources.cpus_per_worker=99999", "--dry-run"], "1 x 99999 CPUs = 99999"),
        (["--space", SMOKE, "--assume-gpus", "2"], "--dry-run"),
        (["--space", SMOKE, "--dry-run", "--address", "auto"], "--address"),
    ],
)
def test_a_users_mistake_exits_2_without_a_traceback(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_an_existing_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    (tmp_path / "old").mkdir()
    assert cli.main(["--space", SMOKE, "--results", str(tmp_path), "--name", "old"]) == 2
    assert "--name" in capsys.readouterr().err


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
