"""What a memory sees and does on text, token by token: the data that a calibration is fitted to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knnmoe_hf.calibration.votes import Ballot, Votes
from knnmoe_hf.data.batches import batches, target_mask
from knnmoe_hf.distributed import Processes
from knnmoe_hf.lookup.confidence import Confidence, Number
from knnmoe_hf.lookup.observers import watching
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.attach import AttachedMemory
from knnmoe_hf.models.hooks import using_overrides
from knnmoe_hf.models.modes import evaluating
from knnmoe_hf.models.offload import input_device

_CHUNK = 512  # tokens whose distributions are compared at once


@dataclass(frozen=True)
class Observation:
    """
    What a memory sees and does on n target tokens.

    Attributes:
        means: `{layer: (n,)}`, the running mean similarity while the memory is closed.
        warmup: (n,), see `Tokens.warmup`.
        open_shifts: `{layer: by how much the mean similarity falls once the memory is open}`.
        closed_nll: mean NLL of the targets while the memory is closed, in nats.
        rise: (n,), by how much each target's NLL rises once the memory is open, in nats.
        divergence: (n,), KL divergence of the next-token distributions, closed against open, in nats: the expected
            rise if the base model's distribution is right. It is never negative, and less noisy than `rise`.
        nll: (n,), each target's NLL while the memory is closed, in nats.
        votes: for the next token, while the memory is closed; None if nobody votes.
    """

    means: dict[int, Tensor]
    warmup: Tensor
    open_shifts: dict[int, float]
    closed_nll: float
    rise: Tensor
    divergence: Tensor
    nll: Tensor
    votes: Votes | None = None

    def change(self, opening: Tensor | float = 1.0) -> float:
        """
        Expected rise of the NLL if the memory opens by `opening` (n,) in [0, 1], in nats per token.

        The rise itself is noisy on little text; the divergence, scaled to the same mean, gives a second estimate. The
        smaller counts: on text that looks like the domain the distributions differ without harm.
        """
        share = self.rise.mean() / self.divergence.mean().clamp_min(1e-9)
        return min((opening * self.rise).mean(), share.clamp(0, 1) * (opening * self.divergence).mean()).item()


class _Recorder(Confidence):
    """A confidence that opens the memory by the similarity itself, or not at all, and records the similarity."""

    def __init__(self, layer: int, scale: float, gamma: float, half_life: float):
        super().__init__(scale, gamma)
        self.layer, self.half_life = layer, half_life
        self.is_open = True
        self.recorded: tuple[Tensor, ...] = ()  # (T,) each, of the last call: similarity, its running mean, warmup

    def __call__(self, similar: Number, tokens: Tokens) -> Tensor:
        similar = torch.as_tensor(similar, dtype=torch.float32).reshape(-1)
        mean = tokens.running_mean(self.layer, similar, self.half_life)
        self.recorded = similar, mean, tokens.warmup(self.half_life, like=similar)
        return similar if self.is_open else torch.zeros_like(similar)


@torch.no_grad()
def observe(
    model: nn.Module,
    memory: AttachedMemory,
    texts: Mapping[str, Sequence[dict]],
    batch_size: int,
    processes: Processes,
    voters: int | None = None,
) -> dict[str, Observation]:
    """
    What a memory sees and does on text, by kind; kinds without a target token are left out.

    Args:
        model: the memory's base model, which is only read.
        memory: prepared for the model; its own confidences are not used.
        texts: `{kind: rows}`, rows as `prepare_dataset` returns them.
        batch_size: examples per forward pass.
        processes: that take turns at the batches; all of them call this alike and get the same.
        voters: how many neighbours of the last layer vote for the next token, if the memory knows them; None for none.
    """
    options = memory.options
    recorders = {
        layer: _Recorder(layer, lookup.rows.scale, options.gamma, options.half_life)
        for layer, lookup in memory.items()
    }

    ballot = Ballot(memory.with_confidences(recorders), voters)

    def work(item: tuple[str, dict[str, Tensor]]) -> tuple[str, tuple[Tensor, ...]]:
        kind, batch = item
        targets = target_mask(batch["labels"], batch["attention_mask"])
        opened, similar, _, _ = _forward(model, batch, targets, recorders, is_open=True)
        closed, undisturbed, means, warmup = _forward(model, batch, targets, recorders, is_open=False)
        following = batch["labels"].roll(-1, dims=1)[targets][:, None]
        votes = ballot.read(targets, following)
        of_last = undisturbed[list(recorders).index(ballot.layer)]
        return kind, (means, warmup, undisturbed - similar, *_compared(closed, opened, following), votes, of_last)

    device = input_device(model)
    work_items = ((kind, batch) for kind, rows in texts.items() for batch in batches(rows, batch_size, device))
    with using_overrides(model, ballot.overrides), watching(ballot.lookups, ballot.see), evaluating(model):
        done = processes.map(work_items, work)
    parts = {name: [found for kind, found in done if kind == name] for name in texts}
    observations = {kind: _joined(found, recorders, ballot.layer) for kind, found in parts.items() if found}
    return {kind: observation for kind, observation in observations.items() if len(observation.rise)}


def _joined(parts: Sequence[tuple[Tensor, ...]], layers: Iterable[int], last: int) -> Observation:
    means, warmup, shifts, nll, rise, divergence, votes, similar = (torch.cat(part, dim=-1) for part in zip(*parts))
    shifts = dict(zip(layers, shifts.mean(dim=-1).tolist()))
    voted = Votes.of(last, similar, votes)
    return Observation(dict(zip(layers, means)), warmup, shifts, nll.mean().item(), rise, divergence, nll, voted)


def _forward(
    model: nn.Module, batch: dict[str, Tensor], targets: Tensor, recorders: dict[int, _Recorder], is_open: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of n target tokens: logits (n, V); on the CPU similarities and running means (L, n) and warmup (n,)."""
    for recorder in recorders.values():
        recorder.is_open = is_open
    call = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits = model(**call).logits[targets]
    kept = targets.flatten().cpu()
    recorded = [[tensor.cpu()[kept] for tensor in recorder.recorded] for recorder in recorders.values()]
    similar, means, warmup = (list(column) for column in zip(*recorded))
    return logits, torch.stack(similar), torch.stack(means), warmup[0]  # warmup is the same in every layer


def _compared(closed: Tensor, opened: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NLL of `following` (n, 1), its rise and the divergence, each (n,) on the CPU, from logits (n, V)."""
    found = [torch.zeros(3, 0)]
    for base, changed, token in zip(*(tensor.split(_CHUNK) for tensor in (closed, opened, following))):
        base, changed = base.float().log_softmax(dim=-1), changed.float().log_softmax(dim=-1)
        nll, rise = -base.gather(-1, token), (base - changed).gather(-1, token)
        divergence = (base.exp() * (base - changed)).sum(dim=-1, keepdim=True)
        found.append(torch.cat([nll, rise, divergence], dim=-1).T.cpu())
    return torch.cat(found, dim=-1).unbind()
