"""The page in Chromium, from disk: no error, no request, charts drawn, light and dark, tables sorted by mouse and by key.

``FFNFOLD_SCREENSHOTS=out/screenshots`` keeps what it looks like.
"""

from __future__ import annotations

import os
from pathlib import Path

import browser
import pytest
import reports
from ffnfold.cli.page import render

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason="needs chromium and chromedriver")]

DRAWN = """
return [...document.querySelectorAll("svg.chart")].map(chart => {
  const box = chart.getBoundingClientRect();
  const marks = [...chart.querySelectorAll("path, use")].filter(mark => {
    const size = mark.getBoundingClientRect();
    return size.width + size.height > 2;
  });
  const texts = [...chart.querySelectorAll("text")].filter(text => text.textContent.trim());
  return [box.width, box.height, marks.length, texts.length];
});
"""
COLOURS = """
const ink = element => getComputedStyle(element);
return [ink(document.documentElement).backgroundColor, ink(document.documentElement).color,
        ink(document.querySelector("svg.chart text")).fill];
"""
COLUMN = """
const table = document.querySelector("#blocks table");
return [...table.tBodies[0].rows].map(row => row.cells[arguments[0]].textContent);
"""
CLICK = """
const table = document.querySelector("#blocks table");
table.tHead.rows[0].cells[arguments[0]].querySelector("button").click();
return table.tHead.rows[0].cells[arguments[0]].getAttribute("aria-sort");
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(reports.full()), encoding="utf-8")
    return path


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of ``rgb(r, g, b)``."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1:colour.index(")")].split(",")[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_opens_without_an_error_or_a_request_and_draws_its_charts(file, tmp_path, dark):
    with browser.opened(file, tmp_path, dark=dark) as page:
        assert page.requests() == [file.as_uri()]
        drawn = page.evaluate(DRAWN)
        assert len(drawn) == 8
        for width, height, marks, texts in drawn:
            assert width > 300
            assert height > 60
            assert marks > 5
            assert texts >= 3
        background, ink, chart_text = page.evaluate(COLOURS)
        assert (luminance(background) < 0.2) == dark
        assert contrast(background, ink) > 7
        assert contrast(background, chart_text) > 7
        assert page.evaluate("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        kept = os.environ.get("FFNFOLD_SCREENSHOTS")
        shot = (Path(kept) if kept else tmp_path) / f"report-{'dark' if dark else 'light'}.png"
        shot.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(shot)
        assert shot.stat().st_size > 50_000
        assert page.console() == []


def test_tables_are_sorted_by_each_column(file, tmp_path):
    with browser.opened(file, tmp_path) as page:
        assert page.evaluate(COLUMN, 0) == ["0", "1", "2", "3"]
        assert page.evaluate(CLICK, 2) == "ascending"
        assert page.evaluate(COLUMN, 0) == ["3", "1", "0", "2"]  # by rank
        assert page.evaluate(CLICK, 2) == "descending"
        assert page.evaluate(COLUMN, 0) == ["2", "0", "1", "3"]
        page.evaluate(CLICK, 3)
        assert page.evaluate(COLUMN, 3) == ["0.01", "0.02", "0.5", "–"]  # what there is not comes last
        page.evaluate(CLICK, 3)
        assert page.evaluate(COLUMN, 3) == ["0.5", "0.02", "0.01", "–"]
        assert page.console() == []


def test_a_column_is_sorted_by_the_keyboard(file, tmp_path):
    with browser.opened(file, tmp_path) as page:
        page.press("#blocks thead th:nth-child(3) button", "\ue007")  # enter
        assert page.evaluate(COLUMN, 0) == ["3", "1", "0", "2"]


def test_it_is_readable_on_a_narrow_screen(file, tmp_path):
    with browser.opened(file, tmp_path) as page:
        page.resize(400, 900)
        assert page.evaluate("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
