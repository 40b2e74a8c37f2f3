"""The running sums beside a cache before a forward, as its tokens find them, and after it, as the next ones will."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from knnmoe_hf.lookup.sequence import Links, SumKey, Tokens
from knnmoe_hf.models.cache_changes import Marks, Snapshot
from knnmoe_hf.models.cache_methods import follow_replaced_methods
from knnmoe_hf.models.owners import StateOwner
from knnmoe_hf.models.predecessors import CallLayout, Sources
from knnmoe_hf.models.sums import (
    APPENDED,
    ATTRIBUTE,
    EXPORTED,
    FOREIGN,
    NOT_KEPT,
    OFF,
    Sums,
    Table,
    adopted,
    refusal,
    sums_beside,
)


class CacheState:
    """
    The `SequenceState` of the sequences in a cache before a forward.

    Args:
        cache: the cache.
        owner: of the overrides in force.
        layout: of the forward.
        virtual: number of slots at the front that hold no text (a trained prefix) of a cache with nothing beside it.
    """

    def __init__(self, cache: Cache, owner: StateOwner, layout: CallLayout, virtual: int = 0):
        self.layout, self.owner = layout, owner
        kept = sums_beside(cache)
        found = kept.traced(cache) if isinstance(kept, Sums) else kept
        if (found is None or found == APPENDED) and not virtual and isinstance(layout.past, int) and layout.past:
            found = adopted(cache, owner) or found
        self.sums, self.reason = (found, "") if isinstance(found, Sums) else (None, found or FOREIGN)
        if self.sums is not None:
            self._check_owner()
        self.virtual = virtual
        self.is_empty = isinstance(layout.past, int) and layout.past == self.virtual
        self.sources: Sources = Sources(Links())  # set when it is first needed, before `carried`
        self._found: dict[SumKey, Tensor] = {}

    def _check_owner(self) -> None:
        owner = self.sums.owner
        if owner is not None and owner != self.owner:
            self.sums, self.reason = None, owner.reason_against(self.owner)
        elif self.sums.count is not None and not self._has_same_count(self.sums.count):
            self.sums, self.reason = None, FOREIGN if owner is None else APPENDED

    def _has_same_count(self, count: Tensor) -> bool:
        """
        Whether the sums beside a static cache are over as many tokens as it has.

        Not checked while compiling, where tensors have no value, nor in a decoding step on an accelerator, where it
        would be a device synchronisation per step. It may be left out there because `keep_sums` notes every forward
        without running means.
        """
        if torch.compiler.is_compiling() or (self.layout.length == 1 and count.device.type != "cpu"):
            return True
        return int(self.layout.past) == int(count)

    def carried(self, key: SumKey) -> Tensor | None:
        if not self._continues(key):
            return None
        if not self._found:
            self._found = dict(zip(self.sums.sum_keys, self._entering().unbind()))
        return self._found[key]

    def _continues(self, key: SumKey) -> bool:
        """Whether earlier tokens of the sequences are in the cache; raises if their sum is unknown."""
        if self.is_empty:
            return False
        exporting = torch.compiler.is_exporting()
        if self.sums is not None and key in self.sums.sum_keys and not exporting:
            return True
        reason = EXPORTED if exporting else self.reason or _missing(key)
        past = self.layout.past
        if isinstance(past, Tensor):
            self.layout.past, self.is_empty = _checked_empty(past, refusal(reason)), True
            return False
        raise ValueError(refusal(reason))

    def _entering(self) -> Tensor:
        """(n, B, 1) or (n, B, S): the sums of the slots that the call's tokens go on from, 0 where from none."""
        values, past, slots = self.sums.values, self.layout.past, self.sources.slots
        if slots is None:
            slots = past - 1 if self.sources.entry is None else self.sources.entry[:, None]
            if isinstance(slots, int):
                slots %= values.shape[2]  # of a static cache's ring
                return self._without_gaps(values[:, :, slots : slots + 1])
        slots = slots.to(values.device)
        past = past.to(values.device) if isinstance(past, Tensor) else past
        cached = (slots >= 0) & (slots < past)
        index = torch.where(cached, slots, 0) % values.shape[2]
        index = index.expand(values.shape[1], index.shape[-1] if index.dim() else 1)
        found = values.gather(2, index.expand(values.shape[0], -1, -1))
        return self._without_gaps(found.masked_fill(~cached, 0.0))

    def _without_gaps(self, found: Tensor) -> Tensor:
        if self.sums.has_gaps and not torch.compiler.is_compiling() and bool(found.isnan().any()):
            raise ValueError(refusal(NOT_KEPT))
        return found


