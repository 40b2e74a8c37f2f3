"""The files of a memory, and edits of them that a stranger could make."""

import json
from pathlib import Path

from knnmoe_hf.files import file_digest
from tests.memory.helpers import edit_config, shards

CONFIG, TOKENIZER, SHARD = "config.json", "tokenizer.json", "a shard"
FILES = [CONFIG, TOKENIZER, "tokenizer_config.json", SHARD]


def place(folder: Path, name: str) -> Path:
    return shards(folder)[0] if name == SHARD else folder / name


def edit_tokenizer(folder: Path, **entries) -> None:
    """Changes its configuration, and the digest of that."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    digest_again(folder, path.name)


def digest_again(folder: Path, name: str) -> None:
    edit_config(folder, lambda config: config["memory"]["digests"].update({name: file_digest(folder / name)}))
