"""The common part of all builders: a frozen forward pass, then steps on the routing logits.

A builder forces the routing of a batch's target tokens with a routing override on each gate; the model's weights are
never changed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knnmoe_hf.data.batches import IGNORED, target_mask
from knnmoe_hf.lookup.rules import GateOutput, pad_slots
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.calls import Overrides
from knnmoe_hf.models.gates import Gate
from knnmoe_hf.models.hooks import hooked
from knnmoe_hf.models.probe import probe_model


@dataclass(frozen=True)
class OptimizedBatch:
    """
    The rows of a batch: one for each of its n targets.

    Attributes:
        keys: `{layer: (n, d)}`, gate inputs of the frozen pass, in the model's dtype.
        logits: `{layer: (n, E)}` float32, the gate's own logits in the frozen pass.
        optimized: `{layer: (n, E)}` float32, the logits of each example's best step.
        example: (n,) int64, index of the example in the batch.
        position: (n,) int64, index of the token in the padded example.
        nll_before, nll_after: (n,) float32, NLL of the target in nats, in the frozen pass and with `optimized`.
        experts_changed: share of (target, layer) whose set of experts changed, in [0, 1].
    """

    keys: dict[int, Tensor]
    logits: dict[int, Tensor]
    optimized: dict[int, Tensor]
    example: Tensor
    position: Tensor
    nll_before: Tensor
    nll_after: Tensor
    experts_changed: float

    @property
    def tokens_worse(self) -> float:
        """Share of targets whose NLL rose; the sum over an example never rises."""
        return share_worse(self.nll_before, self.nll_after)


class Batch:
    """
    A batch and where its targets are.

    Args:
        inputs: arguments of the model's forward: `input_ids` (B, S) and optionally others, as `attention_mask` (B, S).
        labels: (B, S), -100 where there is no target; there must be at least one.
        example_ids: (B,) int64.

    Attributes:
        example, position: (n,) int64 each, indices of the n tokens that have a target, in (B, S).
        rows: (n,) int64, the same as indices of the flattened B * S tokens.
        next_tokens: (B, P) int64, targets of the last P positions, -100 where there is none. P is as small as
            possible, because the model then computes fewer logits.
    """

    def __init__(self, inputs: Mapping[str, Tensor], labels: Tensor, example_ids: Tensor):
        targets = target_mask(labels, inputs.get("attention_mask"))
        self.inputs, self.example_ids, self.examples = inputs, example_ids.tolist(), len(labels)
        self.example, self.position = targets.nonzero(as_tuple=True)
        self.rows = targets.flatten().nonzero().squeeze(-1)
        first = self.position.min().item()
        self.next_tokens = labels.roll(-1, dims=1).masked_fill(~targets, IGNORED)[:, first:]
        self._has_target = targets[:, first:]

    def nll(self, model: nn.Module) -> Tensor:
        """(n,) float32, NLL of every target in nats, with the overrides that are in force."""
        logits = model(**self.inputs, use_cache=False, logits_to_keep=self.next_tokens.shape[1]).logits  # (B, P, V)
        nll = TokenNLL.apply(logits.flatten(0, 1).float(), self.next_tokens.flatten())
        return nll.view_as(self.next_tokens)[self._has_target]  # indexing the logits instead would copy them

    def per_example(self, nll: Tensor) -> Tensor:
        """Sums of the NLL of targets (n,) over each example, (B,)."""
        return torch.zeros(self.examples, dtype=nll.dtype, device=nll.device).index_add(0, self.example, nll)


class TokenNLL(torch.autograd.Function):
    """
    Cross-entropy per token, whose backward pass overwrites the saved log-probabilities with the gradient.

    It can therefore run backward only once. `F.cross_entropy` allocates two more tensors of the size of the logits in
    its backward pass; filling them takes 5 % of a step.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        """(N,) in nats, from logits (N, V) float32 and targets (N,) int64; not meaningful where the target is -100."""
        targets = targets.clamp_min(0)[:, None]
        log_probabilities = logits.log_softmax(dim=-1)
        ctx.save_for_backward(log_probabilities, targets)
        return -log_probabilities.gather(1, targets).squeeze(1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        """(N, V): the probabilities minus 1 at the target, times the incoming gradient (N,)."""
        log_probabilities, targets = ctx.saved_tensors
        found = log_probabilities.exp_()
        found.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=found.dtype))
        return found.mul_(gradient[:, None]), None


class Best:
    """
    The logits with the lowest NLL so far, for each example of a batch; at first those of the frozen pass.

    All targets of an example are replaced together: the tokens of an example influence each other, so logits from
    different steps would have an NLL that was never measured.

    Attributes:
        logits: `{layer: (n, E)}` float32.
        nll: (n,) float32, NLL of every target with these logits.
    """

    def __init__(self, batch: Batch, nll: Tensor, logits: Mapping[int, Tensor]):
        self.batch, self.nll, self.logits = batch, nll, dict(logits)
        self._total = batch.per_example(nll)

    def keep(self, nll: Tensor, logits: Mapping[int, Tensor]) -> Tensor:
        """Takes over the logits of those examples whose NLL fell; returns which targets are theirs, (n,) bool."""
        total = self.batch.per_example(nll)
        better = total < self._total  # False if the NLL is NaN
        self._total = torch.where(better, total, self._total)
        rows = better[self.batch.example]
        self.nll = torch.where(rows, nll, self.nll)
        for layer, table in logits.items():
            self.logits[layer] = torch.where(rows[:, None].to(table.device), table, self.logits[layer])
        return rows


