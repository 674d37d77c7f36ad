"""The space file: grammar, checks against the configuration, overrides, the shipped files."""

from __future__ import annotations

import itertools
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hpcl import presets
from hpcl.config import Config
from hpcl.data_rules import data_problems
from hpcl.errors import ConfigError
from hpcl.methods import METHODS
from hpcl.search import space as spaces
from hpcl.search.check import space_problems
from hpcl.search.params import CURVES, Choice, Float, Int, Resources, Search, better_end, same
from hpcl.search.prefixes import plan_prefixes
from hpcl.stages import stage_lengths
from hpcl.yamlio import dump, read_tree, write

SHIPPED = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))
METHOD_SPACE = next(file for file in SHIPPED if file.stem == "methods")
CLUSTERS = next(file for file in SHIPPED if file.stem == "clusters")


def read(fields: str, base: str = "{preset: embedded}", rest: str = "") -> spaces.Space:
    """A space with these lines under `space:`; its fields begin in line 3."""
    lines = "".join(f"  {line}\n" for line in fields.splitlines())
    return spaces.from_tree(read_tree(f"base: {base}\nspace:\n{lines}{rest}", "s.yaml"))


def problems_of(fields: str, base: str = "{preset: embedded}", rest: str = "") -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read(fields, base, rest)
    return caught.value.problems


def draw(space: spaces.Space, rng: random.Random) -> dict[str, Any]:
    """One random point, drawn as a sampler does: parents first, inactive fields left out."""
    values: dict[str, Any] = {}
    for path, param in space.params.items():
        if not space.is_active(path, values):
            continue
        if isinstance(param, Choice):
            values[path] = rng.choice(param.choices)
        elif isinstance(param, Int):
            values[path] = rng.choice(range(param.low, param.high + 1, param.step))
        else:
            values[path] = rng.uniform(param.low, param.high)
    return values


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_spaces_are_valid_everywhere(file: Path) -> None:
    space = spaces.load(file)
    images = int(4000 * space.base.data.subset)
    rng = random.Random(0)
    for _ in range(50):
        config = space.config_for(draw(space, rng))
        assert data_problems(config, images, space.resources.workers) == []
        assert sum(stage_lengths(config.stages)) == space.epochs
    assert space.name == file.stem
    assert space.search.metric == "acc_proto_ref"
    assert space.search.objective == "auto"
    # Trial 0 is the base itself, and ASHA does not judge before the clusters act.
    assert space.default_notes() == []
    assert space.config_for(space.default_point()) == space.base
    shared = plan_prefixes(space)
    first_rung = (shared.fork_time if shared else 0) + (space.search.grace or 0)
    assert stage_lengths(space.base.stages)[0] < first_rung < space.epochs
    again = spaces.from_tree(read_tree(dump(space.to_tree())))
    assert again == space
    assert list(again.params) == list(space.params)


def test_shipped_spaces_search_what_they_promise() -> None:
    params = {file.stem: set(spaces.load(file).params) for file in SHIPPED}
    assert set(params) == {"clusters", "stages", "losses", "full", "smoke", "methods", *METHODS} - {"hpcl"}
    assert spaces.load(METHOD_SPACE).params["method"] == Choice(choices=("hpcl", "moco", "pcl", "hcsc", "simclr"))
    for name in set(METHODS) - {"hpcl"}:
        assert spaces.load(METHOD_SPACE.with_stem(name)).base.method == name
    clusters = {"multiplier", "first", "levels", "size_tolerance"}
    assert {f"clusters.{name}" for name in clusters} | {"growth.window", "growth.theta_proto"} <= params["clusters"]
    assert params["stages"] == {f"stages.stage{s}.{name}" for s in range(1, 6) for name in ("epochs", "lr")}
    wanted = {"topk.k", "topk.far_weight", "topk.margin", "moco.temperature", "prototypes.targets"}
    assert wanted <= params["losses"]
    assert params["full"] == params["clusters"] | params["stages"] | params["losses"]
    assert spaces.load(CLUSTERS).search.trials >= 16


