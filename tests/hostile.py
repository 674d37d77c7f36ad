"""What tests of hostile files share: an object that runs a command when it is unpickled, and the file it makes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class Evil:
    """Whatever unpickles it makes the sentinel."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Path]:
    """The file that an attack would make; the test fails where it is there at the end."""
    path = tmp_path / "sentinel"
    yield path
    assert not path.exists(), "the attack succeeded"
