"""Running sums of a confidence, stored in a transformers `Cache` as one more layer.

The sums are kept only while every forward on the cache computes running means with the same overrides. A cache that is
not empty and has no such sums is refused, because the sums over its tokens are unknown.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer

from knnmoe_hf.lookup.sequence import SumKey, Tokens

UNKNOWN = (
    "this cache was filled without the memory in force, so the running means that its confidence needs are missing: "
    "generate again without past_key_values, or use confidence='rbf'."
)


class StateOwner:
    """Identifies the overrides that running sums belong to; copies of a model or a cache share the same one."""

    def __deepcopy__(self, memo: dict) -> "StateOwner":
        return self


class SumsLayer(DummyLayer):
    """
    A layer of a cache that has running sums in place of keys and values.

    Attributes:
        owner: identity of the overrides that the sums belong to; None after `reset`.
        sum_keys: names of the n sums.
        table: (n, B, capacity) float32, of which the first `length` columns are filled: the sums after each token, so
            that the cache can be cropped. A static cache, which cannot be cropped, has one column, the sums after the
            last token, and updates it in place.
        length: number of filled columns.
        count: () int64, number of tokens summed up in a static cache; None in other caches.
    """

    def __init__(self, owner: StateOwner, count: Tensor | None = None):
        super().__init__()
        self.owner: StateOwner | None = owner
        self.sum_keys: tuple[SumKey, ...] = ()
        self.table: Tensor | None = None
        self.length = 0
        self.count = count

    def __copy__(self) -> "SumsLayer":
        """A copy with its own tensors: these are updated in place, unlike the keys and values of other layers."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin.table = self.table.clone() if self.table is not None else None
        twin.count = self.count.clone() if self.count is not None else None
        return twin

    @classmethod
    def of(cls, cache: Cache) -> "SumsLayer | None":
        """The layer of this class in a cache; None if there is none."""
        for layer in cache.layers:
            if isinstance(layer, cls):
                return layer
        return None

    def last(self) -> Tensor:
        """The sums (n, B, 1) after the last token."""
        return self.table[:, :, self.length - 1 : self.length]

    def append(self, sum_keys: tuple[SumKey, ...], new: Tensor) -> None:
        """Adds the sums (n, B, S) after each of S more tokens."""
        self._keep_only(sum_keys)
        before, self.length = self.length, self.length + new.shape[2]
        # torch.compile gains nothing from spare capacity
        if before == 0 or torch.compiler.is_compiling():
            self.table = new if before == 0 else torch.cat([self.table[:, :, :before], new], dim=2)
            return
        if self.length > self.table.shape[2] or self.table.is_inference() != new.is_inference():
            grown = new.new_empty(*new.shape[:2], max(self.length, 2 * before))
            grown[:, :, :before] = self.table[:, :, :before]
            self.table = grown
        self.table[:, :, before : self.length] = new

    def keep_last(self, sum_keys: tuple[SumKey, ...], new: Tensor) -> None:
        """Of the sums (n, B, S) after each of S more tokens, keeps the last ones; `count` grows by S."""
        self._keep_only(sum_keys)
        if self.length == 0:
            self.length, self.table = 1, _static(torch.zeros_like(new[:, :, -1:]))
        self.table.copy_(new[:, :, -1:])
        self.count.add_(new.shape[2])

    def _keep_only(self, sum_keys: tuple[SumKey, ...]) -> None:
        """Drops the sums that the new tokens were not added to: they cannot be continued."""
        if self.length and self.sum_keys != sum_keys:
            if set(sum_keys) <= set(self.sum_keys):
                self.table = self.table[[self.sum_keys.index(key) for key in sum_keys]]
            else:
                self.length = 0
        self.sum_keys = sum_keys

    def reset(self) -> None:
        self.owner = None
        if self.count is None:
            self.length = 0
        else:  # set to zero and not replaced, because compiled graphs hold the tensors' addresses
            for table in (self.count, self.table):
                table.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        self.length = max(self.length - abs(tokens_to_remove), 0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_table(lambda table: table.repeat_interleave(repeats, dim=1))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_table(lambda table: table[:, indices.to(table.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def _change_table(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.table is not None:
            self.table = change(self.table)


@torch.library.custom_op("knnmoe_hf::checked_empty", mutates_args=())
def _checked_empty(past: Tensor) -> Tensor:
    """
    The length of a static cache, after checking that it is 0.

    A custom operator, because torch.compile cannot trace an error that depends on a tensor's value.
    """
    if int(past) != 0:
        raise ValueError(UNKNOWN)
    return torch.zeros_like(past)


@_checked_empty.register_fake
def _(past: Tensor) -> Tensor:
    return torch.empty_like(past)


class CacheState:
    """
    The `SequenceState` of the sequences in a cache before a forward.

    Args:
        cache: the cache.
        owner: of the overrides in force.
        length: S, new tokens of each row.
    """

    def __init__(self, cache: Cache, owner: StateOwner, length: int):
        past = cache.get_seq_length()
        self.past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts in place
        layer = SumsLayer.of(cache)
        usable = layer is not None and (layer.owner is None or layer.owner is owner)
        self.layer = layer if usable and self._has_same_count(layer.count, length) else None
        self.is_empty = isinstance(past, int) and past == 0
        self._tables: dict[SumKey, Tensor] = {}

    def _has_same_count(self, count: Tensor | None, length: int) -> bool:
        """
        Whether the sums in a static cache are over as many tokens as the cache has; True for other caches.

        Not checked while compiling, where tensors have no value, nor in a decoding step on an accelerator, where it
        would be a device synchronisation per step. It may be left out there because `keep_sums` removes the sums in
        every forward without running means.
        """
        if count is None or torch.compiler.is_compiling() or (length == 1 and count.device.type != "cpu"):
            return True
        return int(self.past) == int(count)

    def carried(self, key: SumKey) -> Tensor | None:
        if not self._continues(key):
            return None
        if not self._tables:
            self._tables = dict(zip(self.layer.sum_keys, self.layer.last().unbind()))
        return self._tables[key]

    def _continues(self, key: SumKey) -> bool:
        """Whether earlier tokens of the sequences are in the cache; raises if their sum is unknown."""
        if self.is_empty:
            return False
        known = self.layer is not None and self.layer.length > 0 and key in self.layer.sum_keys
        if not known and isinstance(self.past, Tensor):
            self.past, self.is_empty = _checked_empty(self.past), True
            return False
        if not known or (self.layer.count is None and self.layer.length != self.past):
            raise ValueError(UNKNOWN)
        return True


def keep_sums(cache: Cache, tokens: Tokens | None, owner: StateOwner | None) -> None:
    """
    Stores the running sums of a forward in its cache, and removes sums that this forward did not continue.

    Args:
        cache: the cache after the forward.
        tokens: the tokens of the forward; None if no overrides were in force.
        owner: of those overrides.
    """
    layer = SumsLayer.of(cache)
    state = None if tokens is None else tokens.state  # also None if the forward created the cache
    known = None if state is None else state.layer
    if layer is not None and (layer is not known or not tokens.running_sums):
        cache.layers[:] = [other for other in cache.layers if other is not layer]
    if tokens is None or not tokens.running_sums:
        return
    static, sums = cache.is_compileable, tokens.stacked()
    if known is None:
        known = SumsLayer(owner, _fresh_count(tokens, sums.device) if static else None)
        cache.layers.append(known)
    known.owner = owner
    if static:
        return known.keep_last(tuple(tokens.running_sums), sums)
    if state is None or state.is_empty:
        known.length = 0
    known.append(tuple(tokens.running_sums), sums)


def _fresh_count(tokens: Tokens, device: torch.device) -> Tensor:
    if tokens.state is not None and isinstance(tokens.state.past, Tensor):
        return _static(tokens.state.past)  # `_checked_empty` has made sure that it is 0
    return _static(torch.zeros((), dtype=torch.int64, device=device))


def _static(table: Tensor) -> Tensor:
    """Marks a tensor as one whose address never changes, as static caches do with theirs (for CUDA graphs)."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(table)
    return table