class ForcedRouting:
    """
    The routing override of one layer during a build.

    In the frozen pass it records the gate's input and logits; in later passes it routes the targets by `forced`.

    Attributes:
        rows: (n,) int64, as in `Batch`.
        key: (n, d), the gate's input in the frozen pass, for the batch's targets.
        logits: (n, E) float32, the gate's own logits in that pass.
        forced: (n, E) float32, the logits that route the targets; None in the frozen pass.
        width: experts per target.
    """

    def __init__(self, gate: Gate):
        self.gate = gate
        self.width = gate.top_k
        self.rows = self.key = self.logits = self.forced = None

    def __call__(self, x: Tensor, output: GateOutput, tokens: Tokens) -> GateOutput | None:
        logits, weights, ids = output
        rows = self.rows.to(x.device)
        if self.forced is None:
            self.key, self.logits = x[rows], logits[rows].float()
            return None
        forced = self.forced.to(logits.dtype)
        new_weights, new_ids = self.gate.rule.to(x.device).routed(forced, self.width, weights.dtype)  # (n, slots)
        slots = new_ids.shape[1]
        return (  # tokens without a target keep the gate's own experts
            logits.index_copy(0, rows, forced),
            pad_slots(weights, slots).index_copy(0, rows, new_weights),
            pad_slots(ids, slots).index_copy(0, rows, new_ids),
        )

    def begin(self, rows: Tensor | None) -> None:
        """Prepares for the frozen pass of a batch with these `rows`; None only frees the last batch's tensors."""
        self.rows, self.width = rows, self.gate.top_k
        self.key = self.logits = self.forced = None


class Builder(ABC):
    """
    Optimises the routing logits of a batch's targets, in all layers jointly, to make the true next tokens likely.

    Each example gets its best logits of all steps, or the gate's own if no step was better: its NLL never rises.

    Args:
        model: the frozen model.
        gates: the gates whose logits are optimised.
        steps: see the subclasses.
    """

    def __init__(self, model: nn.Module, gates: list[Gate], steps: int):
        self.model, self.steps = model, steps
        self.layers = {gate.layer: ForcedRouting(gate) for gate in gates}
        self._overrides = Overrides(self.layers)
        probe_model(model)  # refuses a model whose routing they would not decide
        self._hooked = hooked(model)
        self._hooks = self._hooked.__enter__()

    def close(self) -> None:
        """Takes the builder's hooks off the model, unless they are in use otherwise."""
        self._hooked.__exit__(None, None, None)

    @abstractmethod
    def _improve(self, batch: Batch, best: Best) -> None:
        """Runs the steps; calls `best.keep` with logits and NLL of each pass that ran with the model's own top-k."""

    def optimize(self, inputs: Mapping[str, Tensor], labels: Tensor, example_ids: Tensor) -> OptimizedBatch:
        """Optimises the logits of one batch; for the arguments see `Batch`."""
        batch = Batch(inputs, labels, example_ids)
        for layer in self.layers.values():
            layer.begin(batch.rows)
        with torch.no_grad(), self._hooks.using(self._overrides):
            before = batch.nll(self.model)
            best = Best(batch, before, {index: layer.logits for index, layer in self.layers.items()})
            self._improve(batch, best)
        keys = {index: layer.key for index, layer in self.layers.items()}
        logits = {index: layer.logits for index, layer in self.layers.items()}
        changed = self._experts_changed(best.logits)
        for layer in self.layers.values():
            layer.begin(None)
        return OptimizedBatch(keys, logits, best.logits, batch.example, batch.position, before, best.nll, changed)

    def _measure(self, batch: Batch, logits: Mapping[int, Tensor]) -> Tensor:
        """(n,) NLL of every target when these logits route it, with the model's own top-k."""
        for index, layer in self.layers.items():
            layer.forced, layer.width = logits[index], layer.gate.top_k
        return batch.nll(self.model)

    def _experts_changed(self, best: Mapping[int, Tensor]) -> float:
        changed = [
            (expert_set(layer.gate, layer.logits) != expert_set(layer.gate, best[index])).any(dim=-1).float().mean()
            for index, layer in self.layers.items()
        ]
        return torch.stack([share.cpu() for share in changed]).mean().item()


def share_worse(before: Tensor, after: Tensor) -> float:
    """Share of the targets (n,) whose NLL rose."""
    return (after > before).float().mean().item()


def expert_set(gate: Gate, logits: Tensor) -> Tensor:
    """Ids of the experts that logits (N, E) select, (N, k) in ascending order."""
    return gate.rule.to(logits.device)(logits, gate.top_k)[1].sort(dim=-1).values
