"""Metrics of a build, for the log while it runs and as a summary at its end, over the batches of all processes."""

from collections.abc import Iterable
from dataclasses import dataclass

from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.training.builders.base import OptimizedBatch

MEANS = ("nll_before", "nll_after", "experts_changed", "tokens_worse")
"""The metrics of a batch that are means over its rows."""


@dataclass(frozen=True)
class BatchMetrics:
    """
    Metrics of one batch.

    Attributes:
        number: index of the batch in the dataset.
        rows: number of targets.
        seconds: wall time of the step.
        means: `{metric: mean over the rows}`, of `MEANS`; empty for a batch without targets.
    """

    number: int
    rows: int
    seconds: float
    means: dict[str, float]

    @classmethod
    def of(cls, number: int, optimized: OptimizedBatch, seconds: float) -> "BatchMetrics":
        """The metrics of a batch that a builder has optimised."""
        means = {
            "nll_before": optimized.nll_before.mean().item(),
            "nll_after": optimized.nll_after.mean().item(),
            "experts_changed": optimized.experts_changed,
            "tokens_worse": optimized.tokens_worse,
        }
        return cls(number, len(optimized.example), seconds, means)


class Progress:
    """Collects the metrics of this process's batches."""

    def __init__(self):
        self.batches: list[BatchMetrics] = []
        self._logged = 0

    def restore(self, batches: list[BatchMetrics]) -> None:
        """Takes over the batches of a checkpoint, which were logged when they were solved."""
        self.batches, self._logged = list(batches), len(batches)

    def logs(self, processes: Processes = ALONE) -> dict[str, float]:
        """Means over the rows of all processes since the last call, `rows_per_second`, and `loss` as in `Trainer`."""
        parts = processes.gather(self.batches[self._logged :])
        self._logged = len(self.batches)
        batches = _in_order(parts)
        metrics = _means(batches)
        slowest = max(sum(batch.seconds for batch in part) for part in parts)
        if metrics:
            metrics["rows_per_second"] = sum(batch.rows for batch in batches) / slowest
        return metrics | _loss(batches)

    def summary(self, processes: Processes = ALONE) -> dict[str, float]:
        """Means over all rows of the build so far, the number of rows, and `loss` as in `logs`."""
        batches = _in_order(processes.gather(self.batches))
        return _means(batches) | {"rows": sum(batch.rows for batch in batches)} | _loss(batches)


def _in_order(parts: Iterable[list[BatchMetrics]]) -> list[BatchMetrics]:
    return sorted((batch for part in parts for batch in part), key=lambda batch: batch.number)


def _means(batches: list[BatchMetrics]) -> dict[str, float]:
    with_rows = [batch for batch in batches if batch.rows]
    total = sum(batch.rows for batch in with_rows)
    names = with_rows[0].means if with_rows else ()
    return {name: sum(batch.means[name] * batch.rows for batch in with_rows) / total for name in names}


def _loss(batches: list[BatchMetrics]) -> dict[str, float]:
    """The mean over batches, as `Trainer` computes it: a batch without targets counts as 0."""
    losses = [batch.means.get("nll_after", 0.0) for batch in batches]
    return {"loss": sum(losses) / len(losses)} if losses else {}
