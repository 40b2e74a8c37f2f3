"""What the neighbours of a memory's last layer vote on text: what a calibration fits the recall of next tokens to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knnmoe_hf.lookup.events import LookupEvent
from knnmoe_hf.lookup.next_tokens import RecalledTokens, Voting
from knnmoe_hf.lookup.torch_lookup import TorchLookup
from knnmoe_hf.models.attach import AttachedMemory
from knnmoe_hf.models.calls import Overrides

TEMPERATURES = (0.15, 0.25, 0.4)
"""Of the votes, that a calibration tries."""


@dataclass(frozen=True)
class Votes:
    """
    What the last layer's neighbours vote on n target tokens, while the memory is closed; all on the CPU.

    Attributes:
        layer: the last layer.
        similar: (n,) float32, the similarity there.
        recalled: `{temperature: (n,)}`, the probability of the target in the recalled distribution.
        trusts: `{temperature: (n,)}`, see `knnmoe_hf.lookup.next_tokens.trust`.
    """

    layer: int
    similar: Tensor
    recalled: Mapping[float, Tensor]
    trusts: Mapping[float, Tensor]

    @classmethod
    def of(cls, layer: int, similar: Tensor, tables: Tensor) -> "Votes | None":
        """From what `VoteRecorder.read` returned of the tokens with these similarities (n,); None if nobody voted."""
        if tables.dim() == 1:
            return None
        return cls(layer, similar, *(dict(zip(TEMPERATURES, table)) for table in tables))


class VoteRecorder:
    """
    Records how the last layer's neighbours vote for next tokens while a model runs, whose logits stay as they are.

    Args:
        memory: with the confidences that are in use.
        num_voters: how many neighbours vote; None for no votes.

    Attributes:
        overrides: to put in force instead of `memory`.
        layer: the last one.
        lookup: of that layer, of which `see` must be told.
    """

    def __init__(self, memory: AttachedMemory, num_voters: int | None):
        self.layer, self.overrides = max(memory), memory
        self.lookup: TorchLookup = memory[self.layer]
        self._recalled: RecalledTokens | None = None
        if num_voters is not None:
            next_tokens = memory.memory.next_tokens.to(self.lookup.device)
            voting = Voting(next_tokens, 0.0, TEMPERATURES[0], num_voters)
            self.lookup = self.lookup.with_confidence(self.lookup.confidence, memory.options, voting)
            # plain overrides: nothing is mixed into logits
            self.overrides = Overrides({**memory, self.layer: self.lookup})
            self.overrides.watches = memory.watches

    def see(self, event: LookupEvent) -> None:
        """Keeps what the last layer recalls in the present call."""
        self._recalled = event.recalled

    def read(self, targets: Tensor, following: Tensor) -> Tensor:
        """
        The votes of the last call.

        Args:
            targets: (B, S) bool, n tokens that have a target.
            following: (n, 1) int64, the targets.

        Returns:
            (2, number of temperatures, n) float32 on the CPU, `recalled` and `trusts`; (0,) if nobody votes.
        """
        if self._recalled is None:
            return torch.zeros(0)
        seen = self._recalled.at(targets.flatten().nonzero().flatten())
        following, found = following.to(self.lookup.device), []
        for temperature in TEMPERATURES:
            voting = replace(seen.voting, temperature=temperature)
            ids, probabilities, trusts = seen._replace(voting=voting).distribution()
            recalled = torch.where(ids == following, probabilities, 0.0).amax(dim=-1)  # the same for all that equal it
            found.append(torch.stack([recalled, trusts]))
        return torch.stack(found, dim=1).cpu()
