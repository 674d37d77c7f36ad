"""The configuration: the notes' defaults, types and bounds, rules over fields, presets."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from pydantic import BaseModel, ValidationError

from hpcl import presets
from hpcl.config import Config
from hpcl.data_rules import data_problems
from hpcl.errors import ConfigError
from hpcl.sections import STAGES
from hpcl.stages import stage_lengths
from hpcl.validation import field_paths, section_class
from hpcl.yamlio import dump, parse, read_tree


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [found for info in model.model_fields.values() if (found := section_class(info.annotation)) is not None]
    return [model, *(deeper for found in inner for deeper in sections(found))]


def test_defaults_are_the_notes_values() -> None:
    config = Config()
    assert [config.stages.of(s).epochs for s in STAGES] == [20, 5, 50, 5, 70]
    assert config.clusters.multiplier == 1.7
    assert config.clusters.first == 2
    assert config.clusters.levels == 3
    assert config.clusters.size_tolerance == pytest.approx(1 / 3)
    assert (config.growth.policy, config.growth.window, config.growth.stages) == ("window", 3, (3, 5))
    assert (config.head.kind, config.head.attach) == ("v2", "stack")


def test_every_field_is_documented() -> None:
    undocumented = [
        f"{model.__name__}.{name}"
        for model in sections(Config)
        for name, info in model.model_fields.items()
        if not info.description and section_class(info.annotation) is None
    ]
    assert undocumented == []


def test_every_path_is_reached_and_replaced() -> None:
    config = Config()
    for path in field_paths(Config):
        assert config.with_values({path: config.at(path)}) == config
    assert config.with_values({"stages.stage2.lr": 0.5}).at("stages.stage2.lr") == 0.5
    for path in ("clusters.multipler", "seed.x", "stages.stage6.lr"):
        with pytest.raises(KeyError):
            config.at(path)


def test_it_is_frozen_and_strict() -> None:
    config = Config()
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]
    for path, value in {
        "seed": "3",
        "clusters.levels": 3.0,
        "clusters.warm": 1,
        "moco.temperature": float("inf"),
        "clusters.first": True,
        "head.kind": "V2",
        "augment.crop_scale": (0.5,),
    }.items():
        with pytest.raises(ValidationError):
            config.with_values({path: value})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"moco.queue": 1000}, "must be a multiple of optimizer.batch"),
        ({"stages.total": 4}, "5 stages need at least one epoch each"),
        ({f"stages.stage{s}.epochs": 0 for s in STAGES}, "at least one must train"),
        ({"head.kind": "none"}, "stages.stage2.epochs is 5, but must be 0 with head.kind none"),
        ({"growth.stages": (1, 3)}, "clusters exist only in stages 2 to 5"),
        ({"augment.crop_scale": (0.5, 0.2)}, "must be \\[low, high\\]"),
        ({"augment.blur_sigma": (0.0, 0.2)}, "must be \\[low, high\\]"),
    ],
)
def test_rules_over_several_fields(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        Config().with_values(values)


def test_a_run_without_head_is_allowed_where_nothing_trains_it_alone() -> None:
    values = {"head.kind": "none", "stages.stage2.epochs": 0, "stages.stage4.epochs": 0}
    assert Config().with_values(values).head.kind == "none"


def test_rules_that_need_the_number_of_images_and_workers() -> None:
    config = Config().with_values({"optimizer.batch": 128, "moco.queue": 1024})
    assert data_problems(config, 4000) == []
    assert data_problems(config, 2048, ranks=4) == []
    assert "at most half of the 2047 training images" in data_problems(config, 2047)[0]
    assert "number of workers (3)" in data_problems(config, 4000, ranks=3)[0]
    assert len(data_problems(config.with_values({"clusters.first": 200}), 100)) == 3
    split = config.with_values({"model.bn_splits": 3})
    assert "must divide a worker's batch (64)" in data_problems(split, 4000, ranks=2)[0]


@pytest.mark.parametrize(("name", "images"), [("embedded", 4000), ("cifar", 40_500), ("mini_imagenet", 48_000)])
def test_presets_are_valid_for_their_data(name: str, images: int) -> None:
    assert name in presets.names()
    config = presets.config(name)
    assert data_problems(config, images) == []
    assert config.meters.views <= images // 8
    assert parse(Config, read_tree(dump(config))) == config
    assert config.meters.augment == config.augment  # the fixed views are drawn as the trial's own by default


def test_a_stage_that_sets_only_its_rate_keeps_the_notes_length() -> None:
    config = parse(Config, read_tree("stages: {stage3: {lr: 0.5}}"))
    assert (config.stages.stage3.epochs, config.stages.stage3.lr) == (50, 0.5)


def test_presets_have_the_published_values() -> None:
    cifar, mini = presets.config("cifar"), presets.config("mini_imagenet")
    assert sum(stage_lengths(cifar.stages)) == 200
    assert stage_lengths(mini.stages) == (20, 5, 50, 5, 70)
    assert (cifar.model.backbone, cifar.model.stem, cifar.model.bn_splits) == ("resnet18", "cifar", 8)
    assert (cifar.optimizer.batch, cifar.moco.queue, cifar.moco.momentum, cifar.moco.temperature) == (
        512, 4096, 0.99, 0.1,
    )  # fmt: skip
    assert mini.data.size == 84
    embedded = presets.config("embedded")
    assert (embedded.data.source, embedded.clusters.multiplier, embedded.augment.flip) == ("mnist5k", 1.7, 0.0)


def test_an_unknown_preset_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="there is no preset embeded; did you mean embedded"):
        presets.tree("embeded")


LIGHT = "hpcl.config, hpcl.errors, hpcl.yamlio, hpcl.presets, hpcl.search.space, hpcl.search.plan, hpcl.search.machine"


def heavy_after(statement: str) -> list[str]:
    code = f"import sys\n{statement}\nprint(*[m for m in ('torch', 'ray', 'optuna', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_reading_configurations_and_spaces_imports_nothing_heavy() -> None:
    begin = time.perf_counter()
    assert heavy_after(f"import {LIGHT}") == []
    print(f"a fresh process imported {LIGHT} in {time.perf_counter() - begin:.2f} s")


def test_the_import_check_can_fail() -> None:
    assert heavy_after(f"import {LIGHT}\nimport optuna") == ["optuna"]
