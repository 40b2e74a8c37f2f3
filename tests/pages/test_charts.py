"""Plots as SVG: points where their numbers are, labels that cover nothing, round ticks, bars with their intervals."""

import random
import re
from xml.etree import ElementTree

import pytest

from knnmoe_hf.pages.axes import Axis, scale_for
from knnmoe_hf.pages.charts import NARROW, WIDE, Mark, bar, scatter
from knnmoe_hf.pages.placement import Box
from knnmoe_hf.pages.svg import text_width


def boxes(svg: str) -> list[tuple[str, Box]]:
    """The texts and markers of a plot, with their boxes."""
    found = []
    for one in ElementTree.fromstring(svg).iter():
        if one.tag == "text":
            size, x, y = (float(one.get(name)) for name in ("font-size", "x", "y"))
            width = text_width(one.text, size)
            assert float(one.get("textLength")) == pytest.approx(width, abs=0.1)
            left = {"start": x, "middle": x - width / 2, "end": x - width}[one.get("text-anchor")]
            found.append((one.text, Box(left, y - 0.75 * size, left + width, y + 0.25 * size)))
        elif one.tag == "g":
            x, y = map(float, re.findall(r"[-\d.]+", one.get("transform")))
            found.append(("", Box(x - 5, y - 5, x + 5, y + 5)))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_texts_cover_neither_each_other_nor_markers_nor_the_edge(seed):
    drawn = random.Random(seed)
    kinds = ("memory", "frozen", "fixed", "trained")
    marks = [
        Mark(
            f"a_method_with_a_name_{i}", 10 ** drawn.gauss(-1, 0.1 if seed else 0.0), drawn.gauss(60, 3), kinds[i % 4]
        )
        for i in range(19)
    ]
    marks.append(Mark("one that is slow", 3.0, 61.0, "fixed"))
    chart = scatter("a title", marks, Axis("seconds", is_log=True), Axis("accuracy, %"), ((), (57.0,)))
    for svg, width in ((chart.wide, WIDE), (chart.narrow, NARROW)):
        found = boxes(svg)
        height = float(ElementTree.fromstring(svg).get("viewBox").split()[3])
        texts = [one for one in found if one[0]]
        assert {mark.label for mark in marks} <= {text for text, _ in texts}
        for number, (text, box) in enumerate(texts):
            assert box.is_inside(Box(-0.5, 0, width + 0.5, height)), text
            for other, other_box in texts[number + 1 :]:
                assert not box.overlaps(other_box), (text, other)
            assert not any(box.overlaps(marker, -1.0) for name, marker in found if not name), text


def test_points_are_where_their_numbers_are():
    marks = [Mark("low", 0.1, 10.0, "fixed"), Mark("middle", 1.0, 20.0, "memory"), Mark("high", 10.0, 40.0, "trained")]
    svg = scatter("t", marks, Axis("x", is_log=True), Axis("y")).wide
    (x0, y0), (x1, y1), (x2, y2) = (box.middle for name, box in boxes(svg) if not name)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1
    assert y0 - y1 == pytest.approx((y1 - y2) / 2, abs=0.2) and y0 > y1
    assert "middle: x 1, y 20" in svg


def test_intervals_and_rules_are_drawn():
    svg = scatter("t", [Mark("a", 1.0, 2.0, "fixed", (0.5, 2.0), (1.0, 3.0))], Axis("x"), Axis("y"), ((0.0,), (0.0,)))
    lines = [one.get("class") for one in ElementTree.fromstring(svg.wide).iter("line")]
    assert lines.count("range fixed") == 2 and lines.count("rule") == 2


@pytest.mark.parametrize(
    "numbers, is_log, ticks",
    [
        ([0, 10], False, [0, 2, 4, 6, 8, 10]),
        ([57.2, 57.2], False, [54, 56, 58, 60]),
        ([0.04, 1.4], True, [0.05, 0.1, 0.2, 0.5, 1]),
        ([1, 10**6], True, [1, 100, 10000, 1000000]),
        ([4, 4.1], True, [4, 4.02, 4.04, 4.06, 4.08, 4.1]),
        ([0, 4], True, [0, 1, 2, 3, 4]),  # there is no logarithm of 0
        ([-0.02, 0.03], False, [-0.02, -0.01, 0, 0.01, 0.02, 0.03]),
    ],
)
def test_ticks_are_round_numbers(numbers, is_log, ticks):
    scale = scale_for(numbers, Axis("", is_log), 0, 100)
    assert scale.ticks(6) == pytest.approx(ticks)
    assert all(0 < scale.at(number) < 100 for number in numbers)


def test_a_bar_and_its_interval():
    svg = ElementTree.fromstring(bar(0.5, 0.25, 1.0, extent=1.0))
    (rect,) = svg.iter("rect")
    assert (rect.get("x"), rect.get("width"), rect.get("class")) == ("100", "49", "bar up sure")
    ends = [float(line.get("x1")) for line in svg.iter("line") if line.get("class") == "whisker"]
    assert ends == [124.5, 124.5, 198]
    assert 'class="bar down"' in bar(-0.5, -1.0, 0.1, 1.0)
    assert "whisker" not in bar(-0.5, None, None, 1.0) and "bar down" in bar(-0.5, None, None, 1.0)
