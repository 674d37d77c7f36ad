"""``hpcl doctor``: what is amiss with this machine or cluster, and what to do about it.

Everything is tried and every line printed as soon as it is known. What may hang, crash or
leave something behind runs in processes of its own (`probe`, `nodes`), each with a time
limit; `diagnosis` and `agreement` say what the facts mean.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hpcl
from hpcl.errors import ConfigError

if TYPE_CHECKING:
    from hpcl.search.diagnosis import Finding
    from hpcl.search.facts import Machine
    from hpcl.search.plan import Node
    from hpcl.search.space import Space

START_SECONDS = 180.0
"""Seconds for Ray to start here; a busy machine of two cores took 60."""
CONNECT_SECONDS = 90.0
"""Seconds for a cluster to answer; Ray itself tries for minutes."""
NODES_SECONDS = 300.0
"""Seconds to look at all nodes: what they may take (:data:`hpcl.search.nodes.SECONDS`), and the driver's own files."""
LEAVE_SECONDS = 20.0
"""Seconds for Ray to end before it is killed."""


def main(
    *,
    address: str | None = None,
    results: str = "results",
    data: str | None = None,
    space: Path | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Look at everything; returns the exit code: 0 without faults, 1 with faults, 130 after Ctrl-C.

    Args:
        address: of a running Ray cluster; None: Ray is started on this machine for the check.
        results: folder of all results, or a URI.
        data: a source of images to look for on every node; None: that of the space, if there is one.
        space: a space file, whose plan is computed for what was found.
        say: prints one line.

    Raises:
        UserError: the space file is wrong.
    """
    from hpcl.search import space as spaces
    from hpcl.search.interrupt import interruptible

    asked = spaces.with_overrides(spaces.load(space), data=data) if space else None
    source = asked.base.data.source if asked else data
    faults = notes = 0

    def tell(found: Finding) -> None:
        nonlocal faults, notes
        faults += found.level == "fault"
        notes += found.level == "note"
        for line in as_lines(found):
            say(line)

    with interruptible():
        try:
            _examine(address, _full(results), _full(source) if source else None, asked, say, tell)
        except KeyboardInterrupt:
            say("interrupted; nothing was left behind")
            return 130
    texts = [f"{n} {noun}{'s' * (n != 1)}" for n, noun in ((faults, "fault"), (notes, "note")) if n]
    say("")
    say(" and ".join(texts) if faults else f"no faults{f', {texts[0]}' if texts else ''}")
    return int(faults > 0)


def as_lines(found: Finding) -> list[str]:
    """A finding as it is printed: a line, and one for what to do."""
    first = f"{found.level:<7}{found.about:<11}"
    lines = [(first, found.says), *([(" " * (len(first) - 3) + "-> ", found.do)] if found.do else [])]
    if not sys.stdout.isatty():
        return [begin + text for begin, text in lines]
    width = max(60, shutil.get_terminal_size().columns)
    wrapped = [
        textwrap.wrap(
            text, width, initial_indent=begin, subsequent_indent=" " * len(begin), break_long_words=False,
            break_on_hyphens=False,
        )
        for begin, text in lines
    ]  # fmt: skip
    return [line for each in wrapped for line in each]


def _examine(
    address: str | None,
    results: str,
    data: str | None,
    space: Space | None,
    say: Callable[[str], None],
    tell: Callable[[Finding], None],
) -> None:
    from hpcl.search import agreement, diagnosis, elastic
    from hpcl.search.diagnosis import Finding
    from hpcl.search.facts import NodeFacts
    from hpcl.search.machine import local_node
    from hpcl.search.probe import look

    say(f"hpcl {hpcl.__version__}: looking at this machine, then at Ray; half a minute or so")
    here = look(results)
    for finding in diagnosis.of_machine(here):
        tell(finding)
    if here.ray.error or any(each.level == "fault" for each in [diagnosis.ray(here)]):
        tell(Finding("note", "Ray", "was not started, for the fault above; nodes and results were not looked at"))
        return
    machines: list[Node] = [local_node()] if address is None else []
    workers = space.resources.workers if space else 1
    request = {"address": address, "workers": workers, "data": data, "machine": address is not None}
    with _Asking(request, results) as asking:
        first = asking.next(START_SECONDS if address is None else CONNECT_SECONDS)
        if "error" in first:
            tell(agreement.no_ray(first["error"], address, asking.logs()))
        else:
            machines = elastic.machines(first["nodes"])
            tell(agreement.ray_answers(address, first["seconds"]))
            second = asking.next(NODES_SECONDS)
            if "error" in second:
                how = "give the command again; see `ray status`"
                tell(Finding("fault", "nodes", f"could not be looked at: {second['error']}", how))
            else:
                nodes = [NodeFacts.model_validate(facts) for facts in second["facts"]]
                for finding in agreement.of_nodes(nodes, here, folder=results, data=data, cluster=bool(address)):
                    tell(finding)
                if second["refused"]:
                    tell(agreement.refused(second["refused"]))
    if space is not None and machines:
        for finding in plan(space, machines, address or "this machine", here):
            tell(finding)


def plan(space: Space, machines: list[Node], cluster: str, here: Machine) -> list[Finding]:
    """How a space fits these machines."""
    from hpcl.search.diagnosis import Finding, memory_for
    from hpcl.search.plan import counted, make_plan

    try:
        made = make_plan(space, machines, cluster=cluster, folder=Path(space.name))
    except ConfigError as error:
        return [Finding("fault", "plan", f"{space.name}: {problem}", "see --dry-run") for problem in error.problems]
    room = made.concurrency
    each = room.each(space.resources.workers)
    text = f"{space.name}: {counted(room.trials, 'trial')} at a time, each {each}, on {made.cluster}"
    findings = [Finding("ok", "plan", text)]
    return findings + (memory_for(here, room.trials) if len(machines) == 1 else [])


def _full(path: str) -> str:
    """A folder or source by the name that other machines know it by.

    Raises:
        UserError: it is the URI of nothing.
    """
    from hpcl.search.places import is_uri, place
    from hpcl.search.probe import DISK_SECONDS, within

    if path == "mnist5k" or is_uri(path):
        return path
    try:
        return str(within(DISK_SECONDS, lambda: place(path).resolve()))
    except (OSError, RuntimeError):  # no answer, a name too long, the home of an unknown user
        return path


class _Asking:
    """A process of its own that connects to Ray and looks at its nodes (:func:`hpcl.search.nodes.main`).

    When the block ends, the process, its Ray and everything it wrote are gone.

    Args:
        request: for that function, all but the results.
        results: folder of results.
    """

    def __init__(self, request: dict[str, Any], results: str) -> None:
        from hpcl.search.nodes import Marks

        self._marks = Marks(results, secrets.token_hex(8))
        self._request = json.dumps({**request, "folder": results, "name": self._marks.name})
        self._told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the block)
        self._keep: Path | None = None
        self._hangs = False

    def __enter__(self) -> _Asking:
        from hpcl.search.probe import DISK_SECONDS, python_here, within

        with suppress(Exception):  # told later, by the process
            within(DISK_SECONDS, self._marks.look)
        self._before = _sessions()
        command, environment = python_here("-m", "hpcl.search.nodes", self._request)
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            start_new_session=True,  # Ctrl-C is for us: we end it gently
        )
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def next(self, seconds: float) -> dict[str, Any]:
        """What it tells next; {"error"} where it tells nothing within this time."""
        try:
            line = self._told.get(timeout=seconds)
        except queue.Empty:
            self._hangs = True
            return {"error": f"no answer within {seconds:g} s"}
        if not line:
            self._complaints.seek(0)
            last = self._complaints.read().strip().splitlines() or [f"exit code {self._process.wait()}"]
            return {"error": f"the process that asked it has crashed ({last[-1][:200]})"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def logs(self) -> Path | None:
        """The logs of a Ray that was started here, which then stay."""
        self._keep = next((each / "logs" for each in self._sessions()), None)
        return self._keep

    def __exit__(self, kind: object, *error: object) -> None:
        from hpcl.search.interrupt import SIGNALS
        from hpcl.search.probe import DISK_SECONDS, within

        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS if is_main}
        try:
            self._end(LEAVE_SECONDS if kind is None and not self._hangs else 0.0)
            with suppress(Exception):  # where the process could not do it any more
                within(DISK_SECONDS, self._marks.remove)
            for session in self._sessions() if self._keep is None else ():
                shutil.rmtree(session, ignore_errors=True)
                latest = session.parent / "session_latest"
                if latest.is_symlink() and not latest.exists():
                    latest.unlink(missing_ok=True)
        finally:
            self._complaints.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with suppress(ValueError):  # closed
            for line in self._process.stdout:
                self._told.put(line)
        self._told.put("")

    def _end(self, patience: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=patience)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=LEAVE_SECONDS)

    def _sessions(self) -> list[Path]:
        ours = f"_{self._process.pid}"
        return [session for session in _sessions() - self._before if session.name.endswith(ours)]


def _sessions() -> set[Path]:
    """The folders of private Rays on this machine."""
    from hpcl.search.cluster import ray_folder

    return set(ray_folder().glob("session_*_*"))
