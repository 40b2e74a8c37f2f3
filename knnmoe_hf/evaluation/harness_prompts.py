"""Whether an evaluation by the harness asks a memory, with the prompts that it was built from."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from lm_eval.api.model import CachingLM
from torch import nn

from knnmoe_hf.models.attach import active_memory, get_memory

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


def warn_of_cached_answers(lm: object) -> None:
    """
    Warns of a cache of the harness (`--use_cache`) that holds answers already: it finds them by the request alone, so
    that those of a base model would be taken for those of its memory, without asking it.

    Args:
        lm: as `lm_eval.evaluator.evaluate` takes it. Nothing is said about a model without a memory.
    """
    if not isinstance(lm, CachingLM) or not lm.dbdict or not _has_memory(lm.lm):
        return
    logger.warning(
        "%s holds answers that are taken in place of the memory's, whichever model gave them: name another file with "
        "--use_cache unless they are of this memory.",
        lm.cache_db,
    )


def _has_memory(lm: object) -> bool:
    model = getattr(lm, "model", None)
    return isinstance(model, nn.Module) and active_memory(model) is not None


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
