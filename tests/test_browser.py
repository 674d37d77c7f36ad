"""The pages in a real browser: nothing is loaded, no error is logged, the table works, light and dark, on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from galleries import made, noise
from test_report import a_search

from hpcl.analysis.report import gallery
from hpcl.analysis.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    search = a_search(folder / "s", trials=300, rungs=[4.0], stopped=dict.fromkeys(range(40, 280), 4), diverged={7: 3})
    write_report([search], folder / "report.html", galleries=False)
    return folder / "report.html"


class Opened:
    """A page that is open, and what it asked for and complained of."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def quiet(self, path: Path) -> None:
        """See that nothing was asked for but the page itself, and nothing logged."""
        assert [url for url in self.requests if not url.startswith("data:")] == [path.as_uri()]
        assert self.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_without_a_request_or_an_error_and_can_be_read(browser: Any, report: Path, scheme: str) -> None:
    with Opened(browser, report, color_scheme=scheme) as opened:
        page = opened.page
        page.wait_for_selector("section.live")
        assert page.locator("figure svg").count() >= 9
        boxes = page.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)")
        assert min(boxes) > 100
        light = page.evaluate(
            "['color', 'background-color'].map(n => getComputedStyle(document.body)[n].match(/\\d+/g).slice(0, 3)"
            ".reduce((sum, v) => sum + Number(v) / 765, 0))"
        )
        ink, paper = light
        assert (paper > 0.9 and ink < 0.2) if scheme == "light" else (paper < 0.2 and ink > 0.8)
        chart = page.evaluate(
            "getComputedStyle(document.querySelector('figure svg text')).fill.match(/\\d+/g).map(Number)"
        )
        assert (sum(chart) < 200) if scheme == "light" else (sum(chart) > 560)
        opened.quiet(report)


def test_the_table_sorts_filters_and_shows_more(browser: Any, report: Path) -> None:
    with Opened(browser, report) as opened:
        page = opened.page
        page.wait_for_selector("section.live")
        table = page.locator("section[data-trials]")

        def column(name: str) -> list[str]:
            place = table.locator("thead th").all_inner_texts().index(name) + 1
            return table.locator(f"tbody tr td:nth-child({place})").all_inner_texts()

        assert len(column("trial")) == 100
        head = table.get_by_role("button", name="moco.temperature")
        for ascending in (True, False):
            head.click()
            values = [float(text) for text in column("moco.temperature")]
            assert values == sorted(values, reverse=not ascending) and len(set(values)) > 50
        table.get_by_role("searchbox").fill("state:finished topk.mode:add")
        assert set(column("state")) == {"finished"} and set(column("topk.mode")) == {"add"}
        values = [float(text) for text in column("moco.temperature")]
        assert values == sorted(values, reverse=True)  # a filter keeps the order
        table.get_by_role("searchbox").fill("epochs<4")
        assert column("trial") == ["0007"] and "1 of 300 trials" in table.inner_text()
        for asked in ("moco.temperature > 0.3 state = finished", "linear probe>0.6 Topk.Mode:ADD"):
            table.get_by_role("searchbox").fill(asked)
            assert 0 < len(column("trial")) < 60 and set(column("state")) == {"finished"}, asked
        one = column("moco.temperature")[0]
        table.get_by_role("searchbox").fill(f"moco.temperature={float(one):.9f}")
        assert column("moco.temperature") == [one]  # equal as a number
        table.get_by_role("searchbox").fill("")
        table.get_by_role("button", name="show").click()
        assert len(column("trial")) == 300
        opened.quiet(report)


def test_a_phone_scrolls_one_way_only(browser: Any, report: Path) -> None:
    with Opened(browser, report, viewport={"width": 360, "height": 740}, is_mobile=True) as opened:
        opened.page.wait_for_selector("section.live")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_without_scripts_and_in_print_the_best_trials_are_there(browser: Any, report: Path) -> None:
    with Opened(browser, report, java_script_enabled=False) as opened:
        assert opened.page.locator("section[data-trials] tbody tr").count() == 40
    with Opened(browser, report) as opened:
        opened.page.emulate_media(media="print")
        assert not opened.page.locator("nav").is_visible()
        assert len(opened.page.pdf()) > 20_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_prototypes_shows_its_pictures(browser: Any, tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "prototypes.html"
    path.write_text(gallery.page(gallery.fragment(made([3, 6]), noise(3)), "Prototypes"), encoding="utf-8")
    with Opened(browser, path, color_scheme=scheme, viewport={"width": 390, "height": 800}) as opened:
        widths = opened.page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
        assert len(widths) == 9 and all(widths)
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
        opened.quiet(path)