def test_the_grammar() -> None:
    space = read(
        "topk.k: {int: [1, 5], step: 2, when: {topk.mode: [replace, add]}}\n"
        "topk.mode: {choice: [replace, add, none]}\n"
        "moco.temperature: {float: [5e-2, 0.5], log: true}\n"
        "growth.stages: {choice: [[3], [3, 5]]}\n"
        "augment.crop_scale: {choice: [[0.3, 1], [0.5, 1.0]]}\n"
        "topk.max_clusters: {choice: [null, 64]}\n"
        "clusters.warm: {choice: [true, false]}\n",
        rest="name: mine\nsearch: {trials: 3, metric: nce_ref, grace: 4}\nresources: {gpus_per_worker: 0.25}\n",
    )
    assert list(space.params)[:2] == ["topk.mode", "topk.k"]  # parents first
    assert space.params["topk.k"] == Int(low=1, high=5, step=2, when={"topk.mode": ("replace", "add")})
    assert space.params["moco.temperature"] == Float(low=0.05, high=0.5, log=True)
    assert space.params["growth.stages"] == Choice(choices=((3,), (3, 5)))
    crops = space.params["augment.crop_scale"]
    assert isinstance(crops, Choice)
    assert crops.choices == ((0.3, 1.0), (0.5, 1.0))
    assert all(isinstance(end, float) for end in crops.choices[0])  # as the configuration keeps them
    assert (space.name, space.search.trials, space.search.mode) == ("mine", 3, "min")
    assert space.resources == Resources(gpus_per_worker=0.25)
    assert space.base == presets.config("embedded")
    assert pickle.loads(pickle.dumps(space)) == space
    assert spaces.from_tree(read_tree(dump(space.to_tree()))) == space


def test_a_field_with_a_failing_condition_keeps_the_base_value() -> None:
    space = read(
        "topk.mode: {choice: [none, replace]}\n"
        "topk.k: {int: [1, 5], when: {topk.mode: replace}}\n"
        "topk.margin: {float: [0.5, 2.0], when: {topk.k: [4, 5]}}\n"
    )
    assert not space.is_active("topk.k", {"topk.mode": "none"})
    assert space.is_active("topk.k", {"topk.mode": "replace"})
    # topk.k is not drawn: it has the base's 3, which is not one of 4 and 5.
    assert not space.is_active("topk.margin", {"topk.mode": "none"})
    assert space.config_for({"topk.mode": "none"}).topk.k == 3
    assert space.default_point() == {"topk.mode": "replace", "topk.k": 3}
    off = read(
        "topk.mode: {choice: [none, replace]}\ntopk.k: {int: [1, 5], when: {topk.mode: replace}}\n",
        base="{preset: embedded, topk: {mode: none}}",
    )
    assert off.default_point() == {"topk.mode": "none"}


