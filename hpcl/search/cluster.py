"""Connecting to Ray, quietly: a private instance on this machine, or a running cluster."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import stat
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
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
    # Trials that may wait for a place at a time; our queue hands out no more than it should.
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
    # A worker group is polled this often (seconds); the default of 2 makes every short epoch wait.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
}
_OWN = ("RAY_API_SERVER_ADDRESS", "PYTHONPATH", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
"""Set for a private instance, and as they were when it has ended."""
_OBJECT_STORE_BYTES = 300_000_000  # rows are small; images go through memory-mapped files


@contextmanager
def connected(address: str | None = None, *, workers: int = 1) -> Iterator[None]:
    """Connected to Ray for the length of the block.

    Args:
        address: None starts a private instance on this machine and ends it afterwards
            (whatever other Ray may run here): on loopback, behind a token of its own. Else as
            in ``ray.init``, e.g. ``auto``. A connection that exists already is used and left open.
        workers: workers per trial; several need Ray's dashboard process, which answers
            the question whether a stopped trial's workers still hold their place.

    Raises:
        UserError: no cluster answers at this address.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray
    from ray._private import worker as inside

    if hasattr(inside, "print_to_stdstream"):  # what machines say when they are lost; Ray prints it whatever it is told
        inside.print_to_stdstream = lambda data, **_: logging.getLogger("ray").warning("\n".join(data["lines"]))
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    before = {name: os.environ.get(name) for name in _OWN}
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
        # Other users of this machine reach loopback too. Not Ray's own default, which is one token in a file for all.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # Ray's name for it: the node's address is 127.0.0.1, and so all of Ray listens there. Without, it is the
        # machine's address in the network, also where ray.init is given 127.0.0.1.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    else:
        options |= {"address": address, "runtime_env": {"env_vars": {k: os.environ[k] for k in _SETTINGS}}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _connect(address, options)
        try:
            yield
        finally:
            ray.shutdown()
    finally:
        for name, value_before in before.items():
            if value_before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value_before
        _token_anew()


def _connect(address: str | None, options: dict[str, Any]) -> None:
    """``ray.init``; an error in the user's words."""
    import ray

    try:
        if address is None:
            with _apart():
                _ours(ray_folder().parent)
                ray.init(**options, _temp_dir=str(ray_folder()))
        else:
            _knock(address)
            ray.init(**options)
    except SystemExit as error:  # Ray's own answer to SIGTERM
        raise KeyboardInterrupt from error
    except UserError:
        raise
    except Exception as error:  # Ray raises many kinds, plain Exception among them
        reason = " ".join(str(error).split()[:60]) or type(error).__name__
        if address is None:
            raise UserError(
                f"Ray did not start on this machine ({reason}); nothing was changed, give the command again"
            ) from error
        if type(error).__name__ == "AuthenticationError":
            raise UserError(
                f"--address {address}: the cluster there asks for a token, and this machine has none or another one; "
                "copy the head's ~/.ray/auth_token to the same place here, and set RAY_AUTH_MODE=token"
            ) from None
        raise UserError(f"--address {address}: no Ray cluster answers there ({reason})") from None


@contextmanager
def _apart() -> Iterator[None]:
    """Ray that is started in the block listens on loopback, and its processes are a session of their own.

    A signal to our process group, such as Ctrl-C in a terminal, is then for us alone: running epochs are
    finished before Ray is ended. Each of them still dies when this process does, however that dies.
    """
    constants: Any = import_module("ray._private.ray_constants")
    services: Any = import_module("ray._private.services")

    class Detached(services.ConsolePopen):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, start_new_session=True, **kwargs)

    before = constants.ENABLE_RAY_CLUSTER, services.ConsolePopen
    constants.ENABLE_RAY_CLUSTER, services.ConsolePopen = False, Detached
    _token_anew()
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER, services.ConsolePopen = before


def ray_folder() -> Path:
    """Where private instances keep their sockets and logs, each in a ``session_...`` of its own."""
    place = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # as Ray chooses it
    return Path(place) / f"hpcl-{os.getuid()}" / "ray"


def _ours(folder: Path) -> None:
    """Make a folder that only this user can enter: in Ray's own below it every user of this machine may put files.

    Raises:
        UserError: it is there already and others can enter it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(
            f"{folder}: Ray's sockets are to lie there, but it is not yours alone (mode 700); remove it, or set "
            "RAY_TMPDIR to a folder of your own"
        )


def _token_anew() -> None:
    """Have Ray read from the environment again whether a token is asked for, and which."""
    inside: Any = import_module("ray._raylet")
    inside.Config.initialize("")
    inside.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Ray's and Tune's messages go to a file instead of the terminal for the length of the block."""
    handler = _Quiet(path, delay=True)
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
        with suppress(OSError):
            handler.close()


class _Quiet(logging.FileHandler):
    """A log whose full disk is nothing to talk about: what matters is said where results cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing."""


def _own_paths() -> list[str]:
    """Folders that modules are imported from, without Python's own: those every process has."""
    libraries = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    folders = [Path(path).absolute() for path in sys.path]
    return [str(path) for path in folders if path.is_dir() and not str(path).startswith(libraries)]


def _knock(address: str) -> None:
    """Raise at once where nothing listens at host:port, for which Ray itself tries for minutes.

    Raises:
        OSError: nothing does.
        UserError: it is the address of Ray Client, which would run the search's own process elsewhere.
    """
    if "://" in address:
        raise UserError(
            f"--address {address}: is no address of a cluster's head, such as auto or 10.0.0.1:6379; run the search on "
            "a machine of the cluster (--address auto), or hand it in there (ray job submit)"
        )
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():  # `auto` is Ray's to resolve
        socket.create_connection((host, int(port)), timeout=10).close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
