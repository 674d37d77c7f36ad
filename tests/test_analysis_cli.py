"""The commands of the analysis as a user gives them: exit codes, messages, folders in a store, nothing heavy loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpcl import cli
from hpcl.search import storage
from hpcl.search.space import load

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "analysis" / "recorded"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit code of ``hpcl ...`` in this process."""
    monkeypatch.setattr(sys, "argv", ["hpcl", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """results/mine, a copy of the recorded search, seen from the folder that holds results/."""
    shutil.copytree(RECORDED / "asha", tmp_path / "results" / "mine")
    monkeypatch.chdir(tmp_path)
    return Path("results/mine")


def test_best_suggest_and_compare(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "best", mine, "--out", "best.yaml") == 0
    assert run(monkeypatch, "suggest", mine) == 0
    said = capsys.readouterr().out
    assert "against the research notes' configuration" in said and "hpcl train best.yaml" in said
    assert f"--space {mine}/follow-up.yaml" in said
    follow_up = load(mine / "follow-up.yaml")
    assert follow_up.params and follow_up.search.seed == load(mine / "space.yaml").search.seed + 1
    assert run(monkeypatch, "compare", mine, RECORDED / "random") == 0
    assert "best so far after the same CPU-hours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report", "gone", "away"), ("gone: there is no such folder", "away: there is no such folder")),
        (("report", "results/mine", "--mode", "up"), ("--mode is up, but must be max or min",)),
        (("report", "results/mine", "--metric", "speed"), ("has no curve speed; there are: acc_proto",)),
        (("report", "results/mine", "--out", "no/page.html"), ("there is no folder no",)),
        (("report", "results/mine", "--out", "results/mine/trials.parquet"), ("not written by `hpcl report`",)),
        (("best", "results"), ("results: not the results of a search",)),
        (("best", "results/mine", "--out", "results"), ("results: is a folder",)),
        (("suggest", "results/mine", "--out", "results/mine/space.yaml"), ("not written by `hpcl suggest`",)),
        (("compare", "results/mine"), ("at least two",)),
        (("prototypes", "results/mine/checkpoint.pt"), ("results/mine/checkpoint.pt",)),
        (("prototypes", "s3://bucket/x/checkpoint.pt"), ("say with --out where the page goes",)),
        (("report", "s3://bucket/x"), ("say with --out where report.html goes",)),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_mistakes_end_with_two_and_say_what_to_do(
    mine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    said: Sequence[str],
) -> None:
    before = {path: path.read_bytes() for path in mine.iterdir()}
    assert run(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err
    assert all(text in told for text in said), told
    assert {path: path.read_bytes() for path in mine.iterdir()} == before


def test_a_search_in_a_store_is_as_good(
    uri: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(RECORDED / "asha", root / "mine")
    storage.push(root / "mine")
    storage.drop(root / "mine")
    base, mark, query = uri.partition("?")
    where = f"{base}/mine{mark}{query}"
    assert run(monkeypatch, "suggest", where, "--out", tmp_path / "next.yaml") == 0
    assert load(tmp_path / "next.yaml").params
    assert run(monkeypatch, "best", where) == 0
    assert "robust best" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["report", "compare", "best", "suggest", "prototypes"])
def test_help_answers_without_anything_heavy(command: str) -> None:
    code = (
        "import sys; sys.argv = ['hpcl', sys.argv[1], '--help']\nfrom hpcl.cli import main\ntry: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'ray', 'torch', 'optuna', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=True)
    assert "--help" in ran.stdout and ran.stdout.rstrip().endswith("[]")
