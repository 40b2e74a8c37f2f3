"""What `config.json` says of a saved memory, checked before a tensor is opened."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from knnmoe_hf.config import KEY_DTYPES, VALUE_SPACES
from knnmoe_hf.errors import MemoryFileError, shown
from knnmoe_hf.fingerprint import is_fingerprint
from knnmoe_hf.memory.provenance import Provenance

FORMAT_VERSION = 1


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and name not in ("", "config.json")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


@dataclass(frozen=True)
class Origin:
    """What a memory was built from and as; never changes after the build."""

    value_space: str
    key_dtype: str
    base_model_class: str | None = None
    base_model_fingerprint: Mapping[str, Any] | None = None  # see knnmoe_hf.fingerprint
    tokenizer_fingerprint: str | None = None
    reference_set_hash: str | None = None  # SHA-256 of the examples' tokens and labels


@dataclass(frozen=True)
class LayerSizes:
    """One layer's entry: `rows` x `hidden_size` keys, `rows` x `num_experts` values, the distance scale."""

    layer: int
    hidden_size: int
    num_experts: int
    scale: float


def seal(content: dict) -> str:
    """SHA-256 of the `memory` entry without its own `sha256`, in canonical JSON."""
    unsealed = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The `memory` entry of `config.json`."""

    origin: Origin
    layers: list[LayerSizes]
    rows: int
    provenance: tuple[int, int] | None  # examples and tokens kept; None if provenance was left out
    tokenizer_files: list[str]  # none if no tokenizer was saved
    files: list[dict]
    library_versions: dict[str, str]

    def to_json(self) -> dict:
        """As plain JSON values, sealed with their own SHA-256."""
        content = {"format_version": FORMAT_VERSION} | asdict(self)
        return content | {"sha256": seal(content)}

    @classmethod
    def from_json(cls, content: Any, path: Path) -> "Manifest":
        """
        Raises:
            MemoryFileError: naming `path` and what is missing or wrong.
        """
        try:
            if type(content["format_version"]) is not int or content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version {shown(content['format_version'])} is not {FORMAT_VERSION}")
            names = {field.name for field in fields(cls)}
            parts = {name: content[name] for name in names}
            parts["origin"] = Origin(**parts["origin"])
            parts["layers"] = [LayerSizes(**entry) for entry in parts["layers"]]
            manifest = cls(**parts)
            manifest._check()
            if content["sha256"] != seal(content):
                raise ValueError("its sha256 is not that of its contents, so it was edited")
            return manifest
        except (KeyError, TypeError, ValueError) as error:
            raise MemoryFileError(
                f"{path} is not usable: its entry `memory` is no description of a routing memory that this version "
                f"reads ({type(error).__name__}: {shown(str(error))}); save or download the memory again."
            ) from error

    def _check(self) -> None:
        origin, kept = self.origin, self.provenance
        sizes = [self.rows] + [n for e in self.layers for n in (e.layer, e.hidden_size, e.num_experts)]
        texts = (origin.base_model_class, origin.tokenizer_fingerprint, origin.reference_set_hash)
        print_ = origin.base_model_fingerprint
        versions = self.library_versions
        sound = {
            "value_space": origin.value_space in VALUE_SPACES,
            "key_dtype": origin.key_dtype in KEY_DTYPES,
            "origin": all(text is None or isinstance(text, str) for text in texts),
            "base_model_fingerprint": is_fingerprint(print_),
            "rows or layers": bool(self.layers) and all(map(_is_count, sizes)),
            "layers": len({e.layer for e in self.layers}) == len(self.layers),
            "scale": all(type(e.scale) is float and 0 < e.scale < float("inf") for e in self.layers),
            "provenance": kept is None or type(kept) is list and len(kept) == 2 and all(map(_is_count, kept)),
            "tokenizer_files": _are_texts(self.tokenizer_files) and all(map(_is_inside, self.tokenizer_files)),
            "files": isinstance(self.files, list),
            "library_versions": isinstance(versions, dict) and _are_texts(list(versions.values())),
        }
        for name, right in sound.items():
            if not right:
                raise ValueError(f"{name} is not what it should be")

    def specification(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor that the shards must hold, by name."""
        key_dtype = getattr(torch, self.origin.key_dtype)
        wanted = {}
        for entry in self.layers:
            wanted[f"layers.{entry.layer}.keys"] = ((self.rows, entry.hidden_size), key_dtype)
            wanted[f"layers.{entry.layer}.values"] = ((self.rows, entry.num_experts), torch.float32)
        if self.provenance is not None:
            wanted |= Provenance.specification(self.rows, *self.provenance)
        return wanted
