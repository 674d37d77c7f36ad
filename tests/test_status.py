"""`hpcl status`: what a search's folder says of it, while it runs and after."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_live import History, Screen, cells, history, in_terminal, plan_of, text_of

from hpcl.cli import main as cli_main
from hpcl.errors import UserError
from hpcl.search.journal import Journal, read_events
from hpcl.search.status import main, picture, read
from hpcl.yamlio import write

COMMAND = "python run_search.py --space demo.yaml --name demo"

HOLD = """
import sys
from pathlib import Path
from hpcl.search.journal import Journal
journal = Journal(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the journal of a folder, as the one that runs a search does."""
    command = [sys.executable, "-c", HOLD, str(folder / "journal.jsonl")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def results(tmp_path: Path, made: History) -> Path:
    """The results folder of a search with these events, the newest of them a minute old."""
    plan = plan_of(tmp_path)
    plan.folder.mkdir(exist_ok=True)
    write(plan.folder / "space.yaml", plan.space.to_tree(), "The space as it was searched.")
    record = {"hardware": {"nodes": [{"CPU": 2.0, "memory": 1e9}]}}
    (plan.folder / "search.json").write_text(json.dumps(record))
    shift = time.time() - 60 - made.now
    lines = [json.dumps({**event, "time": event["time"] + shift}) for event in made.events]
    (plan.folder / "journal.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return plan.folder


def shown_of(folder: Path) -> str:
    """What is printed a minute after the newest event."""
    status = read(folder)
    return text_of(picture(status, now=status.last + 60))


def test_a_running_search(tmp_path: Path) -> None:
    folder = results(tmp_path, history())
    before = (folder / "journal.jsonl").read_bytes()
    with held(folder):
        text = shown_of(folder)
        lines = cells(text)
        assert read(folder).state == "running"
        assert "\nrunning for 4 min 36 s, last event 1 min 0 s ago\n" in text
        assert lines["0004"][4:7] == ["rung", "at", "8"] and lines["trials"][:2] == ["3", "running,"]
        assert "resume" not in text and " left (" in text
        assert "failed   trial 0002: RuntimeError: out of luck" in text
        with pytest.raises(UserError, match="another process runs this search"):
            Journal(folder / "journal.jsonl")
    assert (folder / "journal.jsonl").read_bytes() == before
    Journal(folder / "journal.jsonl").close()  # nothing of the look is left


def test_a_search_that_was_killed_is_told_from_one_that_was_interrupted(tmp_path: Path) -> None:
    made = history()
    folder = results(tmp_path, made)
    with held(folder) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        assert read(folder).state == "killed"  # the lock went with its process
    text = shown_of(folder)
    assert "\nkilled 1 min 0 s ago after 3 min 36 s: its process ended without a word\n" in text
    assert f"resume   {COMMAND}\n" in text and cells(text)["0004"][4:6] == ["cut", "short"]
    made.add("state", state="interrupted", reason="interrupted")
    text = shown_of(results(tmp_path, made))
    assert "\ninterrupted 1 min 0 s ago after 3 min 36 s\n" in text and f"resume   {COMMAND}\n" in text
    # A later session without an end of its own was killed, whatever the earlier one said.
    made.add("session", command=f"{COMMAND} --trials 8", cpus=1.0)
    made.row("0004", 7, 0.07)
    text = shown_of(results(tmp_path, made))
    assert "\nkilled " in text and ", in 2 sessions\n" in text and f"resume   {COMMAND} --trials 8\n" in text


def test_a_finished_search(tmp_path: Path) -> None:
    made = History(cpus=1.0)
    made.row(made.begin(0), 20, 0.5, state="finished", objective=0.75)
    made.end("0000", "finished", "all 20 epochs trained")
    made.add("note", text="at epoch 16 acc_proto_ref ranks trials by clusters.multiplier: -0.94, n = 27")
    made.add("state", state="finished", reason="0.5 GPU-hours are used up")
    text = shown_of(results(tmp_path, made))
    assert "\nfinished 1 min 0 s ago after 6 s: 0.5 GPU-hours are used up\n" in text
    assert "best     trial 0000 with linear probe 0.75" in text and "resume" not in text
    assert "note     at epoch 16 acc_proto_ref ranks trials by clusters.multiplier: -0.94" in text


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = results(tmp_path, history())
    whole = shown_of(folder)
    with open(folder / "journal.jsonl", "a") as file:
        file.write('{"event": "end", "time": 1764000000.0, "trial": "0004", "sta')
    assert len(read_events(folder / "journal.jsonl")) == len(history().events)
    assert shown_of(folder).split("search demo")[1] == whole.split("search demo")[1]


def test_it_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    folder = results(tmp_path, history())
    code = (
        "import sys\nfrom pathlib import Path\nfrom hpcl.search.status import main\n"
        f"main(Path({str(folder)!r}))\n"
        "print([name for name in ('torch', 'ray', 'optuna', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]" and lines[-2] == f"resume   {COMMAND}", done.stdout + done.stderr
    assert "\x1b" not in done.stdout


def test_long_lines_are_not_cut_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = history()
    made.add("note", text="word " * 60 + "end")
    main(results(tmp_path, made))
    assert "note     " + "word " * 60 + "end\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no such folder"),
        ((), "there is no journal.jsonl, so no search was run here"),
        (("trials.parquet",), "there is no journal.jsonl, so an older version made these results"),
        (("journal.jsonl",), "no search has begun here yet"),
    ],
)
def test_a_folder_without_a_search_is_refused(
    tmp_path: Path,
    files: tuple[str, ...] | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "other"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    monkeypatch.setattr("sys.argv", ["hpcl", "status", str(folder)])
    with pytest.raises(SystemExit) as end:
        cli_main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and str(folder) in error and len(error.splitlines()) == 1


def test_a_search_without_its_record_is_refused(tmp_path: Path) -> None:
    folder = results(tmp_path, history())
    (folder / "search.json").write_text("{")
    with pytest.raises(UserError, match=r"search.json: cannot be read \(JSONDecodeError"):
        read(folder)


WATCH = """
import sys
from pathlib import Path
from hpcl.search import status
from hpcl.search.journal import Journal
status.WATCH_EVERY = 0.2
folder = Path(sys.argv[1])
looks, look = [], status.read

def read(folder):
    if len(looks) == 2:
        journal = Journal(folder / "journal.jsonl")
        journal.append("end", trial="0004", state="stopped", reason="why")
        journal.close()
    if len(looks) == 4:
        raise KeyboardInterrupt
    looks.append(1)
    return look(folder)

status.read = read
status.main(folder, watch=True)
print("looked", len(looks))
"""


def test_watching_shows_the_newest_state_until_it_is_interrupted(tmp_path: Path) -> None:
    folder = results(tmp_path, history())
    returned, output = in_terminal([sys.executable, "-c", WATCH, str(folder)])
    screen = Screen(output)
    text = "\n".join(screen.lines)
    assert returned == 0 and screen.cursor_shown and "looked 4" in text, text
    assert text.count("search demo") == 1 and text.count("begun") == 1
    assert cells(text)["0004"][4] == "stopped" and "2 cut short, 5 of 8 ended" in text
    assert "3 cut short, 4 of 8 ended" in output


def test_watching_needs_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with pytest.raises(UserError, match="--watch: standard output is no terminal"):
        main(results(tmp_path, history()), watch=True)
