"""Search quality in virtual time: this project's stack against Ray's own and against random search.

    python benchmarks/search.py                                     # synthetic families
    python benchmarks/search.py --table curves.parquet --metric acc_proto_ref
    python benchmarks/search.py --variant told=complete --variant min_peers=3

All stacks spend the same number of epochs on the same curves, from the same first trial on:

    shipped   StageASHA and the sampler with the defaults of a space file
    ray       Ray's ASHAScheduler and OptunaSearch as they come, same grace and factor
    random    random search, nothing stopped
    asha      StageASHA with random draws: the scheduler alone

Regret is what is lost by training the chosen trial to its end instead of the best one there is, in units
of a family's range, or of the distance from a table's best to its median trial. `ideal` are the epochs of
synchronous successive halving over the same trials. Nothing is trained; no cluster is started.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from curve_tables import CurveTable
from pydantic import ValidationError
from rays_own import RaysOwn

from hpcl.errors import UserError
from hpcl.search.params import Search, better_end
from hpcl.search.simulator import Outcome, Shipped, Simulation, Stack, Task
from hpcl.search.synthetic import BEST, CHANCE, FAMILIES, LENGTHS, Synthetic
from hpcl.yamlio import assignment

MOST_IDEAL = 1.1
"""Target: realised over ideal epochs."""

Results = dict[str, list[Outcome]]


@dataclass(frozen=True)
class Source:
    """Where curves come from: a family, or a table."""

    name: str
    about: str
    make: Callable[[int, Search], Task]
    """(seed, settings) -> the curves to search, anew for each run."""
    search: Search
    epochs: int
    """Budget of each run."""
    scale: float
    """Unit of regret."""
    gaps: bool = False
    """Whether there are epochs without a value, which Ray's own stack takes for a mistake."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print."""
    options = _options(arguments)
    began = time.monotonic()
    stacks = _stacks(options.variant)
    sources = _sources(options)
    if any(source.gaps for source in sources):
        del stacks["ray"]
        print("ray is left out: it breaks off at an epoch without a value\n")
    found: list[tuple[Source, Results]] = []
    for source in sources:
        results = compare(source, stacks, seeds=options.seeds, at_a_time=options.at_a_time)
        print(
            f"{source.name}: {source.about}; {source.epochs} epochs each\n{table(results, source.scale)}\n", flush=True
        )
        found.append((source, results))
    print(verdict(found))
    print(f"\n{options.seeds} seeds, {options.at_a_time} trials at a time, {time.monotonic() - began:.0f} s")


def compare(source: Source, stacks: dict[str, dict[str, Any] | None], *, seeds: int, at_a_time: int = 4) -> Results:
    """Outcomes by stack, one a seed.

    Args:
        source: the curves.
        stacks: name -> settings that differ from the source's; None for Ray's own.
        seeds: runs of each stack.
        at_a_time: trials at a time.
    """
    results: Results = {name: [] for name in stacks}
    for seed in range(seeds):
        for name, changes in stacks.items():
            task = source.make(seed, source.search.model_copy(update=changes or {}))
            stack: Stack = RaysOwn(task) if changes is None else Shipped(task, at_a_time)
            results[name].append(Simulation(stack, task, epochs=source.epochs, at_a_time=at_a_time).finish())
    return results


def table(results: Results, scale: float) -> str:
    """One line a stack."""
    rows = [("stack", "regret", "quartiles", "rank", "trials", "epochs/ideal", "not finished", "not its best")]
    for (name, outcomes), rank in zip(results.items(), ranks(results), strict=True):
        low, high = np.percentile([o.regret / scale for o in outcomes], (25, 75), method="nearest")
        rows.append(
            (
                name,
                f"{median(o.regret for o in outcomes) / scale:.3f}",
                f"{low:.3f} .. {high:.3f}",
                f"{rank:.2f}",
                f"{np.mean([o.trials for o in outcomes]):.0f}",
                f"{_ratio(outcomes):.2f}",
                f"{np.mean([not o.finished for o in outcomes]):.0%}",
                f"{np.mean([not o.was_best for o in outcomes]):.0%}",
            )
        )
    return _aligned(rows)


def ranks(results: Results) -> list[float]:
    """Mean rank by regret of each stack over the seeds, from 1; equals share theirs."""
    regrets = np.array([[o.regret for o in outcomes] for outcomes in results.values()])
    below = (regrets[:, None] > regrets[None]).sum(1)
    equal = (regrets[:, None] == regrets[None]).sum(1)
    return [float(rank) for rank in (below + (equal + 1) / 2).mean(1)]


