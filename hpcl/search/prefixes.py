"""What the trials of a search have in common at their start, and is therefore trained once.

A field acts from some stage on. Where every searched field acts from stage 3 on, all
trials are the same run up to the end of stage 2: that prefix is trained once, and each
trial forks from its checkpoint. Fields with few values may act earlier; the prefixes
then form a tree, here for two choices of ``stages.stage2.lr``:

    stage 1 ─┬─ stage 2 with lr 0.03 ─── trials that drew 0.03
             └─ stage 2 with lr 0.06 ─── trials that drew 0.06

Two trials share a prefix exactly where :func:`hpcl.prefix.prefix_content` is the same
for both. A trial of which no prefix is known trains everything by itself, as without
sharing. Nothing here trains or reads a file.
"""

from __future__ import annotations

import heapq
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hpcl.config import Config
from hpcl.prefix import acts_from, prefix_content
from hpcl.search.clock import StageClock, rung_times
from hpcl.search.params import Choice, Float, Param
from hpcl.sections import STAGES
from hpcl.stages import stage_lengths

if TYPE_CHECKING:
    from hpcl.search.space import Space

EPOCHS = (1.0, 1.0, 1.0, 1.0, 1.0)
"""Time of an epoch of each stage that makes times into epochs."""

MOST_PREFIXES = 16
"""Forks of a tree at most; also at most half as many as trials, so that sharing saves something."""

MOST_COMBINATIONS = 256
"""Combinations of values that are looked through for equal prefixes; with more, less is shared."""


@dataclass(frozen=True)
class PrefixNode:
    """A stage that several trials have in common, after the stages of its parent."""

    stage: int
    """Its stage, 1 to 4."""
    values: dict[str, Any]
    """Sampled values that act in it or before it, by config path."""
    config: Config
    """A configuration with these values; what acts later is the base's, and is not trained here."""
    parent: PrefixNode | None
    """The prefix whose checkpoint it starts from; None: from scratch."""
    first_epoch: int
    """Its first own epoch, counted from 1 over the whole run."""
    last_epoch: int
    """Its last epoch, inclusive; there its children and trials fork."""
    content: str
    """What determines it, as JSON; equal for equal prefixes."""

    @property
    def epochs(self) -> int:
        """Epochs that it trains itself, at least 1."""
        return self.last_epoch - self.first_epoch + 1

    def work(self, per_epoch: Sequence[float]) -> float:
        """Time of its own epochs, with this time for an epoch of each of the five stages."""
        return self.epochs * per_epoch[self.stage - 1]

    def work_from_scratch(self, per_epoch: Sequence[float]) -> float:
        """Time of all epochs up to its last."""
        return self.work(per_epoch) + (self.parent.work_from_scratch(per_epoch) if self.parent else 0.0)


@dataclass(frozen=True)
class PrefixPlan:
    """The prefixes of a search."""

    nodes: tuple[PrefixNode, ...]
    """All of them, a parent before its children."""
    forks: tuple[tuple[PrefixNode, float], ...]
    """Those that trials fork from, with the part of the combinations of values that does."""
    fork_time: float
    """Where the trials fork on the clock of the rungs: epochs of the base's schedule."""
    space: Space = field(compare=False, repr=False)

    @property
    def stage(self) -> int:
        """The deepest shared stage, 1 to 4."""
        return max(node.stage for node, _ in self.forks)

    def node_for(self, values: Mapping[str, Any]) -> PrefixNode | None:
        """The deepest known prefix of a trial with these sampled values; None: it trains everything itself."""
        try:
            contents = _contents(self.space.config_for(values), self.stage)
        except ValidationError:
            return None
        known = {node.content: node for node in self.nodes}
        return next((known[text] for *_, text in reversed(contents) if text in known), None)

    def fork_epoch(self, values: Mapping[str, Any]) -> int:
        """Epochs of a trial with these sampled values that its prefix has trained; 0 without one."""
        node = self.node_for(values)
        return node.last_epoch if node else 0

    def work(self, per_epoch: Sequence[float] = EPOCHS) -> float:
        """Time of all prefixes, with this time for an epoch of each of the five stages; else epochs."""
        return sum(node.work(per_epoch) for node in self.nodes)

    def saved(self, trials: int, per_epoch: Sequence[float] = EPOCHS) -> float:
        """Time (else epochs) of training that sharing spares, if each of the prefixes is drawn by some trial."""
        each = sum(share * node.work_from_scratch(per_epoch) for node, share in self.forks)
        return trials * each - self.work(per_epoch)

    def idle(self, at_a_time: int, per_epoch: Sequence[float] = EPOCHS) -> float:
        """Time (else epochs) that slots for trials stand empty, summed, until the first trials can fork.

        Prefixes run one after another and trials wait for them: with c slots the wall time
        is (time trained + idle) / c, so sharing saves less of it than of the work.
        """
        trunks = {node.content for node, _ in self.forks}
        ready = [node for node in self.nodes if node.parent is None]
        running: list[tuple[float, int, PrefixNode]] = []
        order = itertools.count()
        now = idle = 0.0
        while True:
            while ready and len(running) < at_a_time:
                node = ready.pop(0)
                heapq.heappush(running, (now + node.work(per_epoch), next(order), node))
            end, _, node = heapq.heappop(running)
            idle += (at_a_time - 1 - len(running)) * (end - now)
            now = end
            if node.content in trunks:
                return idle
            ready += [child for child in self.nodes if child.parent == node]


