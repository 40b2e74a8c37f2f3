"""Recording which experts the blocks of a model really use: a gate's output after every hook on the gate."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knnmoe_hf.errors import shown
from knnmoe_hf.evaluation.routing_measures import Load, RoutingChange, change_of_routes, load_of_counts
from knnmoe_hf.models.gates import Gate, find_decoder, find_gates
from knnmoe_hf.models.in_force import forget_compiled_graphs
from knnmoe_hf.models.predecessors import CallLayout, named_arguments
from knnmoe_hf.models.probe import is_probing

MAX_TOKENS = 65_536


@dataclass(frozen=True)
class Routes:
    """
    The experts of T tokens in one layer.

    Attributes:
        ids: (T, w) int16; -1 in slots without an expert, which are those of weight 0 as well.
        weights: (T, w) float32, as the block uses them: in many families they do not sum to 1.
        num_experts: E.
    """

    ids: Tensor
    weights: Tensor
    num_experts: int


class RoutingRecord:
    """
    What `record_routing` has seen.

    Attributes:
        max_tokens: tokens whose routes are kept in each layer, the first ones; the load counts all.
        counts: `{layer: (E,) int64}`, how many tokens used each expert.
    """

    def __init__(self, gates: list[Gate], max_tokens: int):
        self.max_tokens = max_tokens
        self.counts = {gate.layer: torch.zeros(gate.num_experts, dtype=torch.int64) for gate in gates}
        self._tokens: dict[int, int] = defaultdict(int)
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {gate.layer: [] for gate in gates}

    @property
    def tokens(self) -> int:
        """Real tokens seen, in the layer that has seen the most."""
        return max(self._tokens.values(), default=0)

    @property
    def routes(self) -> dict[int, Routes]:
        """By layer, the routes of the first `max_tokens` tokens in the order of the calls, padding left out."""
        return {layer: _joined(parts, len(self.counts[layer])) for layer, parts in self._parts.items()}

    def load(self) -> dict[int, Load]:
        """
        By layer, how evenly the experts were used.

        Raises:
            ValueError: if nothing was recorded in a layer.
        """
        self._check_recorded()
        return {layer: load_of_counts(counts) for layer, counts in self.counts.items()}

    def change_to(self, other: "RoutingRecord") -> RoutingChange:
        """
        What another recording of the same tokens routes differently.

        Args:
            other: of the same calls in the same order, and with the same `max_tokens`.

        Raises:
            ValueError: if nothing was recorded in a layer, or if the recordings do not pair.
        """
        for record in (self, other):
            record._check_recorded()
        mine, theirs = (record._sizes() for record in (self, other))
        if mine != theirs or self.max_tokens != other.max_tokens:
            raise ValueError(
                f"recordings of {self.tokens} and {other.tokens} tokens in layers {shown(list(mine))} and "
                f"{shown(list(theirs))} do not pair: record the same calls twice, with the same max_tokens."
            )
        before, after = self.routes, other.routes
        pairs = {layer: (before[layer], after[layer]) for layer in before}
        return change_of_routes({layer: _slots(*pair) for layer, pair in pairs.items()})

    def columns(self, prefix: str = "") -> dict[str, list]:
        """
        The routes as the metrics of `knnmoe_hf.evaluation.metrics` take them.

        Args:
            prefix: of the names, such as `"base_"`.

        Returns:
            `expert_ids` and `expert_weights`, each a list over tokens of lists over layers of lists over experts.
        """
        routes = list(self.routes.values())
        ids, weights = ([getattr(one, name).tolist() for one in routes] for name in ("ids", "weights"))
        return {f"{prefix}expert_ids": list(zip(*ids)), f"{prefix}expert_weights": list(zip(*weights))}

    def add(self, layer: int, weights: Tensor, ids: Tensor, real: Tensor | None) -> None:
        """
        Adds the tokens of a call.

        Args:
            layer: the layer.
            weights, ids: (T, w), slots 1 and 2 of the gate's output.
            real: (T,) bool, False for padding; None if all are real.
        """
        ids, weights = ids.detach().cpu().long(), weights.detach().cpu().float()
        if real is not None:
            ids, weights = ids[real], weights[real]
        counts = self.counts[layer]
        used = (weights != 0) & (ids >= 0) & (ids < len(counts))
        counts += torch.bincount(ids[used], minlength=len(counts))
        room = self.max_tokens - min(self._tokens[layer], self.max_tokens)
        self._tokens[layer] += len(ids)
        if room:
            kept = ids.masked_fill(~used, -1)[:room].short(), weights.masked_fill(~used, 0.0)[:room]
            self._parts[layer].append(kept)

    def _sizes(self) -> dict[int, tuple[int, int]]:
        return {layer: (self._tokens[layer], len(counts)) for layer, counts in self.counts.items()}

    def _check_recorded(self) -> None:
        if missing := [layer for layer in self.counts if not self._tokens[layer]]:
            raise ValueError(
                f"nothing was recorded in layers {shown(missing)}: run the model inside record_routing, in the same "
                "thread, with gates that its blocks call (not those of MXFP4 or hub kernels)."
            )


@contextmanager
def record_routing(model: nn.Module, max_tokens: int = MAX_TOKENS) -> Iterator[RoutingRecord]:
    """
    Inside this context the expert ids and weights that each block gets from its gate are recorded.

    They are those of slots 1 and 2 of the gate's output, after all hooks on the gate, in whatever order memories,
    overrides and hooks were put on the model, also inside the context. What changes slot 0 alone, the logits that
    transformers records, is no change: blocks do not read it. Calls of other threads, what gradient checkpointing
    runs again during a backward pass, and the test forwards of attaching are left out. What the model computes stays
    as it is.

    Args:
        model: of a supported family, plain, PEFT-wrapped or compiled (which is compiled anew).
        max_tokens: tokens whose routes are kept, at 6 bytes for each layer and expert slot.

    Raises:
        UnsupportedModelError: if the model has no gate of a supported family.
        ValueError: for `max_tokens` below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={shown(max_tokens)} is not allowed: use a positive number.")
    gates = find_gates(model)
    decoder = find_decoder(model, gates)
    record = RoutingRecord(gates, max_tokens)
    call = _Call()
    handles = [
        decoder.register_forward_pre_hook(call.begin, with_kwargs=True),
        decoder.register_forward_hook(call.end, always_call=True),
    ]
    for gate in gates:
        handles += _hooks_on(gate, record, call)
    forget_compiled_graphs(model)
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
        forget_compiled_graphs(model)


