"""YAML in and out: number rules, places of mistakes, refusals, the way out and back."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcl.config import Config
from hpcl.errors import ConfigError, UserError
from hpcl.yamlio import (
    MAX_DEPTH,
    assignment,
    did_you_mean,
    dump,
    load,
    load_config_with,
    load_tree,
    merge,
    parse,
    read_tree,
    read_value,
    write,
)


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(Config, read_tree(text, "f.yaml"))
    return caught.value.problems


def test_user_error_keeps_its_problems_apart_and_survives_pickle() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("one", "two")))
    assert isinstance(error, UserError)
    assert error.problems == ("one", "two")
    assert str(error) == "one\ntwo"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("3", 3),
        ("-3", -3),
        ("012", 12),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("none", "none"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ('"3"', "3"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("-.inf", -math.inf),
        ("[1, [a, 2.0], {b: null}]", [1, ["a", 2.0], {"b": None}]),
        ("9" * 5000, math.inf),
    ],
)
def test_scalars_are_read_as_yaml_1_2(text: str, value: object) -> None:
    got = read_value(text, "here")
    assert got == value
    assert type(got) is type(value)


def test_pyyaml_alone_would_misread_what_we_read_right() -> None:
    """Why this file has a reader of its own: the check would notice if PyYAML changed."""
    assert yaml.safe_load("1e-4") == "1e-4"
    assert yaml.safe_load("a: 1\na: 2") == {"a": 2}


def test_all_problems_come_at_once_with_line_column_and_a_suggestion() -> None:
    text = (
        "clusters: {multipler: 2, first: 0, levels: 3.0}\n"
        "moco: {batch: 3}\n"
        "augment: {crop_scale: [0.2], flip: yes}\n"
        "head: {kind: v3}\n"
        "clusters.first: 3\n"
        "topk: null\n"
        "seed: .nan\n"
    )
    assert problems_of(text) == (
        "f.yaml:1:12: clusters.multipler: there is no such field; did you mean clusters.multiplier?",
        "f.yaml:1:33: clusters.first is 0, but must be >= 1",
        "f.yaml:1:44: clusters.levels is 3.0, but must be a whole number",
        "f.yaml:2:8: moco.batch: there is no such field; did you mean optimizer.batch?",
        "f.yaml:3:23: augment.crop_scale is [0.2], but must be a list of 2 values",
        "f.yaml:3:36: augment.flip is yes, but must be a number",
        "f.yaml:4:14: head.kind is v3, but must be one of v1, v2, linear, none, simclr2, multi",
        "f.yaml:5:1: clusters.first: there is no such field; write `clusters: {first: ...}`",
        "f.yaml:6:7: topk is null, but must be a mapping",
        "f.yaml:7:7: seed is .nan, but must be a whole number",
    )


def test_rules_over_several_fields_point_to_a_field_that_the_file_has() -> None:
    assert problems_of("moco:\n  queue: 1000\nstages: {total: 2}\n") == (
        "f.yaml:2:10: moco.queue is 1000, but must be a multiple of optimizer.batch (512)",
        "f.yaml:3:17: stages.total is 2, but 5 stages need at least one epoch each",
    )
    # The queue is a default here: the place is that of the batch.
    assert problems_of("\noptimizer: {batch: 100}\n")[0].startswith("f.yaml:2:20: moco.queue is 4096, but must be")
    assert problems_of("augment: {crop_scale: [1, 0.2]}")[0].startswith("f.yaml:1:23: augment.crop_scale is [1.0, 0.2]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\nb: {c: 1, c: 2}", ("f.yaml:2:1: the key a stands here a second time", "f.yaml:3:11: the key c")),
        ("a: &x 1\nb: *x", ("f.yaml:2:4: *x is an alias",)),
        ("a: !!float 3", ("f.yaml:1:4: !!float is a tag",)),
        ("a: !!python/object/apply:os.system [ls]", ("f.yaml:1:4: !!python/object/apply:os.system is a tag",)),
        ("? [1]\n: 2", ("f.yaml:1:3: a key must be plain text",)),
        ("", ("f.yaml:1:1: the file is empty",)),
        ("# only a comment\n", ("f.yaml:1:1: the file is empty",)),
        ("- 1", ("f.yaml:1:1: the file is a list",)),
        ("a: 1\n---\nb: 2", ("f.yaml:2:1: a second document",)),
        ("a: [1", ("f.yaml:1:6: is not YAML: ",)),
        ("a:\n\t- 1", ("f.yaml:2:1: is not YAML: ",)),
        ("a: \x00", ("f.yaml: is not YAML: ",)),
        ("a: " + "[" * (MAX_DEPTH + 1), (f"f.yaml:1:{MAX_DEPTH + 3}: nests more than {MAX_DEPTH} levels",)),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_place(text: str, expected: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_tree(text, "f.yaml")
    assert len(caught.value.problems) == len(expected)
    for problem, start in zip(caught.value.problems, expected, strict=True):
        assert problem.startswith(start)


def test_an_alias_bomb_ends_at_once() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    with pytest.raises(ConfigError, match="is an alias"):
        read_tree("\n".join(lines))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*mine\.yaml\?"):
        load_tree(tmp_path / "mine.yml")
    with pytest.raises(ConfigError, match="not a text file"):
        load_tree(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tree(tmp_path / "folder.yaml")


def test_merge_keeps_the_place_a_value_came_from() -> None:
    base = read_tree("augment: {flip: 0.5, crop_scale: [0.1, 0.2]}\nseed: 3", "base.yaml")
    over = read_tree("augment:\n  crop_scale: [0.3]", "over.yaml")
    both = merge(base, over)
    assert both.value == {"augment": {"flip": 0.5, "crop_scale": [0.3]}, "seed": 3}
    assert both.where(("augment", "flip")) == "base.yaml:1:17"
    assert both.where(("augment", "crop_scale", 0)) == "over.yaml:2:16"
    assert both.where(("augment", "crop_scale", 1)) == "over.yaml:2:15"  # gone: the list that has no such item
    assert base.value["augment"]["crop_scale"] == [0.1, 0.2]


def test_did_you_mean_finds_the_right_name_in_another_section() -> None:
    assert did_you_mean("moco.batch", ["optimizer.batch", "seed"]) == "; did you mean optimizer.batch?"
    assert did_you_mean("qqqq", ["optimizer.batch", "seed"]) == ""


fractions = st.floats(0.0, 1.0)
configs = st.builds(
    lambda source, flip, lr, momentum, low, maximum, tolerance, stages, mode, warm: Config().with_values(
        {
            "data.source": source,
            "augment.flip": flip,
            "stages.stage2.lr": lr,
            "moco.momentum": momentum,
            "augment.crop_scale": (low, 1.0),
            "clusters.maximum": maximum,
            "clusters.size_tolerance": tolerance,
            "growth.stages": tuple(stages),
            "topk.mode": mode,
            "clusters.warm": warm,
        }
    ),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    | st.sampled_from(["1e-4", "null", "no", "-", "a: b", "#", "~"]),
    fractions,
    st.floats(1e-300, 1e300),
    st.floats(0.0, 1.0, exclude_max=True),
    st.floats(1e-9, 1.0),
    st.none() | st.integers(1, 10**12),
    st.none() | st.floats(0.0, 1.0, exclude_min=True),
    st.lists(st.sampled_from([2, 3, 4, 5])),
    st.sampled_from(["replace", "add", "none"]),
    st.booleans(),
)


@settings(deadline=None, max_examples=50)
@given(configs)
def test_what_is_written_reads_back_equal(config: Config) -> None:
    text = dump(config, header="first line\n\nthird: line")
    assert text.startswith("# first line\n#\n# third: line\n")
    assert parse(Config, read_tree(text)) == config
    assert "!!" not in text
    # Other readers see the same text fields: nothing unquoted that YAML 1.1 takes for a number or boolean.
    assert yaml.safe_load(text)["data"]["source"] == config.data.source


def test_written_files_are_whole_and_leave_nothing_beside(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "best.yaml"
    write(file, Config())
    write(file, Config(seed=4), header="from trial 3")
    assert file.read_text().startswith("# from trial 3\n")
    assert load(Config, file) == Config(seed=4)
    assert [p.name for p in file.parent.iterdir()] == ["best.yaml"]


def test_assignments_of_the_command_line() -> None:
    assert assignment("moco.temperature=1e-1") == ("moco.temperature", 0.1)
    assert assignment("augment.crop_scale=[0.1, 1]") == ("augment.crop_scale", [0.1, 1])
    assert assignment("data.source=a=b") == ("data.source", "a=b")
    for text in ("x", "=3"):
        with pytest.raises(ConfigError, match=f"--set {text}: must be path=value"):
            assignment(text)
    with pytest.raises(ConfigError, match=r"--set a=\[1:1:\d+: is not YAML"):
        assignment("a=[1")


def test_changes_from_the_command_line_name_their_flag(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 7\n")
    config = load_config_with(file, ["growth.stages=[3]", "topk.max_clusters=null"], data="2024", epochs=10)
    assert (config.seed, config.data.source, config.stages.total) == (7, "2024", 10)
    assert config.growth.stages == (3,)
    with pytest.raises(ConfigError) as caught:
        load_config_with(file, ["moco.quue=3", "moco=3"])
    assert caught.value.problems == (
        "--set moco.quue=3: moco.quue: there is no such field; did you mean moco.queue?",
        "--set moco=3: moco is a section, but must be one of its fields, such as moco.queue",
    )
    with pytest.raises(ConfigError) as caught:
        load_config_with(file, ["moco.queue=1000", "clusters.first=512"], epochs=2)
    assert set(caught.value.problems) == {
        "--set moco.queue=1000: moco.queue is 1000, but must be a multiple of optimizer.batch (512)",
        "--epochs 2: stages.total is 2, but 5 stages need at least one epoch each",
    }
