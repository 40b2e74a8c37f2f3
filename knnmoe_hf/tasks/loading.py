"""Tasks of lm-evaluation-harness by name, with the settings of an evaluation."""

import functools
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnmoe_hf.tasks.problems import explained, need_harness, unknown_task

if TYPE_CHECKING:  # they take seconds to import
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

HARNESS_TASKS = Path(__file__).parent / "harness"
"""The folder of our own tasks, for `TaskManager(include_path=...)` and `--include_path`."""
FEWSHOT_SEED, RANDOM_SEED = 1234, 0
"""The harness's defaults."""


@dataclass(frozen=True, eq=False)
class Benchmark:
    """
    A task or a group of tasks of the harness, ready for `lm_eval.evaluator.evaluate(lm, task_dict=benchmark.loaded)`.

    Attributes:
        name: of the task or group.
        loaded: what `TaskManager.load` returns: `tasks`, and of a group `groups` and `group_map`.
        apply_chat_template, system_instruction, fewshot_as_multiturn: as `evaluate` takes them.
        fewshot_seed: of the choice of worked examples.
    """

    name: str
    loaded: Mapping[str, Any] = field(repr=False)
    apply_chat_template: bool | str = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    fewshot_seed: int = FEWSHOT_SEED

    @property
    def tasks(self) -> "dict[str, Task]":
        """The single tasks by name."""
        return self.loaded["tasks"]


def load_task(
    name: str,
    *,
    num_fewshot: int | None = None,
    apply_chat_template: bool | str = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool = True,
    fewshot_seed: int = FEWSHOT_SEED,
) -> Benchmark:
    """
    A task or group of the harness or of ours, as `lm_eval.simple_evaluate` would load it.

    Args:
        name: such as `"mmlu"`, `"mmlu_anatomy"`, `"gpqa_diamond_zeroshot"` or `"lab_topics"`.
        num_fewshot: worked examples before each question; None for what the task says. A task that says 0 keeps 0.
        apply_chat_template, system_instruction, fewshot_as_multiturn, fewshot_seed: as `simple_evaluate` takes them.

    Raises:
        ValueError: for an unknown name, data that cannot be loaded, or a harness that is not installed; one sentence
            that says what to do.
    """
    need_harness()
    manager = task_manager(name)
    if name not in manager.task_index:
        raise ValueError(unknown_task(name, manager.all_tasks))
    random.seed(RANDOM_SEED)  # the choices of some tasks (GPQA) are shuffled by it while they are loaded
    with explained(name), without_warnings("lm_eval"):  # of how the harness's own tasks are written
        loaded = manager.load([name])
    for task in loaded["tasks"].values():
        _freeze_documents(task)
        set_fewshot(task, num_fewshot, fewshot_seed)
    return Benchmark(name, loaded, apply_chat_template, system_instruction, fewshot_as_multiturn, fewshot_seed)


@functools.cache
def _manager(folder: Path | None = None) -> "TaskManager":
    """The tasks of one folder, or of the harness and of this library."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder or HARNESS_TASKS), include_defaults=folder is None)


def task_manager(name: str | None = None) -> "TaskManager":
    """
    The harness's `TaskManager`, which knows the tasks of this library too.

    Args:
        name: of the only task that is needed. The manager then knows few others, because reading all of the harness's
            15,000 files takes ten seconds.
    """
    if name is None:
        return _manager()
    if name in _manager(HARNESS_TASKS).all_tasks:
        return _manager(HARNESS_TASKS)
    folder = _folders().get(name)  # a group may have tasks of other folders
    return _manager(folder) if folder is not None and name in _manager(folder).all_subtasks else _manager()


@functools.cache
def _folders() -> dict[str, Path]:
    """The folder of each single task of the harness that a file names; the first of several, as in the harness."""
    import lm_eval.tasks

    found: dict[str, Path] = {}
    for file in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")):
        for name in _NAME.findall(file.read_bytes()):
            found.setdefault(name.decode(errors="replace"), file.parent)
    return found


_NAME = re.compile(rb"^[\"']?task[\"']?: *[\"']?([^\s\"']+)[\"']?\s*$", re.MULTILINE)


def set_fewshot(task: "Task", num_fewshot: int | None, seed: int = FEWSHOT_SEED) -> None:
    """Sets worked examples as `simple_evaluate` does: a task that says 0 keeps it, and one that says nothing has 0."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)


@contextmanager
def without_warnings(name: str) -> Iterator[None]:
    """Inside this context the logger of this name logs errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _freeze_documents(task: "Task") -> None:
    """Makes the documents of a split the same each time: those of GPQA are shuffled anew whenever they are read."""
    process = task.config.process_docs
    if process is not None:
        task.config.process_docs = _remembered(process)


def _remembered(process: Callable) -> Callable:
    known: dict[int, tuple[Any, Any]] = {}

    @functools.wraps(process)
    def once(documents: Any) -> Any:
        if id(documents) not in known:
            known[id(documents)] = (documents, process(documents))
        return known[id(documents)][1]

    return once
