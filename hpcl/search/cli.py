"""The command line of a search: ``python run_search.py`` and ``hpcl search``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcl.errors import UserError

if TYPE_CHECKING:
    from hpcl.search.runner import Found
    from hpcl.search.space import Space

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: a best configuration was found; 1: no trial finished; 2: a mistake of the user;
    130: interrupted (Ctrl-C or SIGTERM).
    """
    options = _parser().parse_args(argv)
    try:
        space = _space(options)
        if options.dry_run:
            return _dry_run(space, options)
        from hpcl.search.runner import run

        found = run(space, name=options.name, results=options.results, address=options.address)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(summary(space, found), flush=True)
    if found.interrupted:
        return INTERRUPTED
    return 0 if found.best_trial is not None else 1


def summary(space: Space, found: Found) -> str:
    """What a search found, where everything lies, and the next command."""
    from hpcl.search.plan import shown
    from hpcl.search.progress import duration
    from hpcl.search.runner import first_error
    from hpcl.validation import show

    counts = ", ".join(f"{n} {'cut short' if s == 'running' else s}" for s, n in found.states.items() if n)
    possible = space.search.trials * space.epochs
    folder = shown(found.folder)
    lines = [
        "",
        f"{'interrupted' if found.interrupted else 'done'} after {duration(found.seconds)}: {len(found.trials)} of "
        f"{space.search.trials} trials ({counts or 'none ended'}), {len(found.epochs)} of {possible} epochs trained",
    ]
    if found.best_trial is None or found.best is None:
        finished = found.count("finished")
        why = f"no finished trial has a value of {found.chosen_by}" if finished else "no trial finished its schedule"
        lines.append(f"{why}, so there is no best configuration")
        if error := first_error(found):
            lines += ["the first failed trial:", "", error.rstrip(), ""]
        lines.append(f"results  {folder}")
        return "\n".join(lines)
    best = found.best_trial
    lines.append(f"best     trial {best['trial_id']} with {found.chosen_by} {best['objective']:.4g}")
    values = {path: found.best.at(path) for path in space.params}
    active = [path for path in space.params if space.is_active(path, values)]
    width = max(len(path) for path in active)
    for path in active:
        value, base = found.best.at(path), space.base.at(path)
        note = "" if value == base else f"   (base: {show(base)})"
        lines.append(f"           {path:<{width}}  {show(value)}{note}")
    if base_trial := next((t for t in found.trials if t["number"] == 0 and t is not best), None):
        reached = f"{found.chosen_by} {base_trial['objective']:.4g}" if base_trial["objective"] is not None else "none"
        came_to = (
            reached if base_trial["state"] == "finished" else f"{base_trial['state']}, {base_trial['stop_reason']}"
        )
        lines.append(f"base     trial {base_trial['trial_id']} (number 0): {came_to}")
    lines += [
        f"results  {folder}  (trials.parquet, epochs.parquet, best.yaml, trials/{best['trial_id']}/)",
        f"next     hpcl train {shlex.quote(str(folder / 'best.yaml'))}",
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_search.py" if Path(sys.argv[0]).name == "run_search.py" else "hpcl search",
        description="Search a space of configurations with Ray Tune, ASHA and Optuna. Hyperparameters stand in the "
        "space file; the flags below change how it is run.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--space", type=Path, required=True, metavar="FILE", help="space file, such as search_spaces/clusters.yaml")
    add("--data", metavar="SOURCE", help="images, in place of the file's data.source")
    add("--trials", type=int, metavar="N", help="trials in all")
    add("--name", help="name of the results folder; default: the space's name and the time")
    add(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="folder of all results (default: %(default)s)",
    )
    add("--address", metavar="ADDRESS", help="running Ray cluster, such as auto; default: Ray on this machine")
    add("--seed", type=int, metavar="N", help="seed of the sampler and of the trials")
    add("--workers", type=int, metavar="N", help="processes that train one trial together")
    add("--gpus-per-worker", metavar="N", help="GPUs of a worker: 0, a fraction, a number, or auto")
    add("--epochs", type=int, metavar="N", help="epochs of a trial; the stages are scaled in proportion")
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="change any field; may be given again")
    add("--dry-run", action="store_true", help="print what would happen, and stop")
    add("--assume-gpus", type=int, metavar="N", help="with --dry-run: plan for this machine with N GPUs")
    return parser


def _space(options: argparse.Namespace) -> Space:
    from hpcl.search.space import apply_overrides, load, with_overrides

    if options.assume_gpus is not None and not options.dry_run:
        raise UserError("--assume-gpus only plans; use it with --dry-run")
    if options.assume_gpus is not None and options.assume_gpus < 0:
        raise UserError(f"--assume-gpus {options.assume_gpus}: must be >= 0")
    if options.dry_run and options.address:
        raise UserError("--address: --dry-run plans for this machine without Ray; leave one of them out")
    space = with_overrides(
        load(options.space),
        name=options.name,
        data=options.data,
        trials=options.trials,
        seed=options.seed,
        workers=options.workers,
        gpus_per_worker=options.gpus_per_worker,
        epochs=options.epochs,
    )
    return apply_overrides(space, options.set)


def _dry_run(space: Space, options: argparse.Namespace) -> int:
    from hpcl.search.machine import local_node
    from hpcl.search.plan import make_plan, render, results_folder

    folder = results_folder(space, options.name, options.results)
    cluster = "this machine" if options.assume_gpus is None else f"this machine, assuming {options.assume_gpus} GPUs"
    print(render(make_plan(space, [local_node(options.assume_gpus)], cluster=cluster, folder=folder)))
    return 0
