"""What a memory sees and does on text, token by token: the data that a calibration is fitted to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.calibration.votes import VoteRecorder, Votes
from knnmoe_hf.data.batches import batches, target_mask
from knnmoe_hf.distributed import Processes
from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.confidence import Confidence, Number
from knnmoe_hf.lookup.observers import watching
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.attach import AttachedMemory
from knnmoe_hf.models.hooks import using_overrides
from knnmoe_hf.models.modes import evaluating
from knnmoe_hf.models.offload import input_device

_CHUNK = 512  # tokens whose distributions are computed at once


@dataclass(frozen=True)
class Observation:
    """
    What a memory sees and does on n target tokens.

    Attributes:
        means: `{layer: (n,)}`, the running mean similarity while the memory is closed.
        open_means: the same while the memory is open.
        warmup: (n,), see `Tokens.warmup`.
        open_shifts: `{layer: by how much the mean similarity falls once the memory is open}`.
        closed_nll: mean NLL of the targets while the memory is closed, in nats.
        rise: (n,), by how much each target's NLL rises once the memory is open, in nats.
        half_rise: (n,), the same of a memory that is half open, in nats.
        nll: (n,), each target's NLL while the memory is closed, in nats.
        votes: for the next token, while the memory is closed; None if nobody votes.
    """

    means: dict[int, Tensor]
    open_means: dict[int, Tensor]
    warmup: Tensor
    open_shifts: dict[int, float]
    closed_nll: float
    rise: Tensor
    half_rise: Tensor
    nll: Tensor
    votes: Votes | None = None

    def changes(self, opening: Tensor | float) -> Tensor:
        """
        Expected rise of each target's NLL (n,) if the memory opens by `opening` (n,) in [0, 1], in nats.

        The parabola through closed (0), half open and open: what a memory gains falls off as it opens further, what it
        costs elsewhere grows faster than its opening. A straight line would see several times the harm of a memory
        that is a little open.
        """
        start, bend = 4 * self.half_rise - self.rise, 2 * self.rise - 4 * self.half_rise
        return opening * (start + opening * bend)

    def change(self, opening: Tensor | float = 1.0) -> float:
        """The mean over the tokens of what `changes` returns, in nats per token."""
        return self.changes(opening).mean().item()


class _Recorder(Confidence):
    """A confidence that is a set share of the similarity, 0 to 1, and records the similarity of each call."""

    def __init__(self, layer: int, scale: float, gamma: float, half_life: float):
        super().__init__(scale, gamma)
        self.layer, self.half_life = layer, half_life
        self.share = 1.0
        self.recorded: tuple[Tensor, ...] = ()  # (T,) each, of the last call: similarity, its running mean, warmup

    def __call__(self, similar: Number, tokens: Tokens) -> Tensor:
        similar = torch.as_tensor(similar, dtype=torch.float32).reshape(-1)
        mean = tokens.running_mean(self.layer, similar, self.half_life)
        self.recorded = similar, mean, tokens.warmup(self.half_life, like=similar)
        return self.share * similar


@torch.no_grad()
def observe(
    model: nn.Module,
    memory: AttachedMemory,
    texts: Mapping[str, Sequence[dict]],
    batch_size: int,
    processes: Processes,
    num_voters: int | None = None,
) -> dict[str, Observation]:
    """
    What a memory sees and does on text, by kind; kinds without a target token are left out.

    Args:
        model: the memory's base model, which is only read.
        memory: prepared for the model; its own confidences are not used.
        texts: `{kind: rows}`, rows as `prepare_dataset` returns them.
        batch_size: examples per forward pass.
        processes: that take turns at the batches; all of them call this alike and get the same.
        num_voters: how many neighbours of the last layer vote for the next token; None for no votes.
    """
    options = memory.options
    recorders = {
        layer: _Recorder(layer, lookup.rows.scale, options.gamma, options.half_life)
        for layer, lookup in memory.items()
    }
    votes = VoteRecorder(memory.with_confidences(recorders), num_voters)

    def work(item: tuple[str, dict[str, Tensor]]) -> tuple[str, tuple[Tensor, ...]]:
        kind, batch = item
        targets = target_mask(batch["labels"], batch["attention_mask"])
        following = batch["labels"].roll(-1, dims=1)[targets][:, None]
        opened, similar, open_means, _ = _forward(model, batch, following, targets, recorders, share=1.0)
        half, *_ = _forward(model, batch, following, targets, recorders, share=0.5)
        closed, undisturbed, means, warmup = _forward(model, batch, following, targets, recorders, share=0.0)
        of_last = undisturbed[list(recorders).index(votes.layer)]
        rises, voted = (closed, opened - closed, half - closed), votes.read(targets, following)
        return kind, (means, open_means, warmup, undisturbed - similar, *rises, voted, of_last)

    device = input_device(model)
    work_items = ((kind, batch) for kind, rows in texts.items() for batch in batches(rows, batch_size, device))
    with using_overrides(model, votes.overrides), watching([votes.lookup], votes.see), evaluating(model):
        done = processes.map(work_items, work)
    parts = {name: [found for kind, found in done if kind == name] for name in texts}
    observations = {kind: _joined(found, recorders, votes.layer) for kind, found in parts.items() if found}
    return {kind: observation for kind, observation in observations.items() if len(observation.rise)}


class Observed(NamedTuple):
    """
    What a calibration is fitted to.

    Attributes:
        references: observation of held-out references, by the memory without them.
        kinds: of background text, by kind.
        excluded: kinds that the memory helps on.
        held: the held-out references.
        rest: the memory without them.
    """

    references: Observation
    kinds: dict[str, Observation]
    excluded: list[str]
    held: Sequence[dict]
    rest: AttachedMemory


def observe_all(
    model: nn.Module,
    prepared: AttachedMemory,
    texts: Mapping[str, Sequence[dict]],
    batch_size: int,
    processes: Processes,
    num_voters: int | None,
) -> Observed | str:
    """The observations (arguments as of `observe`); where there are none, a clause that says what is missing."""
    if not len(prepared.memory):
        return "there are no rows to calibrate, which max_rows and min_gain left out"
    held = hold_out(prepared.memory)
    observed = observe(model, prepared, texts, batch_size, processes, num_voters) if held is not None else {}
    if not observed:
        what = "is no background text" if held is not None else "are no references that can be held out"
        if (known := prepared.memory.provenance) is None or not known.has_text:
            what = "is no text of the references, which provenance='ids' and 'none' leave out,"
        return f"there {what} to calibrate by"
    kinds = {kind: observation for kind, observation in observed.items() if observation.rise.mean() > 0}
    if not kinds:
        return f"the memory helps on all background text ({shown(list(observed))})"
    rest = prepared.with_rows_of(prepared.memory.take(held.rest))
    of_held = observe(model, rest, {"references": held.rows}, batch_size, processes, num_voters)
    excluded = [kind for kind in observed if kind not in kinds]
    return Observed(of_held["references"], kinds, excluded, held.rows, rest)


def _joined(parts: Sequence[tuple[Tensor, ...]], layers: Iterable[int], last: int) -> Observation:
    means, open_means, warmup, shifts, nll, *rises, votes, similar = (torch.cat(part, dim=-1) for part in zip(*parts))
    shifts = dict(zip(layers, shifts.mean(dim=-1).tolist()))
    by_layer = (dict(zip(layers, of_layers)) for of_layers in (means, open_means))
    voted = Votes.of(last, similar, votes)
    return Observation(*by_layer, warmup, shifts, nll.mean().item(), *rises, nll, voted)


def _forward(
    model: nn.Module,
    batch: dict[str, Tensor],
    following: Tensor,
    targets: Tensor,
    recorders: dict[int, _Recorder],
    share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """On the CPU, of n target tokens: NLL (n,), similarities and running means (L, n), and warmup (n,)."""
    for recorder in recorders.values():
        recorder.share = share
    call = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits = model(**call).logits[targets]
    kept = targets.flatten().cpu()
    recorded = [[tensor.cpu()[kept] for tensor in recorder.recorded] for recorder in recorders.values()]
    similar, means, warmup = (list(column) for column in zip(*recorded))
    return _nll(logits, following), torch.stack(similar), torch.stack(means), warmup[0]  # the same in every layer


def _nll(logits: Tensor, following: Tensor) -> Tensor:
    """NLL (n,) on the CPU of `following` (n, 1), from logits (n, V)."""
    found = [torch.zeros(0)]
    for part, token in zip(logits.split(_CHUNK), following.split(_CHUNK)):
        found.append(-part.float().log_softmax(dim=-1).gather(-1, token).flatten().cpu())
    return torch.cat(found)
