"""Examples for the command line: from the lab's text, a file, or a data set of the Hub."""

from pathlib import Path

import datasets

from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.data.reading import RowReader
from knnmoe_hf.errors import shown
from knnmoe_hf.lab.corpus import documents, windows

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
HELP = (
    "a data set of the Hub, a .jsonl, .csv, .parquet or .txt file, or lab:KIND/SPLIT (lab:topics/reference); rows are "
    "{text}, {input_ids, labels}, {prompt, completion} or {messages}"
)


def load_examples(
    name: str,
    split: str | None,
    tokenizer,
    max_length: int,
    max_tokens: int | None = None,
    max_examples: int | None = None,
    held_out: bool | None = None,
) -> list[dict]:
    """
    Tokenised examples, as `prepare_dataset` returns them.

    Texts that are longer than `max_length` become several examples; the other forms are cut.

    Args:
        name: see `HELP`.
        split: of a data set; None for `"train"`, which is all of a file.
        tokenizer: of the base model.
        max_length: tokens per example.
        max_tokens, max_examples: how much to keep at most; the first examples are kept.
        held_out: True for every fifth row of the data alone, False for the others, None for all.

    Raises:
        ValueError: if there is no such file or kind of text, or nothing in it.
    """
    if name.startswith("lab:"):
        kind, _, part = name.removeprefix("lab:").partition("/")
        cut = windows(documents(kind, part), tokenizer, max_length)
        rows = [{"input_ids": ids, "labels": ids} for i, ids in enumerate(cut) if _is_wanted(i, held_out)]
    else:
        rows = _pieces(_load(name, split), tokenizer, max_length, held_out)
    kept, tokens = [], 0
    for row in rows:
        if len(kept) == max_examples or (max_tokens is not None and tokens + len(row["input_ids"]) > max_tokens):
            break
        kept.append(row)
        tokens += len(row["input_ids"])
    if not kept:
        raise ValueError(f"{shown(name)} gives no example: check its split, its columns and the limits.")
    return prepare_dataset(kept, tokenizer, max_length)


def _load(name: str, split: str | None) -> datasets.Dataset:
    path = Path(name)
    if path.suffix in _BUILDERS:
        if not path.is_file():
            raise ValueError(f"{shown(name)} does not exist: give a file, a data set of the Hub, or lab:KIND/SPLIT.")
        options = {"sample_by": "document"} if path.suffix == ".txt" else {}
        try:
            return datasets.load_dataset(_BUILDERS[path.suffix], data_files=name, split=split or "train", **options)
        except (datasets.exceptions.DatasetGenerationError, StopIteration, ValueError) as error:
            reason = error.__cause__ or error
            raise ValueError(f"{shown(name)} cannot be read as {path.suffix} ({shown(str(reason))}).") from error
    return datasets.load_dataset(name, split=split or "train")


def default_test_split(name: str) -> str | None:
    """The split with the test examples: `"test"` of a data set of the Hub, None for a file, which has no splits."""
    return None if Path(name).suffix in _BUILDERS else "test"


def _pieces(dataset: datasets.Dataset, tokenizer, max_length: int, held_out: bool | None):
    """Yields tokenised rows; a long text becomes several, all of which are held out or none."""
    reader = RowReader(tokenizer, None)
    for index, row in enumerate(dataset):
        if not _is_wanted(index, held_out):
            continue
        (ready,) = reader.read(row, f"row {index}")
        length = len(ready["input_ids"]) if row.get("text") is not None else max_length
        for start in range(0, length, max_length):
            yield {name: column[start : start + max_length] for name, column in ready.items()}


def _is_wanted(index: int, held_out: bool | None) -> bool:
    """Whether a row is among the held-out ones (True), the others (False) or all (None)."""
    return held_out is None or (index % 5 == 4) == held_out


def without(rows: list[dict], references: list[dict]) -> list[dict]:
    """The examples that are not among the references: a memory must not be judged on text that it has stored."""
    seen = {tuple(row["input_ids"]) for row in references}
    return [row for row in rows if tuple(row["input_ids"]) not in seen]
