"""What a report is made of, before it is a page of HTML or of Markdown: both show the same parts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup

Tone = Literal["", "good", "bad", "broken", "quiet"]


@dataclass(frozen=True)
class Cell:
    """
    One cell of a table.

    Attributes:
        text: what is shown, plain text.
        value: what `text` is rounded from; pages keep it beside the text.
        tone: how it is shown in pages: `"good"` and `"bad"` for changes that an interval is sure of.
        picture: SVG in place of the text, of what another cell of the row says.
        span: columns that it fills.
    """

    text: str
    value: float | str | None = None
    tone: Tone = ""
    picture: Markup | None = None
    span: int = 1


@dataclass(frozen=True)
class Column:
    """
    Attributes:
        name: plain text.
        is_number: whether its cells are aligned to the right.
        is_picture: whether its cells are pictures, which Markdown leaves out.
    """

    name: str
    is_number: bool = True
    is_picture: bool = False


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        title: plain text above it; the name of its box, which scrolls sideways.
        columns: the first holds what the rows are called.
        rows: each with as many cells as there are columns, where a cell may fill several.
        note: plain text below it.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Text:
    """
    A paragraph of plain text.

    Attributes:
        text: of the paragraph.
        tone: of its colour.
        command: for a shell, on a line of its own below it; empty for none.
    """

    text: str
    tone: Tone = ""
    command: str = ""


@dataclass(frozen=True)
class Points:
    """A list of sentences, plain text."""

    items: Sequence[str]


@dataclass(frozen=True)
class Chart:
    """
    A plot, drawn for wide and for narrow windows; Markdown shows its title and its note alone.

    Attributes:
        title: plain text.
        wide, narrow: SVG; without a narrow one, the wide one is shown everywhere. What an element says when it is
            pointed at, or reached by keys, is in its attribute `data-told`.
        note: plain text below it.
        legend: kinds of samples, as of `svg.legend_sample`, and what they stand for.
        how: how the plot is read, where its elements say anything; their words take its place.
    """

    title: str
    wide: Markup
    narrow: Markup | None
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()
    how: str = ""


@dataclass(frozen=True)
class Charts:
    """Plots that stand side by side where there is room."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Folded:
    """Parts that are shown when their title is opened; Markdown shows them."""

    title: str
    parts: Sequence["Part"]
    is_open: bool = False


Part = Text | Points | Table | Charts | Folded


@dataclass(frozen=True)
class Section:
    """A headed part of a report."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Document:
    """
    A whole report.

    Attributes:
        title: plain text.
        lead: plain text below it.
        sections: in their order; pages link to them from the top.
        footer: plain text at the end.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    footer: str = ""
    warnings: Sequence[str] = field(default=())
