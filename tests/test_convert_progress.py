"""What a conversion says while it runs."""

from __future__ import annotations

import sys

import pytest

from hpcl.data import progress


def test_progress_says_nothing_at_first_and_then_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress.Progress("decoding set", 1000, before=200) as shown:
        for _ in range(30):
            now[0] += 0.5
            shown.advance(10)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "decoding set: 240 of 1,000 images, 200 of them before; about 38 s left",
        "decoding set: 440 of 1,000 images, 200 of them before; about 28 s left",
    ]


def test_progress_is_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr("hpcl.data.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress.Progress("decoding [bold]set", None) as shown:
        shown.advance(10)
        assert capsys.readouterr().out == ""
        now[0] += 5
        shown.advance(10)
        shown.finishing("writing")
    out = capsys.readouterr().out
    assert "decoding [bold]set" in out and "20" in out
