"""How keys and values are stored: from gate inputs to small codes, and from codes to what search and mixing need.

Tensors only: T tokens, K neighbours, N rows, E experts, d hidden size, c dimensions of a key, m stored experts.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from knnmoe_hf.tables import Allocate, Table, blocks, in_memory, picked

_LEVELS = 127  # int8 codes are symmetric
_CLIPPED = 2e-4  # share of a dimension's values that may be cut off, so that an outlier does not cost the rest a digit
_FIT_ROWS = 2**16  # that steps of int8 codes are fitted to
_AT_ONCE = 2**18  # numbers of values that are recalled at once: of a long prompt they would not fit into a cache


class _Tables:
    """What the classes below share: optional tensors as fields, moved and stored by their names."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device):
        """With every tensor on `device`."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def _check(self, **shapes: tuple[int, ...]) -> None:
        """Raises ValueError for a tensor of another shape: compiled code reads as much as the others tell."""
        for name, tensor in self.tensors().items():
            if name in shapes and tuple(tensor.shape) != shapes[name]:
                found, wanted = list(tensor.shape), list(shapes[name])
                raise ValueError(f"{name} {found} does not fit the rest of a {type(self).__name__}: make it {wanted}.")


@dataclass(frozen=True)
class KeyEncoder(_Tables):
    """
    From a gate's input (or its logits) to a query, `W x + b`; the identity where there is no `weight`.

    Args:
        of_logits: whether keys are made of the gate's own logits instead of its input.
        weight: (c, d) float32 or None.
        bias: (c,) float32 or None.
        mean: (d,) float32, the inputs' mean where `weight` keeps only a part of it; None otherwise.
        step: (c,) float32, size of one int8 code in each dimension; None if keys are floats.
    """

    of_logits: bool = False
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    step: Tensor | None = None

    def __post_init__(self):
        first = next((t for t in (self.weight, self.bias, self.step) if t is not None), None)
        if first is not None:
            width, hidden = len(first), () if self.weight is None else tuple(self.weight.shape[-1:])
            self._check(weight=(width, *hidden), bias=(width,), mean=hidden, step=(width,))

    def query(self, x: Tensor, logits: Tensor) -> Tensor:
        """(T, c) float32 of the gate's input x (T, d) and its logits (T, E)."""
        source = (logits if self.of_logits else x).float()
        if self.weight is None:
            return source if self.bias is None else source + self.bias
        if not torch.is_autocast_enabled(source.device.type):  # entering the context takes as long as the product
            return F.linear(source, self.weight, self.bias)
        with torch.autocast(source.device.type, enabled=False):
            return F.linear(source, self.weight, self.bias)

    def encode(self, x: Table, logits: Table, dtype: torch.dtype, allocate: Allocate = in_memory) -> Tensor:
        """Keys (N, c) in `dtype`, block by block into one tensor."""
        source = logits if self.of_logits else x
        codes = allocate((len(source), len(self.weight) if self.weight is not None else source.shape[1]), dtype)
        filled = 0
        for query in self._queries(blocks(source)):
            if self.step is not None:
                query = (query / self.step).round_().clamp_(-_LEVELS, _LEVELS)
            codes[filled : filled + len(query)] = query
            filled += len(query)
        return codes

    def _queries(self, sources: Iterable[Tensor]) -> Iterator[Tensor]:
        return (self.query(source, source) for source in sources)

    def floats(self, codes: Tensor) -> Tensor:
        """Keys as they are compared with queries, float32, of stored codes (..., c)."""
        return codes.float() if self.step is None else codes.float() * self.step

    def inputs(self, codes: Tensor) -> Tensor:
        """The gate inputs (or logits) (N, d) that the codes stand for, as far as the codec keeps them."""
        keys = self.floats(codes)
        if self.weight is not None:
            return torch.addmm(self.mean, keys, torch.linalg.pinv(self.weight).T)
        return keys if self.bias is None else keys - self.bias


def fit_keys(x: Table, logits: Table, codec: str, dim: int, whitening: float, dtype: torch.dtype) -> KeyEncoder:
    """
    Fits a codec to the rows of one layer.

    Args:
        x: (N, d), gate inputs.
        logits: (N, E), the gate's own.
        codec: `"raw"` (the inputs themselves), `"pca"` (their `dim` main axes) or `"logits"` (the gate's logits,
            centred).
        dim: c of `"pca"`, at most d.
        whitening: an axis of variance v is divided by `v ** (whitening / 2)`: 0 keeps distances, 1 makes all axes
            alike.
        dtype: of the stored keys; int8 gives each dimension its own step.
    """
    source = logits if codec == "logits" else x
    if not len(source):
        source = torch.zeros(1, source.shape[1])  # any codec will do
    encoder = KeyEncoder(of_logits=codec == "logits")
    if codec == "logits":
        encoder = replace(encoder, bias=-_mean(source).float())
    elif codec == "pca":
        mean, axes, variances = _axes(source, dim)
        stretch = (variances / variances[0]) ** (-whitening / 2)
        weight = (axes * stretch[:, None]).bfloat16().float()  # rounded, so that it may be read at half the bytes
        encoder = replace(encoder, weight=weight.contiguous(), bias=-(weight @ mean), mean=mean)
    if dtype != torch.int8:
        return encoder
    chosen = torch.linspace(0, len(source) - 1, min(len(source), _FIT_ROWS), dtype=torch.float64).long()
    reach = torch.cat([query.abs() for query in encoder._queries(picked(source, chosen))])  # (n, c)
    beyond = len(reach) - math.ceil((1 - _CLIPPED) * (len(reach) - 1))  # of few rows, only the largest
    last = reach.topk(beyond, dim=0).values[-1]
    return replace(encoder, step=(last / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny))


