"""The commands `hpcl train`, `knn` and `export`, as a user calls them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

from hpcl.checkpoint import load_checkpoint
from hpcl.cli import main
from hpcl.config import Config
from hpcl.results import read_rows
from hpcl.yamlio import write


def hpcl(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command line with these arguments."""
    monkeypatch.setattr("sys.argv", ["hpcl", *arguments])
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.yaml of a ResNet-18 and its run in run/."""
    folder = tmp_path_factory.mktemp("cli")
    config = Config.model_validate(TINY).with_values(
        {
            "model.backbone": "resnet18",
            "model.stem": "imagenet",
            "data.subset": 0.03,
            "optimizer.batch": 30,
            "moco.queue": 60,
            "stages.total": 5,
            "meters.knn_every": 0,
        }
    )
    write(folder / "config.yaml", config)
    with pytest.MonkeyPatch.context() as patch:
        assert hpcl(patch, "train", str(folder / "config.yaml"), "--folder", str(folder / "run")) == 0
    return folder


def test_train_resumes_what_is_there(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_rows(trained / "run" / "epochs.parquet")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert hpcl(monkeypatch, "train", str(trained / "config.yaml"), "--folder", str(trained / "run")) == 0
    out = capsys.readouterr().out
    assert "mnist5k" in out.splitlines()[0]
    assert f"going on in: {trained / 'run'}" in out
    assert "epoch   5" in out and "epoch   4" not in out
    assert "finished 5 epochs; next: hpcl evaluate" in out
    assert read_rows(trained / "run" / "epochs.parquet") == rows


def test_train_takes_overrides(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--folder", str(tmp_path / "run"), "--epochs", "5", "--set", "model.backbone=convnet"]
    assert hpcl(monkeypatch, "train", str(trained / "config.yaml"), *arguments) == 0
    assert "backbone: convnet" in (tmp_path / "run" / "config.yaml").read_text()
    assert "linear probe on the validation split: 0." in capsys.readouterr().out


def test_export_loads_into_torchvision(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torchvision

    checkpoint, out = trained / "run" / "checkpoint.pt", tmp_path / "backbone.pt"
    assert hpcl(monkeypatch, "export", str(checkpoint), str(out)) == 0
    state = torch.load(out, weights_only=True)
    resnet = torchvision.models.resnet18()
    resnet.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)  # gray images
    keys = resnet.load_state_dict(state, strict=False)
    assert sorted(keys.missing_keys) == ["fc.bias", "fc.weight"]
    assert not keys.unexpected_keys


def test_knn_of_a_checkpoint(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpcl(monkeypatch, "knn", str(trained / "run" / "checkpoint.pt"), "--k", "20") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "on 500 test images (k = 20, T = 0.1)" in line
    assert 0.1 < float(line.split()[2]) <= 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "absent.yaml"], "absent.yaml"),
        (["knn", "absent.pt"], "absent.pt: no such file"),
        (["knn", "absent.pt", "--split", "all"], "--split is all, but must be val or test"),
        (["knn", "absent.pt", "--temperature", "0"], "--temperature is 0.0, but must be above 0"),
        (["export", "absent.pt", "out.pt", "--side", "both"], "--side is both, but must be query or key"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hpcl(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.backbone=resnet81", "model.backbone is resnet81, but must be one of"),
        ("runtime.device=cuda", "runtime.device is cuda, but torch sees no GPU"),
        ("clusters.backend=faiss", "clusters.backend is faiss, but faiss is not installed"),
        ("model.bn_splits=64", "optimizer.batch is 64, but must leave at least 2 images"),
    ],
)
def test_settings_that_cannot_run_here_are_told_before_training(
    setting: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "faiss", None)
    write(tmp_path / "config.yaml", Config.model_validate(TINY))
    assert (
        hpcl(monkeypatch, "train", str(tmp_path / "config.yaml"), "--folder", str(tmp_path / "run"), "--set", setting)
        == 2
    )
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_places_that_cannot_be_written_are_told(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert hpcl(monkeypatch, "train", str(trained / "config.yaml"), "--folder", str(tmp_path / "file")) == 2
    assert f"{tmp_path / 'file'}: cannot be written" in capsys.readouterr().err
    checkpoint, out = trained / "run" / "checkpoint.pt", tmp_path / "file" / "out.pt"
    assert hpcl(monkeypatch, "export", str(checkpoint), str(out)) == 2
    assert f"{out}: cannot be written" in capsys.readouterr().err


def test_a_checkpoint_of_another_version_is_told(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    state = load_checkpoint(trained / "run" / "checkpoint.pt")
    state["config"]["moco"]["gone"] = 1
    torch.save(state, tmp_path / "old.pt")
    assert hpcl(monkeypatch, "knn", str(tmp_path / "old.pt")) == 2
    assert "the checkpoint's configuration: moco.gone: there is no such field" in capsys.readouterr().err


def test_a_torn_checkpoint_is_not_trained_over(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = (trained / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert hpcl(monkeypatch, "train", str(trained / "config.yaml"), "--folder", str(tmp_path)) == 2
    assert "checkpoint.pt cannot be read" in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    for name, words in (("text.pt", "not a readable checkpoint"), ("other.pt", "not a checkpoint of hpcl")):
        assert hpcl(monkeypatch, "knn", str(tmp_path / name)) == 2
        assert words in capsys.readouterr().err


def test_loading_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    from hpcl.checkpoint import load_checkpoint
    from hpcl.errors import UserError

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"format": 1, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
