"""What trials have in common and is trained once: which stages, which variants, what that spares."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from test_space import SHIPPED, draw

from hpcl.prefix import prefix_content
from hpcl.search import space as spaces
from hpcl.search.prefixes import MOST_PREFIXES, PrefixPlan, acting_stages, plan_prefixes
from hpcl.stages import make_plan
from hpcl.yamlio import read_tree


def space_of(fields: str, base: str = "{preset: embedded}", search: str = "{grace: 2}") -> spaces.Space:
    """Embedded stages: 3, 1, 6, 1 and 9 epochs."""
    lines = "".join(f"  {line}\n" for line in fields.splitlines())
    return spaces.from_tree(read_tree(f"base: {base}\nspace:\n{lines}search: {search}\n", "s.yaml"))


def shared(fields: str, base: str = "{preset: embedded}", search: str = "{grace: 2}") -> PrefixPlan:
    plan = plan_prefixes(space_of(fields, base, search))
    assert plan is not None
    return plan


LATE = "growth.theta_start: {float: [0.0, 0.5]}\n"
"""Acts from stage 3 on, with any value."""


def test_two_choices_in_stage_2_make_one_prefix_of_stage_1_and_two_of_stage_2() -> None:
    plan = shared(LATE + "growth.window: {int: [1, 3]}\nstages.stage2.lr: {choice: [0.03, 0.06]}")
    one, slow, fast = plan.nodes
    assert [(n.stage, n.first_epoch, n.last_epoch, n.parent) for n in plan.nodes] == [
        (1, 1, 3, None),
        (2, 4, 4, one),
        (2, 4, 4, one),
    ]
    assert (one.values, slow.values, fast.values) == ({}, {"stages.stage2.lr": 0.03}, {"stages.stage2.lr": 0.06})
    assert fast.config.stages.stage2.lr == 0.06
    assert (plan.stage, plan.fork_time) == (2, 4.0)
    for rate, node in ((0.03, slow), (0.06, fast)):
        values = {"stages.stage2.lr": rate, "growth.window": 2, "growth.theta_start": 0.123}
        assert plan.node_for(values) is node
        assert plan.fork_epoch(values) == 4
    assert plan.work() == 3 + 1 + 1
    assert plan.saved(16) == 16 * 4 - 5
    assert plan.saved(16, (10.0, 1.0, 1.0, 1.0, 1.0)) == 16 * 31 - 32
    assert pickle.loads(pickle.dumps(plan)).node_for(values) == fast


@pytest.mark.parametrize(
    ("fields", "stage", "nodes"),
    [
        ("stages.stage5.lr: {float: [0.01, 0.1]}", 4, 4),
        ("stages.stage4.lr: {float: [0.01, 0.1]}", 3, 3),
        (LATE, 2, 2),
        ("clusters.multiplier: {float: [1.2, 3.0]}", 1, 1),
        ("moco.temperature: {float: [0.1, 0.2]}", 0, 0),
        # A few values each: as deep as the fields with many values allow.
        (LATE + "topk.k: {int: [1, 4]}", 2, 1 + 4),
        (LATE + "prototypes.weight: {float: [0.5, 1.0], step: 0.25}", 2, 1 + 3),
        (LATE + "moco.temperature: {choice: [0.1, 0.2]}", 2, 2 + 2),
        ("stages.stage5.lr: {float: [0.01, 0.1]}\nstages.stage2.lr: {choice: [0.03, 0.06]}", 4, 1 + 2 + 2 + 2),
        # Values that come to the same are one prefix.
        (LATE + "growth.stages: {choice: [[3], [3, 5]]}", 2, 2),
        (LATE + "topk.mode: {choice: [none, add]}\ntopk.k: {int: [1, 3], when: {topk.mode: add}}", 2, 1 + 1 + 3),
        # Too many: 9 of 16 trials' prefixes; 17 values; a number between two ends.
        (LATE + "topk.k: {int: [1, 9]}", 1, 1),
        (LATE + "clusters.first: {int: [2, 18]}", 1, 1),
        (LATE + "stages.stage2.lr: {float: [0.01, 0.1]}", 1, 1),
        # A condition on a field with many values.
        (LATE + "topk.margin: {float: [0.5, 1.0]}\ntopk.k: {int: [1, 2], when: {topk.margin: 1.0}}", 1, 1),
    ],
)
def test_the_deepest_stages_with_few_variants_are_shared(fields: str, stage: int, nodes: int) -> None:
    plan = plan_prefixes(space_of(fields))
    if not stage:
        assert plan is None
        return
    assert plan is not None
    assert (plan.stage, len(plan.nodes)) == (stage, nodes)


def test_as_many_variants_as_half_the_trials_and_never_more_than_16() -> None:
    space = space_of(LATE + "topk.k: {int: [1, 16]}")
    for trials, stage in ((31, 1), (32, 2), (2, 1)):
        plan = plan_prefixes(space, trials)
        assert plan is not None and plan.stage == stage
    assert plan_prefixes(space, 1) is None
    more = space_of(LATE + "topk.k: {int: [1, 17]}")
    plan = plan_prefixes(more, 1000)
    assert plan is not None and plan.stage == 1 and MOST_PREFIXES == 16
    # 400 combinations of 4 fields are not tried, however few prefixes they would make.
    many = "".join(f"topk.{name}: {{float: [0.5, 0.8], step: 0.1}}\n" for name in ("margin", "far_weight"))
    many += "topk.k: {int: [1, 5]}\nclusters.levels: {int: [1, 5]}\n"
    assert shared(LATE + many).stage == 1


def test_stages_without_epochs_make_no_prefix_of_their_own() -> None:
    stages = "{{preset: mini_imagenet, stages: {{stage2: {{epochs: {}}}}}}}"
    plan = shared(LATE, stages.format(0))
    assert [(n.stage, n.first_epoch, n.last_epoch) for n in plan.nodes] == [(1, 1, 20)]
    assert plan.fork_time == 20
    # With and without stage 2: those without fork from stage 1, the rungs count from the later fork.
    plan = shared(LATE + "stages.stage2.epochs: {choice: [0, 10]}", stages.format(5))
    one, two = plan.nodes
    assert (one.stage, two.stage, two.first_epoch, two.last_epoch) == (1, 2, 21, 30)
    assert [node for node, _ in plan.forks] == [one, two]
    assert plan.node_for({"stages.stage2.epochs": 0, "growth.theta_start": 0.2}) is one
    assert plan.fork_epoch({"stages.stage2.epochs": 10, "growth.theta_start": 0.2}) == 30
    assert plan.fork_time == 25  # on the base's schedule
    assert plan.saved(10) == 10 * 25 - 30


def test_something_is_left_to_every_trial() -> None:
    # Every value acts in stage 2 at the latest, and stage 5 may have no epochs: stage 4 always has one.
    base = "{preset: embedded, growth: {stages: []}, stages: {total: null}}"
    plan = shared("stages.stage5.epochs: {int: [0, 40]}", base)
    assert plan.stage == 3
    # Only stage 3 trains after stage 2, and it may be left out: the end of stage 2 may be the end.
    base = "{preset: embedded, growth: {stages: []}, stages: {total: null, stage4: {epochs: 0}, stage5: {epochs: 0}}}"
    assert shared("stages.stage3.epochs: {int: [0, 40]}", base).stage == 1
    assert shared("stages.stage3.epochs: {int: [1, 40]}", base).stage == 2


def test_sharing_leaves_room_for_a_rung() -> None:
    fields = "stages.stage5.lr: {float: [0.01, 0.1]}"
    assert shared(fields, search="{grace: 8}").stage == 4  # fork at 11, rung at 19
    assert shared(fields, search="{grace: 9}").stage == 3
    assert shared(fields, search="{grace: null}").stage == 4
    assert shared(fields, search="{grace: 4, brackets: 2}").stage == 4
    assert shared(fields, search="{grace: 5, brackets: 2}").stage == 2  # second bracket: fork at 4, rung at 14
    assert plan_prefixes(space_of(fields, search="{grace: 18}")) is None
    assert plan_prefixes(space_of(fields, search="{share_prefix: false}")) is None


def test_with_the_clock_epoch_rungs_count_from_the_last_fork() -> None:
    fields = LATE + "stages.stage1.epochs: {choice: [20, 50]}"
    base = "{preset: embedded}"  # 20 epochs in all: 3 or 5 and more of stage 1
    by_stage, by_epoch = (shared(fields, base, f"{{grace: 2, clock: {clock}}}") for clock in ("stage", "epoch"))
    ends = sorted(node.last_epoch for node, _ in by_stage.forks)
    assert ends[0] == 4 < ends[1] and by_stage.fork_time == 4
    assert by_epoch.fork_time == ends[1]


def test_a_field_acts_where_any_of_its_trials_lets_it() -> None:
    space = space_of("growth.window: {int: [1, 3]}\ngrowth.stages: {choice: [[3], [2, 3], [5]]}")
    assert acting_stages(space) == {"growth.window": 2, "growth.stages": 2}
    assert acting_stages(space_of(LATE)) == {"growth.theta_start": 3}
    # Only together do the two let it act before stage 5.
    both = "growth.stages: {choice: [[5], [3, 5]]}\nstages.stage3.epochs: {choice: [0, 9]}\n"
    base = "{preset: embedded, growth: {stages: [5]}, stages: {stage3: {epochs: 0}}}"
    assert acting_stages(space_of(both + "growth.window: {int: [1, 3]}", base))["growth.window"] == 3
    lengths = space_of("stages.stage5.epochs: {int: [1, 9]}")
    assert acting_stages(lengths) == {"stages.stage5.epochs": 1}  # under a fixed total it scales the others


def test_a_searched_method_acts_from_the_start_and_fields_as_early_as_in_any() -> None:
    fields = "clusters.first: {int: [2, 9], when: {method: hpcl}}\nhead.hidden: {int: [8, 16]}\n"
    assert acting_stages(space_of(fields + "method: {choice: [hpcl, moco]}")) == {
        "method": 1, "clusters.first": 2, "head.hidden": 1
    }  # fmt: skip
    assert plan_prefixes(space_of(fields + "method: {choice: [hpcl, moco]}")) is None
    assert acting_stages(space_of(fields.split("\n")[1])) == {"head.hidden": 2}


def test_slots_stand_empty_until_the_first_fork() -> None:
    plan = shared(LATE + "stages.stage2.lr: {choice: [0.03, 0.06]}")
    # c slots: c - 1 wait 3 epochs for stage 1; then c - 2 wait one epoch for two prefixes of stage 2.
    assert [plan.idle(slots) for slots in (1, 2, 3, 8)] == [0, 3, 7, 27]
    assert plan.idle(2, (2.0, 1.0, 1.0, 1.0, 1.0)) == 6
    chain = shared(LATE)
    assert [chain.idle(slots) for slots in (1, 2, 8)] == [0, 4, 28]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_trial_of_a_shipped_space_finds_its_prefix(file: Path) -> None:
    space = spaces.load(file)
    plan = plan_prefixes(space)
    assert (plan is not None) == (file.stem in ("clusters", "smoke", "pcl", "hcsc"))
    if plan is not None:
        check_draws(space, plan)


def test_every_trial_of_a_tree_finds_its_prefix() -> None:
    space = space_of(
        LATE
        + "stages.stage2.lr: {float: [0.1, 0.4], step: 0.1}\n"
        + "topk.mode: {choice: [none, add]}\nclusters.warm: {choice: [true, false], when: {topk.mode: add}}\n",
        search="{grace: 2, trials: 32}",
    )
    plan = plan_prefixes(space)
    assert plan is not None and len(plan.forks) == 12
    check_draws(space, plan)
    # A value that no prefix was planned for: as deep as one is known.
    assert plan.node_for({"stages.stage2.lr": 0.15, "topk.mode": "none", "growth.theta_start": 0.1}) is plan.nodes[0]


def check_draws(space: spaces.Space, plan: PrefixPlan) -> None:
    rng = random.Random(0)
    for _ in range(30):
        values = draw_near(space, rng)
        node = plan.node_for(values)
        assert node is not None
        config = space.config_for(values)
        assert prefix_content(node.config, node.stage) == prefix_content(config, node.stage)
        assert any(stage.last_epoch == node.last_epoch for stage in make_plan(config))
        assert all(values[path] == value for path, value in node.values.items())


def draw_near(space: spaces.Space, rng: random.Random) -> dict[str, Any]:
    """A random point, on the steps where there are some."""
    return {path: space.params[path].nearest(value) for path, value in draw(space, rng).items()}
