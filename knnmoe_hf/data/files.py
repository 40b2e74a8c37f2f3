"""From the name of a file, a folder or a pattern to its files."""

import difflib
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from knnmoe_hf.data.formats import READABLE, TABLES, DataFile, RefusedFileError, has_known_ending, inspect
from knnmoe_hf.data.opening import BrokenFileError
from knnmoe_hf.data.readers import read_file

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The splits that files and folders of these names are of."""
_SHARD = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?\Z")
_PATTERN = re.compile(r"[*?\[]")
_NO_TEXT = "__MACOSX"  # a folder that archives of macOS have beside the files, with attributes of these
NAMES = "name a file, a folder, a pattern as 'texts/*.txt', a data set of the Hub, or lab:KIND/SPLIT"
"""What data may be named by, for error messages."""


@dataclass(frozen=True)
class Row:
    """
    A row of a file or data set.

    `place` says where it is, for messages; `document` counts text files and other rows from 0; `columns` is None where
    the row cannot be read, and `problem` says why, as the rest of a sentence that begins with `place`.
    """

    place: str
    document: int
    columns: dict | None
    problem: str | None = None


class Files:
    """
    The rows of a file, of all files in a folder, or of all that a pattern matches, in the order of their names.

    Args:
        name: what `is_on_disk` or `looks_like_path` accepts.
        split: of a folder whose every file is named after a split; None for train, or the only split there is.
        text_field: the column that text files get, and by which tables without an ending are known.
        encoding: of text files, from `checked_encoding`; None finds it.

    Raises:
        ValueError: if there is no such file, or one of them cannot be read, or tables and text are mixed.
    """

    def __init__(self, name: str, split: str | None, text_field: str = "text", encoding: str | None = None):
        paths = _of_split(find_files(name), name, split)
        self.files = _inspected(paths, name, text_field, encoding)
        self.text_field, self.encoding = text_field, encoding
        if encoding is not None and all(file.kind in ("parquet", "arrow") for file in self.files):
            raise ValueError(
                f"encoding={encoding!r} is not allowed for {shown_path(name)}, as its files are binary: leave it out."
            )
        _refuse_mixture(self.files, name)

    def __iter__(self) -> Iterator[Row]:
        document = 0
        for file in self.files:
            place, is_text = shown_path(file.path), file.kind not in TABLES
            try:
                for where, row in read_file(file, self.encoding, self.text_field):
                    problem = row if isinstance(row, str) else None
                    yield Row(place + where, document, None if problem else row, problem)
                    document += not is_text
            except BrokenFileError as error:
                yield Row(place, document, None, str(error))
                document += not is_text
            document += is_text

    @property
    def what(self) -> str:
        """What people call a document of these files."""
        return "text" if any(file.kind == "text" for file in self.files) else "row"

    def has_documents(self, count: int) -> bool:
        """Whether there are at least so many documents; text files are counted without reading them."""
        texts = sum(file.kind not in TABLES for file in self.files)
        if texts == len(self.files):
            return texts >= count
        return any(row.document + 1 >= count for row in self)


def is_on_disk(name: str) -> bool:
    """Whether a name, taken literally or with `~`, is that of a file, a folder or a link."""
    return bool(name) and (os.path.lexists(name) or os.path.lexists(os.path.expanduser(name)))


def looks_like_path(name: str) -> bool:
    """Whether a name can only be that of a file, a folder or a pattern, never that of a data set of the Hub."""
    return (
        name.startswith((".", "~", "/"))
        or os.path.isabs(name)
        or "\\" in name
        or name.count("/") > 1
        or name.endswith("/")
        or _PATTERN.search(name) is not None
        or has_known_ending(name)
    )


def find_files(name: str) -> list[Path]:
    """
    The files of a name, sorted: one file; those in a folder and its folders, without hidden ones; or those matched.

    Raises:
        ValueError: if there is none.
    """
    path = next((path for path in (name, os.path.expanduser(name)) if os.path.lexists(path)), None)
    if path is not None:
        return _existing(Path(path))
    if _PATTERN.search(name):
        matches = [Path(match) for match in glob.glob(_with_literal_start(os.path.expanduser(name)), recursive=True)]
        found = {file for match in matches for file in (_in_folder(match) if match.is_dir() else [match])}
        found = {path for path in found if _NO_TEXT not in path.parts or _NO_TEXT in name}
        if found:
            return [_readable(path) for path in sorted(found, key=str)]
        raise ValueError(
            f"{shown_path(name)} matches no file: check the pattern, which is read from {shown_path(Path.cwd())}."
        )
    raise ValueError(f"{shown_path(name)} does not exist: {similar_name(name) or NAMES}.")


def shown_path(path: str | Path) -> str:
    """A path in quotes on one line, of which the last 80 characters are kept, as its end tells most."""
    text = " ".join(repr(str(path)).splitlines())
    return text if len(text) <= 80 else f"'...{text[-76:]}"


def _existing(path: Path) -> list[Path]:
    if not path.is_dir():
        return [_readable(path)]
    if not (found := _in_folder(path)):
        raise ValueError(f"{shown_path(path)} is a folder without files: give {READABLE}.")
    return [_readable(file) for file in found]


def _readable(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_symlink():
        raise ValueError(f"{shown_path(path)} is a link to {shown_path(os.readlink(path))}, which does not exist.")
    raise ValueError(f"{shown_path(path)} is a pipe or device, which cannot be read twice: save it as a file.")


def _in_folder(folder: Path) -> list[Path]:
    """All files in a folder and its folders, sorted by name; a folder that links lead to twice is read once."""
    found, seen = [], set()

    def refuse(error: OSError) -> None:
        raise ValueError(f"{shown_path(error.filename)} cannot be read ({error.strerror}): change its permissions.")

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = (
            [] if real in seen else [name for name in folders if not name.startswith(".") and name != _NO_TEXT]
        )
        found += [] if real in seen else [Path(place, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(found, key=str)


def _with_literal_start(name: str) -> str:
    """A pattern whose first folders, if they exist under these very names, are not a pattern, as in `a[1]/*.txt`."""
    parts, start = Path(name).parts, Path()
    for index, part in enumerate(parts):
        if not os.path.lexists(start / part):
            return os.path.join(glob.escape(str(start)), *parts[index:]) if index else name
        start /= part
    return name


def similar_name(name: str) -> str:
    """For a name that does not exist, the similar one in its folder, or that there is no such folder; else nothing."""
    path = Path(os.path.expanduser(name))
    if not os.path.isdir(path.parent):
        return f"there is no folder {shown_path(path.parent)}"
    try:
        names = [entry for entry in os.listdir(path.parent) if not entry.startswith(".")]
    except OSError:
        return ""
    close = [entry for entry in sorted(names) if entry.startswith(f"{path.name}.")]
    close += difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f"perhaps {shown_path(path.parent / close[0])} is meant" if close else ""


def split_of(path: Path, folder: Path) -> str | None:
    """The split that a file in a folder is named after: `train.jsonl`, `test-00000-of-2.parquet`, `dev/a.txt`."""
    parts = path.relative_to(folder).parts
    stem = parts[-1].split(".")[0]
    return SPLITS.get(_SHARD.sub("", stem).lower()) or SPLITS.get(parts[0].lower() if len(parts) > 1 else "")


def splits_on_disk(name: str) -> list[str]:
    """The splits of a folder whose every file is named after one; none of anything else."""
    folder = Path(name if os.path.lexists(name) else os.path.expanduser(name))
    if not folder.is_dir():
        return []
    splits = [split_of(path, folder) for path in _in_folder(folder)]
    return list(dict.fromkeys(splits)) if all(splits) else []


def _of_split(paths: list[Path], name: str, split: str | None) -> list[Path]:
    known = splits_on_disk(name)
    if known:
        folder = Path(name if os.path.lexists(name) else os.path.expanduser(name))
        asked = [SPLITS.get(part, part) for part in (split or ("train" if "train" in known else known[0])).split("+")]
        if split is None and "train" not in known and len(known) > 1 or not set(asked) <= set(known):
            raise ValueError(
                f"{shown_path(name)} has no split {split or 'train'!r}: its files are named after {', '.join(known)}; "
                "choose one of these, or name a file."
            )
        return [path for path in paths if split_of(path, folder) in asked]
    if split not in (None, "train"):
        raise ValueError(
            f"split={split!r} is not allowed for {shown_path(name)}: files have no splits; leave it out, and name a "
            "file or pattern for each part."
        )
    return paths


def _inspected(paths: list[Path], name: str, text_field: str, encoding: str | None) -> list[DataFile]:
    files, refused = [], []
    for path in paths:
        try:
            files.append(inspect(path, text_field, encoding))
        except (RefusedFileError, BrokenFileError) as error:
            refused.append(f"{shown_path(path)} {error}")
    if refused:
        others = f", or leave it out with a pattern, as {_pattern(name, files[0])}" if files else ""
        raise ValueError(f"{refused[0]}{others}.")
    return files


def _refuse_mixture(files: list[DataFile], name: str) -> None:
    """Tables beside text are a mistake more often than not: notes on the data would be learnt as if they were data."""
    tables = [file for file in files if file.kind in TABLES]
    texts = [file for file in files if file.kind == "text"]
    if tables and texts:
        raise ValueError(
            f"{shown_path(name)} holds rows, as {shown_path(tables[0].path)}, and text, as "
            f"{shown_path(texts[0].path)}: name one of them with a pattern, as {_pattern(name, tables[0])}."
        )


def _pattern(name: str, file: DataFile) -> str:
    """A pattern for the files that end as this one, in the folder of that name."""
    ending = "".join(file.path.suffixes[-2:] if file.compression else file.path.suffixes[-1:])
    folder = Path(name) / "**" if is_on_disk(name) else file.path.parent
    return shown_path(folder / f"*{ending}" if ending else file.path)
