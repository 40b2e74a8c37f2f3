"""
The batches of a build in their order, from any batch on, and the digest of the examples of the batches before it.

The digest does not depend on the number of processes: it is made batch by batch.
"""

import hashlib
import pickle
import traceback
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from knnmoe_hf.data.reading import ReadingReport
from knnmoe_hf.distributed import Processes
from knnmoe_hf.errors import in_one_line

NO_DATA = hashlib.sha256().hexdigest()
"""The digest of no examples."""


def digest_after(digest: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The digest of the examples of some batches and of one more, from that of the batches before it."""
    found = hashlib.sha256(digest.encode())
    for row in rows:
        for name in ("input_ids", "labels", "attention_mask"):
            found.update(np.asarray([len(row[name]), *row[name]], dtype=np.int64).tobytes())
        found.update(int(row["example_id"]).to_bytes(8, "little", signed=True))
    return found.hexdigest()


class Step(NamedTuple):
    """
    What a loader's process or worker sends for a step.

    Attributes:
        batch: None after an error; rows of the batch before they are collated.
        report: of the rows that a stream has read so far.
        error: what ended the data, if it was an error.
        digests: of a stream, `{number of batches from its beginning on: digest of their examples}`, for this step.
    """

    batch: Any
    report: ReadingReport | None = None
    error: Exception | None = None
    digests: dict[int, str] | None = None


class BatchIndices(Sampler[list[int]]):
    """The indices of the examples in each of this process's batches."""

    def __init__(self, rows: int, size: int, processes: Processes, first: int = 0, limit: int | None = None):
        self.rows, self.batch_size, self.index, self.count = rows, size, processes.index, processes.count
        self.batches = -(-rows // size)
        self.first, self.stop = first, self.batches if limit is None else min(limit, self.batches)

    def __len__(self) -> int:
        """Number of steps, the same in every process; the batch of the last step may be empty."""
        return max(0, -(-(self.stop - self.first) // self.count))

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(len(self)):
            number = self.first + step * self.count + self.index
            yield list(self._range(number)) if number < self.stop else []

    def _range(self, number: int) -> range:
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.rows))

    def examples(self, dataset, number: int) -> list[Mapping[str, Any]]:
        """The examples of a batch, whichever process loads it."""
        return [dataset[index] for index in self._range(number)]


class BatchStream(IterableDataset):
    """This process's batches of an iterable dataset, which every process reads to its end."""

    def __init__(
        self, dataset: IterableDataset, size: int, processes: Processes, first: int = 0, limit: int | None = None
    ):
        self.dataset, self.size, self.index, self.count = dataset, size, processes.index, processes.count
        self.first, self.limit = first, limit

    def __iter__(self) -> Iterator[Step]:
        """Begins with an empty step for the batches before `first`, if there are any."""
        self._rows, self._batches, self._digest = None, 0, NO_DATA
        error, wanted = None, self.size
        while self._batches < self.first:
            rows, error = self._read(wanted)
            last = self._digests(rows)
            if error is not None or len(rows) < wanted:
                break
        if self.first:
            yield Step([], self._report(), error, last if self._batches == self.first else None)
            if error is not None or len(rows) < wanted:
                return
        while self.limit is None or self._batches < self.limit:
            wanted = self.size * (self.count if self.limit is None else min(self.count, self.limit - self._batches))
            rows, error = self._read(wanted)
            if rows:
                own = rows[self.index * self.size :][: self.size]
                # an error may have cut the last batch short, which is not what the data has then
                whole = rows if error is None else rows[: len(rows) // self.size * self.size]
                yield Step(own, self._report(), digests=self._digests(whole))
            if error is not None:
                yield Step(None, self._report(), error)
            if error is not None or len(rows) < wanted:
                return

    def _read(self, wanted: int) -> tuple[list, Exception | None]:
        """So many further rows, or those before the end or an error."""
        found = []
        try:
            self._rows = iter(self.dataset) if self._rows is None else self._rows
            for row in islice(self._rows, wanted):
                found.append(row)
        except Exception as error:  # a row that cannot be used, a network that is gone, ...
            return found, as_sent(error)
        return found, None

    def _report(self) -> ReadingReport | None:
        report = getattr(self.dataset, "report", None)
        return report.copy() if report is not None else None

    def _digests(self, rows: list) -> dict[int, str]:
        found = {}
        for start in range(0, len(rows), self.size):
            self._digest = digest_after(self._digest, rows[start : start + self.size])
            self._batches += 1
            found[self._batches] = self._digest
        return found


def as_sent(error: Exception) -> Exception:
    """The error, in a form in which a worker can send it to the process that it works for."""
    if get_worker_info() is None:
        return error
    error.add_note("".join(traceback.format_exception(error)))  # where it happened does not travel with it
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # errors whose __init__ takes other arguments than their message cannot be made again
        return RuntimeError(f"{type(error).__name__}: {in_one_line(error)}")
