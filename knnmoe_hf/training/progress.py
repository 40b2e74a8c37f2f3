"""What a build reports while it runs and when it is done, over the batches of all processes."""

from collections.abc import Iterable
from dataclasses import dataclass

from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.training.builders.base import OptimizedBatch


@dataclass(frozen=True)
class BatchNote:
    """
    Of one batch.

    Attributes:
        number: of the batch in the data set.
        rows: its targets.
        seconds: that it took.
        means: over its rows; none for a batch without a target.
    """

    number: int
    rows: int
    seconds: float
    means: dict[str, float]

    @classmethod
    def of(cls, number: int, solved: OptimizedBatch, seconds: float) -> "BatchNote":
        """Of a solved batch."""
        means = {
            "nll_before": solved.nll_before.mean().item(),
            "nll_after": solved.nll_after.mean().item(),
            "experts_changed": solved.experts_changed,
            "tokens_worse": solved.tokens_worse,
        }
        return cls(number, len(solved.example), seconds, means)


class Progress:
    """Notes of the batches that this process has solved."""

    def __init__(self):
        self.notes: list[BatchNote] = []
        self._logged = 0

    def logs(self, processes: Processes = ALONE) -> dict[str, float]:
        """Means over the rows of all processes since the last time, the rows per second, and the mean `loss`."""
        parts = processes.gather(self.notes[self._logged :])
        self._logged = len(self.notes)
        notes = _in_order(parts)
        found = _means(notes)
        slowest = max(sum(note.seconds for note in part) for part in parts)
        if found:
            found["rows_per_second"] = sum(note.rows for note in notes) / slowest
        return found | _loss(notes)

    def summary(self, processes: Processes = ALONE) -> dict[str, float]:
        """What the whole build came to: means over all rows, and how many they are; `loss` as in `logs`."""
        notes = _in_order(processes.gather(self.notes))
        return _means(notes) | {"rows": sum(note.rows for note in notes)} | _loss(notes)


def _in_order(parts: Iterable[list[BatchNote]]) -> list[BatchNote]:
    return sorted((note for part in parts for note in part), key=lambda note: note.number)


def _means(notes: list[BatchNote]) -> dict[str, float]:
    solved = [note for note in notes if note.rows]
    total = sum(note.rows for note in solved)
    names = solved[0].means if solved else ()
    return {name: sum(note.means[name] * note.rows for note in solved) / total for name in names}


def _loss(notes: list[BatchNote]) -> dict[str, float]:
    """As Trainer has it: the mean of the batches, of which one without a target counts as 0."""
    losses = [note.means.get("nll_after", 0.0) for note in notes]
    return {"loss": sum(losses) / len(losses)} if losses else {}