def _missing(key: SumKey) -> str:
    layer = "" if key[0] is None else f" in layer {key[0]}"
    return f"the override in force computed no such running mean{layer} for some of them"


def keep_sums(cache: Cache, tokens: Tokens | None, owner: StateOwner | None) -> None:
    """
    Stores the running sums of a forward beside its cache, or that it had none.

    Args:
        cache: the cache after the forward.
        tokens: the tokens of the forward; None if no overrides were in force.
        owner: of those overrides.
    """
    if tokens is None or not tokens.running_sums:
        reason = OFF if owner is None else f"tokens were added to it with {owner} in force, which has no running means"
        setattr(cache, ATTRIBUTE, reason)
        return
    state, sum_keys, new = tokens.state, tuple(tokens.running_sums), tokens.stacked()
    known = None if state is None or state.is_empty else state.sums
    before = None if known is None else _selected(known, sum_keys)
    if cache.is_compileable:
        return _keep_static(cache, state, owner, sum_keys, new)
    compiling = torch.compiler.is_compiling()
    if before is None:
        virtual = 0 if state is None else state.virtual
        table, length = Table(torch.nn.functional.pad(new, (virtual, 0)) if virtual else new), virtual
        gaps = False
    else:
        table, length, gaps = before.appended(known.length, new), known.length, known.has_gaps
    snapshot = None if compiling else Snapshot.of(cache)
    if isinstance(snapshot, Marks):
        follow_replaced_methods(cache)
    kept = Sums(owner, sum_keys, table, length + new.shape[2], None, snapshot, gaps)
    setattr(cache, ATTRIBUTE, kept)


def _selected(known: Sums, sum_keys: tuple[SumKey, ...]) -> Table | None:
    """The table of known sums with only the sums of these names; None if there are others among them."""
    if known.sum_keys == sum_keys:
        return known.table
    if not set(sum_keys) <= set(known.sum_keys):
        return None
    return Table(known.table.values[[known.sum_keys.index(key) for key in sum_keys]])


def _keep_static(cache: Cache, state: CacheState, owner: StateOwner, sum_keys: tuple, new: Tensor) -> None:
    known, past, size = state.sums, state.layout.past, new.shape[2]
    selected = None if known is None else _selected(known, sum_keys)
    if selected is None:
        count = _static(torch.zeros((), dtype=torch.int64, device=new.device))
        table = Table(_static(new.new_zeros(*new.shape[:2], _slots_of(cache))))
        known = Sums(owner, sum_keys, table, None, count)
        setattr(cache, ATTRIBUTE, known)
    elif selected is not known.table:
        known = Sums(owner, sum_keys, selected, None, known.count)
        setattr(cache, ATTRIBUTE, known)
    table = known.table.values
    past = past.to(new.device) if isinstance(past, Tensor) else past
    slots, capacity = torch.arange(size, device=new.device) + past, table.shape[2]
    if size > capacity:  # of a sliding window in every layer
        slots, new = slots[-capacity:], new[:, :, -capacity:]
    table.index_copy_(2, slots % capacity, new)
    known.count.fill_(past + size) if isinstance(past, int) else known.count.copy_(past + size)
    known.owner = owner
    known.snapshot = None if torch.compiler.is_compiling() else Snapshot.of(cache)


def _slots_of(cache: Cache) -> int:
    return max(layer.get_max_length() for layer in cache.layers if isinstance(layer, CacheLayerMixin))


def _static(table: Tensor) -> Tensor:
    """Marks a tensor as one whose address never changes, as static caches do with theirs (for CUDA graphs)."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(table)
    return table


@torch.library.custom_op("knnmoe_hf::checked_empty", mutates_args=())
def _checked_empty(past: Tensor, refusal: str) -> Tensor:
    """
    The length of a static cache, after checking that it is 0.

    A custom operator, because torch.compile cannot trace an error that depends on a tensor's value.
    """
    if int(past) != 0:
        raise ValueError(refusal)
    return torch.zeros_like(past)


@_checked_empty.register_fake
def _(past: Tensor, refusal: str) -> Tensor:
    return torch.empty_like(past)
