"""What a calibration fits for the recall of next tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

from knnmoe_hf.lookup.options import RetrievalOptions


@dataclass(frozen=True)
class RecallFit:
    """
    How the last layer's neighbours vote for next tokens, as fitted for `recall="next_tokens"` or `"both"`.

    What the votes count opens by itself: where routing harms, its threshold is high, at which tokens would still help.

    Attributes:
        threshold, width: the last layer's evidence at which the votes count half, and how softly they begin to
            around it; see `knnmoe_hf.lookup.confidence.reopened`.
        next_token_weight: m, from 0 to below 1; see `knnmoe_hf.lookup.next_tokens.mixing_weight`.
        next_token_temperature: of the votes, positive.
        next_token_neighbors: how many neighbours voted.
        gain: what the memory is expected to gain on held-out references, in nats per token.
        harm: `{kind of background text: nats per token that the memory costs on it}`.
        routing_threshold: at which the memory changes the routing with `"both"`: later than with routing alone where
            that leaves room for tokens, which gain more for the same harm. None: as with routing alone, or never.
    """

    threshold: float
    width: float
    next_token_weight: float
    next_token_temperature: float
    next_token_neighbors: int
    gain: float
    harm: Mapping[str, float]
    routing_threshold: float | None = None

    def differs(self, options: RetrievalOptions) -> str | None:
        """Names an option for which this was not fitted; None if there is none."""
        wanted = options.next_token_neighbors
        if wanted is None or wanted == self.next_token_neighbors:
            return None
        return f"next_token_neighbors={self.next_token_neighbors}, not {wanted}"
