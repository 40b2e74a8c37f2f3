"""Small memories of all kinds as `{file name: bytes}`, and how they are written to a folder again."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from knnmoe_hf import RoutingMemory
from knnmoe_hf.memory.manifest import seal
from tests.memory.helpers import full_memory, tiny_tokenizer
from tests.support.models import tiny_model
from tests.support.stats import with_fit, with_stats

ENCODED = dict(key_codec="pca", key_dim=8, key_dtype="int8", value_dtype="int8", value_experts=2)


@dataclass(frozen=True)
class Special:
    """In place of a file's bytes: a `"link"` to a path, a `"pipe"`, a `"folder"` or a `"socket"`."""

    kind: str
    target: str = ""


Files = dict[str, "bytes | Special"]


def small_memories(model) -> dict[str, RoutingMemory]:
    """Of each value space, codec, dtype, confidence and recall, with and without a tokenizer, by name."""
    one = dict(examples=(0, 1))
    return {
        "plain": full_memory(model, **one),
        "encoded": full_memory(model, **one, **ENCODED),
        "assignment": full_memory(model, **one, value_space="assignment", confidence="context"),
        "assignment int8": full_memory(model, **one, value_space="assignment", **ENCODED),
        "delta": full_memory(model, **one, value_space="delta", key_dtype="bfloat16", value_dtype="float16"),
        "logits": full_memory(model, **one, key_codec="logits", confidence="calibrated"),
        "calibrated": with_stats(full_memory(model, **one, confidence="calibrated", **ENCODED)),
        "recalling": with_fit(full_memory(model, **one, confidence="calibrated", recall="both")),
        "tokenizer": full_memory(model, **one, tokenizer=tiny_tokenizer()),
    }


def saved_files(memory: RoutingMemory, folder: Path, **options) -> Files:
    """What a save writes."""
    memory.save_pretrained(folder, **options)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small_artefacts(folder: Path) -> dict[str, Files]:
    """Of the tiny OLMoE: `small_memories`, one of them in several shards and one without its text."""
    memories = small_memories(tiny_model("olmoe"))
    files = {name: saved_files(memory, folder / name) for name, memory in memories.items()}
    files["shards"] = saved_files(memories["encoded"], folder / "shards", max_shard_size=1000)
    files["ids"] = saved_files(memories["recalling"], folder / "ids", provenance="ids", next_tokens=True)
    return files


def write(files: Mapping[str, "bytes | Special"], folder: Path) -> None:
    """Writes them to a new folder."""
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content.kind == "link":
            path.symlink_to(content.target)
        elif content.kind == "pipe":
            os.mkfifo(path)
        elif content.kind == "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        else:
            path.mkdir()


def sealed(files: Files) -> Files:
    """
    As a stranger leaves them who knows the format: sizes, digests and seal fit the bytes.

    Raises:
        AttributeError, LookupError, TypeError, ValueError: if `config.json` has no such entries.
    """
    config = json.loads(files["config.json"])
    entry = config["memory"]
    for shard in entry["files"]:
        content = files.get(shard["name"])
        if isinstance(content, bytes):
            shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for name in entry["digests"]:
        if isinstance(files.get(name), bytes):
            entry["digests"][name] = hashlib.sha256(files[name]).hexdigest()
    entry["sha256"] = seal(entry)
    return files | {"config.json": json.dumps(config).encode()}
