"""Running sums in continuous batching, stored per slot of transformers' paged KV cache.

A forward has one row with the new tokens of many requests. `write_index` gives the cache slot of each new token,
`read_index` the slots of all tokens that a request attends to; a decoding step with flash attention passes a
`block_table` instead of both.
"""

import functools
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

from knnmoe_hf.lookup.sequence import SumKey, Tokens
from knnmoe_hf.models.owners import StateOwner

_ATTRIBUTE = "knnmoe_sums"
_CHANGED = (
    "another memory, or none, was in force in earlier steps of this batch, so the running means that the confidence "
    "needs are missing for those tokens: start a new generate_batch, with a new manager if it is persistent, or use "
    "confidence='rbf'."
)


class PagedSums:
    """
    Running sums beside a paged cache: for each `SumKey`, `tables` has one float32 per slot, which is 0 at first.

    Args:
        allocator: transformers' allocator of cache blocks for one attention type; all layers share its slots.
        owner: identity of the overrides that these sums belong to.
    """

    def __init__(self, allocator: Any, owner: StateOwner | None):
        self.owner = owner  # None after a forward without running sums
        self.tables: dict[SumKey, Tensor] = {}
        self.group, self.attention = allocator.index, allocator.layer_type
        self.page, self.stride = allocator.tokens_per_page, allocator.block_physical_stride
        # the cache adds two sectors of blocks for padding
        self.size = (allocator.num_blocks + 2 * allocator.blocks_per_sector) * self.page
        self._copy_keys_and_values = allocator.copy_blocks
        # a forked request copies the blocks that are not full yet: their running sums are copied with them
        allocator.copy_blocks = self._copy_blocks
        self.allocator = allocator
        self._offloaded: dict[str, dict[SumKey, Tensor]] = {}

    @classmethod
    def of(cls, cache: Any) -> "PagedSums | None":
        """The sums stored beside a paged cache; None if there are none."""
        return getattr(cache, _ATTRIBUTE, None)

    @classmethod
    def get_or_create(cls, cache: Any, owner: StateOwner | None) -> "PagedSums":
        """The sums stored beside a paged cache, created if there are none."""
        sums = cls.of(cache)
        if sums is None:
            # full attention is preferred: a sliding window's allocator frees the slots of tokens that left the window
            allocators = cache.cache_allocators
            sums = cls(allocators.get("full_attention") or next(iter(allocators.values())), owner)
            setattr(cache, _ATTRIBUTE, sums)
        return sums

    def rows(self, slots: Tensor) -> Tensor:
        """Table rows of cache slots; the cache numbers its slots across the keys and values of all layers."""
        return slots // self.stride * self.page + slots % self.stride

    def rows_at(self, blocks: Tensor, positions: Tensor) -> Tensor:
        """Table rows of the tokens at positions (R,) of R requests with these blocks (R, n), as in `block_table`."""
        page = blocks.gather(1, (positions // self.page)[:, None].long())[:, 0].long()
        return page // (self.stride // self.page) * self.page + positions % self.page

    def has_more_requests_than(self, count: int) -> bool:
        """Whether the cache holds more than `count` requests, or blocks that are kept for requests to come."""
        requests, ledger = (getattr(self.allocator, name, None) for name in ("block_table", "ledger"))
        return len(requests or ()) > count or bool(getattr(ledger, "hash_to_block", None))

    def keep_offloaded(self, requests: set[str], tables: dict[str, dict[str, list[int]]]) -> None:
        """Sets the sums of requests aside whose blocks, listed in `tables`, were copied to the CPU."""
        for request in requests:
            blocks = tables[request][self.attention]
            self._offloaded[request] = {key: self._pages(key)[blocks] for key in self.tables}

    def restore(self, request: str) -> None:
        """Puts the sums of a request that was offloaded into its new blocks."""
        blocks = self.allocator.block_table.get(request, [])
        for key, kept in self._offloaded.pop(request, {}).items():
            self._pages(key)[blocks[: len(kept)]] = kept[: len(blocks)]

    def _pages(self, key: SumKey) -> Tensor:
        """(blocks, page) view of a table."""
        return self.tables[key].view(-1, self.page)

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
        owner: of the overrides in force.
    """

    def __init__(self, call: dict, owner: StateOwner):
        self.call, self.owner = call, owner
        self._ends: tuple[Tensor, Tensor, Tensor] | None = None

    def carried(self, key: SumKey) -> Tensor | None:
        sums = self._sums()
        table = sums.tables.get(key)
        if table is None:
            return None
        if self._ends is None:
            self._ends = self._find_ends(sums)
        starts, rows, continues = (part.to(table.device) for part in self._ends)
        found = torch.where(continues, table[rows], 0.0)
        total = self.call["position_ids"].shape[-1]
        # a batch padded to a fixed size lists requests without tokens, which start one position after the last token
        return found.new_zeros(total + 1).index_add(0, starts, found)[None, :total]

    def _sums(self) -> PagedSums:
        """
        The sums beside the cache.

        Raises:
            ValueError: if an earlier forward on this cache ran without running sums or with other overrides.
        """
        new = PagedSums.of(self.call["cache"]) is None and not torch.compiler.is_compiling()
        sums = PagedSums.get_or_create(self.call["cache"], self.owner)
        if new and not _is_warmup() and self._began_before(sums):
            sums.owner = None
        if sums.owner != self.owner:
            raise ValueError(_CHANGED)
        return sums

    def _began_before(self, sums: PagedSums) -> bool:
        """Whether there were forwards on this cache before its first one with sums."""
        _, _, continues = self._find_ends(sums)
        return bool(continues.any()) or sums.has_more_requests_than(len(continues))

    def keep(self, tokens: Tokens) -> None:
        """Stores each new token's sums in the rows of its slot."""
        sums = self._sums()
        if self.call.get("block_table") is None:
            rows = sums.rows(self.call["write_index"][sums.group])
        else:
            rows = sums.rows_at(self.call["block_table"][sums.group], self.call["position_ids"][0])
        for key, values in zip(tokens.running_sums, tokens.stacked()):
            if key not in sums.tables:
                sums.tables[key] = values.new_zeros(sums.size)
            table = sums.tables[key]
            table.index_copy_(0, rows.to(table.device), values[0].to(table.device))

    def _find_ends(self, sums: PagedSums) -> tuple[Tensor, Tensor, Tensor]:
        """
        For each of R requests: where its first new token is in the batch, the table row of the token before that, and
        whether there is such a token; (R,) each.
        """
        bounds = self.call["cu_seq_lens_q"].long()
        starts, new = bounds[:-1], bounds.diff()
        if self.call.get("block_table") is not None:  # one new token of each request
            past = self.call["position_ids"][0].long()
            blocks = self.call["block_table"][sums.group]
            return torch.arange(len(past), device=past.device), sums.rows_at(blocks, (past - 1).clamp_min(0)), past > 0
        slots = self.call["read_index"][sums.group]
        if len(slots) == 0:  # all requests are new
            return starts, torch.zeros_like(starts), torch.zeros_like(starts, dtype=torch.bool)
        ends = self.call["cu_seq_lens_k"][sums.attention].long()
        last = (ends[1:] - new - 1).clamp_min(0)  # the slots of a request end with its new tokens
        return starts, sums.rows(slots[last]), ends.diff() > new


def keep_paged(call: dict, tokens: Tokens | None) -> None:
    """
    Stores the running sums of a forward beside its paged cache; after a forward without any, no sums can be continued.

    Args:
        call: arguments of the decoder's forward by name.
        tokens: the tokens of the forward; None if no overrides were in force.
    """
    if tokens is not None and tokens.running_sums:
        tokens.state.keep(tokens)
    else:
        PagedSums.get_or_create(call["cache"], None).owner = None


def _is_warmup() -> bool:
    """Whether this is a forward on made-up requests, before the first batch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "run_one_warmup":
        frame = frame.f_back
    return frame is not None


def follow_offloading() -> None:
    """
    Makes the running sums of requests that transformers moves to the CPU and back move with their blocks, once in a
    process. Neither a cache nor a call refers to the manager that does so, hence its class is extended.
    """
    offload, restore = OffloadingManager._offload_to_cpu, OffloadingManager.restore_scheduled_requests
    if getattr(offload, "follows_sums", False):
        return

    @functools.wraps(offload)
    def offload_with_sums(manager: OffloadingManager, victims: list, tables: dict) -> set[str]:
        moved = offload(manager, victims, tables)
        if (sums := PagedSums.of(manager.cache)) is not None:
            with manager._stream_ctx():
                sums.keep_offloaded(moved, tables)
        return moved

    @functools.wraps(restore)
    def restore_with_sums(manager: OffloadingManager, requests: list) -> None:
        back = [one.state.request_id for one in requests if one.state.is_cpu_offloaded]
        restore(manager, requests)
        if (sums := PagedSums.of(manager.cache)) is not None:
            with manager._stream_ctx():
                for request in back:
                    sums.restore(request)

    offload_with_sums.follows_sums = True
    OffloadingManager._offload_to_cpu = offload_with_sums
    OffloadingManager.restore_scheduled_requests = restore_with_sums
