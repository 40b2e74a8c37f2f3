"""The documents of a benchmark that are references, before they are made into prompts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knnmoe_hf.errors import shown
from knnmoe_hf.tasks.problems import explained
from knnmoe_hf.tasks.splits import REFERENCES, References

if TYPE_CHECKING:
    from lm_eval.api.task import Task


@dataclass(frozen=True)
class Document:
    """
    A document of the harness.

    Attributes:
        id: `"task/split/number"`.
        content: its fields.
        answer: field of its answer, of a generation task whose template gives something else.
    """

    id: str
    content: Mapping[str, Any]
    answer: str | None = None


def source_of(task: "Task") -> References:
    """Where the references of a task come from."""
    known = REFERENCES.get(task.config.dataset_path or "")
    if known is not None:
        return known
    tested, metadata = test_split(task), task.config.metadata or {}
    split = next(
        (one for one in (task.config.training_split, task.config.validation_split) if one not in (None, tested)), None
    )
    fields = {name: metadata[f"{name}_field"] for name in ("question", "answer") if f"{name}_field" in metadata}
    return References(() if split is None else (split,), **fields)


def test_split(task: "Task") -> str:
    """The split that a task is tested on."""
    return task.config.test_split or task.config.validation_split


def splits_of(task: "Task", split: str | None = None) -> list[str]:
    """
    The splits that references are read from.

    Args:
        task: of the harness.
        split: to read instead of the usual ones.

    Raises:
        ValueError: if there are none, or `split` is tested.
    """
    name, source = task.config.task, source_of(task)
    if split is not None:
        known = sorted(map(str, task.dataset))
        if split not in known or split == test_split(task):
            allowed = ", ".join(sorted(set(known) - {test_split(task)})) or "none"
            raise ValueError(f"split {shown(split)} of task {name} is not possible: use one of {allowed}.")
        return [split]
    if source.why_none:
        raise ValueError(f"task {name} {source.why_none}.")
    if not source.splits:
        raise ValueError(
            f"task {name} has no split beside the one that it is tested on: name data of your own with --dataset."
        )
    return list(source.splits)


def reference_documents(task: "Task", split: str | None = None) -> Iterator[Document]:
    """
    The references of one task of the harness.

    Args:
        task: of the harness.
        split: see `splits_of`.

    Raises:
        ValueError: if there are none, or they cannot be loaded.
    """
    source, name = source_of(task), task.config.task
    for part in splits_of(task, split):
        for number, content in enumerate(_processed(task, _split(task, source, part))):
            if content.get("task_id") in source.except_ids:
                continue
            if source.fewshot_mark:
                content = {**content, "is_fewshot": True}
            yield Document(f"{name}/{part}/{number}", content, source.answer)


def _split(task: "Task", source: References, part: str) -> Any:
    """The documents of a split, as they are in the data set."""
    if source.config in (None, task.config.dataset_name):
        if part not in task.dataset:
            raise ValueError(
                f"task {task.config.task} has no split {part}, from which references are read: its data set has "
                f"{', '.join(sorted(map(str, task.dataset)))}."
            )
        return task.dataset[part]
    import datasets

    with explained(task.config.task):
        return datasets.load_dataset(task.config.dataset_path, source.config)[part]


def _processed(task: "Task", documents: Any) -> Any:
    """As the task processes its documents; one that tests a part of a split says how the other part is processed."""
    process = task.config.process_docs
    process = getattr(process, "references", process)
    return documents if process is None else process(documents)
