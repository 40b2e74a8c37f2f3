"""Labels find their places, collisions are noticed, and every picture shows what was measured without any."""

import random

import numpy
import pytest
from matplotlib import pyplot

from benchmarks.effect.figures import load_cells, points
from benchmarks.effect.labels import Label, collisions, marks, place
from benchmarks.effect.pictures import SERIES, pictures
from benchmarks.effect.settings import COUNTED, GRID_KIND, LABS, MAIN, REFERENCE_COUNTS, SEEDS, SEEDS_OF
from benchmarks.pages import RESULTS
from benchmarks.texts import KINDS


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def scores(shift: float) -> dict:
    nll = [1000.0 + window + 255 * shift for window in range(6)]
    return {"nll": nll, "hits": [50] * 6, "tokens": [255] * 6}


def measured(seed: int) -> dict:
    """Cells of all labs and kinds with random gains and harms, many of them nearly the same."""
    drawn, cells = random.Random(seed), {}
    for lab in LABS:
        for kind in SEEDS_OF:
            settings = {}
            for setting in (*MAIN, *(COUNTED if kind == GRID_KIND else ())):
                gain, harm = drawn.choice((0.2, 0.5, 1.0)) + drawn.gauss(0, 0.02), 10 ** drawn.uniform(-3.5, -0.3)
                found = {text: scores(-gain if text == kind else harm) for text in KINDS}
                entry = {"group": setting.group, "bytes": 10 ** drawn.uniform(5, 8), "build_seconds": 9, "keeps": True}
                settings[setting.name] = entry | {"scores": found, "reference_tokens": 256 * setting.references}
            cells[lab, kind, SEEDS[0]] = {"base": {text: scores(0) for text in KINDS}, "settings": settings}
    return cells


@pytest.mark.parametrize("seed", range(4))
def test_nothing_covers_anything_in_any_picture(seed):
    for name, figure in pictures(measured(seed)).items():
        assert collisions(figure) == [], name


def test_nothing_covers_anything_in_the_pictures_of_what_was_measured():
    cells = {key: content for key, content in load_cells(RESULTS / "effect").items() if key[0] in LABS}
    for name, figure in pictures(cells).items():
        assert collisions(figure) == [], name


def test_every_panel_has_every_series_with_its_labels():
    cells = measured(0)
    harm = pictures(cells)["harm"]
    assert [axis.get_title() for axis in harm.axes] == list(LABS.values())
    wanted = sorted(text for series in SERIES for text in series.labels.values() if text is not None)
    for axis, lab in zip(harm.axes, LABS):
        assert sorted(text.get_text() for text in axis.texts) == wanted and len(wanted) <= 12
        known = {point.name: point for point in points(cells, lab, SEEDS_OF)}
        lines = [line for line in axis.lines if line.get_marker() != "None"]
        for series, line in zip(SERIES, lines, strict=True):
            expected = [[known[name].harm, known[name].gain] for name in series.labels]
            assert line.get_xydata() == pytest.approx(numpy.array(expected))
    assert len({(axis.get_xlim(), axis.get_ylim()) for axis in harm.axes}) == 1
    for figure in pictures(cells).values():
        for axis in figure.axes:
            limits, inside = axis.get_window_extent(), [box for _, box in marks(axis)]
            assert inside and all(limits.x0 < box.x0 and box.x1 < limits.x1 and box.y1 < limits.y1 for box in inside)


def test_what_was_not_measured_is_left_out():
    cells = measured(0)
    for content in cells.values():
        content["settings"] = {name: one for name, one in content["settings"].items() if "LoRA" not in name}
    del cells["gpt_oss", "topics", 0]
    for figure in pictures(cells).values():
        assert collisions(figure) == []
        assert not any("LoRA" in text.get_text() for axis in figure.axes for text in axis.texts)


def test_a_collision_is_noticed():
    figure, axis = pyplot.subplots(figsize=(4, 3))
    figure.subplots_adjust(0.2, 0.2, 0.9, 0.9)
    axis.plot([0, 1], [0, 1], marker="o", label="a series")
    axis.set_xticks([0.0, 1.0])
    assert collisions(figure) == []
    axis.text(0.3, 0.7, "one"), axis.text(0.32, 0.72, "other")
    axis.text(0.98, 0.98, "on it")
    axis.set_xticks([0.0, 0.01, 1.0], ["0.00", "0.01", "1.00"])
    figure.text(0.99, 0.5, "too long for this place")
    assert collisions(figure) == [
        "'0.00' and '0.01'",
        "'one' and 'other'",
        "'on it' and a point of 'a series'",
        "'too long for this place' is cut off",
    ]


def test_labels_of_points_that_are_close_are_put_apart():
    figure, axis = pyplot.subplots(figsize=(5, 4))
    spots = [(0.5 + 0.01 * i, 0.5 + 0.01 * (i % 2)) for i in range(8)]
    axis.plot(*zip(*spots), marker="o", lw=0)
    axis.set_xlim(0, 1), axis.set_ylim(0, 1)
    place(axis, [Label(f"label {i}", *spot, "black") for i, spot in enumerate(spots)])
    assert collisions(figure) == []
    figure.set_dpi(200)
    assert collisions(figure) == []
    with pytest.raises(ValueError, match="no room for the label 'far from"):
        place(axis, [Label("far from the panel", 7.0, 0.5, "black")])


def test_settings_of_the_picture_are_planned_and_the_counts_too():
    planned = {setting.name for setting in MAIN}
    assert {name for series in SERIES for name in series.labels} <= planned
    assert {setting.group for setting in COUNTED} == {REFERENCE_COUNTS}
