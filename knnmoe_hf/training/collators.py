"""A user's `data_collator`: it is tried when the trainer is made, and what it returns is compared with its rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from knnmoe_hf.data.batches import IGNORED, collate
from knnmoe_hf.data.examples import Examples
from knnmoe_hf.errors import in_one_line, shown

_COLUMNS = ("input_ids", "labels", "attention_mask")
_WAY_OUT = "leave data_collator out, or return what the rows say, padded on either side"


class CheckedCollator:
    """
    A user's collator, whose every batch is compared with its rows; the examples' ids are added to the batch.

    Args:
        collator: from a list of rows to a batch.
        gives_ids: whether the rows that it gets have their `example_id` too.
    """

    def __init__(self, collator: Callable, gives_ids: bool = False):
        self.collator, self.gives_ids = collator, gives_ids

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        The batch of these rows.

        Raises:
            ValueError: if the batch says something else than the rows.
        """
        names = (*_COLUMNS, "example_id") if self.gives_ids else _COLUMNS
        bare = [{name: row[name] if name == "example_id" else list(row[name]) for name in names} for row in rows]
        batch = self.collator(bare)
        if found := difference(batch, rows):
            raise ValueError(f"data_collator={shown(self.collator)} {found}: {_WAY_OUT}.")
        return dict(batch) | {"example_id": torch.tensor([row["example_id"] for row in rows])}


def checked_collator(collator: Callable | None, dataset, vocab_size: int) -> Callable:
    """
    A collator that gives the trainer what it needs: `collate`, or the user's, tried on three small rows.

    Args:
        collator: the user's; None for `collate`.
        dataset: what it will be used for; only if all of its examples have the same length are those rows as long as
            each other.
        vocab_size: token ids of the rows are smaller.

    Raises:
        ValueError: for a collator that fails on such rows, or that says something else than they do.
    """
    if collator is None or collator is collate:
        return collate
    if not callable(collator):
        raise ValueError(
            f"data_collator={shown(collator)} is not allowed: pass a function of a list of rows, or None."
        )
    alike = isinstance(dataset, Examples) and len(dataset) > 1 and len(set(dataset.lengths.tolist())) == 1
    rows = _small_rows((5, 5, 5) if alike else (4, 6, 5), vocab_size)
    failures = []
    for gives_ids in (False, True):  # most collators cannot pad a column that they do not know, a few want it
        checked = CheckedCollator(collator, gives_ids)
        try:
            checked(rows)
            return checked
        except Exception as error:  # whatever the user's function raises
            failures.append(error)
    error = failures[0]
    if isinstance(error, ValueError) and str(error).endswith(f"{_WAY_OUT}."):
        raise error
    kind = "of the same length" if alike else "of different lengths"
    reason = f"{type(error).__name__}: {in_one_line(error)}"
    raise ValueError(
        f"data_collator={shown(collator)} fails on rows of {', '.join(_COLUMNS)} {kind} ({reason}): {_WAY_OUT}."
    ) from error


def difference(batch: Any, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What a batch says else than its rows, as the end of a sentence about the collator; None if nothing."""
    if not isinstance(batch, Mapping):
        return f"returns {type(batch).__name__} and no dict"
    mask = batch.get("attention_mask")
    columns = {name: batch.get(name) for name in ("input_ids", "labels")}
    for name, column in (columns if mask is None else columns | {"attention_mask": mask}).items():
        if not isinstance(column, Tensor) or column.is_floating_point():
            return f"returns {name}={shown(column)} and no tensor of integers"
        if column.dim() != 2 or len(column) != len(rows) or column.shape != batch["input_ids"].shape:
            return f"returns {name} of shape {tuple(column.shape)} for {len(rows)} rows"
    real = torch.ones_like(columns["labels"], dtype=torch.bool) if mask is None else mask.bool()
    for place, row in enumerate(rows):
        kept = torch.tensor([bool(one) for one in row["attention_mask"]])
        for name, column in columns.items():
            if column[place][real[place]].tolist() != torch.tensor(row[name])[kept].tolist():
                padded = mask is None and column.shape[1] > int(kept.sum())
                return "pads and returns no attention_mask" if padded else f"changes the {name} of its rows"
        if (columns["labels"][place][~real[place]] != IGNORED).any():
            return f"gives padding labels other than {IGNORED}"
    return None


def _small_rows(lengths: Sequence[int], vocab_size: int) -> list[dict[str, Any]]:
    """Rows of distinct tokens, whose first two have labels of -100."""
    rows, first = [], vocab_size // 2  # away from special tokens, which most vocabularies have at an end
    for place, length in enumerate(lengths):
        ids = [(first + 7 * place + one) % vocab_size for one in range(length)]
        labels = [IGNORED, IGNORED, *ids[2:]]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * length, "example_id": place})
    return rows
