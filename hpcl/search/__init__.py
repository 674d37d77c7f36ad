"""Search a space of configurations with Ray Tune, Ray Train and Optuna.

    import hpcl.search
    found = hpcl.search.run("search_spaces/smoke.yaml", backbone=make_my_module)
    found.best          # the best configuration, also in found.folder / "best.yaml"

Ray and Optuna are imported with :func:`run`, not before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcl.search.runner import Found as Found
    from hpcl.search.runner import run as run
    from hpcl.search.space import Space as Space
    from hpcl.search.space import load as load

__all__ = ["Found", "Space", "load", "run"]

_HOMES = {"Found": "runner", "run": "runner", "Space": "space", "load": "space"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"hpcl.search.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hpcl.search' has no attribute {name!r}")
