"""clusters/rehearse.py plays clusters/local.yaml on one computer: what it fills in, what it needs, all of it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "clusters" / "local.yaml"


@pytest.fixture
def rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rehearse", ROOT / "clusters" / "rehearse.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RACK", tmp_path)
    monkeypatch.setattr(module, "PROJECT", tmp_path)
    return module


def test_the_shipped_file_becomes_a_rack_by_its_four_marked_lines(rehearse: ModuleType, tmp_path: Path) -> None:
    own = tmp_path / "shipped.yaml"
    own.write_text(SHIPPED.read_text())
    filled = yaml.safe_load(rehearse.fill_in(own).read_text())
    shipped = yaml.safe_load(SHIPPED.read_text())
    assert filled["provider"] == {"type": "local", "head_ip": "10.77.0.10", "worker_ips": ["10.77.0.11", "10.77.0.12"]}
    assert filled["auth"] == {"ssh_user": "root", "ssh_private_key": str(rehearse.KEY)}
    assert {k: v for k, v in filled.items() if k not in ("provider", "auth")} == {
        k: v for k, v in shipped.items() if k not in ("provider", "auth")
    }


def test_a_file_without_a_mark_is_not_a_rack(rehearse: ModuleType, tmp_path: Path) -> None:
    own = tmp_path / "shipped.yaml"
    own.write_text(SHIPPED.read_text().replace("# <- not root", "# not root"))
    with pytest.raises(rehearse.Failed, match="ssh_user"):
        rehearse.fill_in(own)


def test_what_is_missing_is_said_before_anything_is_made(
    rehearse: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda tool, path=None: None if tool in ("sshd", "rsync") else tool)
    text = "\n".join(rehearse.missing(tmp_path))
    assert "needs root" in text
    assert "apt-get install -y openssh-server rsync" in text
    assert f"--keep {tmp_path}: is there already" in text


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_rack_loses_a_host_and_no_trial() -> None:
    tools = ("ip", "unshare", "sshd", "rsync")
    if os.geteuid() != 0 or not all(shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") for tool in tools):
        pytest.skip("needs root, ip, unshare, sshd and rsync")
    command = [sys.executable, str(ROOT / "clusters" / "rehearse.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "all checks held" in done.stdout
