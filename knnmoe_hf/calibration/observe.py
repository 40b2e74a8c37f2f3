"""What a memory makes of text, token by token: what a calibration is fitted to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.distributed import Processes
from knnmoe_hf.lookup import mixing
from knnmoe_hf.lookup.confidence import Confidence
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.attach import attached
from knnmoe_hf.models.hooks import RoutingHooks
from knnmoe_hf.models.modes import evaluating
from knnmoe_hf.training.data import batches, target_mask

_CHUNK = 512  # tokens whose distributions are compared at once


@dataclass(frozen=True)
class Observation:
    """
    What a memory makes of n target tokens.

    Attributes:
        means: (n,) by layer, the running similarity while the memory is closed.
        warmup: (n,), see `Tokens.warmup`.
        falls: by layer, how much lower the similarity is in the mean once the memory is open.
        before: mean NLL of the targets while it is closed, in nats.
        rise: (n,) of the target's NLL once the memory is open, in nats.
        divergence: (n,) of the next-token distributions, base against memory: what the NLL is expected to rise by if
            the base model's distribution is right. It is never negative, and less noisy.
    """

    means: dict[int, Tensor]
    warmup: Tensor
    falls: dict[int, float]
    before: float
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


class _Recorder(Confidence):
    """A confidence that trusts every neighbour as far as it is similar, or none, and notes the similarity."""

    def __init__(self, layer: int, scale: float, config: KNNMoEConfig):
        self.layer, self.scale, self.config = layer, scale, config
        self.is_open = True
        self.noted: tuple[Tensor, ...] = ()  # (T,) of the last forward: similarity, its running mean, what is unseen

    def __call__(self, distances: Tensor, tokens: Tokens) -> Tensor:
        similar = mixing.similarity(distances, self.scale, self.config.gamma)
        half_life = self.config.half_life
        self.noted = (
            similar,
            tokens.running_mean(self.layer, similar, half_life),
            tokens.warmup(half_life, similar.device),
        )
        return similar if self.is_open else torch.zeros_like(similar)


@torch.no_grad()
def observe(
    model: nn.Module,
    memory: RoutingMemory,
    texts: Mapping[str, Sequence[dict]],
    batch_size: int,
    processes: Processes,
) -> dict[str, Observation]:
    """
    What a memory makes of text, by kind, with every neighbour trusted as far as it is similar; kinds without a target
    are left out.

    Args:
        model: the memory's base model, which is only read.
        memory: what to observe to.
        texts: rows by kind, as `prepare_dataset` returns them.
        batch_size: examples per forward pass.
        processes: that take turns at the batches; all of them call this alike and hear the same.
    """
    opened = replace(memory)
    opened.config.confidence = "rbf"
    recorders = {layer: _Recorder(layer, stored.scale, memory.config) for layer, stored in memory.layers.items()}

    def work(item: tuple[str, dict[str, Tensor]]) -> tuple[str, tuple[Tensor, ...]]:
        kind, batch = item
        targets = target_mask(batch["labels"], batch["attention_mask"])
        after, similar, _, _ = _forward(model, batch, targets, recorders, is_open=True)
        before, closed, means, warmup = _forward(model, batch, targets, recorders, is_open=False)
        following = batch["labels"].roll(-1, dims=1)[targets][:, None]
        return kind, (means, warmup, closed - similar, *_compared(before, after, following))

    device = model.get_input_embeddings().weight.device
    made = ((kind, batch) for kind, rows in texts.items() for batch in batches(rows, batch_size, device))
    with attached(model, opened), evaluating(model):
        for layer, lookup in RoutingHooks.of(model).current.items():
            lookup.confidence = recorders[layer]
        dealt = processes.map(made, work)
    parts = {name: [noted for kind, noted in dealt if kind == name] for name in texts}
    heard = {kind: _joined(noted, recorders) for kind, noted in parts.items() if noted}
    return {kind: text for kind, text in heard.items() if len(text.rise)}


def _joined(parts: Sequence[tuple[Tensor, ...]], layers: Sequence[int]) -> Observation:
    means, warmup, falls, before, rise, divergence = (torch.cat(part, dim=-1) for part in zip(*parts))
    falls = dict(zip(layers, falls.mean(dim=-1).tolist()))
    return Observation(dict(zip(layers, means)), warmup, falls, before.mean().item(), rise, divergence)


def _forward(
    model: nn.Module, batch: dict[str, Tensor], targets: Tensor, recorders: dict[int, _Recorder], is_open: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of n target tokens: logits (n, V); on the CPU similarities and means (L, n), warmup (n,)."""
    for recorder in recorders.values():
        recorder.is_open = is_open
    call = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits = model(**call).logits[targets]
    kept = targets.flatten().cpu()
    noted = [[tensor.cpu()[kept] for tensor in recorder.noted] for recorder in recorders.values()]
    similar, means, warmup = (list(column) for column in zip(*noted))
    return logits, torch.stack(similar), torch.stack(means), warmup[0]  # the last is the same in every layer


def _compared(before: Tensor, after: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NLL of `following` (n, 1), its rise and the divergence, each (n,) on the CPU, from logits (n, V)."""
    found = [torch.zeros(3, 0)]
    for base, changed, token in zip(*(tensor.split(_CHUNK) for tensor in (before, after, following))):
        base, changed = base.float().log_softmax(dim=-1), changed.float().log_softmax(dim=-1)
        nll, rise = -base.gather(-1, token), (base - changed).gather(-1, token)
        divergence = (base.exp() * (base - changed)).sum(dim=-1, keepdim=True)
        found.append(torch.cat([nll, rise, divergence], dim=-1).T.cpu())
    return torch.cat(found, dim=-1).unbind()
