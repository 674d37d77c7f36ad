"""Worker groups of Ray Train inside Tune trials that start fast and stay for the next trial.

A group's ranks import torch and Ray for many seconds. So the group belongs to the trial's
process: with Tune's ``reuse_actors`` the next trial runs on the same ranks at once. A rank
waits for something to run, and while it trains, after each epoch for the trial's word
(:class:`Group`), so a stopped trial trains no epoch beyond.

Ray Train as it comes puts four more processes beside the ranks: a controller, a cleaner of
placement groups, a manager of data sets and a barrier. Here the controller runs in the
trial's process, and the ranks run in the place that Tune holds for the trial
(:func:`trial_resources`): Tune frees it however the trial ends, so nothing needs cleaning.
That uses names inside Ray. Where they are not as expected, Ray's own ``TorchTrainer`` is
used as it comes, with a place of its own.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import pickle
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Any, NamedTuple

import ray
from ray import cloudpickle, tune
from ray import train as ray_train
from ray.train.torch import TorchTrainer

from hpcl.errors import UserError
from hpcl.search.failures import machine_lost
from hpcl.search.rendezvous import LoopbackConfig

Row = dict[str, Any]
WorkerFunction = Callable[[dict[str, Any], Callable[[Row], None]], None]
"""``worker(payload, report)``, called once per rank; every rank calls ``report(row)`` at the end of each epoch."""


def run_group(
    worker: WorkerFunction,
    payload: dict[str, Any],
    *,
    workers: int,
    holds: Mapping[str, float],
    name: str,
    storage_path: str,
    on_row: Callable[[Row], None],
) -> None:
    """Run a function on all ranks of a worker group; returns when all have ended.

    In a trial of Tune's the group is kept for the next trial in this process, unless a rank failed.

    Args:
        worker: what each rank runs, inside torch's process group (NCCL with GPUs, else gloo).
        payload: its first argument; anything that cloudpickle takes.
        workers: number of ranks.
        holds: what a rank holds, as Ray names it: ``{"CPU": 2, "GPU": 1}``.
        name: Ray Train may write to ``<storage_path>/<name>``.
        storage_path: a folder that all nodes see.
        on_row: gets every row that rank 0 reports, in the calling thread. All ranks wait
            until it returns. What it raises ends the function on all ranks.

    Raises:
        UserError: of a rank, as it was raised there.
        ChildProcessError: the process of a rank died, or its machine was lost.
        Exception: any other error of a rank, or Ray's own where the group could not start.
            Ray's report of all ranks is the ``__cause__`` of an error of a rank.
    """
    global _kept
    shape = Shape(workers, dict(holds))
    group, _kept = _kept, None
    if group is not None and (group.ended or group.shape != shape):
        group.end()
        group = None
    group = group or Group(shape, name, storage_path)
    try:
        group.run(worker, payload, on_row)
    finally:
        if _in_trial() and not group.ended:
            _kept = group
        else:
            group.end()


class Shape(NamedTuple):
    """What a worker group holds."""

    workers: int
    holds: Mapping[str, float]
    """What a rank holds, as Ray names it."""


class Group:
    """The trial's side of a worker group.

    Each rank connects, says its number, and then in turns that it is idle (None) and waits for
    a function to run. Within it, rank 0 sends rows, and every rank waits after each epoch for
    True (go on) or False (stop). As for torch's own group, ports must be open between nodes.
    Who connects must know a key that only the ranks are given; nothing is read from others.
    """

    def __init__(self, shape: Shape, name: str, storage_path: str) -> None:
        self.shape = shape
        self._over = False
        self._busy = shape.workers  # ranks that have not said that they are idle
        self._of_rank: dict[int, Connection[Any, Any]] = {}
        self._heard: queue.Queue[Row | BaseException | None] = queue.Queue()
        key = secrets.token_bytes(32)
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        try:
            self._listener = Listener((host, 0), backlog=shape.workers)
        except OSError:  # a cluster may know this node by an address that is not one of its own
            self._listener = Listener(("", 0), backlog=shape.workers)
        self._address = (host, self._listener.address[1])
        trainer = _trainer_class(shape)(
            _rank,
            train_loop_config={"address": self._address, "key": key},
            torch_config=LoopbackConfig() if host.startswith("127.") else None,
            scaling_config=ray_train.ScalingConfig(
                num_workers=shape.workers, use_gpu=shape.holds.get("GPU", 0) > 0, resources_per_worker=dict(shape.holds)
            ),
            run_config=ray_train.RunConfig(
                name=name,
                storage_path=storage_path,
                # Retries are Tune's: they start from the same checkpoint, in a fresh group.
                failure_config=ray_train.FailureConfig(max_failures=0, controller_failure_limit=3),  # type: ignore[call-arg]
            ),
        )
        threading.Thread(target=self._listen, args=(key,), name="ranks", daemon=True).start()
        self._fit = threading.Thread(target=self._hold, args=(trainer,), name="worker-group", daemon=True)
        self._fit.start()

    @property
    def ended(self) -> bool:
        """Whether nothing can run on it any more."""
        return self._over or not self._fit.is_alive()

    def run(self, worker: WorkerFunction, payload: dict[str, Any], on_row: Callable[[Row], None]) -> None:
        """Run a function on all ranks, see :func:`run_group`."""
        while self._busy:  # starting, or still on the way out of a trial that was stopped
            self._hear()
        self._busy = self.shape.workers
        self._tell(cloudpickle.dumps((worker, payload)))  # type: ignore[no-untyped-call]
        try:
            while self._busy:
                if (row := self._hear()) is not None:
                    on_row(row)
                    self._tell(pickle.dumps(True))
        except BaseException:
            self._tell(pickle.dumps(False))
            raise

    def end(self) -> None:
        """Let the ranks go; returns when they have ended, or after a minute."""
        self._over = True
        self._tell(pickle.dumps(None))
        if len(self._of_rank) < self.shape.workers:
            self._wake()
        else:
            self._fit.join(timeout=60)

    def _hear(self) -> Row | None:
        """The next row of rank 0; None: a rank is idle."""
        heard = self._heard.get()
        if isinstance(heard, BaseException):
            self._over = True
            raise _cause(heard) from heard
        self._busy -= heard is None
        return heard

    def _tell(self, word: bytes) -> None:
        for connection in list(self._of_rank.values()):
            with suppress(OSError):  # a rank that has ended
                connection.send_bytes(word)

    # ---------------------------------------------------------------- its threads

    def _hold(self, trainer: TorchTrainer) -> None:
        """Ray Train's part: start the ranks, watch over them, and free their place at the end."""
        try:
            trainer.fit()
            self._heard.put(RuntimeError("the worker group has ended"))
        except BaseException as error:  # raised by the thread that runs a function
            self._heard.put(error)

    def _listen(self, key: bytes) -> None:
        """Let the ranks connect. Each is heard by a thread of its own: who connects and is silent holds up nobody."""
        with self._listener:
            while len(self._of_rank) < self.shape.workers and not self._over:
                with suppress(OSError):
                    connection = self._listener.accept()
                    threading.Thread(target=self._hear_from, args=(connection, key), name="rank", daemon=True).start()

    def _hear_from(self, connection: Connection[Any, Any], key: bytes) -> None:
        """Pass on what a rank says."""
        with connection, suppress(AuthenticationError, EOFError, OSError):  # not a rank, or one that has ended
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            self._of_rank[connection.recv()] = connection
            if len(self._of_rank) == self.shape.workers:
                self._wake()
            while True:
                self._heard.put(connection.recv())

    def _wake(self) -> None:
        """Let the thread that waits for ranks look whether it still has to."""
        with suppress(OSError):
            socket.create_connection(self._address, timeout=1).close()


