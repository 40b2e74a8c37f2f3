"""Where the labels of a plot's points have room: plain geometry, for plots of every kind."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

_ANGLES = (0, 180, 45, -45, 135, -135, 90, -90, 22, -22, 158, -158)  # degrees; to the right first
NEAR = (4, 7, 10, 15, 21, 28, 36, 45, 55)  # points, from the marker's edge
LEADER = 11  # points; labels that are as far away, or further, get a line to their point
_SLACK = 1.0  # points between two things
_CROSSING = 12  # points further away that a label would rather be than lie on a line
_THROUGH = 40  # the same, than that its line to its point goes through something

Point = tuple[float, float]


class Box(NamedTuple):
    """A rectangle; neither axis has a direction that matters."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def middle(self) -> Point:
        """Its centre."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def overlaps(self, other: "Box", slack: float = 0.0) -> bool:
        """Whether the two are less than `slack` apart."""
        apart = self.x1 + slack <= other.x0 or other.x1 + slack <= self.x0
        return not (apart or self.y1 + slack <= other.y0 or other.y1 + slack <= self.y0)

    def is_inside(self, other: "Box") -> bool:
        """Whether all of it lies in another box."""
        return other.x0 <= self.x0 and self.x1 <= other.x1 and other.y0 <= self.y0 and self.y1 <= other.y1

    def nearest(self, point: Point) -> Point:
        """The point of the box that is nearest to another point."""
        return min(max(point[0], self.x0), self.x1), min(max(point[1], self.y0), self.y1)

    def crosses(self, start: Point, end: Point) -> bool:
        """Whether a line has a point in the box (Liang and Barsky 1984)."""
        first, last = 0.0, 1.0
        for begin, step, low, high in (
            (start[0], end[0] - start[0], self.x0, self.x1),
            (start[1], end[1] - start[1], self.y0, self.y1),
        ):
            if step == 0:
                if not low <= begin <= high:
                    return False
                continue
            bounds = sorted(((low - begin) / step, (high - begin) / step))
            first, last = max(first, bounds[0]), min(last, bounds[1])
        return first <= last


class Placed(NamedTuple):
    """
    Where a label is.

    Attributes:
        box: its place.
        leader: the line from there to its point; None for a label close to it.
        crossed: lines that it lies on, and things that its own line goes through.
    """

    box: Box
    leader: tuple[Point, Point] | None
    crossed: int


def place(
    size: tuple[float, float],
    own: Box,
    taken: Sequence[Box],
    lines: Sequence[tuple[Point, Point]],
    panel: Box,
    unit: float = 1.0,
    distances: Sequence[float] = NEAR,
    leader_from: float = LEADER,
) -> Placed | None:
    """
    The place of a label near its point where it covers nothing, crossing lines as little as possible.

    Args:
        size: width and height of the label.
        own: box of its point's marker.
        taken: boxes of all markers, and of what was placed before.
        lines: that it should not cross.
        panel: that it must not leave.
        unit: length of a point (1/72 inch) in the coordinates of all these.
        distances: from the marker's edge that are tried, in points.
        leader_from: the least of them at which a line is drawn to the point.

    Returns:
        The place; None if there is no room, or if the point is outside of the panel.
    """
    best = None
    fits = size[0] <= panel.x1 - panel.x0 and size[1] <= panel.y1 - panel.y0
    if not fits or not Box(*own.middle, *own.middle).is_inside(panel):
        return None
    for distance, angle in itertools.product(distances, _ANGLES):
        if best is not None and best[0] <= distance:
            break
        found = _moved_into(panel, _beside(own, *size, distance * unit, math.radians(angle)))
        if any(found.overlaps(other, _SLACK * unit) for other in taken):
            continue
        leader = (found.nearest(own.middle), own.middle) if distance >= leader_from else None
        on = sum(found.crosses(*line) for line in lines)
        through = 0 if leader is None else sum(other.crosses(*leader) for other in taken if other != own)
        cost = _CROSSING * on + _THROUGH * through + distance
        if best is None or cost < best[0]:
            best = (cost, Placed(found, leader, on + through))
    return None if best is None else best[1]


def _moved_into(panel: Box, box: Box) -> Box:
    """The box, moved as little as needed to be in the panel."""
    x = max(panel.x0 - box.x0, 0.0) + min(panel.x1 - box.x1, 0.0)
    y = max(panel.y0 - box.y0, 0.0) + min(panel.y1 - box.y1, 0.0)
    return Box(box.x0 + x, box.y0 + y, box.x1 + x, box.y1 + y)


def _beside(own: Box, width: float, height: float, distance: float, angle: float) -> Box:
    """A box of this size in this direction from the marker's box, `distance` away from it."""
    towards = math.cos(angle), math.sin(angle)
    x = own.middle[0] + towards[0] * (distance + (own.x1 - own.x0 + width) / 2)
    y = own.middle[1] + towards[1] * (distance + (own.y1 - own.y0 + height) / 2)
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
