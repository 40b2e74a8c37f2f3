"""Loading the batches of a build in several processes: process p of n loads the batches p, p + n, p + 2n, ...

Batches have the same examples whatever the number of processes is, so a memory has the same bytes from any number.
No example is loaded twice. All processes take the same number of steps: those without a batch in the last round get an
empty one.
"""

from collections.abc import Callable, Iterator
from itertools import islice

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import TrainingArguments

from knnmoe_hf.data.batches import empty_batch
from knnmoe_hf.distributed import Processes


def batch_loader(dataset, collator: Callable, args: TrainingArguments, processes: Processes) -> DataLoader:
    """
    A loader of this process's batches, of `args.per_device_train_batch_size` examples each.

    Args:
        dataset: as `prepare_dataset` returns it.
        collator: from a list of rows to a batch.
        args: batch size and options of the loader.
        processes: share the batches.

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
        return DataLoader(dataset, batch_sampler=_BatchIndices(len(dataset), size, processes), **options)
    if args.dataloader_num_workers > 1:
        raise ValueError(
            f"dataloader_num_workers={args.dataloader_num_workers} is not allowed for an iterable dataset, which each "
            "worker would read from its beginning: use 0 or 1."
        )
    return DataLoader(_BatchStream(dataset, size, processes), batch_size=None, **options)


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

    def __iter__(self) -> Iterator[list[dict]]:
        rows = iter(self.dataset)
        while step_of_all := list(islice(rows, self.size * self.count)):
            yield step_of_all[self.index * self.size :][: self.size]


class _Collate:
    """Calls the collator for batches with rows only; an empty batch is made without it."""

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        return self.collator(rows) if rows else empty_batch()
