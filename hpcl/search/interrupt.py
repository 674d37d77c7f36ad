"""Ctrl-C and SIGTERM: the first ends the search gently, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Draining:
    """Whether the search is to end, and why; nothing new starts then, and what runs ends its epoch."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why it is to end; None as long as it goes on."""
        self.interrupted = False
        """Whether the user asked for it."""
        self.at_once = False
        """Whether running epochs are not waited for."""

    def __call__(self) -> bool:
        return self.reason is not None

    def ask(self, reason: str, *, interrupted: bool = False, at_once: bool = False, instead: bool = False) -> None:
        """End the search; the first reason stays, unless this one is to stand `instead` of it."""
        self.reason = reason if instead else self.reason or reason
        self.interrupted = self.interrupted or interrupted
        self.at_once = self.at_once or at_once


@contextmanager
def ended_by_signals(draining: Draining, say: Callable[[str], None]) -> Iterator[None]:
    """Within the block the first signal asks for a gentle end; the second raises KeyboardInterrupt.

    Only the main thread can set handlers; elsewhere signals act as before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if draining.interrupted:
            raise KeyboardInterrupt
        draining.ask("interrupted", interrupted=True)
        with suppress(RuntimeError):  # in the middle of another line
            say("interrupted: the running epochs are finished and saved; once more ends the search at once")

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block SIGTERM raises KeyboardInterrupt, as Ctrl-C does: nothing runs yet that could be saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
