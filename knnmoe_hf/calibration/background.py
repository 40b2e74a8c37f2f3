"""Background text: text on which a memory should do nothing, which a calibration compares the references with.

If the user gives none, it is what this machine carries anyway: three kinds of text about software (Python library
sources, C++ headers of torch, descriptions and licences of installed packages). That is not a sample of what people
write; text of the kind that a model meets beside the domain makes a better calibration. What was read is recorded in
the memory.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import DatasetDict

from knnmoe_hf.calibration.machine_text import files
from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.errors import shown

KINDS = {"python": "train", "headers": "reference", "notices": "reference"}
"""Kinds of this machine's text that are read, and the split of each (see `knnmoe_hf.calibration.machine_text`)."""

GIVEN, THIS_MACHINE = "given", "this machine"
_WINDOWS, _LENGTH = 16, 256
_CHARACTERS = 16 * _LENGTH  # more than enough for a window of `_LENGTH` tokens
_GIVEN_ROWS = 64
_LEAST_UNREAD = 8  # windows to measure on, so that fewer than 32 given rows are all read by the calibration


@dataclass(frozen=True)
class BackgroundText:
    """
    One kind of background text.

    Attributes:
        rows: what a calibration reads, as `prepare_dataset` returns them.
        source: `"given"` by the user, or `"this machine"`.
        files: names of the files that were read; none if given.
        unread: other rows of this kind, that no calibration reads: the cost of a memory is measured on them.
    """

    rows: Sequence[dict]
    source: str = GIVEN
    files: Sequence[str] = ()
    unread: Sequence[dict] = ()

    def record(self) -> dict[str, Any]:
        """What a memory keeps of it: `source`, `files`, numbers of `examples` and `tokens`, `sha256` of the ids."""
        digest, tokens = hashlib.sha256(), 0
        for row in self.rows:
            digest.update(torch.tensor(list(row["input_ids"]), dtype=torch.int64).numpy().tobytes())
            tokens += len(row["input_ids"])
        return {
            "source": self.source,
            "files": list(self.files),
            "examples": len(self.rows),
            "tokens": tokens,
            "sha256": digest.hexdigest(),
        }


def prepare_background(dataset, tokenizer, max_length: int | None, **reading) -> dict[str, BackgroundText] | None:
    """
    A user's background text by kind, at most 64 rows of each, evenly over the whole; None for None.

    Of 32 rows and more, a quarter, at most 16, also evenly over the whole, is left unread by a calibration.

    Args:
        dataset: rows as `prepare_dataset` takes them, or several such data sets by kind; kinds that already are
            `BackgroundText` stay as they are.
        tokenizer, max_length, reading: see `prepare_dataset`.

    Raises:
        ValueError: for a data set of unknown length, and as `prepare_dataset` raises.
    """
    if dataset is None:
        return None
    by_kind = isinstance(dataset, Mapping) and not isinstance(dataset, DatasetDict)
    kinds = dataset if by_kind else {"given": dataset}
    return {
        kind: rows
        if isinstance(rows, BackgroundText)
        else _given(rows, tokenizer, max_length, "ordinary_dataset" + (f"[{kind!r}]" if by_kind else ""), **reading)
        for kind, rows in kinds.items()
    }


def _given(rows, tokenizer, max_length: int | None, name: str, **reading) -> BackgroundText:
    _check_length(rows)
    unread = min(_WINDOWS, len(rows) // 4)
    unread = unread if unread >= _LEAST_UNREAD else 0
    if len(rows) - unread >= _GIVEN_ROWS:
        read = _places(len(rows), _GIVEN_ROWS)
        others = sorted(set(range(len(rows))) - set(read))
        kept_back = [others[place] for place in _places(len(others), unread)]
    else:
        kept_back = [len(rows) * (2 * turn + 1) // (2 * unread) for turn in range(unread)]
        read = sorted(set(range(len(rows))) - set(kept_back))
    prepared, unseen = (
        prepare_dataset(rows, tokenizer, max_length, name=name, indices=part, **reading) for part in (read, kept_back)
    )
    return BackgroundText(prepared, unread=unseen)


def machine_background(
    tokenizer, processes: Processes = ALONE, vocab_size: int | None = None
) -> dict[str, BackgroundText]:
    """
    Windows of 256 tokens of each kind of this machine's text, each from another file: sixteen to be read by a
    calibration, and up to sixteen unread ones.

    Several processes take turns at the kinds, and all get the same rows, whatever each one's machine carries.

    Args:
        tokenizer: of the model.
        processes: that call this alike.
        vocab_size: of the model; None if it is not known.

    Raises:
        BadRowError: if the tokenizer is not the model's.
    """
    reading = dict(name="background text of this machine", vocab_size=vocab_size)

    def read(kind: str) -> BackgroundText:
        windows = []
        for name, passage in _passages(kind, KINDS[kind]):
            ids = tokenizer(passage, add_special_tokens=False, truncation=True, max_length=_LENGTH)["input_ids"]
            if len(ids) == _LENGTH:
                windows.append((name, {"input_ids": ids, "labels": ids}))
        read = _places(len(windows), _WINDOWS)
        others = sorted(set(range(len(windows))) - set(read))
        unread = [others[place] for place in _places(len(others), _WINDOWS)]
        rows, unseen = (
            prepare_dataset([windows[i][1] for i in part], None, None, **reading) for part in (read, unread)
        )
        return BackgroundText(rows, THIS_MACHINE, [windows[i][0] for i in read], unseen)

    return dict(zip(KINDS, processes.map(KINDS, read)))


def _check_length(rows) -> None:
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ValueError(
            f"background text {shown(rows)} has no length: pass a list or a Dataset, such as its first rows."
        )


def _places(length: int, most: int) -> list[int]:
    """At most `most` indices below `length`, evenly over the whole."""
    count = min(length, most)
    return [index * length // count for index in range(count)]


@functools.cache
def _passages(kind: str, split: str) -> list[tuple[str, str]]:
    """`(file, text)`, 4,096 characters from the middle of each long file (beginnings are unrepresentative)."""
    long = [(name, text) for name, text in files(kind, split) if len(text) > _CHARACTERS]
    every = max(1, len(long) // (2 * _WINDOWS))
    return [(name, text[len(text) // 2 :][:_CHARACTERS]) for name, text in long[::every]]
