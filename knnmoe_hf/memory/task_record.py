"""What a memory that was built from a benchmark says of it, so that an evaluation can be compared with it."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from knnmoe_hf.errors import shown
from knnmoe_hf.memory.numbers import check, is_count

_TEMPLATE = (
    "description",
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "target_delimiter",
    "fewshot_delimiter",
    "gen_prefix",
    "use_prompt",
    "output_type",
)
"""Fields of a harness task's configuration that decide its prompts, once a question and its examples are chosen."""


def template_digest(task: Any) -> str:
    """
    SHA-256 of what decides the prompts of a task of the harness: its templates and delimiters.

    Args:
        task: of lm-evaluation-harness; a function counts by its source.
    """
    of_examples = getattr(task.config, "fewshot_config", None)
    parts = {name: _plain(getattr(task.config, name, None)) for name in _TEMPLATE}
    parts["fewshot"] = {name: _plain(getattr(of_examples, name, None)) for name in _TEMPLATE}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A field as JSON: text, numbers and lists of them as they are, a function as its source."""
    if callable(value):
        try:
            return inspect.getsource(value)
        except (TypeError, OSError):
            return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


@dataclass(frozen=True)
class SubtaskRecord:
    """
    One task of the harness; a group such as `mmlu` has several.

    Attributes:
        dataset: the data set as the task names it, with its configuration after a colon; empty for text that is made
            on the spot.
        splits: that references were read from.
        num_fewshot: worked examples before each question.
        template: SHA-256 of what decides its prompts (`template_digest`).
        references: in the memory.
    """

    dataset: str
    splits: list[str]
    num_fewshot: int
    template: str
    references: int

    def __post_init__(self):
        texts = all(isinstance(text, str) for text in (self.dataset, self.template, *self.splits))
        if not (isinstance(self.splits, list) and texts and is_count(self.num_fewshot) and is_count(self.references)):
            raise ValueError(f"{shown(vars(self))} is not a record of a task")


@dataclass(frozen=True)
class TaskRecord:
    """
    The benchmark that a memory was built from.

    Attributes:
        task: its name in the harness, a task or a group.
        harness: version of lm-evaluation-harness.
        subtasks: `{name: SubtaskRecord}`.
        apply_chat_template: whether prompts were chats; the name of the template, if one was named.
        system_instruction: of the chats, or before the prompts.
        fewshot_as_multiturn: whether worked examples were turns of the chat.
        references: in the memory when it was built.
        equal, near: references that were left out, as they equal a test item, or nearly do.
        digest: SHA-256 of the references' token ids, in their order.
    """

    task: str
    harness: str
    subtasks: Mapping[str, SubtaskRecord]
    apply_chat_template: bool | str
    system_instruction: str | None
    fewshot_as_multiturn: bool
    references: int
    equal: int
    near: int
    digest: str

    @classmethod
    def of_json(cls, entry: dict) -> "TaskRecord":
        """From plain JSON values."""
        if set(entry) != {field.name for field in fields(cls)}:
            raise ValueError(f"{shown(entry)} is not a record of a task")
        return cls(**entry | {"subtasks": {name: SubtaskRecord(**one) for name, one in entry["subtasks"].items()}})

    def __post_init__(self):
        sound = {
            "task, harness and digest": all(isinstance(text, str) for text in (self.task, self.harness, self.digest)),
            "apply_chat_template": isinstance(self.apply_chat_template, (bool, str)),
            "system_instruction": self.system_instruction is None or isinstance(self.system_instruction, str),
            "fewshot_as_multiturn": type(self.fewshot_as_multiturn) is bool,
            "counts": all(map(is_count, (self.references, self.equal, self.near))),
        }
        check(sound, self)

    def differences(
        self,
        task: Any,
        apply_chat_template: bool | str = False,
        system_instruction: str | None = None,
        fewshot_as_multiturn: bool = True,
    ) -> list[str]:
        """
        How the prompts of an evaluation differ from those that the memory was built with, in words.

        Args:
            task: of the harness, with the `num_fewshot` of the run.
            apply_chat_template, system_instruction, fewshot_as_multiturn: of the run.
        """
        name = getattr(task.config, "task", None)
        built = self.subtasks.get(name)
        if built is None:
            return [f"the task is {name}, not {self.task}"]
        found = [] if built.template == template_digest(task) else ["the templates of the prompts differ"]
        pairs = {
            "num_fewshot": (getattr(task.config, "num_fewshot", None) or 0, built.num_fewshot),
            "apply_chat_template": (apply_chat_template, self.apply_chat_template),
            "system_instruction": (system_instruction, self.system_instruction),
        }
        if apply_chat_template and self.apply_chat_template and built.num_fewshot:
            pairs["fewshot_as_multiturn"] = (fewshot_as_multiturn, self.fewshot_as_multiturn)
        return found + [
            f"{what} is {shown(now)}, not {shown(then)}" for what, (now, then) in pairs.items() if now != then
        ]

    def sentence(self) -> str:
        """What was built from what, for a person."""
        splits = sorted({split for one in self.subtasks.values() for split in one.splits})
        shots = sorted({one.num_fewshot for one in self.subtasks.values()})
        parts = len(self.subtasks)
        said = f"built from the benchmark {self.task}"
        said += (
            f" ({parts} tasks of lm-evaluation-harness {self.harness})"
            if parts > 1
            else (f" (lm-evaluation-harness {self.harness})")
        )
        said += f": {self.references:,} references of {' and '.join(splits) or 'its text'}"
        said += f", {'-'.join(map(str, shots))} worked examples in each prompt"
        said += ", as chats" if self.apply_chat_template else ""
        return f"{said}; {self.equal:,} that equal a test item and {self.near:,} that nearly do were left out"