def test_trial_0_takes_the_nearest_end_and_says_so() -> None:
    space = read(
        "clusters.multiplier: {float: [2.0, 3.0]}\n"
        "clusters.first: {int: [10, 40], step: 10}\n"
        "growth.max_hold: {int: [4, 9]}\n"
        "clusters.levels: {choice: [1, 2]}\n"
        "head.kind: {choice: [v1, linear]}\n"
    )
    assert space.default_point() == {
        "clusters.multiplier": 2.0,
        "clusters.first": 10,
        "growth.max_hold": 9,  # null in the base: no limit is nearest to the high end
        "clusters.levels": 2,
        "head.kind": "v1",
    }
    assert space.default_notes()[0] == ("clusters.multiplier", 1.7, 2.0)
    assert len(space.default_notes()) == 5


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("clusters.multipler: {float: [1, 2]}", "3:3: clusters.multipler: there is no such field; did you mean"),
        ("topk: {choice: [1, 2]}", "3:3: topk is a section, but must be one of its fields"),
        ("clusters.multiplier: {float: [0.5, 2]}", "3:33: clusters.multiplier is 0.5, but must be > 1.0 (low end"),
        ("clusters.multiplier: {float: [1.5, 20]}", "3:38: clusters.multiplier is 20.0, but must be <= 10.0 (high end"),
        ("clusters.first: {int: [0, 4]}", "3:26: clusters.first is 0, but must be >= 1 (low end"),
        (
            "head.kind: {choice: [v1, v3]}",
            "3:28: head.kind is v3, but must be one of v1, v2, linear, none, simclr2, multi (choice 2",
        ),
        ("clusters.warm: {choice: [true, 1]}", "3:34: clusters.warm is 1, but must be true or false (choice 2"),
        ("growth.stages: {choice: [[3], [1]]}", "3:33: growth.stages has [1], but clusters exist only in"),
        ("augment.flip: {int: [0, 2]}", "3:27: augment.flip is 2, but must be <= 1.0 (high end"),
        ("moco.queue: {int: [128, 256]}", "3:22: moco.queue is 129, but must be a multiple of optimizer.batch (128)"),
        ("moco.queue: {int: [128, 300000]}", "3:27: moco.queue is 300000, but must be a multiple"),
        ("head.kind: {choice: [v2, none]}", "3:28: stages.stage2.epochs is 5, but must be 0 with head.kind none"),
        ("seed: {int: [0, 3]}", "3:3: seed cannot be searched: all trials use the same seed"),
        ("data.split_seed: {int: [0, 3]}", "3:3: data.split_seed cannot be searched"),
        ("meters.augment.flip: {float: [0, 1]}", "3:3: meters.augment.flip cannot be searched: the meters must"),
        ("meters.views: {int: [10, 20]}", "3:3: meters.views cannot be searched"),
        ("meters.reference_clusters: {int: [10, 20]}", "3:3: meters.reference_clusters cannot be searched"),
        ("stages.total: {int: [10, 20]}", "3:3: stages.total cannot be searched"),
        ("topk.k: 3", "3:11: topk.k must have exactly one of float, int and choice"),
        ("topk.k: {float: [1, 2], int: [1, 2]}", "3:11: topk.k must have exactly one of float, int and choice"),
        ("topk.k: {int: [1, 2, 3]}", "3:17: topk.k: int must be [low, high]"),
        ("topk.k: {int: [1, 2.5]}", "3:21: topk.k: high is 2.5, but must be a whole number"),
        ("topk.k: {int: [1, 3], lgo: true}", "3:25: topk.k: lgo does not belong to int; did you mean log?"),
        ("topk.mode: {choice: [add, none], log: true}", "3:36: topk.mode: log does not belong to choice"),
        ("topk.margin: {float: [2, 1]}", "3:28: topk.margin: high is 1, but must be > the low end (2)"),
        ("topk.far_weight: {float: [0, 1], log: true}", "3:29: topk.far_weight: low is 0, but must be > 0 with log"),
        ("clusters.first: {int: [0, 1], log: true}", "3:26: clusters.first: low is 0, but must be >= 1 with log"),
        ("topk.k: {int: [1, 4], step: 2}", "3:21: topk.k: high is 4, but must be a whole number of steps above low"),
        ("topk.margin: {float: [1, 2], step: 0.1, log: true}", "3:38: topk.margin: step cannot stand beside log"),
        ("topk.mode: {choice: [add]}", "3:23: topk.mode: choices has 1 value(s), but must have at least 2"),
        ("topk.mode: {choice: [add, add]}", "3:23: topk.mode: choices has add twice"),
        ("topk.k: {int: [1, 3], when: {topk.mod: add}}", "3:32: when: topk.mod: there is no such field; did you mean"),
        ("topk.k: {int: [1, 3], when: {topk.mode: none}}", "3:32: topk.k would never be sampled: topk.mode is replace"),
        ("topk.k: {int: [1, 3], when: {topk.k: 1}}", "3:25: topk.k depends on itself"),
        ("topk.k: {int: [1, 3], when: [topk.mode]}", "3:31: topk.k: when must be a mapping"),
    ],
)
def test_a_wrong_field_is_refused_with_its_place(field: str, expected: str) -> None:
    found = problems_of(field)
    assert any(problem.startswith(f"s.yaml:{expected}") for problem in found), found


def test_a_float_on_a_whole_number_says_what_to_write() -> None:
    assert "write int: [low, high]" in problems_of("clusters.levels: {float: [1, 4]}")[0]


def test_a_field_searched_twice_is_refused() -> None:
    assert problems_of("topk.k: {int: [1, 3]}\ntopk.k: {int: [1, 4]}") == (
        "s.yaml:4:3: the key topk.k stands here a second time (first in line 3); remove one",
    )


def test_conditions_are_checked_against_what_the_parent_can_be() -> None:
    mode = "topk.mode: {choice: [replace, none]}\n"
    found = problems_of(mode + "topk.k: {int: [1, 3], when: {topk.mode: [replace, add]}}")
    assert found == ("s.yaml:4:32: when: topk.mode is never add, but one of replace, none",)
    found = problems_of("clusters.levels: {int: [1, 3]}\ntopk.k: {int: [1, 3], when: {clusters.levels: 4}}")
    assert found == ("s.yaml:4:32: when: clusters.levels is never 4, but between 1 and 3",)
    loop = "topk.k: {int: [1, 3], when: {topk.mode: add}}\ntopk.mode: {choice: [add, none], when: {topk.k: 1}}"
    assert "depends on itself" in problems_of(loop)[0]


