"""What the bench reads: references by kind and seed, and the same test windows for every method."""

import functools
import hashlib

import torch

from knnmoe_hf.lab.corpus import documents, windows
from knnmoe_hf.training.data import prepare_dataset

IN_DOMAIN = ("topics", "headers", "notices")
"""Kinds that no lab was trained on; references come from one of them, and the other two are off-domain then."""
TRAINED_ON = ("python", "tables")
KINDS = (*IN_DOMAIN, *TRAINED_ON)

WINDOW = 256
REFERENCES = 128  # windows
TEST, _VALIDATION = 32, 24  # windows
OFF_STEP = 3
"""Off-domain, every so many-th test window of a kind: there are four kinds."""
_TAIL = 10  # one part in so many of a reference split is kept for validation


class LabTexts:
    """
    Windows of the lab's text for one tokenizer; each split is cut once.

    Args:
        tokenizer: of the model that will read them.
        test: windows of each kind that methods are judged on; off-domain, one in `OFF_STEP` of them.
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

    def validation(self, kind: str) -> list[dict]:
        """Windows of the end of the reference split, of which no reference comes."""
        pool = self._cut(kind, "reference")
        return _rows(spread(pool[len(pool) - len(pool) // _TAIL :], _VALIDATION))

    def test(self, kind: str) -> list[dict]:
        """Windows of the whole test split: its first ones would be of one or two files."""
        return _rows(spread(self._cut(kind, "test"), self.test_windows))

    def judged_on(self, kind: str) -> dict[str, list[dict]]:
        """By kind of text, what a method that was given references of `kind` is judged on, `kind` itself first."""
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
