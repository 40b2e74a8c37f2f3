"""
Segments: the rows of consecutive batches of a build, in one safetensors file that is written once and never changes.

The header of a segment follows from a few counts, so that reading one needs no parser: it must be the header that this
module would write. Rows are written and read in blocks, as there may be more of them than fit in RAM.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from knnmoe_hf.errors import MemoryFileError
from knnmoe_hf.files import as_bytes
from knnmoe_hf.lookup.blocks import BLOCK, Table
from knnmoe_hf.memory.plain_files import open_plain, unusable

WAY_OUT = "resume from another checkpoint, or build anew"
"""What to do about a checkpoint that cannot be used."""

_NAMES = {  # of dtypes, as safetensors spells them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}
WAY_OUT = "resume from another checkpoint, or build anew"
"""What to do about a checkpoint that cannot be used."""
KEY_DTYPES = {_NAMES[dtype]: dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
"""The dtypes that gate inputs may have, by their names in a checkpoint."""


@dataclass(frozen=True)
class SegmentSizes:
    """
    What the header of a segment follows from.

    Attributes:
        batches, rows, examples, tokens: number of batches, of rows, of examples that have a row, and of their tokens.
        keys: `{layer: (width, dtype)}` of gate inputs.
        values: `{layer: width}` of values, which are float32.
    """

    batches: int
    rows: int
    examples: int
    tokens: int
    keys: Mapping[int, tuple[int, torch.dtype]]
    values: Mapping[int, int]

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor in the file's order: each begins at a multiple of its item's size."""
        batches, rows, examples, tokens = (self.batches,), (self.rows,), (self.examples,), (self.tokens,)
        found = {
            "batches.rows": (batches, torch.int64),
            "batches.examples": (batches, torch.int64),
            "batches.seconds": (batches, torch.float64),
            "batches.means": ((self.batches, 4), torch.float64),
            "rows.example_ids": (rows, torch.int64),
            "rows.positions": (rows, torch.int64),
            "examples.ids": (examples, torch.int64),
            "examples.lengths": (examples, torch.int64),
            "rows.nll_before": (rows, torch.float32),
            "rows.nll_after": (rows, torch.float32),
            "examples.input_ids": (tokens, torch.int32),
            "examples.labels": (tokens, torch.int32),
        }
        found |= {f"values.{layer}": ((self.rows, width), torch.float32) for layer, width in self.values.items()}
        keys = sorted(self.keys.items(), key=lambda item: (-item[1][1].itemsize, item[0]))
        # of eight bytes an item only in a model of float64, and then each row is
        first = {f"keys.{k}": ((self.rows, w), dtype) for k, (w, dtype) in keys if dtype.itemsize == 8}
        return first | found | {f"keys.{k}": ((self.rows, w), dtype) for k, (w, dtype) in keys if dtype.itemsize < 8}

    def header(self) -> bytes:
        """The length and the JSON with which the file begins."""
        described, start = {}, 0
        for name, (shape, dtype) in self.tensors().items():
            stop = start + math.prod(shape) * dtype.itemsize
            described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def places(self) -> dict[str, int]:
        """Where in the file each tensor begins, in bytes, and under the name `""` where the file ends."""
        found, place = {}, len(self.header())
        for name, (shape, dtype) in self.tensors().items():
            found[name] = place
            place += math.prod(shape) * dtype.itemsize
        return found | {"": place}


def write_segment(path: Path, sizes: SegmentSizes, tensors: Mapping[str, Table]) -> str:
    """
    Writes a segment and waits until it is on the disk.

    Args:
        path: of the file, which must not exist.
        sizes: of what is written.
        tensors: as `sizes.tensors` describes them.

    Returns:
        The SHA-256 of the file.
    """
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in _parts(sizes, tensors):
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _parts(sizes: SegmentSizes, tensors: Mapping[str, Table]) -> Iterator[bytes | memoryview]:
    yield sizes.header()
    for name, (shape, dtype) in sizes.tensors().items():
        table = tensors[name]
        for start in range(0, shape[0], BLOCK):
            block = table[start : start + BLOCK].detach().cpu().contiguous()
            if block.dtype != dtype or tuple(block.shape[1:]) != shape[1:]:
                raise ValueError(f"{name} are {list(block.shape)} {block.dtype}: {list(shape)} {dtype} are needed.")
            yield memoryview(as_bytes(block).numpy())


