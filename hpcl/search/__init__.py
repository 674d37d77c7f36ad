"""Search a space of configurations with Ray Tune, Ray Train and Optuna.

    import hpcl.search
    found = hpcl.search.run("search_spaces/smoke.yaml", backbone=make_my_module)
    found.best          # the best configuration, also in found.folder / "best.yaml"

Ray and Optuna are imported with :func:`run`, not before.

Where to look:

    the space file          space, params, check
    before anything runs    plan, plan_text, expected, measure, budget, machine, folder, prefixes
    a search                runner (from space to results), session (one process's part of it)
    which trial is next     queue, sampler (Optuna), warm (earlier searches), store (shared prefixes)
    which trial is stopped  asha, clock, monitor (is the curve a curve?)
    a trial                 trial (what runs inside Tune), lean and rendezvous (worker groups), failures, hung
    machines                cluster (Ray itself), elastic (they join and leave), nodes (what each of them says)
    where results lie       places (paths and URIs), storage (to and fro), work (a trial's files), mirror (the driver's)
    what is known           journal and events (all of it), tables (made of it), record (search.json), found (the end)
    what is seen            progress, live (the table in a terminal), forecast, status, interrupt (Ctrl-C)
    afterwards              retrain, retrained (what it says), listed, evidence
    what is amiss           doctor; probe, images and facts (what is seen), diagnosis and agreement (what it means)
    without Ray             simulator, synthetic (curves)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcl.search.found import Found as Found
    from hpcl.search.runner import run as run
    from hpcl.search.space import Space as Space
    from hpcl.search.space import load as load

__all__ = ["Found", "Space", "load", "run"]

_HOMES = {"Found": "found", "run": "runner", "Space": "space", "load": "space"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"hpcl.search.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hpcl.search' has no attribute {name!r}")
