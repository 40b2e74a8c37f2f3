"""What a lookup tells its observers: traces, calibration and reports are made of these."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from knnmoe_hf.lookup.next_tokens import RecalledTokens
from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.search.base import Neighbors


@dataclass(frozen=True)
class LookupEvent:
    """
    One lookup of one layer, for T tokens.

    Attributes:
        layer: index of the decoder layer.
        tokens: the call's tokens.
        neighbors: distances and rows, (T, K) each, of the neighbours that decide the routing and the confidence.
        confidence: (T,) float32, lambda; 0 for padding.
        own: the gate's own logits (T, E), expert weights and ids (T, k).
        mixed: what is used instead, (T, E) and (T, slots); None if the gate's own output stays.
        recalled: the next tokens of the neighbours that vote for them, with a confidence that may be another one;
            None in layers where none vote.
    """

    layer: int
    tokens: Tokens
    neighbors: Neighbors
    confidence: Tensor
    own: GateOutput
    mixed: GateOutput | None
    recalled: RecalledTokens | None = None

    @property
    def voters(self) -> Neighbors | None:
        """The neighbours that vote for the next token, as `neighbors`; None in layers where none do."""
        return None if self.recalled is None else self.recalled.voters


LookupObserver = Callable[[LookupEvent], None]
