"""Small things about files that several parts need; knows nothing of what is in them."""

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
    """Where the library keeps what it can make again: `$KNNMOE_CACHE`, or `knnmoe_hf` in the Hugging Face home."""
    return Path(os.environ.get("KNNMOE_CACHE") or Path(constants.HF_HOME) / "knnmoe_hf")


def as_bytes(tensor: Tensor) -> Tensor:
    """(bytes,) uint8, the same memory as a contiguous tensor on the host."""
    return tensor.view(-1).view(torch.uint8)


def file_digest(path: Path) -> str:
    """SHA-256 of a file as a hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file of another name in the same folder, which becomes `path` at the end; it is gone if anything fails."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # it was its owner's alone
        os.replace(name, path)
    finally:
        with suppress(OSError):
            os.unlink(name)


def write_json(path: Path, content: dict) -> None:
    """Writes JSON, all of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
