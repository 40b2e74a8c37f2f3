"""The page on a memory in a real browser: pointing and keys say the figures' own numbers, and nothing is covered."""

import re
from pathlib import Path

import pytest

from knnmoe_hf.explain.report.page import document_of
from knnmoe_hf.pages.page import to_html
from tests.explain.report.reports import lab_report
from tests.support.browser import THEMES, WIDTHS, complaints, looked_at, needs_browser

pytestmark = needs_browser
LOOKING = Path(__file__).with_name("look.js").read_text()


@pytest.fixture(scope="module")
def report():
    return lab_report()


@pytest.fixture(scope="module", params=THEMES)
def looked(request, report, tmp_path_factory) -> tuple[str, dict, str]:
    """The theme, what the page said of itself by width, and what the browser logged."""
    page = tmp_path_factory.mktemp("page") / "report.html"
    page.write_text(to_html(document_of(report)))
    return request.param, *looked_at(page, LOOKING, request.param, tmp_path_factory.mktemp("profile"))


@pytest.fixture(params=WIDTHS)
def found(request, looked) -> dict:
    page = looked[1][str(request.param)]
    assert "error" not in page, page
    return page


def test_the_page_fits_its_window_and_nothing_covers_anything(found):
    assert found["sideways"] <= 0 and found["outside"] == [] and found["opened"]
    assert found["covered"] == [] and found["letters"] == []
    assert found["strange"] == 0


def test_every_plot_is_read_by_pointing_and_by_keys(found):
    assert len(found["told"]) >= 5
    for plot in found["told"]:
        assert plot["how"].startswith("Point at a")
        for what in ("reachable", "isFirst", "beside", "counted", "last", "pointed"):
            assert plot[what], (plot["title"], what)
        assert plot["active"] == 1


def test_what_is_said_are_the_figures_of_the_report(report, found):
    figures = report.figures()
    said = {plot["title"]: plot["all"] for plot in found["told"]}
    keys, experts = figures["keys"], figures["experts"]
    assert said[keys.title] == [dot.told for dot in keys.dots]
    assert len(said[experts.title]) == sum(map(len, experts.values))
    first = re.fullmatch(r"layer (\d+), expert 0: (.*) weight", said[experts.title][0])
    assert int(first[1]) == experts.row_names[0]
    assert float(first[2].replace("−", "-")) == pytest.approx(experts.values[0][0], rel=0.01)
    sweep = [text for line in figures["sweep"].lines for text in line.told]
    assert said[figures["sweep"].title] == sweep


def test_the_theme_is_that_of_the_system_until_another_is_chosen(looked, found):
    before, after = (sum(map(int, re.findall(r"\d+", colour))) for colour in found["grounds"])
    assert (before < 200) == (looked[0] == "dark") and (after < 200) == (looked[0] == "light")


def test_the_browser_complains_of_nothing(looked):
    assert complaints(looked[2]) == []
