"""`trace_routing`: what a memory recalled for each token of any forward or generation, and what that changed."""

import logging
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from knnmoe_hf.errors import shown
from knnmoe_hf.explain.layers import LayerTrace, RecalledTrace, joined, of_event, recalled_of
from knnmoe_hf.explain.log_probs import log_probs as log_probs_of
from knnmoe_hf.explain.references import Reference, ReferenceTexts
from knnmoe_hf.explain.table import columns_of
from knnmoe_hf.explain.tokens import TracedCall, TracedTokens
from knnmoe_hf.lookup.events import LookupEvent
from knnmoe_hf.lookup.observers import watching
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.attach import attached_memory
from knnmoe_hf.models.gates import find_decoder, find_gates
from knnmoe_hf.models.in_force import forget_compiled_graphs
from knnmoe_hf.models.prepared import AttachedMemory
from knnmoe_hf.models.probe import is_probing

if TYPE_CHECKING:
    import pandas
    from datasets import Dataset

logger = logging.getLogger(__name__)

MAX_TOKENS = 4096


@dataclass(frozen=True)
class TracedNeighbor:
    """
    A neighbour of a token in a layer.

    Attributes:
        distance: squared L2 between the encoded keys.
        weight: of its value, from 0 to 1.
        reference: where its row comes from.
    """

    distance: float
    weight: float
    reference: Reference


class RoutingTrace:
    """
    What `trace_routing` has seen. Read it when the context has ended; n is the number of tokens that were kept.

    Attributes:
        memory: the memory that was traced.
        name: under which it is attached.
        max_tokens: tokens that are kept, the first ones.
    """

    def __init__(self, memory: RoutingMemory, name: str, max_tokens: int):
        self.memory, self.name, self.max_tokens = memory, name, max_tokens
        self._tokens = TracedTokens(max_tokens)
        self._parts: dict[int, list[tuple[Tensor, LayerTrace]]] = defaultdict(list)
        self._recalled: list[tuple[Tensor, RecalledTrace]] = []
        self._log_probs: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} of {self.seen} tokens, layers {list(self._parts)})"

    @property
    def seen(self) -> int:
        """Real tokens of all calls, also those beyond `max_tokens`."""
        return self._tokens.seen

    @property
    def token_ids(self) -> Tensor:
        """(n,) int64, in the order of the calls; -1 where a call was given embeddings in place of ids."""
        return self._tokens.ids

    @property
    def previous(self) -> Tensor:
        """(n,) int64, the token that each goes on from, by its place here; -1 for the first one of a sequence, -2 if
        that token was not traced."""
        return self._tokens.previous

    def sequences(self) -> list[Tensor]:
        """
        The tokens of each sequence by their place here, (length,) int64 each.

        Sequences that share a beginning, as of beams, each have it. Those that began before the trace are left out.
        """
        return self._tokens.sequences()

    @cached_property
    def layers(self) -> Mapping[int, LayerTrace]:
        """`{layer: what its memory did}`, of layers that looked anything up."""
        return {layer: joined(parts, len(self)) for layer, parts in sorted(self._parts.items())}

    @cached_property
    def recalled(self) -> RecalledTrace | None:
        """The next tokens that each token recalled; None with `recall="routing"`."""
        return joined(self._recalled, len(self)) if self._recalled else None

    @property
    def log_prob(self) -> Tensor | None:
        """
        (n,) float32, the log-probability of each token with the memory, in nats; NaN for the first of a sequence.

        None with `log_probs=False`.
        """
        return None if self._log_probs is None else self._log_probs[0]

    @property
    def base_log_prob(self) -> Tensor | None:
        """As `log_prob`, without the memory."""
        return None if self._log_probs is None else self._log_probs[1]

    @property
    def gain(self) -> Tensor | None:
        """(n,) float32, `log_prob - base_log_prob`: above 0 the memory made the token more likely."""
        return None if self._log_probs is None else self._log_probs[0] - self._log_probs[1]

    def neighbors(self, token: int, layer: int, tokenizer=None) -> list[TracedNeighbor]:
        """
        A token's neighbours in a layer, nearest first, with the reference text around each where it is known.

        Args:
            token: its place in the trace.
            layer: one of `layers`.
            tokenizer: in place of the memory's own.

        Raises:
            IndexError, KeyError: for a token or a layer that was not traced.
        """
        texts = ReferenceTexts(self.memory, tokenizer)
        found = self.layers[layer]
        columns = (found.rows[token].tolist(), found.distances[token].tolist(), found.weights[token].tolist())
        return [TracedNeighbor(far, weight, texts.of(row)) for row, far, weight in zip(*columns) if row >= 0]

    def provenance(self) -> str:
        """One sentence: what is known of the references behind the rows, and what remains where that is little."""
        return ReferenceTexts(self.memory).sentence()

    def to_dict(self) -> dict[str, list]:
        """
        One entry for each pair of a token and a layer, the layers of a token together; lists by column.

        `experts` are before the memory, `mixed_experts` after it; `log_prob`, `base_log_prob` and `gain` are those of
        the token, equal in all layers; numbers that are not known are None. With next tokens recalled, `recalled_ids`,
        `recalled_probabilities` and `recalled_weight` are those of the token as well.
        """
        return columns_of(self)

    def to_dataset(self) -> "Dataset":
        """`to_dict` as a `datasets.Dataset`."""
        from datasets import Dataset

        return Dataset.from_dict(self.to_dict())

    def _repr_html_(self) -> str:
        """The page of the trace (`knnmoe_hf.explain.page`), as notebooks show it."""
        from knnmoe_hf.explain.page import in_notebook

        return in_notebook(self)

    def to_pandas(self) -> "pandas.DataFrame":
        """`to_dict` as a frame of pandas."""
        import pandas

        return pandas.DataFrame(self.to_dict())


