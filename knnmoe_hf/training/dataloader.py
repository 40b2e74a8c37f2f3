"""Loading the batches of a build in several processes: process p of n loads the batches p, p + n, p + 2n, ...

Batches have the same examples whatever the number of processes is, so a memory has the same bytes from any number.
No example is loaded twice. All processes take the same number of steps: those without a batch in the last round get an
empty one. An error while data are read ends the pass as the end of the data would, with the batches before it.

A build that goes on where an earlier one was interrupted loads the batches from `first` on, after it has compared the
digest of the examples before them.
"""

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from knnmoe_hf.data.batches import collate, empty_batch
from knnmoe_hf.data.reading import ReadingReport
from knnmoe_hf.distributed import Processes
from knnmoe_hf.errors import in_one_line
from knnmoe_hf.training.batch_sources import NO_DATA, BatchIndices, BatchStream, Step, as_sent, digest_after


def batch_loader(
    dataset,
    collator: Callable,
    args: TrainingArguments,
    processes: Processes,
    on_end: Callable[[], None] | None = None,
    first: int = 0,
    limit: int | None = None,
) -> "OnePassLoader":
    """
    A loader of this process's batches, of `args.per_device_train_batch_size` examples each.

    Args:
        dataset: as `prepare_dataset` returns it.
        collator: from a list of rows to a batch.
        args: batch size and options of the loader.
        processes: share the batches.
        on_end: called when the pass has ended.
        first: number of the first batch to load.
        limit: number of the batch to stop before; None for all.

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
        sampler = BatchIndices(len(dataset), size, processes, first, limit)
        loader = OnePassLoader(dataset, batch_sampler=sampler, **options)
        return loader.of(processes, collator is not collate, on_end)
    if args.dataloader_num_workers > 1:
        raise ValueError(
            f"dataloader_num_workers={args.dataloader_num_workers} is not allowed for an iterable dataset, which each "
            "worker would read from its beginning: use 0 or 1."
        )
    stream = BatchStream(dataset, size, processes, first, limit)
    loader = OnePassLoader(stream, batch_size=None, **options)
    return loader.of(processes, True, on_end)


class OnePassLoader(DataLoader):
    """
    A `DataLoader` of one pass, which an error ends as the end of the data does.

    Attributes:
        failure: the error that ended the pass early; None if there was none.
        report: what became of the rows of a stream so far; None for other data.
    """

    failure: Exception | None = None
    report: ReadingReport | None = None
    _begun: list[Iterator[Step]] | None = None

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
        self._digests: dict[int, str] = {}
        return self

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.failure is not None:
            return
        (steps, self._begun) = (self._begun or [], None)
        while not self._ended(step := self._next(steps)):
            yield step.batch
        if self.on_end is not None:
            self.on_end()

    def _next(self, steps: list[Iterator[Step]]) -> Step:
        """The next step of the iterator in the list `steps`, which is put there with the first one."""
        step = Step(None)
        try:
            if not steps:
                steps.append(super().__iter__())
            step = next(steps[0], step)
        except Exception as error:  # of the data, the collator, or a worker that died
            if not self.ends_well:
                raise
            step = Step(None, error=error)
        self.report = step.report if step.report is not None else self.report
        if step.digests:  # of some steps: another process may have read less of its data before an error
            self._digests = dict([*self._digests.items(), *step.digests.items()][-4 * self.processes.count :])
        return step

    def whole_batches(self, solved: int) -> int:
        """How many of the first `solved` batches are whole; an error of the data may have cut the last one short."""
        return min(solved, max(self._digests, default=0)) if isinstance(self.dataset, BatchStream) else solved

    def digest(self, batches: int) -> str:
        """The digest of the examples of the first batches; the last of them is of one of the last steps."""
        if batches not in self._digests:
            known = max((number for number in self._digests if number < batches), default=0)
            digest = self._digests.get(known, NO_DATA)
            for number in range(known, batches):
                digest = digest_after(digest, self.batch_sampler.examples(self.dataset, number))
            self._digests = {batches: digest}
        return self._digests[batches]

    def skip(self, first: int) -> str | None:
        """
        Reads the examples of the first batches, which were solved before; to be called before the first batch.

        Returns:
            Their digest; None if there are fewer of them.

        Raises:
            Exception: of the data.
        """
        if not isinstance(self.dataset, BatchStream):
            return self.digest(first) if first <= self.batch_sampler.batches else None
        self._begun = []
        step = self._next(self._begun)
        if step.error is not None:
            raise step.error
        return self._digests.get(first)

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
            return Step(None, step.report, as_sent(error))
