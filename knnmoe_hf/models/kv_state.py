"""Running sums that live in a `Cache`, beside the keys and values of the tokens that they sum up.

A cache holds them only while every forward on it asks for running means by the same routes. Another cache that is not
empty is refused: what came before is not known.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer

from knnmoe_hf.lookup.sequence import SumKey, Tokens

UNKNOWN = (
    "this cache was filled without the memory in force, so its confidence does not know what came before: generate "
    "anew without past_key_values, or use confidence='rbf'."
)


class StateOwner:
    """Identity of the routes that sums belong to; copies of a model or a cache share it."""

    def __deepcopy__(self, memo: dict) -> "StateOwner":
        return self


class SumsLayer(DummyLayer):
    """
    One more layer of a cache, without keys and values.

    Attributes:
        owner: whose sums these are; None after `reset`.
        series: the n sums that are kept.
        table: (n, B, capacity) float32. After each of the cache's first `length` tokens, so that it may be cropped;
            or, in a static cache, which cannot be, after the last alone, written in place.
        count: () int64, tokens that a static cache was seen to take; None in others.
    """

    def __init__(self, owner: StateOwner, count: Tensor | None = None):
        super().__init__()
        self.owner: StateOwner | None = owner
        self.series: tuple[SumKey, ...] = ()
        self.table: Tensor | None = None
        self.length = 0
        self.count = count

    def __copy__(self) -> "SumsLayer":
        """With a table of its own: this one is written into, as no other layer's tensors are."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin.table = self.table.clone() if self.table is not None else None
        twin.count = self.count.clone() if self.count is not None else None
        return twin

    @classmethod
    def of(cls, cache: Cache) -> "SumsLayer | None":
        """The one that a cache holds, if any."""
        for layer in cache.layers:
            if isinstance(layer, cls):
                return layer
        return None

    def last(self) -> Tensor:
        """The sums (n, B, 1) after the last token."""
        return self.table[:, :, self.length - 1 : self.length]

    def append(self, series: tuple[SumKey, ...], new: Tensor) -> None:
        """Takes the sums (n, B, S) after each of S more tokens."""
        self._keep_only(series)
        before, self.length = self.length, self.length + new.shape[2]
        # compilers have no use for room that is not filled, and transforms of `torch.func` forbid to fill it
        if before == 0 or torch.compiler.is_compiling():
            self.table = new if before == 0 else torch.cat([self.table[:, :, :before], new], dim=2)
            return
        if self.length > self.table.shape[2] or self.table.is_inference() != new.is_inference():
            room = new.new_empty(*new.shape[:2], max(self.length, 2 * before))
            room[:, :, :before] = self.table[:, :, :before]
            self.table = room
        self.table[:, :, before : self.length] = new

    def keep_last(self, series: tuple[SumKey, ...], new: Tensor) -> None:
        """Takes the sums after the last of S more tokens, and counts them."""
        self._keep_only(series)
        if self.length == 0:
            self.length, self.table = 1, _static(torch.zeros_like(new[:, :, -1:]))
        self.table.copy_(new[:, :, -1:])
        self.count.add_(new.shape[2])

    def _keep_only(self, series: tuple[SumKey, ...]) -> None:
        """Without the series that more tokens left out: what comes after them is not known."""
        if self.length and self.series != series:
            if set(series) <= set(self.series):
                self.table = self.table[[self.series.index(one) for one in series]]
            else:
                self.length = 0
        self.series = series

    def reset(self) -> None:
        self.owner = None
        if self.count is None:
            self.length = 0
        else:  # zeroed and not dropped, as compiled graphs hold their addresses
            for table in (self.count, self.table):
                table.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        self.length = max(self.length - abs(tokens_to_remove), 0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_row(lambda table: table.repeat_interleave(repeats, dim=1))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_row(lambda table: table[:, indices.to(table.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.table is not None:
            self.table = change(self.table)


@torch.library.custom_op("knnmoe_hf::checked_empty", mutates_args=())
def _checked_empty(past: Tensor) -> Tensor:
    """The length, 0, of a static cache that must be empty: one operator, since a compiler cannot raise on a value."""
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
        owner: of the routes in force.
        length: new tokens of each row.
    """

    def __init__(self, cache: Cache, owner: StateOwner, length: int):
        past = cache.get_seq_length()
        self.past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts in place
        layer = SumsLayer.of(cache)
        mine = layer is not None and (layer.owner is None or layer.owner is owner)
        self.layer = layer if mine and self._counted_alike(layer.count, length) else None
        self.is_empty = isinstance(past, int) and past == 0
        self._tables: dict[SumKey, Tensor] = {}

    def _counted_alike(self, count: Tensor | None, length: int) -> bool:
        """
        Whether sums in a static cache, if they are, took as many tokens as the cache.

        On an accelerator the host would have to wait for that in every step of a generation, and a compiler cannot
        ask. There it suffices that every forward without running means drops the sums (`keep_sums`).
        """
        if count is None or torch.compiler.is_compiling() or (length == 1 and count.device.type != "cpu"):
            return True
        return int(self.past) == int(count)

    def carried(self, series: SumKey) -> Tensor | None:
        if not self._goes_on(series):
            return None
        if not self._tables:
            self._tables = dict(zip(self.layer.series, self.layer.last().unbind()))
        return self._tables[series]

    def _goes_on(self, series: SumKey) -> bool:
        """Whether the sequences do not begin here."""
        if self.is_empty:
            return False
        known = self.layer is not None and self.layer.length > 0 and series in self.layer.series
        if not known and isinstance(self.past, Tensor):
            self.past, self.is_empty = _checked_empty(self.past), True
            return False
        if not known or (self.layer.count is None and self.layer.length != self.past):
            raise ValueError(UNKNOWN)
        return True


def keep_sums(cache: Cache, tokens: Tokens | None, owner: StateOwner | None) -> None:
    """
    Lets a cache carry on what the routes of a forward have summed up, and nothing else.

    Args:
        cache: the forward's, after it.
        tokens: the forward's; None if no routes were in force.
        owner: of those routes.
    """
    layer = SumsLayer.of(cache)
    state = None if tokens is None else tokens.state  # None too if the forward made the cache
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
        return _static(tokens.state.past)  # 0, as was checked
    return _static(torch.zeros((), dtype=torch.int64, device=device))


def _static(table: Tensor) -> Tensor:
    """Tells the compiler that this tensor stays where it is, as a static cache does of its own."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(table)
    return table
