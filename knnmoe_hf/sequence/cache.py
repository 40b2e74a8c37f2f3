"""Running sums that live in a `Cache`, beside the keys and values of the tokens that they sum up.

A cache holds them only while every forward on it asks for running means by the same routes. Another cache that is not
empty is refused: what came before is not known.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer

from knnmoe_hf.sequence.tokens import Series, Tokens

UNKNOWN = (
    "this cache was filled without the memory in force, so its confidence does not know what came before: generate "
    "anew without past_key_values, or use confidence='rbf'."
)


class Owner:
    """Identity of the routes that sums belong to; copies of a model or a cache share it."""

    def __deepcopy__(self, memo: dict) -> "Owner":
        return self


class SumsLayer(DummyLayer):
    """
    One more layer of a cache, without keys and values.

    Attributes:
        owner: whose sums these are; None after `reset`.
        sums: float32. (B, L) after each of the cache's L tokens, so that it may be cropped; or, in a static cache,
            which cannot be, (B, 1) after the last, written in place.
        count: () int64, tokens that a static cache was seen to take; None in others.
    """

    def __init__(self, owner: Owner, count: Tensor | None = None):
        super().__init__()
        self.owner: Owner | None = owner
        self.sums: dict[Series, Tensor] = {}
        self.count = count

    @classmethod
    def of(cls, cache: Cache) -> "SumsLayer | None":
        """The one that a cache holds, if any."""
        for layer in cache.layers:
            if isinstance(layer, cls):
                return layer
        return None

    def reset(self) -> None:
        self.owner = None
        if self.count is None:
            self.sums = {}
        else:  # zeroed and not dropped, as compiled graphs hold their addresses
            for table in (self.count, *self.sums.values()):
                table.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            self.sums = {series: table[:, : -abs(tokens_to_remove)] for series, table in self.sums.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.sums = {series: table.repeat_interleave(repeats, dim=0) for series, table in self.sums.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        self.sums = {series: table[indices.to(table.device)] for series, table in self.sums.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)


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
    The `State` of the sequences in a cache before a forward.

    Args:
        cache: the cache.
        owner: of the routes in force.
        length: new tokens of each row.
    """

    def __init__(self, cache: Cache, owner: Owner, length: int):
        past = cache.get_seq_length()
        self.past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts in place
        layer = SumsLayer.of(cache)
        mine = layer is not None and (layer.owner is None or layer.owner is owner)
        self.layer = layer if mine and self._counted_alike(layer.count, length) else None
        self.sums = {} if self.layer is None else dict(self.layer.sums)
        self.is_empty = isinstance(past, int) and past == 0

    def _counted_alike(self, count: Tensor | None, length: int) -> bool:
        """
        Whether sums in a static cache, if they are, took as many tokens as the cache.

        On an accelerator the host would have to wait for that in every step of a generation, and a compiler cannot
        ask. There it suffices that every forward without running means drops the sums (`keep_sums`).
        """
        if count is None or torch.compiler.is_compiling() or (length == 1 and count.device.type != "cpu"):
            return True
        return int(self.past) == int(count)

    def carried(self, series: Series) -> Tensor | None:
        table = None if self.is_empty else self.sums.get(series)
        if table is None and isinstance(self.past, Tensor) and not self.is_empty:
            self.past, self.is_empty = _checked_empty(self.past), True
        if self.is_empty:
            return None
        if table is None or (self.layer.count is None and table.shape[1] != self.past):
            raise ValueError(UNKNOWN)
        return table[:, -1:]


def keep_sums(cache: Cache, tokens: Tokens | None, owner: Owner | None) -> None:
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
    if layer is not None and (layer is not known or not tokens.noted):
        cache.layers[:] = [other for other in cache.layers if other is not layer]
    if tokens is None or not tokens.noted:
        return
    static = cache.is_compileable
    if known is None:
        known = SumsLayer(owner, _fresh_count(tokens) if static else None)
        cache.layers.append(known)
    known.owner = owner
    if static:
        _keep_last(known, tokens)
    else:
        before = {} if state is None or state.is_empty else state.sums
        known.sums = {
            series: torch.cat([before[series].to(sums.device), sums], dim=1) if series in before else sums
            for series, sums in tokens.noted.items()
        }


def _keep_last(layer: SumsLayer, tokens: Tokens) -> None:
    kept = {}
    for series, sums in tokens.noted.items():
        kept[series] = layer.sums[series] if series in layer.sums else _static(torch.zeros_like(sums[:, :1]))
        kept[series].copy_(sums[:, -1:])
    layer.sums = kept
    layer.count.add_(tokens.shape[1])


def _fresh_count(tokens: Tokens) -> Tensor:
    if tokens.state is not None and isinstance(tokens.state.past, Tensor):
        return _static(tokens.state.past)  # 0, as was checked
    device = next(iter(tokens.noted.values())).device
    return _static(torch.zeros((), dtype=torch.int64, device=device))


def _static(table: Tensor) -> Tensor:
    """Tells the compiler that this tensor stays where it is, as a static cache does of its own."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(table)
    return table
