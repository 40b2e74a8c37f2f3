"""Fits the constants of `confidence="calibrated"`: what the references look like to a memory, what ordinary text does,
and how far the memory may open in between.

Only reads the model: one pass over held-out references and ordinary text with the memory wide open, one without it.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from knnmoe_hf import mixing
from knnmoe_hf.attach import attached, disable_memory
from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import shown
from knnmoe_hf.hooks import RoutingHooks
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.held_out import hold_out
from knnmoe_hf.memory.rows import Levels
from knnmoe_hf.modes import evaluating
from knnmoe_hf.sequence import Tokens
from knnmoe_hf.training.data import collate, target_mask

logger = logging.getLogger(__name__)

MEAN_HARM, WORST_HARM = 0.004, 0.008
"""Nats per token that a calibrated memory may cost on ordinary text: in the mean of its kinds, and on any of them."""
_THRESHOLDS = [round(0.8 + 0.05 * step, 2) for step in range(15)]  # lower ones open on text that was not shown
_WIDTH = 0.08
_LEAST_GAP = 0.02  # between the levels of a layer that does not tell text apart, as a share of its own level
_BATCH = 8


@dataclass(frozen=True)
class Calibration:
    """
    What was found.

    Attributes:
        threshold: the lowest that keeps the bounds, on the way from ordinary text (0) to the references (1).
        gain: what the memory is expected to gain on held-out references, in nats per token.
        open_gain: the same of a memory that is always open.
        harm: what it is expected to cost, by kind of ordinary text.
        excluded: kinds of text that the open memory helps on, so that they count as its domain.
    """

    threshold: float
    gain: float
    open_gain: float
    harm: dict[str, float]
    excluded: list[str]


@dataclass(frozen=True)
class _Heard:
    """
    What an open memory does to n target tokens.

    Attributes:
        means: (n,) by layer, the running similarity.
        rise: (n,) of the target's NLL, in nats.
        divergence: (n,) of the next-token distributions, base against memory: what the NLL is expected to rise by if
            the base model's distribution is right. It is never negative, and less noisy.
    """

    means: dict[int, Tensor]
    rise: Tensor
    divergence: Tensor

    def change(self, gate: Tensor | float = 1.0) -> float:
        """
        Expected rise of the NLL under a gate (n,), in nats per token.

        The rise itself is noisy on little text; the share of it in the divergence of the open memory makes a second
        estimate. The lesser counts: text that looks like the domain diverges without harm.
        """
        share = self.rise.mean() / self.divergence.mean().clamp_min(1e-9)
        return min((gate * self.rise).mean(), share.clamp(0, 1) * (gate * self.divergence).mean()).item()


def calibrate(
    model: nn.Module, memory: RoutingMemory, ordinary: Mapping[str, Sequence[dict]]
) -> tuple[RoutingMemory, Calibration | None]:
    """
    Fits each layer's levels and the threshold of `confidence="calibrated"`.

    The last references are held out for the fit (they stay in the memory); a few before them are left out as well, as
    neighbours in a data set are often of one document.

    Args:
        model: the memory's base model; its weights are only read, memories attached to it are out of force meanwhile.
        memory: with provenance.
        ordinary: rows as `prepare_dataset` returns them, by kind of text; the memory should do nothing there.

    Returns:
        A memory with `levels`, and what was found; the memory as it is and None, with a warning, if there are too few
        references to hold any out or no ordinary text is left that the memory does not help on.
    """
    held, heard = hold_out(memory), {}
    if held is not None:
        heard = {kind: _listen(model, memory, rows) for kind, rows in ordinary.items() if len(rows)}
        heard = {kind: text for kind, text in heard.items() if len(text.rise)}
    if not heard:
        what = "ordinary text" if held is not None else "references that can be held out"
        logger.warning("there are no %s to calibrate by: confidence='calibrated' falls back to 'context'", what)
        return memory, None
    own = _listen(model, memory.take(held.rest), held.rows)
    excluded = [kind for kind, text in heard.items() if text.rise.mean() <= 0]
    kinds = {kind: text for kind, text in heard.items() if kind not in excluded}
    if not kinds:
        said = "the memory helps on all ordinary text (%s): confidence='calibrated' falls back to 'context'"
        logger.warning(said, shown(excluded))
        return memory, None
    levels = _levels(own, list(kinds.values()))
    threshold, harm = _lowest(levels, kinds)
    levels = {layer: replace(level, threshold=threshold) for layer, level in levels.items()}
    found = Calibration(threshold, -own.change(_gate(levels, own)), -own.change(), harm, excluded)
    logger.info("calibrated: %s", found)
    fitted = copy.copy(memory)
    fitted.layers = {layer: replace(rows, levels=levels[layer]) for layer, rows in memory.layers.items()}
    return fitted, found


class _Listener:
    """A confidence that trusts every neighbour as far as it is similar, and notes the running similarity."""

    def __init__(self, layer: int, scale: float, config: KNNMoEConfig):
        self.layer, self.scale, self.config = layer, scale, config
        self.mean: Tensor | None = None  # (T,) of the last forward

    def __call__(self, distances: Tensor, tokens: Tokens) -> Tensor:
        similar = mixing.similarity(distances, self.scale, self.config.gamma)
        self.mean = tokens.running_mean(self.layer, similar, self.config.half_life)
        return similar


@torch.no_grad()
def _listen(model: nn.Module, memory: RoutingMemory, rows: Sequence[dict]) -> _Heard:
    opened = copy.copy(memory)
    opened.config = copy.deepcopy(memory.config)
    opened.config.confidence = "rbf"
    listeners = {layer: _Listener(layer, stored.scale, memory.config) for layer, stored in memory.layers.items()}
    means, rises, divergences = {layer: [] for layer in listeners}, [], []
    with attached(model, opened), evaluating(model):
        for layer, lookup in RoutingHooks.of(model).current.items():
            lookup.confidence = listeners[layer]
        for batch in _batches(model, rows):
            labels, mask = batch["labels"], batch["attention_mask"]
            targets = target_mask(labels, mask)
            call = dict(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
            after = model(**call).logits[targets].float().log_softmax(dim=-1)
            with disable_memory(model):
                before = model(**call).logits[targets].float().log_softmax(dim=-1)
            divergences.append((before.exp() * (before - after)).sum(dim=-1).cpu())
            following = labels.roll(-1, dims=1)[targets][:, None]
            rises.append((before - after).gather(-1, following).squeeze(-1).cpu())
            for layer, listener in listeners.items():
                means[layer].append(listener.mean[targets.flatten().to(listener.mean.device)].cpu())
    return _Heard(
        {layer: torch.cat(parts) for layer, parts in means.items()}, torch.cat(rises), torch.cat(divergences)
    )


def _batches(model: nn.Module, rows: Sequence[dict]) -> Iterator[dict[str, Tensor]]:
    device = model.get_input_embeddings().weight.device
    for start in range(0, len(rows), _BATCH):
        batch = collate([rows[i] for i in range(start, min(start + _BATCH, len(rows)))])
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _levels(own: _Heard, kinds: list[_Heard]) -> dict[int, Levels]:
    """Between the references and the kind of ordinary text that is most like them, by layer; the threshold is 0."""
    levels = {}
    for layer, series in own.means.items():
        mean, own_spread = _moments(series)
        nearest, spread = max(_moments(kind.means[layer]) for kind in kinds)
        gap = max(mean - nearest, _LEAST_GAP * mean, 1e-6)
        weight = max(gap * gap / max(own_spread + spread, 1e-9), 1e-6)  # how well it tells the two apart
        levels[layer] = Levels(mean, mean - gap, weight, 0.0, _WIDTH)
    return levels


def _moments(series: Tensor) -> tuple[float, float]:
    return series.mean().item(), series.var(correction=0).item()


def _gate(levels: dict[int, Levels], heard: _Heard) -> Tensor:
    """(n,) how far the memory opens for each token, in the mean of its layers."""
    evidence, weight, gates = 0.0, 0.0, []
    for layer, level in levels.items():
        evidence = evidence + level.weight * (heard.means[layer] - level.ordinary) / (level.own - level.ordinary)
        weight += level.weight
        gates.append(torch.sigmoid((evidence / weight - level.threshold) / level.width))
    return torch.stack(gates).mean(dim=0)


def _lowest(levels: dict[int, Levels], kinds: Mapping[str, _Heard]) -> tuple[float, dict[str, float]]:
    """The lowest threshold within the bounds, and the harm expected at it."""
    for threshold in _THRESHOLDS:
        raised = {layer: replace(level, threshold=threshold) for layer, level in levels.items()}
        harm = {kind: text.change(_gate(raised, text)) for kind, text in kinds.items()}
        if max(harm.values()) <= WORST_HARM and sum(harm.values()) <= MEAN_HARM * len(harm):
            return threshold, harm
    logger.warning("no threshold up to %s keeps the harm on ordinary text within bounds", threshold)
    return threshold, harm
