"""A step of decoding on a processor: what one token recalls, in one call of compiled code (`knnmoe_hf.native`)."""

import numpy as np
import torch
from torch import Tensor

from knnmoe_hf import native
from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.memory.rows import LayerRows
from knnmoe_hf.search import SearchEngine


class SingleRecall:
    """
    Query, neighbours, weights and values of one token at a time, as `KeyEncoder`, a search engine, `mixing` and
    `ValueTable` make them, to rounding.

    Args:
        rows: a layer's, on the CPU.
        engine: over their keys, with a `scan`.
        config: how many neighbours, and how they are weighed.
    """

    def __init__(self, rows: LayerRows, engine: SearchEngine, config: KNNMoEConfig):
        encoder, table = rows.encoder, rows.table
        self.engine, self.k, self.num_experts = engine, min(config.num_neighbors, len(rows.codes)), rows.num_experts
        self.is_delta = config.value_space == "delta"
        self.of_logits, self.width = encoder.of_logits, rows.codes.shape[1]
        unit = max(config.temperature * rows.scale, torch.finfo(torch.float32).tiny)
        self.hidden = self.width if encoder.weight is None else encoder.weight.shape[1]
        stored = (table.codes, table.experts, table.rest, table.step, table.offset)
        self.weight = _shortest(encoder.weight)
        tensors = [None if tensor is None else tensor.contiguous() for tensor in (encoder.bias, *stored)]
        bias, *values = tensors
        self.kinds = native.kinds()
        self.step = native.kernels.Step(
            engine.scan, self.weight, bias, self.hidden, *values, self.num_experts, self.k, unit
        )

    @classmethod
    def of(cls, rows: LayerRows, engine: SearchEngine, config: KNNMoEConfig) -> "SingleRecall | None":
        """None where nothing was compiled, rows lie elsewhere, or a search on all threads takes less time."""
        return cls(rows, engine, config) if engine.takes_one and rows.codes.device.type == "cpu" else None

    def __call__(self, x: Tensor, logits: Tensor, falloff: float) -> "native.Recalled | None":
        """
        What a token recalls.

        Args:
            x: (1, d), the gate's input; logits: (1, E), its own; on the CPU.
            falloff: of the similarity, `exp(-falloff * distance)`.

        Returns:
            With the neighbours' mean similarity, `similar`, for `mix` or `values`; None for tensors of another width,
            or another dtype than float32, float16 or bfloat16.
        """
        source = (logits if self.of_logits else x).contiguous()
        kind = self.kinds.get(source.dtype)
        if kind is None or logits.dtype not in self.kinds or source.shape[1] != self.hidden:
            return None
        if self.engine.proposes:
            query = np.empty((1, self.width), dtype=np.float32)
            self.step.encode(source.data_ptr(), kind, query.ctypes.data)
            rows = self.engine.propose(query, self.k)
            if rows is not None:
                return self.step.recall_of(query.ctypes.data, rows.ctypes.data, len(rows), falloff)
        return self.step.recall(source.data_ptr(), kind, falloff)

    def mix(self, recalled: "native.Recalled", logits: Tensor, lam: float) -> Tensor:
        """`mixing.mix_logits` or `mix_delta` of logits (1, E), in their dtype, by the value space."""
        logits, mixed = logits.contiguous(), torch.empty_like(logits, requires_grad=False)
        self.step.mix(recalled, lam, self.is_delta, logits.data_ptr(), self.kinds[logits.dtype], mixed.data_ptr())
        return mixed

    def values(self, recalled: "native.Recalled") -> Tensor:
        """The neighbours' mixed values, (1, E) float32."""
        found = torch.empty(1, self.num_experts, dtype=torch.float32, device="cpu")
        recalled.copy(found.data_ptr())
        return found

    @property
    def nbytes(self) -> int:
        """Bytes beside the rows and the engine's."""
        return self.weight.nbytes if self.weight is not None and self.weight.dtype == torch.bfloat16 else 0


def _shortest(weight: Tensor | None) -> Tensor | None:
    """A codec's weight as bfloat16 if that is exact: half the bytes to wait for, which is what a query costs."""
    if weight is None:
        return None
    short = weight.bfloat16().contiguous()
    return short if torch.equal(short.float(), weight) else weight.contiguous()
