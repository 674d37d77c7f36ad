"""One annotation file of Pascal VOC (Everingham et al. 2010): its objects, out of XML that anybody may have written.

Legend: n objects of one image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

MOST_BYTES = 2**20
"""Of an annotation file that is read; VOC's largest has 20 thousand."""
MOST_DEPTH = 16
"""Elements within each other; VOC has 5 (a part of a person has a box of its own)."""


class AnnotationError(ValueError):
    """The content is no VOC annotation; the text says why."""


@dataclass(frozen=True)
class VocObject:
    """One object as the file has it."""

    name: str
    """Of its class."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom edge in pixels from the image's corner, the right and bottom one outside. VOC counts
    pixels from 1 and names the last one within: its (xmin, ymin, xmax, ymax) is (xmin - 1, ymin - 1, xmax, ymax)."""
    difficult: bool
    """Hard to recognise: neither found nor missed where VOC scores."""
    truncated: bool
    """Reaches beyond the image or behind something."""
    has_area: bool
    """Whether xmax > xmin and ymax > ymin in the file."""


@dataclass(frozen=True)
class Annotation:
    """What an annotation file says."""

    size: tuple[int, int] | None
    """Height and width of the image, pixels; None where the file has none (or 0)."""
    objects: tuple[VocObject, ...]


def parse_annotation(content: bytes) -> Annotation:
    """The annotation in an XML file's content; nothing outside it is opened and no entity is expanded.

    Parts of objects (`<part>`, of persons) are not read.

    Raises:
        AnnotationError: no such annotation: says what is wrong, without the file's name.
    """
    if len(content) > MOST_BYTES:
        raise AnnotationError(f"has more than {MOST_BYTES:,} bytes, but an annotation must have less")
    root = _tree(content)
    if root.tag != "annotation":
        raise AnnotationError(f"begins with <{root.tag[:40]}>, but must be a VOC <annotation>")
    size = root.find("size")
    sides = [0 if size is None else int(_number(size, name, "size", default=0)) for name in ("height", "width")]
    objects = tuple(_object(element, i + 1) for i, element in enumerate(root.findall("object")))
    return Annotation((sides[0], sides[1]) if min(sides) > 0 else None, objects)


def _tree(content: bytes) -> Element:
    """The elements of a document without a type declaration: only that can declare entities (billion laughs, files)."""
    builder, parser = TreeBuilder(), expat.ParserCreate()
    depth = 0

    def refuse(*_: object) -> None:
        raise AnnotationError("declares a document type (<!DOCTYPE>), which is not read; take the declaration out")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MOST_DEPTH:
            raise AnnotationError(f"has elements more than {MOST_DEPTH} deep, but a VOC annotation has 5")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, LookupError, ValueError) as error:  # LookupError: an encoding that nobody knows
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(f"is no XML ({error})") from error
    root: Element = builder.close()
    return root


def _object(element: Element, place: int) -> VocObject:
    where = f"object {place}"
    name = (element.findtext("name") or "").strip()
    if not name:
        raise AnnotationError(f"{where} has no <name>")
    box = element.find("bndbox")
    if box is None:
        raise AnnotationError(f"{where} ({name[:40]}) has no <bndbox>")
    left, top, right, bottom = (_number(box, edge, where) for edge in ("xmin", "ymin", "xmax", "ymax"))
    difficult, truncated = (bool(_number(element, flag, where, default=0)) for flag in ("difficult", "truncated"))
    return VocObject(name, (left - 1, top - 1, right, bottom), difficult, truncated, right > left and bottom > top)


def _number(element: Element, name: str, where: str, default: float | None = None) -> float:
    text = (element.findtext(name) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 1e6:  # not a number, infinite, or in no image
        raise AnnotationError(f"{where} has <{name}> {text[:40]!r}, but must have a number of pixels")
    return value
