"""What runs have in common: the start of a run, as far as its configuration decides it.

Two runs whose configurations agree on everything that acts in stages 1 to s are one
run up to the end of stage s: it need be trained only once (``fit(until_stage=s)``), and
both go on from its checkpoint (``fit(fork=...)``), bit for bit as if each had trained it.
:data:`hpcl.config.ACTS_FROM` declares which field acts from where on.

No torch here: a plan is made and printed without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpcl.config import ACTS_FROM, Config
from hpcl.methods import METHODS, reads
from hpcl.sections import STAGES
from hpcl.stages import stage_lengths

_HERE = Path(__file__).parent


def acts_from(path: str, config: Config) -> int:
    """The first stage, 1 to 5, in which the field at a dotted path can change anything.

    It depends on the method, stage lengths and growth stages of `config`: over several
    configurations the smallest counts. A field that never acts gives 5.

    Raises:
        KeyError: no such field, or one that :data:`hpcl.config.ACTS_FROM` does not declare.

    Example:
        >>> acts_from("topk.k", Config()), acts_from("stages.stage5.epochs", Config())
        (2, 3)
    """
    config.at(path)
    return _first_stage(path, config, _growing(config, 5))


def _first_stage(path: str, config: Config, growing: list[int]) -> int:
    name = path
    while name not in ACTS_FROM:
        name, dot, _ = name.rpartition(".")
        if not dot:
            raise KeyError(path)
    declared = ACTS_FROM[name]
    if not reads(config.method, path):
        return STAGES[-1]
    staged = METHODS[config.method].staged
    growth = growing[0] if growing else STAGES[-1]
    if declared == "growth":
        return growth
    if declared == "head":
        return 2 if staged else 1
    if declared == "length" and not staged:  # the learning rate's schedule runs over the whole run
        return 1
    if declared == "length":
        return 1 if config.stages.total is not None else min(growth, int(path.split(".")[1].removeprefix("stage")))
    return declared


def prefix_content(config: Config, stage: int) -> dict[str, Any]:
    """Everything that determines a run through the end of `stage`, by dotted path.

    Fields that act up to there with their values as in JSON; the stages' lengths as they
    are trained (scaled), learning rate and schedule where the length is above 0;
    ``growth.stages`` only those reached; ``total_epochs``, the run's length, where growth
    was asked (theta), the run is over (kNN and objective of a last epoch), or the method has
    one schedule for the whole run.

    Raises:
        ValueError: `stage` is not 1 to 5.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage}, but must be 1 to 5")
    lengths = stage_lengths(config.stages)
    reached = max((s for s in STAGES[:stage] if lengths[s - 1]), default=0)
    all_growing = _growing(config, 5)
    content = {
        path: value
        for path, value in _fields(config.model_dump(mode="json", exclude={"stages": True, "growth": {"stages"}}))
        if _first_stage(path, config, all_growing) <= reached
    }
    staged = METHODS[config.method].staged
    for s in STAGES[:stage]:
        content[f"stages.stage{s}.epochs"] = lengths[s - 1]
        if lengths[s - 1] and staged:
            content[f"stages.stage{s}.lr"] = config.stages.of(s).lr
            content[f"stages.stage{s}.schedule"] = config.stages.of(s).schedule
    growing = _growing(config, stage)
    if growing:
        content["growth.stages"] = growing
    if not staged and reached:
        content["stages.stage1.lr"] = config.stages.stage1.lr
        content["stages.stage1.schedule"] = config.stages.stage1.schedule
    if growing or not staged or sum(lengths[:stage]) == sum(lengths):
        content["total_epochs"] = sum(lengths)
    return content


def prefix_differences(ours: Config, theirs: Config, stage: int) -> list[str]:
    """What acts up to the end of `stage` and differs, as "path (theirs instead of ours)"."""
    a, b = prefix_content(ours, stage), prefix_content(theirs, stage)
    shown = {
        path: [json.dumps(content[path]) if path in content else "nothing" for content in (b, a)] for path in {**a, **b}
    }
    return [f"{path} ({there} instead of {here})" for path, (there, here) in shown.items() if there != here]


def prefix_key(config: Config, stage: int, environment: Mapping[str, str | int]) -> str:
    """16 hex digits that name the run through the end of `stage`.

    Args:
        config: any configuration that has this prefix.
        stage: 1 to 5.
        environment: what else decides the bits, by name: hash of the images, :func:`code_version`,
            number of ranks, type of device, dtype, version of torch, ...
    """
    facts = {"prefix": prefix_content(config, stage), "environment": dict(environment)}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def code_version(root: Path = _HERE) -> str:
    """16 hex digits of the learning core's source: what is under `root`, without the search and command line."""
    digest = hashlib.blake2b(digest_size=8)
    files = [path for path in root.glob("*.py") if path.name != "cli.py"]
    for path in sorted([*files, *(root / "downstream").glob("**/*.py")]):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(source)}\n".encode())
        digest.update(source)
    return digest.hexdigest()


def _growing(config: Config, stage: int) -> list[int]:
    """Stages up to this one that have epochs and may grow, in order."""
    lengths = stage_lengths(config.stages)
    if not METHODS[config.method].grows or config.clusters.counts is not None:
        return []
    return [s for s in STAGES[:stage] if lengths[s - 1] and s in config.growth.stages]


def _fields(tree: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every field in a dumped configuration; all of its mappings are sections."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{before}{name}.")
        else:
            yield before + name, value