class Segment:
    """
    A segment that can be read.

    Args:
        path: of the file.
        sizes: of what it must hold.
        sha256: of the file, as it was when it was written; `digest` tells what it is.

    Raises:
        MemoryFileError: if the file is not there, is not a regular file, or is not what `sizes` say.
    """

    def __init__(self, path: Path, sizes: SegmentSizes, sha256: str):
        self.path, self.sizes, self.sha256 = path, sizes, sha256
        self._places, header = sizes.places(), sizes.header()
        with open_plain(path, way_out=WAY_OUT) as file:
            self._stat = os.fstat(file.fileno())
            if self._stat.st_size != self._places[""]:
                raise broken(path, f"it has {self._stat.st_size:,} bytes where {self._places['']:,} are needed")
            if file.read(len(header)) != header:
                raise broken(path, "its header is not the one that its checkpoint describes")

    def is_at(self, path: Path) -> bool:
        """Whether this is the file of this name."""
        return os.path.samestat(self._stat, os.stat(path))

    def moved(self, path: Path) -> None:
        """From now on the file, or a copy of it, is read from here."""
        self.path, self._stat = path, os.stat(path)

    def _open(self) -> BinaryIO:
        """The file, which is opened for each use, as there may be more segments than a process may have open."""
        file = open_plain(self.path, way_out=WAY_OUT)
        if not os.path.samestat(os.fstat(file.fileno()), self._stat):
            file.close()
            raise broken(self.path, "another file was put in its place while it was in use")
        return file

    def content(self) -> Iterator[bytes]:
        """The bytes of the file, in parts."""
        with self._open() as file:
            while part := file.read(2**20):
                yield part

    def digest(self) -> str:
        """SHA-256 of the file."""
        digest = hashlib.sha256()
        for part in self.content():
            digest.update(part)
        return digest.hexdigest()

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in memory."""
        shape, dtype = self.sizes.tensors()[name]
        found = torch.empty(shape, dtype=dtype)
        self.fill(name, 0, found)
        return found

    def fill(self, name: str, start: int, into: Tensor) -> None:
        """
        Fills a contiguous tensor with the rows of `name` from `start` on.

        Raises:
            EOFError: if the file was truncated meanwhile.
        """
        unread = memoryview(as_bytes(into).numpy()) if into.numel() else memoryview(b"")
        with self._open() as file:
            file.seek(self._places[name] + start * (into.nbytes // len(into) if len(into) else 0))
            while unread:
                count = file.readinto(unread)
                if not count:
                    raise EOFError(f"{self.path} was truncated while it was read: resume from another checkpoint.")
                unread = unread[count:]

    def rows_of(self, name: str) -> "SegmentRows":
        """The rows of a table of keys or values."""
        return SegmentRows(self, name)


class SegmentRows:
    """One of a segment's tables of rows, as a `RowSource`."""

    def __init__(self, segment: Segment, name: str):
        self.segment, self.name = segment, name
        (self.rows, self.width), self.dtype = segment.sizes.tensors()[name]

    def read(self, start: int, into: Tensor) -> None:
        """As `RowFile.read`."""
        self.segment.fill(self.name, start, into)

    def blocks(self, size: int = BLOCK) -> Iterator[Tensor]:
        """The rows in their order, (<= size, width) each."""
        for start in range(0, self.rows, size):
            block = torch.empty(min(size, self.rows - start), self.width, dtype=self.dtype)
            self.read(start, block)
            yield block


def broken(path: Path, reason: str) -> MemoryFileError:
    """The error for a checkpoint that cannot be used."""
    return unusable(path, reason, WAY_OUT)
