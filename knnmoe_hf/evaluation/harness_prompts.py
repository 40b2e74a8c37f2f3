"""Whether the prompts of an evaluation by the harness are those that a memory was built from."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from knnmoe_hf.models.attach import get_memory

logger = logging.getLogger(__name__)

_SETTINGS = ("apply_chat_template", "system_instruction", "fewshot_as_multiturn")


def warn_of_other_prompts(arguments: Mapping[str, Any]) -> None:
    """
    Warns of each task whose prompts differ from those that the memory in force was built from: a key depends on its
    context, so such prompts find no near neighbours.

    Nothing is said about a memory that was not built from a benchmark.

    Args:
        arguments: of `lm_eval.evaluator.evaluate`. Tasks with the same differences share a warning.
    """
    record = _record_of(getattr(arguments.get("lm"), "model", None))
    if record is None:
        return
    settings = {name: arguments[name] for name in _SETTINGS if name in arguments}
    tasks_of: dict[str, list[str]] = defaultdict(list)
    for name, task in _tasks(arguments.get("task_dict")).items():
        found = record.differences(task, **settings) if name in record.subtasks else ["it is another benchmark"]
        if found:
            tasks_of["; ".join(found)].append(name)
    for differences, names in tasks_of.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        logger.warning(
            "the memory was built from prompts of the task %s that differ from those of %s: %s; build one with the "
            "settings of this evaluation, or evaluate with those of the memory.",
            record.task,
            shown,
            differences,
        )


def _record_of(model: object):
    """What the memory in force says of the benchmark that it was built from; None without one."""
    if not isinstance(model, nn.Module):
        return None
    try:
        return get_memory(model).task_record
    except ValueError:  # nothing is attached, or another override
        return None


def _tasks(loaded: object) -> dict[str, Any]:
    """The tasks of `TaskManager.load`, by name; none of the older nested form, which the harness still accepts."""
    tasks = loaded.get("tasks") if isinstance(loaded, Mapping) else None
    return tasks if isinstance(tasks, Mapping) else {}
