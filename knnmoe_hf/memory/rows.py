"""One layer's rows as they are stored, and what is known of the distances between them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.encoding import KeyEncoder, ValueTable, fit_keys, store_values, stored_experts
from knnmoe_hf.memory.scale import neighbour_distances, typical
from knnmoe_hf.search import StoredKeys
from knnmoe_hf.tables import Allocate, Table, in_memory


@dataclass(frozen=True)
class Levels:
    """
    Of the running similarity that `confidence="calibrated"` looks at, fitted by `knnmoe_hf.calibration`.

    Attributes:
        own: what it is on held-out references.
        ordinary: what it is on ordinary text.
        weight: of this layer among those passed.
        threshold, width: where the memory opens and how softly, on the way from `ordinary` (0) to `own` (1).
        scale: the unit of distance of the similarity.
        gamma, half_life, num_neighbors: the options of the similarity and its mean.
        own_drift, ordinary_drift: what the first two have on top where a sequence begins; of it, half is left after
            each half-life, as a model's first tokens are unlike those that have text before them.
        least_unseen: the least `unseen` that the levels were fitted on; beyond, they stay what they are there.
        fall: by how much less similar the references look to this layer once the memory is open in those before it,
            whose changed routing moves its inputs.
    """

    own: float
    ordinary: float
    weight: float
    threshold: float
    width: float
    scale: float
    gamma: float
    half_life: float
    num_neighbors: float
    own_drift: float = 0.0
    ordinary_drift: float = 0.0
    least_unseen: float = 0.0
    fall: float = 0.0

    def differs(self, config: KNNMoEConfig) -> str | None:
        """An option that is not as when these levels were fitted, so that they say nothing; None if all are."""
        for name in ("gamma", "half_life", "num_neighbors"):
            if getattr(self, name) != getattr(config, name):
                return f"{name}={getattr(self, name):g}, not {getattr(config, name):g}"
        return None

    def opening(self, evidence: Tensor, weight: float = 1.0) -> Tensor:
        """How far the memory opens, in [0, 1], for the evidence of the layers so far, summed up by these weights."""
        return torch.sigmoid((evidence - self.threshold * weight) / (self.width * weight))

    def evidence(self, mean: Tensor, unseen: Tensor) -> Tensor:
        """
        Where a running similarity lies between what it is on ordinary text (0) and on the references (1).

        Args:
            mean: (T,) float32, the running similarity.
            unseen: (T,) float32, see `knnmoe_hf.sequence.Tokens.unseen`.
        """
        unseen = unseen.clamp_min(self.least_unseen)
        above = torch.add(mean - self.ordinary, unseen, alpha=-self.ordinary_drift)
        return above / (unseen * (self.own_drift - self.ordinary_drift) + (self.own - self.ordinary))

    def evidence_of_one(self, mean: float, unseen: float) -> float:
        """The same of a single token."""
        unseen = max(unseen, self.least_unseen)
        above = mean - self.ordinary - self.ordinary_drift * unseen
        return above / (unseen * (self.own_drift - self.ordinary_drift) + (self.own - self.ordinary))

    def opening_of_one(self, evidence: float) -> float:
        """The same as `opening` of a single token."""
        beyond = (self.threshold - evidence) / self.width
        return 1 / (1 + math.exp(beyond)) if beyond < 700 else 0.0


@dataclass(frozen=True)
class LayerRows:
    """
    One layer of a memory.

    Attributes:
        codes: (N, c), keys as stored.
        encoder: from gate inputs (or logits) to queries and codes.
        table: values as stored.
        distances: (S, K) float32, from sampled rows to their nearest rows of other examples.
        scale: the unit of distance: their median.
        hidden_size: d of the gate.
        levels: of `confidence="calibrated"`; None if it was not fitted.
        source: names the content of codes that were opened from a file and are all of it, for indexes that are kept.
    """

    codes: Tensor
    encoder: KeyEncoder
    table: ValueTable
    distances: Tensor
    scale: float
    hidden_size: int
    levels: Levels | None = None
    source: str | None = None

    @classmethod
    def encoded(
        cls,
        x: Table,
        logits: Table,
        values: Table,
        example_ids: Tensor,
        config: KNNMoEConfig,
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

    def measured(self, example_ids: Tensor, config: KNNMoEConfig) -> "LayerRows":
        """With distances and scale of the rows as they are now; levels keep the unit that they were fitted in."""
        found = neighbour_distances(self.stored_keys, example_ids, config.num_neighbors, config.search_max_bytes)
        return replace(self, distances=found, scale=typical(found))

    def select(self, rows: Tensor | slice) -> "LayerRows":
        """Some of the rows, by index, slice or mask (N,); distances and scale are those of all."""
        return replace(self, codes=self.codes[rows], table=self.table.select(rows), source=None)

    @property
    def stored_keys(self) -> StoredKeys:
        """The keys for a search engine."""
        return StoredKeys(self.codes, self.encoder.step, self.source)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.table.num_experts

    @property
    def keys(self) -> Tensor:
        """(N, c) float32, the keys as queries are compared with them."""
        return self.encoder.floats(self.codes)

    @property
    def values(self) -> Tensor:
        """(N, E) float32, the values as they are recalled."""
        return self.table.floats()

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored for this layer but its provenance."""
        return self.codes.nbytes + self.encoder.nbytes + self.table.nbytes + self.distances.nbytes

    def to(self, device: torch.device) -> "LayerRows":
        """What a lookup needs on `device`."""
        return replace(self, codes=self.codes.to(device), encoder=self.encoder.to(device), table=self.table.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """By the names under which they are stored."""
        named = {"keys": self.codes, "distances": self.distances}
        named |= {f"encoder.{name}": tensor for name, tensor in self.encoder.tensors().items()}
        return named | {f"values.{name}": tensor for name, tensor in self.table.tensors().items()}

    @classmethod
    def of_tensors(
        cls, tensors: dict[str, Tensor], hidden_size: int, num_experts: int, of_logits: bool, **known
    ) -> "LayerRows":
        """The reverse of `tensors`."""
        encoder, values = (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in ("encoder.", "values.")
        )
        return cls(
            codes=tensors["keys"],
            encoder=KeyEncoder(of_logits, **encoder),
            table=ValueTable(num_experts, **values),
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