def test_two_values_that_may_meet_are_checked_together() -> None:
    found = problems_of("moco.queue: {choice: [1024, 640]}\noptimizer.batch: {choice: [128, 256]}")
    assert found == (
        "s.yaml:4:3: moco.queue is 640, but must be a multiple of optimizer.batch (256) "
        "(with moco.queue 640 and optimizer.batch 256, which may meet)",
    )
    # With a condition they never meet.
    read("moco.queue: {choice: [1024, 640], when: {optimizer.batch: 128}}\noptimizer.batch: {choice: [128, 256]}")
    # All five stages at 0 need more than two fields to meet.
    stages = "".join(f"stages.stage{s}.epochs: {{int: [0, 4]}}\n" for s in range(1, 6))
    found = problems_of(stages, base="{preset: embedded, stages: {total: 20}}")
    assert found == (
        "s.yaml:3:3: stages: all five have 0 epochs, but at least one must train "
        "(all low ends or first choices together)",
    )


def test_all_problems_of_all_parts_come_at_once_in_the_order_of_the_file() -> None:
    text = (
        "base: {preset: embeded}\n"
        "spce: 3\n"
        "space:\n"
        "  clusters.first: {int: [0, 4], lgo: true}\n"
        "  topk.k: {int: [3, 1]}\n"
        "search: {trials: 0, metric: acc_proto_rf, startup: 0, objective: accuracy}\n"
        "resources: {workers: 2, gpus_per_worker: 0.5}\n"
    )
    with pytest.raises(ConfigError) as caught:
        spaces.from_tree(read_tree(text, "s.yaml"))
    starts = [
        "s.yaml:1:16: there is no preset embeded; did you mean embedded?",
        "s.yaml:2:1: spce: there is no such part; did you mean space?",
        "s.yaml:4:26: clusters.first is 0",
        "s.yaml:4:33: clusters.first: lgo",
        "s.yaml:5:21: topk.k: high is 1",
        "s.yaml:6:18: search.trials is 0, but must be >= 1",
        "s.yaml:6:29: search.metric: acc_proto_rf is no curve; did you mean acc_proto_ref?",
        "s.yaml:6:52: search.startup is 0, but must be >= 1 or auto",
        "s.yaml:6:66: search.objective: accuracy is no curve",
        "s.yaml:7:42: resources.gpus_per_worker is 0.5, but must be a whole number with 2 workers",
    ]
    assert len(caught.value.problems) == len(starts)
    for problem, start in zip(caught.value.problems, starts, strict=True):
        assert problem.startswith(start)


def test_the_base(tmp_path: Path) -> None:
    assert read("topk.k: {int: [1, 3]}", base="{}", rest="search: {grace: 30}\n").base == Config()
    write(tmp_path / "mine.yaml", presets.config("embedded").with_values({"seed": 5}))
    file = tmp_path / "space.yaml"
    file.write_text("base: {config: mine.yaml, moco: {queue: 512}}\nspace:\n  topk.k: {int: [1, 3]}\n")
    base = spaces.load(file).base
    assert (base.seed, base.moco.queue, base.data.source) == (5, 512, "mnist5k")
    fields = "topk.k: {int: [1, 3]}"
    assert "names a preset and a config" in problems_of(fields, base="{preset: embedded, config: x.yaml}")[0]
    assert problems_of(fields, base="{config: none.yaml}")[0].startswith("s.yaml:1:16: none.yaml: there is no such")
    assert problems_of(fields, base="{preset: embedded, moco: {queue: 100}}")[0].startswith("s.yaml:1:40: moco.queue")
    assert problems_of(fields, base="{preset: embedded, modl: {}}")[0].startswith("s.yaml:1:26: modl: there is no")
    assert problems_of("", base="{}")[0].endswith("space must name at least one field to search")


def test_the_mode_follows_from_the_metric() -> None:
    for curve in CURVES:
        assert Search(metric=curve).mode == better_end(curve)
    assert [curve for curve in CURVES if better_end(curve) == "min"] == ["nce_ref", "loss", "loss_inst", "loss_proto"]
    assert {"acc_proto", "acc_proto_ref", "proto_bits", "inst_ref", "nce_ref", "acc_inst", "knn"} <= set(CURVES)
    assert Search(metric="loss", mode="min").mode == "min"
    with pytest.raises(ValidationError, match="mode is max, but must be min for nce_ref"):
        Search(metric="nce_ref", mode="max")


