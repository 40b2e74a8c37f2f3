"""Running sums of continuous batches, kept by the slot in which the paged cache of transformers keeps a token.

In one row stand new tokens of many requests. `write_index` says in which slot each is put, `read_index` in which slots
the tokens before it lie; a decoding step of flash attention gives a `block_table` instead of both.
"""

from typing import Any

import torch
from torch import Tensor

from knnmoe_hf.lookup.sequence import SumKey, Tokens
from knnmoe_hf.models.kv_state import StateOwner

_ATTRIBUTE = "knnmoe_sums"
_CHANGED = (
    "another memory, or none, was in force while this engine generated, so the confidence of this one does not know "
    "what came before: start a new generate_batch, or use confidence='rbf'."
)


class PagedSums:
    """
    What a paged cache carries: for each series a table with one float32 per slot, 0 where nothing was kept yet.

    Args:
        allocator: of the cache's layers of one attention type; its slots serve for all layers.
        owner: whose sums these are.
    """

    def __init__(self, allocator: Any, owner: StateOwner):
        self.owner: StateOwner | None = owner  # None once a forward has passed without running means
        self.tables: dict[SumKey, Tensor] = {}
        self.group, self.attention = allocator.index, allocator.layer_type
        self.page, self.stride = allocator.tokens_per_page, allocator.block_physical_stride
        self.size = (allocator.num_blocks + 2 * allocator.blocks_per_sector) * self.page  # two sectors are for padding
        self._copy_keys_and_values = allocator.copy_blocks
        allocator.copy_blocks = self._copy_blocks  # a forked request gets copies of blocks that are not full yet

    @classmethod
    def of(cls, cache: Any) -> "PagedSums | None":
        """Those that a paged cache carries, if any."""
        return getattr(cache, _ATTRIBUTE, None)

    @classmethod
    def beside(cls, cache: Any, owner: StateOwner) -> "PagedSums":
        """
        Those that a paged cache carries for this owner, made if there are none.

        Raises:
            ValueError: if a forward on this cache was another's.
        """
        sums = cls.of(cache)
        if sums is None:
            allocators = cache.cache_allocators  # a full one keeps every token, a sliding one those in its window
            sums = cls(allocators.get("full_attention") or next(iter(allocators.values())), owner)
            setattr(cache, _ATTRIBUTE, sums)
        if sums.owner is not owner:
            raise ValueError(_CHANGED)
        return sums

    def rows(self, slots: Tensor) -> Tensor:
        """Rows of the tables for slots, which in the cache are numbered over the keys and values of all layers."""
        return slots // self.stride * self.page + slots % self.stride

    def rows_at(self, blocks: Tensor, positions: Tensor) -> Tensor:
        """Rows of the tables for positions (R,) of requests whose blocks (R, n) are given as the kernel wants them."""
        page = blocks.gather(1, (positions // self.page)[:, None].long())[:, 0].long()
        return page // (self.stride // self.page) * self.page + positions % self.page

    def _copy_blocks(self, source: list[int], target: list[int]) -> None:
        self._copy_keys_and_values(source, target)
        for table in self.tables.values():
            blocks = table.view(-1, self.page)
            blocks[torch.tensor(target, device=table.device)] = blocks[torch.tensor(source, device=table.device)]


class PagedState:
    """
    The `SequenceState` of the requests in a continuous batch.

    Args:
        call: arguments of the decoder's forward by name.
        owner: of the routes in force.
    """

    def __init__(self, call: dict, owner: StateOwner):
        self.call, self.owner = call, owner
        self._ends: tuple[Tensor, Tensor, Tensor] | None = None

    def carried(self, series: SumKey) -> Tensor | None:
        sums = PagedSums.beside(self.call["cache"], self.owner)
        table = sums.tables.get(series)
        if table is None:
            return None
        if self._ends is None:
            self._ends = self._find_ends(sums)
        starts, rows, goes_on = (part.to(table.device) for part in self._ends)
        found = torch.where(goes_on, table[rows], 0.0)
        total = self.call["position_ids"].shape[-1]
        # a batch padded to a fixed size names requests without tokens, which would begin behind its last token
        return found.new_zeros(total + 1).index_add(0, starts, found)[None, :total]

    def keep(self, tokens: Tokens) -> None:
        """Writes each token's sums into its slot."""
        sums = PagedSums.beside(self.call["cache"], self.owner)
        if self.call.get("block_table") is None:
            rows = sums.rows(self.call["write_index"][sums.group])
        else:
            rows = sums.rows_at(self.call["block_table"][sums.group], self.call["position_ids"][0])
        for series, values in zip(tokens.running_sums, tokens.stacked()):
            if series not in sums.tables:
                sums.tables[series] = values.new_zeros(sums.size)
            table = sums.tables[series]
            table.index_copy_(0, rows.to(table.device), values[0].to(table.device))

    def _find_ends(self, sums: PagedSums) -> tuple[Tensor, Tensor, Tensor]:
        """Of each request (R,): its first token in the batch, the row of the token before it, and if there is one."""
        bounds = self.call["cu_seq_lens_q"].long()
        starts, new = bounds[:-1], bounds.diff()
        if self.call.get("block_table") is not None:  # one token of each
            past = self.call["position_ids"][0].long()
            blocks = self.call["block_table"][sums.group]
            return torch.arange(len(past), device=past.device), sums.rows_at(blocks, (past - 1).clamp_min(0)), past > 0
        slots = self.call["read_index"][sums.group]
        if len(slots) == 0:  # all requests are new
            return starts, torch.zeros_like(starts), torch.zeros_like(starts, dtype=torch.bool)
        ends = self.call["cu_seq_lens_k"][sums.attention].long()
        last = (ends[1:] - new - 1).clamp_min(0)  # in a request's slots its new tokens come last
        return starts, sums.rows(slots[last]), ends.diff() > new


def keep_paged(call: dict, tokens: Tokens | None) -> None:
    """
    Lets a paged cache carry on what the routes of a forward have summed up.

    Args:
        call: arguments of the decoder's forward by name.
        tokens: the forward's; None if no routes were in force.
    """
    if tokens is not None and tokens.running_sums:
        tokens.state.keep(tokens)
    elif (sums := PagedSums.of(call["cache"])) is not None:
        sums.owner = None