def _mean(x: Table) -> Tensor:
    """(d,) float64."""
    return sum(block.double().sum(dim=0) for block in blocks(x)) / len(x)


def _axes(x: Table, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), the main axes (c, d) and the variances along them (c,), floored so that none is next to nothing."""
    mean = _mean(x)
    moment = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for block in blocks(x):
        centred = (block.double() - mean).float()
        moment += (centred.T @ centred).double()
    variances, axes = torch.linalg.eigh(moment / len(x))
    chosen = variances.argsort(descending=True)[:dim]
    kept, axes = variances[chosen], axes[:, chosen].T
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))  # its sign is the library's whim otherwise
    floor = (1e-4 * kept[0]).clamp_min(torch.finfo(torch.float32).tiny)
    return mean.float(), (axes * largest.sign()).float(), kept.clamp_min(floor).float()


@dataclass(frozen=True)
class ValueTable(_Tables):
    """
    One layer's values as they are stored.

    A stored number q stands for `q * step + offset`; a sparse row holds m of its E numbers and one for all the others.
    As a `Table` it is that of the values (N, E) as they are recalled.

    Args:
        num_experts: E.
        codes: (N, E), or (N, m) if sparse; float32, float16 or int8.
        experts: (N, m) uint8 or int16, which experts the codes are of; None if dense.
        rest: (N,) float16, the number of all other experts; None if dense, or if they are 0.
        step, offset: (E,) float32 if dense, (1,) if sparse; None if codes are floats.
    """

    num_experts: int
    codes: Tensor
    experts: Tensor | None = None
    rest: Tensor | None = None
    step: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self):
        rows, sparse = len(self.codes), self.experts is not None
        stored, columns = (self.codes.shape[-1], 1) if sparse else (self.num_experts, self.num_experts)
        self._check(codes=(rows, stored), experts=(rows, stored), rest=(rows,), step=(columns,), offset=(columns,))
        if (self.step is None) != (self.offset is None) or (self.rest is not None and not sparse):
            given = list(self.tensors())
            raise ValueError(f"a ValueTable of {given} is not allowed: give step with offset, and rest with experts.")

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> tuple[int, int]:
        """N and E."""
        return len(self.codes), self.num_experts

    def __getitem__(self, rows: slice) -> Tensor:
        return self.floats(rows)

    def recall(self, rows: Tensor, weights: Tensor) -> Tensor:
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
        if self.rest is None:
            return summed
        return summed.add_((self.rest.index_select(0, picked).view_as(weights) * weights).sum(-1, keepdim=True))

    def floats(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Values (n, E) float32 of some rows."""
        codes = self.codes[rows]
        numbers = codes.float() if self.step is None else codes * self.step + self.offset
        if self.experts is None:
            return numbers
        dense = torch.zeros(len(codes), self.num_experts, device=codes.device)
        dense.scatter_(1, self.experts[rows].long(), numbers)
        return dense if self.rest is None else dense + self.rest[rows].float()[:, None]

    def select(self, rows: Tensor | slice) -> "ValueTable":
        """The table of some rows, by index, slice or mask (N,)."""
        per_row = {n: t[rows] for n, t in self.tensors().items() if n in ("codes", "experts", "rest")}
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
            tables["rest"] = allocate((rows,), torch.float16)

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
    """`codes` of values (n, E), still floats, and if sparse `experts`, and in the space of logits `rest`."""
    if experts is None:
        return {"codes": values}
    ranked = values.abs() if value_space == "delta" else values
    kept = ranked.topk(experts, dim=-1).indices.sort(dim=-1).values  # (n, m)
    numbers = values.gather(-1, kept)
    if value_space != "logits":
        return {"codes": numbers, "experts": kept}
    others = values.scatter(-1, kept, float("-inf")).logsumexp(dim=-1)
    rest = (others - torch.tensor(float(values.shape[1] - experts)).log()).half()
    return {"codes": numbers - rest.float()[:, None], "experts": kept, "rest": rest}


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
