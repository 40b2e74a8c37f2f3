"""
Questions from text that every machine has: which of four words, or two, comes next.

Continuations are short, as only their first tokens depend on the context: a longer one is judged by how likely it is
in itself, which a model that knows the domain finds of the wrong choices too.

The text is `knnmoe_hf.lab.corpus`'s: tests from its split `test`, references from `reference` (of `python`, `train`).
"""

import functools
import hashlib
from bisect import bisect_left
from collections import defaultdict
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer

from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import SPLITS, documents

CONTEXT, CONTINUATION = 64, 2
"""Tokens of the lab models' tokenizer; up to `_TO_NEXT_WORD` more, so that words are whole."""
CHOICES = 4
ITEMS = {"reference": 1000, "test": 400}
"""Questions of each split at most."""
_LONGEST = 20_000  # characters that are read of a document
_SPARE = 800  # characters that are read for each item, which has about 300
_TO_NEXT_WORD = 6  # tokens
_NEAR = 24  # candidates for the other choices: those whose lengths are nearest


def questions(kind: str, **_: Any) -> dict[str, Dataset]:
    """
    The splits `reference` and `test`, each with fields context, choices and answer.

    Args:
        kind: of text, one of `knnmoe_hf.lab.corpus.SPLITS`.
    """
    return {split: _of_split(kind, split) for split in ITEMS}


@functools.cache
def _of_split(kind: str, split: str) -> Dataset:
    part = split if split in SPLITS[kind] else "train"
    pieces = _pieces(_enough(documents(kind, part), ITEMS[split]))
    pieces = (
        [pieces[i * len(pieces) // ITEMS[split]] for i in range(ITEMS[split])]
        if len(pieces) > ITEMS[split]
        else pieces
    )
    alike = defaultdict(list)
    for _, continuation in pieces:
        alike[_start(continuation)].append(continuation)
    for group in alike.values():
        group.sort(key=lambda text: (len(text), text))
    found = [_question(context, right, alike[_start(right)]) for context, right in pieces]
    return Dataset.from_list([question for question in found if len(question["choices"]) == CHOICES])


def _enough(texts: list[str], items: int) -> list[str]:
    """Documents with more text than so many items need, in an order that says nothing, and of each its beginning."""
    parts, missing = [], _SPARE * items
    for text in sorted(texts, key=_hash):
        if missing <= 0:
            break
        parts.append(text[:_LONGEST])
        missing -= len(parts[-1])
    return parts


def _start(text: str) -> str:
    """How a text begins: with a blank, a new line or within a word."""
    return text[0] if text[0].isspace() else ""


def _pieces(texts: list[str]) -> list[tuple[str, str]]:
    """Contexts and what follows them, cut where a word begins; no token is in two of them."""
    tokenizer = Tokenizer.from_file(str(LAB_MODELS["olmoe"] / "tokenizer.json"))
    found = []
    for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False)):
        starts, position = [start for start, _ in encoding.offsets], 0
        while position + CONTEXT + CONTINUATION < len(starts):
            middle = _word(text, starts, position + CONTEXT)
            end = _word(text, starts, middle + CONTINUATION)
            context, continuation = text[starts[position] : starts[middle]], text[starts[middle] : starts[end]]
            position = end
            if context.strip() and continuation.strip():
                found.append((context, continuation.rstrip()))
    return found


def _word(text: str, starts: list[int], token: int) -> int:
    """The first token from `token` on that begins with white space, looked for among the next few; else `token`."""
    token = min(token, len(starts) - 1)
    near = range(token, min(token + _TO_NEXT_WORD, len(starts)))
    return next((i for i in near if text[starts[i]].isspace() and not text[starts[i] - 1].isspace()), token)


def _question(context: str, right: str, alike: list[str]) -> dict[str, Any]:
    """
    The other choices are of about the same length and begin alike; which, and their order, the context decides.

    None is the beginning of the right one or goes on with it: that would be right too.
    """
    place = bisect_left(alike, (len(right), right), key=lambda text: (len(text), text))
    low = max(0, min(place - _NEAR // 2, len(alike) - _NEAR - 1))
    near = alike[low : low + _NEAR + 1]
    candidates = {text for text in near if not text.startswith(right) and not right.startswith(text)}
    others = sorted(candidates, key=lambda text: _hash(context, text))[: CHOICES - 1]
    choices = sorted([right, *others], key=lambda text: _hash(text, context))
    return {"context": context, "choices": choices, "answer": choices.index(right)}


def _hash(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()
