"""Evaluating a stream in several processes: each gets whole batches, the same as from one process, and no copies."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor

from knnmoe_hf.data.batches import IGNORED
from knnmoe_hf.distributed import Processes
from knnmoe_hf.errors import in_one_line


class StreamedBatches:
    """
    The batches of a stream that the first process reads, one for each process in each step.

    Accelerate would join the batches of a step and cut them anew, which fails for batches of different lengths, and
    would fill up the last step with examples that count twice. Here they stay as they are; rows that are there only
    because all processes need the same number have labels of -100, and `gather` leaves them out.

    Args:
        loader: of accelerate, over the stream; it is read through its own `base_dataloader`.
        processes: that share the batches.
    """

    def __init__(self, loader: Any, processes: Processes):
        self.loader, self.processes, self.dataset = loader, processes, loader.dataset
        self._kept: list[int] = []

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first, count = self.processes.index == 0, self.processes.count
        batches = iter(self.loader.base_dataloader) if first else None
        while True:
            step, error = [], None
            try:
                step = list(islice(batches, count)) if first else []
            except Exception as found:  # of the data or the collator: no process may wait for this one
                error = found
            step, told = self.processes.gather((step, in_one_line(error) if error is not None else None))[0]
            if error is not None:
                raise error
            if told is not None:
                raise RuntimeError(f"process 0 could not read its data any more ({told}).")
            if not step:
                return
            sizes = [len(batch["input_ids"]) for batch in step]
            self._kept = sizes + [0] * (count - len(step))
            own = step[self.processes.index] if self.processes.index < len(step) else step[0]
            yield _filled(own, self._kept[self.processes.index], max(sizes))

    def gather(self, value: Any, accelerator: Accelerator) -> Any:
        """The rows of all processes in the order of the stream, without those that fill up a batch."""
        return recursively_apply(self._without_fillers, accelerator.gather(value))

    def _without_fillers(self, tensor: Tensor) -> Tensor:
        parts = tensor.chunk(self.processes.count)
        return torch.cat([part[:kept] for part, kept in zip(parts, self._kept)])


def _filled(batch: dict[str, Tensor], kept: int, size: int) -> dict[str, Tensor]:
    """A batch of `size` rows, of which the first `kept` are as they were, and the others have no target."""
    rows = torch.tensor([row if row < kept else 0 for row in range(size)])
    filled = {name: tensor[rows] for name, tensor in batch.items()}
    filled["labels"][kept:] = IGNORED
    return filled
