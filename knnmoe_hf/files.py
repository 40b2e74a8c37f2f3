"""Small helpers for files, digests and bytes."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import constants
from torch import Tensor


def cache_dir() -> Path:
    """The cache folder, which may be deleted at any time: `$KNNMOE_CACHE`, or `knnmoe_hf` in the Hugging Face home."""
    return Path(os.environ.get("KNNMOE_CACHE") or Path(constants.HF_HOME) / "knnmoe_hf")


def is_of_full_disk(error: BaseException) -> bool:
    """Whether a disk has no space left, or a quota was used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


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


def write_json(path: Path, content: dict) -> None:
    """Writes JSON so that the file is replaced as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
