"""
SuperGPQA in the protocol of its authors: prompts, how an answer is read off a response, and its score.

The wording of the instruction, the layout of the prompts, the order in which patterns are tried and the patterns
themselves are those of https://github.com/SuperGPQA/SuperGPQA (`infer/data_loader.py`, `eval/eval.py`, commit 03a3e27;
data and prompts: ODC-By). Repeated groups inside repeated groups are written here without the outer repetition: they
match the same text, but not in exponential time, for which the authors need a time-out.
"""

import functools
import os
import re
from functools import partial
from typing import Any

import yaml

from knnmoe_hf.tasks.splits import is_reference

LETTERS = "ABCDEFGHIJ"
INSTRUCTION = (
    "Answer the following multiple choice question. There is only one correct answer. The last line of your response "
    "should be in the format 'Answer: $LETTER' (without quotes), where LETTER is one of A, B, C, D, E, F, G, H, I, "
    "or J."
)
FIVE_SHOT = (
    "https://raw.githubusercontent.com/SuperGPQA/SuperGPQA/03a3e2789c50e335c83be8b62cb7334dd92bd78a/"
    "config/prompt/five-shot.yaml"
)
"""The authors' prompt with five worked examples, which are not part of the data set."""
FIVE_SHOT_FILE = "SUPERGPQA_FIVE_SHOT"
"""The environment variable that names a local copy of it."""


def block(doc: dict) -> str:
    """A question and its options, one on each line."""
    return "\n".join([doc["question"], *(f"{LETTERS[i]}) {option}" for i, option in enumerate(doc["options"]))])


def zero_shot(doc: dict) -> str:
    """The prompt without examples."""
    return f"{INSTRUCTION}\n\n{block(doc)}\n"


def five_shot(doc: dict) -> str:
    """
    The prompt with the authors' five worked examples, which asks for steps before the answer.

    Raises:
        ValueError: if the examples are found neither in the repository of the authors nor in a local file.
    """
    return _five_shot_prompt().format(block(doc))


@functools.cache
def _five_shot_prompt() -> str:
    from datasets import DownloadConfig, DownloadManager

    path = os.environ.get(FIVE_SHOT_FILE)
    try:
        if path is None:
            path = DownloadManager(download_config=DownloadConfig(disable_tqdm=True)).download(FIVE_SHOT)
        with open(path, encoding="utf-8") as file:
            return yaml.safe_load(file)["prompt_format"][0]
    except Exception as error:  # of the network, of the file system, of YAML
        raise ValueError(
            f"the five worked examples of SuperGPQA cannot be read ({type(error).__name__}): download {FIVE_SHOT} and "
            f"name the file in the environment variable {FIVE_SHOT_FILE}."
        ) from error


_OPENING = r"(?:[*$\\{(\[]|\\(?:boxed|mathbf|mathrm|text)\{)*\s*"
_CLOSING = r"[\\}$)\]]*(?:[\s:.*)]|$)"
_LETTER = f"{_OPENING}([{LETTERS}]){_CLOSING}"
_LETTER_PATTERNS = [
    re.compile(pattern + _LETTER, re.IGNORECASE)
    for pattern in (r"the\s+(?:\w+\s+)?(?:answer|option)(?:\w+\s+)?\s+is?:?\s*", r"answer[*\s]*:\s*", r"^[^\w\r\n]*")
]
_CONTENT_PATTERNS = (
    r"[Tt]he\s+(?:\w+\s+)?(?:answer|option)(?:\w+\s+)?\s+is:?\s*",
    r"(?i:Answer)\s*",
    r"^[^\w\r\n]*",
)


def letter_in(response: str) -> str | None:
    """
    The letter that a response names, or None.

    As in the original, a lower-case letter is returned as it is (and so is wrong), such as the article in "the answer
    is a proof".
    """
    return _first(_LETTER_PATTERNS, response)


def option_in(response: str, options: list[str]) -> str | None:
    """The letter of the option whose text a response gives as its answer, or None."""
    texts = "|".join(map(re.escape, options))
    patterns = [re.compile(f"{pattern}{_OPENING}({texts}){_CLOSING}") for pattern in _CONTENT_PATTERNS]
    found = _first(patterns, response)
    return LETTERS[options.index(found)] if found else None


def _first(patterns: list[re.Pattern], response: str) -> str | None:
    """What the first pattern that matches has found: in the last line, else in the whole response."""
    text = response.rstrip()
    for part in (text.split("\n")[-1], text):
        for pattern in patterns:
            if (found := pattern.search(part)) is not None:
                return found[1]
    return None


def answer_of(response: str, options: list[str], before: str | None = None) -> str | None:
    """
    The letter of a response's answer, or None: a letter that it names, else the option whose text it gives.

    Args:
        response: what the model wrote.
        options: texts of the options.
        before: text at which a response is cut, because the model goes on with questions of its own; the whole
            response is read if there is no answer before that.
    """
    for text in (response,) if before is None else (response.split(before)[0], response):
        if (found := letter_in(text) or option_in(text, options)) is not None:
            return found
    return None


def process_results(doc: dict, results: list[str], before: str | None = None) -> dict[str, Any]:
    """Whether the answer is right, and whether there is none."""
    found = answer_of(results[0], doc["options"], before)
    return {"acc": float(found == doc["answer_letter"]), "no_answer": float(found is None)}


process_five_shot_results = partial(process_results, before="Question:")


def held_out(dataset):
    """The half of the questions that no memory is built from, for an evaluation of a memory of the other half."""
    return dataset.filter(lambda question: not is_reference(question), input_columns="question")


def _references(dataset):
    return dataset.filter(is_reference, input_columns="question")


held_out.references = _references


def _of(dataset, discipline: str):
    return dataset.filter(lambda found: found == discipline, input_columns="discipline")


agronomy = partial(_of, discipline="Agronomy")
economics = partial(_of, discipline="Economics")
education = partial(_of, discipline="Education")
engineering = partial(_of, discipline="Engineering")
history = partial(_of, discipline="History")
law = partial(_of, discipline="Law")
literature_and_arts = partial(_of, discipline="Literature and Arts")
management = partial(_of, discipline="Management")
medicine = partial(_of, discipline="Medicine")
military_science = partial(_of, discipline="Military Science")
philosophy = partial(_of, discipline="Philosophy")
science = partial(_of, discipline="Science")
sociology = partial(_of, discipline="Sociology")