def test_the_search_is_checked_against_the_base() -> None:
    fields = "topk.k: {int: [1, 3]}"
    assert "must be below the 20 epochs" in problems_of(fields, rest="search: {grace: 20}")[0]
    assert read(fields, rest="search: {grace: null, brackets: 9}").search.grace is None
    assert read(fields, rest="search: {grace: 4, brackets: 3}").search.brackets == 3  # rungs at 4, 8 and 16
    (problem,) = problems_of(fields, rest="search: {grace: 4, brackets: 4}")
    assert "4:30: search.brackets is 4, but must be at most 3, the number of rungs" in problem
    never = "{preset: embedded, meters: {knn_every: 0}}"
    assert "knn_every is 0" in problems_of(fields, base=never, rest="search: {metric: knn}")[0]
    assert "number of workers (3)" in problems_of(fields, rest="resources: {workers: 3}")[0]
    batches = "optimizer.batch: {choice: [128, 64]}"
    assert "number of workers (128)" in " ".join(problems_of(batches, rest="resources: {workers: 128}"))
    for gpus in ("1.5", "0.001", "-1"):
        assert "resources.gpus_per_worker" in problems_of(fields, rest=f"resources: {{gpus_per_worker: {gpus}}}")[0]


def test_the_fields_of_the_search() -> None:
    search = Search()
    assert (search.clock, search.sampler, search.told) == ("stage", "tpe", "pruned")
    assert (search.share_prefix, search.min_peers, search.brackets) == (True, 1, 1)
    assert (search.max_hours, search.max_gpu_hours, search.max_epochs) == (None, None, None)
    assert Search(max_hours=0.5, max_epochs=3, retries=0, give_up_after=1).max_hours == 0.5
    for field, value in (
        ("clock", "time"), ("sampler", "grid"), ("told", "failed"), ("min_peers", 0), ("brackets", 0),
        ("max_hours", 0), ("max_gpu_hours", -1), ("max_epochs", 0), ("retries", -1), ("give_up_after", 0),
    ):  # fmt: skip
        (problem,) = problems_of("topk.k: {int: [1, 3]}", rest=f"search: {{{field}: {value}}}")
        assert problem.startswith(f"s.yaml:4:{12 + len(field)}: search.{field} is {value}, but must be ")


def test_set_changes_config_search_and_resources() -> None:
    space = spaces.load(CLUSTERS)
    changed = spaces.apply_overrides(
        space, ["moco.temperature=2e-1", "search.metric=nce_ref", "resources.cpus_per_worker=0.5", "search.grace=4"]
    )
    assert changed.base == space.base.with_values({"moco.temperature": 0.2})
    assert (changed.search.metric, changed.search.mode, changed.search.grace) == ("nce_ref", "min", 4)
    assert changed.resources.cpus_per_worker == 0.5
    assert changed.params == space.params
    assert spaces.apply_overrides(space, []) is space
    with pytest.raises(ConfigError) as caught:
        spaces.apply_overrides(space, ["clusters.levels=2", "moco.quue=3", "search.trials=0"])
    assert caught.value.problems[0].startswith(
        f"--set clusters.levels=2: clusters.levels is searched by this space ({CLUSTERS}:"
    )
    assert caught.value.problems[1:] == (
        "--set moco.quue=3: moco.quue: there is no such field; did you mean moco.queue?",
        "--set search.trials=0: search.trials is 0, but must be >= 1",
    )
    with pytest.raises(ConfigError, match=r"--set optimizer\.batch=100: moco\.queue is 1024, but must be a multiple"):
        spaces.apply_overrides(space, ["optimizer.batch=100"])
    with pytest.raises(ConfigError, match=r"search\.traisl: there is no such field"):
        spaces.apply_overrides(space, ["search.traisl=3"])
    with pytest.raises(ConfigError, match="--set search=3: search: there is no such field"):
        spaces.apply_overrides(space, ["search=3"])


