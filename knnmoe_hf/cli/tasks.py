"""`--task` of a build: options, and the references of a benchmark."""

import argparse
from typing import TYPE_CHECKING

from knnmoe_hf.cli import values
from knnmoe_hf.cli.fields import add, option
from knnmoe_hf.cli.options import MAX_LENGTH
from knnmoe_hf.cli.parser import Parser

if TYPE_CHECKING:
    from knnmoe_hf.tasks.reference_set import ReferenceSet

_OF_TASKS = ("num_fewshot", "apply_chat_template", "system_instruction", "task_limit")


def add_task(parser: Parser) -> None:
    """`--task` and what belongs to it, in the harness's names."""
    group = parser.add_argument_group("references of a benchmark (in place of --dataset)")
    help = "Task or group of lm-evaluation-harness: its references, in exactly the template of the evaluation."
    add(group, "task", values.text, None, help)
    add(group, "num_fewshot", values.whole(0), None, "Worked examples in each prompt; default: as the task says.")
    add(group, "apply_chat_template", None, None, "Make the prompts as chats.")
    add(group, "system_instruction", values.text, None, "Text that each prompt begins with.")
    add(group, "task_limit", values.whole(1), None, "References at most, of all subjects in turn; default all.")
    parser.checks.append(_check_task)


def _check_task(options: argparse.Namespace) -> None:
    if options.task is None:
        if options.dataset is None:
            raise ValueError("name the references with --dataset or --task")
        given = [name for name in _OF_TASKS if getattr(options, name) is not None]
        if given:
            raise ValueError(f"{option(given[0])} is for a benchmark: name it with --task, or leave it out")
        return
    if options.dataset is not None:
        raise ValueError("--task and --dataset exclude each other: leave one of them out")
    if options.max_length != MAX_LENGTH:
        raise ValueError("--max-length is not allowed with --task, whose prompts are never cut: leave it out")


def read_task(options: argparse.Namespace, tokenizer) -> "ReferenceSet":
    """
    The references that `--task` names.

    Raises:
        ValueError: if they cannot be had, saying what to do.
    """
    from transformers import AutoConfig

    from knnmoe_hf.tasks.loading import load_task
    from knnmoe_hf.tasks.reference_set import reference_set

    benchmark = load_task(
        options.task,
        num_fewshot=options.num_fewshot,
        apply_chat_template=bool(options.apply_chat_template),
        system_instruction=options.system_instruction,
    )
    try:
        config = AutoConfig.from_pretrained(options.model, revision=options.base_model_revision)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    except (OSError, ValueError):  # an adapter
        longest = None
    limits = dict(limit=options.task_limit, max_tokens=options.max_tokens, longest=longest)
    return reference_set(benchmark, tokenizer, split=options.split, **limits)
