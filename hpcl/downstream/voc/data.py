"""Images with boxes, from a folder in the form of Pascal VOC 2007.

All annotations and the sizes of all images are read at once, so that every mistake is told before anything is
trained; pixels are decoded when they are asked for.

Legend: N images; n objects of one image; Y classes; C H W channels, height and width in pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from hpcl.data import Ids
from hpcl.decode import FORMATS, MOST_PIXELS, decode
from hpcl.downstream.voc.xml import MOST_BYTES, Annotation, AnnotationError, parse_annotation
from hpcl.files import read_some
from hpcl.sources import DataError

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
PARTS = ("train", "val", "trainval", "test")
_ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
_MOST_LIST = 64 * 2**20
_ORIENTATION = 0x0112
"""Tag of EXIF; 1 is upright, 5 to 8 lie on their side."""


@dataclass(frozen=True, eq=False)
class VocImage:
    """One image and its objects."""

    name: str
    file: Path
    size: tuple[int, int]
    """Height and width in pixels of the upright image."""
    boxes: npt.NDArray[np.float32]
    """(n, 4) left, top, right, bottom from the corner, in pixels, right and bottom outside (see :mod:`.xml`)."""
    labels: Ids
    """(n,) places in :attr:`VocData.classes`."""
    difficult: npt.NDArray[np.bool_]
    """(n,)"""
    truncated: npt.NDArray[np.bool_]
    """(n,)"""


@dataclass(frozen=True, eq=False)
class VocData:
    """A folder that was read; made by :func:`read_voc`."""

    root: Path
    classes: tuple[str, ...]
    """VOC's 20 if all names found are of them, else the names found, sorted."""
    images: tuple[VocImage, ...]
    parts: dict[str, Ids]
    """Places of the images of `train`, `val`, `trainval` and `test`, in the order of their lists; a part without
    list is missing here (but `trainval` is made from the other two)."""
    presence: npt.NDArray[np.int8]
    """(N, Y) 1: there is such an object; 0: only difficult ones; -1: none. From the lists `<class>_<part>.txt` where
    there are any, else from the objects."""
    notes: tuple[str, ...] = ()
    """What was changed or left out, a clause each."""

    def pixels(self, image_id: int, channels: int, size: int | None = None) -> npt.NDArray[np.uint8]:
        """uint8 (C, H, W) of an image, upright; gray becomes colour or colour gray (ITU-R BT.601) as `channels` says.

        Args:
            image_id: its place in `images`.
            channels: C, 1 or 3.
            size: the shorter side is resized to it and a centred square cut out; None keeps the size.

        Raises:
            DataError: the file is broken.
        """
        file = self.images[image_id].file
        try:
            pixels = decode(file, size)
        except MemoryError:
            raise
        except Exception as error:  # broken files make decoders raise almost anything
            raise DataError(f"{file}: cannot be decoded ({' '.join(str(error).split())[:200]}); mend it") from error
        if channels == 1:
            return (pixels if pixels.ndim == 2 else np.asarray(Image.fromarray(pixels).convert("L")))[None]
        return np.stack([pixels] * 3) if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def missing(self, split: Literal["val", "test"]) -> str | None:
        """A sentence about the lists that a task needs and that are empty or not there; None if it has them."""
        train, scored = used_parts(split)
        lists = " and ".join(f"{part}.txt" for part in (train, scored) if not len(self.parts.get(part, ())))
        if not lists:
            return None
        return f"{self.root}: has no image in ImageSets/Main/{lists}, but {train} is trained on and {scored} scored"

    def describe(self) -> str:
        """One line: folder, images, classes, objects, parts, what was left out."""
        objects = sum(len(image.labels) for image in self.images)
        difficult = sum(int(image.difficult.sum()) for image in self.images)
        parts = ", ".join(f"{name} {len(ids):,}" for name, ids in self.parts.items())
        line = (
            f"{self.root}: {len(self.images):,} images, {len(self.classes)} classes, {objects:,} objects "
            f"({difficult:,} difficult); {parts}"
        )
        return "; ".join([line, *self.notes])


def used_parts(split: Literal["val", "test"]) -> tuple[str, str]:
    """The parts that are trained on and scored: `train` and `val` where nothing may look at test images."""
    return ("train", "val") if split == "val" else ("trainval", "test")


