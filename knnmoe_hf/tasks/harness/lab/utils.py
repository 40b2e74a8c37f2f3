"""
Questions from text that every machine has: which of four words comes next.

It is the next word alone, because only the first tokens of a continuation depend on the context: a longer one is
judged by how likely it is by itself, and a model that knows the domain finds the wrong choices likely, too. Words are
single tokens of the lab models, for which a pass scores all choices at once.

The text is `knnmoe_hf.lab.corpus`'s: tests from its split `test`, references from `reference` (of `python`, `train`).
"""

import functools
import hashlib
from bisect import bisect_left
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer

from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import SPLITS, documents

CONTEXT = 64
"""Tokens of the lab models' tokenizer before the word, or up to `_LATER` more."""
CHOICES = 4
ITEMS = {"reference": 1000, "test": 1000}
"""Questions of each split at most; of topics there is text for some 500 of each."""
_LONGEST = 20_000  # characters that are read of a document
_SPARE = 800  # characters that are read for each item, which has about 300
_LATER = 32  # tokens among which a word is looked for
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
    part, count = split if split in SPLITS[kind] else "train", ITEMS[split]
    pieces = _pieces(_enough(documents(kind, part), count))
    if len(pieces) > count:
        pieces = [pieces[i * len(pieces) // count] for i in range(count)]
    words = sorted((word for _, word in pieces), key=lambda text: (len(text), text))
    found = [_question(context, right, words) for context, right in pieces]
    return Dataset.from_list([question for question in found if len(question["choices"]) == CHOICES])


def _enough(texts: list[str], items: int) -> list[str]:
    """The beginnings of documents, in the order of their hashes, with as much text as so many items need."""
    parts, missing = [], _SPARE * items
    for text in sorted(texts, key=_hash):
        if missing <= 0:
            break
        parts.append(text[:_LONGEST])
        missing -= len(parts[-1])
    return parts


def _pieces(texts: list[str]) -> list[tuple[str, str]]:
    """Contexts and the words that follow them, each with the blank before it; no token is in two of them."""
    tokenizer = Tokenizer.from_file(str(LAB_MODELS["olmoe"] / "tokenizer.json"))
    found = []
    for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False)):
        spans, position = encoding.offsets, 0
        while position + CONTEXT < len(spans):
            near = range(position + CONTEXT, min(position + CONTEXT + _LATER, len(spans)))
            word = next((i for i in near if _is_word(text, *spans[i])), None)
            if word is not None:
                start, end = spans[word]
                found.append((text[spans[position][0] : start], text[start:end]))
            position = near[-1] + 1 if word is None else word + 1
    return found


def _is_word(text: str, start: int, end: int) -> bool:
    """Whether a token is a blank and all of a word, which is two letters or more, inside of a line."""
    word, after = text[start + 1 : end], text[end : end + 1]
    is_whole = len(word) > 1 and word.isalpha() and not after.isalnum() and after != "_"
    return is_whole and text[start] == " " and not text[start - 1].isspace()


def _question(context: str, right: str, words: list[str]) -> dict[str, Any]:
    """
    A question. Its wrong choices are right choices of other questions, of about the same length; a hash of the context
    decides which, and their order, and no model takes part.

    None of them begins the right choice or continues it: that would be right too.
    """
    place = bisect_left(words, (len(right), right), key=lambda text: (len(text), text))
    low = max(0, min(place - _NEAR // 2, len(words) - _NEAR - 1))
    near = words[low : low + _NEAR + 1]
    candidates = {text for text in near if not text.startswith(right) and not right.startswith(text)}
    others = sorted(candidates, key=lambda text: _hash(context, text))[: CHOICES - 1]
    choices = sorted([right, *others], key=lambda text: _hash(text, context))
    return {"context": context, "choices": choices, "answer": choices.index(right)}


def _hash(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()
