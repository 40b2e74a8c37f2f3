"""How values are stored, and their weighted combination."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from knnmoe_hf.lookup.blocks import Allocate, Table, blocks, in_memory
from knnmoe_hf.lookup.codecs import _LEVELS, _Tables

_AT_ONCE = 2**18  # numbers of values that are recalled at once: of a long prompt they would not fit into a cache


@dataclass(frozen=True)
class ValueTable(_Tables):
    """
    One layer's values as they are stored.

    A stored number q stands for `q * step + offset`; a sparse row holds m of its E numbers and one for all the others.
    As a `Table` it is that of the values (N, E) as they are combined.

    Args:
        num_experts: E.
        codes: (N, E), or (N, m) if sparse; float32, float16 or int8.
        experts: (N, m) uint8 or int16, which experts the codes are of; None if dense.
        default_value: (N,) float16, the number of all other experts; None if dense, or if they are 0.
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
        self._check(
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
        Weighted sum of the neighbours' values, `sum_i w_i v_i`.

        Args:
            rows: (T, K) int64 in [0, N).
            weights: (T, K) float32, rows sum to 1.

        Returns:
            (T, E) float32.
        """
        if self.experts is None and self.codes.dtype == torch.float32:
            return F.embedding_bag(rows, self.codes, per_sample_weights=weights, mode="sum")
        sum_up = self._sum_up_dense if self.experts is None else self._sum_up_sparse
        at_once = max(1, _AT_ONCE // (rows.shape[1] * self.codes.shape[1]))
        if len(rows) <= at_once:
            return sum_up(rows, weights)
        return torch.cat([sum_up(*part) for part in zip(rows.split(at_once), weights.split(at_once))])

    def _sum_up_dense(self, rows: Tensor, weights: Tensor) -> Tensor:
        codes = self.codes.index_select(0, rows.flatten()).view(*rows.shape, self.num_experts)  # (T, K, E)
        with torch.autocast(weights.device.type, enabled=False):
            summed = torch.einsum("tk,tke->te", weights, codes.float())
        return summed if self.step is None else torch.addcmul(self.offset, summed, self.step)

    def _sum_up_sparse(self, rows: Tensor, weights: Tensor) -> Tensor:
        picked = rows.flatten()  # (T * K,)
        codes = self.codes.index_select(0, picked)  # (T * K, m)
        numbers = codes.float() if self.step is None else torch.addcmul(self.offset, codes, self.step)
        flat = len(rows), rows.shape[1] * codes.shape[1]
        where = self.experts.index_select(0, picked).long().view(flat)
        summed = torch.zeros(len(rows), self.num_experts, device=weights.device)
        summed.scatter_add_(1, where, numbers.mul_(weights.reshape(-1, 1)).view(flat))
        if self.default_value is None:
            return summed
        return summed.add_(
            (self.default_value.index_select(0, picked).view_as(weights) * weights).sum(-1, keepdim=True)
        )

    def floats(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Values (n, E) float32 of some rows."""
        codes = self.codes[rows]
        numbers = codes.float() if self.step is None else codes * self.step + self.offset
        if self.experts is None:
            return numbers
        dense = torch.zeros(len(codes), self.num_experts, device=codes.device)
        dense.scatter_(1, self.experts[rows].long(), numbers)
        return dense if self.default_value is None else dense + self.default_value[rows].float()[:, None]

    def select(self, rows: Tensor | slice) -> "ValueTable":
        """The table of some rows, by index, slice or mask (N,)."""
        per_row = {n: t[rows] for n, t in self.tensors().items() if n in ("codes", "experts", "default_value")}
        return replace(self, **per_row)


def store_values(
    values: Table, value_space: str, dtype: torch.dtype, experts: int | None, allocate: Allocate = in_memory
) -> ValueTable:
    """
    Encodes values (N, E), block by block.

    Args:
        values: in the form of `value_space`.
        value_space: decides what a sparse row keeps: the largest logits or assignments, or the deltas that are
            furthest from 0; the others are 0, or in the space of logits their common level, which keeps their share
            of a softmax.
        dtype: float32, float16 or int8.
        experts: m; None stores all E, as does an m that would take no fewer bytes.
        allocate: makes the tensors of N rows.
    """
    rows, num_experts = len(values), values.shape[1]
    experts = stored_experts(num_experts, experts, dtype)
    tables = {"codes": allocate((rows, experts or num_experts), dtype)}
    if experts is not None:
        tables["experts"] = allocate((rows, experts), torch.uint8 if num_experts <= 256 else torch.int16)
        if value_space == "logits":
            tables["default_value"] = allocate((rows,), torch.float16)

    def parts() -> Iterator[dict[str, Tensor]]:
        return (_parts(block, value_space, experts) for block in blocks(values))

    affine = _affine(parts(), num_experts if experts is None else 1) if dtype == torch.int8 else {}
    filled = 0
    for part in parts():
        if affine:
            codes = (part["codes"] - affine["offset"]) / affine["step"]
            part["codes"] = codes.round_().clamp_(-_LEVELS, _LEVELS)
        for name, table in tables.items():
            table[filled : filled + len(part[name])] = part[name]
        filled += len(part["codes"])
    return ValueTable(num_experts, **tables, **affine)


def _parts(values: Tensor, value_space: str, experts: int | None) -> dict[str, Tensor]:
    """`codes` of values (n, E), still floats, and if sparse `experts`, and in the space of logits `default_value`."""
    if experts is None:
        return {"codes": values}
    ranked = values.abs() if value_space == "delta" else values
    kept = ranked.topk(experts, dim=-1).indices.sort(dim=-1).values  # (n, m)
    numbers = values.gather(-1, kept)
    if value_space != "logits":
        return {"codes": numbers, "experts": kept}
    others = values.scatter(-1, kept, float("-inf")).logsumexp(dim=-1)
    default = (others - torch.tensor(float(values.shape[1] - experts)).log()).half()
    return {"codes": numbers - default.float()[:, None], "experts": kept, "default_value": default}


def stored_experts(num_experts: int, experts: int | None, dtype: torch.dtype) -> int | None:
    """m of a sparse row; None if all E numbers take no more bytes than m of them, their experts and the rest."""
    if experts is None or experts >= num_experts:
        return None
    index = torch.uint8 if num_experts <= 256 else torch.int16
    sparse = experts * (dtype.itemsize + index.itemsize) + torch.float16.itemsize
    return experts if sparse < num_experts * dtype.itemsize else None


def _affine(parts: Iterable[dict[str, Tensor]], columns: int) -> dict[str, Tensor]:
    """The affine map from int8 codes back to numbers: a `step` and an `offset` for each column, or one for all."""
    low, high = torch.full((columns,), math.inf), torch.full((columns,), -math.inf)
    for part in parts:
        numbers = part["codes"].reshape(-1, columns)
        low, high = torch.minimum(low, numbers.amin(dim=0)), torch.maximum(high, numbers.amax(dim=0))
    if bool((low > high).any()):  # there is no row
        low = high = torch.zeros(columns)
    offset, step = (high + low) / 2, ((high - low) / (2 * _LEVELS)).clamp_min(torch.finfo(torch.float32).tiny)
    return {"step": step, "offset": offset}
