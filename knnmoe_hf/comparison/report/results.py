"""The results of a comparison, as `results.json` has them, and what several parts of a report ask of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from knnmoe_hf.errors import shown

_FROZEN = "frozen"  # name of the method that does nothing


class Results:
    """
    The results of a comparison.

    Args:
        content: of `results.json`.

    Attributes:
        content: likewise.
        methods: `{label: what is known of the method}`, in their order.
        frozen: label of the frozen model; None if it is not among them.
        memory: label of the method that is called kNN-MoE, the first of that name; None if there is none.
    """

    def __init__(self, content: dict[str, Any]):
        self.content = content
        self.methods: dict[str, dict] = {method["label"]: method for method in content.get("methods", ())}
        self.frozen = next(iter(self.named(_FROZEN)), None)
        self.memory = next((label for label in self.methods if self._is_memory(label)), None)
        self._rows = {(row["fitted_on"], row["task"], row["method"]): row for row in content.get("results", ())}

    @classmethod
    def read(cls, path: Path) -> "Results":
        """
        The results in a file.

        Raises:
            ValueError: if it is no JSON object.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{shown(str(path))} is no JSON ({error}): run the comparison again.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{shown(str(path))} holds no JSON object: run the comparison again.")
        return cls(content)

    @property
    def tasks(self) -> list[dict]:
        """The tasks that methods were fitted on."""
        return self.content.get("tasks", [])

    def row(self, fitted_on: str, task: str, label: str) -> dict:
        """What is known of a method on a task; its status is `"pending"` if nothing is."""
        missing = {"fitted_on": fitted_on, "task": task, "method": label, "status": "pending"}
        return self._rows.get((fitted_on, task, label), missing)

    def done(self, fitted_on: str, task: str) -> Iterator[tuple[str, dict]]:
        """Labels and rows of the methods that have results on a task."""
        for label in self.methods:
            row = self.row(fitted_on, task, label)
            if row["status"] == "done" and row.get("metrics"):
                yield label, row

    def metrics(self, fitted_on: str, task: str) -> list[str]:
        """Names of the metrics of a task, that by which it is judged first; none before anything is scored."""
        found: dict[str, None] = {}
        for _, row in self.done(fitted_on, task):
            found |= dict.fromkeys([row["metric"]] if row.get("metric") in row["metrics"] else [])
            found |= dict.fromkeys(row["metrics"])
        return list(found)

    def change(self, row: dict, against: str | None, metric: str) -> dict | None:
        """
        `{"mean", "low", "high"}` of a row against a method; None if that was not measured.

        If only the other's change against this one is known, which resamples the same items, it is turned around.
        """
        found = _change_of(row, against, metric)
        if found is not None or against is None:
            return found
        other = _change_of(self.row(row["fitted_on"], row["task"], against), row["method"], metric)
        if other is None:
            return None
        turned = {"mean": other.get("mean"), "low": other.get("high"), "high": other.get("low")}
        return {name: None if value is None else -value for name, value in turned.items()}

    def times_frozen(self, row: dict) -> float | None:
        """Its seconds over the frozen model's, measured in turns, so that the machine's load affects both."""
        return 1.0 if row["method"] == self.frozen else cost_of(row, "times_frozen")

    def kind(self, label: str) -> str:
        """Of its marker, one of `svg.KINDS`."""
        if self._name(label) == _FROZEN:
            return "frozen"
        if self._is_memory(label):
            return "memory"
        return "fixed" if self.methods[label].get("keeps_weights", True) else "trained"

    def named(self, method: str) -> list[str]:
        """Labels of a method, which may be compared with several settings."""
        return [label for label in self.methods if self._name(label) == method]

    def _name(self, label: str) -> str:
        return self.methods[label].get("method", label)

    def _is_memory(self, label: str) -> bool:
        return self._name(label).startswith("knn_moe")


def _change_of(row: dict, against: str | None, metric: str) -> dict | None:
    return ((row.get("changes") or {}).get(against) or {}).get(metric) or None


def value_of(row: dict, metric: str) -> float | None:
    """A row's value of a metric; None if that was not measured."""
    return (row.get("metrics") or {}).get(metric)


def cost_of(row: dict, name: str) -> float | None:
    """One of a row's costs; None if that was not measured."""
    return (row.get("cost") or {}).get(name)


def passes_of(row: dict) -> float | None:
    """Forward and backward passes for each item."""
    costs = cost_of(row, "forward"), cost_of(row, "backward")
    return None if costs[0] is None else costs[0] + (costs[1] or 0.0)


def status_text(row: dict) -> str:
    """Why a row has no results."""
    reason = row.get("reason")
    match row["status"]:
        case "broken":
            return f"broken: {reason or 'changed no route on any item'}"
        case "failed":
            return f"failed: {reason or 'no reason is recorded'}"
        case "done":
            return "no results recorded"
        case _:
            return "not run yet"
