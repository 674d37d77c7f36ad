"""The monitor names what fixes the order of the trials, and hardly ever anything else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hpcl.search.monitor import Monitor, looks

Row = dict[str, Any]
FIELDS = ["lr", "margin", "weight", "step", "levels", "window", "symmetric", "mode", "targets", "far"]


def trial(draw: np.random.Generator) -> Row:
    """Ten fields as searches have them: real, whole, true or false, text, and one that is not always active."""
    u = draw.random(12)
    return {
        "lr": float(10 ** (-3 * u[0])),
        "margin": float(u[1]),
        "weight": float(u[2]),
        "step": round(u[3] * 4) / 4,
        "levels": 1 + int(u[4] * 4),
        "window": 1 + int(u[5] * 3),
        "symmetric": bool(u[6] < 0.5),
        "mode": ["replace", "add", "none"][int(u[7] * 3)],
        "targets": ["unique", "pcl"][int(u[8] * 2)],
        "far": float(u[9]) if u[10] < 0.6 else None,
        "clusters": [2, 4, 7, 12, 21, 36][int(u[11] * 6)],
    }


def search(seed: int, *, survive: float, decimals: int) -> list[str]:
    """What is named in a search of 32 trials and 3 rungs whose metric depends on nothing.

    The best part `survive` of the trials goes on from each rung; the metric is rounded.
    """
    draw = np.random.default_rng([41, seed])
    monitor = Monitor(FIELDS, rungs=3, trials=32)
    trials = [trial(draw) for _ in range(32)]
    metric = draw.random(32)
    going = list(range(32))
    found = []
    for rung in (8, 16, 32):
        values = metric.round(decimals)
        rows: list[Row] = []
        for i in going:
            rows.append({**trials[i], "value": float(values[i])})
            found += monitor.look(rung, "acc", rows)
        best = sorted(going, key=lambda i: -values[i])[: math.ceil(len(going) * survive)]
        going = sorted(best)
        metric = metric + 0.2 * draw.standard_normal(32)
    return found


@pytest.mark.parametrize(("searches", "survive", "decimals"), [(400, 0.5, 9), (200, 1.0, 9), (200, 1.0, 1)])
def test_below_5_percent_of_searches_are_alarmed_by_chance(searches: int, survive: float, decimals: int) -> None:
    """With survivors only at the later rungs, with all trials at all of them, and with a metric full of ties."""
    alarmed = sum(bool(search(seed, survive=survive, decimals=decimals)) for seed in range(searches))
    assert alarmed < 0.05 * searches


def test_chance_alone_is_strong_often_enough_to_need_the_test() -> None:
    """At 8 trials one of five fields often passes the floor: without the permutations it would be named."""
    strong = 0
    for seed in range(100):
        draw = np.random.default_rng([43, seed])
        rows, metric = [trial(draw) for _ in range(8)], draw.random(8)
        strong += any(abs(stats.spearmanr(metric, [row[f] for row in rows])[0]) >= 0.75 for f in FIELDS[:5])
    assert strong > 10


def rows_of(metric: list[float], **fields: list[Any]) -> list[Row]:
    return [{"value": value, **{f: fields[f][i] for f in fields}} for i, value in enumerate(metric)]


def by_clusters(n: int, noise: float = 0.0, seed: int = 5) -> list[Row]:
    """A metric that falls with the number of clusters, beside a field without effect."""
    draw = np.random.default_rng(seed)
    clusters = [int(k) for k in draw.choice(np.arange(2, 200), n, replace=False)]
    metric = [1 / k ** (0.3 + noise * float(draw.standard_normal())) for k in clusters]
    return rows_of(metric, clusters=clusters, lr=[float(x) for x in draw.random(n)])


def test_a_curve_that_reports_the_number_of_clusters_is_named_with_its_number() -> None:
    named = []
    for seed in range(40):
        rows = by_clusters(27, noise=0.01, seed=seed)
        for sentence in Monitor(FIELDS, rungs=3, trials=32).look(30, "acc_proto", rows):
            n = int(sentence.rpartition(" ")[2])
            rho = stats.spearmanr([row["value"] for row in rows[:n]], [row["clusters"] for row in rows[:n]])[0]
            assert sentence == f"at epoch 30 acc_proto ranks trials by their number of clusters: {rho:.2f}, n = {n}"
            named.append(rho)
    assert len(named) >= 38 and -0.97 < np.mean(named) < -0.9


def test_missing_values_are_left_out_and_counted_out() -> None:
    rows = by_clusters(16)
    for i in (1, 4, 9):
        rows[i]["clusters"] = None
    rows[12]["clusters"] = math.nan
    (sentence,) = Monitor([], rungs=1, trials=16).look(8.0, "acc_proto", rows)
    assert sentence == "at epoch 8 acc_proto ranks trials by their number of clusters: -1.00, n = 12"
    for row in rows[7:]:
        row["clusters"] = None
    assert Monitor([], rungs=1, trials=16).look(8.0, "acc_proto", rows) == []  # 5 left: too few


def test_a_rung_is_looked_at_with_8_16_32_records_and_a_field_named_once() -> None:
    assert [looks(n) for n in (7, 8, 31, 64)] == [(), (8,), (8, 16), (8, 16, 32, 64)]
    rows = by_clusters(64)
    monitor = Monitor(["lr"], rungs=2, trials=64)
    told = [(n, text) for n in range(1, 65) for text in monitor.look(8, "acc_proto", rows[:n])]
    assert [n for n, _ in told] == [8]
    assert monitor.look(16, "acc_proto", rows) == []
    assert Monitor(["lr"], rungs=2, trials=7).look(8, "acc_proto", rows) == []
    # A NaN is no record.
    late = [{**row, "value": math.nan} for row in rows[:3]] + rows[:7]
    assert Monitor(["lr"], rungs=2, trials=64).look(8, "acc_proto", late) == []


def test_rungs_beyond_those_counted_with_are_not_looked_at() -> None:
    monitor = Monitor(["lr"], rungs=1, trials=64)
    assert monitor.look(8, "acc", [{**row, "clusters": 4} for row in by_clusters(8)]) == []
    assert monitor.look(16, "acc", by_clusters(64)) == []


def test_a_field_that_merely_matters_is_not_named() -> None:
    draw = np.random.default_rng(2)
    lr = draw.random(64)
    metric = lr + 0.45 * draw.standard_normal(64)
    rho, p = stats.spearmanr(metric, lr)
    assert 0.4 < rho < 0.75 and p < 1e-4
    rows = rows_of(metric.tolist(), lr=lr.tolist(), clusters=[4] * 64)
    assert Monitor(["lr"], rungs=1, trials=64).look(8, "acc", rows) == []


def test_more_tests_ask_for_more() -> None:
    """Eight trials in the order of a field but for one exchange: enough for one test, not for hundreds."""
    rows = rows_of([1, 2, 3, 5, 4, 6, 8, 7], lr=[1, 2, 3, 4, 5, 6, 7, 8], clusters=[4] * 8)
    others = [f"field{i}" for i in range(60)]
    assert Monitor(["lr"], rungs=1, trials=8).look(4, "acc", rows) == ["at epoch 4 acc ranks trials by lr: 0.95, n = 8"]
    assert Monitor(["lr", *others], rungs=5, trials=64).look(4, "acc", rows) == []


@pytest.mark.parametrize("field", [[True] * 8 + [False] * 8, [1] * 6 + [2] * 5 + [3] * 5])
def test_fields_of_few_values_are_named_by_spearman(field: list[Any]) -> None:
    metric = [float(i) for i in range(16)]
    (sentence,) = Monitor(["f"], rungs=1, trials=16).look(4, "acc", rows_of(metric, f=field))
    rho = stats.spearmanr(metric, field)[0]
    assert sentence == f"at epoch 4 acc ranks trials by f: {rho:.2f}, n = 16"


def test_text_has_no_order_and_is_compared_by_groups() -> None:
    metric = [float(i) for i in range(16)]
    text = ["b"] * 6 + ["c"] * 5 + ["a"] * 5
    (sentence,) = Monitor(["f"], rungs=1, trials=16).look(4, "acc", rows_of(metric, f=text))
    h = stats.kruskal(metric[:6], metric[6:11], metric[11:])[0]
    assert sentence == f"at epoch 4 acc ranks trials by f: correlation ratio {math.sqrt(h / 15):.2f}, n = 16"
    each = [f"path{i}" for i in range(16)]  # a group each explains all and means nothing
    assert Monitor(["f"], rungs=1, trials=16).look(4, "acc", rows_of(metric, f=each)) == []
    # Eight groups that explain more of 64 and of 32 ranks than the floor and than chance, but less for so many groups.
    draw = np.random.default_rng(8)
    weak = [i % 8 + 1.7 * float(draw.standard_normal()) for i in range(64)]
    assert stats.kruskal(*[weak[:32][group::8] for group in range(8)])[0] / 31 > 0.75**2
    rows = rows_of(weak, f=[f"path{i % 8}" for i in range(64)])
    assert Monitor(["f"], rungs=1, trials=64).look(4, "acc", rows) == []
    mixed = [(3, 5)] * 6 + ["auto"] * 5 + [7] * 5
    assert len(Monitor(["f"], rungs=1, trials=16).look(4, "acc", rows_of(metric, f=mixed))) == 1


def test_one_differing_trial_is_no_order() -> None:
    """Spearman is 1 here, and so it is for 1 in 32 orders: ties must not look like significance."""
    rows = rows_of([0.0] * 31 + [1.0], f=[1] * 31 + [2])
    assert Monitor(["f"], rungs=1, trials=32).look(4, "acc", rows) == []
    assert Monitor(["f"], rungs=1, trials=32).look(4, "acc", rows_of([0.5] * 32, f=list(range(32)))) == []


def test_a_resumed_search_finds_the_same_and_names_nothing_twice() -> None:
    rows = by_clusters(20)
    unbroken = Monitor(["lr"], 2, 32)
    told = [text for n in range(1, 21) for text in unbroken.look(8, "acc", rows[:n])]
    assert len(told) == 1
    assert Monitor(["lr"], 2, 32).look(8, "acc", rows) == told
    restored = Monitor(["lr"], 2, 32)
    restored.restore(["a note of another kind", *told])
    assert restored.look(8, "acc", rows) == []
    lr = rows_of([float(i) for i in range(8)], lr=[i / 8 for i in range(8)])
    assert len(restored.look(16, "acc", lr)) == 1  # another field still is
