"""An S3 server in the test's process, and a trainer that saves as the real one does."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import scripted

from hpcl.results import epoch_schema, read_rows, write_table
from hpcl.search import mirror, storage

PAUSE = "HPCL_TEST_PAUSE"
"""Seconds that an epoch of :func:`train` takes."""


class Server:
    """moto's server; its buckets outlive a stop."""

    def __init__(self) -> None:
        self._port = 0
        self.start()

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        _, self._port = self._server.get_host_and_port()

    def stop(self) -> None:
        self._server.stop()

    def uri(self, bucket: str) -> str:
        """The URI of a folder in a bucket, which is made."""
        from pyarrow.fs import FileSystem

        options = f"endpoint_override=127.0.0.1:{self._port}&scheme=http"
        files, _ = FileSystem.from_uri(f"s3://{bucket}?{options}&allow_bucket_creation=true")
        files.create_dir(bucket)
        return f"s3://{bucket}/results?{options}"


ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}


def at(uri: str, *names: str) -> str:
    """The URI of something below another."""
    head, mark, query = uri.partition("?")
    return "/".join((head, *names)) + mark + query


def train(config: Any, folder: Path, report: Any, **options: Any) -> None:
    """As :func:`scripted.train`; with a table of its epochs, and a file `trained` with a line per epoch and process."""
    import time

    def saved(row: dict[str, Any]) -> None:
        table = folder / "epochs.parquet"
        rows = read_rows(table) if table.exists() else []
        if not rows or rows[-1]["epoch"] < row["epoch"]:
            fork = options.get("fork")
            if not rows and fork is not None and (fork.parent / "prefix.parquet").exists():
                rows = read_rows(fork.parent / "prefix.parquet")
            write_table(table, [*rows, row], epoch_schema())
        with (folder / "trained").open("a") as file:
            file.write(f"{row['epoch']} {row['shared']}\n")
        report(row)
        time.sleep(float(os.environ.get(PAUSE, 0)))

    scripted.train(config, folder, saved, **options)


def again(folder: Path, **options: Any) -> Path:
    """The folder as a process sees it that comes new to it."""
    storage.drop(folder)
    storage.fetch(folder, **options)
    return folder


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def sign_of(folder: Path, **facts: Any) -> Path:
    """A sign of life of another process."""
    file = fill(folder / mirror.RUNNING) / "other-71-00"
    file.write_text(json.dumps({"host": "other", "machine": "another", "pid": 71, "time": 0.0, **facts}))
    storage.push(file.parent)
    return file
