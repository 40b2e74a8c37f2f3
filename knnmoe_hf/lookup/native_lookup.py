"""What tokens recall on a processor, in a call or two of compiled code (`knnmoe_hf.native`)."""

import numpy as np
import torch
from torch import Tensor

from knnmoe_hf import native
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.transforms_tmp import plain
from knnmoe_hf.search import Neighbors, SearchEngine


class CompiledRecall:
    """
    Queries, neighbours, weights and values as `KeyEncoder`, a search engine, `mixing` and `ValueTable` make them, to
    rounding. Each method gives a token the same alone and among others, to the bit. With a `NativeIvfSearch`, `recall_one`
    gives to the bit what the others give one after another.

    Args:
        rows: a layer's, on the CPU.
        engine: over their keys, with a `scan`.
        config: how many neighbours, and how they are weighed.
    """

    def __init__(self, rows: LayerRows, engine: SearchEngine, config: RetrievalOptions):
        encoder, table = rows.encoder, rows.values
        if len(table) != len(rows.key_codes):
            raise ValueError(f"{len(table)} values do not fit {len(rows.key_codes)} keys: there is one for each.")
        self.engine, self.k, self.num_experts = (
            engine,
            min(config.num_neighbors, len(rows.key_codes)),
            rows.num_experts,
        )
        self.is_delta = config.value_space == "delta"
        width, made = rows.key_codes.shape[1], encoder.weight if encoder.weight is not None else encoder.bias
        if made is not None and len(made) != width:
            raise ValueError(f"queries of {len(made)} dimensions do not fit keys of {width}: there is one for each.")
        self.of_logits, self.width = encoder.of_logits, width
        self.hidden = self.width if encoder.weight is None else encoder.weight.shape[1]
        self.weight = _shortest(encoder.weight)
        self.kinds = native.kinds()
        stored = dict(bias=encoder.bias) | table.tensors()
        self.compiled = native.kernels.Recall(
            index=engine.scan,
            weight=self.weight,
            hidden=self.hidden,
            num_experts=self.num_experts,
            k=self.k,
            unit=max(config.temperature * rows.scale, torch.finfo(torch.float32).tiny),
            **{name: tensor.contiguous() for name, tensor in stored.items() if tensor is not None},
        )

    @classmethod
    def of(cls, rows: LayerRows, engine: SearchEngine, config: RetrievalOptions) -> "CompiledRecall | None":
        """None where nothing was compiled, or rows lie elsewhere."""
        return cls(rows, engine, config) if engine.scan is not None and rows.key_codes.device.type == "cpu" else None

    def takes(self, x: Tensor, logits: Tensor) -> bool:
        """Whether a gate's input (T, d) and logits (T, E) are tensors that compiled code can read."""
        return (
            (logits if self.of_logits else x).shape[1] == self.hidden
            and logits.shape[1] == self.num_experts
            and all(tensor.is_cpu and tensor.dtype in self.kinds for tensor in (x, logits))
            and plain(x, logits)
            and not torch.jit.is_tracing()
        )

    def query(self, x: Tensor, logits: Tensor) -> Tensor:
        """(T, c) float32 of the gate's input x (T, d) and its logits (T, E)."""
        source = self._source(x, logits)
        queries = torch.empty(len(source), self.width, dtype=torch.float32, device="cpu")
        asked = source.data_ptr(), len(source), self.kinds[source.dtype], queries.data_ptr()
        self.compiled.encode(*asked, torch.get_num_threads())
        return queries

    def recall(self, found: Neighbors) -> Tensor:
        """The neighbours' mixed values, (T, E) float32."""
        distances, rows = (table.contiguous() for table in found)
        values = torch.empty(len(rows), self.num_experts, dtype=torch.float32, device="cpu")
        tables = distances.data_ptr(), rows.data_ptr(), *rows.shape
        self.compiled.recall(*tables, values.data_ptr(), torch.get_num_threads())
        return values

    def recall_one(self, x: Tensor, logits: Tensor, falloff: float) -> "native.Recalled":
        """
        What one token recalls, in a single call.

        Args:
            x: (1, d), the gate's input; logits: (1, E), its own.
            falloff: of the similarity, `exp(-falloff * distance)`.

        Returns:
            With the neighbours' mean similarity, `similar`, for `mix_one` or `values_of_one`.
        """
        source = self._source(x, logits)
        kind = self.kinds[source.dtype]
        if self.engine.proposes:
            query = np.empty((1, self.width), dtype=np.float32)
            self.compiled.encode(source.data_ptr(), 1, kind, query.ctypes.data, 1)
            rows = self.engine.propose(query, self.k)
            if rows is not None:
                return self.compiled.recall_among(query.ctypes.data, rows.ctypes.data, len(rows), falloff)
        return self.compiled.recall_one(source.data_ptr(), kind, falloff)

    def mix_one(self, recalled: "native.Recalled", logits: Tensor, lam: float) -> Tensor:
        """`mixing.mix_logits` or `mix_delta` of logits (1, E), in their dtype, by the value space."""
        logits, mixed = logits.contiguous(), torch.empty_like(logits, requires_grad=False)
        self.compiled.mix(recalled, lam, self.is_delta, logits.data_ptr(), self.kinds[logits.dtype], mixed.data_ptr())
        return mixed

    def values_of_one(self, recalled: "native.Recalled") -> Tensor:
        """The neighbours' mixed values, (1, E) float32."""
        found = torch.empty(1, self.num_experts, dtype=torch.float32, device="cpu")
        recalled.copy(found.data_ptr())
        return found

    def _source(self, x: Tensor, logits: Tensor) -> Tensor:
        return (logits if self.of_logits else x).contiguous()

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
