"""Draws figures as charts of a page; each part of them says its numbers when it is pointed at, or reached by keys."""

from collections.abc import Iterator

from markupsafe import Markup

from knnmoe_hf.pages.axes import Axis, Scale, scale_for
from knnmoe_hf.pages.document import Chart
from knnmoe_hf.pages.figures import Cloud, Curves, Figure, Heat, Line
from knnmoe_hf.pages.frame import NARROW, SIZE, WIDE, across, framed, line, panel_of, picture
from knnmoe_hf.pages.numbers import plain
from knnmoe_hf.pages.svg import marker, ring, shortened, tag, text, text_width

_HEIGHT = 300.0  # of curves
_CLOUD = 480.0  # width and height of a cloud
_CELL, _LEAST_CELL = 18.0, 7.0  # height of a cell of a heat map, pixels
_SWATCHES = 9
_FAINTEST = 0.12  # opacity of a dot whose value is about 0; a cell is not drawn there
HOW = {
    Curves: "Point at a marker to read it; with the keyboard, go to the plot and use the arrow keys.",
    Heat: "Point at a cell to read it; with the keyboard, go to the plot and use the arrow keys.",
    Cloud: "Point at a dot to read it; with the keyboard, go to the plot and use the arrow keys, or Page Up and Down.",
}


def chart_of(figure: Figure) -> Chart:
    """A figure, drawn for wide and for narrow windows."""
    how = HOW[type(figure)]
    match figure:
        case Curves():
            wide, narrow = (_curves(figure, width) for width in (WIDE, NARROW))
            legend = [(_sample(one), one.name) for one in figure.lines if one.points]
            how = how if any(_is_pointed_at(one) for one in figure.lines) else ""
            return Chart(figure.title, wide, narrow, figure.note, legend, how)
        case Heat():
            wide, narrow = (_heat(figure, width) for width in (WIDE, NARROW))
            return Chart(figure.title, wide, narrow, figure.note, (), how)
        case Cloud():
            drawn = _cloud(figure)
            return Chart(figure.title, drawn, None, figure.note, (), how)


def _is_pointed_at(one: Line) -> bool:
    return one.style in ("marks", "point", "ring")


def _sample(one: Line) -> str:
    """The kind of a line's sample in the legend."""
    return one.kind if one.style in ("marks", "point") else f"{one.style} {one.kind}"


def _told(element: Markup, said: str) -> Markup:
    return tag("g", element, data_told=said)


# curves


def _curves(figure: Curves, width: float) -> Markup:
    panel = panel_of(width, _HEIGHT)
    xs, ys = ([*of, *(point[i] for one in figure.lines for point in one.points)] for i, of in enumerate(figure.rules))
    ys += [0.0 for one in figure.lines if one.style == "area"]
    scales = scale_for(xs, figure.x, panel.x0, panel.x1), scale_for(ys, figure.y, panel.y1, panel.y0)
    drawn = framed((figure.x, figure.y), scales, panel)
    drawn += [line(*ends, "rule") for ends in across(figure.rules, scales, panel)]
    for one in figure.lines:
        drawn += _line(one, (figure.x, figure.y), scales)
    return picture(drawn, figure.title, width, _HEIGHT)


def _line(one: Line, axes: tuple[Axis, Axis], scales: tuple[Scale, Scale]) -> Iterator[Markup]:
    spots = [(scales[0].at(x), scales[1].at(y)) for x, y in one.points]
    if not spots:
        return
    if one.style == "area":
        ground = scales[1].at(0.0)
        spots = [(spots[0][0], ground), *spots, (spots[-1][0], ground)]
    if one.style not in ("point", "ring"):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        name = "area" if one.style == "area" else "path"
        yield tag("polygon" if one.style == "area" else "polyline", points=points, class_=f"{name} {one.kind}")
    if _is_pointed_at(one):
        told = one.told or [_numbers(one.name, point, axes) for point in one.points]
        for spot, said in zip(spots, told, strict=True):
            yield _told(ring(one.kind, *spot) if one.style == "ring" else marker(one.kind, *spot), said)


def _numbers(name: str, point: tuple[float, float], axes: tuple[Axis, Axis]) -> str:
    return f"{name}: {axes[0].title} {plain(point[0])}, {axes[1].title} {plain(point[1])}"


# heat maps