def read_voc(path: str | Path) -> VocData:
    """The data set in a folder `VOC2007` (Annotations, ImageSets/Main, JPEGImages), given itself or one around it.

    Boxes are clipped to the image, and those without area left out; both are counted in the notes.

    Raises:
        DataError: no such folder; or a list, annotation or image is missing or wrong, all of them at once.
    """
    root = _root(Path(path).expanduser())
    problems: list[str] = []
    names = {part: found for part in PARTS if (found := _list(root, part, problems)) is not None}
    if "trainval" not in names and {"train", "val"} <= names.keys():
        names["trainval"] = names["train"] + names["val"]
    if not problems and not any(names.values()):
        wanted = ", ".join(f"{part}.txt" for part in PARTS)
        problems.append(
            f"{root / 'ImageSets' / 'Main'}: has none of {wanted} with the name of an image in it; add them, "
            "one name (without .jpg) a line"
        )
    if problems:
        raise DataError(*problems)
    _apart(root, names, problems)
    place = {name: i for i, name in enumerate(dict.fromkeys(name for part in names.values() for name in part))}
    read = [(name, _read(root, name, problems)) for name in place]
    if problems:
        raise DataError(*problems)

    seen = {o.name for _, one in read if one is not None for o in one[2].objects}
    classes = VOC_CLASSES if seen <= set(VOC_CLASSES) else tuple(sorted(seen))
    counted = _Counted([], [], [])
    images = tuple(_image(name, *one, classes, counted) for name, one in read if one is not None)
    parts = {part: np.array([place[n] for n in names[part]], dtype=np.int64) for part in PARTS if part in names}
    presence, notes = _presence(root, images, classes, names, place)
    return VocData(root, classes, images, parts, presence, (*counted.notes(), *notes))


def _root(path: Path) -> Path:
    needed = ("Annotations", "ImageSets/Main", "JPEGImages")
    for root in (path, path / "VOC2007", path / "VOCdevkit" / "VOC2007"):
        if all((root / folder).is_dir() for folder in needed):
            return root
    if not path.is_dir():
        raise DataError(f"{path}: is no folder; give one in the form of VOC2007 ({', '.join(needed)})")
    near = path / "VOC2007" if (path / "VOC2007").is_dir() else path
    missing = ", ".join(folder for folder in needed if not (near / folder).is_dir())
    raise DataError(f"{near}: has no folder {missing}; give one in the form of VOC2007 ({', '.join(needed)})")


