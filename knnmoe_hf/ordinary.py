"""Ordinary text for a calibration when the user gives none: what this machine carries anyway.

It is three kinds of text about software (library sources of Python, C++ headers of torch, descriptions and licences of
installed packages), not a sample of what people write. It tells a memory what text without its domain looks like; text
of the kind that a model will really meet beside the domain tells it better.
"""

import functools
from collections.abc import Sequence

from knnmoe_hf.data import prepare_dataset
from knnmoe_hf.errors import shown
from knnmoe_hf.lab.corpus import documents

KINDS = {"python": "train", "headers": "reference", "notices": "reference"}
"""Kinds of text and the split of each, as in `knnmoe_hf.lab.corpus`."""
_WINDOWS, _LENGTH = 16, 256
_GIVEN = 64  # rows of a user's data set


def prepare_ordinary(dataset, tokenizer, max_length: int | None) -> dict[str, Sequence[dict]] | None:
    """
    A user's ordinary text by kind, 64 rows of each at most, evenly over the whole; None for None.

    Args:
        dataset: rows as `prepare_dataset` takes them, or several such by kind.
        tokenizer, max_length: see `prepare_dataset`.

    Raises:
        ValueError: for a data set of unknown length, and as `prepare_dataset` raises.
    """
    if dataset is None:
        return None
    kinds = dict(dataset) if isinstance(dataset, dict) else {"given": dataset}
    return {kind: prepare_dataset(_sampled(rows), tokenizer, max_length) for kind, rows in kinds.items()}


def _sampled(rows) -> list[dict]:
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ValueError(
            f"ordinary text {shown(rows)} has no length: pass a list or a Dataset, such as its first rows."
        )
    count = min(len(rows), _GIVEN)
    return [rows[index * len(rows) // count] for index in range(count)]


def ordinary_rows(tokenizer) -> dict[str, list[dict]]:
    """Sixteen windows of 256 tokens of each kind, each from another document, as `prepare_dataset` returns rows."""
    return {kind: _windows(_passages(kind, split), tokenizer) for kind, split in KINDS.items()}


@functools.cache
def _passages(kind: str, split: str) -> list[str]:
    """From the middle of long documents, as what one begins with is not what it is like; twice as many as windows."""
    long = [text for text in documents(kind, split) if len(text) > 16 * _LENGTH]
    return [text[len(text) // 2 :][: 16 * _LENGTH] for text in long[:: max(1, len(long) // (2 * _WINDOWS))]]


def _windows(passages: list[str], tokenizer) -> list[dict]:
    rows = []
    for text in passages:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:_LENGTH]
        if len(ids) == _LENGTH and len(rows) < _WINDOWS:
            rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * _LENGTH, "example_id": len(rows)})
    return rows
