"""hpcl.backbones: networks by name are the libraries' own, up to the classifier."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor, nn

from hpcl.backbone_names import NAMES, TORCHVISION, name_problem
from hpcl.backbones import named_backbone
from hpcl.config import Config
from hpcl.data import load
from hpcl.downstream.distill import smaller
from hpcl.downstream.voc.detector import can_detect
from hpcl.errors import UserError
from hpcl.model import Network, build_network
from hpcl.pretrained import export_backbone, load_network, must_take
from hpcl.sections import Head, Model
from hpcl.trainer import fit

torchvision = pytest.importorskip("torchvision")

slow = pytest.mark.slow


def built(name: str, channels: int = 3, size: int = 32, **model: Any) -> Network:
    return build_network(Model(backbone=name, dim=6, **model), Head(), channels, 0, None, (size, size))


def images(channels: int, size: int, count: int = 4) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def all_learn(backbone: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Shape of the features, after every weight has been seen to get a gradient (ranks would wait for it)."""
    features: Tensor = backbone.train()(x)
    features.square().sum().backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []
    return tuple(features.shape)


# ---------------------------------------------------------------- torchvision's


@pytest.mark.parametrize(("channels", "stem"), [(3, "cifar"), (1, "cifar"), (3, "imagenet"), (1, "imagenet")])
def test_resnet_loads_into_torchvision(channels: int, stem: Any) -> None:
    network = build_network(Model(backbone="resnet18", stem=stem, dim=6), Head(), channels, seed=0).eval()
    assert network.feature_dim == 512
    state = network.backbone.state_dict()
    theirs = torchvision.models.resnet18(weights=None)
    kernel = 3 if stem == "cifar" else 7
    assert state["conv1.weight"].shape == (64, channels, kernel, kernel)
    if stem == "cifar" or channels != 3:
        theirs.conv1 = nn.Conv2d(channels, 64, kernel, padding=kernel // 2, stride=1 if kernel == 3 else 2, bias=False)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"]
    assert unexpected == []
    x = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = network.backbone(x)
        theirs.fc = nn.Identity()
        if stem == "cifar":
            theirs.maxpool = nn.Identity()
        torch.testing.assert_close(got, theirs.eval()(x))
    # a 32x32 image keeps its size through the cifar stem
    stem_layers = nn.Sequential(*(network.backbone.get_submodule(n) for n in ("conv1", "maxpool", "layer1")))
    assert stem_layers(x).shape[-1] == (32 if stem == "cifar" else 8)


CLASSIFIERS = [
    ("mobilenet_v3_small", 576),
    ("shufflenet_v2_x0_5", 1024),
    ("squeezenet1_1", 512),
    ("mnasnet0_5", 1280),
    pytest.param("densenet121", 1024, marks=slow),
    pytest.param("regnet_y_400mf", 440, marks=slow),
    pytest.param("efficientnet_b0", 1280, marks=slow),
    pytest.param("googlenet", 1024, marks=slow),
    pytest.param("convnext_tiny", 768, marks=slow),
    pytest.param("swin_t", 768, marks=slow),
    pytest.param("vgg11_bn", 512, marks=slow),
    pytest.param("wide_resnet50_2", 2048, marks=slow),
]


@pytest.mark.parametrize(("name", "width"), CLASSIFIERS)
def test_a_classifier_gives_what_its_own_classifier_would_get(name: str, width: int) -> None:
    network = built(name, stem="imagenet")
    assert network.feature_dim == width
    options = {"init_weights": False} if name == "googlenet" else {}
    theirs = torchvision.models.get_model(name, weights=None, **options).eval()
    missing, unexpected = theirs.load_state_dict(network.backbone.state_dict(), strict=False)
    assert unexpected == [] and {key.split(".")[0] for key in missing} <= {"fc", "head", "classifier", "aux1", "aux2"}
    seen: list[Tensor] = []
    place = next(child for child in ("fc", "head", "classifier") if hasattr(theirs, child))
    first = next(m for m in theirs.get_submodule(place).modules() if isinstance(m, nn.Linear | nn.Conv2d))
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = images(3, 32)
    with torch.no_grad():
        theirs(x)
        got = network.eval().backbone(x)
    (want,) = seen
    if name.startswith("vgg"):  # which spreads the map to 7x7 first
        want = theirs.features(x)
    torch.testing.assert_close(got, want.mean((2, 3)) if want.dim() == 4 else want)
    assert all_learn(network.backbone, x) == (4, width)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_a_gray_image_counts_as_three_equal_channels(name: str) -> None:
    gray, colour = built(name, channels=1).eval(), built(name, channels=3).eval()
    x = images(1, 32)
    with torch.no_grad():
        torch.testing.assert_close(gray.backbone(x), colour.backbone(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    differing = [
        n for n, v in gray.backbone.state_dict().items() if not torch.equal(v, colour.backbone.state_dict()[n])
    ]
    assert len(differing) == 1


def test_the_same_seed_gives_the_same_weights_and_the_global_generator_is_untouched() -> None:
    state = torch.get_rng_state()
    one = built("squeezenet1_1").state_dict()
    torch.rand(3)
    other = built("squeezenet1_1").state_dict()
    assert equal(one, other)
    torch.set_rng_state(state)
    built("mobilenet_v3_small")
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- the stem


def test_a_cifar_stem_keeps_the_size_of_small_images() -> None:
    for stem, size in (("cifar", 32), ("imagenet", 8)):
        body: Any = built("shufflenet_v2_x0_5", stem=stem).backbone
        assert body.maxpool(body.conv1(images(3, 32))).shape[-1] == size


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1"])
def test_a_stem_has_no_effect_on_other_networks(name: str) -> None:
    cifar, imagenet = built(name, stem="cifar").eval(), built(name, stem="imagenet").eval()
    assert equal(cifar.state_dict(), imagenet.state_dict())
    assert torch.equal(cifar.backbone(images(3, 32)), imagenet.backbone(images(3, 32)))


# ---------------------------------------------------------------- timm's


@pytest.mark.parametrize(
    ("name", "channels", "width"),
    [
        ("skresnet18", 1, 512),
        ("mobilenetv3_small_050", 3, 1024),
        pytest.param("resnet26d", 1, 2048, marks=slow),
        pytest.param("skresnet50", 3, 2048, marks=slow),
        pytest.param("convnext_atto", 3, 320, marks=slow),
    ],
)
def test_a_network_of_timm_is_timms(name: str, channels: int, width: int) -> None:
    timm = pytest.importorskip("timm")
    network = built(f"timm:{name}", channels, stem="imagenet")
    theirs = timm.create_model(name, num_classes=0, in_chans=channels)
    theirs.load_state_dict(network.backbone.state_dict())
    x = images(channels, 32)
    assert torch.equal(network.eval().backbone(x), theirs.eval()(x))
    assert network.feature_dim == width
    assert all_learn(network.backbone, x) == (4, width)


@pytest.mark.parametrize(("name", "kernel"), [("skresnet18", 3), pytest.param("resnet26d", 3, marks=slow)])
def test_the_stem_of_timms_resnets(name: str, kernel: int) -> None:
    pytest.importorskip("timm")
    for stem, size in (("cifar", 32), ("imagenet", 8)):
        body: Any = built(f"timm:{name}", 1, stem=stem).backbone
        first = body.conv1[0] if isinstance(body.conv1, nn.Sequential) else body.conv1
        assert first.in_channels == 1 and (stem == "imagenet" or first.kernel_size == (kernel, kernel))
        assert body.maxpool(body.act1(body.bn1(body.conv1(images(1, 32))))).shape[-1] == size


def test_a_network_for_one_size_is_made_for_the_images() -> None:
    pytest.importorskip("timm")
    for size in (32, 48):
        assert built("timm:vit_tiny_patch16_224", 1, size).eval().backbone(images(1, size)).shape == (4, 192)


@slow
def test_vision_transformers_of_torchvision_take_the_size_of_the_images() -> None:
    assert all_learn(built("vit_b_16", 3, 48).backbone, images(3, 48)) == (4, 768)
    assert all_learn(built("maxvit_t", 3, 56 * 4).backbone, images(3, 56 * 4, 2)) == (2, 512)


# ---------------------------------------------------------------- what cannot be


def test_names_are_those_of_the_installed_torchvision() -> None:
    models = torchvision.models
    assert list(TORCHVISION) == sorted(models.list_models(module=models))
    assert NAMES[0] == "convnet" and all(name_problem(name) is None for name in NAMES)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet81", r"model.backbone is resnet81, but must be one of convnet, timm:.* did you mean resnet18\?"),
        ("Resnet18", r"model.backbone is Resnet18, but must be one of .* did you mean resnet18\?"),
        ("timm:skresnet51", r"but timm \d.* has no network of this name; did you mean timm:skresnet50\?; for all"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "has no network of this name"),
        ("timm:local-dir:/tmp", "has no network of this name"),
        ("timm:", "has no network of this name"),
    ],
)
def test_unknown_names_are_told_with_the_nearest(name: str, words: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=words):
        built(name)


def test_without_timm_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm:skresnet18, which needs timm, which is not.*pip install 'hpcl\[timm\]'"):
        built("timm:skresnet18")


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        (
            "alexnet",
            32,
            r"alexnet, which cannot take images of 3x32x32 \(.*too small\); set data.size",
        ),
        ("timm:vit_tiny_patch16_224", 8, r"cannot take images of 3x8x8"),
        pytest.param("inception_v3", 32, r"inception_v3, which cannot take images of 3x32x32", marks=slow),
        pytest.param("vit_b_16", 28, r"vit_b_16, which cannot take images of 3x28x28", marks=slow),
        pytest.param("maxvit_t", 64, r"maxvit_t, which cannot take images of 3x64x64", marks=slow),
    ],
)
def test_a_size_that_a_network_cannot_take_is_told(name: str, size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        built(name, size=size)


def test_images_of_another_size_than_a_checkpoints_are_told() -> None:
    pytest.importorskip("timm")
    digits = load(Config.model_validate(TINY).data)  # 28x28
    network = built("timm:vit_tiny_patch16_224", 1, 32).eval()
    with pytest.raises(UserError, match=r"images of 28x28, which the checkpoint's backbone cannot take .*as large as"):
        must_take(network, 1, digits)
    with pytest.raises(UserError, match="has 1 channels, but the network takes 3"):
        must_take(network, 3, digits)
    must_take(built("convnet", 1).eval(), 1, digits)


# ---------------------------------------------------------------- what uses them


def test_detection_is_for_convnets_and_torchvisions_resnets_alone() -> None:
    pytest.importorskip("timm")
    assert can_detect(built("resnet18"))
    assert not can_detect(built("timm:resnet10t"))
    assert not can_detect(built("squeezenet1_1"))


def test_smaller_students_of_other_networks() -> None:
    for name, want in {
        "timm:skresnet50": "resnet18",
        "timm:skresnet18": "convnet, width 32",
        "vgg11_bn": "convnet, width 32",
        "convnext_tiny": "convnet, width 32",
    }.items():
        assert smaller(Model(backbone=name))[0] == want


@pytest.mark.parametrize(
    "name",
    ["timm:mobilenetv3_small_050", pytest.param("squeezenet1_1", marks=slow), pytest.param("vgg11_bn", marks=slow)],
)
def test_a_run_is_trained_gone_on_with_and_exported(name: str, tmp_path: Path) -> None:
    config = Config.model_validate(TINY).with_values(
        {
            "model.backbone": name,
            "model.bn_splits": 2,
            "data.size": 32,
            "data.subset": 0.03,
            "optimizer.batch": 30,
            "moco.queue": 60,
            "meters.knn_every": 0,
            **{f"stages.stage{stage}.epochs": int(stage in (1, 3)) for stage in range(1, 6)},
        }
    )
    run = fit(config, tmp_path / "run")
    assert [row["state"] for row in run.rows] == ["running", "finished"]
    assert fit(config, tmp_path / "run").rows == run.rows  # from the checkpoint
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    _, network, channels = load_network(checkpoint)
    assert channels == 1 and equal(network.state_dict(), run.network.state_dict())
    said, names = export_backbone(checkpoint, tmp_path / "backbone.pt")
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert said == name and list(state) == names
    theirs, _ = named_backbone(Model(backbone=name), 1, (32, 32))
    theirs.load_state_dict(state)
