"""
One layer of a memory: its rows as they are stored, and the scale in which distances between them are measured.

Tensors only: N rows, E experts, d hidden size, c dimensions of a key, S sampled rows, K neighbours.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knnmoe_hf.lookup.blocks import LARGEST, Allocate, Bounds, Table, in_memory
from knnmoe_hf.lookup.codecs import INT8_MAX, KeyEncoder, fit_keys
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.lookup.mixing import SPACES
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.rules import Router
from knnmoe_hf.lookup.values import ValueTable, expert_dtype, store_values, stored_experts
from knnmoe_hf.search import StoredKeys
from knnmoe_hf.search.base import SLACK
from knnmoe_hf.search.scores import half_norms, least_scores, rescore

LARGEST_WEIGHT = 64.0
"""Of an expert in an assignment; models scale them by 16 at most, and more would overflow one in float16."""
SAMPLE = 512
"""Rows that are used as queries to measure distances, evenly spread over the memory."""
_QUERIES = 64  # sampled rows that are compared at once
_NEIGHBOURHOODS = 32  # examples no further apart in order than 1/32 of all of them do not count as other text
_NAMES_IN_FILES = {"default_value": "rest"}  # where they differ from the names of `ValueTable`'s fields


def _value_in_files(field: str) -> str:
    """The name in a memory's files of a field of `ValueTable`."""
    return f"values.{_NAMES_IN_FILES.get(field, field)}"


