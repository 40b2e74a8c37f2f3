"""Examples for the command line: from files, a data set of the Hub, or the lab's text."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from knnmoe_hf.data import sources
from knnmoe_hf.data.examples import Examples
from knnmoe_hf.data.files import Row, is_on_disk, looks_like_path, shown_path
from knnmoe_hf.data.reading import RowReader
from knnmoe_hf.errors import BadRowError
from knnmoe_hf.lab.corpus import documents, windows

_HELD_OUT = 5  # one document in so many is held out, the last of them
_FEW = 20  # documents; of fewer, windows are held out, so that there are enough


def load_examples(
    name: str,
    tokenizer,
    *,
    split: str | None = None,
    max_length: int = 256,
    max_tokens: int | None = None,
    max_examples: int | None = None,
    held_out: bool | None = None,
    encoding: str | None = None,
    text_field: str = "text",
    ignore_columns: Iterable[str] | None = (),
    skip_bad_rows: bool = False,
    vocab_size: int | None = None,
) -> Examples:
    """
    Tokenised examples of a name; no more of it is read than is kept.

    Texts become windows of `max_length` tokens at most (`text_windows`), whether they are files or rows; rows of other
    forms are cut.

    Args:
        name: see `HELP`.
        tokenizer: of the base model.
        split: of a data set, or an expression as `train[:100]`; None for `"train"`, which is all of a file.
        max_length: tokens per example.
        max_tokens, max_examples: how much to keep at most; the first examples are kept.
        held_out: True for every fifth document (a text file or a row) alone, False for the others, None for all. Of
            fewer than 20 documents it is every fifth window instead.
        encoding: of text files; None tells it from the file, and is UTF-8 if nothing speaks against it.
        text_field, ignore_columns, skip_bad_rows, vocab_size: see `RowReader`. With `skip_bad_rows`, what cannot be
            read of a damaged file is left out too.

    Raises:
        BadRowError: for a row or file that cannot be used.
        ValueError: if there is nothing of that name, or nothing in it.
    """
    reader = RowReader(
        tokenizer,
        max_length,
        text_field=text_field,
        ignore_columns=ignore_columns,
        skip_bad_rows=skip_bad_rows,
        vocab_size=vocab_size,
        split_text=True,
    )
    if name.startswith("lab:"):
        found = _of_lab(name, tokenizer, max_length, reader, held_out)
    else:
        found = _of_source(sources.open_source(name, split, text_field, encoding), reader, held_out)
    examples = Examples(_first(found, max_tokens, max_examples), reader.report)
    if not len(examples):
        raise ValueError(f"{shown_path(name)} gives no example: {_why_none(reader, held_out, max_tokens)}.")
    reader.report.examples = len(examples)
    return examples


def public_name(name: str) -> tuple[str | None, str | None]:
    """
    What a data set is called where others read it: its name without folders, and its repository on the Hub, None if it
    is none. A pattern is called as the folder that it is in; what says nothing but where it lies (`*.txt`, `.`, the
    home folder) has no name.

    Args:
        name: as `load_examples` takes it.
    """
    if name.startswith("lab:"):
        return name, None
    if not is_on_disk(name) and not looks_like_path(name):
        return name, name.partition(":")[0]
    path = Path(name)
    while path.name and not is_on_disk(str(path)) and set(path.name) & set("*?["):
        path = path.parent
    is_home = str(path) in ("~", str(Path.home()))  # whose name is that of a person
    return (None if is_home or path.name in ("", ".", "..") else path.name), None


def default_test_split(name: str) -> str | None:
    """The split with the test examples: `"test"` of a data set of the Hub, None for files without one."""
    return sources.split_of_tests(name)


def _of_lab(name: str, tokenizer, max_length: int, reader: RowReader, held_out: bool | None) -> Iterator[dict]:
    kind, _, part = name.removeprefix("lab:").partition("/")
    reader.report.what = "window"
    for index, ids in enumerate(windows(documents(kind, part), tokenizer, max_length)):
        if _is_wanted(index, held_out):
            yield from reader.read({"input_ids": ids}, f"{name}, window {index + 1}")


def _of_source(source: sources.Files | sources.Table, reader: RowReader, held_out: bool | None) -> Iterator[dict]:
    by_document = held_out is None or source.has_documents(_FEW)
    window, document, reader.report.what = 0, None, source.what
    for row in source:
        if by_document and not _is_wanted(row.document, held_out):
            continue
        for example in _read(row, reader, goes_on=row.document == document):
            if by_document or _is_wanted(window, held_out):
                yield example
            window += 1
        document = row.document


def _read(row: Row, reader: RowReader, goes_on: bool) -> list[dict]:
    """The examples of a row; `goes_on` for a further block of the text before it."""
    if row.problem is None:
        return reader.read(row.columns, row.place, goes_on)
    if not reader.skip_bad_rows:
        raise BadRowError(f"{row.place} {row.problem}; --skip-bad-rows goes on without it.")
    reader.report.rows += not goes_on
    reader.report.skip(f"{row.place} {row.problem}")
    return []


def _is_wanted(index: int, held_out: bool | None) -> bool:
    """Whether a document or window is among the held-out ones (True), the others (False) or all (None)."""
    return held_out is None or (index % _HELD_OUT == _HELD_OUT - 1) == held_out


def _first(examples: Iterable[dict], max_tokens: int | None, max_examples: int | None) -> Iterator[dict]:
    tokens = 0
    for count, example in enumerate(examples, start=1):
        tokens += len(example["input_ids"])
        if max_tokens is not None and tokens > max_tokens:
            return
        yield example
        if count == max_examples:
            return


def _why_none(reader: RowReader, held_out: bool | None, max_tokens: int | None) -> str:
    report = reader.report
    if not report.examples:
        if not report.problems:
            return "check its split and its rows"
        reason = report.problems[0].rstrip(".")
        if report.rows == 1:
            return f"its only {report.what} was skipped, because {reason}"
        return f"all {report.rows} {report.what}s were skipped, the first because {reason}"
    if max_tokens is not None:
        return f"its first one has more than max_tokens={max_tokens} tokens, so allow more"
    if held_out:
        return f"every fifth window is held out, and it has {report.examples}, so give more text or a file to test on"
    return "check its split and its rows"
