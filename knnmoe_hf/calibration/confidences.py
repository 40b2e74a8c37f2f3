"""How confident a memory is on text, by layer and by token, and what it does to the tokens: for the memory's card."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from knnmoe_hf.data.batches import batches, target_mask
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.evaluation.scores import Scores, join_scores, score_tokens
from knnmoe_hf.lookup.events import LookupEvent
from knnmoe_hf.lookup.observers import watching
from knnmoe_hf.lookup.torch_lookup import TorchLookup
from knnmoe_hf.memory.measurements import ConfidenceBin, LayerConfidence
from knnmoe_hf.models.calls import Overrides
from knnmoe_hf.models.hooks import fixed, using_overrides
from knnmoe_hf.models.modes import evaluating
from knnmoe_hf.models.offload import input_device

_BINS, _FEWEST = 10, 20  # bins at most, and tokens of a bin at least


class Watched(NamedTuple):
    """
    Scores of some text, and how confident the memory was.

    Attributes:
        scores: sums by example.
        nll: (n,) float32, of each target, in nats.
        confidence: (L, n) float32, by layer, in the order of the memory's; L is 0 without one.
    """

    scores: Scores
    nll: Tensor
    confidence: Tensor

    @classmethod
    def nothing(cls) -> "Watched":
        """Of no text."""
        return cls(join_scores([]), torch.zeros(0), torch.zeros(0, 0))


@torch.no_grad()
def score_watched(
    model: nn.Module,
    texts: Mapping[str, Sequence[dict]],
    overrides: Overrides,
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> dict[str, Watched]:
    """
    As `knnmoe_hf.evaluation.scores.score_kinds` with `overrides` in force; it also says how confident they were.

    Args:
        model: only read.
        texts: `{kind: rows}`, rows as `prepare_dataset` returns them.
        overrides: a memory prepared for the model, or none.
        batch_size: examples per forward pass.
        processes: share the batches; all of them call this alike and get the same.
    """
    lookups = [lookup for lookup in overrides.values() if isinstance(lookup, TorchLookup)]
    seen: dict[int, Tensor] = {}

    def see(event: LookupEvent) -> None:
        seen[event.layer] = event.confidence

    def work(item: tuple[str, dict[str, Tensor]]) -> tuple[str, tuple[Scores, Tensor, Tensor]]:
        kind, batch = item
        seen.clear()
        found = score_tokens(model, batch)
        kept = target_mask(batch["labels"], batch["attention_mask"]).flatten()
        confidence = [seen[layer][kept.to(seen[layer].device)].float().cpu() for layer in overrides if layer in seen]
        return kind, (
            found.sums(),
            found.nll,
            torch.stack(confidence) if confidence else torch.zeros(0, len(found.nll)),
        )

    device = input_device(model)
    loader = ((kind, batch) for kind, rows in texts.items() for batch in batches(rows, batch_size, device))
    with using_overrides(model, overrides), watching(lookups, see), fixed(model), evaluating(model):
        done = processes.map(loader, work)
    return {kind: _joined([part for other, part in done if other == kind]) for kind in texts}


def _joined(parts: Sequence[tuple[Scores, Tensor, Tensor]]) -> Watched:
    if not parts:
        return Watched.nothing()
    scores, nll, confidence = zip(*parts)
    return Watched(join_scores(scores), torch.cat(nll), torch.cat(confidence, dim=1))


def layers_of(layers: Sequence[int], references: Watched, background: Iterable[Watched]) -> list[LayerConfidence]:
    """The mean confidence of each layer on held-out references, and on all kinds of background text together."""
    on_references, on_background = _means(layers, [references]), _means(layers, background)
    return [LayerConfidence(*of) for of in zip(layers, on_references, on_background)]


def _means(layers: Sequence[int], texts: Iterable[Watched]) -> list[float | None]:
    known = [text.confidence for text in texts if len(text.confidence) == len(layers) and len(text.nll)]
    if not known:
        return [None] * len(layers)
    return torch.cat(known, dim=1).mean(dim=1).clamp(0, 1).tolist()


def bins_of(base: Iterable[Watched], used: Iterable[Watched]) -> list[ConfidenceBin]:
    """
    The tokens of some texts in at most ten bins of rising confidence, about equally many in each.

    Args:
        base, used: of the same texts, without the memory and with it.

    Returns:
        Nothing if there was no memory to be confident.
    """
    pairs = [(before, after) for before, after in zip(base, used) if len(after.confidence) and len(after.nll)]
    if not pairs:
        return []
    confidence = torch.cat([after.confidence.mean(dim=0) for _, after in pairs])
    change = torch.cat([after.nll.double() - before.nll.double() for before, after in pairs])
    count = max(1, min(_BINS, len(change) // _FEWEST))
    bins = confidence.argsort(stable=True).tensor_split(count)
    return [
        ConfidenceBin(confidence[one].mean().clamp(0, 1).item(), change[one].mean().item(), len(one)) for one in bins
    ]
