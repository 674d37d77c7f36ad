"""What the nodes of a cluster mean for a search, and whether they agree: facts in, sentences out, as `diagnosis`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hpcl.search.diagnosis import Finding, of_machine
from hpcl.search.facts import DataFacts, Machine, NodeFacts
from hpcl.search.nodes import named, storage_faults
from hpcl.search.plan import Node, counted, describe_nodes

CLOCK_SECONDS = 5.0
"""Clocks that differ by more make times in tables and logs misleading."""


def of_nodes(
    nodes: Sequence[NodeFacts], here: Machine, *, folder: str, data: str | None, cluster: bool
) -> list[Finding]:
    """What there is to say of the nodes of a cluster.

    Args:
        nodes: of the cluster.
        here: the machine that this runs on.
        folder: of results, as the user may know it.
        data: the source of images; None: not looked at.
        cluster: whether it was reached at an address; else it is Ray on this machine.
    """
    alive = [node for node in nodes if not node.silent]
    findings = answers(nodes) if cluster else []
    findings += [Finding("fault", "nodes", *each) for each in _silent(nodes)]
    if cluster:
        findings += [*same(alive, _versions(here)), *clocks(alive), *authentication(alive), *others(alive)]
        findings += [counts for node in alive if (counts := ray_counts_gpus(node, here))]
    findings += [Finding("fault", "results", *each) for each in storage_faults(nodes, folder)]
    where = " from every node" if cluster else ""
    if alive and all(node.folder == "same" for node in alive):
        findings.append(Finding("ok", "results", f"{folder} can be written and read{where}"))
    return findings + (images(alive, data, where) if data is not None else [])


def ray_answers(address: str | None, seconds: float) -> Finding:
    """Ray started, or the cluster answered."""
    what = "starts here" if address is None else f"answers at {address}"
    return Finding("ok", "Ray", f"{what} ({seconds:.0f} s)")


def no_ray(error: str, address: str | None, logs: Path | None = None) -> Finding:
    """Ray did not start, or no cluster answered.

    Args:
        error: why, and after a semicolon what to do.
        address: of the cluster; None: Ray was to start on this machine.
        logs: where that Ray said more.
    """
    says, _, how = error.partition("; ")
    if address is None:
        if "did not start" not in says:
            says = f"Ray did not start on this machine: {says}"
        if "AF_UNIX" in says:
            how = "name a folder with a short path, such as /tmp, with RAY_TMPDIR"
        elif not how or "give the command again" in how:
            how = f"{f'see its logs in {logs}; ' if logs else ''}with memory and disk to spare, try once more"
    elif "Version mismatch" in error:
        how = "install here the Ray and the Python that the cluster has (ray --version; python --version there)"
    elif re.search("token|authenticat", error, re.IGNORECASE):
        how = "copy the cluster's ~/.ray/auth_token to the same place here, and export RAY_AUTH_MODE=token"
    else:
        how = "see `ray status` on its head: is it up, is this its address, is the port open from here?"
        if "--address" not in says:
            says = f"--address {address}: {says}"
    return Finding("fault", "Ray", says, how)


def refused(error: str) -> Finding:
    """The folder of results refuses this machine; `error` says why, and after a semicolon what to do."""
    says, _, how = error.rpartition("; ")
    return Finding("fault", "results", says or error, how if says else "give another --results")


def answers(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Who is there, and who answers."""
    alive = [node for node in nodes if not node.silent]
    if not alive:
        return []
    names = [f"{node.name}{' (here)' if node.here else ''}" for node in alive]
    shown = ", ".join(names if len(names) <= 8 else [*names[:8], f"{len(names) - 8} more"])
    what = describe_nodes([Node(node.cpus, node.gpus) for node in alive])
    answer = "answers" if len(alive) == 1 else "answer"
    return [Finding("ok", "nodes", f"{len(alive)} of {counted(len(nodes), 'node')} {answer}: {shown}; {what}")]


def _silent(nodes: Sequence[NodeFacts]) -> list[tuple[str, str]]:
    faults = []
    for reason in dict.fromkeys(node.silent for node in nodes if node.silent):
        who = named([node.name for node in nodes if node.silent == reason])
        if "cannot be imported" in reason:
            how = "install this project there too, in the Python that Ray runs with: pip install -e ."
        else:
            how = "see whether it is up (ray status), and its logs; ray stop and ray start there bring it back"
        faults.append((f"{who}: {reason}", how))
    return faults


def same(alive: Sequence[NodeFacts], here: Mapping[str, str]) -> list[Finding]:
    """Whether all nodes run what runs here (:func:`hpcl.search.probe.versions`)."""
    findings = []
    for what in ("Python", "Ray", "torch", "hpcl"):
        version = _version(here, what)
        theirs = {node.name: _version(node.versions, what) for node in alive}
        for other in dict.fromkeys(v for v in theirs.values() if v != version):
            who = named([name for name, v in theirs.items() if v == other])
            text = f"{who}: {what} {other or 'is not installed'}, but {version or 'not installed'} here"
            how = "install the same on every node"
            if what == "hpcl":
                text += ": trials there would train with other code"
                how = "bring the same state of this project to every node, and restart Ray there"
            minor = what == "Python" and other.split(".")[:2] == version.split(".")[:2]
            findings.append(Finding("note" if minor else "fault", "versions", text, how))
    if alive and not findings:
        text = ", ".join(f"{what} {_version(here, what)}" for what in ("Python", "Ray", "torch", "hpcl"))
        findings.append(Finding("ok", "versions", f"the same on every node and here: {text}"))
    return findings


