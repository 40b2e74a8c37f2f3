"""Data sets into examples: token ids and labels, each with the id that a memory knows it by."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import datasets
import numpy as np
from torch.utils.data import IterableDataset

from knnmoe_hf.data.reading import ReadingReport, RowReader
from knnmoe_hf.errors import BadRowError, shown


class Examples(Sequence):
    """
    Examples in memory, at nine bytes a token.

    An element is a dict of the lists `input_ids`, `labels` and `attention_mask`, of the same length, and the integer
    `example_id`; a slice is a list of such dicts.

    Args:
        rows: such dicts; without an `example_id` an example is known by its index.
        report: how they were read.

    Attributes:
        report (`ReadingReport`): as given.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], report: ReadingReport | None = None):
        ids, labels, mask = array("i"), array("i"), array("b")
        ends, names = array("q", [0]), array("q")
        for index, row in enumerate(rows):
            ids.extend(row["input_ids"])
            labels.extend(row["labels"])
            mask.extend(row["attention_mask"])
            ends.append(len(ids))
            names.append(row.get("example_id", index))
        self.report = report if report is not None else ReadingReport(rows=len(names), examples=len(names))
        self._columns = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        self._ends, self._names = ends, names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones too; raises IndexError
        part = slice(self._ends[index], self._ends[index + 1])
        row = {name: column[part].tolist() for name, column in self._columns.items()}
        return row | {"example_id": self._names[index]}

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, padding included, (X,) int64."""
        return np.diff(np.frombuffer(self._ends, dtype=np.int64))


class ExampleStream(IterableDataset):
    """
    The examples of a stream of rows, which are read one by one.

    Args:
        rows: any iterable.
        reader: reads a row.
        name: of the data set, for errors.

    Attributes:
        report (`ReadingReport`): of the rows that were read so far in this process.
        when_read: called with the report when the rows have been read for the first time.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], reader: RowReader, name: str):
        self.rows, self.reader, self.name = rows, reader, name
        self.when_read: Callable[[ReadingReport], None] | None = None

    @property
    def report(self) -> ReadingReport:
        return self.reader.report

    def __iter__(self) -> Iterator[dict]:
        self.reader.begin()  # each pass counts anew
        yield from _examples(enumerate(self.rows), self.reader, self.name)
        if self.when_read is not None:
            self.when_read(self.report)
            self.when_read = None


def prepare_dataset(
    dataset,
    tokenizer,
    max_length: int | None,
    *,
    text_field: str = "text",
    ignore_columns: Iterable[str] | None = (),
    skip_bad_rows: bool = False,
    vocab_size: int | None = None,
    name: str = "train_dataset",
    indices: Sequence[int] | None = None,
):
    """
    Converts a data set to examples `{"input_ids", "labels", "attention_mask", "example_id"}`.

    Args:
        dataset: a Dataset or IterableDataset of `datasets` or torch, or any sequence of rows; for the forms of a row
            see `knnmoe_hf.data.forms`. It may have an integer `example_id`, which is by default its index, counted on
            by one for each further document of a packed row before it.
        tokenizer, max_length, text_field, ignore_columns, skip_bad_rows, vocab_size: see `RowReader`.
        name: of the data set, for errors.
        indices: of the rows to read, ascending; all if None, and always all of an iterable data set.

    Returns:
        `Examples`, or an `ExampleStream` for an iterable data set; both have a `report`.

    Raises:
        BadRowError: for a row that cannot be used, which is known by its index.
        ValueError: for a row of text without a tokenizer, a DatasetDict, or if all rows were skipped.
    """
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        kind, splits = type(dataset).__name__, shown(list(dataset))
        raise ValueError(f"a {kind} of {splits} is not allowed: pass one of its splits, as in dataset['train'].")
    reader = RowReader(
        tokenizer,
        max_length,
        text_field=text_field,
        ignore_columns=ignore_columns,
        skip_bad_rows=skip_bad_rows,
        vocab_size=vocab_size,
    )
    if isinstance(dataset, (IterableDataset, datasets.IterableDataset)):
        return ExampleStream(dataset, reader, name)
    if isinstance(dataset, (str, bytes, PathLike, Mapping)) or hasattr(dataset, "iloc"):  # a table of pandas
        way_out = "pass a list of rows, or a Dataset, as from datasets.load_dataset, Dataset.from_dict or from_pandas"
        raise ValueError(f"{name} of type {type(dataset).__name__} is not allowed: {way_out}.")
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{shown(dataset)} has no length: pass a list, a Dataset or an IterableDataset.")
    if indices is not None or not isinstance(dataset, datasets.Dataset):
        rows = ((index, dataset[index]) for index in (range(len(dataset)) if indices is None else indices))
    else:
        rows = enumerate(dataset)  # reads many rows at once
    examples = Examples(_examples(rows, reader, name), reader.report)
    if reader.report.skipped and not len(examples):
        reason = reader.report.problems[0]
        raise ValueError(f"all {reader.report.rows} rows were skipped, the first because of {reason}: check the data.")
    if isinstance(dataset, Examples):
        examples.report = _both(dataset.report, examples.report)
    return examples


def _examples(rows: Iterable[tuple[int, Mapping[str, Any]]], reader: RowReader, name: str) -> Iterator[dict]:
    further, ids = 0, set()  # documents beyond the first one of each row so far
    for index, row in rows:
        found = reader.read(row, f"row {index} of {name}")
        for place, example in enumerate(found):
            numbered = {"example_id": index + further + place} | example
            if numbered["example_id"] in ids:
                raise BadRowError(
                    f"row {index} of {name}: its example_id {numbered['example_id']} comes twice, because some rows "
                    "have one and others are counted: give each row an example_id, or none."
                )
            ids.add(numbered["example_id"])
            yield numbered
        further += max(len(found) - 1, 0)


def _both(first: ReadingReport, then: ReadingReport) -> ReadingReport:
    """The report of examples that were read from rows, and then read again as examples."""
    both = then.copy()
    both.what = first.what
    both.rows, both.skipped, both.problems = first.rows, first.skipped + then.skipped, first.problems + then.problems
    for name in ("texts_cut", "completions_cut", "completions_lost"):
        setattr(both, name, getattr(first, name) + getattr(then, name))
    return both
