"""Labels beside the points of a picture: where there is room for them, and a check that nothing covers anything."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

_ANGLES = (0, 180, 45, -45, 135, -135, 90, -90, 22, -22, 158, -158)  # degrees; to the right first
_DISTANCES = (4, 7, 10, 15, 21, 28, 36, 45, 55)  # points, from the marker's edge
_LEADER = 11  # points; further labels get a line to their point
_SLACK = 1.0  # points between two things


class Label(NamedTuple):
    """A text for the point at (x, y) of the data, in a colour."""

    text: str
    x: float
    y: float
    colour: str


def place(axis: Axes, labels: Sequence[Label], size: float = 8) -> None:
    """
    Writes labels so that none covers a marker, another label or the panel's edge, and lines as little as possible.

    The layout of the figure and the limits of the axes must be final.

    Raises:
        ValueError: if there is no room for a label.
    """
    figure, panel = axis.figure, axis.get_window_extent()
    renderer, unit = figure.canvas.get_renderer(), figure.dpi / 72
    taken, lines = [box for _, box in marks(axis)], list(_segments(axis))
    for label in labels:
        text = axis.text(
            0, 0, label.text, fontsize=size, color=label.colour, va="center", transform=figure.transFigure
        )
        box = text.get_window_extent(renderer)
        anchor = axis.transData.transform((label.x, label.y))
        own = next((box for box in taken if box.contains(*anchor)), Bbox([anchor, anchor]))
        best = None
        for distance, angle in itertools.product(_DISTANCES, _ANGLES):
            found = _beside(own, box.width, box.height, distance * unit, math.radians(angle))
            if any(_overlap(found, other, _SLACK * unit) for other in taken) or not _inside(found, panel):
                continue
            cost = 12 * sum(_crosses(found, *line) for line in lines) + distance
            if best is None or cost < best[0]:
                best = (cost, distance, found)
        if best is None:
            raise ValueError(
                f"there is no room for the label {label.text!r}: leave it out, or make the picture larger."
            )
        _, distance, found = best
        to_figure = figure.transFigure.inverted().transform  # holds at every resolution
        text.set_position(to_figure((found.x0, (found.y0 + found.y1) / 2)))
        if distance >= _LEADER:
            ends = to_figure([numpy.clip(anchor, found.min, found.max), anchor])
            axis.plot(*ends.T, color=label.colour, lw=0.5, alpha=0.6, transform=figure.transFigure, zorder=1.5)
        taken.append(found)


def collisions(figure: Figure) -> list[str]:
    """What covers what: texts, axis marks included, each other, markers or the edge of the picture."""
    figure.canvas.draw()
    renderer, found = figure.canvas.get_renderer(), []
    texts = [(text.get_text(), text.get_window_extent(renderer)) for text in _texts(figure)]
    for (one, box), (other, box_of_other) in itertools.combinations(texts, 2):
        if _overlap(box, box_of_other, 0):
            found.append(f"{one!r} and {other!r}")
    for axis in figure.axes:
        for (text, box), (name, mark) in itertools.product(texts, marks(axis)):
            if _overlap(box, mark, 0):
                found.append(f"{text!r} and a point of {name!r}")
    return found + [f"{text!r} is cut off" for text, box in texts if not _inside(box, figure.bbox)]


def marks(axis: Axes) -> Iterator[tuple[str, Bbox]]:
    """The box of each marker in a panel, with the name of its series."""
    unit = axis.figure.dpi / 72
    for line in axis.lines:
        if line.get_marker() not in ("None", "", None):
            half = unit * (line.get_markersize() + line.get_markeredgewidth()) / 2
            for x, y in axis.transData.transform(line.get_xydata()):
                yield str(line.get_label()), Bbox([[x - half, y - half], [x + half, y + half]])


def _texts(figure: Figure) -> Iterator[Text]:
    of_ticks = set()
    for axis in figure.axes:
        for side in (axis.xaxis, axis.yaxis):
            low, high = sorted(side.get_view_interval())
            for tick in (*side.get_major_ticks(), *side.get_minor_ticks()):
                of_ticks |= {tick.label1, tick.label2}
                if low <= tick.get_loc() <= high:
                    yield from (one for one in (tick.label1, tick.label2) if one.get_visible() and one.get_text())
    for text in figure.findobj(Text):
        if text not in of_ticks and text.get_visible() and text.get_text().strip():
            yield text


def _segments(axis: Axes) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    leaders = axis.figure.transFigure
    for line in axis.lines:
        if line.get_linestyle() != "None" and len(line.get_xydata()) > 1 and line.get_transform() != leaders:
            yield from itertools.pairwise(line.get_transform().transform(line.get_xydata()))


def _beside(own: Bbox, width: float, height: float, distance: float, angle: float) -> Bbox:
    """A box of this size in this direction from the marker's box, `distance` away from it."""
    towards = numpy.array([math.cos(angle), math.sin(angle)])
    middle = (own.min + own.max) / 2 + towards * distance
    x = middle[0] + towards[0] * (own.width + width) / 2
    y = middle[1] + towards[1] * (own.height + height) / 2
    return Bbox([[x - width / 2, y - height / 2], [x + width / 2, y + height / 2]])


def _overlap(one: Bbox, other: Bbox, slack: float) -> bool:
    apart = one.x1 + slack <= other.x0 or other.x1 + slack <= one.x0
    return not (apart or one.y1 + slack <= other.y0 or other.y1 + slack <= one.y0)


def _inside(one: Bbox, other: Bbox) -> bool:
    return other.x0 <= one.x0 and one.x1 <= other.x1 and other.y0 <= one.y0 and one.y1 <= other.y1


def _crosses(box: Bbox, start: numpy.ndarray, end: numpy.ndarray) -> bool:
    """Whether any of 200 points along a line lies in the box."""
    along = start + (end - start) * numpy.linspace(0, 1, 200)[:, None]
    return bool(((box.min <= along) & (along <= box.max)).all(axis=1).any())
