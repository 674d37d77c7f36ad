"""Distributed hyperparameter search for hierarchical Prototypical Contrastive Learning.

    import hpcl
    config = hpcl.load_config("config.yaml")
    run = hpcl.fit(config, folder="runs/mine", backbone=my_module)

Nothing heavy is imported here: torch comes with :func:`fit`, ray with ``hpcl.search``.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcl.config import Config as Config
    from hpcl.trainer import fit as fit

__version__ = "0.1.0"
__all__ = ["Config", "fit", "load_config"]

_HOMES = {"Config": "hpcl.config", "fit": "hpcl.trainer"}


def load_config(path: str | os.PathLike[str]) -> Config:
    """The configuration in a YAML file; fields it leaves out have the notes' values.

    Raises:
        hpcl.errors.ConfigError: all problems at once, each with file:line:column.
    """
    from hpcl.config import Config
    from hpcl.yamlio import load

    return load(Config, path)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hpcl' has no attribute {name!r}")
