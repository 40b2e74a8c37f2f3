"""
How values are stored, and the weighted combination of the neighbours' values.

Tensors only: T tokens, K neighbours, N rows, E experts, m stored experts of a sparse row.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from knnmoe_hf.lookup.blocks import Allocate, Table, blocks, in_memory
from knnmoe_hf.lookup.codecs import INT8_MAX, TensorFields
from knnmoe_hf.lookup.mixing import SPACES
from knnmoe_hf.lookup.rules import Router
from knnmoe_hf.search.scores import autocast_off

_BLOCK_VALUES = 2**18  # neighbours' values at once, 1 MiB of float32: a long prompt's would not fit into a cache


@dataclass(frozen=True)
class ValueTable(TensorFields):
    """
    One layer's values as they are stored; as a `Table` it has the values (N, E) that they stand for.

    A code q stands for `q * step + offset`. A sparse row stores m codes; the value of a stored expert is its code plus
    the row's default value, that of all other experts is the default value.

    Args:
        num_experts: E.
        codes: (N, E), or (N, m) if sparse; float32, float16 or int8.
        experts: (N, m) uint8 or int16, the expert of each code, distinct within a row; None if dense.
        default_value: (N,) float16; None if dense, or where it is 0.
        step, offset: (E,) float32 if dense, (1,) if sparse; None if codes are floats.
    """

    num_experts: int
    codes: Tensor
    experts: Tensor | None = None
    default_value: Tensor | None = None
    step: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self):
        rows, sparse = len(self.codes), self.experts is not None
        stored, columns = (self.codes.shape[-1], 1) if sparse else (self.num_experts, self.num_experts)
        self._check_shapes(
            codes=(rows, stored), experts=(rows, stored), default_value=(rows,), step=(columns,), offset=(columns,)
        )
        if (self.step is None) != (self.offset is None) or (self.default_value is not None and not sparse):
            given = list(self.tensors())
            raise ValueError(
                f"a ValueTable of {given} is not allowed: give step with offset, and default_value with experts."
            )

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> tuple[int, int]:
        """N and E."""
        return len(self.codes), self.num_experts

    def __getitem__(self, rows: slice) -> Tensor:
        return self.floats(rows)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """
        The weighted sum of the neighbours' values, `sum_i w_i v_i`.

        The same inputs give the same bits, also on CUDA: a value is never added to another by a scatter, whose order
        of additions is not fixed there and could make processes route one token differently.

        Args:
            rows: (T, K) int64 in [0, N).
            weights: (T, K) float32, rows sum to 1.

        Returns:
            (T, E) float32. At most 1 MiB of neighbours' values, or those of one token, exist at once.
        """
        if self.experts is None and self.codes.dtype == torch.float32:
            return F.embedding_bag(rows, self.codes, per_sample_weights=weights, mode="sum")
        tokens = max(1, _BLOCK_VALUES // (rows.shape[1] * self.num_experts))
        if len(rows) <= tokens:
            return self._weighted_sum(rows, weights)
        return torch.cat([self._weighted_sum(*part) for part in zip(rows.split(tokens), weights.split(tokens))])

    def _weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        flat = rows.flatten()  # (T * K,)
        codes = self.codes.index_select(0, flat).float()
        if self.experts is not None:
            codes = self._scattered(codes, self.experts.index_select(0, flat))
        with autocast_off(weights.device):
            summed = torch.einsum("tk,tke->te", weights, codes.view(*rows.shape, self.num_experts))
        if self.experts is None and self.step is not None:
            summed = torch.addcmul(self.offset, summed, self.step)
        if self.default_value is not None:
            default = self.default_value.index_select(0, flat).view_as(weights)
            summed += (default * weights).sum(dim=-1, keepdim=True)
        return summed

    def _scattered(self, codes: Tensor, experts: Tensor) -> Tensor:
        """Sparse codes (n, m) as values (n, E) without the default value, 0 where no code is stored."""
        numbers = codes if self.step is None else codes * self.step + self.offset
        dense = torch.zeros(len(codes), self.num_experts, device=codes.device)
        return dense.scatter_(1, experts.long(), numbers)

    def floats(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Values (n, E) float32 of some rows."""
        codes = self.codes[rows].float()
        if self.experts is None:
            return codes if self.step is None else codes * self.step + self.offset
        dense = self._scattered(codes, self.experts[rows])
        return dense if self.default_value is None else dense + self.default_value[rows].float()[:, None]

    def select(self, rows: Tensor | slice) -> "ValueTable":
        """The table of some rows, by index, slice or mask (N,)."""
        per_row = {n: t[rows] for n, t in self.tensors().items() if n in ("codes", "experts", "default_value")}
        return replace(self, **per_row)


