"""The rows of a file, one after the other; a text file is one document, in blocks."""

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO

import pyarrow
from pyarrow import parquet

from knnmoe_hf.data.csv_rows import csv_rows
from knnmoe_hf.data.formats import COLUMNS, DataFile
from knnmoe_hf.data.opening import READ_ERRORS, BrokenFileError, broken, open_bytes, text_chunks, text_lines, undecoded
from knnmoe_hf.data.windows import blocks
from knnmoe_hf.errors import shown

Place = str
"""Where in its file a row is, as `", line 3"`; nothing for the file as a whole."""
BadRow = str
"""What is wrong with a row that cannot be read, in place of the row."""
_ROWS_AT_ONCE = 256  # of a parquet file
_TURN_OF_CHAT = ({"role", "content"}, {"from", "value"})  # the columns of a conversation's turn, which is not a row


def read_file(file: DataFile, encoding: str | None, text_field: str) -> Iterator[tuple[Place, dict | BadRow]]:
    """
    Yields the rows of a file, and in place of a row that cannot be read the reason; other rows follow it.

    Args:
        file: from `inspect`.
        encoding: of text, from `checked_encoding`.
        text_field: the column that a document's text gets.

    Raises:
        BrokenFileError: if the file cannot be read, from here on, or has no rows.
    """
    try:
        stream = open_bytes(file.path, file.compression)
        if file.compression and file.kind in ("parquet", "arrow"):  # these are read from the end, or in any order
            stream = _copied(stream)
    except READ_ERRORS as error:
        raise broken(error) from error
    with stream:
        rows = _READERS[file.kind](stream, encoding, text_field)
        first = next(rows, None)
        if first is None:
            lacking = {"empty": "is empty", "text": "holds no text"}.get(file.kind, "holds no row")
            raise BrokenFileError(f"{lacking}: leave it out")
        yield from chain([first], rows)


def _documents(stream: BinaryIO, encoding: str | None, text_field: str) -> Iterator[tuple[Place, dict | BadRow]]:
    for text in blocks(_without_zeros(text_chunks(stream, encoding))):
        yield "", {text_field: text}


def _without_zeros(chunks: Iterable[str]) -> Iterator[str]:
    line = 1
    for chunk in chunks:
        if (zero := chunk.find("\0")) >= 0:
            place = line + chunk.count("\n", 0, zero)
            raise BrokenFileError(
                f"is not text: it holds a zero byte in line {place}; leave it out, or name its encoding"
            )
        line += chunk.count("\n")
        yield chunk


def _json_lines(stream: BinaryIO, encoding: str | None, text_field: str) -> Iterator[tuple[Place, dict | BadRow]]:
    return _rows_of_lines(text_lines(text_chunks(stream, encoding, marked=True)))


