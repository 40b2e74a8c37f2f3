"""Labels beside the points of a picture: where there is room for them, and a check that nothing covers anything."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from knnmoe_hf.pages import placement
from knnmoe_hf.pages.placement import Box, Point


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
    taken, lines = [_box(box) for _, box in marks(axis)], list(_segments(axis))
    for label in labels:
        text = axis.text(
            0, 0, label.text, fontsize=size, color=label.colour, va="center", transform=figure.transFigure
        )
        extent = text.get_window_extent(renderer)
        anchor = tuple(axis.transData.transform((label.x, label.y)))
        own = next((box for box in taken if Box(*anchor, *anchor).is_inside(box)), Box(*anchor, *anchor))
        found = placement.place((extent.width, extent.height), own, taken, lines, _box(panel), unit)
        if found is None:
            raise ValueError(
                f"there is no room for the label {label.text!r}: leave it out, or make the picture larger."
            )
        to_figure = figure.transFigure.inverted().transform  # holds at every resolution
        text.set_position(to_figure((found.box.x0, found.box.middle[1])))
        if found.leader is not None:
            ends = to_figure(found.leader)
            axis.plot(*ends.T, color=label.colour, lw=0.5, alpha=0.6, transform=figure.transFigure, zorder=1.5)
        taken.append(found.box)


def collisions(figure: Figure) -> list[str]:
    """What covers what: texts, axis marks included, each other, markers or the edge of the picture."""
    figure.canvas.draw()
    renderer, found = figure.canvas.get_renderer(), []
    texts = [(text.get_text(), text.get_window_extent(renderer)) for text in _texts(figure)]
    for (one, box), (other, box_of_other) in itertools.combinations(texts, 2):
        if _box(box).overlaps(_box(box_of_other)):
            found.append(f"{one!r} and {other!r}")
    for axis in figure.axes:
        for (text, box), (name, mark) in itertools.product(texts, marks(axis)):
            if _box(box).overlaps(_box(mark)):
                found.append(f"{text!r} and a point of {name!r}")
    return found + [f"{text!r} is cut off" for text, box in texts if not _box(box).is_inside(_box(figure.bbox))]


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


def _segments(axis: Axes) -> Iterator[tuple[Point, Point]]:
    leaders = axis.figure.transFigure
    for line in axis.lines:
        if line.get_linestyle() != "None" and len(line.get_xydata()) > 1 and line.get_transform() != leaders:
            yield from itertools.pairwise(map(tuple, line.get_transform().transform(line.get_xydata())))


def _box(extent: Bbox) -> Box:
    return Box(extent.x0, extent.y0, extent.x1, extent.y1)
