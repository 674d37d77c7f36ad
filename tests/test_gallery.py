"""Prototype galleries: what is found in a checkpoint, against loops; and the page that shows it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from galleries import Page
from pictures import class_folders, random_pixels, save
from sklearn.metrics import adjusted_mutual_info_score

from hpcl.analysis.report import gallery as shown
from hpcl.augment import centre_view
from hpcl.checkpoint import load_checkpoint, save_checkpoint
from hpcl.config import Config
from hpcl.data import ImageSet
from hpcl.errors import UnreadableCheckpoint, UserError
from hpcl.gallery import Gallery, gallery_of
from hpcl.pretrained import load_network
from hpcl.trainer import fit

Run = tuple[Path, list[dict[str, Any]]]

NESTED = {"stages.total": 5, "clusters.levels": 3, "clusters.maximum": 7}
"""Three levels of 2, 4 and 7 prototypes, which do not grow."""

SMALL = NESTED | {
    "data.subset": 1.0,
    "optimizer.batch": 16,
    "moco.queue": 16,
    "meters.views": 8,
    "meters.reference_clusters": 2,
}
"""The same on some dozens of images."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 405 digits."""
    folder = tmp_path_factory.mktemp("digits")
    fit(Config.model_validate(TINY).with_values(NESTED), folder)
    return folder / "checkpoint.pt"


@pytest.fixture(scope="module")
def found(checkpoint: Path) -> tuple[Gallery, ImageSet]:
    return gallery_of(checkpoint)


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 60 colour images 12x16 without labels; its images lie beside it."""
    folder = tmp_path_factory.mktemp("colour")
    for i in range(60):
        save(folder / "images" / f"{i:02}.png", random_pixels(i, height=12, width=16))
    config = Config.model_validate(TINY).with_values(SMALL | {"data.source": str(folder / "images")})
    fit(config, folder / "run")
    return folder / "run" / "checkpoint.pt"


def embeddings_of(checkpoint: Path, images: ImageSet) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N, D) key embeddings of the training images, through the MLP."""
    _, network, _ = load_network(checkpoint, "key")
    pixels = torch.from_numpy(images.images[images.train])
    with torch.no_grad():
        view = centre_view(pixels, torch.from_numpy(images.mean), torch.from_numpy(images.std))
        return network(view, use_head=True).double().numpy()


def assignments_of(checkpoint: Path) -> list[list[int]]:
    return [x.tolist() for x in load_checkpoint(checkpoint)["hierarchy"]["labels"]]


def rewritten(checkpoint: Path, out: Path, **parts: Any) -> Path:
    save_checkpoint(out, load_checkpoint(checkpoint) | parts)
    return out


# ---------------------------------------------------------------- what is in a checkpoint


