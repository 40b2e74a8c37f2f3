"""What a file holds, by its ending, or by its content where the ending says nothing."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from knnmoe_hf.data.opening import (
    COMPRESSIONS,
    READ_ERRORS,
    broken,
    compression_of,
    encoding_of,
    open_bytes,
)

ENDINGS = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".log"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
}
"""What files hold by their endings."""
TABLES = frozenset(ENDINGS.values()) - {"text"}
"""What has rows; a text file is one document."""
COLUMNS = frozenset(
    "text input_ids prompt completion messages conversations conversation instruction output response".split()
)
"""Columns by which a table is known where the ending does not say that it is one."""
READABLE = (
    "text (.txt, .md, .rst, .log), .jsonl, .json, .csv, .tsv, .parquet or .arrow, each also compressed (.gz, .zst, "
    ".xz, .bz2)"
)
"""What can be read, for error messages."""
_UNPACK, _TEXT, _TABLE = "unpack it and name the folder", "save its text as .txt", "save it as .csv or .jsonl"
_REFUSED = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".jar"), ("an archive", _UNPACK)),
    ".pdf": ("a PDF", _TEXT),
    **dict.fromkeys((".doc", ".docx", ".odt", ".rtf", ".ppt", ".pptx", ".odp", ".epub"), ("an office file", _TEXT)),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), ("a spreadsheet", _TABLE)),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp"), ("an image", _TEXT)),
    **dict.fromkeys((".mp3", ".wav", ".flac", ".ogg", ".mp4", ".mkv", ".avi", ".mov"), ("sound or film", _TEXT)),
    **dict.fromkeys((".orc", ".avro", ".h5", ".hdf5", ".db", ".sqlite"), ("a database", _TABLE)),
    **dict.fromkeys(
        (".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth", ".bin", ".safetensors"),
        ("a file of tensors or objects", _TABLE),
    ),
    **dict.fromkeys((".br", ".z", ".lz", ".lzo"), ("compressed", "unpack it, or compress it as .gz, .zst or .xz")),
}
_MAGIC = (  # place, bytes, ending of such files
    (0, b"PAR1", ".parquet"),
    (0, b"ARROW1", ".arrow"),
    (0, b"\xff\xff\xff\xff", ".arrow"),
    (0, b"%PDF", ".pdf"),
    (0, b"PK\x03\x04", ".zip"),
    (0, b"Rar!", ".rar"),
    (0, b"7z\xbc\xaf", ".7z"),
    (257, b"ustar", ".tar"),
    (0, b"{\\rtf", ".rtf"),
    (0, b"\xd0\xcf\x11\xe0", ".doc"),
    (0, b"\x89PNG", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"GIF8", ".gif"),
    (0, b"ID3", ".mp3"),
    (0, b"OggS", ".ogg"),
    (0, b"RIFF", ".wav"),
    (4, b"ftyp", ".mp4"),
    (0, b"ORC", ".orc"),
    (0, b"Obj\x01", ".avro"),
    (0, b"\x89HDF", ".h5"),
    (0, b"SQLite format 3", ".sqlite"),
    (0, b"\x93NUMPY", ".npy"),
)
_JSON = re.compile(r'\s*(\{\s*"|\[\s*\{)')
_HEAD = 1 << 14  # bytes that are looked at


@dataclass(frozen=True)
class DataFile:
    """A file that can be read: where it is, what it holds (a value of `ENDINGS`, or "empty"), and its compression."""

    path: Path
    kind: str
    compression: str | None


class RefusedFileError(ValueError):
    """A file that holds no text or rows that can be read; the message is the reason, without the file's name."""


def has_known_ending(name: str) -> bool:
    """Whether a name ends as a file does, readable or not."""
    return any(ending in ENDINGS or ending in _REFUSED or ending in COMPRESSIONS for ending in _endings(name)[:1])


