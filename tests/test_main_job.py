"""The README's main job, whole: slow (minutes). Results by date in docs/tests.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcl import load_config
from hpcl.results import read_rows

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_main_job(tmp_path: Path) -> None:
    # The conftest's single OpenMP thread is for tests; the job itself runs as a user starts it.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = ["run_search.py", "--space", "search_spaces/clusters.yaml", "--results", str(tmp_path), "--name", "main"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    folder = tmp_path / "main"
    trials, epochs = read_rows(folder / "trials.parquet"), read_rows(folder / "epochs.parquet")
    states = [trial["state"] for trial in trials]
    assert len(trials) >= 16
    assert states.count("stopped") > len(trials) / 3
    assert "finished" in states
    assert set(states) <= {"stopped", "finished"}
    grown = {row["trial_id"] for row in epochs if row["grew"] and row["growth_reason"].startswith("5:")}
    assert len(grown) >= 3
    assert load_config(folder / "best.yaml").growth.policy == "window"
    assert "hpcl train" in done.stdout.splitlines()[-1]
