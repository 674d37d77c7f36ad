"""Files from somebody else: spaces, configurations, checkpoints and results folders that try something.

Each attack would make a file, the sentinel, or write outside of its place; each is refused in a sentence.
Data sets: test_hostile_images.py.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from hostile import Evil, sentinel

import hpcl
from hpcl.checkpoint import load_checkpoint
from hpcl.cli import main
from hpcl.config import Config
from hpcl.errors import UnreadableCheckpoint, UserError, harmless
from hpcl.search.journal import read_events
from hpcl.search.sampler import Sampler
from hpcl.search.space import load as load_space
from hpcl.yamlio import write

__all__ = ["sentinel"]

ROOT = Path(hpcl.__file__).parent.parent
SPACE = "space: {clusters.first: {int: [2, 32]}}\n"


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls `hpcl` with these arguments; what it says when it refuses, without a traceback and with exit code 2."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["hpcl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in said, said
        return said

    return call


def search_folder(folder: Path, *events: dict[str, Any]) -> Path:
    """The folder of a search that was cut short, with these events after its first trial's."""
    folder.mkdir(parents=True)
    (folder.parent / "space.yaml").write_text(f"name: {folder.name}\n{SPACE}")
    space = load_space(folder.parent / "space.yaml")
    write(folder / "space.yaml", space.to_tree())
    (folder / "search.json").write_text(json.dumps({"state": "running", "hardware": {"nodes": [{"CPU": 2.0}]}}))
    begun = [
        {"event": "session", "command": "hpcl search", "gpus": 0, "cpus": 1.0},
        {"event": "trial", "trial": "0000", "number": 0, "values": {"clusters.first": 2}, "optuna": None},
    ]
    lines = [json.dumps({"time": 1.0, **event}) for event in (*begun, *events)]
    (folder / "journal.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


# --- YAML --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os"]
)
def test_yaml_tags_run_nothing_wherever_yaml_is_read(
    tag: str, tmp_path: Path, sentinel: Path, refused: Callable[..., str]
) -> None:
    text = f'seed: {tag} ["touch {sentinel}"]\n'
    file, folder = tmp_path / "hostile.yaml", search_folder(tmp_path / "results" / "mine")
    file.write_text(text)
    assert f"hostile.yaml:1:7: {tag} is a tag, but tags are not read" in refused("train", file)
    (tmp_path / "best.yaml").write_text(text)
    assert f"best.yaml:1:7: {tag} is a tag" in refused("train", tmp_path / "best.yaml")
    file.write_text(f"base: {{{text.strip()}}}\n{SPACE}")
    assert f"{tag} is a tag" in refused("search", "--space", file, "--dry-run")
    (folder / "space.yaml").write_text(file.read_text())
    for command in ("status", "retrain"):
        assert f"{folder / 'space.yaml'}:1:14: {tag} is a tag" in refused(command, folder)
    assert f"{tag} is a tag" in refused(
        "search", "--space", tmp_path / "results" / "space.yaml", "--results", tmp_path / "results", "--dry-run",
        "--name", "mine",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [x]\n" + "".join(f"{i}: &{i} [{'*a, ' * 9}]\n" for i in range(60)), "is an alias, but aliases are not"),
        ("[" * 60_000, "nests more than 64 levels deep"),
        ("x: [" + "1, " * 50_000 + "]", "is larger than 64 kB"),
        (f"base: {{config: /dev/zero}}\n{SPACE}", "/dev/zero: is larger than 64 kB"),
        ("base: {" + ", ".join(f"a{i}: 1" for i in range(500)) + "}", "more problems"),
        (f"search: {{trials: {10**20}}}\n{SPACE}", "search.trials is 100000000000000000000, but must be <= 1000000"),
        ("space: {clusters.first: {choice: [" + ",".join(map(str, range(2, 3000))) + "]}}", "at most 100"),
        ("space: {clusters.first: {int: [2, 99999999999999999999]}}", "must be <= 9007199254740992"),
    ],
)
def test_yaml_bombs_are_refused(text: str, said: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    answer = refused("search", "--space", tmp_path / "bomb.yaml", "--dry-run")
    assert said in answer and len(answer) < 20_000


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", ".x", "a/../../x", "x\\nmore", "\\e[31m"])
def test_a_space_cannot_choose_a_folder_elsewhere(name: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "space.yaml").write_text(f'name: "{name}"\n{SPACE}')
    assert "must be text that can name a folder" in refused("search", "--space", tmp_path / "space.yaml", "--dry-run")
    (tmp_path / "space.yaml").write_text(SPACE)
    given = name.replace("\\n", "\n").replace("\\e", "\x1b")
    said = refused("search", "--space", tmp_path / "space.yaml", "--dry-run", "--name", given)
    assert "--name" in said and "must be text that can name a folder" in said and "\x1b" not in said


# --- pickles -----------------------------------------------------------------------


def hostile_checkpoints(sentinel: Path) -> dict[str, bytes]:
    """Files that would run a command if they were unpickled: by name, what is in them."""
    zipped, old, state = io.BytesIO(), io.BytesIO(), {"format": 1, "rows": [], "evil": Evil(sentinel)}
    torch.save(state, zipped)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    return {"plain": pickle.dumps(state), "zip": zipped.getvalue(), "old": old.getvalue()}


@pytest.mark.parametrize("kind", ["plain", "zip", "old"])
def test_a_checkpoint_runs_no_code(kind: str, tmp_path: Path, sentinel: Path, refused: Callable[..., str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    checkpoint = run / "checkpoint.pt"
    checkpoint.write_bytes(hostile_checkpoints(sentinel)[kind])
    config = Config.model_validate(
        {**TINY, "data": {"subset": 0.03}, "optimizer": {"batch": 32}, "moco": {"queue": 32}}
    )
    write(tmp_path / "config.yaml", config)
    for command in (("knn", checkpoint), ("export", checkpoint, tmp_path / "out.pt")):
        assert "checkpoint.pt: not a readable checkpoint" in refused(*command)
    assert "checkpoint.pt cannot be read" in refused("train", tmp_path / "config.yaml", "--folder", run)
    with pytest.raises(UserError, match=r"checkpoint.pt: not a readable checkpoint"):
        hpcl.fit(config, tmp_path / "other", fork=checkpoint)
    assert not (tmp_path / "out.pt").exists()


def test_a_checkpoint_takes_no_memory_beyond_its_size(tmp_path: Path) -> None:
    """A file of a kilobyte whose pickle asks for 20 GB, which torch's restricted reader allows."""
    path, pickled = tmp_path / "checkpoint.pt", b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xc8\x17\xa8\x04\x85R."
    file = torch._C.PyTorchFileWriter(str(path))  # as torch.save writes
    file.write_record("data.pkl", pickled, len(pickled))
    file.write_end_of_file()
    with pytest.raises(UnreadableCheckpoint) as refused:
        load_checkpoint(path)
    assert "names builtins bytearray" in str(refused.value.__cause__)


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing in it": lambda state: [state.pop(name) for name in list(state) if name != "format"],
    "no configuration": lambda state: state.pop("config"),
    "a configuration that is a list": lambda state: state.update(config=[1]),
    "no rows": lambda state: state.update(rows=[]),
    "rows that are numbers": lambda state: state.update(rows=[1, 2]),
    "images that are text": lambda state: state.update(data="x"),
    "images without a shape": lambda state: state["data"].update(shape=[1, -8, 2**40]),
    "a backbone that is a number": lambda state: state.update(backbone=7),
    "tensors that are numbers": lambda state: state.update(pair={"query.backbone.0": 1}),
    "tensors without names": lambda state: state.update(pair={5: torch.ones(1)}),
    "no tensors": lambda state: state.update(pair={}),
    "tensors of another shape": lambda state: state.update(pair={n: torch.ones(1) for n in state["pair"]}),
    "names that paint the terminal": lambda state: state.update(
        pair={"query.\x1b[31mred": torch.ones(1), "query.backbone.\x1b]0;title\x07": torch.ones(1)}
    ),
    "no queue": lambda state: state.pop("queue"),
    "a queue of text": lambda state: state.update(queue={"keys": "x"}),
    "another optimizer": lambda state: state.update(optimizer={"state": {}, "param_groups": []}),
    "a hierarchy of nothing": lambda state: state.update(hierarchy={}),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_checkpoint_is_refused_in_a_sentence(
    kind: str,
    unbroken: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = load_checkpoint(unbroken[0] / "checkpoint.pt")
    FORGED[kind](state)
    run = tmp_path / "run"
    run.mkdir()
    torch.save(state, run / "checkpoint.pt")
    write(tmp_path / "config.yaml", Config.model_validate(TINY))
    said = []
    for command in (("knn", run / "checkpoint.pt"), ("export", run / "checkpoint.pt", tmp_path / "out.pt")):
        monkeypatch.setattr("sys.argv", ["hpcl", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            main()
        streams = capsys.readouterr()
        assert ended.value.code in (0, 2, None), streams.err  # what knn and export do not need may be anything
        said.append(streams.out + streams.err)
    said.append(refused("train", tmp_path / "config.yaml", "--folder", run))
    assert all("Traceback" not in text and "\x1b" not in text and "\x07" not in text for text in said), said


def test_nothing_in_the_package_reads_pickles_or_runs_text() -> None:
    """A look at all calls: whoever adds one of these has to think of files from others."""
    allowed = {("lean.py", "pickle.dumps"), ("lean.py", "cloudpickle.dumps"), ("checkpoint.py", "pickletools.genops")}
    found = set()
    for path in [*ROOT.glob("hpcl/**/*.py"), ROOT / "run_search.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name.endswith("torch.load") or name in ("eval", "exec", "compile", "os.system", "os.popen"):
                assert name == "torch.load" and keywords.get("weights_only") == "True", f"{path.name}: {name}"
            assert "shell" not in keywords and "allow_pickle" not in keywords, f"{path.name}: {name}"
            if "pickle" in name or name in ("yaml.load", "yaml.unsafe_load", "read_pickle", "joblib.load"):
                found.add((path.name, name))
    assert found <= allowed


# --- results folders ---------------------------------------------------------------

END = {"event": "end", "trial": "0000", "state": "stopped", "reason": ""}
ROW = {"event": "row", "trial": "0000"}


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"event": "trial", "trial": "../../x", "number": 1, "values": {}, "optuna": None}, "it names a folder"),
        ({"event": "trial", "trial": "/tmp/x", "number": 1, "values": {}, "optuna": None}, "it names a folder"),
        ({"event": "trial", "trial": "..", "number": 1, "values": {}, "optuna": None}, "it names a folder"),
        ({"event": "trial", "trial": "prefix-../x", "number": 1, "values": {}, "optuna": None}, "it names a folder"),
        ({"event": "trial", "trial": 7, "number": 1, "values": {}, "optuna": None}, "trial is 7, but must be text"),
        ({"event": "trial", "trial": "0001", "number": 1, "values": [], "optuna": None}, "values is [], but must be"),
        ({"event": "trial", "trial": "0001", "number": True, "values": {}, "optuna": None}, "must be a whole number"),
        ({"event": "trial", "trial": "0001", "number": 10**30, "values": {}, "optuna": None}, "from 0 to 2^63"),
        ({**END, "trial": "0009"}, "trial 0009 was never begun"),
        ({**END, "state": "running"}, "state is 'running', but must be one of diverged, failed, finished, stopped"),
        ({**END, "reason": {}}, "reason is {}, but must be text"),
        ({**ROW, "row": {"epoch": 1, "seconds": float("nan")}}, "seconds is nan, but must be finite"),
        ({**ROW, "row": {"epoch": 1, "loss": "low"}}, "loss is 'low', but must be a number"),
        ({**ROW, "row": {"epoch": "1"}}, "epoch is '1', but must be a whole number"),
        ({**ROW, "row": {}}, "a row without an epoch"),
        ({"event": "rung", "trial": "0000", "bracket": -1, "rung": 1.0, "value": 1.0}, "bracket is -1, but must be"),
        ({"event": "note", "text": ["a"]}, "text is ['a'], but must be text"),
        ({"event": ["note"]}, "no JSON object that names one"),
        ({"event": "note", "text": "a", "time": float("inf")}, "time is inf, but must be finite"),
    ],
)
def test_a_line_of_the_journal_is_checked(
    event: dict[str, Any], said: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = search_folder(tmp_path / "results" / "mine", event)
    for command in ("status", "retrain"):
        answer = refused(command, folder)
        assert f"{folder / 'journal.jsonl'}:3: not an event of a search (" in answer and said in answer
        assert "put a copy back, or leave this folder aside" in answer


def test_a_journal_that_nests_without_end_or_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for line in (b"[" * 200_000 + b"]" * 200_000, b'{"event": "note", "time": 1, "text": "\xff\xfe"}', b"9" * 10_000):
        path.write_bytes(line + b"\n")
        with pytest.raises(UserError, match=r"journal.jsonl:1: not an event of a search"):
            read_events(path)


@pytest.mark.parametrize("values", [{"nothing.like.it": 1}, {"clusters.first": "many"}, {"__class__": 1}, {"seed": []}])
def test_values_that_no_trial_can_have(values: dict[str, Any], tmp_path: Path, refused: Callable[..., str]) -> None:
    event = {"event": "trial", "trial": "0001", "number": 1, "values": values, "optuna": None}
    folder = search_folder(tmp_path / "results" / "mine", event)
    said = refused("status", folder)
    assert "journal.jsonl: trial 0001 has values that no configuration has" in said


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "[" * 100_000,
        "null",
        '{"hardware": []}',
        '{"hardware": {"nodes": [[1]]}}',
        *(
            f'{{"hardware": {{"nodes": [{{"CPU": {n}}}]}}}}'
            for n in ("Infinity", "1e400", "NaN", "-2", '"2"', "[1]", "true")
        ),
    ],
)
def test_a_record_that_is_none(content: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = search_folder(tmp_path / "results" / "mine")
    (folder / "search.json").write_text(content)
    for command in ("status", "retrain"):
        assert f"{folder / 'search.json'}: cannot be read (" in refused(command, folder)


@pytest.mark.parametrize(
    "link",
    [
        "trials/0000",
        "journal.jsonl",
        "optuna.journal",
        "trials/0000/log.txt",
        "tune",
        "../prefixes/.key-mine",
        "../prefixes",
    ],
)
def test_results_are_written_through_no_link(link: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder, outside = search_folder(tmp_path / "results" / "mine"), tmp_path / "outside"
    outside.mkdir()
    (outside / "profile").write_text("kept")
    path = folder / link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(outside if path.suffix == "" else outside / "profile")
    space = tmp_path / "results" / "space.yaml"
    said = refused("search", "--space", space, "--results", folder.parent, "--name", "mine")
    assert f"{path.resolve().name}" in said and "is a link to" in said and "remove it" in said
    if not link.startswith("."):
        (folder / "journal.jsonl").unlink(missing_ok=True)
        assert "hpcl" not in (outside / "profile").read_text()
    assert sorted(p.name for p in outside.iterdir()) == ["profile"] and (outside / "profile").read_text() == "kept"


@pytest.mark.parametrize("link", ["retrain", "retrain/trials", "retrain/journal.jsonl"])
def test_runs_of_retrain_are_written_through_no_link(link: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    finished = {"epoch": 1, "state": "finished", "objective": 0.5, "seconds": 1.0}
    folder = search_folder(
        tmp_path / "results" / "mine", {**ROW, "row": finished}, {**END, "state": "finished"},
        {"event": "state", "state": "finished", "reason": "all trials have ended"},
    )  # fmt: skip
    (folder / "search.json").write_text(
        json.dumps({"hardware": {"nodes": [{"CPU": 2.0}]}, "data_hash": "as it is", "state": "finished"})
    )
    outside, path = tmp_path / "outside", folder / link
    outside.mkdir()
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(outside if path.suffix == "" else outside / "profile")
    said = refused("retrain", folder)
    assert f"{path.name}: is a link to" in said and not list(outside.iterdir())


def test_a_pipe_is_not_waited_for(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = search_folder(tmp_path / "results" / "mine")
    for name in ("space.yaml", "search.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert f"{folder / name}: cannot be read (" in refused("status", folder)
    assert "cannot be read" in refused("train", folder / "space.yaml")


def test_a_run_folder_writes_through_no_link(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "profile").write_text("kept")
    (tmp_path / "run" / "log.txt").symlink_to(tmp_path / "profile")
    write(tmp_path / "config.yaml", Config.model_validate(TINY))
    said = refused("train", tmp_path / "config.yaml", "--folder", tmp_path / "run")
    assert f"{tmp_path / 'run' / 'log.txt'}: is a link to {tmp_path / 'profile'}" in said
    assert (tmp_path / "profile").read_text() == "kept"


@pytest.mark.parametrize(
    "line", ["[]", "7", '{"op_code": 99}', '{"op_code": 4, "study_id": 0}', '{"op_code": 0}', "{}"]
)
def test_lines_in_optunas_journal(line: str, tmp_path: Path) -> None:
    (tmp_path / "optuna.journal").write_text(f"{line}\n")
    (tmp_path / "space.yaml").write_text(SPACE)
    with pytest.raises(UserError, match=r"optuna\.journal: is no Optuna journal, or is damaged"):
        Sampler(load_space(tmp_path / "space.yaml"), startup=1, journal=tmp_path / "optuna.journal")


def test_the_terminal_shows_what_a_folder_says_and_obeys_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b[2J\x1b]0;title\x07[red]text[/red]\u202e"
    folder = search_folder(
        tmp_path / "results" / "mine",
        {"event": "note", "text": hostile},
        {"event": "session", "command": hostile},
        {**END, "state": "failed", "reason": hostile},
        {"event": "state", "state": "interrupted", "reason": hostile},
    )
    monkeypatch.setattr("sys.argv", ["hpcl", "status", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    shown = r"\x1b[2J\x1b]0;title\x07[red]text[/red]\u202e"
    assert not ended.value.code and out.count(shown) == 4, out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert str(UserError(f"a file {hostile}")) == f"a file {shown}" == harmless(f"a file {shown}")
