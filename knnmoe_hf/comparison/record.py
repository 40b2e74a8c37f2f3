"""Responses in a file, written as they come, so that a run that was killed goes on where it was."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Spent:
    """
    What it took to answer a request: its share of what its item took.

    Attributes:
        forward, backward: passes of the model, one example through all layers each.
        tokens: that these forward passes read, padding included.
        seconds: wall time.
        prompt_tokens: that were put before the prompt.
        frozen_seconds: wall time of the frozen model on the same request, measured in turns with `seconds`; None where
            it was not measured.
    """

    forward: float = 0.0
    backward: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    prompt_tokens: float = 0.0
    frozen_seconds: float | None = None


@dataclass(frozen=True)
class Entry:
    """
    A request's response.

    Attributes:
        key: of the request.
        item: of the item that it belongs to.
        response: as the harness gets it: [log-likelihood, whether greedy], a log-likelihood, or a text.
        spent: to get it.
    """

    key: str
    item: str
    response: Any
    spent: Spent


class Record:
    """
    Responses of one method on one task; those of other options, models or references in the same file are ignored.

    Args:
        path: a file with one JSON object a line, created with the first response; None keeps the responses in memory.
        of: digest of everything, besides the request, that the responses depend on.
    """

    def __init__(self, path: Path | None = None, of: str = ""):
        self._path, self._of = path, of
        self._entries: dict[str, Entry] = {}
        self._torn = False
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        self._torn = bool(content) and not content.endswith(b"\n")
        for line in content.splitlines():
            try:
                found = json.loads(line)
                if found.pop("of") == self._of:
                    entry = Entry(**found | {"spent": Spent(**found["spent"])})
                    self._entries[entry.key] = entry
            except (ValueError, TypeError, KeyError, AttributeError):  # torn when the run was killed
                continue

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def keys(self) -> Iterable[str]:
        """Of the requests with a response."""
        return self._entries.keys()

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def add(self, entries: Iterable[Entry]) -> None:
        """Writes responses, so that they are in the file when this returns."""
        entries = list(entries)
        self._entries |= {entry.key: entry for entry in entries}
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"of": self._of} | asdict(entry)) + "\n" for entry in entries)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._torn else "") + lines)
        self._torn = False
