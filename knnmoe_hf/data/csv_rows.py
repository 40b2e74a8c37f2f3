"""Rows of .csv and .tsv text; a row that does not fit its header is named, not repaired."""

import csv
from collections.abc import Collection, Iterable, Iterator
from itertools import chain

from knnmoe_hf.data.opening import BrokenFileError, undecoded
from knnmoe_hf.errors import shown

DELIMITERS = ",;\t|"
_LONGEST = 100_000_000  # characters of a field


def csv_rows(
    lines: Iterable[str], columns: Collection[str], delimiter: str | None = None
) -> Iterator[tuple[str, dict[str, str | None] | str]]:
    """
    Yields `(", row 2 (line 4)", row)`, with a reason in place of a row that cannot be read; an empty cell is None.

    Args:
        lines: with their line feeds; the first one is the header.
        columns: known names, by which the delimiter is found.
        delimiter: None finds it in the header; a first line of `sep=;`, as of spreadsheets, says it.

    Raises:
        BrokenFileError: for a header without names, or with a name twice or empty, and for quotes that are not closed.
    """
    lines, skipped = iter(lines), 0
    first = ""
    for first in lines:
        if first.strip():
            break
        skipped += 1
    if first.lower().startswith("sep=") and len(first.strip()) <= 5:
        delimiter, first, skipped = first[4:5].strip("\n") or "\t", next(lines, ""), skipped + 1
    if not first.strip():
        return
    delimiter = delimiter or _delimiter(first, columns)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    names = _header(next(_fields(reader))[1])
    for number, (line, fields) in enumerate(_fields(reader), start=1):
        place = f", row {number} (line {line + skipped})"
        if isinstance(fields, str):
            yield place, fields
        elif problem := undecoded("".join(fields)):
            yield place, problem
        elif len(fields) != len(names):
            yield place, _unfit(fields, names, delimiter)
        elif zeros := [name for name, field in zip(names, fields) if "\0" in field]:
            yield place, f"holds a zero byte in the column {shown(zeros[0])}: correct it"
        else:
            yield place, {name: field or None for name, field in zip(names, fields)}


def _fields(reader) -> Iterator[tuple[int, list[str] | str]]:
    """The line in which a row begins, and its fields or what is wrong with it; lines without anything are not rows."""
    while True:
        line = reader.line_num + 1
        before = csv.field_size_limit(_LONGEST)  # of the whole process: others keep theirs
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise BrokenFileError(f"has a quote in line {line} that is not closed: close it") from error
            yield line, f"is not a row of a csv ({error}): put quotes around the field, and double those inside it"
            continue
        finally:
            csv.field_size_limit(before)
        if fields:
            yield line, fields


def _delimiter(header: str, columns: Collection[str]) -> str:
    """The delimiter that makes the most known columns of a header, else the most columns."""

    def found(delimiter: str) -> tuple[int, int]:
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
        return len(set(names) & set(columns)), len(names)

    return max(DELIMITERS, key=found)


def _header(fields: list[str] | str) -> list[str]:
    if isinstance(fields, str):
        raise BrokenFileError(f"has a first line that {fields}")
    if problem := undecoded("".join(fields)):
        raise BrokenFileError(f"has a first line that {problem}")
    names = [name.strip() for name in fields]
    if "" in names:
        raise BrokenFileError(
            f"has no name for column {names.index('') + 1} in its first line: name every column (pandas: "
            "to_csv(index=False))"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise BrokenFileError(f"names the column {shown(twice[0])} twice in its first line: rename one of them")
    return names


def _unfit(fields: list[str], names: list[str], delimiter: str) -> str:
    way_out = f"put quotes around a field that holds {delimiter!r}" if len(fields) > len(names) else "fill it up"
    return f"has {len(fields)} fields, but the header names {len(names)}, {shown(names)}: {way_out}"
