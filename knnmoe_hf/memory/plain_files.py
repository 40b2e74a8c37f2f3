"""
Files that somebody else made: opened without following a path out of their folder, read without being believed.

A memory comes from a stranger. A name in its folder may be a link to any file of this machine, or a pipe that never
ends; its JSON may say anything.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from knnmoe_hf.errors import MemoryFileError, in_one_line, shown

LARGEST_JSON = 2**22
"""Bytes of the largest JSON file that is read; that of a memory of 100 layers has a tenth of it."""
_DEEPEST_JSON = 32
_LONGEST_NAME = 255  # bytes of the name of a file or folder
_AGAIN = "save or download the memory again"
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def unusable(path: Path, reason: str, way_out: str = _AGAIN) -> MemoryFileError:
    """The error for a file of a memory, in one sentence."""
    return MemoryFileError(f"{path} is not usable: {reason}; {way_out}.")


def is_inside(name: Any) -> bool:
    """Whether a name is a relative path, written in the shortest way, that stays in the folder it is read from."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > 1024:
        return False
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and "\\" not in name
    short = all(len(os.fsencode(part)) <= _LONGEST_NAME for part in path.parts)
    return plain and short and name == str(path) and name != "." and ":" not in path.parts[0]  # a drive of Windows


def open_plain(path: Path, folder: Path | None = None, way_out: str = _AGAIN) -> BinaryIO:
    """
    Opens a regular file of a memory's folder.

    Neither the file nor a folder between it and `folder` may be a symbolic link, except that the files of a snapshot
    in the cache of huggingface_hub are links to the `blobs` beside it. Never waits, as opening a pipe would.

    Args:
        path: of the file.
        folder: the memory's, a folder above the file; that which the file is in by default. It may be a link itself.
        way_out: of the errors, what to do about a file that cannot be used.

    Raises:
        MemoryFileError: for a file that is missing, is not a regular file, is a link, or cannot be read.
    """
    folder = path.parent if folder is None else folder
    for between in path.relative_to(folder).parents:
        if (folder / between).is_symlink() and between != Path("."):
            raise unusable(folder / between, "it is a symbolic link where a folder is needed", way_out)
    place = path
    if path.is_symlink():
        place = _blob(path, folder)
        if place is None:
            raise unusable(
                path,
                "it is a symbolic link, which may lead to any file of this machine",
                "put the file itself in its place if you trust it",
            )
    try:
        handle = os.open(place, _FLAGS)
    except FileNotFoundError as error:
        raise unusable(path, "it does not exist", way_out) from error
    except OSError as error:
        raise unusable(path, f"it cannot be opened ({in_one_line(error)})", way_out) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise unusable(path, "it is not a regular file", way_out)
    return os.fdopen(handle, "rb")


def _blob(link: Path, folder: Path) -> Path | None:
    """The file that a link of a snapshot in huggingface_hub's cache leads to; None for any other link."""
    place = folder.resolve()
    storage = next((above.parent for above in (place, *place.parents) if above.parent.name == "snapshots"), None)
    try:
        target = (folder.resolve() / link.relative_to(folder)).parent / os.readlink(link)
    except OSError:  # it was a link a moment ago
        return None
    if storage is None:
        return None
    blobs, target = storage.parent / "blobs", Path(os.path.normpath(target))
    return target if Path(os.path.realpath(target.parent)) == blobs and not target.is_symlink() else None


def read_json(
    path: Path, largest: int = 2**63 - 1, most_bytes: int = LARGEST_JSON, way_out: str = _AGAIN
) -> dict[str, Any]:
    """
    The object in a JSON file, in which every number is finite, every key stands once, and nothing lies deeper than 32
    levels.

    Args:
        largest: integer that is allowed, as is its negative.
        most_bytes: of the file.
        way_out: what to do about a file that is refused, for the error.

    Raises:
        MemoryFileError: if the file is missing, holds no such object, or is larger than that.
    """
    with open_plain(path, way_out=way_out) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise unusable(path, f"it has more than {most_bytes} bytes", way_out)
    try:
        content = parsed_json(data, largest)
    except (ValueError, RecursionError) as error:
        raise unusable(path, f"it cannot be read as JSON ({in_one_line(error)})", way_out) from error
    if not isinstance(content, dict):
        raise unusable(path, "it holds no JSON object", way_out)
    return content


def parsed_json(data: bytes, largest: int = 2**63 - 1) -> Any:
    """
    A JSON value as `read_json` reads it, from UTF-8.

    Raises:
        ValueError, RecursionError: for anything else.
    """
    content = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    for depth, value in _values(content):
        if depth > _DEEPEST_JSON:
            raise ValueError(f"it is more than {_DEEPEST_JSON} levels deep")
        if isinstance(value, float) and not math.isfinite(value) or isinstance(value, int) and abs(value) > largest:
            raise ValueError(f"the number {shown(value)} is too large")
    return content


def _values(content: Any) -> Iterator[tuple[int, Any]]:
    """Every value and how deep it lies; goes no deeper than is allowed."""
    left = [(0, content)]
    while left:
        depth, value = left.pop()
        yield depth, value
        if isinstance(value, (dict, list)):
            left += [(depth + 1, part) for part in (value.values() if isinstance(value, dict) else value)]


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()  # no count for each name: there may be half a million of them
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
