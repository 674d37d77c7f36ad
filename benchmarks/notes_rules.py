"""When an observation of the research notes counts as confirmed: rules on curves, fixed before anything was run.

Each rule takes a table with one row per run and epoch (`notes_verdict.COLUMNS`, of epochs with prototypes) and answers
`confirmed` where every seed shows the observation, `in part` where most seeds or the seeds taken together do, else
`not confirmed`; `not seen here` where what it is about did not come up. The rule is the docstring, which is printed.

Legend: k clusters of a level, B batch.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from notes_verdict import MOST, Answer, Verdict, answer, by_count, growths, judged, part, share_of, spread

from hpcl.losses import pcl_ceiling

EACH = 0.9
"""Share that counts as "at each growth"."""
NEAR_CLASSES = (0.6, 2.4)
"""The notes' lowest loss was at 60/120/240 clusters for 100 classes."""


# ---------------------------------------------------------------- A, B, C: runs that grow every second epoch


def near_ceiling(table: pd.DataFrame, batch: int) -> Verdict:
    """With `pcl` targets and at most B/4 clusters, acc_proto lies at 80 to 110 % of its ceiling at every count of
    every seed; in part: at two thirds of them."""
    acc = by_count(part(table, set="sweep", targets="pcl", batch=batch, head="v2"), "acc_proto")
    acc = acc[acc.index <= batch / 4]
    ratio = acc.div([pcl_ceiling(int(k), batch) for k in acc.index], axis=0)
    near = (ratio >= 0.8) & (ratio <= 1.1)
    found = answer([bool(near[seed].all()) for seed in near], bool(near.size and near.to_numpy().mean() >= MOST))
    each = ", ".join(f"k = {k}: {acc.loc[k].mean():.3f} of {pcl_ceiling(int(k), batch):.3f}" for k in acc.index)
    return judged(near_ceiling, found, f"{each}; ratio {spread(ratio.to_numpy().ravel())} over counts and seeds", "A1")


def fix_restores(table: pd.DataFrame, batch: int) -> Verdict:
    """With `adjusted` targets acc_proto is at least twice the ceiling of `pcl` at every count up to B/4 of every seed,
    and in the first epoch with prototypes loss_proto is that of `pcl` to 1e-5 of it; in part: one of the two."""
    acc = {t: by_count(part(table, set="sweep", targets=t, batch=batch, head="v2"), "acc_proto")
           for t in ("pcl", "adjusted", "unique")}  # fmt: skip
    adjusted = acc["adjusted"][acc["adjusted"].index <= batch / 4]
    above = adjusted.ge([2 * pcl_ceiling(int(k), batch) for k in adjusted.index], axis=0).to_numpy()
    pairs = table[(table["set"] == "sweep") & (table["batch"] == batch)].pivot_table(
        index=["seed", "epoch"], columns="targets", values="loss_proto"
    )
    if not len(adjusted) or "pcl" not in pairs:
        return judged(fix_restores, "not seen here", "no pairs of runs", "A2")
    apart = (pairs["adjusted"] / pairs["pcl"] - 1).abs()
    first = apart.groupby("seed").first()
    restored, same = bool(above.all()), bool((first <= 1e-5).all())
    found: Answer = "confirmed" if restored and same else "in part" if restored or same else "not confirmed"
    each = "; ".join(
        f"k = {k}: {' / '.join(f'{acc[t].loc[k].mean():.3f}' for t in acc if k in acc[t].index)}"
        for k in adjusted.index
    )
    figures = (
        f"acc_proto of pcl / adjusted / unique: {each}; loss_proto of pcl and adjusted apart by at most "
        f"{first.max():.1e} in the first epoch with prototypes, {apart.max():.1e} in any"
    )
    return judged(fix_restores, found, figures, "A2")


def _sides(table: pd.DataFrame, targets: str, batch: int) -> pd.DataFrame:
    steps = growths(part(table, set="sweep", targets=targets, batch=batch, head="v2"))
    return steps[steps["old"] != steps["new"]]


