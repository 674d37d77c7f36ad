"""A search as one table: what stands in it, that it fits, and that it leaves a terminal as it was."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from hpcl.search.journal import Event
from hpcl.search.live import Course, Live, View, is_terminal, view
from hpcl.search.plan import Node, Plan, duration, make_plan
from hpcl.search.space import apply_overrides, from_tree
from hpcl.search.tables import Tables
from hpcl.yamlio import read_tree

START = 1_764_000_000.0
"""When the search of `history` began, in seconds since 1970."""

SPACE = """
name: demo
base:
  preset: embedded
  stages:
    total: null
    stage1: {epochs: 4}
    stage2: {epochs: 1}
    stage3: {epochs: 7}
    stage4: {epochs: 1}
    stage5: {epochs: 7}
space:
  clusters.multiplier: {float: [1.2, 3.0], log: true}
  stages.stage3.epochs: {int: [7, 14]}
search: {trials: 8, objective: linear, grace: 8, factor: 2, share_prefix: false}
"""


def plan_of(folder: Path, *sets: str, gpus: float = 0.0) -> Plan:
    """The plan of a search of 8 trials; `sets` are assignments such as "search.grace=4"."""
    space = apply_overrides(from_tree(read_tree(SPACE)), sets)
    return make_plan(space, [Node(2, gpus)], cluster="x", folder=folder / "demo")


class History:
    """Events of a search, written by hand."""

    def __init__(self, **held: float) -> None:
        self.events: list[Event] = []
        self.now = START
        self.add("session", command="python run_search.py --space demo.yaml --name demo", **(held or {"cpus": 1.0}))

    def add(self, event: str, after: float = 0.0, **facts: Any) -> None:
        self.now += after
        self.events.append({"event": event, "time": self.now, **facts})

    def begin(self, number: int, **values: Any) -> str:
        """A trial is drawn."""
        values = {"clusters.multiplier": 2.0, "stages.stage3.epochs": 7, **values}
        self.add("trial", trial=f"{number:04d}", number=number, values=values, optuna=number)
        return f"{number:04d}"

    def row(self, trial: str, epoch: int, metric: float | None = None, **row: Any) -> None:
        """An epoch of 6 seconds is reported."""
        facts = {"epoch": epoch, "stage": 3, "state": "running", "seconds": 6.0, "clock": float(epoch), **row}
        self.add("row", 6.0, trial=trial, row=facts | ({} if metric is None else {"acc_proto_ref": metric}))

    def end(self, trial: str, state: str, reason: str = "why") -> None:
        """A trial ends."""
        self.add("end", trial=trial, state=state, reason=reason)


def history(**held: float) -> History:
    """One trial of each kind: finished, stopped, failed, diverged, two running, one drawn."""
    made = History(**held)
    for trial, best in ((made.begin(0), 0.5), (made.begin(1), 0.2)):
        for epoch in range(1, 9):
            made.row(trial, epoch, best * epoch / 20, level_clusters="8/16/32")
        made.add("rung", trial=trial, bracket=0, rung=8.0, value=best)
    made.end("0001", "stopped", "epoch 8: acc_proto_ref 0.08, below the rung's top half at 0.2 (n = 2)")
    made.end(made.begin(2), "failed", "RuntimeError: out of luck")
    made.row(made.begin(3), 1)
    made.end("0003", "diverged", "epoch 1: the loss is not finite")
    for epoch in range(9, 20):
        made.row("0000", epoch, 0.5 * epoch / 20, level_clusters="8/16/32", stage=5)
    made.row("0000", 20, 0.5, state="finished", objective=0.8933, level_clusters="10/20/40", stage=5)
    made.end("0000", "finished", "all 20 epochs trained")
    made.begin(4)
    made.begin(5, **{"stages.stage3.epochs": 14})
    for epoch in range(1, 7):
        made.row("0004", epoch, 0.01 * epoch, level_clusters="100/200/400/800", stage=3)
    made.row("0005", 1, 0.004, stage=1, level_clusters="7")
    made.begin(6)
    return made


def state_of(events: Iterable[Event], plan: Plan) -> tuple[Tables, Course]:
    """What the events come to."""
    tables, course = Tables(plan.folder, plan.space), Course()
    for event in events:
        course.take(event)
    tables.replay(events)
    return tables, course


def text_of(picture: RenderableType, width: int = 80, height: int = 100) -> str:
    """The picture as plain text, on a console of this size."""
    console = Console(file=io.StringIO(), width=width, height=height, record=True)
    console.print(picture)
    return console.export_text()


def picture(made: History, plan: Plan, **options: Any) -> View:
    """The search ten seconds after its last event."""
    tables, course = state_of(made.events, plan)
    return view(tables, plan, course, **{"now": made.now + 10, **options})


def cells(text: str) -> dict[str, list[str]]:
    """First word of each line -> the other words."""
    return {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}


def test_it_fits_80_columns_and_has_what_it_must(tmp_path: Path) -> None:
    text = text_of(picture(history(), plan_of(tmp_path)))
    assert max(len(line) for line in text.splitlines()) == 80
    lines = cells(text)
    assert lines["trial"] == ["stage", "epoch", "clusters", "acc_proto_ref", "state", "time"]
    assert lines["0004"] == ["3", "6/20", "100/200/400/800", "0.0600", "rung", "at", "8", "52", "s"]
    assert lines["0006"] == ["-", "0/20", "-", "-", "starting", "10", "s"]
    assert lines["0000"] == ["5", "20/20", "10/20/40", "0.5000", "finished", "0.8933", "2", "min"]
    assert lines["0002"] == ["-", "0/20", "-", "-", "failed", "0", "s"]
    order = re.findall(r"^000\d", text, re.MULTILINE)
    assert order == ["0004", "0005", "0006", "0001", "0002", "0003", "0000"]  # running; ended, the newest last
    assert "best     trial 0000 with linear probe 0.8933" in text
    assert "trials   3 running, 4 of 8 ended: 1 finished, 1 stopped, 1 failed, 1 diverged" in text
    assert re.search(r"epochs   36 trained, about \d+ to come", text)
    assert re.search(r"time     3 min 46 s, about \d min \d+ s left \(\d\d:\d\d\)", text)
    assert re.search(r"cost     0.06 CPU-hours, about 0.0\d+ to come", text)


def test_the_next_rung_is_told_in_the_trial_s_own_epochs(tmp_path: Path) -> None:
    made, plan = history(), plan_of(tmp_path)
    assert plan.rungs == (8.0, 16.0)
    # Stage 3 of trial 0005 has 14 epochs for the base's 7: canonical time 8 = 4 + 1 + 7 · 6/14 is its epoch 11.
    assert cells(text_of(picture(made, plan)))["0005"][:6] == ["1", "1/27", "7", "0.0040", "rung", "at"]
    assert "rung at 11 " in text_of(picture(made, plan))
    made.row("0004", 16, 0.3)
    assert "no rung left" in text_of(picture(made, plan))
    lines = cells(text_of(picture(made, plan_of(tmp_path, "search.grace=null"))))
    assert lines["0004"][4] == lines["0005"][4] == "running"  # no rungs at all


def test_with_brackets_only_a_known_one_has_a_next_rung(tmp_path: Path) -> None:
    made, plan = history(), plan_of(tmp_path, "search.brackets=2")
    made.add("rung", trial="0004", bracket=0, rung=8.0, value=0.1)
    made.row("0004", 9, 0.1)
    lines = cells(text_of(picture(made, plan)))
    assert lines["0004"][4:7] == ["rung", "at", "16"] and lines["0005"][4] == "running"


def test_gpu_hours_and_the_budget_that_ends_the_search(tmp_path: Path) -> None:
    made, plan = (
        history(gpus=1.0, cpus=8.0),
        plan_of(tmp_path, "search.max_gpu_hours=0.08", "search.max_hours=9", gpus=1),
    )
    text = text_of(picture(made, plan))
    assert "cost     0.06 of 0.08 GPU-hours, 0.02 left, about 0.02 to come" in text
    # 36 epochs of 6 s in 226 s used 0.06 GPU-hours: another 0.02 take a third of that.
    assert "time     3 min 46 s of 9 h, about 1 min 15 s until max_gpu_hours (" in text
    assert "epochs   36 trained, about 12 to come" in text


def test_a_search_that_does_not_run_has_no_time_left(tmp_path: Path) -> None:
    text = text_of(picture(history(), plan_of(tmp_path), running=False))
    assert text.count("cut short") == 4 and "3 cut short, 4 of 8 ended" in text
    assert "time     3 min 36 s\n" in text and "to come" not in text and "left" not in text


def test_rows_that_do_not_fit_the_height_are_counted(tmp_path: Path) -> None:
    made, plan = history(), plan_of(tmp_path)
    low = text_of(picture(made, plan), height=11)
    assert len(low.splitlines()) == 10 and "and 1 more" in low  # one line is the cursor's
    assert "0004" in low and "0005" in low and "0006" not in low and "0000" not in low.split("best")[0]
    assert "cost" in low
    assert "0001" in text_of(picture(made, plan, beside=None), height=11)
    middle = text_of(picture(made, plan, beside=2), height=15)
    assert len(middle.splitlines()) == 11 and "more" not in middle  # the newest ended one, and no older
    assert "finished 0.8933" in middle and "diverged  " not in middle


def test_shared_prefixes_are_shown_while_they_run_and_counted_once(tmp_path: Path) -> None:
    plan, made = plan_of(tmp_path), History(cpus=1.0)
    made.begin(0)
    made.begin(1)
    made.add("trial", trial="prefix-0123456789abcdef", number=0, values={}, optuna=None)
    made.row("prefix-0123456789abcdef", 1, stage=1)
    lines = cells(text_of(picture(made, plan)))
    assert lines["prefix"] == ["1", "1", "-", "-", "shared", "01234567", "16", "s"]
    assert lines["0000"][4] == lines["0001"][4] == "waiting"
    made.row("prefix-0123456789abcdef", 2, stage=1)
    made.end("prefix-0123456789abcdef", "finished")
    for trial in ("0000", "0001"):
        made.add("fork", trial=trial, prefix="prefix-0123456789abcdef")
    lines = cells(text_of(picture(made, plan)))
    assert "prefix" not in lines
    assert lines["0000"] == ["1", "2/20", "-", "-", "rung", "at", "8", "10", "s"]
    assert lines["epochs"][0] == "2"


@pytest.mark.parametrize(("metric", "values", "ahead"), [("acc_proto_ref", (1, 2), 1), ("nce_ref", (1, 2), 0)])
def test_before_a_trial_finishes_the_one_ahead_is_named(
    tmp_path: Path, metric: str, values: tuple[float, ...], ahead: int
) -> None:
    plan, made = plan_of(tmp_path, f"search.metric={metric}"), History(cpus=1.0)
    assert "best     -" in text_of(picture(made, plan))
    for number, value in enumerate(values):
        made.row(made.begin(number), 1, **{metric: value})
    shown = f"none has finished; ahead is trial 000{ahead} with {metric} {values[ahead]} (epoch 1)"
    assert shown in text_of(picture(made, plan))


def test_a_resumed_search_counts_all_its_sessions(tmp_path: Path) -> None:
    made, plan = history(), plan_of(tmp_path)
    ran = made.now - START
    made.add("session", after=1000.0, command="again", cpus=1.0)
    made.row("0004", 7, 0.07)
    text = text_of(picture(made, plan))
    lines = cells(text)
    assert lines["0004"][-5:] == ["rung", "at", "8", "16", "s"]  # six for the epoch, ten since
    assert lines["0005"][-3:] == ["waiting", "6", "s"]  # nothing of it yet: what it has trained
    assert f"time     {duration(ran + 16)}, " in text
    tables, course = state_of(made.events, plan)
    course.left("0004")
    assert cells(text_of(view(tables, plan, course, now=made.now)))["0004"][4] == "waiting"


def test_many_levels_and_long_times_are_shortened(tmp_path: Path) -> None:
    made, plan = History(cpus=1.0), plan_of(tmp_path)
    made.row(made.begin(0), 6, 123.456, level_clusters="100/200/400/800/1600", seconds=1e6)
    lines = cells(text_of(picture(made, plan, now=made.now + 90_000)))
    assert lines["0000"][2:4] == ["100/…/1600", "123.5"] and lines["0000"][-2:] == ["25.0", "h"]


# ---------------------------------------------------------------- in a terminal

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_live import History, history, plan_of, state_of
from hpcl.search.live import Live, is_terminal, view

plan, made = plan_of(Path("/nowhere")), history()
assert is_terminal()
with Live() as live:
    for number in range(20, len(made.events) + 1, 3):
        tables, course = state_of(made.events[:number], plan)
        live.update(view(tables, plan, course, now=made.now))
        live.say(f"[line {{number}}] said [bold]as it is[/bold] " + "x" * 60)
        print("printed", number)
    print("to stderr", file=sys.stderr)
    {end}
print("after")
"""


