"""The same best at fewer epochs? Real searches with nothing shared and nothing stopped, beside those as shipped.

    python benchmarks/search_real.py                               # search_spaces/clusters.yaml, seeds 0 and 1
    python benchmarks/search_real.py --seeds 4 --first-seed 2      # seeds 2, 3, 4, 5
    python benchmarks/search_real.py --grace 3 --factor 3          # other settings of the stopped arm
    python benchmarks/search_real.py --space my.yaml --set search.trials=40

Nothing is simulated: Ray, Optuna, ASHA and the training are those of `run_search.py`. For each seed (of the sampler and
of the trials) the space is searched twice:

    all       search.grace null, search.share_prefix false: every trial trains all of its epochs itself
    stopped   as the space file has it: shared stages are trained once, ASHA stops trials

and of both it prints the epochs trained (shared ones once), the objective of the best trial, the same trial's linear
probe and kNN on test images, which no search has seen, CPU-hours and minutes. From the trials after the start-up on the
two draw different configurations, as the sampler learns from what it saw.

What counts was fixed before the first run. Epochs: those of `stopped` are at most 40 % of those of `all`. The same
best: averaged over the seeds, the best objective of `stopped` is at most one standard error of a probe,
sqrt(p (1 - p) / n) with n validation images, below that of `all`; more seeds do not shrink it, as the images are the
same for all. The best of many noisy probes flatters the arm that has more of them, so the difference on test images
stands beside it.

A search that has ended in the results folder is read, not run again, and one that was cut short goes on; the folders
are ordinary ones. Those of `all` stopped nothing, so they serve to try other rules without training:
`python analysis/replay.py FOLDER`, `python benchmarks/search.py --table FOLDER`. About 10 minutes a seed on 2 cores.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpcl.analysis.text import aligned, counted
from hpcl.errors import UserError

if TYPE_CHECKING:
    from hpcl.results import SearchResults
    from hpcl.search.space import Space

HERE = Path(__file__).resolve().parent

MOST = 0.40
"""Target: epochs of `stopped` over those of `all`."""

ALL, STOPPED = "all", "stopped"


class HeldOut(NamedTuple):
    """A network on test images."""

    linear: float
    """Accuracy of a linear probe, 0..1: ridge, as the objective, but its penalty chosen on the validation images."""
    knn: float
    """kNN accuracy, 0..1, k = 200."""
    images: int
    """Test images."""


@dataclass(frozen=True)
class Run:
    """What one search came to."""

    seed: int
    arm: str
    """`all` or `stopped`."""
    epochs: int
    """Epochs trained, those that trials share once, whoever trained them."""
    trials: int
    finished: int
    """Trials that trained all of their epochs."""
    best: float
    """Linear probe of the best trial on validation images, 0..1."""
    winner: str
    """Id of that trial."""
    images: int
    """Validation images."""
    hours: float
    """Hours of computing, those of shared stages once, in `unit`."""
    unit: str
    """CPU-hours, or GPU-hours where there were GPUs."""
    minutes: float
    test: HeldOut

    @property
    def error(self) -> float:
        """Standard error of the best trial's probe."""
        return math.sqrt(self.best * (1 - self.best) / self.images)


def read_run(search: SearchResults, seed: int, arm: str, held_out: Callable[[Path], HeldOut]) -> Run:
    """What a search that has ended came to.

    Args:
        search: its folder, read.
        seed: of its sampler.
        arm: `all` or `stopped`.
        held_out: measures a checkpoint on test images.

    Raises:
        UserError: no trial finished, or none was scored by a probe on validation images.
    """
    from hpcl.results.search import PROBE

    best, images = search.best, search.about.val_images
    if best is None:
        raise UserError(f"{search.folder}: no trial finished its schedule with an objective; raise search.trials")
    if search.chosen_by != PROBE or images is None:
        raise UserError(
            f"{search.folder}: its best trial was chosen by {search.chosen_by}, but must be by a linear probe, whose "
            "standard error is known; take images with labels, and leave search.objective at auto"
        )
    return Run(
        seed=seed,
        arm=arm,
        epochs=epochs_trained(search),
        trials=len(search.trials),
        finished=int((search.trials["state"] == "finished").sum()),
        best=float(best["objective"]),
        winner=str(best["trial_id"]),
        images=images,
        hours=search.cost,
        unit=search.cost_unit,
        minutes=(search.about.seconds or math.nan) / 60,
        test=held_out(search.folder / "trials" / str(best["trial_id"]) / "checkpoint.pt"),
    )


