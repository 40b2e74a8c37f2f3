"""Figures as charts: every part says its own numbers, lies where they are, and is no markup."""

from xml.etree import ElementTree

import pytest

from knnmoe_hf.pages.axes import Axis
from knnmoe_hf.pages.document import Charts, Document, Section, Text
from knnmoe_hf.pages.drawings import chart_of
from knnmoe_hf.pages.figures import Cloud, Curves, Dot, Heat, Line
from knnmoe_hf.pages.markdown import to_markdown
from knnmoe_hf.pages.page import to_html

HOSTILE = "</title><script>alert(1)</script>\"'>"


def told(svg: str) -> list[tuple[str, ElementTree.Element]]:
    """What the elements of a plot say, and they themselves."""
    found = [(one.get("data-told"), one) for one in ElementTree.fromstring(svg).iter()]
    return [(said, one) for said, one in found if said is not None]


def test_cells_say_their_numbers_and_are_as_strong_as_these():
    heat = Heat("changes", "layer", "expert", [3, 7], [[0.5, -0.25, 0.0], [0.0, 0.125, 0.5]], "weight")
    chart = chart_of(heat)
    for svg in (chart.wide, chart.narrow):
        cells = {said: one for said, one in told(svg)}
        assert len(cells) == 6
        strong, weak = cells["layer 3, expert 0: +0.5 weight"], cells["layer 3, expert 1: −0.25 weight"]
        assert strong.get("class") == "cell up" and float(strong.get("fill-opacity")) == 1.0
        assert weak.get("class") == "cell down" and float(weak.get("fill-opacity")) == 0.5
        other = cells["layer 7, expert 0: 0 weight"]
        assert strong.get("x") == other.get("x") and float(strong.get("y")) < float(other.get("y"))


def test_rows_of_different_lengths_and_of_nothing_are_drawn():
    assert len(told(chart_of(Heat("t", "layer", "expert", [0, 1], [[1.0], [1.0, 2.0, 3.0]], "u")).wide)) == 4
    assert len(told(chart_of(Heat("t", "layer", "expert", [0], [[0.0, 0.0]], "u")).narrow)) == 2


def test_lines_go_through_their_points_and_markers_say_them():
    marked = Line("measured", "memory", [(0.0, 0.0), (1.0, 2.0)], style="marks")
    own = Line("fitted", "memory", [(1.0, 2.0)], ["the fitted one"], style="ring")
    smooth = Line("area", "fixed", [(0.0, 1.0), (0.5, 3.0), (1.0, 0.5)], style="area")
    chart = chart_of(Curves("t", Axis("x"), Axis("y"), [smooth, marked, own]))
    said = told(chart.wide)
    assert [text for text, _ in said] == ["measured: x 0, y 0", "measured: x 1, y 2", "the fitted one"]
    ring = said[2][1][0]
    marker = said[1][1][0].get("transform")
    assert marker == f"translate({float(ring.get('cx')):.1f},{float(ring.get('cy')):.1f})"
    assert [kind for kind, _ in chart.legend] == ["area fixed", "memory", "ring memory"]
    assert chart_of(Curves("t", Axis("x"), Axis("y"), [smooth])).how == ""  # nothing to point at


def test_each_line_has_as_many_sentences_as_points():
    with pytest.raises(ValueError):
        chart_of(Curves("t", Axis("x"), Axis("y"), [Line("n", "memory", [(0.0, 1.0)], ["a", "b"], "marks")]))


def test_dots_lie_where_their_numbers_are():
    dots = [Dot(0.0, 0.0, 1.0, "one"), Dot(1.0, 0.0, -2.0, "two"), Dot(0.0, 4.0, 0.0, "three")]
    chart = chart_of(Cloud("t", dots, "nats"))
    one, two, three = (one for _, one in told(chart.wide))
    assert one.get("cy") == two.get("cy") and float(one.get("cx")) < float(two.get("cx"))
    assert one.get("cx") == three.get("cx") and float(three.get("cy")) < float(one.get("cy"))
    assert two.get("class") == "dot down" and float(two.get("fill-opacity")) > float(one.get("fill-opacity"))
    assert chart.narrow is None
    assert len(told(chart_of(Cloud("t", [Dot(1.0, 1.0, 0.0, "alone")], "nats")).wide)) == 1


def test_no_text_of_a_figure_is_markup():
    figures = [
        Heat(HOSTILE, HOSTILE, HOSTILE, [0], [[1.0]], HOSTILE, HOSTILE),
        Curves(HOSTILE, Axis(HOSTILE), Axis(HOSTILE), [Line(HOSTILE, "memory", [(0, 0)], [HOSTILE], "marks")]),
        Cloud(HOSTILE, [Dot(0.0, 0.0, 0.0, HOSTILE)], HOSTILE, HOSTILE),
    ]
    document = Document("t", "l", [Section("s", [Charts([chart_of(one) for one in figures]), Text("t", "", HOSTILE)])])
    page = to_html(document)
    assert page.count("<script") == 1 and "alert(1)" in page
    assert page.count("<pre") == 1
    assert "\\<script" in to_markdown(document)
    for figure in figures:
        chart = chart_of(figure)
        for svg in filter(None, (chart.wide, chart.narrow)):
            assert any(HOSTILE in said for said, _ in told(svg))
