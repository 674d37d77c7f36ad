"""The page of a prototype gallery: its pictures, its limits, and that nothing in it runs."""

from __future__ import annotations

import re

import numpy as np
import pytest
from galleries import Page, made, noise

from hpcl.analysis.report import gallery as shown


@pytest.mark.parametrize("channels", [1, 3])
def test_the_pictures_hold_the_images_pixels(channels: int) -> None:
    images, gallery = noise(channels), made([1], each=6)
    (picture,) = Page(shown.fragment(gallery, images)).pictures()
    assert (picture.format, picture.mode) == ("PNG", "L" if channels == 1 else "RGB")
    assert picture.size == (4 * 16 + 3, 2 * 12 + 1)  # six in rows of four, a line between them
    seen = np.asarray(picture).reshape(*picture.size[::-1], channels)
    for at, place in enumerate(gallery.levels[0].prototypes[0].nearest):
        x, y = at % 4 * 17, at // 4 * 13
        assert (seen[y : y + 12, x : x + 16] == images[place].transpose(1, 2, 0)).all()


def test_large_images_are_made_small() -> None:
    (picture,) = Page(shown.fragment(made([1], each=1), noise(3, 200, 100))).pictures()
    assert picture.size == (16, 32)


def test_children_stand_below_their_parents() -> None:
    page = Page(shown.fragment(made([2, 4, 8]), noise(1)))
    order = re.findall(r"Level (\d), no. (\d)", page.text)
    # Number i is below i modulo the level above.
    families = [("1", "1"), ("2", "1"), ("3", "1"), ("3", "5"), ("2", "3"), ("3", "3"), ("3", "7")]
    assert sorted(order[:7]) == sorted(families) and order[0] == families[0]
    assert page.depths == [int(level) - 1 for level, _ in order]


@pytest.mark.parametrize("counts", [[100], [30, 37], [21, 36, 62], [2, 200, 400], [5, 9, 16, 28, 48, 82, 140, 238]])
def test_so_many_cards_and_what_is_left_out_is_said(counts: list[int]) -> None:
    page = Page(shown.fragment(made(counts), noise(1)))
    per_level = [len(re.findall(rf"Level {depth}, no\.", page.text)) for depth in range(1, len(counts) + 1)]
    assert sum(per_level) <= shown.MOST_CARDS and all(per_level)
    assert per_level[0] == min(counts[0], shown.MOST_COARSE if len(counts) > 1 else shown.MOST_CARDS)
    for depth, (few, all_) in enumerate(zip(per_level, counts, strict=True), 1):
        assert f"{few if few < all_ else 'all'} of the {all_} of level {depth}" in page.text
    assert "The others are left out." in page.text
    more = sum(
        map(int, re.findall(r"\+ (\d+) more", page.text) + re.findall(r"(\d+) prototypes? not shown", page.text))
    )
    if len(counts) == 2 and counts[0] <= shown.MOST_COARSE:
        assert more == counts[1] - per_level[1]


def test_every_child_that_is_not_shown_is_counted() -> None:
    page = Page(shown.fragment(made([3, 100]), noise(1)))
    assert len(re.findall("Level 2, no", page.text)) == shown.MOST_CARDS - 3
    assert sum(map(int, re.findall(r"\+ (\d+) more", page.text))) == 100 - (shown.MOST_CARDS - 3)
    lonely = Page(shown.fragment(made([3, 2]), noise(1)))
    assert lonely.text.count("No prototype of level 2 belongs here more than elsewhere.") == 1


@pytest.mark.parametrize(("channels", "edge", "each"), [(1, 28, 8), (3, 32, 8), (3, 84, 24)])
def test_a_fragment_stays_below_500_kb(channels: int, edge: int, each: int) -> None:
    """Noise, of which no format makes much less."""
    text = shown.fragment(made([12, 20, 36], each=each), noise(channels, edge, edge))
    page = Page(text)
    assert len(page.pictures()) > 50 and len(text.encode()) < 500_000


HOSTILE = "</b><script>alert('1')</script>\"><img src=x onerror=alert(2)>\x1b[31m‮{{ 7 * 7 }}"


def test_hostile_names_are_text() -> None:
    gallery = made([2, 3], class_name=HOSTILE)
    text = shown.page(shown.fragment(gallery, noise(1)), HOSTILE, [HOSTILE])
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all((attributes["src"] or "").startswith("data:image/") for tag, attributes in page.tags if tag == "img")
    assert "\x1b" not in text and "‮" not in text and "49" not in page.text
    assert "alert('1')" in page.text
    long = shown.fragment(made([60], class_name="x" * 10**6), noise(1))
    assert len(long) < 500_000


def test_the_page_loads_and_runs_nothing() -> None:
    page = Page(shown.page(shown.fragment(made([3, 4]), noise(3)), "Prototypes", ["a note"]))
    metas = [attributes for tag, attributes in page.tags if tag == "meta"]
    assert {"charset": "utf-8"} in metas
    assert any(m.get("content") == "default-src 'none'; style-src 'unsafe-inline'; img-src data:" for m in metas)
    assert any(m.get("name") == "viewport" for m in metas)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert not any({"href", "srcset", "action"} & set(attributes) for _, attributes in page.tags)
    assert "url(" not in shown.CSS and "@import" not in page.text
    assert set(re.findall(r"var\(--(\w+)", shown.CSS)) <= {"ink", "muted", "rule", "columns"}