def rises_below_batch(table: pd.DataFrame, batch: int) -> Verdict:
    """With `pcl` targets acc_proto rises at 90 % or more of the growths to at most B clusters, in every seed; in part:
    at two thirds of all of them."""
    steps = _sides(table, "pcl", batch)
    below, above = steps[steps["new"] <= batch], steps[steps["new"] > batch]
    up = (below["proto"] > 0).groupby(below["seed"]).mean()
    found = answer(list(up >= EACH), bool(len(below) and (below["proto"] > 0).mean() >= MOST))
    figures = f"rises at {share_of(below['proto'] > 0)} growths up to B, at {share_of(above['proto'] > 0)} beyond"
    return judged(rises_below_batch, found, figures, f"B1 (batch {batch})")


def falls_beyond_classes(table: pd.DataFrame, batch: int, classes: int, targets: str) -> Verdict:
    """acc_proto falls at 90 % or more of the growths from a count of at least the number of classes, in every seed; in
    part: at two thirds of all of them."""
    steps = _sides(table, targets, batch)
    beyond, below = steps[steps["old"] >= classes], steps[steps["old"] < classes]
    down = (beyond["proto"] < 0).groupby(beyond["seed"]).mean()
    found = answer(list(down >= EACH), bool(len(beyond) and (beyond["proto"] < 0).mean() >= MOST))
    later = beyond[beyond["old"] >= batch]
    figures = (
        f"falls at {share_of(beyond['proto'] < 0)} growths beyond the classes (of these at "
        f"{share_of(later['proto'] < 0)} from at least B clusters), at {share_of(below['proto'] < 0)} below"
    )
    return judged(falls_beyond_classes, found, figures, f"B2 ({targets}, batch {batch})")


def turns_at_classes(table: pd.DataFrame, batch: int, classes: int, targets: str) -> Verdict:
    """The first growth at which acc_proto falls starts from a count between 0.5 and 2 times the number of classes
    (notes: 114 for 100), in every seed; in part: in two thirds of the seeds."""
    steps = _sides(table, targets, batch)
    turns = steps[steps["proto"] < 0].groupby("seed")["old"].first()
    if not len(turns):
        return judged(turns_at_classes, "not seen here", "it never falls at a growth", f"B3 ({targets}, batch {batch})")
    near = [0.5 <= turns.get(seed, np.inf) / classes <= 2 for seed in sorted(steps["seed"].unique())]
    figures = f"first fall from {', '.join(f'{turns.get(s, 0):g}' for s in sorted(steps['seed'].unique()))} clusters"
    return judged(turns_at_classes, answer(near), f"{figures}; {classes} classes", f"B3 ({targets}, batch {batch})")


def little_change_at_a_count(table: pd.DataFrame, batch: int) -> Verdict:
    """With `pcl` targets the median change of acc_proto within a count is at most half of that at a growth (absolute
    values), in every seed; in part: with all seeds together."""
    steps = growths(part(table, set="sweep", targets="pcl", batch=batch, head="v2"))
    size = steps.assign(at=steps["old"] != steps["new"], proto=steps["proto"].abs().astype(float))
    by_seed = size.pivot_table(index="seed", columns="at", values="proto", aggfunc="median")
    if by_seed.shape[1] < 2:
        return judged(
            little_change_at_a_count, "not seen here", "no growths, or none that is followed by an epoch", "B4"
        )
    both = size.groupby("at")["proto"].median()
    found = answer(list(by_seed[False] <= by_seed[True] / 2), bool(both[False] <= both[True] / 2))
    return judged(
        little_change_at_a_count,
        found,
        f"median change {both[True]:.4f} at a growth, {both[False]:.4f} within a count",
        "B4",
    )


