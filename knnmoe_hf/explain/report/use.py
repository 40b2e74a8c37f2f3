"""What a memory does on text, layer by layer: distances, confidence, experts, and which rows are recalled."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from knnmoe_hf.calibration.observe import Observation, observe
from knnmoe_hf.distributed import ALONE
from knnmoe_hf.evaluation.compare import Comparison, compare
from knnmoe_hf.evaluation.overlap import without_overlap
from knnmoe_hf.evaluation.routing_measures import over_experts
from knnmoe_hf.evaluation.scores import score
from knnmoe_hf.explain.layers import of_event
from knnmoe_hf.lookup.events import LookupEvent
from knnmoe_hf.lookup.observers import watching
from knnmoe_hf.models.attach import attached_memory
from knnmoe_hf.models.hooks import hooked
from knnmoe_hf.models.prepared import AttachedMemory


@dataclass(frozen=True)
class LayerUse:
    """
    What one layer's memory did on T tokens; N rows, E experts, K neighbours.

    Attributes:
        distances: (T, K) float32, to the neighbours, in units of the layer's distance scale.
        confidence: (T,) float32.
        own, mixed: (E,) float64, the mean weight of each expert, of the gate's own routing and of what is used.
        divergence: mean Jensen-Shannon divergence of the two, in nats.
        recalled: (N,) float64, over all tokens the sum of a row's weight times the confidence.
    """

    distances: Tensor
    confidence: Tensor
    own: Tensor
    mixed: Tensor
    divergence: float
    recalled: Tensor


@dataclass(frozen=True)
class TextUse:
    """
    What a memory did on one text.

    Attributes:
        name: of the text.
        is_domain: whether the memory should help on it; else it should do nothing.
        layers: `{layer: LayerUse}`.
        comparison: of the model with the memory and without it.
        observation: with the memory closed, half open and open, for a sweep; None if that was not asked for.
    """

    name: str
    is_domain: bool
    layers: Mapping[int, LayerUse]
    comparison: Comparison
    observation: Observation | None = None


class UseRecorder:
    """Sums up the lookups of a memory; `layers()` is what it has seen."""

    def __init__(self, prepared: AttachedMemory):
        self._prepared = prepared
        self._parts: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in prepared}
        self._recalled = {layer: torch.zeros(len(prepared.memory), dtype=torch.float64) for layer in prepared}

    def see(self, event: LookupEvent) -> None:
        """Takes up a lookup, without its padding."""
        real = event.tokens.real
        count = len(event.confidence)
        places = torch.arange(count) if real is None else real.flatten().cpu().nonzero().squeeze(-1)
        lookup = self._prepared[event.layer]
        found = of_event(event, lookup, places)
        experts = lookup.rows.num_experts
        own = over_experts(found.own_experts, found.own_weights, experts)
        mixed = over_experts(found.mixed_experts, found.mixed_weights, experts)
        parts = (found.distances / lookup.rows.scale, found.confidence, found.divergence)
        self._parts[event.layer].append((*parts, own.sum(dim=0), mixed.sum(dim=0)))
        share = (found.weights * found.confidence[:, None]).double()
        self._recalled[event.layer].index_add_(0, found.rows.flatten().long(), share.flatten())

    def layers(self) -> dict[int, LayerUse]:
        """By layer, of all tokens; layers without any are left out."""
        found = {}
        for layer, parts in self._parts.items():
            if parts:
                distances, confidence, divergence, own, mixed = zip(*parts)
                tokens = sum(map(len, confidence))
                means = (torch.stack(one).sum(dim=0) / tokens for one in (own, mixed))
                mean_divergence = float(torch.cat(divergence).double().mean())
                found[layer] = LayerUse(
                    torch.cat(distances), torch.cat(confidence), *means, mean_divergence, self._recalled[layer]
                )
        return found


@contextmanager
def recording_use(model: nn.Module) -> Iterator[UseRecorder]:
    """Inside this context the lookups of the memory in force are recorded; what the model computes stays as it is."""
    _, prepared = attached_memory(model)
    recorder = UseRecorder(prepared)
    with watching(prepared.values(), recorder.see):
        yield recorder


def recorded_use(model: nn.Module, rows: Sequence[dict], batch_size: int = 8) -> dict[int, LayerUse]:
    """What the memory in force does on rows as `prepare_dataset` returns them, `{layer: LayerUse}`."""
    with recording_use(model) as recorder:
        score(model, rows, batch_size)
    return recorder.layers()


def measure_use(
    model: nn.Module,
    texts: Sequence[tuple[str, bool, Sequence[dict]]],
    batch_size: int = 8,
    progress: str | None = None,
    allow_overlap: bool = False,
) -> list[TextUse]:
    """
    What the memory in force does on some texts: two passes over each to compare, and three for a sweep.

    Args:
        model: the memory's base model, with the memory in force; only read.
        texts: name, whether it is of the memory's domain, and rows as `prepare_dataset` returns them.
        batch_size: examples per forward pass.
        progress: label of a progress bar; None shows none.
        allow_overlap: score also what the memory has among its references.

    Raises:
        ValueError: as `knnmoe_hf.evaluation.compare.compare`.
    """
    found = []
    for name, is_domain, rows in texts:
        with recording_use(model) as recorder:
            comparison = compare(model, rows, batch_size, progress and f"{progress} {name}", allow_overlap)
        observation = _observed(model, rows, batch_size, allow_overlap)
        found.append(TextUse(name, is_domain, recorder.layers(), comparison, observation))
    return found


def _observed(model: nn.Module, rows: Sequence[dict], batch_size: int, allow_overlap: bool) -> Observation | None:
    _, prepared = attached_memory(model)
    rows, _ = without_overlap(prepared.memory, rows, allow_overlap)
    routing = prepared.with_options(replace(prepared.options, recall="routing"))
    with hooked(model):
        return observe(model, routing, {"": rows}, batch_size, ALONE).get("")
