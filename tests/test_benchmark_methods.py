"""benchmarks/methods.py: which arms it takes, its table, and that what it trained stays."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
from scipy import stats

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

ONE_EPOCH = [f"stages.stage{s}.epochs={int(s == 3)}" for s in range(1, 6)]
TINY = ["data.subset=0.1", "model.width=8", "moco.queue=128", "optimizer.batch=64", "stages.total=null"]
TINY += ["meters.views=32", "meters.images=200", "meters.knn_every=0", "runtime.device=cpu", "runtime.threads=1"]


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("methods")


def measured(seed: int, knn: float, **changes: Any) -> dict[str, Any]:
    """What a run of method_run.py writes, without most of it."""
    scores = [{"task": "knn", "setting": "k = 200", "value": knn}, {"task": "knn", "setting": "k = 20", "value": 0.0}]
    costs = {"cpu": 60.0 + seed, "wall": 50.0, "wall_cluster": 10.0, "wall_meters": 5.0, "memory": 1000.0}
    about = {"memory_before": 600.0, "gpu_memory": None, "effective_rank": 20.0, "load": 1.0, "threads": 1}
    return {"seed": seed, "state": "finished", "scores": scores, **costs, **about, **changes}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--methods", "moca"], "did you mean moco?"),
        (["--arm", "moco clusters.features=bank"], "moco does not read clusters.features"),
        (["--arm", "hpcl clusters.feature=bank"], "did you mean clusters.features?"),
        (["--arm", "hpcl head.kind='v1"], "No closing quotation"),
        (["--arm", "hpcl", "--arm", "moco optimizer.batch=256"], "must be the same for all; give it with --set"),
        (["--arm", "hpcl", "--arm", "moco stages.total=30"], "has 30 epochs and hpcl 20"),
        (["--arm", "hpcl seed=3"], "--seeds"),
        (["--arm", "hpcl", "--arm", "hpcl"], "named twice"),
        (["--methods", "hpcl", "--arm", "moco"], "give one of them"),
        (["--set", "moco.queue"], "must be path=value"),
        (["--preset", "cifer"], "did you mean cifar?"),
        (["--seeds", "0"], "must be 1 or more"),
        (["--out", "table.csv"], "must end with .parquet"),
    ],
)
def test_a_mistake_is_one_line(
    methods: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert methods.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and told in lines[0]


def test_fixed_counts_are_a_rule_of_the_number_of_images(methods: ModuleType) -> None:
    assert methods.fixed_counts(4050) == (20, 40, 81)
    assert methods.fixed_counts(200) == (2, 4) and methods.fixed_counts(30) == (2,)


def test_differences_are_paired_by_seed_with_scipys_interval(methods: ModuleType) -> None:
    first, second = (0.70, 0.74, 0.69), (0.75, 0.78, 0.76)
    found = {
        "untrained": [measured(seed, 0.5, state="untrained") for seed in range(3)],
        "hpcl": [measured(seed, value) for seed, value in enumerate(first)],
        "moco": [measured(seed, value) for seed, value in enumerate(second)],
    }
    low, high = stats.ttest_rel(second, first).confidence_interval(0.95)
    head, line = methods.differences(found)
    assert head.split() == ["minus", "hpcl", "[95", "%]", "kNN"]
    assert line.split(None, 1) == ["moco", f"+.053 [{low:+.3f}, {high:+.3f}]".replace("0.", ".")]
    assert methods.differences({"hpcl": found["hpcl"]}) == []


def test_the_table_tells_of_runs_that_diverged(methods: ModuleType) -> None:
    runs = [measured(0, 0.7), measured(1, math.nan, state="diverged", scores=[], effective_rank=None)]
    head, line = methods.table({"moco": runs})
    assert head.split() == ["kNN", "CPU", "s", "wall", "s", "clusters", "meters", "MB", "own", "rank"]
    assert line.split(None, 1)[1].startswith(".700  60 ± 1")
    assert "20%       10%" in line and line.endswith("20.0 diverged: seed 1")


def test_two_arms_are_trained_once_and_shown(
    methods: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = importlib.import_module("method_run")
    began: list[str] = []

    def here(command: list[str]) -> subprocess.CompletedProcess[str]:
        began.append(Path(command[2]).name)
        return subprocess.CompletedProcess(command, one.main(command[2:]))

    monkeypatch.setattr(methods.subprocess, "run", here)
    arguments = ["--set", *TINY, *ONE_EPOCH, "--arm", "moco", "--arm", "pcl clusters.warm=false", "--seeds", "1"]
    arguments += ["--results", str(tmp_path / "runs"), "--out", str(tmp_path / "rows.parquet")]
    assert methods.main(arguments) == 0
    shown = capsys.readouterr().out
    assert [name.rsplit("-", 1)[0] for name in began] == [
        "untrained-seed0", "moco-seed0", "pcl-clusters.warm-false-seed0"
    ]  # fmt: skip
    head, *lines = [line for line in shown.split("\n\n")[1].splitlines()]
    assert head.split()[:3] == ["kNN", "ridge", "logistic"] and [line.split()[0] for line in lines] == [
        "untrained", "moco", "pcl"
    ]  # fmt: skip
    assert "minus moco" in shown and "train 405" in shown
    rows = {row["arm"]: row for row in pq.read_table(tmp_path / "rows.parquet").to_pylist()}
    assert rows["untrained"]["cpu"] == 0 < rows["moco"]["cpu"] and rows["moco"]["epochs"] == 1
    assert 0.2 < rows["moco"]["kNN"] <= 1 and rows["moco"]["memory"] > rows["moco"]["memory_before"] > 50
    log = (tmp_path / "runs" / began[2] / "log.txt").read_text()
    assert "clusters 2/4/8" in log  # 405 images

    assert methods.main(arguments) == 0 and len(began) == 3
    assert capsys.readouterr().out == shown


@pytest.mark.slow
def test_the_script_trains_in_processes_of_its_own_and_measures_few_shot(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "methods.py"), "--methods", "simclr", "--seeds", "1"]
    command += ["--novel-classes", "5", "--results", str(tmp_path), "--set", *TINY, *ONE_EPOCH, "moco.queue=64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "1-shot" in done.stdout and "simclr, seed 0: finished" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("simclr")
