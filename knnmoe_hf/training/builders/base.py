"""What every builder does with a batch: the frozen pass, the steps, each example's best one. Weights are only read."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knnmoe_hf.lookup.rules import GateOutput, pad_slots
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.attach import attach_override, detach_memory
from knnmoe_hf.models.gates import Gate
from knnmoe_hf.models.hooks import RoutingHooks
from knnmoe_hf.training.data import IGNORED, target_mask


@dataclass(frozen=True)
class OptimizedBatch:
    """
    One row for each of a batch's n targets.

    Attributes:
        keys: `{layer: (n, d)}`, gate inputs of the frozen pass, in the model's dtype.
        logits: `{layer: (n, E)}` float32, the gate's own.
        optimized: `{layer: (n, E)}` float32, those of each example's best step.
        example: (n,) int64, index in the batch.
        position: (n,) int64, the token of the example.
        nll_before, nll_after: (n,) float32, NLL of the target in nats, frozen and with the optimised logits.
        experts_changed: share of (target, layer) whose set of experts changed.
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
        """Share of targets whose NLL is higher than frozen; their example's is not."""
        return share_worse(self.nll_before, self.nll_after)


class Batch:
    """
    A batch as a builder needs it.

    Args:
        inputs: arguments of the model's forward, with `input_ids` (B, S) and maybe `attention_mask` (B, S).
        labels: (B, S), -100 where there is no target; there must be at least one.
        example_ids: (B,) int64, the examples' names.

    Attributes:
        example, position: (n,) int64 each, where the n targets are.
        rows: (n,) int64, the same among the B * S tokens.
        following: (B, P) int64, the next tokens of the last P positions, -100 where there is no target.
    """

    def __init__(self, inputs: Mapping[str, Tensor], labels: Tensor, example_ids: Tensor):
        targets = target_mask(labels, inputs.get("attention_mask"))
        self.inputs, self.example_ids, self.examples = inputs, example_ids.tolist(), len(labels)
        self.example, self.position = targets.nonzero(as_tuple=True)
        self.rows = targets.flatten().nonzero().squeeze(-1)
        first = self.position.min().item()  # no logits are needed before
        self.following = labels.roll(-1, dims=1).masked_fill(~targets, IGNORED)[:, first:]
        self._chosen = targets[:, first:]

    def nll(self, model: nn.Module) -> Tensor:
        """(n,) float32, NLL of every target in nats, as the model routes now."""
        logits = model(**self.inputs, use_cache=False, logits_to_keep=self.following.shape[1]).logits  # (B, P, V)
        nll = TokenNLL.apply(logits.flatten(0, 1).float(), self.following.flatten())
        return nll.view_as(self.following)[self._chosen]  # chosen of the NLL: of the logits it would be a copy of all

    def per_example(self, nll: Tensor) -> Tensor:
        """(B,) sums of (n,)."""
        return torch.zeros(self.examples, dtype=nll.dtype, device=nll.device).index_add(0, self.example, nll)


