"""What every node of the cluster says of itself: whether it answers, sees results and images, and runs the same.

One small task per node, which takes no CPU of its own, so that it runs beside trials too. To
see whether a folder of results is the same on every node, the driver puts a file with a
random name there; each node looks for it and puts one of its own beside it; all are removed.
"""

from __future__ import annotations

import json
import os
import posixpath
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from hpcl.errors import UserError
from hpcl.search.cluster import connected, ray_folder
from hpcl.search.elastic import alive_nodes
from hpcl.search.facts import NodeFacts, Seen
from hpcl.search.images import look_at_data
from hpcl.search.places import is_uri, place
from hpcl.search.probe import DISK_SECONDS, look, reason_of, versions, within
from hpcl.search.storage import check, opened

_T = TypeVar("_T")

SECONDS = 120.0
"""Seconds for all nodes to answer: each may have to start a process first."""
LOOK_AGAIN = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Seconds before each look for files that a network disk may show late."""
DATA_SECONDS = 60.0
"""Seconds to look through the files of a source of images."""


def look_at_nodes(
    folder: str | Path | None = None,
    data: str | None = None,
    *,
    machine: bool = False,
    seconds: float = SECONDS,
    name: str | None = None,
) -> list[NodeFacts]:
    """Facts of every node that is alive in the connected cluster, the driver's own first.

    Args:
        folder: of results, an absolute path or a URI; it is made and removed again where it
            is not there. None: not looked at.
        data: a source of images, with its full path; None: not looked at.
        machine: also GPUs, torch, faiss, memory and disks of the other nodes (see :mod:`hpcl.search.probe`).
        seconds: after which a node counts as silent.
        name: of the folder for the files; None: a random one.

    Raises:
        UserError: the driver itself cannot write into the folder of results.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Through ray:// the driver is on no node.
    far = ray.util.client.ray.is_connected()  # type: ignore[no-untyped-call]
    nodes = _named(alive_nodes(), "" if far else ray.get_runtime_context().get_node_id())
    marks = None if folder is None else Marks(str(folder), name or secrets.token_hex(8))
    try:
        if marks is not None:
            _done(marks, marks.lay)
        asked = {"data": data, "folder": marks and marks.folder, "name": marks and marks.name}
        task = ray.remote(num_cpus=0, max_retries=0)(_answer)
        waiting = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(
                {**asked, "node": node.node_id, "machine": machine and not node.here}
            ): node
            for node in nodes
        }
        found = {node.node_id: facts for node, facts in _answers(waiting, seconds)}
        if marks is not None:
            wrote = [node_id for node_id, facts in found.items() if facts.folder == "same"]
            arrived = _done(marks, lambda: marks.seen(wrote))
            for node_id in set(wrote) - arrived:
                found[node_id] = found[node_id].model_copy(update={"folder": "unseen"})
    finally:
        if marks is not None:
            with suppress(OSError, UserError):  # TimeoutError is one of the first
                within(DISK_SECONDS, marks.remove)
    return [found[node.node_id] for node in nodes]


def storage_problems(nodes: Sequence[NodeFacts], folder: str | Path) -> list[str]:
    """Why not all of these nodes can work on one folder of results; what to do stands behind the colon.

    Nodes that did not answer are left out: Ray finds out by itself whether they are dead.
    """
    return [f"{says}: {do}" for says, do in storage_faults(nodes, folder)]


def storage_faults(nodes: Sequence[NodeFacts], folder: str | Path) -> list[tuple[str, str]]:
    """The same in two parts: what is wrong, and what to do."""
    share = "use a folder that all nodes share, or a URI such as s3://bucket/results"
    faults = []

    def seen_as(seen: Seen, reason: str = "") -> tuple[str, bool]:
        names = [node.name for node in nodes if not node.silent and (node.folder, node.folder_error) == (seen, reason)]
        return named(names), len(names) == 1

    who, one = seen_as("missing")
    if who:
        does = "does" if one else "do"
        faults.append(
            (f"{who} {does} not see the results folder {folder} (it is a folder of this machine only)", share)
        )
    who, one = seen_as("other")
    if who:
        faults.append((f"{who} {'has' if one else 'have'} another folder at {folder} than this machine", share))
    who, one = seen_as("unseen")
    if who:
        faults.append((f"what {who} {'writes' if one else 'write'} into {folder} does not come to this machine", share))
    who, one = seen_as("silent")
    if who:
        up = "see that its server is up and mounted there"
        faults.append((f"the results folder {folder} does not answer on {who}", up))
    for reason in dict.fromkeys(node.folder_error for node in nodes if node.folder == "refused"):
        who, one = seen_as("refused", reason)
        right = "give the user that Ray runs as there the right to write, or give another folder"
        if is_uri(folder):
            right = "give these nodes credentials that may write there, or give another --results"
        faults.append((f"{who} cannot write into the results folder {folder} ({reason})", right))
    return faults


