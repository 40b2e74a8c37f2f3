"""How keys and values are stored: from gate inputs to small codes, and from codes to what search and mixing need.

Tensors only: T tokens, K neighbours, N rows, E experts, d hidden size, c dimensions of a key, m stored experts.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from knnmoe_hf.lookup.blocks import Allocate, Table, blocks, in_memory, picked

_LEVELS = 127  # int8 codes are symmetric
_CLIPPED = 2e-4  # share of a dimension's values that may be cut off, so that an outlier does not cost the rest a digit
_FIT_ROWS = 2**16  # that steps of int8 codes are fitted to


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
