"""Looking up text in the references of a memory, in any chunking."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knnmoe_hf.data.batches import as_list, target_mask
from knnmoe_hf.data.ngrams import KEPT, NGRAM, example_hashes, is_kept, ngram_hashes
from knnmoe_hf.memory.provenance import Provenance

COPIED, COPIED_SHARE = 16, 0.25
SHORT, SHORT_SHARE = 3, 0.5  # of rows that are too short for the above, such as lines and sentences
WHOLE = 0.9
COMMON = 4  # references; a run that more of them have belongs to their form (a licence, a template), not to one text
_SHORTEST = 6  # tokens; a shorter row is compared with whole references alone: anything so short is in some text
_AT_ONCE = 1024  # rows
_COLUMNS = ("input_ids", "labels", "attention_mask")


class LookedUp(NamedTuple):
    """
    Of n rows, each a tensor (n,).

    Attributes:
        window: bool, has a target.
        overlaps: bool.
        found, runs: int64, runs of tokens that end in a target: those that the references have, and all that could be
            looked up.
    """

    window: Tensor
    overlaps: Tensor
    found: Tensor
    runs: Tensor


class References:
    """
    The text of references, by the hashes of its runs of `NGRAM` tokens.

    A row overlaps if at least `COPIED` of its runs that end in a target are in the references, and these are at least
    `COPIED_SHARE` of them; runs that more than `COMMON` references have are not counted. It also overlaps if at least
    `SHORT` of these runs, and `SHORT_SHARE` of them, are in the references, or if `WHOLE` of all its runs are, common
    ones included; both need the same share of the rest of the row. So a prompt, a template or a licence that many
    rows share makes no overlap. A row that is shorter than a run overlaps if it is a reference or, from six tokens
    on, a part of one.

    Not found are copies in which hardly a run of `NGRAM` tokens is the same (paraphrases, another tokenisation), and
    parts of a row that more than `COMMON` references have, each cut at another place.

    Args:
        token_ids, offsets: (T,) and (X + 1,), the tokens of X references as in `Provenance`.
        kept: (G,) and (X + 1,), their hashes as in `Provenance`, where there are no tokens.
        unknown: number of references of which there is neither.
    """

    def __init__(
        self, token_ids: Tensor, offsets: Tensor, kept: tuple[Tensor, Tensor] | None = None, unknown: int = 0
    ):
        self.unknown = unknown
        self._text, self._sampled = (token_ids.long(), offsets), kept is not None
        self._hashes, self._common = _distinct(*(example_hashes(*self._text) if kept is None else kept))
        self._empty = not len(token_ids) and not len(self._hashes)
        self._short: dict[int, Tensor] = {}  # hashes by their length, made when a row of that length comes

    @classmethod
    def of(cls, provenance: Provenance | None) -> "References":
        """Of a memory; without provenance, nothing can be looked up."""
        if provenance is None:
            return cls.of_rows([])
        unknown = provenance.example_ids[~torch.isin(provenance.example_ids, provenance.examples)].unique()
        kept = (provenance.ngrams, provenance.ngram_offsets) if len(provenance.ngrams) else None
        return cls(provenance.token_ids, provenance.offsets, kept, len(unknown))

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> "References":
        """Of examples as `prepare_dataset` returns them."""
        return cls(*_joined([_tokens(row)[0] for row in rows]))

    def overlapping(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """Which rows overlap the references, (n,) bool; `rows` as `prepare_dataset` returns them."""
        return self.look_up(rows).overlaps

    def look_up(self, rows: Sequence[Mapping[str, Any]]) -> LookedUp:
        """Looks up rows as `prepare_dataset` returns them, many or one."""
        parts = []
        for start in range(0, max(len(rows), 1), _AT_ONCE):
            parts.append(self._look_up([_tokens(rows[i]) for i in range(start, min(start + _AT_ONCE, len(rows)))]))
        return LookedUp(*map(torch.cat, zip(*parts)))

    def _look_up(self, rows: list[tuple[Tensor, Tensor]]) -> LookedUp:
        """Of rows of token ids (S,), and which of them are targets, (S,) bool."""
        window = torch.tensor([bool(targets.any()) for _, targets in rows], dtype=torch.bool)
        if self._empty:
            nothing = torch.zeros(len(rows), dtype=torch.int64)
            return LookedUp(window, nothing.bool(), nothing, nothing)
        overlaps, found, runs = self._look_up_runs(rows)
        for index, (ids, _) in enumerate(rows):
            if len(ids) < NGRAM and window[index] and not self._sampled:
                overlaps[index] = torch.isin(ngram_hashes(ids, len(ids)), self._short_hashes(len(ids))).any()
                found[index], runs[index] = overlaps[index], 1
        return LookedUp(window, overlaps & window, found, runs)

    def _look_up_runs(self, rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Which rows overlap, and of their runs that end in a target how many were found, and all."""
        hashes, row, target = _runs(rows)
        if self._sampled:
            chosen = is_kept(hashes)
            hashes, row, target = hashes[chosen], row[chosen], target[chosen]
        place = torch.searchsorted(self._hashes, hashes).clamp_max(max(len(self._hashes) - 1, 0))
        found = self._hashes[place] == hashes if len(self._hashes) else torch.zeros_like(target)
        own = ~(found & self._common[place]) if len(self._hashes) else ~found

        def count(which: Tensor) -> Tensor:
            return torch.bincount(row[which], minlength=len(rows))

        runs, hits = count(target), count(target & found)
        own_hits, own_runs = count(target & found & own), count(target & own)
        of_prompt, prompt_hits = count(~target & own), count(~target & found & own)
        least, few = (COPIED // KEPT, 2) if self._sampled else (COPIED, SHORT)
        copied = (own_hits >= least) & (own_hits >= COPIED_SHARE * own_runs)
        copied |= (own_hits >= few) & (own_hits >= SHORT_SHARE * own_runs) & (prompt_hits >= SHORT_SHARE * of_prompt)
        whole = (runs > 0) & (hits >= WHOLE * runs) & (prompt_hits >= WHOLE * of_prompt)
        return copied | whole, hits, runs

    def _short_hashes(self, length: int) -> Tensor:
        """Hashes of all runs of so few tokens; those that are whole references, if it is less than `_SHORTEST`."""
        if length not in self._short:
            hashes, bounds = example_hashes(*self._text, length)
            whole = bounds[:-1][self._text[1].diff() == length]
            self._short[length] = hashes if length >= _SHORTEST else hashes[whole]
        return self._short[length]


def _tokens(row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """A row's token ids without padding, (S,) int64, and which of them are targets, (S,) bool."""
    ids, labels, mask = (torch.as_tensor(as_list(row[name])).long() for name in _COLUMNS)
    targets = target_mask(labels[None], mask[None])[0].roll(1)  # of each token, not of the one before it
    return ids[mask.bool()], targets[mask.bool()]


def _joined(examples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The tokens of one example after the other, and where each begins."""
    lengths = torch.tensor([0, *map(len, examples)], dtype=torch.int64)
    return torch.cat([torch.zeros(0, dtype=torch.int64), *examples]), lengths.cumsum(0)


def _runs(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The hash of every run (G,), its row, and whether it ends in a target; all do in a row where none does."""
    token_ids, offsets = _joined([ids for ids, _ in rows])
    targets = torch.cat([torch.zeros(0, dtype=torch.bool), *(targets for _, targets in rows)])
    hashes, bounds = example_hashes(token_ids, offsets)
    row = torch.repeat_interleave(torch.arange(len(rows)), bounds.diff())
    last = torch.arange(len(hashes)) + (offsets - bounds)[row] + NGRAM - 1
    target = targets[last]
    return hashes, row, target | (torch.bincount(row[target], minlength=len(rows)) == 0)[row]


def _distinct(hashes: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """
    The distinct hashes of all references in ascending order, and which of them more than `COMMON` of them have.

    References with the same hashes count once: an example that is there ten times is not a template.
    """
    owner = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    sums = torch.zeros(len(bounds) - 1, dtype=torch.int64).index_add(0, owner, hashes)
    owner = sums.unique(return_inverse=True)[1][owner]
    order = owner.argsort()
    order = order[hashes[order].argsort(stable=True)]
    hashes, owner = hashes[order], owner[order]
    first = torch.ones_like(hashes, dtype=torch.bool)
    first[1:] = (hashes.diff() != 0) | (owner.diff() != 0)
    distinct, references = hashes[first].unique_consecutive(return_counts=True)
    return distinct, references > COMMON
