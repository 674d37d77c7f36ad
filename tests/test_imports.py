"""What may import what: the learning core without ray, optuna, faiss and timm; the import layers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""

TRAIN = """
sys.path.insert(0, {tests!r})
from conftest import TINY
from hpcl import Config, fit

rows = fit(Config.model_validate(TINY).with_values({{"stages.total": 5}}), {folder!r}).rows
print(rows[-1]["state"])
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)


def test_training_needs_neither_ray_nor_optuna_nor_faiss_nor_timm(tmp_path: Path) -> None:
    code = BLOCK.format(names={"ray", "optuna", "faiss", "timm"}) + TRAIN.format(
        tests=str(Path(__file__).parent), folder=str(tmp_path)
    )
    done = python(code)
    assert done.stdout.strip() == "finished", done.stderr


@pytest.mark.parametrize("name", ["ray", "optuna", "faiss", "timm"])
def test_the_block_blocks(name: str) -> None:
    done = python(BLOCK.format(names={name}) + f"import {name}")
    assert done.returncode == 1
    assert f"No module named '{name}'" in done.stderr


@pytest.mark.parametrize(
    "code",
    ["import hpcl", "import hpcl.cli", "import hpcl.presets", "import hpcl.results", "import hpcl.backbone_names"],
)
def test_what_reads_settings_loads_nothing_heavy(code: str) -> None:
    done = python(f"{code}\nimport sys\nprint([n for n in ('torch', 'ray', 'optuna', 'pyarrow') if n in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr
