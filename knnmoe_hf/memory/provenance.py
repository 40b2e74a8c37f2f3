"""Where each row came from (example, token) and what optimisation gained there; kept or left out as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Provenance:
    """
    Args:
        example_ids: (N,) int64, the example of each row.
        positions: (N,) int32, index of the row's token in its example; -1 if unknown.
        nll_before: (N,) float32, NLL of the row's target under frozen routing, in nats; 0 if unknown.
        nll_after: (N,) float32, the same with the stored routing.
        examples: (X,) int64, ids of the examples whose tokens are kept.
        offsets: (X + 1,) int64, where each example's tokens begin in `token_ids`, and its length.
        token_ids: (sum of lengths,) int32, the tokens of one example after the other.
    """

    example_ids: Tensor
    positions: Tensor
    nll_before: Tensor
    nll_after: Tensor
    examples: Tensor
    offsets: Tensor
    token_ids: Tensor

    @classmethod
    def of_rows(cls, example_ids: Tensor) -> "Provenance":
        """Of rows of which only the example is known."""
        rows = len(example_ids)
        return cls(
            example_ids.long().cpu().contiguous(),
            torch.full((rows,), -1, dtype=torch.int32),
            torch.zeros(rows),
            torch.zeros(rows),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(0, dtype=torch.int32),
        )

    @classmethod
    def build(
        cls,
        example_ids: Tensor,
        positions: Tensor,
        nll_before: Tensor,
        nll_after: Tensor,
        tokens: Mapping[int, Tensor],
    ) -> "Provenance":
        """From columns (N,) and the tokens of each example, `{example id: (length,) token ids}`."""
        lengths = torch.tensor([0] + [len(ids) for ids in tokens.values()], dtype=torch.int64)
        joined = torch.cat([torch.as_tensor(ids, dtype=torch.int32) for ids in tokens.values()] or [torch.zeros(0)])
        return cls(
            example_ids.long(),
            positions.int(),
            nll_before.float(),
            nll_after.float(),
            torch.tensor(list(tokens), dtype=torch.int64),
            lengths.cumsum(0),
            joined.int(),
        )

    def tokens(self) -> dict[int, Tensor]:
        """`{example id: (length,) int32 token ids}`."""
        bounds = self.offsets.tolist()
        return {
            example: self.token_ids[start:end]
            for example, start, end in zip(self.examples.tolist(), bounds[:-1], bounds[1:])
        }

    def select(self, keep: Tensor) -> "Provenance":
        """Of the rows where `keep` (N,) bool is true, with the tokens of the examples that still have a row."""
        left = set(self.example_ids[keep].tolist())
        tokens = {example: ids for example, ids in self.tokens().items() if example in left}
        rows = (self.example_ids[keep], self.positions[keep], self.nll_before[keep], self.nll_after[keep])
        return Provenance.build(*rows, tokens)

    def joined(self, other: "Provenance") -> "Provenance":
        """Of the rows of both, one after the other."""
        mine, theirs = (
            [getattr(side, name) for name in ("example_ids", "positions", "nll_before", "nll_after")]
            for side in (self, other)
        )
        return Provenance.build(*map(torch.cat, zip(mine, theirs)), self.tokens() | other.tokens())

    def renumbered(self, ids: Mapping[int, int]) -> "Provenance":
        """A copy with example ids replaced, `{old: new}`; ids that are not in it stay."""

        def swap(tensor: Tensor) -> Tensor:
            return torch.tensor([ids.get(i, i) for i in tensor.tolist()], dtype=torch.int64)

        return replace(self, example_ids=swap(self.example_ids), examples=swap(self.examples))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in a memory's files."""
        return {f"provenance.{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def specification(cls, rows: int, examples: int, tokens: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor, by its name in a memory's files."""
        return {
            "provenance.example_ids": ((rows,), torch.int64),
            "provenance.positions": ((rows,), torch.int32),
            "provenance.nll_before": ((rows,), torch.float32),
            "provenance.nll_after": ((rows,), torch.float32),
            "provenance.examples": ((examples,), torch.int64),
            "provenance.offsets": ((examples + 1,), torch.int64),
            "provenance.token_ids": ((tokens,), torch.int32),
        }
