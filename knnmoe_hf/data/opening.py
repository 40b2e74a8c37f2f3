"""A file's bytes without their compression, and its text without its encoding."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import unicodedata
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
_MARKED = "knnmoe_hf.marked"
_MARK = re.compile("[\udc00-\udcff]")  # no text decodes to one of these alone

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
    return BrokenFileError(f"is damaged ({reason_of(error)}): copy or download it again")


def reason_of(error: BaseException) -> str:
    """The message of another library's error as a part of a sentence."""
    return in_one_line(error).rstrip(".").replace(". ", "; ") or type(error).__name__


def checked_encoding(encoding: str | None) -> str | None:
    """
    The encoding's name as Python spells it.

    Raises:
        ValueError: for a name that is not an encoding of text.
    """
    if encoding is None:
        return None
    try:
        b"a".decode(encoding)  # refuses what is not an encoding of text, as base64
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

    A byte order mark decides; then what is `given`. Text with zero bytes is in UTF-16 or UTF-32 if it makes sense as
    such; all else is UTF-8.
    """
    for mark, name in _BOMS.items():
        if start.startswith(mark):
            return name
    if given is not None:
        return {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(given, given)
    sample = start[: min(len(start), _SAMPLE) // 4 * 4]
    if b"\0" not in sample:
        return "utf-8"
    is_utf8 = _text_of(sample, "utf-8") is not None
    for name, high in (("utf-32-le", 3), ("utf-32-be", 0), ("utf-16-le", 1), ("utf-16-be", 0)):
        step = 4 if name.startswith("utf-32") else 2
        # of Latin, Cyrillic or Hebrew letters the higher byte alone is a control character
        fits = _control(sample[high::step]) > 0.7 and _control(sample[step - 1 - high :: step]) < 0.5
        if (fits or not is_utf8) and _is_plausible(_text_of(sample, name)):
            return name
    return "utf-8"


def _control(values: bytes) -> float:
    """The share of control characters."""
    return sum(value < 32 and value not in b"\t\n\r" for value in values) / len(values)


def _text_of(sample: bytes, encoding: str) -> str | None:
    """The text, of which the last character may be cut off; None if the bytes are not text of this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)("strict").decode(sample)
    except UnicodeError:
        return None


def _is_plausible(text: str | None) -> bool:
    """Whether all characters exist and none is a control character: bytes in the wrong order make some that do not."""
    categories = {unicodedata.category(character) for character in (text or "\0") if character not in "\t\n\r\f\ufeff"}
    return not categories & {"Cc", "Cn", "Co", "Cs"}


def _mark(error: UnicodeError) -> tuple[str, int]:
    """A byte that cannot be decoded as a character that no text has."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return chr(0xDC00 + error.object[error.start]), error.end


codecs.register_error(_MARKED, _mark)


def undecoded(text: str) -> str | None:
    """Why a part of a text from `text_chunks(..., marked=True)` cannot be used; None if all of it was decoded."""
    found = None if text.isascii() else _MARK.search(text)
    if found is None:
        return None
    return (
        f"is not text in its encoding (byte 0x{ord(found.group()) - 0xDC00:02x}): name the encoding, as cp1252, with "
        "--encoding, or save it as UTF-8"
    )


def text_chunks(stream: BinaryIO, encoding: str | None, marked: bool = False) -> Iterator[str]:
    """
    The text of a stream, piece by piece, without a byte order mark; every line ends with a line feed.

    Args:
        stream: from `open_bytes`.
        encoding: from `checked_encoding`.
        marked: go on after bytes that are not text of this encoding; `undecoded` finds where they were.

    Raises:
        BrokenFileError: for bytes that are not text of this encoding, and for a stream that is cut off or damaged.
    """
    chunk, place, first = _read(stream), 0, True
    name = encoding_of(chunk, encoding)
    decoder = codecs.getincrementaldecoder(name)(_MARKED if marked else "strict")
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
        return f"is not text in {encoding} ({reason_of(error)}): name its encoding with --encoding"
    value, byte = error.object[error.start], place - len(error.object) + error.start
    other = "another encoding" if was_given else "its encoding, as cp1252,"
    return (
        f"is not text in {encoding}: byte {byte} is 0x{value:02x} ({error.reason}); name {other} with --encoding, or "
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
