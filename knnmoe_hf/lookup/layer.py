"""One layer's rows as they are stored, and what is known of the distances between them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knnmoe_hf.lookup.blocks import Allocate, Table, in_memory
from knnmoe_hf.lookup.codecs import KeyEncoder, fit_keys
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.values import ValueTable, store_values, stored_experts
from knnmoe_hf.search import StoredKeys
from knnmoe_hf.search.base import SLACK
from knnmoe_hf.search.scores import half_norms, least_scores, rescore

SAMPLE = 512
"""Rows that act as queries, evenly spread over the memory."""
_QUERIES = 64
_STORED = {"default_value": "rest"}  # names in a memory's files that differ from the fields' names
_NEIGHBOURHOODS = 32  # an example is apart from those further off than this part of them all


def neighbor_distances(keys: StoredKeys, example_ids: Tensor, num_neighbors: int, max_bytes: int) -> Tensor:
    """
    Squared L2 distances (S, K) float32 from sampled rows to their nearest rows of *other* examples, ascending.

    Rows of one example share their context, so their distances say nothing about how near a new text's tokens will be;
    nor do those of the examples just before and after it, which in a data set are often of one document. A memory of a
    single example has no others; then its own other rows stand in. Samples that have fewer than K are left out; the
    result is empty where no two rows can be compared.

    Args:
        keys: of N rows.
        example_ids: (N,) int64.
        num_neighbors: K; fewer where no sample has as many.
        max_bytes: bound of the distance matrix in bytes.
    """
    rows = len(keys)
    if rows < 2:
        return torch.zeros(0, num_neighbors)
    sample = torch.linspace(0, rows - 1, min(rows, SAMPLE), dtype=torch.float64).round().long()
    alone = bool((example_ids == example_ids[0]).all())
    group = torch.arange(rows) if alone else _ordinals(example_ids.cpu())
    reach = 0 if alone else int(group.max() + 1) // _NEIGHBOURHOODS
    step = max(1, max_bytes // (4 * max(_QUERIES, keys.width)))
    norms = half_norms(keys, max_bytes)
    nearest = torch.cat(
        [_nearest(keys, norms, part, group, reach, num_neighbors, step, max_bytes) for part in sample.split(_QUERIES)]
    )
    there = nearest.isfinite().sum(dim=1)
    width = min(num_neighbors, int(there.max()))
    return nearest[there >= width, :width]


def _nearest(
    keys: StoredKeys, norms: Tensor, sample: Tensor, group: Tensor, reach: int, k: int, step: int, max_bytes: int
) -> Tensor:
    """Squared distances (S, <= K) from sampled rows to the nearest rows of another group, inf where there are none."""
    queries, own, fetch = keys.floats(sample), group[sample], min(k + SLACK, len(keys))

    def banned(block: slice | Tensor) -> Tensor:
        return (own[:, None] - group[block]).abs() <= reach

    _, ids = least_scores(queries, keys, norms, fetch, step, banned)
    nearest = rescore(queries, keys, ids, fetch, max_bytes)
    distances = nearest.distances.masked_fill(banned(nearest.rows), float("inf"))
    return distances.sort(dim=-1).values[:, :k]


def _ordinals(example_ids: Tensor) -> Tensor:
    """(N,) int64: 0 for the rows of the first example, 1 for those of the next, in the order in which they come."""
    names, index = example_ids.unique(return_inverse=True)
    first = torch.full((len(names),), len(index)).scatter_reduce_(0, index, torch.arange(len(index)), "amin")
    return first.argsort().argsort()[index]


def distance_scale(distances: Tensor) -> float:
    """
    The unit in which a layer measures similarity: the median of these neighbour distances.

    Returns:
        A positive float; 1.0 where there are no distances or all keys coincide. Where more than half of the neighbours
        coincide with their row, the median of the other distances.
    """
    apart = distances[distances > 0]
    if apart.numel() == 0:
        return 1.0
    return distances.median().item() or apart.median().item()


@dataclass(frozen=True)
class LayerRows:
    """
    One layer of a memory.

    Attributes:
        key_codes: (N, c), keys as stored.
        encoder: from gate inputs (or logits) to queries and codes.
        values: as stored, one for each key.
        distances: (S, K) float32, from sampled rows to their nearest rows of other examples.
        scale: the unit of distance: their median.
        hidden_size: d of the gate.
        stats: of `confidence="calibrated"`; None if it was not fitted.
        source: names the content of codes that were opened from a file and are all of it, for indexes that are kept.
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
        config: RetrievalOptions,
        allocate: Allocate = in_memory,
    ) -> "LayerRows":
        """
        Fits codecs and distances to a layer's rows, of which only a block at a time is looked at.

        Args:
            x: (N, d), gate inputs; logits: (N, E), the gate's own; values: (N, E).
            example_ids: (N,) int64.
            config: says how keys and values are stored.
            allocate: makes the tensors of N rows.
        """
        dtype, stored = getattr(torch, config.key_dtype), getattr(torch, config.value_dtype)
        encoder = fit_keys(x, logits, config.key_codec, config.key_dim, config.key_whitening, dtype)
        table = store_values(values, config.value_space, stored, config.value_experts, allocate)
        codes = encoder.encode(x, logits, dtype, allocate)
        rows = cls(codes, encoder, table, torch.zeros(0, 1), 1.0, x.shape[1])
        return rows.measured(example_ids, config)

    def measured(self, example_ids: Tensor, config: RetrievalOptions) -> "LayerRows":
        """With distances and scale of the rows as they are now; stats keep the unit that they were fitted in."""
        found = neighbor_distances(self.stored_keys, example_ids, config.num_neighbors, config.search_max_bytes)
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
        """(N, E) float32, the values as they are recalled."""
        return self.values.floats()

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored for this layer but its provenance."""
        return self.key_codes.nbytes + self.encoder.nbytes + self.values.nbytes + self.distances.nbytes

    def to(self, device: torch.device) -> "LayerRows":
        """What a lookup needs on `device`."""
        return replace(
            self,
            key_codes=self.key_codes.to(device),
            encoder=self.encoder.to(device),
            values=self.values.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """By the names under which they are stored."""
        named = {"keys": self.key_codes, "distances": self.distances}
        named |= {f"encoder.{name}": tensor for name, tensor in self.encoder.tensors().items()}
        return named | {f"values.{_STORED.get(name, name)}": tensor for name, tensor in self.values.tensors().items()}

    @classmethod
    def of_tensors(
        cls, tensors: dict[str, Tensor], hidden_size: int, num_experts: int, of_logits: bool, **known
    ) -> "LayerRows":
        """The reverse of `tensors`."""
        encoder, values = (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in ("encoder.", "values.")
        )
        fields = {stored: field for field, stored in _STORED.items()}
        values = {fields.get(name, name): tensor for name, tensor in values.items()}
        return cls(
            key_codes=tensors["keys"],
            encoder=KeyEncoder(of_logits, **encoder),
            values=ValueTable(num_experts, **values),
            distances=tensors["distances"],
            hidden_size=hidden_size,
            **known,
        )


def specification(
    rows: int, hidden_size: int, num_experts: int, sample: tuple[int, int], options: dict
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of a layer's tensors, by the names of `LayerRows.tensors`."""
    key_dtype, value_dtype = getattr(torch, options["key_dtype"]), getattr(torch, options["value_dtype"])
    codec, experts = options["key_codec"], stored_experts(num_experts, options["value_experts"], value_dtype)
    source = num_experts if codec == "logits" else hidden_size
    width = min(options["key_dim"], hidden_size) if codec == "pca" else source
    wanted = {"keys": ((rows, width), key_dtype), "distances": (tuple(sample), torch.float32)}
    if codec == "pca":
        wanted |= {"encoder.weight": ((width, source), torch.float32), "encoder.mean": ((source,), torch.float32)}
    if codec != "raw":
        wanted["encoder.bias"] = ((width,), torch.float32)
    if key_dtype == torch.int8:
        wanted["encoder.step"] = ((width,), torch.float32)
    sparse = experts is not None
    wanted["values.codes"] = ((rows, experts if sparse else num_experts), value_dtype)
    if sparse:
        wanted["values.experts"] = ((rows, experts), torch.uint8 if num_experts <= 256 else torch.int16)
    if sparse and options["value_space"] == "logits":
        wanted["values.rest"] = ((rows,), torch.float16)
    if value_dtype == torch.int8:
        wanted |= {f"values.{name}": ((1 if sparse else num_experts,), torch.float32) for name in ("step", "offset")}
    return wanted
