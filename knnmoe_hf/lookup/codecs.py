"""
How keys are stored and compared: from gate inputs to queries, and from queries to stored codes.

Tensors only: T tokens, N rows, E experts, d hidden size, c dimensions of a key.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from knnmoe_hf.lookup.blocks import Allocate, Table, blocks, in_memory, picked
from knnmoe_hf.search.scores import autocast_off

INT8_MAX = 127
"""int8 codes are symmetric, from -127 to 127."""
_CLIPPED = 2e-4  # share of a dimension's values that may be clipped, so that an outlier does not coarsen the others
_FIT_ROWS = 2**16  # rows that the steps of int8 codes are fitted to


class TensorFields:
    """What `KeyEncoder` and `ValueTable` share: optional tensors as fields, moved and stored by the fields' names."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not None, by field."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device):
        """A copy with every tensor on `device`."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def _check_shapes(self, **shapes: tuple[int, ...]) -> None:
        """Raises ValueError for a tensor of another shape: native code gets addresses and sizes, no shapes."""
        for name, tensor in self.tensors().items():
            if name in shapes and tuple(tensor.shape) != shapes[name]:
                found, needed = list(tensor.shape), list(shapes[name])
                raise ValueError(f"{name} {found} does not fit the rest of a {type(self).__name__}: make it {needed}.")


@dataclass(frozen=True)
class KeyEncoder(TensorFields):
    """
    From a gate's input (or its logits) to a query, `W x + b`; without `weight`, `x + b`; without either, `x`.

    Args:
        of_logits: whether keys are made of the gate's own logits instead of its input.
        weight: (c, d) float32 or None.
        bias: (c,) float32 or None.
        mean: (d,) float32, the inputs' mean, which turns keys back into inputs; None without `weight`.
        step: (c,) float32, what one int8 code stands for in each dimension; None if keys are stored as floats.
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
            self._check_shapes(weight=(width, *hidden), bias=(width,), mean=hidden, step=(width,))

    def query(self, x: Tensor, logits: Tensor) -> Tensor:
        """Queries (T, c) float32 from the gate's input x (T, d) and its logits (T, E)."""
        source = (logits if self.of_logits else x).float()
        if self.weight is None:
            return source if self.bias is None else source + self.bias
        with autocast_off(source.device):
            return F.linear(source, self.weight, self.bias)

    def encode(self, x: Table, logits: Table, dtype: torch.dtype, allocate: Allocate = in_memory) -> Tensor:
        """Key codes (N, c) in `dtype` from gate inputs x (N, d) and logits (N, E), written block by block."""
        source = logits if self.of_logits else x
        codes = allocate((len(source), len(self.weight) if self.weight is not None else source.shape[1]), dtype)
        filled = 0
        for query in self._queries(blocks(source)):
            if self.step is not None:
                query = (query / self.step).round_().clamp_(-INT8_MAX, INT8_MAX)
            codes[filled : filled + len(query)] = query
            filled += len(query)
        return codes

    def _queries(self, sources: Iterable[Tensor]) -> Iterator[Tensor]:
        return (self.query(source, source) for source in sources)

    def floats(self, codes: Tensor) -> Tensor:
        """Keys (..., c) float32, as queries are compared with them, from stored codes (..., c)."""
        return codes.float() if self.step is None else codes.float() * self.step

    def inputs(self, codes: Tensor) -> Tensor:
        """Approximate gate inputs (or logits) (N, d) float32 from stored codes (N, c): what the codec kept of them."""
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
        codec: `"raw"` (the inputs), `"pca"` (their `dim` principal axes) or `"logits"` (the gate's logits, centred).
        dim: c of `"pca"`, at most d.
        whitening: an axis of variance v is divided by `v ** (whitening / 2)`: 0 keeps distances, 1 gives all axes the
            same variance.
        dtype: of the stored keys; int8 gives each dimension its own step.
    """
    source = logits if codec == "logits" else x
    if not len(source):
        source = torch.zeros(1, source.shape[1])  # there is nothing to fit to; any codec of the right shape will do
    encoder = KeyEncoder(of_logits=codec == "logits")
    if codec == "logits":
        encoder = replace(encoder, bias=-_mean(source).float())
    elif codec == "pca":
        mean, axes, variances = _principal_axes(source, dim)
        stretch = (variances / variances[0]) ** (-whitening / 2)
        weight = (axes * stretch[:, None]).bfloat16().float()  # rounded, so that native code may read half the bytes
        encoder = replace(encoder, weight=weight.contiguous(), bias=-(weight @ mean), mean=mean)
    return encoder if dtype != torch.int8 else replace(encoder, step=_int8_step(encoder, source))


def _int8_step(encoder: KeyEncoder, source: Table) -> Tensor:
    """(c,) float32, so that all but a share `_CLIPPED` of each dimension's values fit into int8 codes."""
    rows = torch.linspace(0, len(source) - 1, min(len(source), _FIT_ROWS), dtype=torch.float64).long()
    sizes = torch.cat([query.abs() for query in encoder._queries(picked(source, rows))])  # (n, c)
    largest = len(sizes) - math.ceil((1 - _CLIPPED) * (len(sizes) - 1))  # 1 for few rows, which clips nothing
    limit = sizes.topk(largest, dim=0).values[-1]
    return (limit / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)


def _mean(x: Table) -> Tensor:
    """(d,) float64."""
    return sum(block.double().sum(dim=0) for block in blocks(x)) / len(x)


def _principal_axes(x: Table, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Of rows x (N, d), by an eigendecomposition of their covariance.

    Returns:
        Mean (d,), the axes of largest variance (c, d), and their variances (c,), at least 1e-4 of the largest one, so
        that whitening does not blow up an axis without variance; all float32.
    """
    mean = _mean(x)
    moment = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for block in blocks(x):
        centred = (block.double() - mean).float()
        moment += (centred.T @ centred).double()
    variances, axes = torch.linalg.eigh(moment / len(x))
    kept = variances.argsort(descending=True)[:dim]
    variances, axes = variances[kept], axes[:, kept].T
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))  # made positive: eigh leaves an axis' sign open
    floor = (1e-4 * variances[0]).clamp_min(torch.finfo(torch.float32).tiny)
    return mean.float(), (axes * largest.sign()).float(), variances.clamp_min(floor).float()
