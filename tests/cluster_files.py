"""What tests of the cluster files share: where they are, and how Ray's own command line reads them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from ray.scripts import scripts

ROOT = Path(__file__).parent.parent
KUBERAY, SLURM, DOCS = ROOT / "clusters/kuberay.yaml", ROOT / "clusters/slurm.sbatch", ROOT / "docs/cluster.md"
LAUNCHED = [ROOT / "cluster.yaml", *sorted(set((ROOT / "clusters").glob("*.yaml")) - {KUBERAY})]
"""What `ray up` takes."""


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def code(path: Path) -> str:
    """The file without its comments."""
    return "\n".join(re.sub(r"(^|\s)#.*", "", line) for line in path.read_text().splitlines())


def options(command: str) -> dict[str, Any]:
    """The options of a `ray start`, read by Ray's own command line.

    Raises:
        click.UsageError: an option that Ray does not know.
    """
    words = shlex.split(command.partition("ray start ")[2].replace("$RAY_HEAD_IP", "10.0.0.1"))
    return dict(scripts.start.make_context("start", words).params)
