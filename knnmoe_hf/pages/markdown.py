"""A report as Markdown."""

import re
from collections.abc import Iterator, Sequence

from knnmoe_hf.pages.document import Cell, Charts, Document, Folded, Part, Points, Table, Text


def to_markdown(document: Document) -> str:
    """The text of `report.md`: the sentences and tables of the document; plots are named and left out."""
    lines = [f"# {escaped(document.title)}", "", escaped(document.lead), ""]
    for warning in document.warnings:
        lines += [f"**{escaped(warning)}**", ""]
    for section in document.sections:
        lines += [f"## {escaped(section.title)}", "", *_parts(section.parts, 3)]
    if document.footer:
        lines += [escaped(document.footer), ""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Plain text on one line, of which nothing is read as Markdown or HTML."""
    # an underscore between letters is none of Markdown's
    return re.sub(r"([\\`*\[\]<>|&#~$!]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _parts(parts: Sequence[Part], level: int) -> Iterator[str]:
    for part in parts:
        match part:
            case Text():
                yield from (escaped(part.text), "")
                if part.command:
                    yield from (f"    {' '.join(part.command.split())}", "")
            case Points():
                yield from (*(f"- {escaped(item)}" for item in part.items), "")
            case Table():
                yield from (f"**{escaped(part.title)}**", "", *_table(part), "")
                if part.note:
                    yield from (escaped(part.note), "")
            case Charts():
                for chart in part.charts:
                    yield from (f"{escaped(chart.title)}: a plot of report.html. {escaped(chart.note)}".rstrip(), "")
            case Folded():
                yield from (f"{'#' * level} {escaped(part.title)}", "", *_parts(part.parts, level + 1))


def _table(table: Table) -> Iterator[str]:
    columns = [column for column in table.columns if not column.is_picture]
    yield _row([escaped(column.name) for column in columns])
    yield _row(["---:" if column.is_number else "---" for column in columns])
    for row in table.rows:
        yield _row([text for cell in row if cell.picture is None for text in _texts(cell)])


def _texts(cell: Cell) -> list[str]:
    """The cell's text, and nothing in the other columns that it fills."""
    return [escaped(cell.text), *[""] * (cell.span - 1)]


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
