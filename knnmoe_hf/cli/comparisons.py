"""What `knnmoe compare` does with its arguments: the estimate, the run, and what is printed at the end."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from knnmoe_hf.cli.interrupts import says_when_interrupted
from knnmoe_hf.cli.loading import load_base, load_tokenizer
from knnmoe_hf.cli.messages import notice
from knnmoe_hf.comparison.estimate import sentences, space
from knnmoe_hf.comparison.plan import ComparisonPlan
from knnmoe_hf.comparison.run import Comparison
from knnmoe_hf.comparison.setup import check_consent, check_free, claimed, load_benchmarks, make_methods
from knnmoe_hf.errors import in_one_line, shown


def compare_methods(options: argparse.Namespace, plan: ComparisonPlan) -> None:
    """
    Carries a plan out, or says what it would take.

    Args:
        options: of the command line.
        plan: made of them.

    Raises:
        ValueError: for a plan that cannot be carried out here, saying what to do.
        OSError: if the model cannot be loaded.
    """
    make_methods(plan)
    folder = Path(options.output)
    if options.dry_run:
        print("\n".join(_described(plan)))
        for line in _estimate_as_far_as_possible(options, plan, folder):
            print(line)
        return
    check_free(folder, plan)
    comparison = _prepared(options, plan, folder)
    way = f"what is done is in {shown(str(folder))}: the same command resumes it"
    with claimed(folder, plan), says_when_interrupted(way):  # not before: what is missing may lead to another plan
        for line in _estimate(plan, comparison):
            notice(options, line)
        results = comparison.run()
    print("\n".join(_closing(results, folder)))


def _prepared(options: argparse.Namespace, plan: ComparisonPlan, folder: Path) -> Comparison:
    """A comparison that is ready to run; what is small is read first, so that its absence is reported at once."""
    benchmarks = load_benchmarks(plan)
    check_consent(benchmarks, options.confirm_run_unsafe_code)
    options.model, options.dtype = plan.model_place, plan.dtype
    try:
        tokenizer = load_tokenizer(options.model, options.base_model_revision)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        model = load_base(options, device)
    except OSError as error:
        raise OSError(
            f"the model {shown(plan.model)} cannot be loaded: connect to the Hub once, or name a folder that it is in "
            f"with --model ({in_one_line(error)})"
        ) from error
    return Comparison(
        plan,
        benchmarks,
        model,
        tokenizer,
        folder,
        progress=not options.quiet,
        say=lambda text: notice(options, text),
        unsafe=options.confirm_run_unsafe_code,
    )


def _estimate(plan: ComparisonPlan, comparison: Comparison) -> Iterable[str]:
    tokens = max(references.tokens for references in comparison.references.values())
    return sentences(space(plan, comparison.model.dtype, tokens), comparison.seconds())


def _estimate_as_far_as_possible(options: argparse.Namespace, plan: ComparisonPlan, folder: Path) -> Iterable[str]:
    try:
        comparison = _prepared(options, plan, folder)
    except (OSError, ValueError) as error:
        yield f"missing: {in_one_line(error)}"
        try:
            dtype = None if plan.dtype in (None, "auto") else getattr(torch, plan.dtype)
            yield from sentences(space(plan, dtype), None)
        except OSError:  # the model's configuration is missing too, which has been said
            return
        return
    yield from _estimate(plan, comparison)


def _described(plan: ComparisonPlan) -> Iterable[str]:
    settings = plan.settings
    yield f"{plan.name}: {plan.model}"
    yield f"methods: {', '.join(one.label for one in plan.methods)}"
    for task in plan.tasks:
        off = f", off-domain {', '.join(task.off_tasks)}" if task.off_tasks else ""
        yield f"task: {task.name}{off}{f' ({task.note})' if task.note else ''}"
    shots = "as the task says" if settings.num_fewshot is None else settings.num_fewshot
    items = f"{settings.limit or 'all'} test items of each task"
    items += "" if settings.off_limit is None else f" and {settings.off_limit} of off-domain tasks"
    yield (
        f"settings: {settings.references or 'all'} references, {items}, worked examples {shots}, seed {settings.seed}"
    )
    for one in plan.published:
        base = "" if one.base is None else f"{one.base:g} -> "
        yield f"published: {one.method} of {one.model} on {one.task}: {base}{one.value:g} {one.metric} ({one.source})"


def _closing(results: dict, folder: Path) -> Iterable[str]:
    """One line for each row, and where the report is."""
    for row in results["results"]:
        name = f"{row['task']}{' (off-domain)' if row['off'] else ''}: {row['method']}"
        if row["status"] != "done":
            yield f"{name} {row['status']}: {row['reason']}"
            continue
        metric = row["metric"]
        change = row["changes"].get("frozen", {}).get(metric)
        told = "" if change is None else f" ({_signed(change['mean'])}{_interval(change)})"
        cost = row["cost"]
        yield f"{name} {metric} {row['metrics'][metric]:.3f}{told}, {1000 * cost['seconds']:.0f} ms an item"
    yield f"report: {folder / 'report.md'}, {folder / 'report.html'}"


def _interval(change: dict) -> str:
    return "" if change["low"] is None else f" [{_signed(change['low'])}, {_signed(change['high'])}]"


def _signed(value: float) -> str:
    return f"{value:+.3f}"
