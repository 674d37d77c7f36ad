"""The append-only log of a search."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcl.errors import UserError
from hpcl.search.journal import Journal, is_locked, read_events

HOLD = """
import sys, pathlib
from hpcl.search.journal import Journal
journal = Journal(pathlib.Path(sys.argv[1]))
journal.append("note", text="held")
print("held", flush=True)
sys.stdin.read()
"""


def test_events_come_back_in_order_with_their_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    given = journal.append("trial", trial="0000", number=0, values={"a.b": (1, 2), "c": None}, optuna=None)
    journal.append("rung", sync=True, trial="0000", bracket=0, rung=2.0, value=np.float32(0.5))
    journal.close()
    first, second = read_events(tmp_path / "journal.jsonl")
    assert first == given and first["values"] == {"a.b": [1, 2], "c": None}
    assert second["value"] == 0.5 and second["time"] >= first["time"] > 1.7e9


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("note", text="one")
    journal.close()
    whole = path.read_bytes()
    for cut in range(1, 20):
        path.write_bytes(whole + b'{"event": "end", "trial": "0000"}'[:cut])
        assert [event["text"] for event in read_events(path)] == ["one"]
    again = Journal(path)
    again.append("note", text="two")
    again.close()
    assert [event["text"] for event in read_events(path)] == ["one", "two"]


def test_damage_in_the_middle_is_said(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for damage in ("not json", "[1]", '{"no": "event"}'):
        path.write_text(json.dumps({"event": "note", "time": 1.0, "text": "a"}) + f"\n{damage}\n")
        with pytest.raises(UserError, match=r"journal\.jsonl:2: not an event of a search"):
            read_events(path)
    with pytest.raises(UserError, match="no such file"):
        read_events(tmp_path / "none")


def test_one_process_at_a_time_and_a_killed_one_gives_it_free(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert not is_locked(path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert is_locked(path) and len(read_events(path)) == 1
    with pytest.raises(UserError, match="another process runs this search"):
        Journal(path)
    holder.kill()
    holder.communicate()
    assert not is_locked(path)
    Journal(path).close()
