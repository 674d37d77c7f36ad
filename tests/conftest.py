"""Settings and configurations that several tests share."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# One thread: results are then the same on every machine of a kind, and tests side by
# side do not fight for cores. Before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Decoded images of tests do not go into the user's cache; other processes that a test starts inherit the folder.
if "HPCL_CACHE" not in os.environ:
    os.environ["HPCL_CACHE"] = tempfile.mkdtemp(prefix="hpcl-tests-")
    atexit.register(shutil.rmtree, os.environ["HPCL_CACHE"], ignore_errors=True)

import pytest

from hpcl.config import Config

if TYPE_CHECKING:
    from stores import Server

TINY: dict[str, Any] = {
    "data": {"subset": 0.1},
    "augment": {"flip": 0.0, "gray": 0.0},
    "model": {"width": 8, "dim": 16},
    "head": {"hidden": 16},
    "moco": {"queue": 128},
    "optimizer": {"batch": 64},
    "stages": {
        "stage1": {"epochs": 1},
        "stage2": {"epochs": 1},
        "stage3": {"epochs": 3},
        "stage4": {"epochs": 1},
        "stage5": {"epochs": 2},
    },
    "clusters": {"levels": 2},
    "growth": {"window": 1, "theta_start": 0.5, "theta_end": 0.5, "theta_proto": 0.5},
    "meters": {"views": 32, "reference_clusters": 10},
    "runtime": {"device": "cpu", "threads": 1},
}
"""All five stages on 400 real images, about a tenth of a second an epoch; grows by the window rule."""


@pytest.fixture
def tiny() -> Config:
    return Config.model_validate(TINY)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The tiny run, start to end, in this process: its folder and its rows. Not to be written to."""
    from hpcl.trainer import fit

    folder = tmp_path_factory.mktemp("unbroken")
    return folder, fit(Config.model_validate(TINY), folder).rows


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """An S3 server on loopback."""
    from stores import ENVIRONMENT, Server

    from hpcl.search import storage

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("HPCL_STORAGE_PATIENCE", "0")
        server = Server()
        yield server
        storage._open.cache_clear()  # no connection to a server that has gone is left for this process's end
        server.stop()


@pytest.fixture
def uri(server: Server, request: pytest.FixtureRequest) -> str:
    """A folder in a bucket of its own."""
    return server.uri(f"bucket-{abs(hash(request.node.nodeid)) % 10**12}")


@pytest.fixture
def root(uri: str) -> Path:
    """Where the files of this folder are for this process."""
    from hpcl.search.places import place

    return place(uri)
