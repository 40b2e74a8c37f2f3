"""What the benchmarks read: reference windows by kind and seed, and the same test windows for every method."""

import functools
import hashlib

import torch

from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.lab.corpus import documents, windows

IN_DOMAIN = ("topics", "headers", "notices")
"""Kinds of text that no lab model was trained on. References are of one of them; the other two are off-domain then."""
TRAINED_ON = ("python", "tables")
KINDS = (*IN_DOMAIN, *TRAINED_ON)

WINDOW = 256  # tokens
REFERENCES = 128  # windows
TEST, VALIDATION = 32, 24  # windows
OFF_STEP = 3
"""Off-domain, every third test window of a kind is read, since there are four such kinds."""
_TAIL = 10  # the last tenth of a reference split is for validation


class LabTexts:
    """
    Windows of the lab's text for one tokenizer; each split is cut once.

    Args:
        tokenizer: of the model that will read them.
        test: test windows of each kind; off-domain, one in `OFF_STEP` of them.
    """

    def __init__(self, tokenizer, test: int = TEST):
        self.tokenizer = tokenizer
        self.test_windows = test
        self._cut = functools.cache(lambda kind, split: windows(documents(kind, split), tokenizer, WINDOW))

    def references(self, kind: str, seed: int, count: int) -> list[dict]:
        """`count` windows of the reference split, or all that there are; a larger count begins with the smaller."""
        pool = self._cut(kind, "reference")
        pool = pool[: len(pool) - len(pool) // _TAIL]
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return _rows([pool[i] for i in order[:count]])

    def validation(self, kind: str, count: int = VALIDATION) -> list[dict]:
        """Windows of the end of the reference split, which `references` never returns."""
        pool = self._cut(kind, "reference")
        return _rows(spread(pool[len(pool) - len(pool) // _TAIL :], count))

    def trained_on(self, kind: str, count: int) -> list[dict]:
        """Windows of text that the lab models were trained on, from documents too short for calibration to read."""
        short = [text for text in documents(kind, "train") if len(text) <= 16 * WINDOW]
        return _rows(spread(windows(short, self.tokenizer, WINDOW), count))

    def test(self, kind: str) -> list[dict]:
        """Windows spread over the whole test split: its first ones would be of one or two files."""
        return _rows(spread(self._cut(kind, "test"), self.test_windows))

    def judged_on(self, kind: str) -> dict[str, list[dict]]:
        """Test windows by kind of text for a method that had references of `kind`; `kind` itself comes first."""
        return {kind: self.test(kind)} | {off: self.test(off)[::OFF_STEP] for off in KINDS if off != kind}


def spread(rows: list, count: int) -> list:
    """At most `count` of them, evenly over the whole list."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def token_digest(rows: list[dict]) -> str:
    """Of the tokens of the rows, in their order."""
    return hashlib.sha256(repr([row["input_ids"] for row in rows]).encode()).hexdigest()[:16]


def _rows(cut: list[list[int]]) -> list[dict]:
    return prepare_dataset([{"input_ids": ids, "labels": ids} for ids in cut], None, None)
