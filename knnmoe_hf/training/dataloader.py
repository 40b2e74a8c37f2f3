"""Which process solves which batch: whole batches in the data set's order, by turns, the short last one included.

A batch is the same whoever solves it, so that a memory is the same bytes from any number of processes. No example is
solved twice, and all processes take equally many steps: one that has no batch left in the last round is given an empty
one.
"""

from collections.abc import Callable, Iterator
from itertools import islice

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import TrainingArguments

from knnmoe_hf.distributed import Processes
from knnmoe_hf.training.data import empty_batch


def batch_loader(dataset, collator: Callable, args: TrainingArguments, processes: Processes) -> DataLoader:
    """
    A loader of the batches of `args.per_device_train_batch_size` examples that are this process's.

    Args:
        dataset: as `prepare_dataset` returns it.
        collator: from a list of rows to a batch.
        args: say how to load.
        processes: that take turns.

    Raises:
        ValueError: for a stream that several workers would read, each from its beginning.
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
        return DataLoader(dataset, batch_sampler=_DealtBatches(len(dataset), size, processes), **options)
    if args.dataloader_num_workers > 1:
        raise ValueError(
            f"dataloader_num_workers={args.dataloader_num_workers} is not allowed for a stream, which each worker "
            "would read from its beginning: use 0 or 1."
        )
    return DataLoader(_DealtStream(dataset, size, processes), batch_size=None, **options)


class _DealtBatches(Sampler[list[int]]):
    """Indices of the rows of each batch."""

    def __init__(self, rows: int, size: int, processes: Processes):
        self.rows, self.batch_size, self.index, self.count = rows, size, processes.index, processes.count

    def __len__(self) -> int:
        """Rounds, of which each process has a batch, but for the last one."""
        return -(-self.rows // (self.batch_size * self.count))

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.rows, self.batch_size * self.count):
            own = start + self.index * self.batch_size
            yield list(range(own, min(own + self.batch_size, self.rows)))


class _DealtStream(IterableDataset):
    """Whole batches of a stream, which every process reads to the end."""

    def __init__(self, dataset: IterableDataset, size: int, processes: Processes):
        self.dataset, self.size, self.index, self.count = dataset, size, processes.index, processes.count

    def __iter__(self) -> Iterator[list[dict]]:
        rows = iter(self.dataset)
        while round_of_all := list(islice(rows, self.size * self.count)):
            yield round_of_all[self.index * self.size :][: self.size]


class _Collate:
    """A collator that is not asked for a batch of nothing."""

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        return self.collator(rows) if rows else empty_batch()