def _rows_of_lines(lines: Iterable[str]) -> Iterator[tuple[Place, dict | BadRow]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f", line {number}", undecoded(line) or _json_row(line)


def _json_row(line: str) -> dict | BadRow:
    try:
        return _checked_row(_parsed(line))
    except ValueError as error:
        is_part = line.lstrip()[:1] in ("[", "{") and not line.rstrip().endswith(("]", "}"))
        way_out = "name a file of one JSON document .json" if is_part else "correct it"
        return f"is not valid JSON ({_reason(error)}): {way_out}"


def _json(stream: BinaryIO, encoding: str | None, text_field: str) -> Iterator[tuple[Place, dict | BadRow]]:
    """Rows of a whole JSON document, or of JSON lines if the first line is an object and others follow."""
    lines = text_lines(text_chunks(stream, encoding, marked=True))
    blank = []
    for line in lines:
        if line.strip():
            break
        blank.append(line)
    else:
        return
    second = next((more for more in lines if more.strip()), "")
    if second and _is_object(line):
        yield from _rows_of_lines(chain(blank, [line, second], lines))
        return
    text = "".join(chain(blank, [line, second], lines))
    try:
        content = _parsed(text)
    except ValueError as error:
        raise BrokenFileError(f"is not valid JSON ({_reason(error)}): correct it") from error
    for number, row in enumerate(_rows_of_document(content, COLUMNS | {text_field}), start=1):
        problem = undecoded(text) and undecoded(json.dumps(row, ensure_ascii=False))
        yield f", row {number}", problem or _checked_row(row)


def _is_object(line: str) -> bool:
    try:
        return isinstance(_parsed(line), dict)
    except ValueError:
        return False


def _rows_of_document(content: Any, columns: Collection[str]) -> list:
    """The rows of a JSON document: a list, or an object with one list of objects, or one object, which is a row."""
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and not set(content) & set(columns):
        lists = [value for value in content.values() if isinstance(value, list) and _are_rows(value)]
        if len(lists) > 1:
            names = [name for name, value in content.items() if isinstance(value, list) and _are_rows(value)]
            raise BrokenFileError(f"has several lists of rows, {shown(names)}: save one of them alone")
        return lists[0] if lists else [content]
    return [content]


def _are_rows(values: list) -> bool:
    objects = bool(values) and all(isinstance(value, dict) for value in values)
    return objects and not any(turn <= set(values[0]) for turn in _TURN_OF_CHAT)


def _parsed(text: str) -> Any:
    """Parses JSON; raises a ValueError also for a name that is given twice, for which Python takes the last."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is there twice in one object")
    return content


def _checked_row(row: Any) -> dict | BadRow:
    if not isinstance(row, dict):
        return f'is {shown(row)}, no object: give columns by name, as {{"text": ...}}'
    for name, value in row.items():
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            return f"has half of a character (a lone surrogate, as \\ud800) in the column {shown(name)}: correct it"
    return row


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"{error.msg} at {line}column {error.colno}"
    return str(error)


def _copied(stream: BinaryIO) -> BinaryIO:
    """The content of a stream that can only be read forwards, in a temporary file without a name."""
    copy = tempfile.TemporaryFile()
    try:
        with stream:
            shutil.copyfileobj(stream, copy)
        copy.seek(0)
    except BaseException:
        copy.close()
        raise
    return copy


def _parquet(stream: BinaryIO, encoding: str | None, text_field: str) -> Iterator[tuple[Place, dict | BadRow]]:
    return _table_rows(stream, lambda source: parquet.ParquetFile(source).iter_batches(_ROWS_AT_ONCE))


def _arrow(stream: BinaryIO, encoding: str | None, text_field: str) -> Iterator[tuple[Place, dict | BadRow]]:
    return _table_rows(stream, _arrow_batches)


def _arrow_batches(source: BinaryIO) -> Iterable[pyarrow.RecordBatch]:
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(source)
        return (reader.get_batch(index) for index in range(reader.num_record_batches))
    return pyarrow.ipc.open_stream(source)


def _table_rows(
    stream: BinaryIO, open_batches: Callable[[BinaryIO], Iterable[pyarrow.RecordBatch]]
) -> Iterator[tuple[Place, dict | BadRow]]:
    number = 0
    try:
        for batch in open_batches(stream):
            names = batch.schema.names
            if len(set(names)) < len(names):
                raise BrokenFileError(f"has columns of the same name, {shown(names)}: rename one of them")
            for index in range(batch.num_rows):  # row by row: a batch of long lists takes much more as Python objects
                number += 1
                yield f", row {number}", batch.slice(index, 1).to_pylist()[0]
    except READ_ERRORS as error:
        raise broken(error) from error


def _nothing(stream: BinaryIO, encoding: str | None, text_field: str) -> Iterator[tuple[Place, dict | BadRow]]:
    return iter(())


def _csv(stream: BinaryIO, encoding: str | None, text_field: str) -> Iterator[tuple[Place, dict | BadRow]]:
    return csv_rows(text_lines(text_chunks(stream, encoding, marked=True)), COLUMNS | {text_field})


def _tsv(stream: BinaryIO, encoding: str | None, text_field: str) -> Iterator[tuple[Place, dict | BadRow]]:
    return csv_rows(text_lines(text_chunks(stream, encoding, marked=True)), COLUMNS | {text_field}, "\t")


_READERS = {
    "text": _documents,
    "jsonl": _json_lines,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
    "arrow": _arrow,
    "empty": _nothing,
}