def recovers(table: pd.DataFrame, batch: int, classes: int, targets: str) -> Verdict:
    """Beyond the number of classes acc_proto rises from the first to the second epoch at a count in 90 % or more of the
    counts, in every seed; in part: in two thirds of all of them."""
    steps = growths(part(table, set="sweep", targets=targets, batch=batch, head="v2"))
    within = steps[(steps["old"] == steps["new"]) & (steps["old"] > classes)]
    up = (within["proto"] > 0).groupby(within["seed"]).mean()
    found = answer(list(up >= EACH), bool(len(within) and (within["proto"] > 0).mean() >= MOST))
    return judged(
        recovers, found, f"rises in {share_of(within['proto'] > 0)} counts beyond the classes", f"B5 ({targets})"
    )


def lowest_loss(table: pd.DataFrame, batch: int, classes: int, runs: str) -> Verdict:
    """The count with the lowest mean loss_proto (`pcl` targets, whose loss is that of `adjusted`) lies between 0.6 and
    2.4 times the number of classes (notes: 60/120/240 for 100), in every seed; in part: in two thirds of the seeds."""
    loss = by_count(part(table, set=runs, targets="pcl", batch=batch, head="v2"), "loss_proto")
    best = loss.idxmin() if len(loss) else pd.Series(dtype=float)
    low, high = (factor * classes for factor in NEAR_CLASSES)
    figures = f"lowest at {', '.join(f'{k:g}' for k in best)} of {', '.join(f'{k:g}' for k in loss.index)} clusters"
    return judged(
        lowest_loss,
        answer(list(best.between(low, high))),
        f"{figures}; {classes} classes",
        f"C1 ({runs}, batch {batch})",
    )


def classes_cause_it(table: pd.DataFrame, batches: tuple[int, int]) -> Verdict:
    """The number of classes is why: with another batch the lowest loss_proto stays at the same count, in every seed; in
    part: in two thirds of the seeds."""
    small, large = (by_count(part(table, set="sweep", targets="pcl", batch=b, head="v2"), "loss_proto").idxmin()
                    for b in batches)  # fmt: skip
    both = pd.concat([small, large], axis=1, keys=batches).dropna()
    figures = "; ".join(f"batch {b}: {', '.join(f'{k:g}' for k in both[b])}" for b in batches)
    return judged(
        classes_cause_it, answer(list(both[batches[0]] == both[batches[1]])), f"lowest at, {figures} clusters", "C2"
    )


# ---------------------------------------------------------------- D, F: runs that grow by a policy


def _ends(table: pd.DataFrame, targets: str, batch: int) -> pd.DataFrame:
    """Per seed and policy: share of epochs at the first two counts, last count, growths, probe and last acc_inst."""
    runs = part(table, set="rule", targets=targets, batch=batch).sort_values("epoch")
    counts = sorted(runs["clusters"].unique())[:2]
    grouped = runs.assign(first=runs["clusters"].isin(counts)).groupby(["seed", "policy"])
    ends = grouped.agg(
        epochs=("first", "size"), first=("first", "sum"), last=("clusters", "last"), growths=("clusters", "nunique"),
        probe=("objective", "last"), inst=("acc_inst", "last"),
    )  # fmt: skip
    ends["growths"] -= 1
    return ends.unstack("policy")


def plateau_sticks(table: pd.DataFrame, batch: int, targets: str) -> Verdict:
    """The plateau rule is at the first two counts for half of its epochs or more, in every seed; in part: on
    average."""
    ends = _ends(table, targets, batch)
    share = ends["first"]["plateau"] / ends["epochs"]["plateau"]
    figures = (
        f"{', '.join(f'{n:g}' for n in ends['first']['plateau'])} of {ends['epochs']['plateau'].max():g} epochs at the "
        f"first two counts; {', '.join(f'{n:g}' for n in ends['growths']['plateau'])} growths, to "
        f"{', '.join(f'{n:g}' for n in ends['last']['plateau'])} clusters"
    )
    return judged(plateau_sticks, answer(list(share >= 0.5), bool(share.mean() >= 0.5)), figures, f"D1 ({targets})")


