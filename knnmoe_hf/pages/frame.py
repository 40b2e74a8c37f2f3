"""What plots have around their data: a panel with its axes, ticks and dashed lines."""

from collections.abc import Sequence

from markupsafe import Markup

from knnmoe_hf.pages.axes import Axis, Scale, tick_label
from knnmoe_hf.pages.placement import Box, Point
from knnmoe_hf.pages.svg import join, shortened, tag, text, text_width

WIDE, NARROW = 560.0, 334.0  # pixels
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 30.0, 50.0
SIZE = 12.0  # of letters


def panel_of(width: float, height: float) -> Box:
    """Where the data is in a plot of this size."""
    return Box(LEFT, TOP, width - RIGHT, height - BOTTOM)


def framed(axes: tuple[Axis, Axis], scales: tuple[Scale, Scale], panel: Box) -> list[Markup]:
    """Grid, ticks and titles of both axes."""
    drawn = []
    for number in scales[0].ticks(max(2, int((panel.x1 - panel.x0) / 60))):
        place_of, shown = scales[0].at(number), tick_label(axes[0], number)
        drawn.append(line((place_of, panel.y0), (place_of, panel.y1), "grid"))
        half = text_width(shown, SIZE) / 2
        at = min(max(place_of, half), panel.x1 + RIGHT - half)
        drawn.append(text(shown, at, panel.y1 + 14, SIZE, "tick", "middle"))
    for number in scales[1].ticks(6):
        place_of, shown = scales[1].at(number), tick_label(axes[1], number)
        drawn.append(line((panel.x0, place_of), (panel.x1, place_of), "grid"))
        drawn.append(text(shown, panel.x0 - 6, place_of, SIZE, "tick", "end"))
    most = int((panel.x1 + RIGHT) / text_width(" ", SIZE))
    drawn.append(text(shortened(axes[1].title, most), 0, 12, SIZE, "axis"))
    drawn.append(text(shortened(axes[0].title, most), panel.x1 + RIGHT, panel.y1 + 36, SIZE, "axis", "end"))
    return drawn


def across(
    rules: tuple[Sequence[float], Sequence[float]], scales: tuple[Scale, Scale], panel: Box
) -> list[tuple[Point, Point]]:
    """Both ends of the lines across a panel at these x, and at these y."""
    vertical = [((x, panel.y0), (x, panel.y1)) for x in map(scales[0].at, rules[0])]
    return vertical + [((panel.x0, y), (panel.x1, y)) for y in map(scales[1].at, rules[1])]


def line(start: Point, end: Point, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=float(start[0]), y1=float(start[1]), x2=float(end[0]), y2=float(end[1]), class_=class_)


def picture(drawn: Sequence[Markup], title: str, width: float, height: float) -> Markup:
    """What was drawn as one plot."""
    size = f"0 0 {width:g} {height:g}"
    return tag("svg", join(list(drawn)), viewBox=size, role="img", aria_label=title, class_="chart")
