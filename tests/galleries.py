"""What tests of prototype galleries share: a reader of their pages, and a gallery without a checkpoint."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
from pictures import Pixels
from PIL import Image

from hpcl.gallery import Gallery, GalleryLevel, GalleryPrototype


class Page(HTMLParser):
    """The elements of a page and their nesting; fails on tags that do not match."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.depths: list[int] = []
        """How many elements of class `children` each picture lies in."""
        self._classes: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.depths.append(sum("children" in each.split() for each in self._classes))
        if tag not in self.VOID:
            self._open.append(tag)
            self._classes.append(dict(attrs).get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._classes.pop()

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[Image.Image]:
        found = []
        for _, attributes in (each for each in self.tags if each[0] == "img"):
            kind, _, data = (attributes["src"] or "").partition(";base64,")
            assert kind in ("data:image/png", "data:image/jpeg")
            found.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
            assert found[-1].format == kind.rpartition("/")[2].upper()
        return found


def made(counts: list[int], num_images: int = 40, each: int = 8, class_name: str = "seven", seed: int = 0) -> Gallery:
    """A gallery with so many prototypes per level, number i below i modulo the level above."""
    random = np.random.default_rng(seed)
    levels = []
    for depth, count in enumerate(counts):
        prototypes = [
            GalleryPrototype(
                number=i,
                size=100 - i % 7,
                nearest=random.permutation(num_images)[:each],
                cosine=np.ones(each, dtype=np.float32),
                concentration=0.1,
                parent=i % counts[depth - 1] if depth else None,
                parent_share=0.5 if depth else None,
                label=0,
                class_name=class_name,
                purity=0.83,
            )
            for i in range(count)
        ]
        levels.append(GalleryLevel(tuple(prototypes), 0.83, None))
    return Gallery(tuple(levels), num_images, 20, 5, 0.1, False)


def noise(channels: int, height: int = 12, width: int = 16, count: int = 40) -> Pixels:
    return np.random.default_rng(1).integers(0, 256, (count, channels, height, width), dtype=np.uint8)