def _versions(machine: Machine) -> dict[str, str]:
    whole = {"ray": machine.ray.version, "torch": machine.torch.version.partition("+")[0]}
    return {"python": machine.python, "hpcl": machine.hpcl, "code": machine.code, **whole}


def _version(found: Mapping[str, str], what: str) -> str:
    return f"{found.get('hpcl')} ({found.get('code', '')[:8]})" if what == "hpcl" else found.get(what.lower(), "")


def clocks(alive: Sequence[NodeFacts]) -> list[Finding]:
    """Whether the nodes' clocks agree with the one here."""
    findings = []
    for node in alive:
        if abs(node.ahead) > CLOCK_SECONDS:
            way = "ahead of" if node.ahead > 0 else "behind"
            text = f"the clock of node {node.name} is {abs(node.ahead):.0f} s {way} the one here: times in logs mislead"
            findings.append(
                Finding("note", "clocks", text, "turn on time synchronisation there (timedatectl set-ntp true)")
            )
    return findings


def authentication(alive: Sequence[NodeFacts]) -> list[Finding]:
    """Whether whoever reaches the cluster can run code on it."""
    without = [node.name for node in alive if not node.token]
    if without:
        who = "the cluster asks" if len(without) == len(alive) else f"{named(without)} of the cluster: Ray there asks"
        text = f"{who} for no token: whoever reaches its ports can run any program on it"
        how = "keep the ports closed, and start Ray on all nodes with RAY_AUTH_MODE=token and one ~/.ray/auth_token"
        return [Finding("note", "token", text, how)]
    return [Finding("ok", "token", "the cluster asks for a token")] if alive else []


def others(alive: Sequence[NodeFacts]) -> list[Finding]:
    """Notes and faults of the other nodes' machines, equal ones once; what they have in a line."""
    told: dict[Finding, list[str]] = {}
    for node in alive:
        if node.machine is not None:
            for finding in of_machine(node.machine):
                if finding.level != "ok" or (finding.about == "GPUs" and node.machine.torch.gpus):
                    told.setdefault(finding, []).append(node.name)
    return [replace(finding, says=f"{named(names)}: {finding.says}") for finding, names in told.items()]


def ray_counts_gpus(node: NodeFacts, here: Machine) -> Finding | None:
    """Whether Ray counts the GPUs that torch can use there."""
    machine = node.machine or (here if node.here else None)
    if machine is None or machine.torch.error or int(node.gpus) == len(machine.torch.gpus):
        return None
    can = len(machine.torch.gpus)
    text = f"Ray counts {counted(node.gpus, 'GPU')} on node {node.name}, torch can use {can}"
    if node.gpus > can:
        return Finding("fault", "GPUs", f"{text}: trials placed there would fail", f"ray start --num-gpus={can} there")
    how = "start Ray there without CUDA_VISIBLE_DEVICES and --num-gpus, to use all"
    return Finding("note", "GPUs", f"{text}: some stay idle", how)


def images(alive: Sequence[NodeFacts], data: str, where: str) -> list[Finding]:
    """Whether all nodes can read the same images."""
    findings = []
    known = {node.name: node.data for node in alive if node.data is not None}
    if slow := [name for name, facts in known.items() if facts.slow]:
        text = f"{named(slow)}: {data} is there, but its files could not be looked through in a minute"
        findings.append(Finding("note", "images", text, "with very many small files, Parquet reads faster"))
    for error in dict.fromkeys(facts.error for facts in known.values() if facts.error):
        these = [name for name, facts in known.items() if facts.error == error]
        everywhere = len(these) == len(known)
        how = "give images that are there: --data"
        if not everywhere:
            how = "copy the images to the same path on every node, or use a disk that all nodes share"
        findings.append(Finding("fault", "images", error if everywhere else f"{named(these)}: {error}", how))
    read = {name: facts for name, facts in known.items() if not facts.error and not facts.slow}
    groups: dict[DataFacts, list[str]] = {}
    for name, facts in read.items():
        groups.setdefault(facts, []).append(name)
    if len(groups) > 1:
        parts = [f"{counted(facts.files, 'file')} on {named(these)}" for facts, these in groups.items()]
        text = f"{data} is not the same everywhere: {'; '.join(parts)}"
        how = "copy the same files to every node, or use a disk that all nodes share"
        findings.append(Finding("fault", "images", text, how))
    elif groups and not findings:
        files = next(iter(groups)).files
        size = f" ({counted(files, 'file')})" if files else ""
        findings.append(Finding("ok", "images", f"{data}{size} can be read{where}"))
    for text in dict.fromkeys(facts.left_out for facts in read.values() if facts.left_out):
        findings.append(
            Finding("note", "images", f"left out: {text}", "give the user of the cluster the right to read")
        )
    return findings
