"""`NativeLookup`: the lookup of a layer on a CPU, whose queries, neighbours and values are computed by native code."""

import torch
from torch import Tensor

from knnmoe_hf import native
from knnmoe_hf.lookup.parts import is_traced
from knnmoe_hf.lookup.torch_lookup import TorchLookup
from knnmoe_hf.search import Neighbors


class NativeLookup(TorchLookup):
    """
    A `TorchLookup` that encodes and combines in `knnmoe_hf.native`; its engine searches there too, if it is
    `NativeIvfSearch`. Results equal those of `TorchLookup` to rounding, and a token gets the same bits alone and among
    others.

    Native code reads addresses. Tensors that it cannot read (those of a tracing compiler or of `torch.jit`, or of a
    dtype that memories do not store) go through a `TorchLookup` over the same rows and engine.
    """

    def _make_engine(self) -> None:
        super()._make_engine()
        rows, encoder = self.rows, self.rows.encoder
        if len(rows.values) != len(rows.key_codes):
            raise ValueError(
                f"{len(rows.values)} values do not fit {len(rows.key_codes)} keys: store one value for each key."
            )
        self._query_width = rows.key_codes.shape[1]
        self._source_width = self._query_width if encoder.weight is None else encoder.weight.shape[1]
        self._dtypes = native.kinds()
        self._weight = _shortest(encoder.weight)
        bias = encoder.bias.contiguous() if encoder.bias is not None else None
        self._encoder = native.kernels.Encoder(self._weight, bias, self._query_width, self._source_width)
        stored = {name: tensor.contiguous() for name, tensor in rows.values.tensors().items()}
        names = ("codes", "experts", "default_value", "step", "offset")
        self._values = native.kernels.ValueTable(*(stored.get(name) for name in names), rows.num_experts)

    def _register(self) -> None:
        super()._register()
        self._in_torch = object.__new__(TorchLookup)  # a view: made here, as compilers do not trace its making
        vars(self._in_torch).update(vars(self))

    def __getstate__(self) -> dict:
        made_again = ("_dtypes", "_encoder", "_values", "_in_torch")
        return {name: value for name, value in super().__getstate__().items() if name not in made_again}

    def encode(self, x: Tensor, logits: Tensor) -> Tensor:
        source = (logits if self.rows.encoder.of_logits else x).contiguous()
        kind = self._dtypes.get(source.dtype)
        if kind is None or source.shape[1:] != (self._source_width,):
            raise TypeError(
                f"{list(source.shape)} {source.dtype} cannot be encoded by the lookup of layer {self.layer}: give it "
                f"rows of {self._source_width} numbers in float32, bfloat16 or float16."
            )
        queries = torch.empty(len(source), self._query_width, dtype=torch.float32, device="cpu")
        self._encoder.encode(
            native.address(source, source.dtype), len(source), kind, queries.data_ptr(), torch.get_num_threads()
        )
        return queries

    def combine(self, neighbors: Neighbors) -> Tensor:
        rows, weights = neighbors.rows.contiguous(), self._weights(neighbors)
        values = torch.empty(len(rows), self.rows.num_experts, dtype=torch.float32, device="cpu")
        self._values.combine(
            native.address(rows, torch.int64),
            native.address(weights, torch.float32),
            *rows.shape,
            values.data_ptr(),
            torch.get_num_threads(),
        )
        return values

    def _for_tensors(self, x: Tensor, logits: Tensor) -> TorchLookup:
        return self if self._can_read(x, logits) else self._in_torch

    def _can_read(self, x: Tensor, logits: Tensor) -> bool:
        if is_traced() or not native.is_plain(x, logits):
            return False
        source = logits if self.rows.encoder.of_logits else x
        fits = source.shape[1] == self._source_width and logits.shape[1] == self.rows.num_experts
        return fits and x.dtype in self._dtypes and logits.dtype in self._dtypes

    @property
    def nbytes(self) -> int:
        copied = self._weight is not None and self._weight.dtype == torch.bfloat16
        return super().nbytes + (self._weight.nbytes if copied else 0)


def _shortest(weight: Tensor | None) -> Tensor | None:
    """A codec's weight as bfloat16 if that is exact: reading it is what a query costs, and half the bytes are read."""
    if weight is None:
        return None
    short = weight.bfloat16().contiguous()
    return short if torch.equal(short.float(), weight) else weight.contiguous()
