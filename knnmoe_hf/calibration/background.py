"""Ordinary text for a calibration when the user gives none: what this machine carries anyway.

It is three kinds of text about software (library sources of Python, C++ headers of torch, descriptions and licences of
installed packages), not a sample of what people write. It tells a memory what text without its domain looks like; text
of the kind that a model will really meet beside the domain tells it better.
"""

import functools
from collections.abc import Sequence

from datasets import DatasetDict

from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.errors import shown
from knnmoe_hf.lab.corpus import documents
from knnmoe_hf.training.data import prepare_dataset

KINDS = {"python": "train", "headers": "reference", "notices": "reference"}
"""Kinds of text and the split of each, as in `knnmoe_hf.lab.corpus`."""
_WINDOWS, _LENGTH = 16, 256
_GIVEN = 64  # rows of a user's data set


def prepare_background(dataset, tokenizer, max_length: int | None) -> dict[str, Sequence[dict]] | None:
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
    several = isinstance(dataset, dict) and not isinstance(dataset, DatasetDict)
    kinds = dataset if several else {"given": dataset}
    return {kind: prepare_dataset(_sampled(rows, _GIVEN), tokenizer, max_length) for kind, rows in kinds.items()}


def _sampled(rows, most: int) -> list[dict]:
    """At most so many, evenly over the whole."""
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ValueError(
            f"ordinary text {shown(rows)} has no length: pass a list or a Dataset, such as its first rows."
        )
    count = min(len(rows), most)
    return [rows[index * len(rows) // count] for index in range(count)]


def background_rows(tokenizer, processes: Processes = ALONE) -> dict[str, list[dict]]:
    """
    Sixteen windows of 256 tokens of each kind, each from another document, as `prepare_dataset` returns rows.

    Several processes take turns at the kinds, and all get the same rows, whatever each one's machine carries.
    """

    def read(kind: str) -> list[dict]:
        windows = _sampled(_windows(_passages(kind, KINDS[kind]), tokenizer), _WINDOWS)
        return prepare_dataset(windows, None, None)

    return dict(zip(KINDS, processes.map(KINDS, read)))


@functools.cache
def _passages(kind: str, split: str) -> list[str]:
    """From the middle of long documents, as what one begins with is not what it is like; twice as many as windows."""
    long = [text for text in documents(kind, split) if len(text) > 16 * _LENGTH]
    return [text[len(text) // 2 :][: 16 * _LENGTH] for text in long[:: max(1, len(long) // (2 * _WINDOWS))]]


def _windows(passages: list[str], tokenizer) -> list[dict]:
    call = dict(add_special_tokens=False, truncation=True, max_length=_LENGTH)
    cut = (tokenizer(text, **call)["input_ids"] for text in passages)
    return [{"input_ids": ids, "labels": ids} for ids in cut if len(ids) == _LENGTH]