def named(names: Sequence[str]) -> str:
    """Nodes in words: "node a", "nodes a, b and c", "nodes a, b, c and 7 more"; empty for none."""
    if not names:
        return ""
    if len(names) == 1:
        return f"node {names[0]}"
    if len(names) <= 4:
        return f"nodes {', '.join(names[:-1])} and {names[-1]}"
    return f"nodes {', '.join(names[:3])} and {len(names) - 3} more"


# ---------------------------------------------------------------- the files in the folder of results


class Marks:
    """Files in a hidden folder below the folder of results, one of the driver and one of each node.

    Args:
        folder: of results: an absolute path or a URI.
        name: random, of these files.
    """

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = folder, name
        self._absent: list[str] | None = None

    def lay(self) -> None:
        """Write the driver's file, and the folders where they are missing."""
        with suppress(OSError, UserError):  # which `check` says better
            self.look()
        check(self.folder)
        files, path = _opened(self.folder)
        files.create_dir(self._inside(path), recursive=True)
        _write(files, self._file(path, "driver"), self.name)

    def look(self) -> None:
        """Note which folders are not there yet: those are removed at the end."""
        from pyarrow.fs import FileType

        if self._absent is not None:
            return
        files, path = _opened(self.folder)
        parents = [path]
        while (parent := posixpath.dirname(parents[-1])) not in ("", "/", parents[-1]):
            parents.append(parent)
        self._absent = [each for each in parents if files.get_file_info(each).type == FileType.NotFound]

    def meet(self, node: str) -> Seen:
        """On a node: look for the driver's file, and put one beside it."""
        from pyarrow.fs import FileType

        files, path = _opened(self.folder)
        if files.get_file_info(self._file(path, "driver")).type != FileType.File:
            return "missing" if files.get_file_info(path).type == FileType.NotFound else "other"
        with files.open_input_stream(self._file(path, "driver")) as file:
            if file.read() != self.name.encode():
                return "other"
        _write(files, self._file(path, node), self.name)
        return "same"

    def seen(self, nodes: Iterable[str]) -> set[str]:
        """Nodes whose files the driver sees; a network disk may take some seconds to show them."""
        from pyarrow.fs import FileType

        files, path = _opened(self.folder)
        missing = set(everyone := list(nodes))
        for pause in LOOK_AGAIN:
            time.sleep(pause)
            missing = {n for n in missing if files.get_file_info(self._file(path, n)).type != FileType.File}
            if not missing:
                break
        return set(everyone) - missing

    def remove(self) -> None:
        """Remove the files, and the folders that were not there before where nothing else is in them."""
        from pyarrow.fs import FileSelector, FileType

        files, path = _opened(self.folder)
        if files.get_file_info(self._inside(path)).type != FileType.NotFound:
            files.delete_dir(self._inside(path))
        for folder in self._absent or ():
            if files.get_file_info(folder).type == FileType.Directory:
                if files.get_file_info(FileSelector(folder)):
                    break
                files.delete_dir(folder)

    def _inside(self, path: str) -> str:
        return posixpath.join(path, f".hpcl-nodes-{self.name}")

    def _file(self, path: str, who: str) -> str:
        return posixpath.join(self._inside(path), who)


def _done(marks: Marks, action: Callable[[], _T]) -> _T:
    """What the driver's action on the folder of results gives; a UserError where the folder refuses or hangs."""
    try:
        return within(DISK_SECONDS, action)
    except TimeoutError as error:
        raise UserError(f"{marks.folder}: {error}; see that its server is up, or give another --results") from None
    except OSError as error:
        how = "give the user of the cluster the right to write there, or another --results"
        raise UserError(f"{marks.folder}: cannot be written ({reason_of(error)}); {how}") from None


def _opened(folder: str) -> tuple[Any, str]:
    """pyarrow's file system of a folder, and its path there."""
    from pyarrow.fs import LocalFileSystem

    return opened(place(folder)) if is_uri(folder) else (LocalFileSystem(), str(place(folder).absolute()))


def _write(files: Any, path: str, text: str) -> None:
    with files.open_output_stream(path) as file:
        file.write(text.encode())