class TokenNLL(torch.autograd.Function):
    """
    Cross-entropy by token whose backward pass works in the memory of its forward pass; it can run once.

    `F.cross_entropy` allocates two more tables of all logits there, and filling them takes a twentieth of a step.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        """(N,) in nats, from (N, V) float32 and (N,) int64; where the target is -100 it is of no account."""
        targets = targets.clamp_min(0)[:, None]
        log_probabilities = logits.log_softmax(dim=-1)
        ctx.save_for_backward(log_probabilities, targets)
        return -log_probabilities.gather(1, targets).squeeze(1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        """(N, V): the probabilities, less 1 at the target."""
        log_probabilities, targets = ctx.saved_tensors
        found = log_probabilities.exp_()
        found.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=found.dtype))
        return found.mul_(gradient[:, None]), None


class Best:
    """
    The best measured state of each example of a batch; the frozen one to begin with.

    An example as a whole is kept or not: its tokens act on each other, so only the NLL of a state that ran is true.

    Attributes:
        logits: `{layer: (n, E)}` float32.
        nll: (n,) float32, of every target under these logits.
    """

    def __init__(self, batch: Batch, nll: Tensor, logits: Mapping[int, Tensor]):
        self.batch, self.nll, self.logits = batch, nll, dict(logits)
        self._total = batch.per_example(nll)

    def keep(self, nll: Tensor, logits: Mapping[int, Tensor]) -> Tensor:
        """Takes the examples that are better now; returns the rows that are theirs, (n,) bool."""
        total = self.batch.per_example(nll)
        better = total < self._total  # false for NaN
        self._total = torch.where(better, total, self._total)
        rows = better[self.batch.example]
        self.nll = torch.where(rows, nll, self.nll)
        for layer, table in logits.items():
            self.logits[layer] = torch.where(rows[:, None].to(table.device), table, self.logits[layer])
        return rows


class ForcedRouting:
    """
    The routing override of one layer during a build: records what the frozen gate sees, then routes by `forced`.

    Attributes:
        key: (n, d), the gate's input in the frozen pass, at the batch's targets.
        logits: (n, E) float32, the gate's own in that pass.
        forced: (n, E) float32, the logits that the targets are routed by; None to record `key` and `logits`.
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
        new_weights, new_ids = self.experts(forced)
        slots = new_ids.shape[1]
        return (  # tokens that are no targets keep their own experts
            logits.index_copy(0, rows, forced),
            pad_slots(weights, slots).index_copy(0, rows, new_weights),
            pad_slots(ids, slots).index_copy(0, rows, new_ids),
        )

    def experts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids, (n, slots) each, for the targets' logits (n, E)."""
        return self.gate.rule(logits, self.width)

    def begin(self, rows: Tensor | None) -> None:
        """Resets for the frozen pass of a batch whose targets are in these rows (n,)."""
        self.rows, self.width = rows, self.gate.top_k
        self.key = self.logits = self.forced = None


class Builder(ABC):
    """
    Finds logits for the targets of a batch, all layers jointly, that make the true next tokens likely.

    `Best` is told of every state that was measured; no example ends with a higher NLL than frozen.

    Args:
        model: the frozen model.
        gates: those whose logits are optimised.
        steps: passes over each batch between the frozen one and the last.
    """

    forced_routing = ForcedRouting
    _NAME = "knnmoe builder"  # of its overrides on the model

    def __init__(self, model: nn.Module, gates: list[Gate], steps: int):
        self.model, self.steps = model, steps
        self.layers = {gate.layer: self.forced_routing(gate) for gate in gates}
        hooks = RoutingHooks.of(model)
        active = hooks.active if hooks is not None else None
        attach_override(model, self.layers, self._NAME)
        self._hooks = RoutingHooks.of(model)
        self._hooks.active = active  # the builder's overrides are in force only while a batch is optimised
        self._hooks.select()

    def close(self) -> None:
        """Takes the builder's overrides off the model."""
        detach_memory(self.model, self._NAME)

    @abstractmethod
    def _improve(self, batch: Batch, best: Best) -> None:
        """Runs the steps and tells `best` of the states that were measured under the model's own rule and width."""

    def optimize(self, inputs: Mapping[str, Tensor], labels: Tensor, example_ids: Tensor) -> OptimizedBatch:
        """Arguments are those of `Batch`."""
        batch = Batch(inputs, labels, example_ids)
        for layer in self.layers.values():
            layer.begin(batch.rows)
        with torch.no_grad(), self._hooks.using(self._hooks.named[self._NAME]):
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
        """(n,) NLL of every target when it is routed by these logits, under the model's own rule and width."""
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
    """(n, k) ids in ascending order."""
    return logits.topk(gate.top_k, dim=-1).indices.sort(dim=-1).values
