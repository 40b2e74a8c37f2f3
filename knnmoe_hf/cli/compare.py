"""`knnmoe compare`: methods side by side on the same items of tasks, with a report; it resumes by itself."""

import argparse
from pathlib import Path

from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli import paths, values
from knnmoe_hf.cli.fields import add
from knnmoe_hf.cli.parser import Parser

EXAMPLE = "knnmoe compare --config lab --output lab-comparison"
_SETTINGS = ("limit", "off_limit", "num_fewshot", "batch_size", "seed", "references", "apply_chat_template")


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    parser.options_from_file = False  # its --config is a comparison, not a list of options
    group = parser.add_argument_group("what is compared")
    help = "A configuration of knnmoe_hf (lab, olmoe-1b-7b, gpt-oss-20b, qwen3-30b-a3b) or a YAML file"
    group.add_argument("--config", type=paths.name, metavar="NAME_OR_FILE", help=help)
    shared.add_model(parser, "The frozen model: a folder, a repository of the Hub, or lab:olmoe, which is shipped")
    help = "Methods (with --config, their labels there); the frozen model is always among them"
    group.add_argument("--methods", nargs="+", type=values.text, metavar="METHOD", help=help)
    help = "Tasks of lm-evaluation-harness, or lab_topics, lab_headers, lab_notices, lab_python (of --config, some)"
    group.add_argument("--tasks", nargs="+", type=values.text, metavar="TASK", help=help)
    help = "Tasks of other text, on which the fitted methods should change nothing"
    group.add_argument("--off-tasks", nargs="+", type=values.text, metavar="TASK", help=help)
    parser.add_argument("--output", type=paths.name, required=True, help="Folder for responses, results and report")
    help = "Say what it would take, in time and memory, and stop"
    parser.add_argument("--dry-run", action="store_true", help=help)
    _add_settings(parser)
    parser.checks.append(_check_usage)


def _add_settings(parser: Parser) -> None:
    group = parser.add_argument_group("settings (default: as the comparison says)")
    add(group, "limit", values.whole(1), None, "Test items of each task at most, for a first look.")
    add(group, "off_limit", values.whole(1), None, "Test items of each off-domain task at most; default: as limit.")
    add(group, "batch_size", values.whole(1), None, "Items scored at once; default 8.")
    add(group, "num_fewshot", values.whole(0), None, "Worked examples in each prompt; default: as the task says.")
    add(group, "seed", values.whole(0), None, "Seed of references' order, fits and sampled texts; default 0.")
    add(group, "references", values.whole(1), None, "Reference items of each task, the same for all; default 1000.")
    help = "Make prompts with the tokenizer's chat template."
    group.add_argument("--apply-chat-template", action="store_true", default=None, help=help)
    help = "Run code that the model writes, for tasks that test it; HF_ALLOW_CODE_EVAL=1 is needed too"
    group.add_argument("--confirm-run-unsafe-code", action="store_true", help=help)


def _check_usage(options: argparse.Namespace) -> None:
    if options.config is not None:
        if options.off_tasks:
            raise ValueError("--off-tasks is not allowed with --config, which names them: leave it out")
        return
    if missing := [name for name in ("model", "methods", "tasks") if not getattr(options, name)]:
        way_out = "name a comparison with --config, or all of --model, --methods and --tasks"
        raise ValueError(f"--{missing[0]} is missing: {way_out}")


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    from knnmoe_hf.tasks.problems import need_harness

    paths.check_folder(options.output)
    need_harness()
    plan = _plan(options)
    if not plan.model.startswith("lab:"):
        paths.check_there(plan.model, "a folder of a model, or a repository of the Hub")


def run(options: argparse.Namespace) -> None:
    """Compares and writes the report."""
    from knnmoe_hf.cli.comparisons import compare_methods

    compare_methods(options, _plan(options))


def _plan(options: argparse.Namespace):
    from dataclasses import replace

    from knnmoe_hf.comparison.planning import make_plan, read_plan

    given = {name: getattr(options, name) for name in _SETTINGS}
    if options.config is not None:
        plan = read_plan(options.config).only(options.methods, options.tasks)
        plan = replace(plan, model=options.model or plan.model, dtype=options.dtype or plan.dtype)
    else:
        tasks = [{"name": name} for name in options.tasks]
        if options.off_tasks:
            tasks = [{**task, "off_tasks": options.off_tasks} for task in tasks]
        name = Path(options.output).name
        plan = make_plan(options.model, options.methods, tasks, name=name, dtype=options.dtype)
    return plan.with_settings(**given)
