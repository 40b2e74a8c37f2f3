"""The references that a memory is built from, without test items, and the record of where they come from."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from knnmoe_hf.memory.task_record import SubtaskRecord, TaskRecord, template_digest
from knnmoe_hf.tasks.documents import source_of, splits_of
from knnmoe_hf.tasks.items import Item
from knnmoe_hf.tasks.loading import Benchmark
from knnmoe_hf.tasks.overlap import OverlapReport, Tested
from knnmoe_hf.tasks.reading import iterate_references, tested_prompts


@dataclass(frozen=True)
class ReferenceSet:
    """
    What a memory is built from.

    Attributes:
        items: the references.
        report: of those that were left out.
        record: for the memory.
    """

    items: list[Item]
    report: OverlapReport
    record: TaskRecord


def reference_set(
    benchmark: Benchmark,
    tokenizer: Any,
    *,
    split: str | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    longest: int | None = None,
    others: Sequence[Benchmark] = (),
) -> ReferenceSet:
    """
    The references of a benchmark without those that equal or nearly equal one of its test items.

    Args:
        benchmark: of `load_task`.
        tokenizer: of the base model.
        split: see `references_of`.
        limit, max_tokens: as many references, and tokens of them, at most; the first ones.
        longest: tokens of a reference at most; as in an evaluation, the beginning of a longer one is cut off.
        others: benchmarks whose test items are left out as well.

    Raises:
        ValueError: if no reference is left.
    """
    tested = Tested(prompt for one in (benchmark, *others) for prompt in tested_prompts(one))
    items, pairs, tokens = [], [], 0
    for reference in iterate_references(benchmark, tokenizer, split):
        found = tested.like(reference.prompt)
        if found is not None:
            pairs.append((reference.prompt.id, *found))
            continue
        reference = _cut(reference, longest)
        tokens += len(reference.tokens)
        if max_tokens is not None and tokens > max_tokens:
            break
        items.append(reference)
        if len(items) == limit:
            break
    report = OverlapReport.of(pairs, len(items))
    if not items:
        raise ValueError(f"task {benchmark.name} gives no reference: {_why_none(benchmark, report, max_tokens)}.")
    return ReferenceSet(items, report, record_of(benchmark, items, report, split))


def _why_none(benchmark: Benchmark, report: OverlapReport, max_tokens: int | None) -> str:
    if report.pairs:
        halves = {source_of(task).held_out for task in benchmark.tasks.values()} - {None}
        other = f"the task {min(halves)}" if halves else "data of your own with --dataset"
        return f"all {len(report.pairs):,} equal a test item, or nearly, so use {other}"
    if max_tokens is not None:
        return f"the first one has more than max_tokens={max_tokens} tokens, so allow more"
    return "its splits are empty, or each is a worked example of the prompts, so use fewer with num_fewshot"


def _cut(item: Item, longest: int | None) -> Item:
    room = len(item.prompt.tokens) if longest is None else max(longest - len(item.choices[item.answer]), 1)
    if room >= len(item.prompt.tokens):
        return item
    return replace(item, prompt=replace(item.prompt, tokens=item.prompt.tokens[-room:]))


def record_of(benchmark: Benchmark, items: list[Item], report: OverlapReport, split: str | None = None) -> TaskRecord:
    """
    What a memory that is built from these references says of them.

    Args:
        benchmark: that they are of.
        items: the references.
        report: of those that were left out.
        split: that they were read from, if it is not the usual one.
    """
    counts = Counter(item.prompt.group for item in items)
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{list(item.tokens)}\n".encode())
    subtasks = {}
    for name, task in benchmark.tasks.items():
        config = task.config
        dataset = ":".join(filter(None, (config.dataset_path, config.dataset_name)))
        shots = config.num_fewshot or 0
        subtasks[name] = SubtaskRecord(dataset, splits_of(task, split), shots, template_digest(task), counts[name])
    return TaskRecord(
        benchmark.name,
        version("lm_eval"),
        subtasks,
        benchmark.apply_chat_template,
        benchmark.system_instruction,
        benchmark.fewshot_as_multiturn,
        len(items),
        report.equal,
        report.near,
        digest.hexdigest(),
    )
