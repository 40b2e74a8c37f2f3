"""
The token that follows each row of a memory, by which `recall="next_tokens"` and `"both"` work.

It is read from the text of the references where provenance has it, and otherwise stored, four bytes a row. In the
order of the rows these tokens are the text of the references.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.blocks import Bounds
from knnmoe_hf.memory.provenance import Provenance

TENSOR = "next_tokens"
"""Its name in a memory's files."""
BELOW = 2**31 - 1
"""First token id that is too large, whatever the vocabulary."""


def next_tokens_of(rows: int, provenance: Provenance | None, stored: Tensor | None) -> Tensor | None:
    """
    (N,) int32, the token that follows each row: `stored` if there is such a tensor, otherwise as the text says.

    None if the token of any row is not known: without text, for a row whose position is not recorded (-1), and for the
    last token of an example.
    """
    if stored is not None:
        return stored
    if not rows:
        return torch.zeros(0, dtype=torch.int32)
    found = _in_text(provenance) if provenance is not None and provenance.has_text else None
    return found if found is not None and bool((found >= 0).all()) else None


def why_unknown(provenance: Provenance | None) -> str:
    """Why `next_tokens_of` is None, as a clause of a sentence."""
    if provenance is None or not provenance.has_text:
        return "this memory has neither the text of its references nor the token that follows each row"
    unknown = int((_in_text(provenance) < 0).sum())
    return (
        f"in the text of its references, {unknown} of this memory's {len(provenance.example_ids)} rows have no next "
        "token, because the row's position or its example's text is not recorded or ends there"
    )


def _in_text(known: Provenance) -> Tensor:
    """(N,) int32, the token that follows each row in the text of its example; -1 where that is not known."""
    order = known.examples.argsort()
    slot = torch.searchsorted(known.examples[order], known.example_ids).clamp(max=len(order) - 1)
    example = order[slot]
    place = known.offsets[example] + known.positions + 1
    there = (known.examples[example] == known.example_ids) & (known.positions >= 0)
    there &= place < known.offsets[example + 1]
    return torch.where(there, known.token_ids[place.clamp(0, len(known.token_ids) - 1)], -1)


def check_next_tokens(given: Iterable[int] | Tensor | None, rows: int) -> Tensor | None:
    """
    A user's next tokens as a memory stores them, (N,) int32 on the CPU; None if none are given.

    Raises:
        ValueError: for other than one token id per row.
    """
    if given is None:
        return None
    try:
        ids = torch.as_tensor(given if isinstance(given, Tensor) else list(given)).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"next_tokens={shown(given)} are not token ids: give {rows} integers.") from error
    whole = not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool
    if tuple(ids.shape) != (rows,) or not (whole or not rows):
        raise ValueError(
            f"next_tokens are {list(ids.shape)} {ids.dtype}: one token id for each of the {rows} rows is needed, or "
            "None."
        )
    if rows and not (0 <= int(ids.min()) and int(ids.max()) < BELOW):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"next_tokens hold {int(wrong)}, which is not a token id: give ids from 0 to {BELOW - 1}.")
    return ids.int().contiguous()


def specification(rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensor that is stored, by its name in a memory's files."""
    return {TENSOR: ((rows,), torch.int32)}


def bounds() -> dict[str, Bounds]:
    """What the numbers in that tensor can be."""
    return {TENSOR: Bounds(0, BELOW - 1)}
