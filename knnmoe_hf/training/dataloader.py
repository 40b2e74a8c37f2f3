"""Loading the batches of a build in several processes: process p of n loads the batches p, p + n, p + 2n, ...

Batches have the same examples whatever the number of processes is, so a memory has the same bytes from any number.
No example is loaded twice. All processes take the same number of steps: those without a batch in the last round get an
empty one. An error while data are read ends the pass as the end of the data would, with the batches before it.
"""

import pickle
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info
from transformers import TrainingArguments

from knnmoe_hf.data.batches import collate, empty_batch
from knnmoe_hf.data.reading import ReadingReport
from knnmoe_hf.distributed import Processes
from knnmoe_hf.errors import in_one_line


def batch_loader(
    dataset,
    collator: Callable,
    args: TrainingArguments,
    processes: Processes,
    on_end: Callable[[], None] | None = None,
) -> "OnePassLoader":
    """
    A loader of this process's batches, of `args.per_device_train_batch_size` examples each.

    Args:
        dataset: as `prepare_dataset` returns it.
        collator: from a list of rows to a batch.
        args: batch size and options of the loader.
        processes: share the batches.
        on_end: called when the pass has ended.

    Raises:
        ValueError: for an iterable dataset with more than one worker.
    """
    options = dict(
        collate_fn=_Collate(collator),
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        pin_memory=args.dataloader_pin_memory,
    )
    size = args.per_device_train_batch_size
    if not isinstance(dataset, IterableDataset):
        sampler = _BatchIndices(len(dataset), size, processes)
        loader = OnePassLoader(dataset, batch_sampler=sampler, **options)
        return loader.of(processes, collator is not collate, on_end)
    if args.dataloader_num_workers > 1:
        raise ValueError(
            f"dataloader_num_workers={args.dataloader_num_workers} is not allowed for an iterable dataset, which each "
            "worker would read from its beginning: use 0 or 1."
        )
    loader = OnePassLoader(_BatchStream(dataset, size, processes), batch_size=None, **options)
    return loader.of(processes, True, on_end)


class Step(NamedTuple):
    """
    What a loader's process or worker sends for a step.

    Attributes:
        batch: None after an error; rows of the batch before they are collated.
        report: of the rows that a stream has read so far.
        error: what ended the data, if it was an error.
    """

    batch: Any
    report: ReadingReport | None = None
    error: Exception | None = None


class OnePassLoader(DataLoader):
    """
    A `DataLoader` of one pass, which an error ends as the end of the data does.

    Attributes:
        failure: the error that ended the pass early; None if there was none.
        report: what became of the rows of a stream so far; None for other data.
    """

    failure: Exception | None = None
    report: ReadingReport | None = None

    def of(self, processes: Processes, agree: bool, on_end: Callable[[], None] | None) -> "OnePassLoader":
        """
        Tells whose batches these are.

        Args:
            processes: share the batches.
            agree: whether reading may fail in one process alone, so that each step asks all of them; if it fails
                without that, the error is raised at once.
            on_end: called when the pass has ended.
        """
        self.processes, self.agree, self.on_end = processes, agree and processes.count > 1, on_end
        self.ends_well = agree or processes.count == 1
        return self

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.failure is not None:
            return
        steps = None
        while True:
            step = Step(None)
            try:
                steps = super().__iter__() if steps is None else steps
                step = next(steps, step)
            except Exception as error:  # of the data, the collator, or a worker that died
                if not self.ends_well:
                    raise
                step = Step(None, error=error)
            self.report = step.report if step.report is not None else self.report
            if self._ended(step):
                break
            yield step.batch
        if self.on_end is not None:
            self.on_end()

    def _ended(self, step: Step) -> bool:
        """Whether this or any other process has no batch any more; they all stop in the same step."""
        self.failure = step.error
        if not self.agree:
            return step.batch is None
        told = None if step.batch is not None else in_one_line(step.error) if step.error is not None else ""
        for index, message in enumerate(self.processes.gather(told)):
            if message and self.failure is None:
                self.failure = RuntimeError(f"process {index} could not read its data any more ({message}).")
            if message is not None:
                told = message
        return told is not None


class _BatchIndices(Sampler[list[int]]):
    """The indices of the examples in each of this process's batches."""

    def __init__(self, rows: int, size: int, processes: Processes):
        self.rows, self.batch_size, self.index, self.count = rows, size, processes.index, processes.count

    def __len__(self) -> int:
        """Number of steps, the same in every process; the batch of the last step may be empty."""
        return -(-self.rows // (self.batch_size * self.count))

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.rows, self.batch_size * self.count):
            first = start + self.index * self.batch_size
            yield list(range(first, min(first + self.batch_size, self.rows)))


class _BatchStream(IterableDataset):
    """This process's batches of an iterable dataset, which every process reads to its end."""

    def __init__(self, dataset: IterableDataset, size: int, processes: Processes):
        self.dataset, self.size, self.index, self.count = dataset, size, processes.index, processes.count

    def __iter__(self) -> Iterator[Step]:
        rows, error, wanted = None, None, self.size * self.count
        while error is None:
            step_of_all = []
            try:
                rows = iter(self.dataset) if rows is None else rows
                for row in islice(rows, wanted):  # those before an error are kept
                    step_of_all.append(row)
            except Exception as found:  # a row that cannot be used, a network that is gone, ...
                error = _as_sent(found)
            report = getattr(self.dataset, "report", None)
            report = report.copy() if report is not None else None
            if step_of_all:
                yield Step(step_of_all[self.index * self.size :][: self.size], report)
            if error is not None:
                yield Step(None, report, error)
            elif len(step_of_all) < wanted:
                return


class _Collate:
    """Calls the collator for batches with rows only; an empty batch is made without it."""

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, given: list[dict] | Step) -> Step:
        step = given if isinstance(given, Step) else Step(given)
        if step.error is not None:
            return step
        try:
            return step._replace(batch=self.collator(step.batch) if step.batch else empty_batch())
        except Exception as error:
            return Step(None, step.report, _as_sent(error))


def _as_sent(error: Exception) -> Exception:
    """The error, in a form in which a worker can send it to the process that it works for."""
    if get_worker_info() is None:
        return error
    error.add_note("".join(traceback.format_exception(error)))  # where it happened does not travel with it
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # errors whose __init__ takes other arguments than their message cannot be made again
        return RuntimeError(f"{type(error).__name__}: {in_one_line(error)}")
