"""A file's bytes without their compression, and its text without its encoding."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow

from knnmoe_hf.errors import in_one_line, shown

COMPRESSIONS = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lzma": "lzma",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".lz4": "lz4",
}
"""What compressed files are by their endings."""
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x5d\0\0": "lzma",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_BOMS = {  # longer ones first: a mark of UTF-32 begins with one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
_SAMPLE = 4096  # bytes from which an encoding is told
_CHUNK = 1 << 16  # bytes that are decoded at once

READ_ERRORS = (EOFError, OSError, ValueError, OverflowError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
"""What reading a broken file raises."""


class BrokenFileError(ValueError):
    """The content of a file cannot be read, from here on; the message is the reason, without the file's name."""


def compression_of(start: bytes) -> str | None:
    """The compression that a file's first bytes tell."""
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


def open_bytes(path: Path, compression: str | None) -> BinaryIO:
    """A file's bytes without its compression, from the first to the last; what it raises is in `READ_ERRORS`."""
    if compression is None:
        return path.open("rb")
    if compression == "gzip":
        return gzip.open(path, "rb")
    if compression == "bzip2":
        return bz2.open(path, "rb")
    if compression in ("xz", "lzma"):
        return lzma.open(path, "rb")
    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), compression)


def broken(error: BaseException) -> BrokenFileError:
    """What `READ_ERRORS` of a file say, as a reason."""
    if isinstance(error, BrokenFileError):
        return error
    if isinstance(error, EOFError) or "runcated" in str(error) or "end of stream" in str(error).lower():
        return BrokenFileError("is cut off before its end: copy or download it again")
    if isinstance(error, OSError) and error.strerror:
        return BrokenFileError(f"cannot be read ({error.strerror})")
    return BrokenFileError(f"is damaged ({in_one_line(error).rstrip('.')}): copy or download it again")


def checked_encoding(encoding: str | None) -> str | None:
    """
    The encoding's name as Python spells it.

    Raises:
        ValueError: for a name that is no encoding of text.
    """
    if encoding is None:
        return None
    try:
        b"a".decode(encoding)  # refuses what is no encoding of text, as base64
        return codecs.lookup(encoding).name
    except UnicodeError:  # UTF-16, say: one byte is not enough
        return codecs.lookup(encoding).name
    except (LookupError, ValueError, TypeError) as error:
        raise ValueError(
            f"encoding={shown(encoding)} is not known: use one of Python's encodings, as utf-8, utf-16, cp1252, "
            "latin-1, shift_jis or gb18030."
        ) from error


def encoding_of(start: bytes, given: str | None = None) -> str:
    """
    The encoding of a text that begins with these bytes.

    A byte order mark decides; then what is `given`; then zero bytes, which text in UTF-16 has in every other place, and
    in UTF-32 in two or three of four; else it is UTF-8.
    """
    for mark, name in _BOMS.items():
        if start.startswith(mark):
            return name
    if given is not None:
        return {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(given, given)
    sample = start[: min(len(start), _SAMPLE) // 4 * 4]
    if b"\0" not in sample:
        return "utf-8"
    zeros = [sample[place::4].count(0) * 4 / len(sample) for place in range(4)]
    for name, places in (("utf-32-le", (2, 3)), ("utf-32-be", (0, 1))):
        if all(zeros[place] == 1 for place in places):
            return name
    for name, zero, other in (("utf-16-le", (1, 3), (0, 2)), ("utf-16-be", (0, 2), (1, 3))):
        often = sum(zeros[place] for place in zero) > 0.4
        if not any(zeros[place] for place in other) and (often or not _decodes(sample, "utf-8")):
            if _decodes(sample, name):
                return name
    return "utf-8"


def _decodes(sample: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)("strict").decode(sample)  # the last character may be cut off
    except UnicodeError:
        return False
    return True


def text_chunks(stream: BinaryIO, encoding: str | None) -> Iterator[str]:
    """
    The text of a stream, piece by piece, without a byte order mark; every line ends with a line feed.

    Args:
        stream: from `open_bytes`.
        encoding: from `checked_encoding`.

    Raises:
        BrokenFileError: for bytes that are no text of this encoding, and for a stream that is cut off or damaged.
    """
    chunk, place, first = _read(stream), 0, True
    name = encoding_of(chunk, encoding)
    decoder = codecs.getincrementaldecoder(name)("strict")
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    while True:
        place += len(chunk)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeError as error:
            raise BrokenFileError(_no_text(error, place, name, encoding is not None)) from error
        text = lines.decode(text, final=not chunk)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text
        if not chunk:
            return
        chunk = _read(stream)


def _read(stream: BinaryIO) -> bytes:
    try:
        return stream.read(_CHUNK)
    except READ_ERRORS as error:
        raise broken(error) from error


def _no_text(error: UnicodeError, place: int, encoding: str, was_given: bool) -> str:
    """Why bytes cannot be decoded; `place` is that of the first byte that the decoder has not seen."""
    if not isinstance(error, UnicodeDecodeError):
        return f"is no text in {encoding} ({in_one_line(error)}): name its encoding with --encoding"
    value, byte = error.object[error.start], place - len(error.object) + error.start
    other = "another encoding" if was_given else "its encoding, as cp1252,"
    return (
        f"is no text in {encoding}: byte {byte} is 0x{value:02x} ({error.reason}); name {other} with --encoding, or "
        "save it as UTF-8"
    )


def text_lines(chunks: Iterable[str]) -> Iterator[str]:
    """The lines of a text, each with its line feed; no other character ends a line."""
    parts: list[str] = []
    for chunk in chunks:
        start = 0
        while (end := chunk.find("\n", start)) >= 0:
            parts.append(chunk[start : end + 1])
            yield "".join(parts)
            parts, start = [], end + 1
        if start < len(chunk):
            parts.append(chunk[start:])
    if parts:
        yield "".join(parts)
