"""What a calibration fits for the recall of next tokens."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RecallFit:
    """
    How the last layer's neighbours vote for next tokens, as fitted for `recall="next_tokens"` or `"both"`.

    The confidence in their votes has a threshold of its own: routing that harms must stay closed on text on which
    recalled tokens still help.

    Attributes:
        threshold, width: of the confidence in the votes, see `knnmoe_hf.lookup.confidence.reopened`.
        next_token_weight: m, from 0 to below 1, see `knnmoe_hf.lookup.next_tokens.fitted_weight`.
        next_token_temperature: of the votes, positive.
        next_token_neighbors: how many neighbours voted.
        gain: what the memory is expected to gain on held-out references, in nats per token; None if a threshold was
            chosen for which that is not known.
        harm: `{kind of background text: nats per token that the memory costs on it}`.
        routing_threshold: replaces that of the routing with `"both"`: routing that opens later leaves room within the
            bounds of harm for tokens, which gain more. None: as with routing alone; of no use with `"next_tokens"`.
    """

    threshold: float
    width: float
    next_token_weight: float
    next_token_temperature: float
    next_token_neighbors: int
    gain: float | None
    harm: Mapping[str, float]
    routing_threshold: float | None = None

    def differs(self, num_voters: int) -> str | None:
        """Says for how many voting neighbours this was fitted, if it was for another number; None if it was not."""
        if num_voters == self.next_token_neighbors:
            return None
        return f"fitted for next_token_neighbors={self.next_token_neighbors}, not {num_voters}"
