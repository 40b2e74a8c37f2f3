"""The 281 MMLU development questions with four choices that come with lm-evaluation-harness, as worked examples."""

import json
import re
from pathlib import Path
from typing import Any

import lm_eval
from datasets import Dataset

from knnmoe_hf.tasks.splits import is_reference

_FILE = Path(lm_eval.__file__).parent / "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
_CHOICES = 4
_ANSWER = re.compile(r"The answer is \(([A-E])\)")


def questions(**_: Any) -> dict[str, Dataset]:
    """The splits `reference` and `test`, cut by the words of the question; fields as MMLU's, and the subject."""
    found = [item for subject, text in json.loads(_FILE.read_text()).items() for item in _parsed(subject, text)]
    return {
        "reference": Dataset.from_list([item for item in found if is_reference(item["question"])]),
        "test": Dataset.from_list([item for item in found if not is_reference(item["question"])]),
    }


def _parsed(subject: str, text: str) -> list[dict[str, Any]]:
    items = []
    for example in re.split(r"\n+Q: ", text)[1:]:
        question, _, rest = example.partition("\n(A) ")
        listed, _, reasoning = rest.partition("\nA: ")
        choices = [choice.strip() for choice in re.split(r"\s\([B-E]\) ", listed)]
        answer = ord(_ANSWER.findall(reasoning)[-1]) - ord("A")
        if len(choices) == _CHOICES:
            of = {"subject": subject.replace("_", " "), "question": question, "choices": choices, "answer": answer}
            items.append(of)
    return items
