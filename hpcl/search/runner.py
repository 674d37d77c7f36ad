"""A whole search: space in, results folder out.

results/<name>/
  space.yaml search.json     what was searched, with what, on what, when
  journal.jsonl              every event; a search that was cut short goes on from it
  trials.parquet epochs.parquet   schemas in hpcl.results
  best.yaml                  the best configuration, for `hpcl train`
  trials/<id>/               config, log, TensorBoard events, checkpoint of a trial
  optuna.journal             Optuna's study, for optuna-dashboard
  tune/                      Ray Tune's own experiment folder; tune-2/ after a resume
  ray.log                    what Ray had to say
results/prefixes/<key>/      what trials have in common, trained once
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcl.downstream.scores import OBJECTIVES
from hpcl.errors import UserError
from hpcl.search import space as spaces
from hpcl.search.check import backbone_problems, space_problems
from hpcl.search.cluster import connected
from hpcl.search.elastic import machines, nodes_with_room
from hpcl.search.folder import choose_folder
from hpcl.search.found import Found
from hpcl.search.interrupt import interruptible
from hpcl.search.nodes import look_at_nodes, storage_problems
from hpcl.search.places import location
from hpcl.search.plan import Plan, make_plan
from hpcl.search.progress import say
from hpcl.search.record import Looked
from hpcl.search.session import Session
from hpcl.search.space import Space
from hpcl.search.storage import check
from hpcl.search.trial import Job, TrainFunction
from hpcl.search.warm import read_warm


def run(
    space: Space | str | Path,
    *,
    name: str | None = None,
    results: str | Path = "results",
    address: str | None = None,
    fresh: bool = False,
    warm_from: Sequence[str | Path] = (),
    train: TrainFunction | None = None,
    backbone: Callable[[], Any] | None = None,
    say: Callable[[str], None] = say,
) -> Found:
    """Search a space; returns when all trials have ended. Called again after an interruption, it goes on.

    Args:
        space: a checked space or the path of a space file.
        name: name of the results folder; None: the space's name.
        results: folder of all results, which all nodes of a cluster see, or a URI such as ``s3://bucket/results``.
        address: a running Ray cluster as in ``ray.init``; None: Ray starts on this machine.
        fresh: start a new search beside one of the same name instead of going on with it.
        warm_from: results folders (or URIs) of earlier searches, whose finished trials the sampler is told.
        train: what trains a trial, with the arguments of :func:`hpcl.trainer.fit` (the default).
        backbone: makes your own module, (b, C, H, W) -> (b, F), in each trial.
        say: prints one line.

    Raises:
        UserError: a search of this name cannot be gone on with, no cluster answers, it has no room
            for one trial, or the data do not fit; then nothing was written.
        KeyboardInterrupt: interrupted before the first trial, or twice.
    """
    if not isinstance(space, Space):
        space = spaces.load(space)
    with interruptible():
        space = with_full_path(space)
        check(results)
        choice = choose_folder(space, name, results, fresh=fresh)
        if name is None and not (fresh or choice.resume) and choice.folder.name != space.name:
            say(f"the search {space.name} has ended; this is a new one beside it: {choice.folder.name}")
        looked = None
        if backbone is None and (problems := backbone_problems(space)):
            raise UserError(*problems)
        if train is None:
            from hpcl.trainer import fit

            train, looked = fit, look_at_data(space)
            say(looked.line)
        own = None if backbone is None else getattr(backbone, "__name__", type(backbone).__name__)
        known = looked and looked.digest
        warm = read_warm(warm_from, space, data_hash=known, backbone=own) if warm_from else None
        with planned(space, choice.folder, address, say, resumes=choice.resume) as (plan, nodes):
            job = Job(space, train, backbone, plan.concurrency)
            search = Session(plan, job, looked, nodes, own, say, address=address)
            try:
                search.open(choice)
                if warm is not None:
                    search.warm(warm)
                return search.run()
            finally:
                search.close()


@contextmanager
def planned(
    space: Space, folder: Path, address: str | None, say: Callable[[str], None], *, resumes: bool = False
) -> Iterator[tuple[Plan, list[dict[str, Any]]]]:
    """Connected to Ray for the length of the block: the plan for its machines, and these machines.

    Raises:
        UserError: no cluster answers, it has no room for one trial, or not all of its machines see the results.
    """
    say("starting Ray ..." if address is None else f"connecting to Ray at {address} ...")
    # Ray puts a handler of its own for SIGTERM in the place of ours.
    with connected(address, workers=space.resources.workers), interruptible():
        nodes = nodes_with_room(space.resources, address, say)
        if address is not None and len(nodes) > 1:
            results = location(folder.parent)
            if problems := storage_problems(look_at_nodes(results), results):
                raise UserError(*problems)
        where = address or "this machine"
        yield make_plan(space, machines(nodes), cluster=where, folder=folder, resumes=resumes), nodes


def with_full_path(space: Space) -> Space:
    """The space with the full path of its images: other machines, and `best.yaml` in another folder, find them too."""
    source = Path(space.base.data.source).expanduser()
    if space.base.data.source == "mnist5k" or not source.exists():
        return space
    return replace(space, base=space.base.with_values({"data.source": str(source.resolve())}))


def look_at_data(space: Space) -> Looked:
    """Load the base's images once, so that trials find them decoded; what they are.

    Raises:
        UserError: the images cannot be read, or what the space asks for does not fit them.
    """
    from hpcl.data import load
    from hpcl.sources import SPLITS

    images = load(space.base.data)
    problems = space_problems(space, rules=True, images=len(images.train))
    if images.labels is None or not len(images.val):
        problems += [
            f"{space.tree.where(('search', name))}: search.{name} is {value}, but there are no validation images "
            "with labels to measure it on; choose another"
            for name, value in (("metric", space.search.metric), ("objective", space.search.objective))
            if value in ("knn", "linear")
        ]
    if space.search.objective in OBJECTIVES:
        from hpcl.downstream.tasks import objective_problem

        if problem := objective_problem(space.search.objective, space.base, images):
            problems.append(f"{space.tree.where(('search', 'objective'))}: {problem}")
    if problems:
        raise UserError(*(f"{images.source}: {problem}" for problem in problems))
    parts = {name: len(getattr(images, name)) for name in SPLITS}
    return Looked(images.describe(), images.content_hash, parts)