def inspect(path: Path, text_field: str = "text", encoding: str | None = None) -> DataFile:
    """
    What a file holds.

    Args:
        path: an existing file.
        text_field: a column by which a table without an ending is known, beside `COLUMNS`.
        encoding: of text, from `checked_encoding`.

    Raises:
        RefusedFileError: for what is neither text nor a table, and where ending and content disagree.
        BrokenFileError: if its first bytes cannot be read.
    """
    endings = _endings(path.name)
    named = COMPRESSIONS.get(endings[0]) if endings else None
    ending = next(iter(endings[1:] if named else endings), "")
    start = _start(path, None)
    compression = compression_of(start)
    refused = _REFUSED.get(".tar" if ".tar" in endings[:2] else ending)
    if refused is not None:
        raise RefusedFileError(f"is {refused[0]}, which is not read: {refused[1]}")
    if not start:
        return DataFile(path, "empty", None)
    if named and compression != named:
        raise RefusedFileError(f"is not compressed with {named}, though its name says so: rename it")
    if ending in ENDINGS and compression and not named:
        right = next(end for end, name in COMPRESSIONS.items() if name == compression)
        raise RefusedFileError(f"is compressed with {compression}: rename it, so that it ends with {ending}{right}")
    try:
        start = _start(path, compression) if compression else start
    except ValueError:
        if ending not in ENDINGS:
            raise
        return DataFile(path, ENDINGS[ending], compression)  # a reader says what is wrong
    if not start:
        return DataFile(path, "empty", compression)
    kind = _kind_of_magic(ENDINGS.get(ending), ending, start)
    return DataFile(path, kind or _kind_of_text(ending, start, text_field, encoding), compression)


def _endings(name: str) -> list[str]:
    """The endings of a file's name in lower case, the last one first."""
    return [ending.lower() for ending in reversed(Path(name.rstrip()).suffixes)]


def _start(path: Path, compression: str | None) -> bytes:
    try:
        with open_bytes(path, compression) as stream:
            return stream.read(_HEAD)
    except READ_ERRORS as error:
        raise broken(error) from error


def _kind_of_magic(declared: str | None, ending: str, start: bytes) -> str | None:
    """What a file holds whose first bytes are `start` and whose ending says `declared`; None if it is text."""
    found = next((end for place, magic, end in _MAGIC if start[place:].startswith(magic)), None)
    if compression := compression_of(start):
        raise RefusedFileError(f"is compressed twice, last with {compression}: unpack it once")
    if found in _REFUSED:
        what, way_out = _REFUSED[found]
        raise RefusedFileError(f"holds {what} ({found}), which is not read: {way_out}")
    if found and declared in (None, ENDINGS[found]):
        return ENDINGS[found]
    if found:
        raise RefusedFileError(f"holds {found}, not {ending}: rename it, so that it ends with {found}")
    if declared in ("parquet", "arrow"):
        raise RefusedFileError(f"is no {ending} file, as its first bytes are {start[:8]!r}: rename or replace it")
    return None


def _kind_of_text(ending: str, start: bytes, text_field: str, encoding: str | None) -> str:
    """What a file of text holds; what holds another kind of rows than its ending says is refused."""
    declared, name = ENDINGS.get(ending), encoding_of(start, encoding)
    if declared is None and name == "utf-8" and b"\0" in start:
        raise RefusedFileError(f"is binary, which is not read: give {READABLE}")
    text = start.decode(name, errors="replace").removeprefix("\ufeff").lstrip()
    guess = _guess(text.splitlines()[0] if text else "", text, COLUMNS | {text_field}, text_field)
    if declared == "text" and guess in ("rows of JSON", "rows of csv", "rows of tsv"):
        right = ".jsonl" if guess.endswith("JSON") else f".{guess.split()[-1]}"
        raise RefusedFileError(f"holds {guess}, not text: rename it, so that it ends with {right}")
    if declared in ("csv", "tsv") and guess.endswith("JSON"):
        raise RefusedFileError(f"holds JSON, not {ending}: rename it, so that it ends with .jsonl or .json")
    return declared or {"JSON": "json", "csv": "csv", "tsv": "tsv", "text": "text"}[guess.split()[-1]]


def _guess(line: str, text: str, columns: Collection[str], text_field: str) -> str:
    """What a text and its first line are: "text", or "rows of" a format if they name a known column, else "JSON"."""
    if _JSON.match(text):
        row = _object(line)
        return "rows of JSON" if set(row) & set(columns) else "JSON"
    for delimiter in "\t,;|":
        names = [name.strip().strip('"') for name in line.split(delimiter)]
        distinct = len(set(names)) == len(names) > 1
        if distinct and set(names) & set(columns) and all(_is_name(name) for name in names):
            return "rows of tsv" if delimiter == "\t" else "rows of csv"
    return "csv" if line.strip().strip('"') == text_field else "text"


def _object(line: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _is_name(text: str) -> bool:
    return re.fullmatch(r"\w[\w .:/-]{0,40}", text) is not None