class _Call:
    """The forward of the decoder that runs in the thread that records; no other counts."""

    def __init__(self):
        self._thread = threading.get_ident()
        self._layout: CallLayout | None = None

    @torch.compiler.disable
    def begin(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._is_here():
            self._layout = CallLayout(named_arguments(args, kwargs), decoder)

    @torch.compiler.disable
    def end(self, *_) -> None:
        if self._is_here():
            self._layout = None

    @property
    def layout(self) -> CallLayout | None:
        """What is known of the tokens; None outside of a forward, and in other threads."""
        return self._layout if self._is_here() else None

    def _is_here(self) -> bool:
        return threading.get_ident() == self._thread and not is_probing()


def _hooks_on(gate: Gate, record: RoutingRecord, call: _Call) -> list:
    hooks = gate.module._forward_hooks

    @torch.compiler.disable
    def returned(_: nn.Module, args: tuple, output: tuple) -> None:
        if call.layout is not None:
            real = call.layout.real
            record.add(gate.layer, output[1], output[2], None if real is None else real.cpu())

    last = gate.module.register_forward_hook(returned)

    @torch.compiler.disable
    def began(*_) -> None:
        # PyTorch reads the list of hooks when the forward has run: hooks that were added meanwhile come first
        hooks.move_to_end(last.id)

    return [last, gate.module.register_forward_pre_hook(began)]


def _joined(parts: list[tuple[Tensor, Tensor]], num_experts: int) -> Routes:
    width = max((ids.shape[1] for ids, _ in parts), default=0)
    empty = torch.zeros(0, width)
    ids = torch.cat([empty.short(), *(_widened(ids, width, -1) for ids, _ in parts)])
    return Routes(ids, torch.cat([empty, *(_widened(weights, width, 0.0) for _, weights in parts)]), num_experts)


def _widened(table: Tensor, width: int, filler: float) -> Tensor:
    return nn.functional.pad(table, (0, width - table.shape[1]), value=filler)


def _slots(before: Routes, after: Routes) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    return before.ids, before.weights, after.ids, after.weights, before.num_experts