def plan_prefixes(space: Space, trials: int | None = None) -> PrefixPlan | None:
    """The deepest tree of shared prefixes that is worth it; None where nothing is shared.

    Trials share stages 1 to s, s at most 4, if the searched fields that act there have
    few combinations: at most :data:`MOST_PREFIXES` different prefixes, at least two trials
    for each, and after them at least one epoch in every trial and room for every bracket's
    first rung.

    Args:
        space: a valid space.
        trials: trials of the search; None: ``space.search.trials``.
    """
    if not space.search.share_prefix:
        return None
    most = min(MOST_PREFIXES, (space.search.trials if trials is None else trials) // 2)
    first = acting_stages(space)
    for stage in reversed(STAGES[:-1]):
        if _always_more(space, stage) and (plan := _tree(space, stage, first, most)) and _leaves_rungs(plan):
            return plan
    return None


def acting_stages(space: Space) -> dict[str, int]:
    """The first stage, 1 to 5, in which each searched field acts in some trial."""
    # It depends on the stages that grow and have epochs: the more there are, the earlier a field may act.
    lengths = {path: param for path, param in space.params.items() if re.fullmatch(r"stages\.stage\d\.epochs", path)}
    growing = space.params.get("growth.stages")
    points = [{path: value} for path, param in lengths.items() for value in param.ends()]
    for stages in growing.ends() if growing else [space.base.growth.stages]:
        points += [{"growth.stages": stages}, {"growth.stages": stages, **{p: max(lengths[p].ends()) for p in lengths}}]
    methods = space.params.get("method")
    if methods:  # and on the method, which decides what is read
        points = [{**point, "method": name} for point in [{}, *points] for name in methods.ends()]
    configs = [space.base]
    for point in points:
        try:
            configs.append(space.config_for(point))
        except ValidationError:  # allowed only beside another field's value
            continue
    return {path: min(acts_from(path, config) for config in configs) for path in space.params}


def _leaves_rungs(plan: PrefixPlan) -> bool:
    """Whether sharing leaves a rung to every bracket, so that it takes nothing from early stopping."""
    search, total = plan.space.search, plan.space.epochs
    if search.grace is None:
        return True
    return bool(rung_times(search.grace, search.factor, total, fork=plan.fork_time, bracket=search.brackets - 1))


def _always_more(space: Space, stage: int) -> bool:
    """Whether every trial trains at least one epoch after this stage."""
    for later in STAGES[stage:]:
        path = f"stages.stage{later}.epochs"
        param, base = space.params.get(path), space.base.at(path)
        lengths = [base] if param is None else [*param.ends(), *([base] if param.when else [])]
        if min(lengths) >= 1:
            return True
    return False


def _tree(space: Space, stage: int, first: Mapping[str, int], most: int) -> PrefixPlan | None:
    """The prefixes of stages 1 to `stage`; None where there are none, or more than `most` forks."""
    acting = {path for path in space.params if first[path] <= stage}
    nodes: dict[str, PrefixNode] = {}
    forks: Counter[str] = Counter()
    for values in _combinations(space, acting):
        if values is None:
            return None
        try:
            config = space.config_for(values)
        except ValidationError:  # three fields that do not go together: a trial that draws them fails
            continue
        parent = None
        for s, start, end, content in _contents(config, stage):
            if content not in nodes:
                own = {path: value for path, value in values.items() if first[path] <= s}
                nodes[content] = PrefixNode(s, own, config, parent, start, end, content)
            parent = nodes[content]
        if parent is not None:
            forks[parent.content] += 1
        if len(forks) > most:
            return None
    if not forks:
        return None
    clock = StageClock(space.base, space.search.clock)
    times = [clock.time(stage_lengths(nodes[text].config.stages), nodes[text].last_epoch) for text in forks]
    shares = tuple((nodes[text], count / forks.total()) for text, count in forks.items())
    return PrefixPlan(tuple(nodes.values()), shares, max(times), space)


def _contents(config: Config, stage: int) -> list[tuple[int, int, int, str]]:
    """(stage, first epoch, last epoch, content) of the prefixes up to `stage`; a stage of 0 epochs has none."""
    found, done = [], 0
    for s, epochs in zip(STAGES[:stage], stage_lengths(config.stages), strict=False):
        if epochs:
            content = json.dumps(prefix_content(config, s), sort_keys=True)
            found.append((s, done + 1, done + epochs, content))
            done += epochs
    return found


def _combinations(space: Space, acting: set[str]) -> Iterator[dict[str, Any] | None]:
    """All values that these fields can have together; None where they are too many to try."""
    needed = set(acting)
    for path in reversed(space.params):  # a field stands after those that its `when` names
        if path in needed:
            needed.update(parent for parent in space.params[path].when if parent in space.params)
    grids = {path: _few_values(param) for path, param in space.params.items() if path in needed}

    def put(paths: tuple[str, ...], values: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
        if not paths:
            yield values
        elif not space.is_active(paths[0], values):
            yield from put(paths[1:], values)
        else:
            for value in grids[paths[0]] or [None]:
                yield from put(paths[1:], {**values, paths[0]: value})

    if not all(grids.values()):
        yield None
        return
    for number, values in enumerate(put(tuple(grids), {})):
        if number >= MOST_COMBINATIONS:
            yield None
            return
        yield values


def _few_values(param: Param) -> list[Any]:
    """All values of a field, where they can be counted and are few; else nothing."""
    if isinstance(param, Choice):
        return list(param.choices)
    if isinstance(param, Float) and param.step is None:
        return []
    values = param.grid(MOST_PREFIXES)
    assert param.step is not None
    return list(values) if len(values) == round((param.high - param.low) / param.step) + 1 else []
