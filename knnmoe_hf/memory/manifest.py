"""What `config.json` says of a saved memory, checked before a tensor is opened."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from knnmoe_hf.config import KEY_DTYPES, VALUE_SPACES
from knnmoe_hf.errors import MemoryFileError, shown
from knnmoe_hf.memory.provenance import Provenance

FORMAT_VERSION = 1


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


@dataclass(frozen=True)
class Manifest:
    """The `memory` entry of `config.json`."""

    origin: Origin
    layers: list[LayerSizes]
    rows: int
    provenance: tuple[int, int] | None  # examples and tokens kept; None if provenance was left out
    files: list[dict]
    library_versions: dict[str, str]

    def to_json(self) -> dict:
        """As plain JSON values."""
        return {"format_version": FORMAT_VERSION} | asdict(self)

    @classmethod
    def from_json(cls, content: Any, path: Path) -> "Manifest":
        """
        Raises:
            MemoryFileError: naming `path` and what is missing or wrong.
        """
        try:
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version {shown(content['format_version'])} is not {FORMAT_VERSION}")
            names = {field.name for field in fields(cls)}
            parts = {name: content[name] for name in names}
            parts["origin"] = Origin(**parts["origin"])
            parts["layers"] = [LayerSizes(**entry) for entry in parts["layers"]]
            manifest = cls(**parts)
            manifest._check()
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MemoryFileError(
                f"{path} is not usable: its entry `memory` is no description of a routing memory that this version "
                f"reads ({type(error).__name__}: {shown(str(error))}); save or download the memory again."
            ) from error

    def _check(self) -> None:
        if self.origin.value_space not in VALUE_SPACES or self.origin.key_dtype not in KEY_DTYPES:
            raise ValueError(f"value_space or key_dtype in {shown(self.origin)}")
        counts = [self.rows, *(self.provenance or ()), *(e.hidden_size for e in self.layers)]
        counts += [n for e in self.layers for n in (e.num_experts, e.layer)]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("a size is not a count")
        if not all(isinstance(e.scale, float) and 0 < e.scale < float("inf") for e in self.layers):
            raise ValueError("a scale is not a positive number")
        if not isinstance(self.files, list) or not isinstance(self.library_versions, dict):
            raise ValueError("files or library_versions")

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
