"""A memory's lookups by themselves, taken apart into their steps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measuring import growth, median, repeated
from knnmoe_hf.lookup import mixing
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.lookup.torch_lookup import LayerLookup
from knnmoe_hf.models.gates import find_gates, gate_logits
from knnmoe_hf.models.hooks import GateOutput, RoutingHooks
from knnmoe_hf.search import Neighbors

STEPS = ("encode", "search", "confidence and mix", "route")


class Alone:
    """
    The lookups of the memory in force, one layer after the other as in a forward, on inputs that the model had.

    Args:
        model: with a memory.
        inputs: `{layer: (T, d)}`, as its gates got them.
    """

    def __init__(self, model: nn.Module, inputs: dict[int, Tensor]):
        self.lookups: list[LayerLookup] = list(RoutingHooks.of(model).current.values())
        self.device, self.inputs, self.routes = model.device, inputs, {}
        for gate in find_gates(model):
            logits = gate_logits(gate, inputs[gate.layer]).to(inputs[gate.layer].dtype)
            self.routes[gate.layer] = (logits, *gate.rule(logits, gate.top_k))
        self.tokens = len(next(iter(inputs.values())))

    def _parts(self, lookup: LayerLookup, start: int, batch: int) -> tuple[Tensor, GateOutput]:
        some = slice(start, start + batch)
        return self.inputs[lookup.layer][some], tuple(table[some] for table in self.routes[lookup.layer])

    def _each(self, batch: int, run: Callable, layers: int | None = None) -> Callable[[], None]:
        """A call that runs through the layers on a batch, and on the next batch when it is called again."""
        starts = [start for start in range(0, self.tokens - batch + 1, batch)]
        calls = 0

        def once() -> None:
            nonlocal calls
            tokens, start = Tokens(1, batch), starts[calls % len(starts)]
            calls += 1
            for lookup in self.lookups[:layers]:
                run(lookup, *self._parts(lookup, start, batch), tokens)

        return once

    @torch.no_grad()
    def whole(self, batch: int, seconds: float, layers: int | None = None) -> float:
        """Microseconds of a layer's lookup, or of the first layers' together."""
        spent = median(
            repeated(self._each(batch, lambda lookup, *given: lookup(*given), layers), self.device, seconds)
        )
        return 1e6 * spent / (len(self.lookups) if layers is None else 1)

    @torch.no_grad()
    def steps(self, batch: int, seconds: float) -> dict[str, float]:
        """
        Microseconds of each step of a layer's lookup; each runs by itself, on what the one before it would give.

        A token by itself takes two compiled calls instead, which are not taken apart.
        """
        known: dict[tuple[int, int], tuple[Tensor, Neighbors]] = {}
        for start in range(0, self.tokens - batch + 1, batch):
            for lookup in self.lookups:
                x, routes = self._parts(lookup, start, batch)
                query = _query(lookup, x, routes)
                found = lookup.engine.search(query, lookup.config.num_neighbors)
                known[lookup.layer, x.data_ptr()] = query, found

        def encode(lookup: LayerLookup, x: Tensor, routes: GateOutput, tokens: Tokens) -> None:
            _query(lookup, x, routes)

        def search(lookup: LayerLookup, x: Tensor, routes: GateOutput, tokens: Tokens) -> None:
            lookup.engine.search(known[lookup.layer, x.data_ptr()][0], lookup.config.num_neighbors)

        def mix(lookup: LayerLookup, x: Tensor, routes: GateOutput, tokens: Tokens) -> None:
            found = known[lookup.layer, x.data_ptr()][1]
            lam = lookup.confidence(found.distances, tokens)
            mixing.mix_logits(routes[0], lookup.recall(lookup.compiled_for(x, routes[0]), found), lam)

        def route(lookup: LayerLookup, x: Tensor, routes: GateOutput, tokens: Tokens) -> None:
            lookup.rule(routes[0], lookup.width)

        found = {}
        for name, run in zip(STEPS, (encode, search, mix, route)):
            found[name] = 1e6 * median(repeated(self._each(batch, run), self.device, seconds)) / len(self.lookups)
        return found


def _query(lookup: LayerLookup, x: Tensor, routes: GateOutput) -> Tensor:
    return (lookup.compiled_for(x, routes[0]) or lookup.rows.encoder).query(x, routes[0])


def measure(model: nn.Module, inputs: dict[int, Tensor], batches: list[int], seconds: float) -> dict:
    """Of the memory in force: each batch size's microseconds a layer, in steps; growth with batch and layers."""
    alone = Alone(model, inputs)
    batches = [batch for batch in batches if batch <= alone.tokens]
    found = [{"batch": n, "whole": alone.whole(n, seconds), "steps": alone.steps(n, seconds)} for n in batches]
    layers = sorted({1, max(1, len(alone.lookups) // 2), len(alone.lookups)})
    together = [alone.whole(1, seconds, n) for n in layers]
    return {
        "batches": found,
        "layers": [{"layers": n, "microseconds": spent} for n, spent in zip(layers, together)],
        "growth_with_batch": growth(batches, [one["whole"] for one in found]),
        "growth_with_layers": growth(layers, together),
    }
