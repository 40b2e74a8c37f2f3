"""The raw numbers: one JSON file for each (lab, kind, seed), a line for each setting, as soon as it is measured.

`benchmarks/results/effect/olmoe-topics-0.json`; `olmoe.json` beside them has the frozen model's scores.
"""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import torch

from knnmoe_hf.evaluation import Scores

FOLDER = Path(__file__).parent / "results"
_PACKAGES = ("knnmoe_hf", "torch", "transformers", "peft")


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def digest(value: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def rounded(scores: Scores) -> dict[str, list]:
    """Scores by window, as they are stored."""
    return {
        "nll": [round(value, 3) for value in scores.nll.tolist()],
        "hits": [int(value) for value in scores.hits.tolist()],
        "tokens": [int(value) for value in scores.tokens.tolist()],
    }


def scores_of(stored: dict[str, list]) -> Scores:
    """The reverse of `rounded`."""
    return Scores(*(torch.tensor(stored[name], dtype=torch.float64) for name in ("nll", "hits", "tokens")))


class Table:
    """
    One file: `{name: entry}`, in the order in which entries came.

    An entry says what it was measured with. It is stale, and measured again, if any of that is otherwise now; an
    option that the library no longer has does not make it stale.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, wanted: dict) -> dict | None:
        """The entry, unless it was measured with something else."""
        entry = self.entries.get(name)
        return entry if entry is not None and _agrees(entry, json.loads(json.dumps(wanted))) else None

    def put(self, name: str, wanted: dict, entry: dict) -> dict:
        """Stores an entry, on disk too: the file is whole at any time."""
        self.entries[name] = {**entry, **wanted, "digest": digest(wanted)}
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self.entries.items())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}")  # another process may write the same
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(temporary, self.path)
        return self.entries[name]


def _agrees(stored: Any, wanted: Any) -> bool:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return all(name in stored and _agrees(stored[name], value) for name, value in wanted.items())
    return stored == wanted


def cell_path(folder: Path, lab: str, kind: str, seed: int) -> Path:
    return folder / f"{lab}-{kind}-{seed}.json"


def lab_path(folder: Path, lab: str) -> Path:
    return folder / f"{lab}.json"


def load_cells(folder: Path) -> dict[tuple[str, str, int], dict[str, dict]]:
    """All measured settings, `{(lab, kind, seed): {name: entry}}`."""
    cells = {}
    for path in sorted(folder.glob("*-*-*.json")):
        lab, kind, seed = path.stem.rsplit("-", 2)
        cells[lab, kind, int(seed)] = json.loads(path.read_text())
    return cells