def _heat(figure: Heat, width: float) -> Markup:
    columns = max(map(len, figure.values))
    extent = max((abs(value) for row in figure.values for value in row), default=0.0)
    names = [str(name) for name in figure.row_names]
    left = max(text_width(name, SIZE) for name in [*names, figure.rows]) + 8
    cell = (width - left - 2) / columns
    height = max(min(_CELL, cell), _LEAST_CELL)
    top = 58.0
    bottom = top + height * len(names)
    drawn = [*_key(extent, figure.unit, width), text(figure.rows, 0, top - 10, SIZE, "axis")]
    drawn.append(tag("rect", x=left, y=top, width=cell * columns, height=bottom - top, class_="plate"))
    each = max(1, round(16 / height))  # rows of which one is named
    for place, (name, row) in enumerate(zip(names, figure.values)):
        y = top + place * height
        if place % each == 0:
            drawn.append(text(name, left - 6, y + height / 2, SIZE, "tick", "end"))
        for column, value in enumerate(row):
            said = f"{figure.rows} {name}, {figure.columns} {column}: {_signed(value)} {figure.unit}"
            box = _box(left + column * cell, y, cell, height, value / extent if extent else 0.0)
            drawn.append(tag("rect", data_told=said, **box))
    drawn += _below(figure.columns, columns, left, cell, bottom)
    return picture(drawn, figure.title, width, bottom + 40)


def _box(x: float, y: float, width: float, height: float, share: float) -> dict[str, object]:
    """The attributes of a cell whose value is this share, -1 to 1, of the largest."""
    opacity = f"{abs(share):.2f}"
    size = dict(x=f"{x:.2f}", y=f"{y:.2f}", width=f"{width:.2f}", height=f"{height:.2f}")
    return size | dict(class_=f"cell {'up' if share > 0 else 'down'}", fill_opacity=opacity)


def _below(name: str, columns: int, left: float, cell: float, bottom: float) -> Iterator[Markup]:
    """The numbers of the columns, as many as there is room for, and what they are."""
    room = text_width("0" * len(str(columns)), SIZE) + 8
    each = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 2**15) if step * cell >= room)
    for column in range(0, columns, each):
        yield text(str(column), left + (column + 0.5) * cell, bottom + 12, SIZE, "tick", "middle")
    yield text(name, left + columns * cell, bottom + 30, SIZE, "axis", "end")


def _key(extent: float, unit: str, width: float) -> Iterator[Markup]:
    """What the colours are, from the lowest to the highest."""
    low, high = _signed(-extent), f"{_signed(extent)} {unit}"
    x = text_width(low, SIZE) + 8
    high = shortened(high, int((width - x - _SWATCHES * 14 - 8) / text_width(" ", SIZE)))
    yield text(low, 0, 15, SIZE, "tick")
    for place in range(_SWATCHES):
        share = 2 * place / (_SWATCHES - 1) - 1
        yield tag("rect", **_box(x + place * 14, 8, 14, 14, share))
    yield text(high, x + _SWATCHES * 14 + 8, 15, SIZE, "tick")


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{plain(abs(value))}"


# clouds


def _cloud(figure: Cloud) -> Markup:
    inside = 12.0
    xs, ys = [dot.x for dot in figure.dots], [dot.y for dot in figure.dots]
    across_x = scale_for(xs, Axis(""), inside, _CLOUD - inside)
    across_y = scale_for(ys, Axis(""), _CLOUD - inside, inside + 24)
    extent = max(abs(dot.value) for dot in figure.dots)
    drawn = list(_key(extent, figure.unit, _CLOUD)) if extent else []
    drawn.append(tag("rect", x=0.5, y=28.0, width=_CLOUD - 1, height=_CLOUD - 29, class_="plate"))
    for dot in figure.dots:
        share = dot.value / extent if extent else 0.0
        opacity = f"{_FAINTEST + (1 - _FAINTEST) * abs(share):.2f}" if extent else "0.5"
        name = f"dot {'up' if share >= 0 else 'down'}"
        place = dict(cx=across_x.at(dot.x), cy=across_y.at(dot.y), r=5.0)
        drawn.append(tag("circle", data_told=dot.told, class_=name, fill_opacity=opacity, **place))
    return picture(drawn, figure.title, _CLOUD, _CLOUD)
