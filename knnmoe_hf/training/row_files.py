"""
Tables of rows that may be larger than memory: written once to files, read in blocks through the methods of a tensor.

The files have no name: the system deletes them with their last user, also when a process is killed.
"""

import bisect
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from knnmoe_hf.files import as_bytes
from knnmoe_hf.lookup.blocks import Allocate, in_memory


class RowFile:
    """
    Rows of one dtype and width, appended to a file.

    Args:
        folder: on whose disk the file lies.

    Raises:
        ValueError: for rows unlike the first ones.
    """

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        self.rows, self.width, self.dtype = 0, None, None

    def append(self, rows: Tensor) -> None:
        """Writes rows (n, width)."""
        if self.width is None:
            self.width, self.dtype = rows.shape[1], rows.dtype
        if (rows.shape[1], rows.dtype) != (self.width, self.dtype):
            raise ValueError(
                f"rows of {rows.shape[1]} {rows.dtype} follow rows of {self.width} {self.dtype}: append rows of one "
                "width and dtype."
            )
        left = memoryview(as_bytes(rows.detach().cpu().contiguous()).numpy())
        while left:  # a call may write less than all
            left = left[self._file.write(left) :]
        self.rows += len(rows)

    def read(self, start: int, into: Tensor) -> None:
        """Fills a contiguous tensor (n, width) with the rows from `start` on."""
        left = memoryview(as_bytes(into).numpy())
        self._file.seek(start * self.width * self.dtype.itemsize)
        while left:
            taken = self._file.readinto(left)
            if not taken:
                raise EOFError(f"{len(into)} rows from {start} on cannot be read: only {self.rows} were written.")
            left = left[taken:]
        self._file.seek(0, os.SEEK_END)


class DealtRows:
    """
    A table whose rows come from several files in turns.

    Args:
        files: each holds its rows in the order in which the table needs them.
        turns: `(index of a file, how many of its next rows)`, in the order of the table; there is at least one row.
    """

    def __init__(self, files: Sequence[RowFile], turns: Sequence[tuple[int, int]]):
        self._turns, taken, rows = [], [0] * len(files), 0
        for index, count in turns:
            if count:
                self._turns.append((rows, files[index], taken[index], count))
            taken[index] += count
            rows += count
        first = self._turns[0][1]
        self.shape, self.dtype = (rows, first.width), first.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(len(self))
        found = torch.empty(max(stop - start, 0), self.shape[1], dtype=self.dtype)
        turn = bisect.bisect_right(self._turns, start, key=lambda turn: turn[0]) - 1
        while start < stop:
            first, file, offset, count = self._turns[turn]
            high = min(stop, first + count)
            file.read(offset + start - first, found[len(found) - (stop - start) : len(found) - (stop - high)])
            start, turn = high, turn + 1
        return found


def on_disk(folder: Path) -> Allocate:
    """An `Allocate` of tensors that are mapped from files, so that the system can write them back and free memory."""

    def allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return in_memory(shape, dtype)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk raises now; a later write would crash
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))

    return allocate
