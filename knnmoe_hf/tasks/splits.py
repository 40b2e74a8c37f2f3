"""Which documents of a benchmark are references, and where a document has its question: data, and little code."""

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class References:
    """
    Where the references of a benchmark come from.

    Attributes:
        splits: of the data set; empty if the benchmark has none.
        question: field of the question.
        choices: fields of the choices, or the field that lists them.
        config: another configuration of the data set that references are read from; None for the task's own.
        fewshot_mark: set in a document of a generation task, so that its template gives the answer.
        answer: field of the answer of a generation task, where its template gives something else.
        except_ids: `task_id`s that are left out, as they are worked examples in every prompt.
        held_out: of a benchmark with one split, a task that is tested on half of it; the rest are references.
        why_none: if there are no references, why, and what to do.
    """

    splits: tuple[str, ...] = ()
    question: str | None = None
    choices: tuple[str, ...] = ()
    config: str | None = None
    fewshot_mark: bool = False
    answer: str | None = None
    except_ids: tuple[int, ...] = ()
    held_out: str | None = None
    why_none: str | None = None


_ENDINGS = tuple(f"ending{i}" for i in range(4))
_GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_HUMAN_EVAL = "has no references: build the memory from mbpp, or from code of your own with --dataset"

REFERENCES = {
    "cais/mmlu": References(("dev", "validation"), "question", ("choices",)),
    "GBaker/MedQA-USMLE-4-options-hf": References(("train",), "sent1", _ENDINGS),
    "openlifescienceai/medmcqa": References(("train",), "question", ("opa", "opb", "opc", "opd")),
    "Idavidrein/gpqa": References(
        ("train",), "Question", _GPQA, "gpqa_extended", held_out="gpqa_extended_zeroshot_held_out"
    ),
    "m-a-p/SuperGPQA": References(("train",), "question", ("options",), held_out="supergpqa_held_out"),
    "google-research-datasets/mbpp": References(("train", "prompt"), "text", fewshot_mark=True, except_ids=(2, 3, 4)),
    "openai/openai_humaneval": References(question="prompt", answer="canonical_solution", why_none=_HUMAN_EVAL),
}
"""
By the data set's name on the Hub. Of any other task it is the training split, else the validation split, unless
that is the one that is tested.
"""
REFERENCE_SHARE = 2
"""Of a benchmark with one split, one question in so many is a reference, the others are tested."""


def is_reference(question: str) -> bool:
    """
    Whether a question of a benchmark with one split is a reference (True) or tested (False).

    It depends on the words of the question alone: on the first byte of the SHA-256 of its normalised text.
    """
    return hashlib.sha256(normalised(question).encode()).digest()[0] % REFERENCE_SHARE == 0


def normalised(text: Any) -> str:
    """
    Lower-case words, numbers and signs of arithmetic and logic with one space between them.

    Case, white space, punctuation and the form of a letter (full width, ligatures) make no difference. A minus is kept
    before a number, where it does not hyphenate a word.
    """
    plain = unicodedata.normalize("NFKC", str(text)).casefold().translate(_DASHES)
    return " ".join(_WORD.findall(plain))


_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212"), "-")
_WORD = re.compile(r"[^\W_]+|[+*/=<>^%|~&×÷±¬\u2190-\u21ff\u2200-\u22ff]|(?<![^\W\d_])-(?=\s*\d)")