# ---------------------------------------------------------------- on each node


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    """The task: plain values, so that another version of this package can read them."""
    facts: dict[str, Any] = {"versions": versions(), "token": _asks_for_token()}
    if asked["folder"]:
        marks = Marks(asked["folder"], asked["name"])
        try:
            facts["folder"] = within(DISK_SECONDS, lambda: marks.meet(asked["node"]))
        except TimeoutError:
            facts["folder"] = "silent"
        except Exception as error:  # each file system has its own
            facts |= {"folder": "refused", "folder_error": reason_of(error)}
    if asked["data"]:
        try:
            facts["data"] = within(DATA_SECONDS, lambda: look_at_data(asked["data"])).model_dump()
        except TimeoutError:
            facts["data"] = {"slow": True}
    if asked["machine"]:
        facts["machine"] = look(asked["folder"], ray_folder().parents[1] / "ray").model_dump()
    return {**facts, "clock": time.time()}


def _asks_for_token() -> bool:
    try:
        from ray._private.authentication.authentication_utils import is_token_auth_enabled
    except ImportError:  # another Ray
        return False
    return bool(is_token_auth_enabled())


def _answers(waiting: dict[Any, NodeFacts], seconds: float) -> Iterable[tuple[NodeFacts, NodeFacts]]:
    """Each node with what it said, as the answers come; the silent ones at the end."""
    import ray

    until = time.monotonic() + seconds
    try:
        while waiting and (left := until - time.monotonic()) > 0:
            for ref in ray.wait(list(waiting), timeout=left)[0]:
                now = time.time()
                node = waiting.pop(ref)
                try:
                    said = ray.get(ref, timeout=10)
                    facts = node.model_dump() | said | {"ahead": said["clock"] - now}
                    yield node, NodeFacts.model_validate(facts)
                except Exception as error:  # the node died, or its hpcl is another
                    yield node, node.model_copy(update={"silent": _why(error)})
        for node in waiting.values():
            yield node, node.model_copy(update={"silent": f"no answer within {seconds:g} s"})
    finally:
        for ref in waiting:
            ray.cancel(ref, force=True)


def _why(error: Exception) -> str:
    text = str(error)
    if "No module named 'hpcl" in text:
        return "hpcl cannot be imported there"
    name = type(error).__name__
    if name in ("NodeDiedError", "TaskUnschedulableError", "WorkerCrashedError"):
        return "the node, or the process of the check there, has died"
    lines = [line for line in text.splitlines() if line.strip()]
    return f"the check failed there ({(lines[-1] if lines else name).strip()[:200]})"


def _named(nodes: Sequence[dict[str, Any]], mine: str) -> list[NodeFacts]:
    addresses = [node["NodeManagerAddress"] for node in nodes]
    found = [
        NodeFacts(
            name=address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:6]})",
            node_id=node["NodeID"],
            here=node["NodeID"] == mine,
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node, address in zip(nodes, addresses, strict=True)
    ]
    return sorted(found, key=lambda node: not node.here)


# ---------------------------------------------------------------- in a process of its own


def main(request: str, tell: Callable[[dict[str, Any]], None]) -> None:
    """Connect to Ray, look at its nodes, and tell both; what Ray does to the process ends with it.

    Args:
        request: JSON: address (null: start Ray here), workers (of a trial), and the
            arguments of :func:`look_at_nodes`.
        tell: gets {"seconds": to connect, "nodes": Ray's account of them}, then {"facts": of the nodes, "refused": why
            the driver itself cannot write into the folder of results, or nothing}; or {"error": ...}.
    """
    asked = json.loads(request)
    start = time.monotonic()
    try:
        with connected(asked.pop("address"), workers=asked.pop("workers")):
            resources = [{"Resources": node["Resources"]} for node in alive_nodes()]
            tell({"seconds": time.monotonic() - start, "nodes": resources})
            refused = ""
            try:
                nodes = look_at_nodes(**asked)
            except UserError as error:
                refused = _in_a_line(error)
                nodes = look_at_nodes(**{**asked, "folder": None})
            tell({"facts": [node.model_dump() for node in nodes], "refused": refused})
    except Exception as error:
        tell({"error": _in_a_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"[:300]})


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as _out:
        os.dup2(2, 1)  # what Ray prints does not come between

        def _tell(said: dict[str, Any]) -> None:
            print(json.dumps(said), file=_out, flush=True)

        with suppress(KeyboardInterrupt):
            main(sys.argv[1], _tell)
