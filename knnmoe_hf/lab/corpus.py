"""Text that every machine with this library has, by kind and split, for the lab models.

The kinds of `knnmoe_hf.calibration.machine_text`, and two more of the running interpreter's standard library. The lab
models are trained on `python` and `tables`, never on the other kinds.

| kind     | what                                  | splits                               |
|----------|---------------------------------------|--------------------------------------|
| python   | see `machine_text`                    | `train`, `test`                      |
| tables   | the character tables of `encodings`   | `train`, `test` (one file in ten)    |
| topics   | the English of `pydoc_data.topics`    | `reference`, `test` (by topic)       |
| headers  | see `machine_text`                    | `reference`, `test`                  |
| notices  | see `machine_text`                    | `reference`, `test`                  |
"""

import re

from knnmoe_hf.calibration import machine_text
from knnmoe_hf.calibration.machine_text import REFERENCE_SHARE, in_split, library_files, name_hash, unknown_text

SPLITS = machine_text.SPLITS | {"tables": ("train", "test"), "topics": ("reference", "test")}
"""Kinds of text and their splits."""
_TABLES_TEST_SHARE = 10  # one file in so many is in the split `test`
_QUOTATION = 60  # characters; a shorter paragraph that two topics have ("See also") is not a quotation


def documents(kind: str, split: str) -> list[str]:
    """
    The texts of one kind and split, in an order that depends on nothing but the files.

    Raises:
        ValueError: for a kind or split that does not exist.
    """
    check_names(kind, split)
    if kind == "topics":
        return _topics(split)
    if kind == "tables":
        return [text for name, text in library_files(encodings=True) if in_split(name, split, _TABLES_TEST_SHARE)]
    return machine_text.documents(kind, split)


def check_names(kind: str, split: str) -> None:
    """
    Checks that there is text of a kind and split.

    Raises:
        ValueError: naming those that there are.
    """
    if kind not in SPLITS or split not in SPLITS[kind]:
        raise ValueError(unknown_text(kind, split, SPLITS))


def _topics(split: str) -> list[str]:
    """Topics by split: topics that quote each other are in the same one, and a paragraph is kept where it is first."""
    from pydoc_data.topics import topics

    paragraphs = {name: re.split(r"\n\s*\n", text) for name, text in sorted(topics.items())}
    group, owner = {name: name for name in paragraphs}, {}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    kept = {name: [] for name in paragraphs}
    for name, parts in paragraphs.items():
        for part in parts:
            first = owner.setdefault(part.strip(), name)
            if first == name:
                kept[name].append(part)
            elif len(part) >= _QUOTATION:
                group[root(name)] = root(first)
    texts = {name: "\n\n".join(parts) for name, parts in kept.items()}
    groups = sorted({root(name) for name in texts}, key=name_hash)
    missing, reference = REFERENCE_SHARE * sum(map(len, texts.values())), set()
    for candidate in groups:
        if missing > 0:
            reference.add(candidate)
            missing -= sum(len(text) for name, text in texts.items() if root(name) == candidate)
    return [
        text for name, text in texts.items() if text.strip() and (root(name) in reference) == (split == "reference")
    ]


def windows(texts: list[str], tokenizer, length: int = 256, limit: int | None = None) -> list[list[int]]:
    """
    Token ids of `texts`, joined by the end-of-text token and cut into full windows.

    Args:
        texts: documents.
        tokenizer: a transformers tokenizer; texts are joined with nothing between them if it has no end-of-text token.
        length: tokens per window.
        limit: at most so many windows, the first ones.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        stream += ids + end
        if limit is not None and len(stream) >= limit * length:
            break
    count = len(stream) // length if limit is None else min(limit, len(stream) // length)
    return [stream[i * length : (i + 1) * length] for i in range(count)]
