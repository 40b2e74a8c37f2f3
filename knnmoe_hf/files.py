"""Small things about files that several parts need; knows nothing of what is in them."""

import hashlib
import json
import os
from pathlib import Path

from huggingface_hub import constants


def cache_dir() -> Path:
    """Where the library keeps what it can make again: `$KNNMOE_CACHE`, or `knnmoe_hf` in the Hugging Face home."""
    return Path(os.environ.get("KNNMOE_CACHE") or Path(constants.HF_HOME) / "knnmoe_hf")


def file_digest(path: Path) -> str:
    """SHA-256 of a file as a hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict) -> None:
    """Writes JSON to a temporary name and renames it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)