class Screen:
    """What a terminal of 80 columns shows, of the few control sequences that rich sends."""

    def __init__(self, text: str) -> None:
        self.lines: list[str] = [""]
        self.row, self.cursor_shown = 0, True
        for part in re.findall(r"\x1b\[\??[\d;]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", text):
            self._take(part)

    def _take(self, part: str) -> None:
        if part == "\n":
            self.row += 1
            if self.row == len(self.lines):
                self.lines.append("")
        elif part == "\x1b[2K":
            self.lines[self.row] = ""
        elif part.endswith("A") and part.startswith("\x1b["):
            self.row -= int(part[2:-1])
            assert self.row >= 0
        elif part in ("\x1b[?25l", "\x1b[?25h"):
            self.cursor_shown = part.endswith("h")
        elif part.startswith("\x1b["):
            assert part.endswith("m"), f"unexpected control sequence {part!r}"
        elif part != "\r":
            self.lines[self.row] += part


def in_terminal(command: list[str], rows: int = 30) -> tuple[int, str]:
    """Exit code and output of a command in a pseudo-terminal of 80 columns."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": str(rows)}
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        output = b""
        while True:
            try:
                output += os.read(leader, 65536)
            except OSError:  # what Linux says when the other end is closed
                break
        os.close(leader)
    return process.returncode, output.decode()


@pytest.mark.parametrize("end", ["pass", "raise RuntimeError('a bug')", "raise KeyboardInterrupt"])
def test_in_a_terminal_it_starts_and_ends_cleanly(end: str) -> None:
    code = CHILD.format(tests=str(Path(__file__).parent), end=end)
    returned, output = in_terminal([sys.executable, "-c", code])
    screen = Screen(output)
    text = "\n".join(screen.lines)
    assert screen.cursor_shown and output.count("\x1b[?25l") == 1, text
    assert (returned == 0) == (end == "pass"), text
    # One table is left, the last one; what was said stands above it, in order and as it was.
    assert text.count("trial  stage  epoch") == 1 and text.count("search demo") == 1
    said = [int(number) for number in re.findall(r"^\[line (\d+)\] said \[bold\]as it is\[/bold\]", text, re.MULTILINE)]
    assert said and said == [int(number) for number in re.findall(r"^printed (\d+)", text, re.MULTILINE)]
    assert said == sorted(said) and text.index(f"printed {said[-1]}") < text.index("to stderr") < text.index(
        "search demo"
    )
    assert "3 running, 4 of 8 ended" in text
    rest = text[text.index("cost ") :]
    assert {"pass": "after", "raise KeyboardInterrupt": "KeyboardInterrupt"}.get(end, "RuntimeError: a bug") in rest


def test_pictures_take_five_per_cent_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [100.0], []
    monkeypatch.setattr("hpcl.search.live.time", SimpleNamespace(monotonic=lambda: now[0]))
    live = Live()

    def make(takes: float) -> str:
        drawn.append(now[0])
        now[0] += takes
        return "a picture"

    for takes, pause in ((0.0, 0.5), (0.5, 10.0), (0.0, 0.5)):
        live.update_if_due(lambda takes=takes: make(takes))
        end = now[0]
        for moment in (0.0, pause - 0.01):
            now[0] = end + moment
            live.update_if_due(lambda: make(0.0))
        now[0] = end + pause
    assert drawn == [100.0, 100.5, 111.0]


def test_only_a_terminal_that_moves_its_cursor_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert not is_terminal()
    monkeypatch.setattr("sys.stdout", Terminal())
    assert is_terminal()
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal()