def epochs_trained(search: SearchResults) -> int:
    """Epochs of all trials, a shared one once: its rows are the same in all of its trials, seconds included.

    `search.json` leaves out a prefix that an earlier search had trained.
    """
    shared = search.epochs["shared"].fillna(False).astype(bool)
    once = search.epochs[shared].drop_duplicates(["epoch", "loss", "seconds"])
    return int((~shared).sum()) + len(once)


def report(runs: Sequence[Run]) -> list[str]:
    """The table, means with standard deviations over the seeds, and one line a target.

    Args:
        runs: for each seed one of `all` and one of `stopped`.
    """
    by_seed = {seed: {run.arm: run for run in runs if run.seed == seed} for seed in sorted({run.seed for run in runs})}
    pairs = [(arms[ALL], arms[STOPPED]) for arms in by_seed.values()]
    head = ("seed", "arm", "trials", "finished", "epochs", "of all", "best (val)", "test linear", "test kNN")
    rows = [(*head, runs[0].unit, "minutes", "best trial")]
    for whole, stopped in pairs:
        for run in (whole, stopped):
            rows.append(
                (
                    str(run.seed), run.arm, str(run.trials), str(run.finished), str(run.epochs),
                    f"{run.epochs / whole.epochs:.1%}", f"{run.best:.4f}", f"{run.test.linear:.4f}",
                    f"{run.test.knn:.4f}", f"{run.hours:.3f}", f"{run.minutes:.1f}", run.winner,
                )
            )  # fmt: skip
    shares = [stopped.epochs / whole.epochs for whole, stopped in pairs]
    below = [whole.best - stopped.best for whole, stopped in pairs]
    linear = [whole.test.linear - stopped.test.linear for whole, stopped in pairs]
    knn = [whole.test.knn - stopped.test.knn for whole, stopped in pairs]
    hours = [stopped.hours / whole.hours for whole, stopped in pairs if whole.hours]
    wall = [stopped.minutes / whole.minutes for whole, stopped in pairs]
    error = statistics.mean(whole.error for whole, _ in pairs)
    p, n = statistics.mean(whole.test.linear for whole, _ in pairs), pairs[0][0].test.images
    test_error = math.sqrt(p * (1 - p) / n)
    return [
        *aligned(rows),
        "",
        f"over {counted(len(pairs), 'seed')}, mean ± sd; differences are all - stopped:",
        f"  epochs     {_spread(shares, '.1%')} of all's",
        f"  {runs[0].unit}  {_spread(hours, '.1%') if hours else 'not known'} of all's, minutes {_spread(wall, '.1%')}",
        f"  best (val) {_spread(below, '+.4f')}   one standard error of a probe is {error:.4f} "
        f"(n = {pairs[0][0].images}); within it in {sum(each <= error for each in below)} of {len(pairs)}",
        f"  test       linear {_spread(linear, '+.4f')}, kNN {_spread(knn, '+.4f')}   one standard error of a probe is "
        f"{test_error:.4f} (n = {n})",
        verdict(statistics.mean(shares), statistics.mean(below), error),
    ]


def verdict(share: float, below: float, error: float) -> str:
    """The line of the target.

    Args:
        share: epochs of `stopped` over those of `all`, mean.
        below: best objective of `all` minus that of `stopped`, mean.
        error: one standard error of a probe.
    """
    missed = []
    if share > MOST:
        missed.append(f"by {100 * (share - MOST):.1f} points of epochs")
    if below > error:
        missed.append(f"by {below - error:.4f} in the best value beyond one standard error")
    told = f"missed {' and '.join(missed)}" if missed else "met"
    return f"target <= {MOST:.0%} of the epochs at the same best value: {told} ({share:.1%}, best {-below:+.4f})"


def measure(checkpoint: Path) -> HeldOut:
    """A trial's network on test images; see :mod:`hpcl.downstream.linear` and :mod:`hpcl.downstream.knn`.

    Raises:
        UserError: no such checkpoint, or no test images with labels.
    """
    from hpcl.checkpoint import load_checkpoint
    from hpcl.data import load
    from hpcl.dist import current_world
    from hpcl.downstream import tasks
    from hpcl.downstream.bench import Bench
    from hpcl.pretrained import network_of

    state = load_checkpoint(checkpoint)
    config, network, _ = network_of(state, checkpoint)
    world = current_world("cpu" if config.runtime.device == "cpu" else "auto")
    bench = Bench(config, network.to(world.device), load(config.data), world, split="test", state=state)
    found = {}
    for task in ("linear", "knn"):
        if reason := tasks.refusal(task, bench):
            raise UserError(reason)
        found[task] = tasks.run(task, bench, ("trained",), 0)[0].value
    return HeldOut(found["linear"], found["knn"], len(bench.ids("test")))


