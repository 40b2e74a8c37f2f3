"""The report in a real browser: no sideways scrolling, no text on another, both themes, no errors."""

import json
import re

import pytest

from knnmoe_hf.comparison.report import write_report
from tests.comparison.report.results_file import content
from tests.support.browser import THEMES, WIDTHS, complaints, looked_at, needs_browser

pytestmark = needs_browser
LOOKING = """
  const root = page.documentElement;
  page.querySelectorAll("details").forEach((one) => { one.open = true; });
  const covered = [];
  for (const plot of page.querySelectorAll("svg.chart")) {
    const texts = [...plot.querySelectorAll("text")].map((one) => [one.textContent, one.getBoundingClientRect()]);
    texts.forEach(([text, box], i) => {
      if (box.width === 0) return;
      for (const [other, next] of texts.slice(i + 1)) {
        const x = Math.min(box.right, next.right) - Math.max(box.left, next.left);
        const y = Math.min(box.bottom, next.bottom) - Math.max(box.top, next.top);
        if (x > 1 && y > 4) covered.push([text, other]);  // letters are lower than their line
      }
    });
  }
  const button = page.getElementById("theme");
  const ground = () => window.getComputedStyle(page.body).backgroundColor;
  const colours = [ground()];
  button.focus();
  const focused = page.activeElement === button;
  button.click();
  colours.push(ground());
  try { window.localStorage.clear(); } catch {}
  const plots = [...page.querySelectorAll(".wide, .narrow")].filter((one) => one.offsetWidth > 0);
  const boxes = [...page.querySelectorAll(".scroll")];
  boxes.forEach((one) => { one.scrollLeft = 9999; });
  return {
    sideways: root.scrollWidth - root.clientWidth, covered, colours, focused,
    plots: plots.length, shown: [...new Set(plots.map((one) => one.className))],
    outside: boxes.filter((one) => one.getBoundingClientRect().right > root.clientWidth).length,
    scrolled: boxes.filter((one) => one.scrollLeft > 0).length,
    reachable: boxes.every((one) => one.tabIndex === 0),
    smallest: Math.min(...[...page.querySelectorAll("svg.chart text")]
      .map((one) => one.getBoundingClientRect().height).filter((height) => height > 0)),
  };
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "results.json").write_text(json.dumps(content()))
    write_report(folder)
    return folder


@pytest.fixture(scope="module", params=THEMES)
def looked(request, folder, tmp_path_factory) -> tuple[str, dict, str]:
    """The theme, what the page said of itself by width, and what the browser logged."""
    profile = tmp_path_factory.mktemp("profile")
    return request.param, *looked_at(folder / "report.html", LOOKING, request.param, profile)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_its_window_and_no_text_of_a_plot_covers_another(looked, width):
    _, found, _ = looked
    page = found[str(width)]
    assert page["sideways"] <= 0 and page["outside"] == 0
    assert page["covered"] == []
    assert page["plots"] == 6 and page["shown"] == ["narrow" if width < 600 else "wide"]
    assert page["smallest"] >= 11  # pixels


@pytest.mark.parametrize("width", WIDTHS)
def test_the_theme_is_that_of_the_system_until_another_is_chosen(looked, width):
    theme, found, _ = looked
    before, after = (sum(map(int, re.findall(r"\d+", colour))) for colour in found[str(width)]["colours"])
    assert (before < 200) == (theme == "dark") and (after < 200) == (theme == "light")


@pytest.mark.parametrize("width", WIDTHS)
def test_everything_can_be_reached_with_the_keyboard(looked, width):
    page = looked[1][str(width)]
    assert page["focused"] and page["reachable"]
    assert page["scrolled"] > 0 or width > 600


def test_the_browser_complains_of_nothing(looked):
    assert complaints(looked[2]) == []
