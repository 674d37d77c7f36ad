"""The command line of a search: ``python run_search.py`` and ``hpcl search``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcl.errors import StorageError, UserError, harmless
from hpcl.search.places import told

if TYPE_CHECKING:
    from hpcl.search.space import Space

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: a best configuration was found; 1: no trial finished, or all failed alike; 2: a mistake of
    the user; 3: results could not be written any more; 130: interrupted (Ctrl-C or SIGTERM).
    """
    options = _parser().parse_args(argv)
    try:
        space = _space(options)
        if options.dry_run:
            return _dry_run(space, options)
        from hpcl.search.runner import run

        found = run(
            space,
            name=options.name,
            results=options.results,
            address=options.address,
            fresh=options.fresh,
            warm_from=options.warm_from,
        )
    except UserError as error:
        print(told(error), file=sys.stderr)
        return 3 if isinstance(error, StorageError) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    from hpcl.search.found import summary

    print(harmless(summary(space, found)), flush=True)
    return found.exit_code


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
    add("--name", help="name of the results folder; default: the space's name")
    add(
        "--results",
        default="results",
        metavar="FOLDER",
        help="folder of all results, or a URI such as s3://bucket/results (default: %(default)s)",
    )
    add("--fresh", action="store_true", help="start beside a search of this name instead of going on with it")
    add(
        "--warm-from",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="results of earlier searches, whose finished trials the sampler learns from",
    )
    add("--address", metavar="ADDRESS", help="running Ray cluster, such as auto; default: Ray on this machine")
    add("--seed", type=int, metavar="N", help="seed of the sampler and of the trials")
    add("--workers", type=int, metavar="N", help="processes that train one trial together")
    add("--gpus-per-worker", metavar="N", help="GPUs of a worker: 0, a fraction, a number, or auto")
    add("--epochs", type=int, metavar="N", help="epochs of a trial; the stages are scaled in proportion")
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="change any field; may be given again")
    add("--dry-run", action="store_true", help="print what would happen, and stop")
    add("--measure", action="store_true", help="with --dry-run: time an epoch here, and say how long it would take")
    add("--assume-gpus", type=int, metavar="N", help="with --dry-run: plan for this machine with N GPUs")
    return parser


def _space(options: argparse.Namespace) -> Space:
    from hpcl.search.space import apply_overrides, load, with_overrides

    if options.assume_gpus is not None and not options.dry_run:
        raise UserError("--assume-gpus only plans; use it with --dry-run")
    if options.assume_gpus is not None and options.assume_gpus < 0:
        raise UserError(f"--assume-gpus {options.assume_gpus}: must be >= 0")
    if options.measure and not options.dry_run:
        raise UserError("--measure only estimates; use it with --dry-run")
    if options.measure and options.assume_gpus is not None:
        raise UserError("--measure times this machine as it is; leave --assume-gpus out")
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
    from hpcl.search.check import backbone_problems
    from hpcl.search.folder import choose_folder
    from hpcl.search.images import foresee
    from hpcl.search.machine import local_node
    from hpcl.search.plan import make_plan
    from hpcl.search.plan_text import render
    from hpcl.search.warm import read_warm

    if problems := backbone_problems(space):
        raise UserError(*problems)
    choice = choose_folder(space, options.name, options.results, fresh=options.fresh)
    cluster = "this machine" if options.assume_gpus is None else f"this machine, assuming {options.assume_gpus} GPUs"
    measured = None
    if options.measure:
        from hpcl.search.measure import measure

        measured = measure(space)
    plan = make_plan(
        space,
        [local_node(options.assume_gpus)],
        cluster=cluster,
        folder=choice.folder,
        resumes=choice.resume,
        measured=measured,
        images=foresee(space.base.data),
    )
    lines = read_warm(options.warm_from, space).lines if options.warm_from else []
    print(harmless("\n".join([render(plan), *lines])))
    return 0