def window_goes_on(table: pd.DataFrame, batch: int, targets: str) -> Verdict:
    """The window rule is at the first two counts for fewer epochs than the plateau rule and ends with more clusters, in
    every seed; in part: on average."""
    ends = _ends(table, targets, batch)
    first, last = ends["first"], ends["last"]
    on = (first["window"] < first["plateau"]) & (last["window"] > last["plateau"])
    mean = first["window"].mean() < first["plateau"].mean() and last["window"].mean() > last["plateau"].mean()
    figures = (
        f"{', '.join(f'{n:g}' for n in first['window'])} epochs at the first two counts; "
        f"{', '.join(f'{n:g}' for n in ends['growths']['window'])} growths, to "
        f"{', '.join(f'{n:g}' for n in last['window'])} clusters"
    )
    return judged(window_goes_on, answer(list(on), bool(mean)), figures, f"D2 ({targets})")


def few_clusters_cost(table: pd.DataFrame, batch: int, targets: str) -> Verdict:
    """The linear probe is higher with the window rule than with the plateau rule in every seed, and by .005 or more on
    average; in part: higher in two thirds of the seeds."""
    probe = _ends(table, targets, batch)["probe"]
    gain = probe["window"] - probe["plateau"]
    found = answer(list(gain > 0))
    if found == "confirmed" and gain.mean() < 0.005:
        found = "in part"
    figures = f"plateau {spread(probe['plateau'])}, window {spread(probe['window'])}, difference {spread(gain)}"
    return judged(few_clusters_cost, found, figures, f"D3 ({targets})")


