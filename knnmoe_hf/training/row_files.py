"""
Tables of rows on disk, which may be larger than RAM: rows are appended to files and read back in blocks.

The files have no name in the file system, so the operating system deletes them when they are closed, even if the
process is killed.
"""

import bisect
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from knnmoe_hf.files import as_bytes
from knnmoe_hf.lookup.blocks import Allocate, in_memory


class RowFile:
    """
    A file of rows of one width and dtype, those of the first rows.

    Args:
        folder: an existing folder; the file is on the same disk.
    """

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        self.rows, self.width, self.dtype = 0, None, None

    def append(self, rows: Tensor) -> None:
        """
        Appends rows (n, width).

        Raises:
            ValueError: for rows of another width or dtype than the first ones.
        """
        if self.width is None:
            self.width, self.dtype = rows.shape[1], rows.dtype
        if (rows.shape[1], rows.dtype) != (self.width, self.dtype):
            raise ValueError(
                f"rows of {rows.shape[1]} {rows.dtype} follow rows of {self.width} {self.dtype}: append rows of one "
                "width and dtype."
            )
        unwritten = memoryview(as_bytes(rows.detach().cpu().contiguous()).numpy())
        while unwritten:  # one call may write only a part
            unwritten = unwritten[self._file.write(unwritten) :]
        self.rows += len(rows)

    def read(self, start: int, into: Tensor) -> None:
        """Fills a contiguous tensor (n, width) with the rows `start` to `start + n`."""
        unread = memoryview(as_bytes(into).numpy())
        self._file.seek(start * self.width * self.dtype.itemsize)
        while unread:
            count = self._file.readinto(unread)
            if not count:
                raise EOFError(f"{len(into)} rows from {start} on cannot be read: only {self.rows} were written.")
            unread = unread[count:]
        self._file.seek(0, os.SEEK_END)


class RowSource(Protocol):
    """
    Rows that can be read block by block: a `RowFile`, or the rows of a checkpoint.

    Attributes:
        rows: their number.
        width, dtype: of each row; None where there is no row.
    """

    rows: int
    width: int | None
    dtype: torch.dtype | None

    def read(self, start: int, into: Tensor) -> None:
        """Fills a contiguous tensor (n, width) with the rows `start` to `start + n`."""


class JoinedRows:
    """
    The rows of several sources, one after the other.

    Raises:
        ValueError: for sources whose rows are of another width or dtype.
    """

    def __init__(self, sources: Sequence[RowSource]):
        self._sources = [source for source in sources if source.rows]
        kinds = {(source.width, source.dtype): None for source in self._sources} or {(None, None): None}
        if len(kinds) > 1:
            (width, dtype), (other, other_dtype) = list(kinds)[:2]
            raise ValueError(
                f"the rows of a checkpoint are {width} {dtype}, and the model gives {other} {other_dtype}: load the "
                "model in the same dtype, or build anew."
            )
        ((self.width, self.dtype),) = kinds
        self.rows = sum(source.rows for source in self._sources)

    def read(self, start: int, into: Tensor) -> None:
        """As `RowFile.read`."""
        filled = 0
        for source in self._sources:
            if filled < len(into) and start < source.rows:
                count = min(len(into) - filled, source.rows - start)
                source.read(start, into[filled : filled + count])
                filled, start = filled + count, start + count
            start -= source.rows


class InterleavedRows:
    """
    A `Table` that takes its rows from several files in turns.

    Args:
        files: each has its rows in the order in which the table takes them.
        turns: `(index of a file, number of its next rows)`, in the order of the table; at least one row in all.
    """

    def __init__(self, files: Sequence[RowSource], turns: Sequence[tuple[int, int]]):
        self._turns, taken, rows = [], [0] * len(files), 0
        for index, count in turns:
            if count:
                self._turns.append((rows, files[index], taken[index], count))
            taken[index] += count
            rows += count
        some_file = self._turns[0][1]  # all have the same width and dtype
        self.shape, self.dtype = (rows, some_file.width), some_file.dtype

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
    """An `Allocate` of tensors in memory-mapped files in this folder, which the system can write back to free RAM."""

    def allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return in_memory(shape, dtype)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk raises here; a write into the mapping would crash
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))

    return allocate