def store_values(
    values: Table,
    value_space: str,
    dtype: torch.dtype,
    experts: int | None,
    allocate: Allocate = in_memory,
    router: Router | None = None,
) -> ValueTable:
    """
    Encodes values (N, E), block by block.

    Args:
        values: in the form of `value_space`.
        value_space: decides which experts a sparse row stores, see `_encoded`.
        dtype: of the codes: float32, float16 or int8.
        experts: m; None stores all E, as does an m that would take no fewer bytes.
        allocate: makes the tensors of N rows.
        router: the model's own routing, by which the experts of a row that are stored are chosen; None for a plain
            softmax over all experts.
    """
    rows, num_experts = len(values), values.shape[1]
    experts = stored_experts(num_experts, experts, dtype)
    tables = {"codes": allocate((rows, experts or num_experts), dtype)}
    if experts is not None:
        tables["experts"] = allocate((rows, experts), expert_dtype(num_experts))
        if SPACES[value_space].has_default:
            tables["default_value"] = allocate((rows,), torch.float16)

    def encoded() -> Iterator[dict[str, Tensor]]:
        return (_encoded(block, value_space, experts, router) for block in blocks(values))

    affine = _fit_affine(encoded(), num_experts if experts is None else 1) if dtype == torch.int8 else {}
    filled = 0
    for block in encoded():
        if affine:
            codes = (block["codes"] - affine["offset"]) / affine["step"]
            block["codes"] = codes.round_().clamp_(-INT8_MAX, INT8_MAX)
        for name, table in tables.items():
            table[filled : filled + len(block[name])] = block[name]
        filled += len(block["codes"])
    return ValueTable(num_experts, **tables, **affine)


def joined_values(one: ValueTable, other: ValueTable) -> ValueTable:
    """The rows of two tables of one kind: each row keeps the experts that it stores, and its default value."""
    sides = (one, other)
    numbers = torch.cat([side.codes if side.step is None else side.codes * side.step + side.offset for side in sides])
    affine = {} if one.step is None else _fit_affine([{"codes": numbers}] if len(numbers) else [], one.step.numel())
    if affine:
        numbers = ((numbers - affine["offset"]) / affine["step"]).round_().clamp_(-INT8_MAX, INT8_MAX)
    joined = {
        name: torch.cat([tensor, other.tensors()[name]])
        for name, tensor in one.tensors().items()
        if name in ("experts", "default_value")
    }
    return ValueTable(one.num_experts, numbers.to(one.codes.dtype), **joined, **affine)


def _encoded(values: Tensor, value_space: str, experts: int | None, router: Router | None) -> dict[str, Tensor]:
    """
    The tensors of a `ValueTable` for values (n, E), before their codes are rounded; dense if `experts` is None.

    A sparse row keeps what a routing rule will read: the largest assignments, the deltas furthest from 0, the logits
    that the rule ranks highest. For assignments and deltas, 0 stands for all other experts: no weight, no change. For
    logits no fixed number can, because a softmax reads them relative to each other: there all other experts share a
    default value, see `_default`.
    """
    if experts is None:
        return {"codes": values}
    space = SPACES[value_space]
    ranks = router.rule.ranks(values) if router is not None and space.has_default else space.importance(values)
    kept = ranks.topk(experts, dim=-1).indices.sort(dim=-1).values  # (n, m)
    numbers = values.gather(-1, kept)
    if not space.has_default:
        return {"codes": numbers, "experts": kept}
    default = _default(values, kept, router)
    return {"codes": numbers - default.float()[:, None], "experts": kept, "default_value": default}


def _default(values: Tensor, kept: Tensor, router: Router | None) -> Tensor:
    """
    The default value (n,) float16 of logits (n, E) of which `kept` (n, m) are stored.

    It is the logarithm of the others' mean exponential: a softmax keeps their sum, and so the share of each kept
    expert. Where a correction bias or groups let it change the experts that the rule chooses, it is the least of the
    others instead, which lifts none of them above an expert that is kept.
    """
    is_kept = torch.zeros_like(values, dtype=torch.bool).scatter(-1, kept, True)
    others = values.masked_fill(is_kept, float("-inf")).logsumexp(dim=-1)
    default = (others - torch.tensor(float(values.shape[1] - kept.shape[1])).log()).half()
    if router is None or router.rule.ranks_logits:
        return default
    stored = torch.where(is_kept, values, default.float()[:, None])
    wanted, found = (router.rule(logits, router.top_k)[1].sort(dim=-1).values for logits in (values, stored))
    least = values.masked_fill(is_kept, float("inf")).amin(dim=-1).half()
    return torch.where((wanted == found).all(dim=-1), default, least)


def expert_dtype(num_experts: int) -> torch.dtype:
    """The smallest dtype that holds the experts' indices."""
    return torch.uint8 if num_experts <= 256 else torch.int16


def stored_experts(num_experts: int, experts: int | None, dtype: torch.dtype) -> int | None:
    """m of a sparse row; None if all E codes take no more bytes than m codes, their experts and a default value."""
    if experts is None or experts >= num_experts:
        return None
    sparse = experts * (dtype.itemsize + expert_dtype(num_experts).itemsize) + torch.float16.itemsize
    return experts if sparse < num_experts * dtype.itemsize else None


def _fit_affine(encoded: Iterable[dict[str, Tensor]], columns: int) -> dict[str, Tensor]:
    """`step` and `offset` (columns,) float32 that map int8 codes onto the range of each column; one for all if 1."""
    low, high = torch.full((columns,), math.inf), torch.full((columns,), -math.inf)
    for block in encoded:
        numbers = block["codes"].reshape(-1, columns)
        low, high = torch.minimum(low, numbers.amin(dim=0)), torch.maximum(high, numbers.amax(dim=0))
    if bool((low > high).any()):  # there is no row
        low = high = torch.zeros(columns)
    offset, step = (high + low) / 2, ((high - low) / (2 * INT8_MAX)).clamp_min(torch.finfo(torch.float32).tiny)
    return {"step": step, "offset": offset}
