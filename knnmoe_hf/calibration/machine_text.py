"""Text that every machine with this library has: files of Python, of torch and of the packages that are installed.

Nothing of it is shipped; it is read from the running interpreter's environment, so it changes with the versions that
are installed. Given the same files, the texts, their order and their split are the same on every machine.

| kind     | what                                             | splits                               |
|----------|--------------------------------------------------|--------------------------------------|
| python   | sources of the standard library, without tests   | `train`, `test` (one file in twenty) |
| headers  | C++ headers of torch                             | `reference`, `test` (by file)        |
| notices  | descriptions and licences of installed packages  | `reference`, `test` (by file)        |
"""

import hashlib
import importlib.metadata
import importlib.util
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SPLITS = {"python": ("train", "test"), "headers": ("reference", "test"), "notices": ("reference", "test")}
"""Kinds of text and their splits."""
REFERENCE_SHARE = 0.55
"""Share of the files of `headers` and `notices` that are in their split `reference`."""

_TEST_SHARE = 20  # one file of the standard library in so many is in the split `test`
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
_ENCODINGS = "encodings"  # folder of character tables, which are not text
_HEADER_FOLDERS = ("c10", "torch/csrc")
_PHRASE = 8  # words
_QUOTED_SHARE = 0.2  # a paragraph is left out if more of its phrases than this are in other files too


def files(kind: str, split: str) -> list[tuple[str, str]]:
    """
    Names and texts of one kind and split.

    Args:
        kind, split: see `SPLITS`.

    Returns:
        `(name, text)` for each file: its path inside the standard library, torch's include folder or the folder of
        packages, and its text. Paragraphs of `headers` and `notices` that several files have are left out of all.

    Raises:
        ValueError: for a kind or split that does not exist.
    """
    if kind not in SPLITS or split not in SPLITS[kind]:
        raise ValueError(unknown_text(kind, split, SPLITS))
    if kind == "python":
        return [file for file in library_files() if in_split(file[0], split, _TEST_SHARE)]
    found = own_paragraphs(_headers() if kind == "headers" else _notices())
    border = round(REFERENCE_SHARE * len(found))
    return [file for file in (found[:border] if split == "reference" else found[border:]) if file[1].strip()]


def documents(kind: str, split: str) -> list[str]:
    """The texts of `files(kind, split)`."""
    return [text for _, text in files(kind, split)]


def unknown_text(kind: str, split: str, splits: dict[str, tuple[str, ...]]) -> str:
    """The error message for a kind or split that is not among `splits`."""
    known = ", ".join(f"{known_kind}/{part}" for known_kind, parts in splits.items() for part in parts)
    return f"there is no kind and split of text {f'{kind}/{split}'[:80]!r}: choose one of {known}."


def name_hash(name: str) -> int:
    """A number that depends on the name alone, on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def in_split(name: str, split: str, test_share: int) -> bool:
    """Whether a file is in a split of `train` and `test`, where one file in `test_share` is for testing."""
    return (name_hash(name) % test_share == 0) == (split == "test")


def library_files(encodings: bool = False) -> Iterator[tuple[str, str]]:
    """Names and texts of the standard library's sources, in the order of their names, without tests.

    Args:
        encodings: only the character tables of `encodings`, which are left out otherwise.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).parts
        if not _SKIPPED_FOLDERS.intersection(parts) and (parts[0] == _ENCODINGS) == encodings:
            yield "/".join(parts), _read(path)


def own_paragraphs(files: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """
    Files without the paragraphs that other files have too, such as licences; in an order that mixes folders.

    The result depends on the names and texts of the files, not on their order or on how often each is given.
    """
    unique = sorted(set(files), key=lambda file: (name_hash(file[0]), *file))
    paragraphs = [{part: _phrases(part) for part in re.split(r"\n\s*\n", text)} for _, text in unique]
    holders = Counter(phrase for parts in paragraphs for phrase in set().union(*parts.values()))

    def is_own(phrases: set[int]) -> bool:
        return sum(holders[phrase] > 1 for phrase in phrases) <= _QUOTED_SHARE * len(phrases)

    return [
        (name, "\n\n".join(part for part, phrases in parts.items() if is_own(phrases)))
        for (name, _), parts in zip(unique, paragraphs)
    ]


def _phrases(paragraph: str) -> set[int]:
    """Hashes of all runs of `_PHRASE` words: the same for a licence text whose lines are broken elsewhere."""
    words = paragraph.split()
    runs = range(max(1, len(words) - _PHRASE + 1))
    # Python's hashes differ between processes, but only whether two are equal is used
    return {hash(tuple(words[i : i + _PHRASE])) for i in runs}


def _headers() -> Iterator[tuple[str, str]]:
    root = Path(importlib.util.find_spec("torch").origin).parent / "include"
    for folder in _HEADER_FOLDERS:
        for path in (root / folder).rglob("*.h"):
            yield path.relative_to(root).as_posix(), _read(path)


def _notices() -> Iterator[tuple[str, str]]:
    for package in importlib.metadata.distributions():
        for file in package.files or ():
            if file.name == "METADATA" or ("licen" in file.name.lower() and ".dist-info" in str(file)):
                path = Path(package.locate_file(file))
                if path.suffix != ".py" and path.is_file():
                    yield file.as_posix(), _read(path)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
