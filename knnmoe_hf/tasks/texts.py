"""The words of a question, without the template around it."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from knnmoe_hf.tasks.documents import source_of

if TYPE_CHECKING:
    from lm_eval.api.task import Task

_LABEL = re.compile(r"^\s*\(?[A-Ja-j][).:]\s+")
"""How a line with a choice begins."""
_FRAME = re.compile(r"^Question:\s*|\s*Answer:\s*$")


def question_text(task: "Task", document: Mapping[str, Any]) -> str:
    """
    A question, and each of its choices on a line that begins as `"- "`.

    Of a benchmark whose fields are not known, it is the prompt without description and examples, in which lines such
    as `"A. ..."` are choices.
    """
    source = source_of(task)
    if source.question is None or source.question not in document:
        return _parsed(task, document)
    found = [document[name] for name in source.choices if name in document]
    choices = found[0] if len(found) == 1 and isinstance(found[0], (list, tuple)) else found
    return "\n".join([_line(document[source.question]), *(f"- {_line(choice)}" for choice in choices)])


def _line(value: Any) -> str:
    return " ".join(str(value).split())


def _parsed(task: "Task", document: Mapping[str, Any]) -> str:
    text = task.doc_to_target(document) if task.OUTPUT_TYPE == "loglikelihood_rolling" else task.doc_to_text(document)
    if not isinstance(text, str):  # the choices are contexts
        return "\n".join(_line(choice) for choice in task.doc_to_choice(document))
    question, choices = [], []
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            choices.append(f"- {_line(line[label.end() :])}")
        elif line.strip():
            question.append(_line(line))
    return "\n".join([_FRAME.sub("", " ".join(question)), *choices])
