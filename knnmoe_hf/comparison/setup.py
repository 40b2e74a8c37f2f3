"""What a comparison needs before it runs: its folder, its methods, its tasks and their references."""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from knnmoe_hf.baselines.base import Method
from knnmoe_hf.baselines.registry import make_method
from knnmoe_hf.comparison.fits import digest_of_items
from knnmoe_hf.comparison.plan import ComparisonPlan, TaskPlan
from knnmoe_hf.comparison.report import MARKDOWN, PAGE, RESULTS
from knnmoe_hf.errors import shown
from knnmoe_hf.files import unfinished, write_json
from knnmoe_hf.tasks import Benchmark, load_task
from knnmoe_hf.tasks.code import need_consent
from knnmoe_hf.tasks.items import Item
from knnmoe_hf.tasks.loading import without_warnings
from knnmoe_hf.tasks.reference_set import reference_set
from knnmoe_hf.version import __version__

_PLAN, _LOCK = "plan.json", ".lock"
_FILES = (_PLAN, RESULTS, PAGE, MARKDOWN)


def check_free(folder: Path, plan: ComparisonPlan) -> None:
    """
    Checks that a folder is empty, does not exist, or holds this plan's comparison.

    Raises:
        ValueError: if it holds another comparison, or something else.
    """
    own, path, where = _identity(plan), folder / _PLAN, shown(str(folder))
    if path.exists():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} holds no {_PLAN} that can be read: name a new folder, or delete it.") from error
        if differs := [name for name in own if before.get(name) != own[name]]:
            other = f"{'other' if differs[0].endswith('s') else 'another'} {differs[0]}"
            raise ValueError(f"{where} holds a comparison with {other}: name a new folder, or delete it.")
    elif folder.exists() and set(folder.iterdir()) - {folder / _LOCK, *unfinished(folder, _PLAN)}:
        raise ValueError(f"{where} holds something else: name a new or an empty folder.")


@contextmanager
def claimed(folder: Path, plan: ComparisonPlan) -> Iterator[None]:
    """
    Reserves a folder for this plan; inside this context no other process runs a comparison there.

    Raises:
        ValueError: as `check_free` does, and if another process works in the folder.
    """
    check_free(folder, plan)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / _LOCK).acquire(blocking=False)
    except Timeout as error:
        way_out = "wait until it ends, or name another folder"
        raise ValueError(f"another process runs a comparison in {shown(str(folder))}: {way_out}.") from error
    with held:
        for left in (path for name in _FILES for path in unfinished(folder, name)):
            left.unlink()
        write_json(folder / _PLAN, _identity(plan))
        yield


def _identity(plan: ComparisonPlan) -> dict[str, Any]:
    return plan.identity() | {"version": __version__}


def make_methods(plan: ComparisonPlan) -> dict[str, Method]:
    """
    The methods of a plan by label, not fitted yet.

    Raises:
        ValueError: for an unknown method or option.
    """
    return {one.label: make_method(one.method, **one.options) for one in plan.methods}


def load_benchmarks(plan: ComparisonPlan) -> dict[str, Benchmark]:
    """
    The tasks of a plan by name, off-domain tasks among them.

    Raises:
        ValueError: for an unknown task, or data that cannot be had; one sentence that says what to do.
    """
    names = dict.fromkeys(name for task in plan.tasks for name in (task.name, *task.off_tasks))
    how = dict(num_fewshot=plan.settings.num_fewshot, apply_chat_template=plan.settings.apply_chat_template)
    with without_warnings("lm_eval"):  # the harness warns of fields of its own tasks
        found = {name: load_task(name, **how) for name in names}
    for plan_of in plan.tasks:
        for task in found[plan_of.name].tasks.values() if plan_of.generation_kwargs else ():
            task.set_config(key="generation_kwargs", value=dict(plan_of.generation_kwargs), update=True)
    return found


def check_consent(benchmarks: Mapping[str, Benchmark], unsafe: bool) -> None:
    """
    Checks that code which the model writes may be run, if a task runs it: before any item is answered.

    Args:
        benchmarks: of a plan.
        unsafe: whether it was allowed.

    Raises:
        ValueError: if it was not, or the variable is not set that `evaluate` asks for.
    """
    running = [name for name, benchmark in benchmarks.items() if any(map(_runs_code, benchmark.tasks.values()))]
    if running and not unsafe:
        raise ValueError(
            f"task {shown(running[0])} runs code that the model writes: add --confirm-run-unsafe-code "
            "(Comparison(unsafe=True)) and set HF_ALLOW_CODE_EVAL=1 if you accept that, or leave the task out."
        )
    if running:
        need_consent()


def _runs_code(task: Any) -> bool:
    return bool(getattr(task, "UNSAFE_CODE", False))


@dataclass(frozen=True)
class References:
    """
    The references of a task, the same for all methods.

    Attributes:
        items: without test items, shuffled.
        removed: how many were left out because they equal a test item, or nearly do.
        removed_text: the same as a sentence.
    """

    items: list[Item]
    removed: int
    removed_text: str

    @cached_property
    def digest(self) -> str:
        """A digest of the items."""
        return digest_of_items(self.items)

    @property
    def tokens(self) -> int:
        """Number of tokens of all items."""
        return sum(len(item.tokens) for item in self.items)


def read_references(
    plan: ComparisonPlan, benchmarks: Mapping[str, Benchmark], task: TaskPlan, tokenizer, longest: int | None = None
) -> References:
    """
    References of a task, without those that are test items of it or of its off-domain tasks.

    They do not depend on the setting `limit`, so that a first look has the references of the whole run.

    Args:
        plan, benchmarks, task, tokenizer: whose references.
        longest: tokens that the model can read; the beginning of a longer reference is cut off.

    Raises:
        ValueError: if there are none.
    """
    others = [benchmarks[name] for name in task.off_tasks]
    limits = dict(limit=plan.settings.references, longest=longest)
    read = reference_set(benchmarks[task.name], tokenizer, others=others, **limits)
    items = read.items
    random.Random(plan.settings.seed).shuffle(items)
    return References(items, read.report.equal + read.report.near, read.report.sentence())