def _lines(file: Path, problems: list[str]) -> list[str] | None:
    """Lines of a list that are not empty; None where there is no such file or, with a problem, it cannot be read."""
    if not file.exists():
        return None
    try:
        content = read_some(file, _MOST_LIST)
        if len(content) > _MOST_LIST:
            raise ValueError(f"has more than {_MOST_LIST:,} bytes")
        return [line.strip() for line in content.decode().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        problems.append(f"{file}: cannot be read ({error}); it must be text, one image a line")
        return None


def _list(root: Path, part: str, problems: list[str]) -> list[str] | None:
    """Names in `ImageSets/Main/<part>.txt`, each once; None without such a list."""
    file = root / "ImageSets" / "Main" / f"{part}.txt"
    lines = _lines(file, problems)
    if lines is None:
        return None
    for line in lines:
        # a name is a part of two paths, and lists may come from anybody
        if "/" in line or "\\" in line or "\0" in line or line in (".", ".."):
            problems.append(f"{file}: {line[:80]!r} is no name of an image; give names without folder")
    if problems:
        return None
    return list(dict.fromkeys(lines))


def _apart(root: Path, names: dict[str, list[str]], problems: list[str]) -> None:
    for one, other in (("trainval", "test"), ("train", "test"), ("val", "test"), ("train", "val")):
        both = sorted(set(names.get(one, ())) & set(names.get(other, ())))
        if both:
            problems.append(
                f"{root / 'ImageSets' / 'Main'}: {len(both)} images stand in {one}.txt and in {other}.txt (first: "
                f"{both[0]}); take them out of one, or results are of images that were trained on"
            )


_Read = tuple[Path, tuple[int, int], Annotation]


def _read(root: Path, name: str, problems: list[str]) -> _Read | None:
    """Image file, its size and its annotation; else problems."""
    before = len(problems)
    files = [file for ending in _ENDINGS if (file := root / "JPEGImages" / f"{name}{ending}").is_file()]
    if not files:
        problems.append(f"{root / 'JPEGImages' / name}.jpg: is missing; add it, or take {name} out of ImageSets/Main")
    file = root / "Annotations" / f"{name}.xml"
    try:
        annotation = parse_annotation(read_some(file, MOST_BYTES))
    except FileNotFoundError:
        problems.append(f"{file}: is missing; add it, or take {name} out of ImageSets/Main")
    except OSError as error:
        problems.append(f"{file}: cannot be read ({error.strerror}); mend it")
    except AnnotationError as error:
        problems.append(f"{file}: {error}; mend the file")
    if not files or len(problems) > before:
        return None
    try:
        size, orientation = _size(files[0])
    except UnidentifiedImageError:
        problems.append(f"{files[0]}: is no image that is read ({', '.join(FORMATS)}); give one")
        return None
    except Exception as error:  # as in decode
        problems.append(f"{files[0]}: cannot be read ({' '.join(str(error).split())[:200]}); mend it")
        return None
    if annotation.size not in (None, size):
        assert annotation.size is not None
        height, width = annotation.size
        turned = f" turned upright (EXIF orientation {orientation})" if orientation > 1 else ""
        problems.append(
            f"{file}: was written for an image of {width}x{height} pixels, but {files[0].name} has "
            f"{size[1]}x{size[0]}{turned}; its boxes would not fit: give the image they were drawn on"
        )
        return None
    return files[0], size, annotation


def _size(file: Path) -> tuple[tuple[int, int], int]:
    """Height and width of the upright image and its EXIF orientation, from the file's beginning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as opened:
            width, height = opened.size
            orientation = int(opened.getexif().get(_ORIENTATION, 1))
    if width * height > MOST_PIXELS:
        raise ValueError(f"has {width}x{height} pixels, but at most {MOST_PIXELS // 10**6} million are decoded")
    return ((width, height) if orientation in (5, 6, 7, 8) else (height, width)), orientation


@dataclass(frozen=True)
class _Counted:
    """Names of the images concerned, once for each box."""

    clipped: list[str]
    empty: list[str]
    outside: list[str]

    def notes(self) -> Iterator[str]:
        for names, what in (
            (self.empty, "without area left out"),
            (self.outside, "outside the image left out"),
            (self.clipped, "clipped to the image"),
        ):
            if names:
                images = list(dict.fromkeys(names))
                more = f" and {len(images) - 5} more images" if len(images) > 5 else ""
                yield f"{len(names)} boxes {what} ({', '.join(images[:5])}{more})"


def _image(
    name: str, file: Path, size: tuple[int, int], annotation: Annotation, classes: tuple[str, ...], counted: _Counted
) -> VocImage:
    boxes, kept = [], []
    most = np.array([size[1], size[0], size[1], size[0]])
    for thing in annotation.objects:
        box = np.clip(thing.box, 0, most)
        if not thing.has_area:
            counted.empty.append(name)
        elif box[2] <= box[0] or box[3] <= box[1]:
            counted.outside.append(name)
        else:
            if (box != thing.box).any():
                counted.clipped.append(name)
            boxes.append(box)
            kept.append(thing)
    return VocImage(
        name,
        file,
        size,
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array([classes.index(thing.name) for thing in kept], dtype=np.int64),
        np.array([thing.difficult for thing in kept], dtype=bool),
        np.array([thing.truncated for thing in kept], dtype=bool),
    )


def _presence(
    root: Path,
    images: tuple[VocImage, ...],
    classes: tuple[str, ...],
    names: dict[str, list[str]],
    place: dict[str, int],
) -> tuple[npt.NDArray[np.int8], list[str]]:
    """:attr:`VocData.presence`, and a note where lists and objects differ."""
    presence = np.full((len(images), len(classes)), -1, dtype=np.int8)
    for i, image in enumerate(images):
        presence[i, image.labels[image.difficult]] = 0
        presence[i, image.labels[~image.difficult]] = 1
    problems: list[str] = []
    differ: list[str] = []
    for label, name in enumerate(classes):
        for part in names:
            file = root / "ImageSets" / "Main" / f"{name}_{part}.txt"
            # a class may be named like a path; such a list is not VOC's
            lines = _lines(file, problems) if "/" not in name and "\0" not in name else None
            for line in lines or ():
                image_name, _, value = line.rpartition(" ")
                at = place.get(image_name.strip())
                if at is None or value not in ("1", "0", "-1"):
                    problems.append(f"{file}: {line[:80]!r} must be the name of an image of {part}.txt and 1, 0 or -1")
                elif presence[at, label] != int(value):
                    differ.append(f"{image_name.strip()} {name}")
                    presence[at, label] = int(value)
    if problems:
        raise DataError(*problems)
    more = [f"{len(differ)} entries of class lists differ from the objects (first: {differ[0]})"] if differ else []
    return presence, more