def inst_grows_alone(table: pd.DataFrame, batch: int) -> Verdict:
    """With `pcl` targets and the plateau rule, from the first to the last third of the epochs at the longest-held
    count, acc_inst gains 5 % or more of itself and acc_proto less than 5 %, in every seed; in part: in two thirds."""
    seen, lines = [], []
    runs = part(table, set="rule", targets="pcl", policy="plateau", batch=batch).sort_values("epoch")
    for _, run in runs.groupby("seed"):
        count = run["clusters"].mode().max()
        held = run[run["clusters"] == count]
        third = max(1, len(held) // 3)
        first, last = (held[["acc_inst", "acc_proto"]].iloc[where].mean() for where in
                       (slice(None, third), slice(-third, None)))  # fmt: skip
        gain = last / first - 1
        seen.append(len(held) >= 3 and bool(gain["acc_inst"] >= 0.05 and gain["acc_proto"] < 0.05))
        lines.append(
            f"{len(held)} epochs at {count:g}: acc_inst {first['acc_inst']:.3f} to {last['acc_inst']:.3f}, "
            f"acc_proto {first['acc_proto']:.3f} to {last['acc_proto']:.3f}"
        )
    return judged(inst_grows_alone, answer(seen), "; ".join(lines), "F1")


def inst_ahead(table: pd.DataFrame, batch: int) -> Verdict:
    """With `pcl` targets acc_inst ends 5 % or more of itself higher with the plateau rule than with the window rule, in
    every seed; in part: on average."""
    inst = _ends(table, "pcl", batch)["inst"]
    gain = inst["plateau"] / inst["window"] - 1
    figures = f"plateau {spread(inst['plateau'])}, window {spread(inst['window'])}"
    return judged(inst_ahead, answer(list(gain >= 0.05), bool(gain.mean() >= 0.05)), figures, "F2")


def inst_grows_past_turn(table: pd.DataFrame, batch: int, targets: str) -> Verdict:
    """From the epoch with the highest acc_proto to the last one acc_inst gains 5 % or more of itself while acc_proto
    falls, in every seed; in part: in two thirds of the seeds."""
    seen, lines = [], []
    for _, run in part(table, set="sweep", targets=targets, batch=batch, head="v2").groupby("seed"):
        run = run.sort_values("epoch")
        peak, last = run.loc[run["acc_proto"].idxmax()], run.iloc[-1]
        if last["epoch"] == peak["epoch"]:
            continue
        seen.append(bool(last["acc_inst"] >= 1.05 * peak["acc_inst"]))
        lines.append(
            f"acc_proto {peak['acc_proto']:.3f} (k = {peak['clusters']:g}) to {last['acc_proto']:.3f} "
            f"(k = {last['clusters']:g}), acc_inst {peak['acc_inst']:.3f} to {last['acc_inst']:.3f}"
        )
    return judged(
        inst_grows_past_turn, answer(seen), "; ".join(lines) or "acc_proto is highest at the end", f"F3 ({targets})"
    )


# ---------------------------------------------------------------- E: two heads at one count


def slow_with_v1(table: pd.DataFrame, batch: int) -> Verdict:
    """At one count, from the first to the last epoch with prototypes, loss_proto falls with head v1 by at most three
    quarters of what it falls with v2, in every seed; in part: less than with v2 on average."""
    runs = part(table, set="head", batch=batch).sort_values("epoch").groupby(["seed", "head"])["loss_proto"]
    fall = (runs.first() - runs.last()).unstack("head")
    last = runs.last().unstack("head")
    slower = list(fall["v1"] <= 0.75 * fall["v2"])
    figures = (
        f"falls by {spread(fall['v1'])} nats with v1 to {last['v1'].mean():.3f}, by {spread(fall['v2'])} with v2 to "
        f"{last['v2'].mean():.3f}"
    )
    return judged(slow_with_v1, answer(slower, bool(fall["v1"].mean() < fall["v2"].mean())), figures, "E1")


def v2_is_better(table: pd.DataFrame, batch: int, measure: str) -> Verdict:
    """Head v2 ends higher than v1 in every seed; in part: in two thirds of the seeds."""
    runs = part(table, set="head", batch=batch).sort_values("epoch").groupby(["seed", "head"])[measure]
    last = runs.last().unstack("head")
    figures = f"{measure}: v1 {spread(last['v1'])}, v2 {spread(last['v2'])}"
    return judged(v2_is_better, answer(list(last["v2"] > last["v1"])), figures, f"E2 ({measure})")


def verdicts(table: pd.DataFrame, batches: tuple[int, int], classes: int) -> list[Verdict]:
    """All verdicts for which the table has runs, in the notes' order.

    Args:
        table: with :data:`COLUMNS`.
        batches: the notes' and a larger one.
        classes: of the images.
    """
    batch, sets = batches[0], set(table["set"])
    found: list[Verdict] = []
    if "sweep" in sets:
        two = [b for b in batches if len(part(table, set="sweep", batch=b))]
        kinds = [("pcl", b) for b in two] + [("adjusted", batch), ("unique", batch)]
        found += [near_ceiling(table, batch), fix_restores(table, batch)]
        found += [rises_below_batch(table, b) for b in two]
        found += [falls_beyond_classes(table, b, classes, targets) for targets, b in kinds]
        found += [turns_at_classes(table, b, classes, targets) for targets, b in kinds]
        found += [little_change_at_a_count(table, batch)]
        found += [recovers(table, batch, classes, targets) for targets in ("pcl", "adjusted")]
        found += [lowest_loss(table, b, classes, "sweep") for b in two]
        found += [lowest_loss(table, batch, classes, "held")] if "held" in sets else []
        found += [classes_cause_it(table, batches)] if len(two) > 1 else []
    if "rule" in sets:
        for targets in ("pcl", "adjusted"):
            found += [rule(table, batch, targets) for rule in (plateau_sticks, window_goes_on, few_clusters_cost)]
    if "head" in sets:
        found += [slow_with_v1(table, batch)]
        found += [v2_is_better(table, batch, measure) for measure in ("acc_proto", "knn", "objective")]
    if "rule" in sets:
        found += [inst_grows_alone(table, batch), inst_ahead(table, batch)]
    if "sweep" in sets:
        found += [inst_grows_past_turn(table, batch, targets) for targets in ("pcl", "adjusted")]
    return found
