"""Which curve to stop on: statistics beside slow references, and verdicts where the answer is known."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from recorded import known_search, like, run_script, write_search
from scipy import stats

from hpcl.analysis import audit as audits
from hpcl.analysis import verdict
from hpcl.analysis.audit import Audit, audit
from hpcl.analysis.charts.audit import lost_for_spent, rank_by_rung
from hpcl.analysis.charts.look import svg
from hpcl.analysis.replay import Recording, replay
from hpcl.analysis.signals import Resamples, association, design, partial, permuted_scores, spearman
from hpcl.analysis.verdict import LEVEL, judge
from hpcl.results import Field, load_search

SCRIPT = Path(__file__).parent.parent / "analysis" / "audit.py"


def cell(found: Audit, metric: str, rung: float) -> Any:
    """The row of a metric at a rung."""
    return found.table[(found.table["metric"] == metric) & (found.table["rung"] == rung)].iloc[0]


# ---------------------------------------------------------------- statistics

floats = st.one_of(st.floats(-5, 5), st.sampled_from([0.0, 1.0, 2.0, math.nan]))


@settings(max_examples=200, deadline=None)
@given(arrays(float, (2, 20), elements=floats))
def test_spearman_is_scipys_over_the_pairs_that_are_there(pair: Any) -> None:
    x, y = pair
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < 8 or len(set(x[known])) == 1 or len(set(y[known])) == 1:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x[known], y[known]).statistic, abs=1e-12)


def test_resamples_are_those_of_trials_written_out() -> None:
    chance = np.random.default_rng(0)
    x, y = chance.integers(0, 9, 30).astype(float), chance.normal(size=30)
    x[3] = y[7] = np.nan
    resamples = Resamples(30, seed=5, draws=200)
    samples = np.random.default_rng(5).integers(0, 30, (200, 30))
    for value, drawn in zip(resamples.spearman(x, y), samples, strict=True):
        a, b = x[drawn], y[drawn]
        known = np.isfinite(a) & np.isfinite(b)
        assert value == pytest.approx(stats.spearmanr(a[known], b[known]).statistic, abs=1e-12)
    low, high = resamples.interval(x, y)
    assert (low, high) == tuple(np.quantile(resamples.spearman(x, y), [0.025, 0.975])) and low < spearman(x, y) < high


def test_intervals_hold_the_true_value_about_as_often_as_they_say() -> None:
    chance = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        x = chance.normal(size=40)
        y = 0.6 * x + 0.8 * chance.normal(size=40)
        low, high = Resamples(40, seed=2, draws=300).interval(x, y)
        held += low <= 6 / math.pi * math.asin(0.3) <= high  # Spearman's of a normal pair with correlation 0.6
    assert 0.89 < held / 200 < 0.99


def test_partial_is_the_textbooks_for_one_field_and_nothing_is_left_of_the_field_itself() -> None:
    chance = np.random.default_rng(3)
    z = stats.rankdata(chance.normal(size=50))
    x, y = z + 20 * chance.normal(size=50), z + 20 * chance.normal(size=50)
    xy, xz, yz = (stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    rho, low, high = partial(x, y, z[:, None] - z.mean())
    assert rho == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)), abs=1e-9)
    assert low < rho < high and math.tanh((math.atanh(low) + math.atanh(high)) / 2) == pytest.approx(rho)
    assert partial(x, y, np.zeros((50, 0)))[0] == pytest.approx(xy)
    assert all(math.isnan(value) for value in partial(z, y, z[:, None]))
    given = chance.normal(size=(19, 10))
    assert math.isnan(partial(x[:19], y[:19], given)[0]) and not math.isnan(partial(x[:19], y[:19], given[:, :9])[0])


def test_fields_become_positions_and_a_column_per_choice_with_the_mean_where_they_do_not_act() -> None:
    mode = Field("topk.mode", "choice", choices=("add", "none", "replace"))
    margin = Field("topk.margin", "float", 0.0, 2.0, when={"topk.mode": ("add", "replace")})
    same = Field("topk.k", "int", 1, 5)
    trials = pd.DataFrame(
        {
            "config.topk.mode": ["add", "none", "replace", "add"],
            "config.topk.margin": [0.0, 1.7, 2.0, 1.0],
            "config.topk.k": [3, 3, 3, 3],
        }
    )
    found = design({f.path: f for f in (mode, margin, same)}, trials)
    expected = [[-0.25, -0.25, -0.5], [0.75, -0.25, 0], [-0.25, 0.75, 0.5], [-0.25, -0.25, 0]]
    assert found == pytest.approx(np.array(expected))


def test_association_is_spearmans_or_the_correlation_ratio_of_a_choice() -> None:
    x = np.arange(12.0)
    number = Field("a", "float", 0, 1)
    assert association(-x, x, number) == (pytest.approx(-1), 12)
    choice = Field("b", "choice", choices=("p", "q", "r"))
    codes = np.repeat([0.0, 1.0, 2.0], 4)
    explained = stats.f_oneway(*(x[codes == c] for c in range(3))).statistic
    eta = explained * 2 / (explained * 2 + 9)
    assert association(x, codes, choice) == (pytest.approx(math.sqrt(1 - (1 - eta) * 11 / 9)), 12)
    assert math.isnan(association(x, np.zeros(12), choice)[0]) and association(x[:5], codes[:5], choice)[1] == 5


def test_chance_scores_are_means_of_spearmans_with_dealt_objectives() -> None:
    chance = np.random.default_rng(4)
    curves, objective = chance.normal(size=(3, 2, 12)), chance.normal(size=12)
    curves[1, 0, :3] = np.nan
    curves[2, 1, :6] = np.nan  # 6 values rank nothing
    again = np.random.default_rng(9).permuted(np.broadcast_to(objective, (20, 12)), axis=1)
    expected = [[np.mean([np.nan_to_num(spearman(c, dealt)) for c in curve]) for curve in curves] for dealt in again]
    assert permuted_scores(curves, objective, 9, 20) == pytest.approx(np.array(expected))


# ---------------------------------------------------------------- the verdict


@pytest.mark.parametrize("best", ["inst_ref", "nce_ref", "acc_proto"])
def test_names_the_known_best_curve_and_never_the_labelled_one(tmp_path: Path, best: str) -> None:
    found = audit(known_search(tmp_path / "s", best=best))
    assert (found.verdict.kind, found.verdict.curve) == ("named", best)
    assert found.verdict.sentence.startswith(f"Stop on {best}: ") and "n = 40" in found.verdict.sentence
    assert "clearly above acc_proto_ref, the metric of this search (0." in found.verdict.sentence
    assert "knn" not in {s.metric for s in found.verdict.scores}
    assert found.verdict.sentence in found.lines()


def test_keeps_the_curve_in_use_where_it_is_the_best_or_not_told_apart(tmp_path: Path) -> None:
    search = known_search(tmp_path / "s", best="acc_proto_ref")
    found = audit(search).verdict
    assert (found.kind, found.curve) == ("kept", "acc_proto_ref")
    assert found.sentence.startswith("Stop on acc_proto_ref, the metric of this search: its mean rank correlation with")
    assert "every other curve is clearly worse or has no signal" in found.sentence
    ran = audit(replace(search, about=replace(search.about, rungs=(3.0,)))).verdict
    assert ran.sentence.startswith("Keep stopping on acc_proto_ref: its mean rank correlation with linear probe is ")
    chance = np.random.default_rng(0)
    quality = chance.normal(size=30)
    two = {m: quality[:, None] + 0.6 * chance.normal(size=(30, 3)) for m in ("acc_proto_ref", "inst_ref")}
    assert judge(two, quality, in_use="acc_proto_ref").curve == "acc_proto_ref"
    tied = judge(two, quality, in_use="inst_ref")
    assert tied.curve == "inst_ref" and "not told apart from it: acc_proto_ref" in tied.sentence


@pytest.mark.parametrize("in_use", ["knn", "nce_ref", None])
def test_where_no_curve_in_use_was_measured_the_best_one_with_a_signal_is_named(in_use: str | None) -> None:
    curves, quality = like({"inst_ref": 0.8, "acc_proto": 0.7}, 24, 0)
    curves["nce_ref"] = np.full((24, 3), math.nan)
    found = judge(curves, quality, in_use=in_use)
    assert (found.kind, found.curve) == ("named", "inst_ref") and "in use" not in found.sentence
    assert "not told apart from it: acc_proto" in found.sentence


def kinds(strength: dict[str, float], n: int, runs: int) -> Counter[tuple[str, str | None]]:
    """How often which verdict is given on such curves, acc_proto_ref in use."""
    found = [judge(*like(strength, n, seed), in_use="acc_proto_ref", seed=seed) for seed in range(runs)]
    return Counter((each.kind, each.curve) for each in found)


@pytest.fixture
def fewer_deals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "DEALS", 399)  # the level holds with any number of deals


EQUAL = ("acc_proto_ref", "acc_proto", "proto_bits", "inst_ref", "nce_ref", "acc_inst", "loss", "loss_inst")


@pytest.mark.usefixtures("fewer_deals")
def test_of_equally_good_curves_no_other_one_is_named() -> None:
    """A signal beside none is no difference: that rule named another curve in a third of these searches."""
    for n, runs in ((16, 60), (24, 40)):
        found = kinds(dict.fromkeys(EQUAL, 0.6), n, runs)
        named = sum(count for (kind, _), count in found.items() if kind == "named")
        assert named / runs < 0.05, found
        assert found["kept", "acc_proto_ref"] > 0.4 * runs, found


@pytest.mark.usefixtures("fewer_deals")
def test_a_signal_beside_none_cannot_tell() -> None:
    curves, quality = like(dict.fromkeys(EQUAL, 0.6), 16, 7)
    found = judge(curves, quality, in_use="acc_proto_ref")
    current = next(s for s in found.scores if s.metric == "acc_proto_ref")
    assert found.scores[0].signal and current.p_alone > LEVEL and not current.worse
    assert (found.kind, found.curve) == ("unknown", None)
    best = found.scores[0]
    assert found.sentence == (
        f"The data can't tell which curve to stop on: {best.metric} ({best.text(', ')}) has a signal; acc_proto_ref, "
        f"in use ({current.text(', ')}), has none of its own and is not told apart from it (n = 16)."
    )


@pytest.mark.usefixtures("fewer_deals")
def test_a_clearly_better_curve_is_named_in_most_searches() -> None:
    strength = dict.fromkeys(EQUAL, 0.3) | {"inst_ref": 0.9}
    for n, runs, least in ((27, 20, 12), (40, 20, 17)):
        found = kinds(strength, n, runs)
        assert found["named", "inst_ref"] >= least, found
        assert sum(count for (kind, _), count in found.items() if kind == "named") == found["named", "inst_ref"]


@pytest.mark.usefixtures("fewer_deals")
def test_says_that_it_cannot_tell_on_shuffled_objectives(tmp_path: Path) -> None:
    search = known_search(tmp_path / "s")
    recording = Recording.of(search)
    curves = {m: recording.values(m)[:, [2, 7]] for m in ("acc_proto_ref", "acc_proto", "inst_ref", "nce_ref", "loss")}
    found: Counter[str] = Counter()
    for seed in range(200):
        dealt = np.random.default_rng(seed).permutation(recording.good)
        found[judge(curves, dealt, in_use="acc_proto_ref", seed=seed).kind] += 1
    assert found["unknown"] > 190, found  # fewer than 5 % are wrong
    dealt = np.random.default_rng(0).permutation(search.trials["objective"])
    one = audit(replace(search, trials=search.trials.assign(objective=dealt)))
    assert one.verdict.curve is None and one.verdict.scores[0].p > LEVEL
    assert one.verdict.sentence.startswith("The data can't tell which curve to stop on: no curve ranks 40 trials")


def test_a_curve_that_is_not_there_at_a_rung_ranks_nothing_there() -> None:
    quality = np.arange(20.0)
    whole = np.repeat(quality[:, None], 2, axis=1)
    late = whole.copy()
    late[:, 0] = np.nan
    scores = {s.metric: s for s in judge({"inst_ref": whole, "acc_proto": late}, quality, in_use=None).scores}
    assert scores["inst_ref"].value == pytest.approx(1) and scores["acc_proto"].value == pytest.approx(0.5)
    assert scores["acc_proto"].worse


def test_too_few_trials_no_values_and_an_objective_that_is_a_curve_cannot_tell(tmp_path: Path) -> None:
    few = audit(known_search(tmp_path / "few", 7))
    assert few.verdict.sentence.endswith("only 7 trials finished with a linear probe, and 8 are needed.")
    assert few.table["rho_all"].isna().all() and few.n == 7 and not any("better half" in line for line in few.lines())
    itself = audit(known_search(tmp_path / "itself", chosen_by="inst_ref"))
    assert itself.verdict.kind == "unknown" and "judged by inst_ref itself" in itself.verdict.sentence
    empty = judge({"inst_ref": np.full((20, 2), np.nan)}, np.arange(20.0), in_use=None)
    assert empty.kind == "unknown" and "at no rung have 8 trials a value" in empty.sentence
    nothing = audit(known_search(tmp_path / "none", 4, rungs=(3.0,), stopped={i: 3 for i in range(4)}))
    assert nothing.n == 0 and nothing.verdict.curve is None and nothing.table.empty and nothing.kept.empty
    assert len(nothing.lines()) == 4 and not any(" of 0" in line or "- (" in line for line in nothing.lines())
    assert list(nothing.table.columns) == list(few.table.columns) and nothing.fields.empty


def test_where_trials_were_stopped_the_sample_is_survivors_and_no_other_curve_is_named(tmp_path: Path) -> None:
    stopped = {i: 3 for i in range(0, 60, 4)}
    found = audit(known_search(tmp_path / "s", 60, rungs=(3.0, 6.0), stopped=stopped))
    assert (found.n, found.stopped, found.rungs) == (45, 15, (3.0, 6.0))
    assert found.verdict.curve is None and "15 trials were stopped on acc_proto_ref" in found.verdict.sentence
    assert "survivors (n = 45) it tends to look worse than it is (best there: inst_ref 0." in found.verdict.sentence
    assert any(line.startswith("note: the search stopped 15 of 60 trials on acc_proto_ref") for line in found.lines())
    kept = audit(known_search(tmp_path / "k", 60, best="acc_proto_ref", rungs=(3.0, 6.0), stopped=stopped))
    assert kept.verdict.curve == "acc_proto_ref" and "among the 45 survivors of 60 trials" in kept.verdict.sentence
    recording = Recording.of(known_search(tmp_path / "k", 60, rungs=(3.0, 6.0), stopped=stopped))
    curves = {m: recording.values(m)[recording.ranking][:, [2, 5]] for m in ("acc_proto_ref", "inst_ref")}
    more = {"in_use": "acc_proto_ref", "stopped": 15, "stops": False, "inferred": True}
    guess = judge(curves, recording.good[recording.ranking], **more)
    assert "15 trials ended after fewer reports than others, and if they were stopped on acc_proto" in guess.sentence
    sure = judge({m: curves["inst_ref"] for m in curves}, recording.good[recording.ranking], **more)
    assert sure.sentence.startswith("Stop on acc_proto_ref, the metric of this search: ")
    assert "among the 45 of 60 trials with the most reports; " in sure.sentence


# ---------------------------------------------------------------- the tables


def test_cells_are_the_correlations_of_the_values_at_the_rungs(tmp_path: Path) -> None:
    search = known_search(tmp_path / "s", diverged={5: 4})
    found = audit(search)
    assert found.rungs == (3.0, 6.0, 9.0) and (found.n, found.diverged) == (39, 1)
    trials = search.trials.drop(index=5)
    objective, keep = trials["objective"].to_numpy(), trials.index.to_numpy()
    half = objective >= np.sort(objective)[-20]
    for metric, sign in (("inst_ref", 1), ("nce_ref", -1)):
        for rung in (3, 9, 12):
            values = search.curves(metric)[keep, rung - 1]
            row = cell(found, metric, rung)
            assert row["n"] == 39 and row["n_half"] == 20 and row["last"] == (rung == 12)
            rho = stats.spearmanr(sign * values, objective).statistic
            assert row["rho_all"] == pytest.approx(rho) and row["low"] < rho < row["high"]
            assert row["rho_half"] == pytest.approx(stats.spearmanr(sign * values[half], objective[half]).statistic)
            knn = search.curves("knn")[keep, -1]
            assert row["knn"] == pytest.approx(stats.spearmanr(sign * values, knn).statistic)
            clusters = search.curves("clusters")[keep, rung - 1]
            assert row["clusters"] == pytest.approx(stats.spearmanr(values, clusters).statistic)
            fields = found.fields[(found.fields["metric"] == metric) & (found.fields["rung"] == rung)]
            by_field = dict(zip(fields["field"], fields["rho"], strict=True))
            temperature = stats.spearmanr(values, trials["config.moco.temperature"]).statistic
            assert by_field["moco.temperature"] == pytest.approx(temperature)
            assert row["field_rho"] == max(by_field.values(), key=abs) and by_field[row["field"]] == row["field_rho"]
    assert found.table["partial"].notna().all() and len(found.table) == 6 * 4


def test_a_curve_that_only_follows_a_field_has_no_partial_correlation_left(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    field = np.linspace(0, 1, 60)
    objective = field + 0.2 * chance.normal(size=60)
    curve = field[:, None] + 0.05 * chance.normal(size=(60, 8))
    row = cell(audit(write_search(tmp_path, {"acc_proto_ref": curve}, objective, {"lr": field})), "acc_proto_ref", 2)
    assert row["rho_all"] > 0.7 and row["partial_low"] < 0 < row["partial_high"]
    assert row["field"] == "lr" and row["field_rho"] > 0.9


def test_what_cannot_be_computed_is_said(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    fields = {f"field{i}": chance.random(12) for i in range(5)}
    found = audit(write_search(tmp_path, {"acc_proto_ref": chance.random((12, 8))}, np.arange(12.0), fields))
    assert found.table["partial"].isna().all() and found.table["rho_half"].isna().all()
    text = "\n".join(found.lines())
    assert "the 5 columns of the searched fields need 15 finished trials (n = 12)" in text
    assert "needs 8 trials in the half (n = 12)" in text


def test_kept_is_the_replay(tmp_path: Path) -> None:
    search = known_search(tmp_path / "s")
    found = audit(search)
    assert found.replayed == (3.0, 6.0) and found.factor == 2
    for row in found.kept.to_dict("records"):
        result = replay(Recording.of(search), row["metric"])
        assert row["epochs_share"] == result.epochs_share and row["lost_of_best_quarter"] == result.lost
        assert row["hours"] == result.hours and row["regret"] == result.regret and row["quarter"] == 10
    lost = dict(zip(found.kept["metric"], found.kept["lost_of_best_quarter"], strict=True))
    assert lost["inst_ref"] < lost["acc_proto_ref"]


def test_the_searchs_own_mode_says_which_end_is_better(tmp_path: Path) -> None:
    known_search(tmp_path / "s", chosen_by="inst_ref", metric="inst_ref")
    plain = audit(load_search(tmp_path / "s"))
    told = audit(load_search(tmp_path / "s", metric="inst_ref", mode="min"))
    for rung in (3.0, 12.0):  # curve and objective are both turned: as good as before
        one, before = cell(told, "inst_ref", rung), cell(plain, "inst_ref", rung)
        assert one["rho_all"] == pytest.approx(before["rho_all"])
        assert one["clusters"] == pytest.approx(before["clusters"])  # as the metric is, not turned
    assert dict(zip(told.kept["metric"], told.kept["lost_of_best_quarter"], strict=True))["inst_ref"] < 4


def test_of_many_trials_a_part_is_asked_and_the_audit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audits, "ENOUGH", 60)
    monkeypatch.setattr(audits, "PART", 30)
    search = known_search(tmp_path / "s", 80)
    found, again = audit(search), audit(search)
    assert (found.n, found.asked) == (80, 30) and found.table["n"].max() == 30
    pd.testing.assert_frame_equal(found.table, again.table)
    assert found.verdict == again.verdict
    assert found.kept["quarter"].iloc[0] == 20 and "n = 30" in found.verdict.sentence
    assert any("are of 30 of the 80 finished trials" in note for note in found.notes)
    assert "n = 30 finished trials" in svg(rank_by_rung(found), "a") and "n = 80" in svg(lost_for_spent(found), "b")
    monkeypatch.setattr(audits, "ENOUGH", 80)
    assert audit(search).asked == 80


def test_charts_state_their_question_and_n(tmp_path: Path) -> None:
    found = audit(known_search(tmp_path / "s"))
    for draw in (rank_by_rung, lost_for_spent):
        page = svg(draw(found), draw.__name__)
        assert "n = 40 finished trials" in page and "acc_proto_ref (the search" in page
        assert "acc_proto_ref (in use)" in svg(draw(replace(found, stops=True)), draw.__name__)
    few = audit(known_search(tmp_path / "few", 7))
    assert "8 are needed" in svg(rank_by_rung(few), "few")
    nothing = audit(known_search(tmp_path / "none", 2, rungs=(3.0,), stopped={0: 3, 1: 3}))
    assert "nothing can be lost" in svg(lost_for_spent(nothing), "none")


def test_the_script_prints_the_audit_and_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known_search(tmp_path / "s")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "s"), "--csv", str(tmp_path / "table.csv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Stop on inst_ref" in done.stdout, done.stderr
    assert len(pd.read_csv(tmp_path / "table.csv")) == 6 * 4
    below_a_file = [tmp_path / "s", "--csv", tmp_path / "table.csv" / "table.csv"]
    for wrong in ([tmp_path / "no\nnote: forged\x1b[31m"], below_a_file):
        assert run_script(SCRIPT, wrong, monkeypatch) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error[:-1].isprintable()
