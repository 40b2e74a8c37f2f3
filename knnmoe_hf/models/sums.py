"""Running sums of a confidence, kept beside the layers of a transformers `Cache`.

They are an attribute of the cache object, so that its layers and its length are those that it has without a memory.
What is known of a cache that has no sums for all of its tokens is stated in the refusal.
"""

import threading
import weakref

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from knnmoe_hf.lookup.sequence import SumKey
from knnmoe_hf.models.cache_changes import Marks, Snapshot
from knnmoe_hf.models.owners import StateOwner
from knnmoe_hf.models.predecessors import cached_length

ATTRIBUTE = "knnmoe_sums"
OFF = "tokens were added to it without the memory in force"
FOREIGN = "other code filled it, or made it from the tensors of another cache"
APPENDED = (
    "a model without this memory, a call that failed, or other code added tokens to it or changed its tensors beyond "
    "recognition"
)
EXPORTED = "a program of torch.export keeps no running means from one call to the next"
NOT_KEPT = "what other code left of it does not tell which token each of these goes on from"


def refusal(reason: str) -> str:
    """The sentence that refuses to go on from a cache."""
    return (
        f"the running means that the confidence needs are not known for the tokens in this cache, because {reason}: "
        "generate again without past_key_values, or use confidence='rbf'."
    )


class Table:
    """
    Sums (n, B, capacity) float32 of the tokens in each row's slots, some of which are spare.

    Attributes:
        filled: how many columns are in use by any `Sums`: later ones are overwritten only by the one that ends there.
    """

    def __init__(self, values: Tensor):
        self.values, self.filled = values, values.shape[2]

    def appended(self, length: int, new: Tensor) -> "Table":
        """The first `length` columns and the new ones (n, B, S), in place if no other `Sums` uses the columns."""
        end = length + new.shape[2]
        if torch.compiler.is_compiling():  # gains nothing from spare capacity
            return Table(torch.cat([self.values[:, :, :length], new], dim=2))
        if self.filled != length or end > self.values.shape[2] or self.values.is_inference() != new.is_inference():
            grown = Table(new.new_empty(*new.shape[:2], max(end, 2 * length)))
            grown.values[:, :, :length] = self.values[:, :, :length]
            return grown._write(length, new)
        return self._write(length, new)

    def _write(self, length: int, new: Tensor) -> "Table":
        self.filled = length + new.shape[2]
        self.values[:, :, length : self.filled] = new
        return self


_living: weakref.WeakSet["Sums"] = weakref.WeakSet()
_lock = threading.Lock()  # held while `_living` changes, or is walked


class Sums:
    """
    The running sums of the tokens in a cache. Never changed, so that copies of a cache may share it, but for a static
    cache, whose sums are updated in place like its keys and values.

    Attributes:
        owner: of the overrides that the sums belong to; None in a static cache that was reset.
        sum_keys: names of the n sums.
        table: their values.
        length: number of slots; None for a static cache, whose table is a ring of as many slots as it has.
        count: () int64, number of slots filled of a static cache; None for others.
        snapshot: what the cache's tensors were, to notice a change of them; None if not known.
        has_gaps: whether the sums of some slots are NaN because they are not known.
    """

    def __init__(
        self,
        owner: StateOwner | None,
        sum_keys: tuple[SumKey, ...],
        table: Table,
        length: int | None,
        count: Tensor | None = None,
        snapshot: Snapshot | Marks | None = None,
        has_gaps: bool = False,
    ):
        self.owner, self.sum_keys, self.table = owner, sum_keys, table
        self.length, self.count, self.snapshot, self.has_gaps = length, count, snapshot, has_gaps
        self._note()

    def _note(self) -> None:
        if self.snapshot is not None:
            with _lock:
                _living.add(self)

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._note()

    @property
    def values(self) -> Tensor:
        """(n, B, slots), without spare columns."""
        return self.table.values if self.length is None else self.table.values[:, :, : self.length]

    def changed(self, values: Tensor, cache: Cache, has_gaps: bool | None = None) -> "Sums":
        """Other values for the tokens that the cache holds now."""
        length = None if self.length is None else values.shape[2]
        gaps = self.has_gaps if has_gaps is None else has_gaps
        return Sums(self.owner, self.sum_keys, Table(values), length, self.count, Snapshot.of(cache), gaps)

    def traced(self, cache: Cache) -> "Sums | str":
        """The sums of what the cache holds now, which other code may have changed; the reason if they are unknown."""
        past = cached_length(cache)
        fits = self.length is None or past == self.length
        if torch.compiler.is_compiling() or self.owner is None or self.snapshot is None:
            return self if fits else APPENDED
        if self.snapshot.is_current(cache):
            return self if fits else APPENDED
        found = None if self.length is None else self.snapshot.trace(cache, self.length, past)
        if found is None:
            return APPENDED
        return self.changed(found.take(self.values), cache, self.has_gaps or found.gaps)


def adopted(cache: Cache, owner: StateOwner) -> Sums | None:
    """The sums of what other living caches hold, if this one was made from their tensors."""
    if torch.compiler.is_compiling() or cache.is_compileable or not hasattr(cache, "layers"):
        return None
    with _lock:
        living = [sums for sums in _living if sums.owner == owner and sums.length is not None]
    for sums in living:
        if sums.snapshot.holds_the_same(cache, sums.length):
            return sums.changed(sums.values, cache)
    return _gathered(cache, living)


def _gathered(cache: Cache, living: list[Sums]) -> Sums | None:
    """The sums of a cache each of whose rows is a row of another one, or the beginning of one; None if some is not."""
    first, values, known, gaps = None, None, None, False
    for sums in living:
        rows = sums.snapshot.beginnings_in(cache, sums.length)
        if rows is None or (first is not None and sums.sum_keys != first.sum_keys):
            continue
        rows = rows.to(sums.values.device if first is None else values.device)
        part = sums.values.to(rows.device)[:, rows.clamp_min(0), : cached_length(cache)]
        if first is None:
            first, values, known = sums, part, rows >= 0
        else:
            values, known = torch.where(known[:, None], values, part), known | (rows >= 0)
        gaps = gaps or sums.has_gaps
        if known.all():
            return first.changed(values, cache, gaps)
    return None


def sums_beside(cache: Cache) -> Sums | str | None:
    """What is kept beside a cache: sums, or why there are none; None if nothing is, as in a new one."""
    return getattr(cache, ATTRIBUTE, None)