@pytest.mark.parametrize("which", ["checkpoint", "colour"])
def test_the_images_are_those_nearest_to_each_prototype(which: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    gallery, images = gallery_of(path, images=5)
    vectors = embeddings_of(path, images)
    assert gallery.num_images == len(images.train) == len(vectors)
    assignments = assignments_of(path)
    assert len(gallery.levels) == len(assignments)
    for level, assignment in zip(gallery.levels, assignments, strict=True):
        assert [p.number for p in level.prototypes] == list(range(max(assignment) + 1))
        for prototype in level.prototypes:
            members = [i for i, cluster in enumerate(assignment) if cluster == prototype.number]
            mean = sum(vectors[i] for i in members) / len(members)
            cosine = {int(images.train[i]): float(vectors[i] @ mean / np.linalg.norm(mean)) for i in members}
            best = sorted(cosine.values(), reverse=True)[:5]
            assert prototype.size == len(members)
            assert len(set(prototype.nearest.tolist())) == len(best)
            np.testing.assert_allclose([cosine[i] for i in prototype.nearest.tolist()], best, atol=1e-5)
            np.testing.assert_allclose(prototype.cosine, best, atol=1e-5)
        assert sum(p.size for p in level.prototypes) == gallery.num_images


@pytest.mark.parametrize("which", ["checkpoint", "colour"])
def test_parents_are_the_clusters_that_most_images_belong_to(which: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    levels, assignments = gallery_of(path)[0].levels, assignments_of(path)
    assert len(levels) > 1
    assert all(p.parent is None and p.parent_share is None for p in levels[0].prototypes)
    for depth in range(1, len(levels)):
        for prototype in levels[depth].prototypes:
            above = Counter(
                coarse
                for coarse, own in zip(assignments[depth - 1], assignments[depth], strict=True)
                if own == prototype.number
            )
            most = max(above.values())
            assert prototype.parent == min(cluster for cluster, count in above.items() if count == most)
            assert prototype.parent_share == most / prototype.size


def test_purity_and_ami_against_a_loop(checkpoint: Path, found: tuple[Gallery, ImageSet]) -> None:
    gallery, images = found
    assert images.labels is not None
    labels = [int(images.labels[i]) for i in images.train]
    for level, assignment in zip(gallery.levels, assignments_of(checkpoint), strict=True):
        right = 0
        for prototype in level.prototypes:
            own = Counter(
                label for label, cluster in zip(labels, assignment, strict=True) if cluster == prototype.number
            )
            most = max(own.values())
            right += most
            assert prototype.label == min(label for label, count in own.items() if count == most)
            assert prototype.class_name == images.classes[prototype.label]
            assert prototype.purity == most / prototype.size
        assert level.purity == right / len(labels)
        assert level.ami == pytest.approx(adjusted_mutual_info_score(labels, assignment), abs=1e-9)


def test_concentrations_have_mean_t(found: tuple[Gallery, ImageSet]) -> None:
    for level in found[0].levels:
        phi = [p.concentration for p in level.prototypes]
        assert min(phi) > 0 and np.mean(phi) == pytest.approx(found[0].temperature, rel=1e-5)


def test_it_says_where_the_run_stood(found: tuple[Gallery, ImageSet]) -> None:
    assert (found[0].epoch, found[0].stage, found[0].grew) == (5, 5, False)
    assert [len(level.prototypes) for level in found[0].levels] == [2, 4, 7]


def test_a_growth_at_the_end_is_told(unbroken: Run) -> None:
    last = unbroken[1][-1]
    assert last["grew"] and last["level_clusters"] == "4/7"
    gallery, images = gallery_of(unbroken[0] / "checkpoint.pt")
    assert gallery.grew and [len(level.prototypes) for level in gallery.levels] == [7]
    text = Page(shown.fragment(gallery, images.images)).text
    assert "the level above these is no longer in the checkpoint" in text and "strictly nested" not in text


def test_the_levels_before_a_head_are_in_the_encoders_space(tmp_path: Path) -> None:
    config = Config.model_validate(TINY).with_values(
        {"head.kind": "none", "stages.stage2.epochs": 0, "stages.stage4.epochs": 0, "stages.total": 3}
    )
    fit(config, tmp_path)
    gallery, images = gallery_of(tmp_path / "checkpoint.pt")
    assert sum(p.size for p in gallery.levels[0].prototypes) == len(images.train)


def test_without_labels_there_is_no_purity(colour: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gallery, images = gallery_of(colour)
    assert images.labels is None
    for level in gallery.levels:
        assert level.purity is None and level.ami is None
        assert all(p.label is None and p.class_name is None and p.purity is None for p in level.prototypes)
    shown.main(colour, tmp_path / "page.html", 8, None)
    text = (tmp_path / "page.html").read_text()
    assert "purity" not in text.lower() and "AMI" not in text
    assert "purity" not in capsys.readouterr().out


def test_twice_the_same(checkpoint: Path, found: tuple[Gallery, ImageSet]) -> None:
    def plain(gallery: Gallery) -> str:
        return repr([[dataclasses.astuple(p) for p in level.prototypes] for level in gallery.levels])

    again, images = gallery_of(checkpoint)
    assert plain(again) == plain(found[0])
    assert shown.fragment(again, images.images) == shown.fragment(found[0], found[1].images)


# ---------------------------------------------------------------- what cannot be shown


def test_stage_1_has_no_prototypes(tmp_path: Path) -> None:
    fit(Config.model_validate(TINY), tmp_path, until_stage=1)
    with pytest.raises(
        UserError, match=r"has no prototypes yet: it stands after epoch 1, in stage 1.*train the run on"
    ):
        gallery_of(tmp_path / "checkpoint.pt")


def test_a_method_without_prototypes_is_refused(tmp_path: Path) -> None:
    fit(Config.model_validate({**TINY, "method": "moco"}), tmp_path, until_stage=1)
    with pytest.raises(UserError, match=r"has no prototypes: it is of method moco"):
        gallery_of(tmp_path / "checkpoint.pt")


def test_a_backbone_of_ones_own_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its backbone is Mine, given in Python"):
        gallery_of(rewritten(checkpoint, tmp_path / "checkpoint.pt", backbone="Mine"))


def test_images_that_moved_changed_or_went(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "images", classes=3, each=16)
    config = Config.model_validate(TINY).with_values(SMALL | {"data.source": str(source)})
    fit(config, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    before = gallery_of(path)[0]
    source.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"images.*\n.*was trained on: say with --data where they lie now"):
        gallery_of(path)
    after = gallery_of(path, data=str(tmp_path / "moved"))[0]
    assert [p.size for p in after.levels[-1].prototypes] == [p.size for p in before.levels[-1].prototypes]
    save(tmp_path / "moved" / "class0" / "000.png", random_pixels(99))
    with pytest.raises(UserError, match=r"moved: holds other images now than at the training; a gallery shows"):
        gallery_of(path, data=str(tmp_path / "moved"))


@pytest.mark.parametrize(
    ("hierarchy", "says"),
    [
        ({}, "no assignments"),
        ({"position": 0, "labels": []}, "no assignments"),
        ({"position": 0, "labels": [torch.zeros(7)]}, "an assignment of 7 images, but there are 405"),
        ({"position": 0, "labels": [torch.arange(405) * 2**40]}, "empty or do not exist"),
        ({"position": 0, "labels": [torch.full((405,), -1)]}, "empty or do not exist"),
        ({"position": 0, "labels": [torch.full((405,), 3)]}, "empty or do not exist"),
    ],
)
def test_assignments_that_no_run_writes(checkpoint: Path, tmp_path: Path, hierarchy: Any, says: str) -> None:
    with pytest.raises(UnreadableCheckpoint, match=says):
        gallery_of(rewritten(checkpoint, tmp_path / "checkpoint.pt", hierarchy=hierarchy))


def test_numbers_out_of_range(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="images is 0, but must be >= 1"):
        gallery_of(checkpoint, images=0)
    for images in (0, 25):
        with pytest.raises(UserError, match=rf"--images is {images}, but must be in 1\.\.24"):
            shown.main(checkpoint, None, images, None)


# ---------------------------------------------------------------- the page


def test_what_a_card_says(found: tuple[Gallery, ImageSet]) -> None:
    page = Page(shown.fragment(found[0], found[1].images))
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    for depth, level in enumerate(found[0].levels, 1):
        for p in level.prototypes:
            assert p.purity is not None
            most = "mostly" if p.purity > 0.5 else "most often"
            words = f"{most} '{p.class_name}', {round(100 * p.purity)} % of {p.size}"
            assert f"8 images nearest to prototype {p.number + 1} of level {depth}: {words}" in alts
            assert f"Level {depth}, no. {p.number + 1}" in page.text
    assert "Levels are not strictly nested" in page.text and "left out" not in page.text
    assert max(page.depths) == len(found[0].levels) - 1


def test_main_prints_a_line_per_level_and_writes_beside_the_checkpoint(
    checkpoint: Path, found: tuple[Gallery, ImageSet], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rewritten(checkpoint, tmp_path / "trials" / "0007" / "checkpoint.pt")
    shown.main(path, None, 4, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == found[1].describe()
    assert len(lines) == 2 + len(found[0].levels)
    for depth, (line, level) in enumerate(zip(lines[1:], found[0].levels, strict=False), 1):
        sizes = [p.size for p in level.prototypes]
        assert line == (
            f"level {depth}: {len(sizes)} prototypes of {min(sizes)}..{max(sizes)} images, "
            f"purity {level.purity:.3f}, AMI with the labels {level.ami:.3f}"
        )
    page = Page((path.parent / "prototypes.html").read_text())
    assert f"Prototypes of {tmp_path.name}, trial 0007" in page.text
    assert "after epoch 5 (stage 5)" in page.text
    assert len(page.pictures()) == sum(len(level.prototypes) for level in found[0].levels)
    assert sorted(each.name for each in path.parent.iterdir()) == ["checkpoint.pt", "prototypes.html"]
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(UserError, match="there is no folder"):
        shown.main(path, blocked / "page.html", 4, None)
    with pytest.raises(UserError, match="is there already, and not written by `hpcl prototypes`"):
        shown.main(path, blocked, 4, None)
