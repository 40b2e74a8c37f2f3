"""`TorchLookup`: one layer's way from gate input to mixed routing, in PyTorch on any device.

Knows tensors only, neither hooks nor models, so that other runtimes can use it as it is: `logits` returns mixed logits
for runtimes that apply the routing rule themselves, `route` applies it.
"""

import torch
from torch import Tensor

from knnmoe_hf import native
from knnmoe_hf.lookup import mixing, observers
from knnmoe_hf.lookup.confidence import Confidence, Number, Rbf
from knnmoe_hf.lookup.events import LookupEvent
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.next_tokens import RecalledTokens, Voting
from knnmoe_hf.lookup.opaque_search import handle_of, opaque_search
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.parts import is_traced
from knnmoe_hf.lookup.rules import GateOutput, RoutingRule, pad_slots
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.search import Neighbors, build_engine


class TorchLookup:
    """
    One layer's memory, ready to override the routing of its gate.

    A call goes through four methods: `encode` (gate input to query), `search` (query to neighbours), `combine`
    (neighbours to a weighted mean of their values) and `mix` (that and the gate's own output to the output that is
    used). Between search and mix the confidence decides how much of it counts.

    Args:
        layer: index of the decoder layer.
        rows: the layer's rows, N at least 1, on the device where the gate runs.
        confidence: how far neighbours are trusted.
        rule, top_k: the model's own routing rule and width.
        options: how to search and mix; a frozen snapshot.
        voting: how the neighbours vote for the next token; None if this layer recalls none.

    Attributes:
        observers_key: by which `knnmoe_hf.lookup.observers` knows who is told of each lookup that `route` makes.

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
        options: RetrievalOptions,
        voting: Voting | None = None,
    ):
        self.layer, self.rule, self.top_k = layer, rule, top_k
        self.rows, self.confidence, self.options, self.voting = rows, confidence, options, voting
        self.device = rows.key_codes.device
        self.width = self._width()
        self.slots = max(self.top_k, self.width)
        self._make_engine()
        self._register()

    def _width(self) -> int:
        experts, options = self.rows.num_experts, self.options
        # an assignment is cut to its largest weights, whichever groups of experts these come from
        most = self.rule.widest(self.top_k, experts) if self.space.of_logits else experts
        if options.routing_width == "union":
            return min(self.top_k * (1 + options.num_neighbors), most)
        width = options.routing_width or self.top_k
        if width > most:
            raise ValueError(
                f"routing_width={width} is not allowed: in layer {self.layer} a token can be given {most} of "
                f"{experts} experts, so use at most that."
            )
        return width

    def _make_engine(self) -> None:
        self.engine = build_engine(self.rows.stored_keys, self.options)

    def _register(self) -> None:
        self._handle = handle_of(self)
        self.observers_key = observers.observers_key(self._handle)

    def _twin(self, **changes) -> "TorchLookup":
        """A lookup that shares rows and engine, with other attributes and observers of its own."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self), **changes)
        twin._register()
        return twin

    def __copy__(self) -> "TorchLookup":
        return self._twin()

    def with_confidence(
        self, confidence: Confidence, options: RetrievalOptions, voting: Voting | None = None
    ) -> "TorchLookup":
        """The same lookup with another confidence and the options that name it: rows and engine are shared."""
        return self._twin(confidence=confidence, options=options, voting=voting)

    def __getstate__(self) -> dict:
        """Without the engine, which `__setstate__` builds again."""
        made_again = ("engine", "_handle", "observers_key")
        return {name: value for name, value in vars(self).items() if name not in made_again}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._make_engine()
        self._register()

    @property
    def space(self) -> mixing.ValueSpace:
        """What the values are, and how they are mixed."""
        return mixing.SPACES[self.options.value_space]

    def encode(self, x: Tensor, logits: Tensor) -> Tensor:
        """Queries (T, c) float32 from the gate's input (T, d) and its logits (T, E)."""
        return self.rows.encoder.query(x, logits)

    def search(self, queries: Tensor) -> Neighbors:
        """The nearest rows of each query (T, c): `num_neighbors`, or more where more vote for the next token."""
        num_voters = 0 if self.voting is None else self.voting.num_voters
        k = min(max(self.options.num_neighbors, num_voters), len(self.rows.key_codes))
        if torch.compiler.is_compiling() and not self.engine.traceable:
            return Neighbors(*opaque_search(queries, self._handle, k))
        return self.engine.search(queries, k)

    def combine(self, neighbors: Neighbors) -> Tensor:
        """The weighted mean of the neighbours' values, (T, E) float32."""
        return self.rows.values.combine(neighbors.rows, self._weights(neighbors))

    def mix(self, output: GateOutput, combined: Tensor, lam: Tensor | float) -> GateOutput:
        """
        The gate's output mixed with the combined values, in `slots` experts per token.

        Args:
            output: logits (T, E), expert weights and ids (T, k) of the gate.
            combined: (T, E) float32.
            lam: confidence, (T,) float32, or a float for all tokens.
        """
        logits, weights, ids = output
        if self.space.of_logits:
            logits = mixing.in_dtype(self.space.mix(logits, combined, lam), logits.dtype)
            weights, ids = self.rule.routed(logits, self.width, weights.dtype)
        else:
            own = mixing.scatter_assignment(weights, ids, combined.shape[-1])
            mixed, ids = mixing.top_width(self.space.mix(own, combined, lam), self.width)
            weights = mixing.in_dtype(mixed, weights.dtype)
        return logits, pad_slots(weights, self.slots), pad_slots(ids, self.slots)

    def route(self, x: Tensor, output: GateOutput, tokens: Tokens) -> GateOutput | None:
        """
        The routing that is used instead of the gate's own.

        Args:
            x: (T, d), the gate's input.
            output: the gate's logits (T, E), expert weights and ids (T, k).
            tokens: what is known of the T tokens.

        Returns:
            Logits (T, E), weights and ids (T, slots); tokens whose confidence is 0 keep the gate's own to the bit.
            None if no token is to be changed.

        Raises:
            RuntimeError: if the gate runs on another device than the one that this lookup was prepared for.
            NotImplementedError: inside a transform of `torch.func` or forward-mode differentiation.
        """
        self._check_call(x)
        return self._for_tensors(x, output[0])._route(x, output, tokens)

    __call__ = route

    def logits(self, x: Tensor, logits: Tensor, tokens: Tokens) -> Tensor:
        """
        Mixed logits (T, E), for runtimes that apply the routing rule themselves; arguments and errors as in `route`.

        Raises:
            ValueError: for `value_space="assignment"`, which mixes what the rule returns.
        """
        if not self.space.of_logits:
            raise ValueError(
                f"value_space={self.options.value_space!r} mixes expert weights, not logits: use `route`, or "
                "a memory of value_space='logits' or 'delta'."
            )
        self._check_call(x)
        lookup = self._for_tensors(x, logits)
        neighbors, lam, _ = lookup._look_up(x, logits, tokens)
        if not self._routes:
            return logits
        lam = torch.as_tensor(lam, device=logits.device).expand(len(logits))
        mixed = mixing.in_dtype(self.space.mix(logits, lookup.combine(neighbors), lam), logits.dtype)
        return torch.where(lam[:, None] > 0, mixed, logits)

    def _for_tensors(self, x: Tensor, logits: Tensor) -> "TorchLookup":
        """The lookup that can read these tensors; see `NativeLookup`."""
        return self

    def _route(self, x: Tensor, output: GateOutput, tokens: Tokens) -> GateOutput | None:
        found = getattr(observers, self.observers_key)
        if not (self._routes or self.voting is not None or found) and isinstance(self.confidence, Rbf):
            return None  # no other layer needs to know this one's confidence
        neighbors, lam, recalled = self._look_up(x, output[0], tokens)
        if not self._routes or self._changes_nothing(lam):
            mixed = None
        else:
            mixed = self._keep_own(output, self.mix(output, self.combine(neighbors), lam), lam)
        if found:
            confidence = torch.as_tensor(lam, dtype=torch.float32, device=self.device).expand(len(x))
            event = LookupEvent(self.layer, tokens, neighbors, confidence, output, mixed, recalled)
            for observer in found:
                observer(event)
        return mixed

    @property
    def _routes(self) -> bool:
        """Whether the memory changes the routing."""
        return self.options.recall != "next_tokens"

    def _look_up(self, x: Tensor, logits: Tensor, tokens: Tokens) -> tuple[Neighbors, Number, RecalledTokens | None]:
        """Neighbours, confidence, and the next tokens that are recalled."""
        found = self.search(self.encode(x.detach(), logits.detach()))
        neighbors = found.first(self.options.num_neighbors)
        similar = self.confidence.similarity(neighbors.distances)
        if self._host_may_branch() and tokens.is_one:
            similar = similar.item()
        lam = _of_real(self.confidence(similar, tokens), tokens)
        if self.voting is None:
            return neighbors, lam, None
        fit, confidence = self.voting.fit, lam
        if fit is not None:
            confidence = _of_real(self.confidence.reopened(similar, tokens, fit.threshold, fit.width), tokens)
        recalled = RecalledTokens(self.voting, found.first(self.voting.num_voters), confidence, self.rows.scale)
        if not (self._host_may_branch() and _is_zero(confidence)):
            tokens.recalled = recalled  # for the output embeddings
        return neighbors, lam, recalled

    def _changes_nothing(self, lam: Tensor | float) -> bool:
        """Whether no token has a confidence above 0, as far as that may be asked."""
        # more slots, even of weight 0, may change the order in which an experts kernel adds: worth a device sync
        return (self._host_may_branch() or self.slots > self.top_k) and _is_zero(lam)

    def _host_may_branch(self) -> bool:
        """Whether looking at a value neither waits for a device nor breaks a graph."""
        return self.device.type == "cpu" and not is_traced()

    def _keep_own(self, output: GateOutput, mixed: GateOutput, lam: Tensor | float) -> GateOutput:
        """The gate's own output to the bit where the confidence is 0, in a table wide enough for both."""
        if not isinstance(lam, Tensor):
            return mixed
        chosen = lam[:, None] > 0
        own = output[0], *(pad_slots(table, self.slots) for table in output[1:])
        return tuple(torch.where(chosen, new, old) for new, old in zip(mixed, own))

    def _weights(self, neighbors: Neighbors) -> Tensor:
        return mixing.neighbor_weights(neighbors.distances, self.rows.scale, self.options.temperature)

    def _check_call(self, x: Tensor) -> None:
        if x.device != self.device:
            raise RuntimeError(
                f"the gate of layer {self.layer} runs on {x.device}, its memory was prepared for {self.device}: "
                "detach the memory and attach it again after moving the model."
            )
        if not torch.compiler.is_compiling() and native.in_transform():
            raise NotImplementedError(
                "torch.func transforms and forward-mode differentiation through a routing memory are not supported: "
                "use backward(), or run inside disable_memory(model)."
            )

    @property
    def nbytes(self) -> int:
        """Bytes held for this layer: keys, values and the search index."""
        return self.rows.nbytes + self.engine.nbytes


def _of_real(lam: Number, tokens: Tokens) -> Number:
    """Confidences with 0 for padding."""
    return lam if tokens.real is None or not isinstance(lam, Tensor) else lam * tokens.real.to(lam.device)


def _is_zero(lam: Tensor | float) -> bool:
    """Whether no confidence is above 0."""
    return not bool((lam > 0).any()) if isinstance(lam, Tensor) else not lam > 0