def verdict(found: Sequence[tuple[Source, Results]]) -> str:
    """All sources together, and one line a target."""
    names = list(found[0][1])
    regrets = {name: [o.regret / source.scale for source, results in found for o in results[name]] for name in names}
    every: Results = {name: [o for _, results in found for o in results[name]] for name in names}
    mean_ranks = np.mean([ranks(results) for _, results in found], axis=0)
    rows = [("all together", "regret", "rank", "epochs/ideal", "runs better : worse than shipped")]
    for name, rank in zip(names, mean_ranks, strict=True):
        wins, losses = _duel(regrets[name], regrets["shipped"])
        duel = "" if name == "shipped" else f"{wins} : {losses}"
        rows.append((name, f"{median(regrets[name]):.3f}", f"{rank:.2f}", f"{_ratio(every[name]):.2f}", duel))
    lines = [_aligned(rows), "targets"]
    for other in ("ray", "random"):
        if other not in names:
            lines.append(f"  median regret no worse than {other}'s: not compared")
            continue
        ours, theirs = median(regrets["shipped"]), median(regrets[other])
        worse = [s.name for s, results in found if _median(results["shipped"]) > _median(results[other])]
        wins, losses = _duel(regrets["shipped"], regrets[other])
        lines.append(
            f"  median regret no worse than {other}'s: {_yes(ours <= theirs)} ({ours:.3f} against {theirs:.3f}; "
            f"better in {wins} runs, worse in {losses}; by source worse in {', '.join(worse) or 'none'})"
        )
    for name in ("shipped", "asha"):
        ratio = _ratio(every[name])
        lines.append(f"  epochs of {name} at most {MOST_IDEAL} x ideal: {_yes(ratio <= MOST_IDEAL)} ({ratio:.2f})")
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare searches in virtual time.")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), help="synthetic families; default all")
    parser.add_argument("--table", type=Path, nargs="+", help="Parquet tables or results folders, in their place")
    parser.add_argument("--metric", default="acc_proto_ref", help="column of the tables' curve")
    parser.add_argument("--mode", choices=("max", "min"), help="its better end; default as for this project's curves")
    parser.add_argument("--grace", type=int, help="first rung; default a ninth of the schedule")
    parser.add_argument("--factor", type=int, default=3, help="reduction factor (default 3)")
    parser.add_argument("--budget", type=float, default=24, help="epochs in full trainings (default 24)")
    parser.add_argument("--seeds", type=int, default=30, help="runs of each stack (default 30)")
    parser.add_argument("--at-a-time", type=int, default=4, help="trials at a time (default 4)")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="FIELD=VALUE[,...]",
        help="the shipped stack with other settings",
    )
    return parser.parse_args(arguments)


def _stacks(variants: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    stacks: dict[str, dict[str, Any] | None] = {
        "shipped": {},
        "ray": None,
        "random": {"sampler": "random", "grace": None},
        "asha": {"sampler": "random"},
    }
    for variant in variants:
        changes = dict(assignment(text) for text in variant.split(","))
        if unknown := [name for name in changes if name not in Search.model_fields]:
            raise UserError(f"--variant {variant}: search has no field {unknown[0]}")
        try:
            Search.model_validate(changes)
        except ValidationError as error:
            raise UserError(f"--variant {variant}: {error.errors()[0]['msg']}") from None
        stacks[variant] = changes
    return stacks


def _sources(options: argparse.Namespace) -> list[Source]:
    found: list[Source] = []
    for path in options.table or ():
        data = CurveTable(path, options.metric, options.mode or better_end(options.metric))
        epochs = round(min(options.budget, len(data.curves) / 4) * data.longest)
        about = f"{len(data.curves)} curves of {data.longest} epochs ({data.left_out} left out)"
        gaps = any(value is None for curve in data.curves for value in curve.values)
        found.append(Source(data.name, about, data.task, _settings(options, data.total), epochs, data.scale, gaps))
    if not options.table:
        total = sum(LENGTHS)
        for name in options.families or FAMILIES:
            make = partial(Synthetic, FAMILIES[name])
            epochs = round(options.budget * total)
            found.append(Source(name, FAMILIES[name].about, make, _settings(options, total), epochs, BEST - CHANCE))
    return found


def _settings(options: argparse.Namespace, total: float) -> Search:
    grace = options.grace or max(1, round(total / 9))
    # As a space file that asks for twice the full trainings: `startup: auto` follows it.
    return Search(grace=grace, factor=options.factor, trials=max(1, round(2 * options.budget)))


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _duel(ours: Sequence[float], theirs: Sequence[float]) -> tuple[int, int]:
    """Runs with less regret, and with more, on the same curves and seed."""
    pairs = list(zip(ours, theirs, strict=True))
    return sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)


def _ratio(outcomes: Sequence[Outcome]) -> float:
    return median(o.realised / o.ideal for o in outcomes)


def _median(outcomes: Sequence[Outcome]) -> float:
    return median(o.regret for o in outcomes)


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
