"""Small helpers for files, digests and bytes."""

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import constants
from torch import Tensor

from knnmoe_hf.errors import NoSpaceError, shown

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_dir() -> Path:
    """The cache folder, which may be deleted at any time: `$KNNMOE_CACHE`, or `knnmoe_hf` in the Hugging Face home."""
    return Path(os.environ.get("KNNMOE_CACHE") or Path(constants.HF_HOME) / "knnmoe_hf")


def is_of_full_disk(error: BaseException) -> bool:
    """Whether a disk has no space left, a quota was used up, or a file is too large for the system."""
    return _full(error) is not None


def as_bytes(tensor: Tensor) -> Tensor:
    """A view (bytes,) uint8 of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


def file_digest(path: Path) -> str:
    """SHA-256 of a file as a hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder, renamed to `path` on success and deleted on failure."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    finally:
        with suppress(OSError):
            os.unlink(name)


def unfinished(folder: Path, name: str) -> list[Path]:
    """What `replacing` left in a folder when the process was killed: parts of the file of this name."""
    return list(folder.glob(f".{name}-????????"))


def write_json(path: Path, content: dict) -> None:
    """Writes JSON so that the file is replaced as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def told_of_full_disks(folder: str | os.PathLike, way_out: Callable[[], str]) -> Iterator[None]:
    """
    Inside this context a full disk is an error of one sentence, whichever library meets it.

    Args:
        folder: that is written to.
        way_out: says, when it happens, what to do when there is room again, as "and save again".

    Raises:
        NoSpaceError: in place of the error.
    """
    try:
        yield
    except Exception as error:
        if (reason := _full(error)) is None:
            raise
        raise NoSpaceError(
            f"there is no space left for {shown(os.fspath(folder))} ({reason}): free some, {way_out()}."
        ) from error


def _full(error: BaseException) -> str | None:
    """What the system says of a full disk, or of a file that is too large for it; None for another error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (told := re.search(r"\(os error (\d+)\)", str(error))):  # safetensors and tokenizers
        number = int(told[1])
    return os.strerror(number) if number in _FULL else None