def test_with_the_data_every_searched_value_is_checked_against_their_number() -> None:
    space = read("moco.queue: {choice: [1024, 2048]}\nclusters.first: {int: [2, 3000]}")
    assert space_problems(space, rules=True, images=4096) == []
    fits = "; 1024 is the largest that fits a batch of 128"
    assert space_problems(space, rules=True, images=2050) == [
        f"s.yaml:3:31: moco.queue is 2048, but may be at most half of the 2050 training images{fits} (choice 2 of "
        "moco.queue)",
        "s.yaml:4:29: clusters.first is 3000, but there are only 2050 training images (high end of clusters.first)",
    ]
    queue = read("topk.k: {int: [1, 3]}", base="{preset: embedded, moco: {queue: 2048}}")
    assert space_problems(queue, rules=True, images=2050) == [
        f"s.yaml:1:40: moco.queue is 2048, but may be at most half of the 2050 training images{fits}"
    ]


def test_a_change_of_the_base_is_checked_with_the_searched_fields() -> None:
    space = read("optimizer.batch: {choice: [128, 256]}")
    with pytest.raises(ConfigError, match=r"--set moco\.queue=640: s\.yaml:3:35: moco\.queue is 640"):
        spaces.apply_overrides(space, ["moco.queue=640"])


def test_lengths_without_a_fixed_total_need_the_clock_of_stages() -> None:
    fields, base = "stages.stage1.epochs: {int: [1, 2]}", "{preset: mini_imagenet}"
    (problem,) = problems_of(fields, base, rest="search: {clock: epoch}")
    assert "3:3: stages.stage1.epochs is searched, but stages.total is null and search.clock is epoch" in problem
    assert "set stages.total in base, or search.clock to stage" in problem
    assert sum(stage_lengths(read(fields, base).config_for({"stages.stage1.epochs": 2}).stages)) == 132
    read(fields, "{preset: mini_imagenet, stages: {total: 100}}", rest="search: {clock: epoch}")


def test_flags() -> None:
    space = spaces.load(CLUSTERS)
    assert spaces.with_overrides(space) is space
    changed = spaces.with_overrides(
        space, name="other", data="2024", trials=3, seed=9, workers=2, gpus_per_worker="1", epochs=40
    )
    assert changed.name == "other"
    assert changed.base.data.source == "2024"
    assert (changed.search.trials, changed.search.seed, changed.base.seed) == (3, 9, 9)
    assert (changed.resources.workers, changed.resources.gpus_per_worker) == (2, 1)
    assert (changed.epochs, changed.search.grace) == (40, 10)  # the first rung keeps its place in the schedule
    assert stage_lengths(changed.base.stages) == (6, 1, 13, 1, 19)
    for epochs, grace in ((5, 1), (10, 2), (7, 2)):
        assert spaces.with_overrides(space, epochs=epochs).search.grace == grace
    for flags, start in (
        ({"trials": 0}, "--trials 0: search.trials is 0, but must be >= 1"),
        ({"epochs": 3}, "--epochs 3: stages.total is 3, but 5 stages need"),
        ({"epochs": 0}, "--epochs 0: stages.total is 0, but must be >= 1"),
        ({"workers": 3}, "--workers 3: "),
        ({"gpus_per_worker": "many"}, "--gpus-per-worker many: resources.gpus_per_worker is many, but must be"),
        ({"name": "a/b"}, "--name a/b: must be text that can name a folder"),
        ({"seed": -1}, "--seed -1: seed is -1, but must be >= 0"),
    ):
        with pytest.raises(ConfigError) as caught:
            spaces.with_overrides(space, **flags)  # type: ignore[arg-type]
        assert caught.value.problems[0].startswith(start)


def test_params_know_their_values() -> None:
    assert Int(low=1, high=7, step=2).grid() == [1, 3, 5, 7]
    assert Int(low=1, high=10**6).grid() == [1, 10**6]
    assert Float(low=0.0, high=1.0, step=0.25).grid() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Float(low=0.0, high=1.0).grid() == [0.0, 1.0]
    assert Float(low=0.1, high=0.7, step=0.2).nearest(0.39) == pytest.approx(0.3)
    for low, high, step in ((0.1, 0.7, 0.2), (0.1, 0.4, 0.1), (-0.3, 0.9, 0.1)):
        steps = Float(low=low, high=high, step=step)
        assert [steps.nearest(value * (1 + 1e-12)) for value in steps.grid()] == steps.grid()
    assert Int(low=2, high=8, step=3).nearest(6.4) == 5
    for a, b in itertools.combinations([True, 1, 0, False, None, "1", (1,), (True,)], 2):
        assert not same(a, b)
    assert same([1, (2.0,)], (1, [2]))
