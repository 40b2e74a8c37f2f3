"""Whose running sums a cache holds: recognised by content, also in another process."""

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch

from knnmoe_hf.lookup.confidence import InContext
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.torch_lookup import TorchLookup
from knnmoe_hf.search.options import SearchOptions

_SAMPLE = 16  # rows at the beginning, at the end and twice in between of a layer, whose bytes are compared
_HOW_TO_SEARCH = frozenset(SearchOptions.__dataclass_fields__) - {"num_neighbors"}


@dataclass
class StateOwner:
    """
    Identifies the overrides that running sums belong to. Equal ones may go on from each other's sums.

    Attributes:
        digest: of what they compute; by default one that nothing else has, but for copies and pickles.
        name: under which they were attached, for error messages.
        files: content hashes of a saved memory's layers; empty for one in memory, which may be saved later.
    """

    digest: str = field(default_factory=lambda: uuid.uuid4().hex)
    name: str | None = None
    files: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StateOwner) or self.digest != other.digest:
            return False
        return self.files == other.files or not (self.files and other.files)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return "other overrides" if self.name is None else repr(self.name)

    def __deepcopy__(self, memo: dict) -> "StateOwner":
        return self

    def reason_against(self, now: "StateOwner") -> str:
        """Why `now` cannot go on from sums of this one, to complete a refusal."""
        if self.name is not None and self.name == now.name:
            return f"it was filled with another memory, or other options, in force than is now attached as {self}"
        return f"it was filled with {self} in force, not with {now}"


def owner_of(lookups: Mapping[int, TorchLookup], options: RetrievalOptions) -> StateOwner:
    """The owner for a memory: the same for the same rows, confidences and options, whatever the search engine."""
    digest = hashlib.sha256()
    digest.update(repr([(k, v) for k, v in asdict(options).items() if k not in _HOW_TO_SEARCH]).encode())
    for layer, lookup in sorted(lookups.items()):
        rows, confidence = lookup.rows, lookup.confidence
        stats = confidence.stats if isinstance(confidence, InContext) else None
        shapes = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in rows.tensors().items()]
        digest.update(repr([layer, rows.scale, stats, confidence.scale, confidence.gamma, shapes]).encode())
        for _, tensor in sorted(rows.tensors().items()):
            last = max(len(tensor) - _SAMPLE, 0)
            for start in sorted({0, last // 3, 2 * last // 3, last}):
                some = tensor.detach()[start : start + _SAMPLE].contiguous().cpu()
                digest.update(some.view(torch.uint8).numpy().tobytes() if some.numel() else b"")
    files = [lookup.rows.source for _, lookup in sorted(lookups.items())]
    return StateOwner(digest.hexdigest(), files=() if None in files else tuple(files))