def neighbor_distances(keys: StoredKeys, example_ids: Tensor, num_neighbors: int, max_bytes: int) -> Tensor:
    """
    Squared L2 distances from sampled rows to their nearest rows of *other* examples, ascending.

    Rows of one example share their context, so distances between them say nothing about how near a new text's tokens
    will be. Neither do distances to the examples just before and after, which in a data set are often of one document.
    In a memory of a single example its own other rows count.

    Args:
        keys: of N rows.
        example_ids: (N,) int64.
        num_neighbors: K.
        max_bytes: bound of the distance matrix in bytes.

    Returns:
        (S, K) float32. If no sampled row has K such neighbours, K is the most that one has. Rows with fewer are left
        out, so S is 0 where no two rows can be compared.
    """
    rows = len(keys)
    if rows < 2:
        return torch.zeros(0, num_neighbors)
    sample = torch.linspace(0, rows - 1, min(rows, SAMPLE), dtype=torch.float64).round().long()
    alone = bool((example_ids == example_ids[0]).all())
    group = torch.arange(rows) if alone else _ordinals(example_ids.cpu())
    gap = 0 if alone else int(group.max() + 1) // _NEIGHBOURHOODS
    step = max(1, max_bytes // (4 * max(_QUERIES, keys.width)))
    norms = half_norms(keys, max_bytes)
    nearest = torch.cat(
        [_nearest(keys, norms, part, group, gap, num_neighbors, step, max_bytes) for part in sample.split(_QUERIES)]
    )
    found = nearest.isfinite().sum(dim=1)
    width = min(num_neighbors, int(found.max()))
    return nearest[found >= width, :width]


def _nearest(
    keys: StoredKeys, norms: Tensor, sample: Tensor, group: Tensor, gap: int, k: int, step: int, max_bytes: int
) -> Tensor:
    """Squared distances (S, <= K) to the nearest rows more than `gap` groups away, inf where there are fewer."""
    queries, own, fetch = keys.floats(sample), group[sample], min(k + SLACK, len(keys))

    def excluded(block: slice | Tensor) -> Tensor:
        return (own[:, None] - group[block]).abs() <= gap

    _, ids = least_scores(queries, keys, norms, fetch, step, excluded)
    nearest = rescore(queries, keys, ids, fetch, max_bytes)
    distances = nearest.distances.masked_fill(excluded(nearest.rows), float("inf"))
    return distances.sort(dim=-1).values[:, :k]


def _ordinals(example_ids: Tensor) -> Tensor:
    """(N,) int64: 0 for the rows of the first example, 1 for those of the second, by order of first appearance."""
    names, index = example_ids.unique(return_inverse=True)
    first = torch.full((len(names),), len(index)).scatter_reduce_(0, index, torch.arange(len(index)), "amin")
    return first.argsort().argsort()[index]


def distance_scale(distances: Tensor) -> float:
    """
    The unit s in which a layer measures distances: the median of these neighbour distances.

    Returns:
        A positive float: the median; of the positive distances alone if it is 0; 1.0 if there is no positive distance.
    """
    positive = distances[distances > 0]
    if positive.numel() == 0:
        return 1.0
    return distances.median().item() or positive.median().item()


@dataclass(frozen=True)
class LayerRows:
    """
    One layer of a memory.

    Attributes:
        key_codes: (N, c), keys as stored.
        encoder: from gate inputs (or logits) to queries and codes.
        values: as stored, one for each key.
        distances: (S, K) float32, from sampled rows to their nearest rows of other examples, see `neighbor_distances`.
        scale: their median, see `distance_scale`.
        hidden_size: d of the gate.
        stats: of `confidence="calibrated"`; None if it was not fitted.
        source: content hash for the search index cache; None unless these are all rows of a layer in a saved memory.
    """

    key_codes: Tensor
    encoder: KeyEncoder
    values: ValueTable
    distances: Tensor
    scale: float
    hidden_size: int
    stats: CalibrationStats | None = None
    source: str | None = None

    @classmethod
    def encoded(
        cls,
        x: Table,
        logits: Table,
        values: Table,
        example_ids: Tensor,
        options: RetrievalOptions,
        allocate: Allocate = in_memory,
        router: Router | None = None,
    ) -> "LayerRows":
        """
        Fits codecs to a layer's rows, encodes them and measures their distances, a block of rows at a time.

        Args:
            x: (N, d), gate inputs.
            logits: (N, E), the gate's own.
            values: (N, E), in the form of `options.value_space`.
            example_ids: (N,) int64.
            options: how keys and values are stored.
            allocate: makes the tensors of N rows.
            router: as in `store_values`.
        """
        dtype, stored = getattr(torch, options.key_dtype), getattr(torch, options.value_dtype)
        encoder = fit_keys(x, logits, options.key_codec, options.key_dim, options.key_whitening, dtype)
        table = store_values(values, options.value_space, stored, options.value_experts, allocate, router)
        codes = encoder.encode(x, logits, dtype, allocate)
        rows = cls(codes, encoder, table, torch.zeros(0, 1), 1.0, x.shape[1])
        return rows.measured(example_ids, options)

    def measured(self, example_ids: Tensor, options: RetrievalOptions) -> "LayerRows":
        """A copy with the distances and the scale of its own rows; `stats` have a scale of their own and stay."""
        found = neighbor_distances(self.stored_keys, example_ids, options.num_neighbors, options.search_max_bytes)
        return replace(self, distances=found, scale=distance_scale(found))

    def select(self, rows: Tensor | slice) -> "LayerRows":
        """Some of the rows, by index, slice or mask (N,); distances and scale are those of all."""
        return replace(self, key_codes=self.key_codes[rows], values=self.values.select(rows), source=None)

    @property
    def stored_keys(self) -> StoredKeys:
        """The keys for a search engine."""
        return StoredKeys(self.key_codes, self.encoder.step, self.source)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.values.num_experts

    @property
    def decoded_keys(self) -> Tensor:
        """(N, c) float32, the keys as queries are compared with them."""
        return self.encoder.floats(self.key_codes)

    @property
    def decoded_values(self) -> Tensor:
        """(N, E) float32, the values as they are combined."""
        return self.values.floats()

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored for this layer, without provenance."""
        return self.key_codes.nbytes + self.encoder.nbytes + self.values.nbytes + self.distances.nbytes

    def to(self, device: torch.device) -> "LayerRows":
        """A copy with everything that a lookup reads on `device`."""
        return replace(
            self,
            key_codes=self.key_codes.to(device),
            encoder=self.encoder.to(device),
            values=self.values.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in a memory's files."""
        named = {"keys": self.key_codes, "distances": self.distances}
        named |= {f"encoder.{name}": tensor for name, tensor in self.encoder.tensors().items()}
        return named | {_value_in_files(name): tensor for name, tensor in self.values.tensors().items()}

    @classmethod
    def of_tensors(
        cls, tensors: dict[str, Tensor], hidden_size: int, num_experts: int, of_logits: bool, **known
    ) -> "LayerRows":
        """The reverse of `tensors`; `known` are the other fields."""
        encoder, values = (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in ("encoder.", "values.")
        )
        fields = {name: field for field, name in _NAMES_IN_FILES.items()}
        values = {fields.get(name, name): tensor for name, tensor in values.items()}
        return cls(
            key_codes=tensors["keys"],
            encoder=KeyEncoder(of_logits, **encoder),
            values=ValueTable(num_experts, **values),
            distances=tensors["distances"],
            hidden_size=hidden_size,
            **known,
        )


def bounds(num_experts: int, options: dict) -> dict[str, Bounds]:
    """
    What the numbers in a layer's tensors can be, by the names of `LayerRows.tensors`.

    With these, whatever a query is, what is mixed is finite; see `knnmoe_hf.lookup.blocks.outside` for all others.

    Args:
        num_experts: E.
        options: as in `specification`.
    """
    codes, floats = Bounds(-INT8_MAX, INT8_MAX), Bounds(-LARGEST, LARGEST)
    positive, numbers = Bounds(0.0, LARGEST), floats
    if options["value_space"] == "assignment":
        numbers = Bounds(-LARGEST_WEIGHT, LARGEST_WEIGHT)
    known = {"values.experts": Bounds(0, num_experts - 1, distinct=True), "distances": positive}
    known |= {"encoder.step": positive, "values.step": Bounds(0.0, numbers.high), "values.offset": numbers}
    known["keys"] = codes if options["key_dtype"] == "int8" else floats
    known["values.codes"] = codes if options["value_dtype"] == "int8" else numbers
    return known


def specification(
    rows: int, hidden_size: int, num_experts: int, sample: tuple[int, int], options: dict
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """
    Shape and dtype of each of a layer's tensors, by the names of `LayerRows.tensors`.

    Args:
        rows, hidden_size, num_experts: N, d and E.
        sample: shape of the distances.
        options: those of `knnmoe_hf.lookup.options.FIXED_AT_BUILD`, by name.
    """
    key_dtype, value_dtype = getattr(torch, options["key_dtype"]), getattr(torch, options["value_dtype"])
    codec, experts = options["key_codec"], stored_experts(num_experts, options["value_experts"], value_dtype)
    source = num_experts if codec == "logits" else hidden_size
    width = min(options["key_dim"], hidden_size) if codec == "pca" else source
    expected = {"keys": ((rows, width), key_dtype), "distances": (tuple(sample), torch.float32)}
    if codec == "pca":
        expected |= {"encoder.weight": ((width, source), torch.float32), "encoder.mean": ((source,), torch.float32)}
    if codec != "raw":
        expected["encoder.bias"] = ((width,), torch.float32)
    if key_dtype == torch.int8:
        expected["encoder.step"] = ((width,), torch.float32)
    sparse = experts is not None
    values = {"codes": ((rows, experts if sparse else num_experts), value_dtype)}
    if sparse:
        values["experts"] = ((rows, experts), expert_dtype(num_experts))
    if sparse and SPACES[options["value_space"]].has_default:
        values["default_value"] = ((rows,), torch.float16)
    if value_dtype == torch.int8:
        values |= {name: ((1 if sparse else num_experts,), torch.float32) for name in ("step", "offset")}
    return expected | {_value_in_files(name): kind for name, kind in values.items()}
