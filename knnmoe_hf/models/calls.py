"""The tokens of one forward of a decoder: padding and each one's past from its arguments, sums kept with its cache."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.cache_utils import Cache

from knnmoe_hf.lookup.logits import LogitsTransform
from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.lookup.sequence import Links, SequenceState, Tokens
from knnmoe_hf.models.cache_methods import follow_cache_methods
from knnmoe_hf.models.continuous_batching import PagedState, follow_offloading, keep_paged
from knnmoe_hf.models.kv_state import CacheState, keep_sums
from knnmoe_hf.models.owners import StateOwner
from knnmoe_hf.models.predecessors import CallLayout, is_paged, shape_of
from knnmoe_hf.models.sums import sums_beside
from knnmoe_hf.models.virtual_tokens import mark_trained_prefixes, virtual_tokens

if TYPE_CHECKING:
    from knnmoe_hf.models.gate_watch import GateWatch

follow_cache_methods()
follow_offloading()

RoutingOverride = Callable[[Tensor, GateOutput, Tokens], GateOutput | None]
"""`override(x, output, tokens)`: from a gate's input (T, d), its output and the call's tokens to the output that
replaces the gate's; None keeps it."""


class Overrides(dict):
    """
    The routing overrides attached under one name, `{layer: RoutingOverride}`.

    Attributes:
        owner: identifies the running sums of these overrides in a KV cache.
        watches: `{layer: GateWatch}`, which notice that a gate was changed; empty for overrides that suit any gate.
        recalling_layer: the layer whose override leaves next tokens to be mixed into the logits; None if none does.
        logits: what the model does with the output of its output embeddings; None without such a layer.
    """

    watches: Mapping[int, "GateWatch"] = MappingProxyType({})
    recalling_layer: int | None = None
    logits: LogitsTransform | None = None

    def __init__(self, overrides: Mapping[int, RoutingOverride]):
        super().__init__(overrides)
        self.owner = StateOwner()
        mark_trained_prefixes()  # of PEFT, which may be imported after this package


class CallTokens(Tokens):
    """
    The tokens of a decoder's forward, and the overrides that were in force when it began.

    Args:
        call: arguments of the forward by name.
        overrides: they decide the routing of the whole forward, whatever is switched meanwhile.
        decoder: the module whose forward it is.

    Attributes:
        routed: layers whose gate has run with these tokens.
    """

    def __init__(self, call: dict, overrides: Overrides, decoder: nn.Module):
        self.overrides, self.owner = overrides, overrides.owner
        self.routed: set[int] = set()
        self._layout = CallLayout(call, decoder)
        self._sources_links: Links | None = None
        super().__init__(*shape_of(call), real=self._layout.real, state=self._state_before(call, decoder))

    def links(self) -> Links:
        # computed lazily: most forwards never need it
        if self._sources_links is None:
            sources = self._layout.sources()
            self._sources_links = sources.links
            if isinstance(self.state, CacheState):
                self.state.sources = sources
        return self._sources_links

    def _state_before(self, call: dict, decoder: nn.Module) -> SequenceState | None:
        if is_paged(call):
            return PagedState(call, self.owner)
        cache = call.get("past_key_values")
        if cache is None:
            return None
        virtual = virtual_tokens(cache, decoder) if sums_beside(cache) is None else 0
        return CacheState(cache, self.owner, self._layout, virtual)


def keep_state(call: dict, output, tokens: CallTokens | None) -> None:
    """
    Stores the running sums of a forward in its cache, for the next forward on the same sequences.

    Args:
        call: the forward's arguments by name.
        output: what the forward returned.
        tokens: the tokens of the forward; None if no overrides were in force.
    """
    if is_paged(call):
        return keep_paged(call, tokens)
    cache = call.get("past_key_values")
    if cache is None:  # the decoder may have created one and returned it
        parts = output if isinstance(output, tuple) else output.values()
        cache = next((part for part in parts if isinstance(part, Cache)), None)
    if cache is not None:
        keep_sums(cache, tokens, None if tokens is None else tokens.owner)
