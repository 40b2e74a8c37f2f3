"""Where each row came from (example, token) and what optimisation gained there, at one of three levels."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knnmoe_hf.data.ngrams import kept_hashes, ngram_hashes
from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.blocks import Bounds
from knnmoe_hf.memory.plain_files import unusable

LEVELS = ("text", "ids", "none")
"""What a saved memory tells of its references, from most to least."""


def check_level(level: Any) -> str:
    """
    `level`, if it is one of `LEVELS`; True is `"text"` and False `"none"`.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(level, bool):
        return "text" if level else "none"
    if level not in LEVELS:
        raise ValueError(f"provenance={shown(level)} is not allowed: choose one of {', '.join(LEVELS)}.")
    return level


@dataclass(frozen=True)
class Provenance:
    """
    An example has its tokens, or, where the text was left out, hashes of some of its n-grams, or neither.

    Args:
        example_ids: (N,) int64, the example of each row.
        positions: (N,) int32, index of the row's token in its example; -1 if unknown.
        nll_before: (N,) float32, NLL of the row's target under frozen routing, in nats; 0 if unknown.
        nll_after: (N,) float32, the same with the stored routing.
        examples: (X,) int64, ids of the examples whose tokens or hashes are kept.
        offsets: (X + 1,) int64, where each example's tokens begin in `token_ids`, and its length.
        token_ids: (sum of lengths,) int32, the tokens of one example after the other; empty without text.
        ngrams: (G,) int64, `knnmoe_hf.data.ngrams.kept_hashes` of one example after the other, each sorted; empty
            with text, from which they can be computed.
        ngram_offsets: (X + 1,) int64, where each example's hashes begin in `ngrams`, and its length.
    """

    example_ids: Tensor
    positions: Tensor
    nll_before: Tensor
    nll_after: Tensor
    examples: Tensor
    offsets: Tensor
    token_ids: Tensor
    ngrams: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    ngram_offsets: Tensor | None = None

    def __post_init__(self):
        if self.ngram_offsets is None:
            object.__setattr__(self, "ngram_offsets", torch.zeros_like(self.offsets))

    @classmethod
    def of_rows(cls, example_ids: Tensor) -> "Provenance":
        """Of rows of which only the example is known."""
        rows = len(example_ids)
        columns = (torch.full((rows,), -1, dtype=torch.int32), torch.zeros(rows), torch.zeros(rows))
        return cls.build(example_ids.cpu().contiguous(), *columns, {})

    @classmethod
    def build(
        cls,
        example_ids: Tensor,
        positions: Tensor,
        nll_before: Tensor,
        nll_after: Tensor,
        tokens: Mapping[int, Tensor],
        ngrams: Mapping[int, Tensor] | None = None,
    ) -> "Provenance":
        """
        From columns (N,), the tokens of each example, `{example id: (length,) token ids}`, and the hashes of examples
        without tokens, `{example id: (n,) int64}`.
        """
        examples = list(tokens | (ngrams or {}))
        offsets, token_ids = _packed(tokens, examples, torch.int32)
        ngram_offsets, hashes = _packed(ngrams or {}, examples, torch.int64)
        columns = (example_ids.long(), positions.int(), nll_before.float(), nll_after.float())
        known = torch.tensor(examples, dtype=torch.int64)
        return cls(*columns, known, offsets, token_ids, hashes, ngram_offsets)

    @property
    def has_text(self) -> bool:
        """Whether tokens of examples are kept."""
        return len(self.token_ids) > 0

    def tokens(self) -> dict[int, Tensor]:
        """`{example id: (length,) int32 token ids}`, of the examples whose tokens are kept."""
        return _pieces(self.examples, self.offsets, self.token_ids)

    def hashes(self) -> dict[int, Tensor]:
        """`{example id: (n,) int64}`, of the examples without tokens; an example may have none."""
        kept = _pieces(self.examples, self.ngram_offsets, self.ngrams)
        none, texts = self.ngrams[:0], self.tokens()
        return {id: kept.get(id, none) for id in self.examples.tolist() if id not in texts}

    def without_text(self) -> "Provenance":
        """
        Example ids and positions alone, with hashes of n-grams in place of the tokens.

        The NLLs go too: with the base model they tell which token has them, and so the text, token by token.
        """
        hashes = {id: kept_hashes(ngram_hashes(ids)).unique() for id, ids in self.tokens().items()} | self.hashes()
        unknown = [torch.zeros(len(self.example_ids)) for _ in range(2)]
        hashes = {id: hashes[id] for id in self.examples.tolist()}  # in the order of the examples
        return Provenance.build(self.example_ids, self.positions, *unknown, {}, hashes)

    def select(self, keep: Tensor) -> "Provenance":
        """Of the rows where `keep` (N,) bool is true, with the texts of the examples that still have a row."""
        left = set(self.example_ids[keep].tolist())
        texts = [{id: x for id, x in part.items() if id in left} for part in (self.tokens(), self.hashes())]
        return Provenance.build(*(column[keep] for column in self._columns()), *texts)

    def joined(self, other: "Provenance") -> "Provenance":
        """
        Of the rows of both, one after the other.

        If either lacks the tokens of its examples, the tokens of the other are left out as well (`without_text`).
        """
        sides = [self, other]
        if any(side.has_text for side in sides) and any(side.hashes() for side in sides):
            sides = [side.without_text() for side in sides]
        one, two = sides
        columns = map(torch.cat, zip(one._columns(), two._columns()))
        return Provenance.build(*columns, one.tokens() | two.tokens(), one.hashes() | two.hashes())

    def renumbered(self, ids: Mapping[int, int]) -> "Provenance":
        """A copy with example ids replaced, `{old: new}`; ids that are not in it stay."""

        def swap(tensor: Tensor) -> Tensor:
            return torch.tensor([ids.get(i, i) for i in tensor.tolist()], dtype=torch.int64)

        return replace(self, example_ids=swap(self.example_ids), examples=swap(self.examples))

    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.example_ids, self.positions, self.nll_before, self.nll_after

    @property
    def sizes(self) -> tuple[int, int, int]:
        """X, the number of tokens, and G."""
        return len(self.examples), len(self.token_ids), len(self.ngrams)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are stored, by their names in a memory's files; those of n-grams only if there are any."""
        stored = {f"provenance.{field.name}": getattr(self, field.name) for field in fields(self)}
        return {name: stored[name] for name in Provenance.specification(len(self.example_ids), *self.sizes)}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], folder: Path) -> "Provenance":
        """
        The opposite of `tensors`, which are a memory's in this folder; other tensors are ignored.

        Raises:
            MemoryFileError: if offsets do not divide what they should, or an example stands there twice.
        """
        names = [f"provenance.{field.name}" for field in fields(cls)]
        found = cls(**{name.removeprefix("provenance."): tensors[name] for name in names if name in tensors})
        for bounds, of in (("offsets", "token_ids"), ("ngram_offsets", "ngrams")):
            offsets = getattr(found, bounds)
            falls = bool((offsets[1:] < offsets[:-1]).any())  # a difference may overflow
            if offsets[0] != 0 or offsets[-1] != len(getattr(found, of)) or falls:
                raise unusable(folder, f"its provenance.{bounds} do not divide its {of}")
        if len(found.examples.unique()) != len(found.examples):
            raise unusable(folder, "its provenance.examples name an example twice")
        return found

    @staticmethod
    def bounds() -> dict[str, Bounds]:
        """What the numbers in the tensors that are stored can be."""
        return {
            "provenance.positions": Bounds(-1, 2**31 - 1),
            "provenance.token_ids": Bounds(0, 2**31 - 1),
        }

    @classmethod
    def specification(
        cls, rows: int, examples: int, tokens: int, ngrams: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that is stored, by its name in a memory's files."""
        stored = {
            "provenance.example_ids": ((rows,), torch.int64),
            "provenance.positions": ((rows,), torch.int32),
            "provenance.nll_before": ((rows,), torch.float32),
            "provenance.nll_after": ((rows,), torch.float32),
            "provenance.examples": ((examples,), torch.int64),
            "provenance.offsets": ((examples + 1,), torch.int64),
            "provenance.token_ids": ((tokens,), torch.int32),
        }
        if ngrams:
            stored["provenance.ngrams"] = ((ngrams,), torch.int64)
            stored["provenance.ngram_offsets"] = ((examples + 1,), torch.int64)
        return stored


def _packed(pieces: Mapping[int, Tensor], examples: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Offsets (X + 1,) int64 and the pieces of these examples, one after the other."""
    none = torch.zeros(0, dtype=dtype)
    parts = [torch.as_tensor(pieces[id], dtype=dtype) if id in pieces else none for id in examples]
    lengths = torch.tensor([0] + [len(part) for part in parts], dtype=torch.int64)
    return lengths.cumsum(0), torch.cat([none, *parts])


def _pieces(examples: Tensor, offsets: Tensor, values: Tensor) -> dict[int, Tensor]:
    """The values of each example that has any."""
    bounds = offsets.tolist()
    found = zip(examples.tolist(), bounds[:-1], bounds[1:])
    return {example: values[start:end] for example, start, end in found if end > start}
