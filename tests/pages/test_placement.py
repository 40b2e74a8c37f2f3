"""Labels find places where they cover nothing."""

import random

import pytest

from knnmoe_hf.pages.placement import LEADER, Box, place

PANEL = Box(0, 0, 400, 300)


def around(x: float, y: float) -> Box:
    return Box(x - 4, y - 4, x + 4, y + 4)


def test_a_label_stands_to_the_right_of_its_point_if_there_is_room():
    found = place((50, 10), around(100, 100), [around(100, 100)], [], PANEL)
    assert found.box == pytest.approx((108, 95, 158, 105)) and found.leader is None and found.crossed == 0


def test_a_label_keeps_off_markers_lines_and_the_edge():
    own = around(390, 150)
    assert place((50, 10), own, [own], [], PANEL).box.x1 < 386
    lines = [((0.0, 150.0), (400.0, 150.0))]
    own = around(200, 150)
    found = place((50, 10), own, [own], lines, PANEL)
    assert not found.box.crosses(*lines[0]) and found.crossed == 0


@pytest.mark.parametrize("seed", range(5))
def test_labels_of_a_crowd_cover_nothing(seed):
    drawn = random.Random(seed)
    own = [around(drawn.gauss(200, 25), drawn.gauss(150, 25)) for _ in range(12)]
    taken = list(own)
    for box in own:
        found = place((60, 12), box, taken, [], PANEL)
        assert found.box.is_inside(PANEL) and not any(found.box.overlaps(other) for other in taken)
        if found.leader is not None:
            start, end = found.leader
            assert end == box.middle and found.box.nearest(start) == start
            assert (end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2 > LEADER**2
        taken.append(found.box)


def test_there_may_be_no_room():
    assert place((500, 10), around(200, 150), [], [], PANEL) is None


@pytest.mark.parametrize(
    "start, end, crosses",
    [
        ((-5, 5), (15, 5), True),
        ((-5, -5), (15, 15), True),
        ((-5, 5), (-1, 5), False),
        ((-5, 2), (5, 22), False),
        ((5, 2), (5, 3), True),
        ((12, -5), (12, 20), False),
    ],
)
def test_whether_a_line_crosses_a_box(start, end, crosses):
    assert Box(0, 0, 10, 10).crosses(start, end) is crosses is Box(0, 0, 10, 10).crosses(end, start)
