"""Plots as inline SVG, which the page's style gives its colours: points with their labels, and bars in tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from knnmoe_hf.pages.axes import Axis, Scale, scale_for
from knnmoe_hf.pages.document import Chart
from knnmoe_hf.pages.frame import BOTTOM, NARROW, SIZE, WIDE, across, framed, line, panel_of, picture
from knnmoe_hf.pages.placement import NEAR, Box, Placed, Point, place
from knnmoe_hf.pages.svg import MARKER, join, marker, shortened, tag, text, text_width

_LINE = 16.0  # height of a label
_DISTANCES = (*NEAR, 70, 90, 115, 145, 180, 220, 270, 330, 400)
_HEIGHTS = (360.0, 420.0, 500.0, 600.0)  # that are tried
_HIGHER = (760.0, 1000.0)  # that are tried if a label has no room in any of these
_NO_ROOM = 100  # crossings that are better than a label without room
_LABEL = 28  # letters


@dataclass(frozen=True)
class Mark:
    """
    A point of a plot.

    Attributes:
        label: beside it.
        x, y: of the data.
        kind: of its marker, one of `svg.KINDS`.
        x_range, y_range: its interval; None if there is none.
    """

    label: str
    x: float
    y: float
    kind: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


def scatter(
    title: str,
    marks: Sequence[Mark],
    x: Axis,
    y: Axis,
    rules: tuple[Sequence[float], Sequence[float]] = ((), ()),
    note: str = "",
) -> Chart:
    """
    Points with labels that cover nothing, for wide and for narrow windows.

    Args:
        title: of the plot.
        marks: at least one.
        x, y: the axes.
        rules: where to draw a line across the plot: at these x, and at these y.
        note: below the plot.
    """
    wide, narrow = (_drawn(title, marks, (x, y), rules, width) for width in (WIDE, NARROW))
    return Chart(title, wide, narrow, note)


def _drawn(title: str, marks: Sequence[Mark], axes: tuple[Axis, Axis], rules: tuple, width: float) -> Markup:
    panel, scales, spots, found = _layout(marks, axes, rules, width)
    drawn = [*framed(axes, scales, panel), *(line(*ends, "rule") for ends in across(rules, scales, panel))]
    drawn += [one for mark, spot in zip(marks, spots) for one in _ranges(mark, spot, scales)]
    drawn += [_leader(one) for one in found if one is not None and one.leader is not None]
    drawn += [marker(mark.kind, *spot, _told(mark, axes)) for mark, spot in zip(marks, spots)]
    for mark, one in zip(marks, found):
        if one is not None:  # what has no room even in the highest plot is told when it is pointed at
            name = f"label {mark.kind}"
            drawn.append(text(shortened(mark.label, _LABEL), one.box.x0, one.box.middle[1], SIZE, name))
    return picture(drawn, title, width, panel.y1 + BOTTOM)


def _layout(
    marks: Sequence[Mark], axes: tuple[Axis, Axis], rules: tuple, width: float
) -> tuple[Box, tuple[Scale, Scale], list[Point], list[Placed | None]]:
    """The panel, scales, points and labels of the lowest plot in which the labels have room and cross the least."""
    best = None
    for height in (*_HEIGHTS, *_HIGHER):
        if best is not None and (best[0] == 0 or height in _HIGHER and best[0] < _NO_ROOM):
            break
        panel = panel_of(width, height)
        scales = _scales(marks, axes, rules, panel)
        spots = [(scales[0].at(mark.x), scales[1].at(mark.y)) for mark in marks]
        found = _labels(marks, spots, scales, panel, rules)
        trouble = sum(_NO_ROOM if one is None else one.crossed for one in found)
        if best is None or trouble < best[0]:
            best = (trouble, (panel, scales, spots, found))
    return best[1]


def _scales(marks: Sequence[Mark], axes: tuple[Axis, Axis], rules: tuple, panel: Box) -> tuple[Scale, Scale]:
    xs = [*rules[0], *(number for mark in marks for number in (mark.x, *(mark.x_range or ())))]
    ys = [*rules[1], *(number for mark in marks for number in (mark.y, *(mark.y_range or ())))]
    return scale_for(xs, axes[0], panel.x0, panel.x1), scale_for(ys, axes[1], panel.y1, panel.y0)


def _labels(
    marks: Sequence[Mark], spots: Sequence[Point], scales: tuple[Scale, Scale], panel: Box, rules: tuple
) -> list[Placed | None]:
    """Where each label has room; None for one without."""
    own = [Box(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in spots]
    taken, lines = list(own), across(rules, scales, panel)
    for mark, (x, y) in zip(marks, spots):
        lines += [((scales[0].at(end), y), (x, y)) for end in mark.x_range or ()]
        lines += [((x, scales[1].at(end)), (x, y)) for end in mark.y_range or ()]
    found: list[Placed | None] = []
    for mark, box in zip(marks, own):
        size = (text_width(shortened(mark.label, _LABEL), SIZE), _LINE)
        found.append(one := place(size, box, taken, lines, panel, distances=_DISTANCES, leader_from=7))
        if one is not None:
            taken.append(one.box)
            lines += [one.leader] if one.leader is not None else []
    return found


def _ranges(mark: Mark, spot: Point, scales: tuple[Scale, Scale]) -> list[Markup]:
    drawn = []
    if mark.x_range is not None:
        ends = [(scales[0].at(end), spot[1]) for end in mark.x_range]
        drawn.append(line(*ends, f"range {mark.kind}"))
    if mark.y_range is not None:
        ends = [(spot[0], scales[1].at(end)) for end in mark.y_range]
        drawn.append(line(*ends, f"range {mark.kind}"))
    return drawn


def _leader(placed: Placed) -> Markup:
    return line(*placed.leader, "leader")


def _told(mark: Mark, axes: tuple[Axis, Axis]) -> str:
    return f"{mark.label}: {axes[0].title} {mark.x:.4g}, {axes[1].title} {mark.y:.4g}"


def bar(change: float, low: float | None, high: float | None, extent: float) -> Markup:
    """
    A bar to the right or to the left of a zero line, with its interval, as wide as the table's cell lets it be.

    Args:
        change: the number.
        low, high: bounds of its interval; None if there is none.
        extent: the number at the right edge; its negative is at the left one.
    """

    def at(number: float) -> float:
        return 100 + 98 * max(-1.0, min(1.0, number / extent))

    is_sure = low is not None and high is not None and (low > 0 or high < 0)
    name = f"bar {'up' if change > 0 else 'down'}{' sure' if is_sure else ''}"
    left, right = sorted((at(0.0), at(change)))
    drawn = [tag("rect", x=left, y=4.0, width=max(0.5, right - left), height=10.0, class_=name)]
    drawn.append(line((at(0.0), 0.0), (at(0.0), 18.0), "rule"))
    if low is not None and high is not None:
        drawn.append(line((at(low), 9.0), (at(high), 9.0), "whisker"))
        drawn += [line((at(end), 5.0), (at(end), 13.0), "whisker") for end in (low, high)]
    return tag("svg", join(drawn), viewBox="0 0 200 18", preserveAspectRatio="none", class_="bars", aria_hidden="true")
