"""
What the neighbours of a memory's last layer would vote for the next token, on text: the data that a calibration fits
the recall of next tokens to.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from knnmoe_hf.lookup.events import LookupEvent
from knnmoe_hf.lookup.mixing import neighbor_weights
from knnmoe_hf.lookup.next_tokens import NextTokens, chances_of, trust
from knnmoe_hf.models.attach import AttachedMemory
from knnmoe_hf.models.calls import Overrides
from knnmoe_hf.search.base import Neighbors

TEMPERATURES = (0.15, 0.25, 0.4)
"""Of the votes, that a calibration tries."""


@dataclass(frozen=True)
class Votes:
    """
    What the last layer's neighbours would vote on n target tokens, while the memory is closed; all on the CPU.

    Attributes:
        layer: the last layer.
        similar: (n,) float32, the similarity there.
        recalled: `{temperature: (n,)}`, the probability that the recalled distribution gives the target.
        trusts: `{temperature: (n,)}`, see `knnmoe_hf.lookup.next_tokens.trust`.
    """

    layer: int
    similar: Tensor
    recalled: Mapping[float, Tensor]
    trusts: Mapping[float, Tensor]

    @classmethod
    def of(cls, layer: int, similar: Tensor, tables: Tensor) -> "Votes | None":
        """From what `Ballot.read` returned of the tokens with these similarities (n,); None if nobody voted."""
        if tables.dim() == 1:
            return None
        return cls(layer, similar, *(dict(zip(TEMPERATURES, table)) for table in tables))


class Ballot:
    """
    Has the last layer's neighbours vote, without counting the votes.

    Args:
        memory: with the confidences that are in use.
        voters: how many neighbours vote; None for no votes.

    Attributes:
        overrides: to put in force instead of `memory`.
        layer: the last one.
    """

    def __init__(self, memory: AttachedMemory, voters: int | None):
        self.layer, self.overrides = max(memory), memory
        self._lookup, self._seen = memory[self.layer], None
        if voters is not None:
            ids = memory.memory.next_tokens.to(self._lookup.device)
            votes = NextTokens(ids, 0.0, TEMPERATURES[0], voters)
            self._lookup = self._lookup.with_confidence(self._lookup.confidence, memory.options, votes)
            # plain overrides: nothing is mixed into logits
            self.overrides = Overrides({**memory, self.layer: self._lookup})
            self.overrides.watches = memory.watches

    @property
    def lookups(self) -> list:
        """Whose lookups `see` must be told of."""
        return [self._lookup]

    def see(self, event: LookupEvent) -> None:
        """Keeps the last layer's neighbours of the present call."""
        self._seen = event.voters

    def read(self, targets: Tensor, following: Tensor) -> Tensor:
        """
        The votes of the last call.

        Args:
            targets: (B, S) bool, n tokens that have a target.
            following: (n, 1) int64, the targets.

        Returns:
            (2, number of temperatures, n) float32 on the CPU, `recalled` and `trusts`; (0,) if nobody votes.
        """
        if self._seen is None:
            return torch.zeros(0)
        scale, ids = self._lookup.rows.scale, self._lookup.next_tokens.token_ids
        distances, rows = (table[targets.flatten().to(table.device)] for table in self._seen)
        return torch.stack(
            [_counted(Neighbors(distances, rows), ids, following.to(rows.device), scale, t) for t in TEMPERATURES],
            dim=1,
        ).cpu()


def _counted(voters: Neighbors, token_ids: Tensor, following: Tensor, scale: float, temperature: float) -> Tensor:
    """(2, n): the probability of `following` (n, 1) by the votes, and how far they are trusted."""
    ids = token_ids[voters.rows].long()
    votes = neighbor_weights(voters.distances, scale, temperature)
    recalled = torch.where(ids == following, votes, 0.0).sum(dim=-1)
    return torch.stack([recalled, trust(votes, chances_of(ids, votes), voters.distances[:, 0] / scale)])
