"""Configurations to start from, as YAML files in this folder; each lists what differs from the defaults."""

from __future__ import annotations

from importlib import resources

from hpcl.config import Config
from hpcl.errors import ConfigError
from hpcl.yamlio import Tree, did_you_mean, parse, read_tree


def names() -> tuple[str, ...]:
    """Names of the presets, sorted."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


def tree(name: str) -> Tree:
    """The YAML tree of a preset: the fields it sets, with their places.

    Raises:
        ConfigError: no preset of this name.
    """
    if name not in names():
        raise ConfigError(f"there is no preset {name}{did_you_mean(name, names())} (there are: {', '.join(names())})")
    file = resources.files(__name__).joinpath(f"{name}.yaml")
    return read_tree(file.read_text(encoding="utf-8"), str(file))


def config(name: str) -> Config:
    """The complete configuration of a preset.

    Raises:
        ConfigError: no preset of this name.
    """
    return parse(Config, tree(name))
