"""Test text that a memory's references hold too: what a memory gains there says nothing about other text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from knnmoe_hf.data.ngrams import NGRAM
from knnmoe_hf.evaluation.references import LookedUp, References
from knnmoe_hf.memory import RoutingMemory


@dataclass(frozen=True)
class Overlap:
    """
    How much of a test text is in the references of a memory.

    Attributes:
        windows: test rows with a target.
        overlapping: how many of them overlap the references (see `knnmoe_hf.evaluation.references`).
        left_out: how many of them are not scored for that reason: all of these, or none.
        share: of the runs of `NGRAM` tokens that end in a target, over all windows: how many the references have; None
            if none could be looked up.
        unchecked: windows of which nothing could be looked up; they count as not overlapping.
        unknown_references: references of which neither tokens nor hashes are kept.
    """

    windows: int
    overlapping: int
    left_out: int
    share: float | None
    unchecked: int
    unknown_references: int

    @classmethod
    def of_counts(cls, counts: Tensor, references: References, allowed: bool) -> "Overlap":
        """Of summed `counts`; `allowed`: windows that overlap are scored all the same."""
        windows, overlapping, unchecked, found, runs = counts.tolist()
        share = found / runs if runs else None
        return cls(windows, overlapping, 0 if allowed else overlapping, share, unchecked, references.unknown)

    @property
    def checked(self) -> bool:
        """Whether anything could be looked up."""
        return self.share is not None

    @property
    def scored(self) -> int:
        """Windows that are scored."""
        return self.windows - self.left_out

    def sentence(self) -> str:
        """What was found, as a sentence."""
        if not self.checked:
            return (
                f"whether the memory holds any of the {self.windows} windows of test text could not be checked: it "
                "keeps neither the text of its references nor enough hashes of it."
            )
        said = f"{self.overlapping or 'none'} of the {self.windows} windows of test text overlap the references"
        if self.left_out:
            said += " and are left out"
        elif self.overlapping:
            said += " and are scored all the same, so the change is not that on new text"
        said += f" ({100 * self.share:.1f} % of all runs of {NGRAM} tokens are in there)."
        if self.unchecked:
            said += f" {self.unchecked} windows could not be checked, as too little of them is kept as hashes."
        if self.unknown_references:
            said += f" {self.unknown_references} references could not be looked up, as their text is not kept."
        return said

    def check_any_left(self, what: str = "the test text") -> None:
        """
        Refuses a test text of which nothing is left to score.

        Raises:
            ValueError: if every window is left out.
        """
        if self.windows and not self.scored:
            raise ValueError(
                f"the memory holds all {self.windows} windows of {what}: give held-out text, or use "
                "allow_overlap=True (--allow-overlap) to score them all the same."
            )


def counts(looked_up: LookedUp) -> Tensor:
    """Sums over rows, (5,) int64: windows, those that overlap, those unchecked, runs found and runs looked up."""
    window, overlaps, found, runs = looked_up
    return torch.stack([part.sum() for part in (window, overlaps, window & (runs == 0), found, runs)])


def without_overlap(
    memory: RoutingMemory, rows: Sequence[Mapping[str, Any]], allowed: bool = False
) -> tuple[Sequence[Mapping[str, Any]], Overlap]:
    """
    Leaves out the test rows whose text is among the references of a memory, in any chunking.

    Args:
        memory: rows are looked up in the tokens of its references; in the hashes of a quarter of their runs, if it was
            saved without text; in nothing, if it keeps neither.
        rows: as `prepare_dataset` returns them.
        allowed: look them up, but leave none out.

    Returns:
        The rows that are left (`rows` itself if all are), and what was found.
    """
    references = References.of(memory.provenance)
    looked_up = references.look_up(rows)
    overlap = Overlap.of_counts(counts(looked_up), references, allowed)
    if not overlap.left_out:
        return rows, overlap
    kept = (~looked_up.overlaps).nonzero().flatten().tolist()
    return [rows[i] for i in kept] if isinstance(rows, list) else Subset(rows, kept), overlap
