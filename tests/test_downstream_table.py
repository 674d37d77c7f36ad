"""The table of `hpcl evaluate`: means, spreads and intervals by hand, rows added and never lost."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import write_search
from scipy import stats

from hpcl.analysis.downstream import lines, newest, table
from hpcl.analysis.report.sections import _downstream
from hpcl.downstream.scores import Score
from hpcl.errors import UserError
from hpcl.evaluate import append, rows_before
from hpcl.files import hash_of


def row(encoder: str, value: float | None, seed: int = 0, **others: Any) -> dict[str, Any]:
    common = {"task": "linear", "setting": "ridge", "measure": "accuracy", "count": 400, "ci95": None}
    return common | {"encoder": encoder, "value": value, "seed": seed} | others


def test_an_accuracy_knows_its_variance_and_an_interval_over_episodes_too() -> None:
    assert math.isclose(Score("linear", "", "accuracy", "trained", 0, 0.8, 100).variance, 0.16 / 100)
    assert math.isclose(Score("fewshot", "", "accuracy", "trained", 0, 0.8, 100, ci95=0.0196).variance, 1e-4)
    assert Score("clusters", "", "AMI", "trained", 0, 0.8, 100).variance == 0.0


def test_the_interval_adds_seeds_and_images() -> None:
    """Three seeds of either: variance of a mean over seeds, plus that of the images, which all seeds share."""
    trained, untrained = [0.80, 0.82, 0.84], [0.60, 0.61, 0.59]
    rows = [row("trained", v, s) for s, v in enumerate(trained)] + [
        row("untrained", v, s) for s, v in enumerate(untrained)
    ]
    (line,) = lines(rows)
    assert line.values["trained"].text == ".820 ± .020" and line.values["trained"].n == 3
    parts = [0.02**2 / 3, 0.01**2 / 3]
    images = sum(np.mean([v * (1 - v) / 400 for v in x]) for x in (trained, untrained))
    total = sum(parts) + images
    half = stats.t.ppf(0.975, total**2 / sum(v**2 / 2 for v in parts)) * math.sqrt(total)
    assert line.gain is not None and line.gain.low is not None and line.gain.high is not None
    np.testing.assert_allclose([line.gain.value, line.gain.low, line.gain.high], [0.22, 0.22 - half, 0.22 + half])


def test_the_same_value_from_every_seed_has_no_spread_but_that_of_its_images() -> None:
    (line,) = lines([row(e, v, s) for e, v in (("trained", 0.9), ("untrained", 0.5)) for s in range(3)])
    assert line.values["trained"].text == ".900" and line.gain is not None and line.gain.low is not None
    half = 1.959964 * math.sqrt(0.09 / 400 + 0.25 / 400)
    assert math.isclose(line.gain.value - line.gain.low, half, rel_tol=1e-6)


def test_seeds_of_one_checkpoint_are_not_taken_for_checkpoints() -> None:
    """kNN draws nothing: three seeds of a checkpoint give one value, and tell nothing of other checkpoints."""
    rows = [row("trained", v, s, count=10**12, checkpoint_hash=f"{v}") for v in (0.8, 0.82, 0.84) for s in range(3)]
    rows += [row("untrained", 0.5, s, count=10**12, checkpoint_hash="0.8") for s in range(3)]
    (line,) = lines(rows)
    assert line.gain is not None and line.gain.low is not None
    half = stats.t.ppf(0.975, 2) * 0.02 / math.sqrt(3)
    assert math.isclose(line.gain.value - line.gain.low, half, rel_tol=1e-5)


def test_without_any_spread_no_interval_is_claimed() -> None:
    rows = [row("trained", 0.5, measure="AMI"), row("untrained", 0.1, measure="AMI")]
    (line,) = lines(rows)
    assert line.gain is not None and line.gain.low is None and line.gain.text == "+.400"


def test_where_untrained_means_supervised_it_says_so() -> None:
    (line,) = lines([row("trained", 0.5, task="finetune"), row("supervised", 0.4, task="finetune")])
    assert line.gain is not None and line.gain.text.endswith("(supervised)")


def test_episodes_of_several_seeds_are_averaged() -> None:
    rows = [row("trained", v, s, task="fewshot", ci95=0.01) for s, v in enumerate((0.5, 0.52))]
    (line,) = lines(rows)
    assert line.values["trained"].text == ".510 [± .007]"  # .01 / sqrt 2


def test_the_table_has_the_tasks_in_their_order_and_only_columns_with_values() -> None:
    text = table(lines([row("trained", 0.5, task="clusters", measure="AMI"), row("trained", 0.25, task="knn")]))
    head, knn, first, clusters, second, *_ = text.splitlines()
    assert "untrained" not in head and (knn, clusters) == ("knn (n = 400)", "clusters (n = 400)")
    assert first.startswith("  ridge ") and ".250" in first and second.startswith("  ridge: AMI ") and ".500" in second


FULL = {
    "split": "test", "checkpoint": "c.pt", "checkpoint_hash": "0", "source": "s", "data_hash": None, "seconds": 1.0,
    "time": "2026-01-01T00:00:00+00:00", "version": "0",
}  # fmt: skip


def _add(out: Path, number: int) -> None:
    for seed in range(5):
        append(out, [row("trained", 0.5, 100 * number + seed) | FULL])


def test_rows_that_are_added_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    """Each thread opens the folder anew, so the lock parts them as it parts processes."""
    out = tmp_path / "downstream.parquet"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(_add, [out] * 3, range(3)))
    assert sorted(r["seed"] for r in rows_before(out)) == [100 * n + s for n in range(3) for s in range(5)]


def test_another_file_in_its_place_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "downstream.parquet"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"is no table that `hpcl evaluate` wrote .* name another with --out"):
        append(out, [row("trained", 0.5) | FULL])
    assert out.read_text() == "mine"


def test_what_was_measured_again_counts_once() -> None:
    rows = [row("trained", v, s) | FULL for v in (0.5, 0.6) for s in (0, 1)]
    assert [(r["seed"], r["value"]) for r in newest(rows)] == [(0, 0.6), (1, 0.6)]
    assert len(newest([*rows, row("trained", 0.5) | FULL | {"checkpoint_hash": "1"}])) == 3


def test_the_report_shows_what_the_best_trial_is_good_for(tmp_path: Path) -> None:
    search = write_search(tmp_path / "search", {"acc_proto_ref": np.array([[0.1, 0.2], [0.2, 0.4]])}, [0.5, 0.7])
    assert _downstream(search) is None
    for value in (0.1, 0.875):
        append(tmp_path / "search" / "trials" / "0001" / "downstream.parquet", [row("trained", value) | FULL])
    section = _downstream(search)
    assert section is not None and section.table is not None and ".875" in section.table.rows[0]


def test_the_report_averages_nothing_but_the_trials_checkpoint_on_the_same_images(tmp_path: Path) -> None:
    search = write_search(tmp_path / "search", {"acc_proto_ref": np.array([[0.1, 0.2], [0.2, 0.4]])}, [0.5, 0.7])
    trial = tmp_path / "search" / "trials" / "0001"
    trial.mkdir(parents=True)
    (trial / "checkpoint.pt").write_bytes(b"of today")
    own = FULL | {"checkpoint_hash": hash_of(trial / "checkpoint.pt")}
    rows = [
        row("trained", 0.1) | own | {"source": "other", "data_hash": "1"},
        row("trained", 0.875) | own,
        row("trained", None, 1) | own,
        row("trained", 0.3) | FULL,
    ]
    append(trial / "downstream.parquet", rows)
    section = _downstream(search)
    assert (
        section is not None
        and section.table is not None
        and section.table.rows == [["linear", "ridge", "accuracy", ".875"]]
    )
    assert "test images of s (" in section.texts[0]
    (trial / "checkpoint.pt").write_bytes(b"of tomorrow")
    assert _downstream(search) is None
