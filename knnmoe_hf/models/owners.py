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

_SAMPLE = 64  # rows of a layer that were not saved whose bytes are compared
_HOW_TO_SEARCH = frozenset(SearchOptions.__dataclass_fields__) - {"num_neighbors"}


@dataclass
class StateOwner:
    """
    Identifies the overrides that running sums belong to. Equal ones may go on from each other's sums.

    Attributes:
        digest: of what they compute; by default one that nothing else has, but for copies and pickles.
        name: under which they were attached, for error messages.
    """

    digest: str = field(default_factory=lambda: uuid.uuid4().hex)
    name: str | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StateOwner) and self.digest == other.digest

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
        if rows.source is not None:
            digest.update(rows.source.encode())
            continue
        for _, tensor in sorted(rows.tensors().items()):
            index = torch.linspace(0, max(len(tensor) - 1, 0), min(_SAMPLE, len(tensor))).long()
            some = tensor.detach()[index.to(tensor.device)].contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().tobytes() if some.numel() else b"")
    return StateOwner(digest.hexdigest())
