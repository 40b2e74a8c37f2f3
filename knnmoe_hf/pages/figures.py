"""What plots show, before they are drawn: the same data for a page (`drawn`) and for matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass

from knnmoe_hf.pages.axes import Axis


@dataclass(frozen=True)
class Line:
    """
    A line of a plot.

    Attributes:
        name: in the legend.
        kind: of its colour, one of `svg.KINDS`.
        points: `(x, y)`, in their order.
        told: what is said of each point when it is pointed at; none to say their numbers.
        style: `"line"`; `"marks"` with a marker at each point, which can be pointed at; `"area"`, filled down to 0;
            `"point"`, markers without a line; `"ring"`, a ring around a point of another line.
    """

    name: str
    kind: str
    points: Sequence[tuple[float, float]]
    told: Sequence[str] = ()
    style: str = "line"


@dataclass(frozen=True)
class Curves:
    """
    Lines over two axes.

    Attributes:
        title: plain text.
        x, y: the axes.
        lines: at least one point in all of them.
        rules: where dashed lines cross the plot: at these x, and at these y.
        note: plain text below the plot.
    """

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    rules: tuple[Sequence[float], Sequence[float]] = ((), ())
    note: str = ""


@dataclass(frozen=True)
class Heat:
    """
    A table of numbers as colours: one above 0, another below it.

    Attributes:
        title: plain text.
        rows, columns: what the rows and the columns are, such as `"layer"` and `"expert"`.
        row_names: the number of each row.
        values: by row; rows may have different lengths.
        unit: of the values.
        note: plain text below the plot.
    """

    title: str
    rows: str
    columns: str
    row_names: Sequence[int]
    values: Sequence[Sequence[float]]
    unit: str
    note: str = ""


@dataclass(frozen=True)
class Dot:
    """
    A point of a `Cloud`.

    Attributes:
        x, y: where it is.
        value: that its colour shows, one above 0, another below it.
        told: what is said of it when it is pointed at, plain text.
    """

    x: float
    y: float
    value: float
    told: str


@dataclass(frozen=True)
class Cloud:
    """
    Many points, each of which says something when it is pointed at.

    Attributes:
        title: plain text.
        dots: at least one.
        unit: of their values.
        note: plain text below the plot.
    """

    title: str
    dots: Sequence[Dot]
    unit: str
    note: str = ""


Figure = Curves | Heat | Cloud