_kept: Group | None = None
"""The group that waits for this process's next trial."""


def _rank(config: dict[str, Any]) -> None:
    """One rank of a group, in its own process: run what comes until nothing will."""
    rank = ray_train.get_context().get_world_rank()
    with Client(config["address"], authkey=config["key"]) as trial:

        def report(row: Row) -> None:
            if rank == 0:
                trial.send(row)
            if not trial.recv():
                raise SystemExit

        trial.send(rank)
        while True:
            trial.send(None)
            if (given := trial.recv()) is None:
                return
            worker, payload = given
            with suppress(SystemExit):
                worker(payload, report)
            del given, worker, payload
            _forget()


def _forget() -> None:
    """Give back the memory of the function that has ended."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _cause(error: BaseException) -> BaseException:
    """What brought a group down: where one rank fails, the others only lose their connections to it."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    if not failures:
        return error

    def order(rank: int) -> tuple[int, int]:
        failure = failures[rank]
        if isinstance(failure, UserError):
            return 0, rank
        lost = isinstance(failure, EOFError | ConnectionError) or "gloo" in str(failure)
        if lost or type(failure).__name__.startswith("Dist"):  # torch's DistBackendError and its kin
            return 3, rank
        return (2 if _death(failure) else 1), rank

    rank = min(failures, key=order)
    if death := _death(failures[rank]):
        kind = type(death).__name__
        if machine_lost(f"{kind} {death}"):
            return ChildProcessError(f"rank {rank}: its machine was lost (Ray: {kind})")
        return ChildProcessError(f"rank {rank}: its process was killed, ran out of memory or crashed (Ray: {kind})")
    return failures[rank]