@contextmanager
def trace_routing(model: nn.Module, max_tokens: int = MAX_TOKENS, log_probs: bool = True) -> Iterator[RoutingTrace]:
    """
    Inside this context, what the memory in force recalls and changes is recorded for every token of the calls that the
    calling thread makes, of `generate` as of any forward. What the model computes stays as it is, to the bit.

    Calls with the memory switched off, or with another one, are recorded as tokens without lookups. What gradient
    checkpointing runs again during a backward pass is left out.

    Args:
        model: with a memory in force; plain, PEFT-wrapped or compiled (which is compiled anew).
        max_tokens: tokens that are kept, the first ones; a warning says if there were more. A token takes some 300
            bytes for each layer with 16 neighbours.
        log_probs: compute each token's log-probability with the memory and without it, by two more forwards over the
            traced tokens when the context ends without an error.

    Yields:
        A `RoutingTrace`, complete when the context has ended.

    Raises:
        ValueError: if no memory is in force, or for `max_tokens` below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={shown(max_tokens)} is not allowed: use a positive number.")
    name, prepared = attached_memory(model)
    trace = RoutingTrace(prepared.memory, name, max_tokens)
    calls = _Calls(trace, prepared)
    decoder = find_decoder(model, find_gates(model))
    handles = [
        decoder.register_forward_pre_hook(calls.begin, with_kwargs=True),
        decoder.register_forward_hook(calls.end, with_kwargs=True, always_call=True),
    ]
    forget_compiled_graphs(model)
    try:
        with watching(prepared.values(), calls.see):
            yield trace
    finally:
        for handle in handles:
            handle.remove()
        forget_compiled_graphs(model)
    if trace.seen > len(trace):
        logger.warning(
            "the trace kept the first %d of %d tokens: to keep more, use max_tokens=", len(trace), trace.seen
        )
    if log_probs:
        trace._log_probs = log_probs_of(model, name, trace._tokens)


class _Calls:
    """The forwards of the decoder in the thread that traces; no others count."""

    def __init__(self, trace: RoutingTrace, prepared: AttachedMemory):
        self._trace, self._prepared = trace, prepared
        self._thread = threading.get_ident()
        self._call: TracedCall | None = None

    def _is_here(self) -> bool:
        return threading.get_ident() == self._thread and not is_probing()

    @torch.compiler.disable
    def begin(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._is_here():
            self._call = self._trace._tokens.begin(args, kwargs, decoder)

    @torch.compiler.disable
    def end(self, decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if self._is_here() and self._call is not None:
            call, self._call = self._call, None
            if output is not None:  # None after an error
                self._trace._tokens.end(call, args, kwargs, output)

    @torch.compiler.disable
    def see(self, event: LookupEvent) -> None:
        if not self._is_here() or self._call is None or not len(self._call.places):
            return
        places, numbers = self._call.places, self._call.kept
        self._trace._parts[event.layer].append((numbers, of_event(event, self._prepared[event.layer], places)))
        if event.recalled is not None:
            self._trace._recalled.append((numbers, recalled_of(event, places)))
