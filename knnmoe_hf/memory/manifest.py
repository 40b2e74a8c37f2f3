"""What `config.json` says of a saved memory, checked before a tensor is opened."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import MemoryFileError, shown
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.lookup.layer import specification
from knnmoe_hf.lookup.options import FIXED_AT_BUILD
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.models.fingerprint import is_fingerprint

FORMAT_VERSION = 2


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and name not in ("", "config.json")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _are_levels(stats: CalibrationStats) -> bool:
    numbers = list(vars(stats).values())
    finite = all(type(number) is float and abs(number) < float("inf") for number in numbers)
    gap, drift = stats.reference_mean - stats.background_mean, stats.reference_drift - stats.background_drift
    apart = 0 <= stats.min_warmup < 1 and min(gap + drift * stats.min_warmup, gap + drift) > 0
    positive = (stats.weight, stats.width, stats.scale, stats.half_life, stats.num_neighbors)
    return finite and apart and stats.gamma >= 0 and min(positive) > 0


@dataclass(frozen=True)
class Origin:
    """What a memory was built from and as; never changes after the build."""

    options: Mapping[str, Any]  # those of `knnmoe_hf.lookup.options.FIXED_AT_BUILD`
    base_model_class: str | None = None
    base_model_fingerprint: Mapping[str, Any] | None = None  # see knnmoe_hf.fingerprint
    tokenizer_fingerprint: str | None = None
    reference_set_hash: str | None = None  # SHA-256 of the examples' tokens and labels


@dataclass(frozen=True)
class LayerSizes:
    """One layer's entry: sizes of the model's layer and of the sample of distances, the distance scale, stats."""

    layer: int
    hidden_size: int
    num_experts: int
    sample: tuple[int, int]
    scale: float
    stats: CalibrationStats | None = None

    @classmethod
    def of_json(cls, entry: dict) -> "LayerSizes":
        """From plain JSON values."""
        stats = entry["stats"]
        if stats is not None and set(stats) != {field.name for field in fields(CalibrationStats)}:
            raise ValueError(f"stats {shown(stats)} are not the stats of a layer")
        parts = {"sample": tuple(entry["sample"]), "stats": CalibrationStats(**stats) if stats is not None else None}
        return cls(**entry | parts)


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
            parts["layers"] = [LayerSizes.of_json(entry) for entry in parts["layers"]]
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
            "options": set(origin.options) == set(FIXED_AT_BUILD) and KNNMoEConfig(**origin.options) is not None,
            "origin": all(text is None or isinstance(text, str) for text in texts),
            "base_model_fingerprint": is_fingerprint(print_),
            "rows or layers": bool(self.layers) and all(map(_is_count, sizes)),
            "layers": len({e.layer for e in self.layers}) == len(self.layers),
            "scale": all(type(e.scale) is float and 0 < e.scale < float("inf") for e in self.layers),
            "sample": all(len(e.sample) == 2 and all(map(_is_count, e.sample)) for e in self.layers),
            "stats": all(e.stats is None or _are_levels(e.stats) for e in self.layers),
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
        wanted = {}
        for entry in self.layers:
            sizes = (self.rows, entry.hidden_size, entry.num_experts, entry.sample)
            for name, kind in specification(*sizes, self.origin.options).items():
                wanted[f"layers.{entry.layer}.{name}"] = kind
        if self.provenance is not None:
            wanted |= Provenance.specification(self.rows, *self.provenance)
        return wanted
