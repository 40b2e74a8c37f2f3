"""One layer's way from gate input to routes: query, neighbours, confidence, mixed routing.

Knows tensors only, neither hooks nor models, so that other runtimes can use it as it is.
"""

import itertools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from knnmoe_hf.lookup import mixing
from knnmoe_hf.lookup.confidence import Confidence
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.native_lookup import CompiledRecall
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.rules import RoutingRule
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.search import Neighbors, build_engine

Observer = Callable[[int, Neighbors, Tensor], None]
"""Called with layer, neighbours and confidence (T,) of each lookup while somebody watches."""


_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, "LayerLookup"] = weakref.WeakValueDictionary()


@torch.library.custom_op("knnmoe_hf::search", mutates_args=())
def _opaque_search(x: Tensor, handle: int, k: int) -> tuple[Tensor, Tensor]:
    """A lookup's search as one operator, which a compiler need not look into: engines branch on what they find."""
    found = _by_handle[handle].engine.search(x, k)
    return found.distances.contiguous(), found.rows.contiguous()


@_opaque_search.register_fake
def _(x: Tensor, handle: int, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k, dtype=torch.float32), x.new_empty(x.shape[0], k, dtype=torch.int64)


class LayerLookup:
    """
    A layer's memory, ready to route.

    Args:
        layer: index of the decoder layer, for the observer.
        rows: the layer's rows, N at least 1, on the layer's device.
        confidence: how far neighbours are trusted (`knnmoe_hf.confidence`).
        rule, top_k: the model's own routing.
        config: how to search and mix.

    Raises:
        ValueError: for a routing width of more experts than there are.
    """

    def __init__(
        self,
        layer: int,
        rows: LayerRows,
        confidence: Confidence,
        rule: RoutingRule,
        top_k: int,
        config: RetrievalOptions,
    ):
        self.layer, self.rule, self.top_k = layer, rule, top_k
        self.rows, self.confidence, self.config = rows, confidence, config
        self.width = self._width(config)
        self.slots = max(self.top_k, self.width)
        self._prepare()
        self.observer: Observer | None = None
        self._register()

    def _register(self) -> None:
        self.handle = next(_handles)
        _by_handle[self.handle] = self

    def __copy__(self) -> "LayerLookup":
        """A lookup that shares the tables, but may move and be watched alone."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self), observer=None)
        twin._register()
        return twin

    def __getstate__(self) -> dict:
        """What `__setstate__` does not make again, in another process too."""
        made_again = ("engine", "compiled", "handle", "observer")
        return {name: value for name, value in vars(self).items() if name not in made_again}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, observer=None)
        self._prepare()
        self._register()

    def _width(self, config: RetrievalOptions) -> int:
        experts = self.rows.num_experts
        if config.routing_width == "union":
            return min(self.top_k * (1 + config.num_neighbors), experts)
        width = config.routing_width or self.top_k
        if width > experts:
            raise ValueError(f"routing_width={width} is not allowed: layer {self.layer} has {experts} experts.")
        return width

    def __call__(self, x: Tensor, routes: tuple, tokens: Tokens) -> tuple | None:
        """The `RoutingOverride` of this layer (see `knnmoe_hf.hooks`)."""
        compiled = self.compiled_for(x, routes[0])
        if compiled is not None and self._takes_one_alone(routes[0], tokens):
            return self._route_one(compiled, x, routes, tokens)
        if x.device != self.rows.key_codes.device:
            self._move(x.device)
        neighbors = self._search(compiled, x.detach(), routes[0].detach())
        lam = self.confidence(neighbors.distances, tokens)
        if tokens.real is not None:
            lam = lam * tokens.real.to(lam.device)
        if self.observer is not None:
            self.observer(self.layer, neighbors, lam)
        chosen = lam[:, None] > 0
        if self._may_ask(lam) and not bool(chosen.any()):
            return None
        mixed = self.mix(routes, self.recall(compiled, neighbors), lam)
        if compiled is not None and bool(chosen.all()):
            return mixed
        return self._keep_own(routes, mixed, chosen)

    def compiled_for(self, x: Tensor, logits: Tensor) -> CompiledRecall | None:
        """What was compiled, where it can take these."""
        if self.compiled is None or torch.compiler.is_compiling() or not self.compiled.takes(x, logits):
            return None
        return self.compiled

    def _takes_one_alone(self, logits: Tensor, tokens: Tokens) -> bool:
        """Whether this is a step of decoding that nobody watches, and no gradient passes."""
        if not self.engine.scans_one or self.observer is not None or self.confidence.falloff is None:
            return False
        return tokens.is_one and not (torch.is_grad_enabled() and logits.requires_grad)

    def _route_one(self, compiled: CompiledRecall, x: Tensor, routes: tuple, tokens: Tokens) -> tuple | None:
        recalled = compiled.recall_one(x, routes[0], self.confidence.falloff)
        lam = self.confidence.of_one(recalled.similar, tokens)
        if not lam > 0:
            return None
        if self.config.value_space == "assignment":
            confidence = torch.tensor([lam], dtype=torch.float32, device="cpu")
            return self.mix(routes, compiled.values_of_one(recalled), confidence)
        return self._routes(compiled.mix_one(recalled, routes[0], lam))

    def _may_ask(self, lam: Tensor) -> bool:
        """Whether the host may look at a value: it has it already, or there is no other way."""
        if self.slots > self.top_k:
            return True  # more slots, even of weight 0, may change the order in which experts are summed
        return lam.device.type == "cpu" and not torch.compiler.is_compiling()

    def _search(self, compiled: CompiledRecall | None, x: Tensor, logits: Tensor) -> Neighbors:
        query = (compiled or self.rows.encoder).query(x, logits)
        if torch.compiler.is_compiling() and not self.engine.traceable:
            return Neighbors(
                *_opaque_search(query, self.handle, min(self.config.num_neighbors, len(self.rows.key_codes)))
            )
        return self.engine.search(query, self.config.num_neighbors)

    def recall(self, compiled: CompiledRecall | None, found: Neighbors) -> Tensor:
        """The neighbours' mixed values, (T, E) float32."""
        if compiled is not None:
            return compiled.recall(found)
        weights = mixing.neighbor_weights(found.distances, self.rows.scale, self.config.temperature)
        return self.rows.values.combine(found.rows, weights)

    def mix(self, routes: tuple, recalled: Tensor, lam: Tensor) -> tuple:
        """A gate's routes, mixed with what its tokens recall (T, E) by their confidence (T,), in all `slots`."""
        logits, weights, ids = routes
        if self.config.value_space == "assignment":
            weights, ids = mixing.top_width(mixing.mix_assignment(weights, ids, recalled, lam), self.width)
            return logits, pad_slots(weights.to(logits.dtype), self.slots), pad_slots(ids, self.slots)
        mix = mixing.mix_logits if self.config.value_space == "logits" else mixing.mix_delta
        return self._routes(mix(logits, recalled, lam).to(logits.dtype))

    def _routes(self, logits: Tensor) -> tuple:
        """Of mixed logits (T, E), by the model's own rule."""
        return logits, *(pad_slots(table, self.slots) for table in self.rule(logits, self.width))

    def _keep_own(self, routes: tuple, mixed: tuple, chosen: Tensor) -> tuple:
        """Where the confidence is 0, the gate's own route to the bit, in a table wide enough for both."""
        logits = torch.where(chosen, mixed[0], routes[0])
        weights, ids = (
            torch.where(chosen, new, pad_slots(own, self.slots)) for new, own in zip(mixed[1:], routes[1:])
        )
        return logits, weights, ids

    def _move(self, device: torch.device) -> None:
        self.rows = self.rows.to(device)
        self._prepare()

    def _prepare(self) -> None:
        self.engine = build_engine(self.rows.stored_keys, self.config)
        self.compiled = CompiledRecall.of(self.rows, self.engine, self.config)

    @property
    def nbytes(self) -> int:
        """Bytes held for this layer: keys, values and what search adds."""
        return self.rows.nbytes + self.engine.nbytes + (self.compiled.nbytes if self.compiled is not None else 0)


def pad_slots(table: Tensor, slots: int) -> Tensor:
    """(T, k) weights or ids with slots of weight 0 added; ids repeat the token's first, which every kernel takes."""
    missing = slots - table.shape[1]
    if missing == 0:
        return table
    filler = torch.zeros_like(table[:, :1]) if table.is_floating_point() else table[:, :1]
    return torch.cat([table, filler.expand(-1, missing)], dim=-1)
