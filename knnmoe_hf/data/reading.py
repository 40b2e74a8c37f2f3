"""Rows of data sets into examples, one by one, with a count of what was cut or left out on the way."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from knnmoe_hf.data.batches import IGNORED
from knnmoe_hf.data.columns import Refusal, as_example_id, ignoring, is_missing, with_values
from knnmoe_hf.data.forms import FORMS, Document, Reading, read_documents
from knnmoe_hf.errors import BadRowError, counted, shown

_SHOWN_PROBLEMS = 3


@dataclass
class ReadingReport:
    """
    What became of the rows of a data set.

    Attributes:
        max_length: tokens that an example has at most; None if none is cut.
        what: what people call a row of these data.
        rows: rows that were read.
        examples: examples that were made of them; a packed row gives one for each document.
        skipped: rows that were left out, because they could not be used.
        texts_cut: texts that were longer than `max_length`.
        completions_cut: examples that lost a part of their targets to `max_length`.
        completions_lost: examples that lost all of their targets to `max_length`.
        without_target: examples without a target, those of `completions_lost` among them.
        problems: what was wrong with the first skipped rows.
    """

    max_length: int | None = None
    what: str = "row"
    rows: int = 0
    examples: int = 0
    skipped: int = 0
    texts_cut: int = 0
    completions_cut: int = 0
    completions_lost: int = 0
    without_target: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_serious(self) -> bool:
        """Whether something was lost that the user may want."""
        return bool(self.skipped or self.completions_cut or self.completions_lost)

    def copy(self) -> "ReadingReport":
        """The report as it is now."""
        return replace(self, problems=list(self.problems))

    def metrics(self) -> dict[str, int]:
        """The counts by name, `data_rows` and so on."""
        counts = {name: value for name, value in vars(self).items() if type(value) is int and name != "max_length"}
        return {f"data_{name}": count for name, count in counts.items()}

    def sentences(self) -> list[str]:
        """What a person should know, the number of examples first."""
        told = [f"{counted(self.rows, self.what)} gave {counted(self.examples, 'example')}."]
        if self.skipped:
            first = "; ".join(problem.removesuffix(".") for problem in self.problems)
            skipped = f"{counted(self.skipped, self.what)} {_were(self.skipped)} skipped"
            told.append(f"{skipped}, the first of them: {first}.")
        if self.texts_cut:
            told.append(f"{counted(self.texts_cut, 'text')} {_were(self.texts_cut)} cut to {self._length}.")
        if lost := self.completions_cut + self.completions_lost:
            told.append(
                f"{counted(lost, 'example')} lost targets to {self._length}, {self.completions_lost} of them all "
                "targets: use a larger max_length to keep them."
            )
        if none := self.without_target - self.completions_lost:
            told.append(f"{counted(none, 'example')} {_were(none)} without a target and will not be stored.")
        return told

    def no_target(self) -> str:
        """Why no example has a target, and what to do."""
        if self.completions_lost:
            cut = f"{self._length} leaves none of {counted(self.completions_lost, 'example')}"
            return f"no example has a target token: {cut}, so use a larger max_length."
        return "no example has a target token, so there is nothing to store: check the labels."

    @property
    def _length(self) -> str:
        return f"max_length={self.max_length}"

    def note(self, document: Document) -> None:
        """Counts an example, as it is before it is cut."""
        self.examples += 1
        after = _targets(document, self.max_length)
        self.without_target += not after
        if self.max_length is None or len(document.ids) <= self.max_length:
            return
        before = _targets(document, None)
        if all(label != IGNORED for label, real in zip(document.labels, document.mask) if real):
            self.texts_cut += 1
        elif before and not after:
            self.completions_lost += 1
        elif after < before:
            self.completions_cut += 1

    def skip(self, problem: str) -> None:
        """Counts a row that is left out."""
        self.skipped += 1
        if len(self.problems) < _SHOWN_PROBLEMS:
            self.problems.append(problem)


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _targets(document: Document, length: int | None) -> int:
    """Number of targets among the first tokens: the first token has none before it that could predict it."""
    labels, mask = document.labels[:length], document.mask[:length]
    if all(mask):
        return max(len(labels) - 1, 0) - labels[1:].count(IGNORED)
    return sum(labels[i] != IGNORED and mask[i] and mask[i - 1] for i in range(1, len(labels)))


class RowReader:
    """
    Reads rows of every form and counts what was lost.

    Args:
        tokenizer: needed unless rows have `input_ids`.
        max_length: longer examples are cut to so many tokens; None cuts none.
        text_field: column of the text.
        ignore_columns: columns, and keys of messages, that are left out; every other one is used or an error.
        skip_bad_rows: leave out rows that cannot be used, and count them, instead of raising an error. What is wrong
            with the data set as a whole, as a column that no form has, is an error all the same.
        vocab_size: number of the model's input embeddings; token ids must be smaller. None checks nothing.
        split_text: make several examples of a text that is longer than `max_length`, instead of one that is cut.

    Attributes:
        report (`ReadingReport`): counts of all rows so far.
    """

    def __init__(
        self,
        tokenizer,
        max_length: int | None,
        *,
        text_field: str = "text",
        ignore_columns: Iterable[str] | None = (),
        skip_bad_rows: bool = False,
        vocab_size: int | None = None,
        split_text: bool = False,
    ):
        if isinstance(ignore_columns, str):  # whose letters would be taken for columns
            raise ValueError(f"ignore_columns={shown(ignore_columns)} is not allowed: use a list of names.")
        self.ignored = frozenset(ignore_columns or ())
        self.reading = Reading(tokenizer, text_field, self.ignored, vocab_size, max_length if split_text else None)
        self.max_length, self.skip_bad_rows = max_length, skip_bad_rows
        self.begin()

    def begin(self) -> None:
        """Forgets the rows that were read so far."""
        self.report, self._own_ids = ReadingReport(self.max_length), set()

    def read(self, row: Mapping[str, Any], place: str, goes_on: bool = False) -> list[dict[str, Any]]:
        """
        The examples of a row, none if it is skipped.

        Args:
            row: columns by name; those whose value is None are missing.
            place: where the row is, which an error begins with, as `"row 17"`.
            goes_on: whether it is a further part of the text before it, and counts as one with that.

        Returns:
            `{"input_ids", "labels", "attention_mask"}` for each example, lists of the same length; with `example_id`
            if the row has one.

        Raises:
            BadRowError: for a row that cannot be used.
            ValueError: for a row of text without a tokenizer.
        """
        self.report.rows += not goes_on
        try:
            found = self._documents(row)
            own = self._own_id(row, len(found))
        except Refusal as refusal:
            if self.skip_bad_rows and not refusal.in_every_row:
                self.report.skip(f"{place}: {refusal.reason}")
                return []
            skip = "" if refusal.in_every_row else ", or leave such rows out with skip_bad_rows=True (--skip-bad-rows)"
            raise BadRowError(f"{place}: {refusal.reason}: {refusal.way_out}{skip}.") from refusal.__cause__
        for document in found:
            self.report.note(document)
        return [self._cut(document) | own for document in found]

    def _documents(self, row: Any) -> list[Document]:
        if not isinstance(row, Mapping):
            raise Refusal(f"{shown(row)} is not a row", f"give a dict with {self.reading.text_field}; {FORMS}")
        columns = with_values(row, self.ignored | {"example_id"})
        if not columns:
            without = "no column of it has a value" if row else "it has no columns"
            reason = f"column {self.reading.text_field!r} is missing" if self.reading.text_field in row else without
            raise Refusal(reason, f"give {self.reading.text_field}; {FORMS}")
        return read_documents(columns, self.reading)

    def _own_id(self, row: Mapping[str, Any], documents: int) -> dict[str, int]:
        if is_missing(row.get("example_id")) or "example_id" in self.ignored:
            return {}
        if documents != 1 and self.reading.text_field in row:
            raise Refusal(
                f"one example_id cannot name the {documents} windows of at most {self.max_length} tokens that its "
                "text is cut into",
                f"use a larger max_length (--max-length), or leave the column out with {ignoring(['example_id'])}",
            )
        if documents != 1:
            raise Refusal(
                f"one example_id cannot name the {documents} documents of the row",
                "drop the column, or give the documents as rows of their own",
            )
        one = as_example_id(row["example_id"])
        if one in self._own_ids:
            way_out = "give each row its own, or drop the column"
            raise Refusal(f"example_id {one} comes twice", way_out)
        self._own_ids.add(one)
        return {"example_id": one}

    def _cut(self, document: Document) -> dict[str, list[int]]:
        length = self.max_length
        columns = {"input_ids": document.ids, "labels": document.labels, "attention_mask": document.mask}
        return {name: column[:length] for name, column in columns.items()}