def spaces_of(options: argparse.Namespace) -> list[tuple[int, str, str, Space]]:
    """(seed, arm, name of the folder, space) of each search, in the order in which they are run.

    Raises:
        UserError: an argument, or the space, cannot be.
    """
    from hpcl.search.space import apply_overrides, load, with_overrides

    if options.seeds < 1:
        raise UserError(f"--seeds is {options.seeds}, but must be at least 1")
    base = apply_overrides(load(options.space), options.set)
    flags = {"grace": options.grace, "factor": options.factor, "min_peers": options.min_peers, "metric": options.metric}
    given = {name: value for name, value in flags.items() if value is not None}
    shipped = apply_overrides(base, [f"search.{name}={value}" for name, value in given.items()])
    if shipped.search.grace is None:
        raise UserError(f"{options.space}: search.grace is null, so it stops nothing; say where with --grace")
    whole = apply_overrides(base, ["search.grace=null", "search.share_prefix=false"])
    label = f"grace{shipped.search.grace}-factor{shipped.search.factor}"
    label += f"-peers{options.min_peers}" if options.min_peers is not None else ""
    label += f"-{options.metric}" if options.metric is not None else ""
    return [
        (seed, arm, f"{base.name}-{name}-seed{seed}", with_overrides(space, seed=seed))
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for arm, name, space in ((ALL, "all", whole), (STOPPED, label, shipped))
    ]


def has_ended(folder: Path, space: Space) -> bool:
    """Whether this very search, with these limits, lies there and has ended by itself.

    Raises:
        UserError: it is one of another space.
    """
    from hpcl.files import read_object
    from hpcl.search.folder import BUDGETS, RECORD_NAME, SPACE_NAME, differences
    from hpcl.search.space import load

    try:
        state = read_object(folder / RECORD_NAME).get("state")
    except (OSError, ValueError):  # not begun, or killed early; the search itself says what it makes of that
        return False
    if state != "finished":
        return False
    there = load(folder / SPACE_NAME)
    if refused := differences(there, space)[0]:
        raise UserError(f"{folder}: holds another search ({'; '.join(refused)}); give another folder with --results")
    return all(getattr(there.search, name) == getattr(space.search, name) for name in BUDGETS)


def main() -> int:
    """The command line; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--space", type=Path, default=HERE.parent / "search_spaces" / "clusters.yaml", help="default: clusters.yaml")
    add("--seeds", type=int, default=2, metavar="N", help="seeds of sampler and trials (default: %(default)s)")
    add("--first-seed", type=int, default=0, metavar="N", help="the first of them (default: %(default)s)")
    add("--grace", type=int, metavar="N", help="search.grace of `stopped`; default: the space's")
    add("--factor", type=int, metavar="N", help="search.factor of `stopped`; default: the space's")
    add("--min-peers", type=int, metavar="N", help="search.min_peers of `stopped`; default: the space's")
    add(
        "--metric",
        metavar="CURVE",
        help="search.metric of `stopped`, which the sampler follows, too; default: the space's",
    )
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="change any field of both; may be given again")
    add("--results", type=Path, default=Path("results"), help="folder of all results (default: %(default)s)")
    options = parser.parse_args()
    try:
        searches = spaces_of(options)
        from hpcl.results import load_search

        runs = []
        for seed, arm, name, space in searches:
            folder = options.results / name
            if not has_ended(folder, space):
                from hpcl.search.runner import run

                found = run(space, name=name, results=options.results)
                if found.exit_code:
                    print(f"{name}: {found.state}, {found.reason}; the same command goes on", file=sys.stderr)
                    return found.exit_code
            runs.append(read_run(load_search(folder), seed, arm, measure))
            print(f"{name}: best {runs[-1].best:.4f} after {runs[-1].epochs} epochs", flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n" + "\n".join([*report(runs), *conditions(load_search(options.results / searches[-1][2]))]))
    return 0


def conditions(search: SearchResults) -> list[str]:
    """On what it was measured, by the last search's record."""
    facts = search.about.facts
    hardware, versions = facts.get("hardware", {}), facts.get("versions", {})
    packages = ", ".join(f"{name} {versions.get(name)}" for name in ("python", "torch", "ray", "optuna"))
    return [
        f"{hardware.get('cpus')} CPUs ({hardware.get('cpu')}), {facts.get('trials_at_a_time')} trials at a time; "
        f"{packages}; last search begun {search.about.started}"
    ]


def _spread(values: Sequence[float], form: str) -> str:
    spread = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


if __name__ == "__main__":
    sys.exit(main())
