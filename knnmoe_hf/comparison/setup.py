"""What a comparison needs before it runs: its folder, its methods, its tasks and their references."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from knnmoe_hf.baselines.base import Method
from knnmoe_hf.baselines.registry import make_method
from knnmoe_hf.comparison.fits import digest_of_items
from knnmoe_hf.comparison.model import without_warnings
from knnmoe_hf.comparison.plan import ComparisonPlan, TaskPlan
from knnmoe_hf.errors import shown
from knnmoe_hf.files import write_json
from knnmoe_hf.tasks import Benchmark, items_of, load_task, references_of, without_test_items
from knnmoe_hf.tasks.items import Item
from knnmoe_hf.version import __version__

_PLAN = "plan.json"


def claim(folder: Path, plan: ComparisonPlan) -> None:
    """
    Makes a folder this plan's.

    Raises:
        ValueError: if it holds another comparison, or something else.
    """
    own = plan.identity() | {"version": __version__}
    path = folder / _PLAN
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if differs := [name for name in own if before.get(name) != own[name]]:
            where = shown(str(folder))
            raise ValueError(f"{where} holds a comparison with other {differs[0]}: name a new folder, or delete it.")
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{shown(str(folder))} holds something else: name a new or an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, own)


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
    with without_warnings("lm_eval"):  # of what it makes of each field of each task
        found = {name: load_task(name, **how) for name in names}
    for plan_of in plan.tasks:
        for task in found[plan_of.name].tasks.values() if plan_of.generation_kwargs else ():
            task.set_config(key="generation_kwargs", value=dict(plan_of.generation_kwargs), update=True)
    return found


@dataclass(frozen=True)
class References:
    """
    The references of a task, the same for all methods.

    Attributes:
        items: no test item among them, in an order that says nothing.
        removed: how many were test items, or nearly.
        removed_text: the same as a sentence.
    """

    items: list[Item]
    removed: int
    removed_text: str

    @cached_property
    def digest(self) -> str:
        """Of the items."""
        return digest_of_items(self.items)

    @property
    def tokens(self) -> int:
        """Of all items."""
        return sum(len(item.tokens) for item in self.items)


def read_references(
    plan: ComparisonPlan, benchmarks: Mapping[str, Benchmark], task: TaskPlan, tokenizer
) -> References:
    """
    References of a task, without those that are test items of it or of its off-domain tasks.

    They do not depend on `limit`, so that a first look has the references of the whole run.

    Raises:
        ValueError: if there are none.
    """
    tested = [item for name in (task.name, *task.off_tasks) for item in items_of(benchmarks[name], tokenizer)]
    wanted = limit = plan.settings.references
    while True:
        read = references_of(benchmarks[task.name], tokenizer, limit=limit)
        kept, report = without_test_items(read, tested)
        if limit is None or len(kept) >= wanted or len(read) < limit:
            break
        limit *= 2  # as many again, for those that were left out
    if not kept:
        raise ValueError(f"task {task.name} has no reference that is not a test item: name another task.")
    kept = kept[:wanted]
    random.Random(plan.settings.seed).shuffle(kept)
    return References(kept, report.equal + report.near, report.sentence())
