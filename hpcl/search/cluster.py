"""Connecting to Ray, quietly: a private instance on this machine, or a running cluster."""

from __future__ import annotations

import logging
import os
import socket
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpcl.errors import UserError

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Threads of a trial that wait for one another sleep instead of taking other trials' cores.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Trials stay in the folder where the search was started, so that relative data paths hold.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Tune's tables and status lines; ours take their place.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ctrl-C is ours: running epochs are finished before the search ends.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Seconds that a stopped trial may take to leave its process; the next one to use it waits. After Tune's own 2
    # the next trial is dropped without a word.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
    # Only the loggers we pass: TensorBoard events are written by the trainer itself.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A row leaves out a curve that has no value yet.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # A worker group is polled this often (seconds); the default of 2 makes every short epoch wait.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
}
_OBJECT_STORE_BYTES = 300_000_000  # rows are small; images go through memory-mapped files


@contextmanager
def connected(address: str | None = None, *, workers: int = 1) -> Iterator[list[dict[str, Any]]]:
    """Ray's nodes, connected for the length of the block.

    Args:
        address: None starts a private instance on this machine and ends it afterwards
            (whatever other Ray may run here); else as in ``ray.init``, e.g. ``auto``.
            A connection that exists already is used and left open.
        workers: workers per trial; several need Ray's dashboard process, which answers
            the question whether a stopped trial's workers still hold their place.

    Raises:
        UserError: no cluster answers at this address.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield _nodes()
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    before = {name: os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "PYTHONPATH")}
    if address is None:
        port = _free_port()
        options |= {
            "address": "local",
            "include_dashboard": workers > 1,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": port,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
        # What can be imported here (a backbone's module) can be imported in the trials.
        os.environ["PYTHONPATH"] = os.pathsep.join(_own_paths())
        # Without it a second Ray on this machine keeps worker groups from being cleaned up.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    else:
        options |= {"address": address, "runtime_env": {"env_vars": {k: os.environ[k] for k in _SETTINGS}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if address is not None:
                _knock(address)
            ray.init(**options)
        except SystemExit as error:  # Ray's own answer to SIGTERM
            raise KeyboardInterrupt from error
        except Exception as error:  # Ray raises many kinds, plain Exception among them
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if address is None:
                raise UserError(
                    f"Ray did not start on this machine ({reason}); nothing was changed, give the command again"
                ) from error
            raise UserError(f"--address {address}: no Ray cluster answers there ({reason})") from None
    try:
        yield _nodes()
    finally:
        ray.shutdown()
        for name, value_before in before.items():
            if value_before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value_before


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Ray's and Tune's messages go to a file instead of the terminal for the length of the block."""
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    names = ["ray", *(name for name in logging.root.manager.loggerDict if name.startswith("ray."))]
    loggers = [logging.getLogger(name) for name in [*names, "py.warnings"]]
    before = [(logger, logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers = []
        logger.propagate = logger.name.startswith("ray.")
    for name in ("ray", "py.warnings"):
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        handler.close()


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _own_paths() -> list[str]:
    """Folders that modules are imported from, without Python's own: those every process has."""
    libraries = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    folders = [Path(path).absolute() for path in sys.path]
    return [str(path) for path in folders if path.is_dir() and not str(path).startswith(libraries)]


def _knock(address: str) -> None:
    """Raise OSError at once where nothing listens at host:port; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():  # `auto` is Ray's to resolve
        socket.create_connection((host, int(port)), timeout=10).close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
