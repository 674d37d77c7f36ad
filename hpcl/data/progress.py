"""How far a conversion is: a bar in a terminal, a line now and then elsewhere, nothing for what takes two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from hpcl.errors import harmless

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

QUIET = 2.0
"""Seconds in which nothing is said."""
EVERY = 10.0
"""Seconds between two lines."""
FEWEST = 16
"""Images by which it can be told how long the rest takes: the first one alone holds what comes before it."""


class Progress:
    """Counts images; use it as a context.

    Args:
        what: is done, for example "decoding set".
        total: images in all; None: not known.
        before: images that were decoded by an earlier process.
    """

    def __init__(self, what: str, total: int | None, before: int = 0) -> None:
        self._what, self._total, self._before = harmless(what), total, before
        self._count = before
        self._started = time.monotonic()
        self._next = self._started + QUIET
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """So many images more were decoded."""
        self._count += count
        now = time.monotonic()
        if now < self._next:
            return
        if not sys.stdout.isatty():
            self._next = now + EVERY
            print(self.line(now), flush=True)
            return
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.description}", markup=False)
            self._bar = Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
            self._bar.add_task(self._what, total=self._total, completed=self._before)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=self._count)

    def finishing(self, what: str) -> None:
        """All images are decoded; something else takes a while."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=harmless(what), total=self._count)
        elif time.monotonic() > self._started + QUIET and not sys.stdout.isatty():
            print(harmless(what), flush=True)

    def line(self, now: float) -> str:
        """How far it is, such as ``decoding set: 4,096 of 60,000 images, 12,288 of them before; about 40 s left``."""
        of = f" of {self._total:,}" if self._total is not None else ""
        text = f"{self._what}: {self._count:,}{of} images"
        if self._before:
            text += f", {self._before:,} of them before"
        done = self._count - self._before
        if self._total is not None and done >= FEWEST:
            left = (now - self._started) / done * max(0, self._total - self._count)
            text += f"; about {left:.0f} s left" if left < 100 else f"; about {left / 60:.0f} min left"
        return text


class Waiting:
    """Says once that another process is waited for, where that takes a while."""

    def __init__(self, what: str) -> None:
        self._what, self._said = what, False

    def __call__(self, seconds: float) -> None:
        if seconds > QUIET and not self._said:
            self._said = True
            print(harmless(f"another process converts {self._what}; waiting for it"), flush=True)