def _death(failure: BaseException) -> BaseException | None:
    death: BaseException | None = getattr(failure, "health_check_failure", None)
    return death


# ---------------------------------------------------------------- inside Ray


def trial_resources(shape: Shape, driver_cpus: float) -> tune.PlacementGroupFactory | dict[str, float]:
    """What ``tune.with_resources`` is to hold for a trial with a worker group.

    Args:
        shape: the group.
        driver_cpus: CPUs of the trial's own process, which only waits.
    """
    if needs_dashboard():
        return {"cpu": driver_cpus}  # Ray Train takes another place for the ranks
    return tune.PlacementGroupFactory([{"CPU": driver_cpus}, *[dict(shape.holds)] * shape.workers])


def needs_dashboard() -> bool:
    """Whether worker groups need Ray's dashboard: Ray Train's own cleaner of placement groups asks it."""
    return _inside() is None


def _in_trial() -> bool:
    """Whether this process is a trial of Tune's."""
    return ray.get_runtime_context().get_actor_id() is not None and tune.get_context().get_trial_id() is not None


def _trainer_class(shape: Shape) -> type[TorchTrainer]:
    """A ``TorchTrainer`` that runs its controller here and its ranks in the trial's place, if there is one for them."""
    place = ray.util.get_current_placement_group() if _in_trial() else None
    inside = _inside()
    if inside is None or place is None or len(place.bundle_specs) != 1 + shape.workers:
        return TorchTrainer

    class Place(inside.handle):  # type: ignore[name-defined, misc]
        def shutdown(self) -> None:
            """Nothing: the place is Tune's."""

    class LeanGroup(inside.group):  # type: ignore[name-defined, misc]
        def _create_placement_group(self, *args: Any, **kwargs: Any) -> Any:
            return Place(place)

        def _create_workers(self, *args: Any, **kwargs: Any) -> Any:
            ranks = list(range(1, 1 + shape.workers))  # bundle 0 is the trial's process
            return super()._create_workers(*args, **kwargs, placement_group_bundle_indices=ranks)

    class Controller(inside.controller):  # type: ignore[name-defined, misc]
        worker_group_cls = LeanGroup

    class Policy(inside.policy):  # type: ignore[name-defined, misc]
        def _ask_for_nodes(self) -> None:
            """Nothing: the place is there. Ray would start a process for it first."""

        _send_resource_request = _maybe_send_resource_request = _cancel_resource_request = _ask_for_nodes

    class LeanTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            left_out = {"PlacementGroupCleanerCallback", "DatasetsCallback"}
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]
            return [each for each in callbacks if type(each).__name__ not in left_out]

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            controller = Controller(**{**arguments, "scaling_policy": Policy(self.scaling_config)})
            asyncio.run(controller.run())
            return controller.get_result()

    return LeanTrainer


class Inside(NamedTuple):
    """Ray Train's own classes."""

    controller: type[Any]
    group: type[Any]
    handle: type[Any]
    policy: type[Any]


def _inside() -> Inside | None:
    """What is used of Ray Train's inside; None where something of it is not as expected."""
    try:
        from ray.train.v2._internal.execution.controller import TrainController
        from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
        from ray.train.v2._internal.execution.worker_group import WorkerGroup
        from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
    except ImportError:
        return None
    methods = {
        TorchTrainer: ("_create_default_callbacks", "_initialize_and_run_controller"),
        TrainController: ("worker_group_cls", "run", "get_result"),
        WorkerGroup: ("_create_placement_group", "_create_workers"),
        DefaultPlacementGroupHandle: ("shutdown",),
        FixedScalingPolicy: ("_send_resource_request", "_maybe_send_resource_request", "_cancel_resource_request"),
    }
    as_expected = (
        all(hasattr(each, name) for each, names in methods.items() for name in names)
        and inspect.iscoroutinefunction(TrainController.run)
        and "scaling_policy" in inspect.signature(TrainController).parameters
        and "placement_group_bundle_indices" in inspect.signature(WorkerGroup._create_workers).parameters
    )
    return (
        Inside(TrainController, WorkerGroup, DefaultPlacementGroupHandle, FixedScalingPolicy) if as_expected else None
    )
