"""Reading the texts of an evaluation, and comparing base and memory on each."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from knnmoe_hf.cli.building import read_data
from knnmoe_hf.cli.messages import notice, progress
from knnmoe_hf.cli.tables import IN_DOMAIN, OFF_DOMAIN, Result
from knnmoe_hf.evaluation import Comparison, compare
from knnmoe_hf.evaluation.overlap import without_overlap
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.attach import active_memory, attach_memory, set_memory, use_memory


class Text(NamedTuple):
    """A data set to compare on: its name, `IN_DOMAIN` or `OFF_DOMAIN`, and its examples."""

    name: str
    kind: str
    rows: Sequence[dict]


def read_texts(
    options: argparse.Namespace, memory: RoutingMemory, tokenizer, vocab_size: int | None = None
) -> list[Text]:
    """
    The data sets that `evaluate` names.

    Raises:
        ValueError: if one of them cannot be read, or the memory holds all of it.
    """
    named = [(name, IN_DOMAIN, options.split) for name in options.dataset]
    named += [(name, OFF_DOMAIN, options.off_split) for name in options.off_dataset]
    texts = []
    for name, kind, split in named:
        rows = read_data(options, name, tokenizer, vocab_size, split=split, max_examples=options.max_examples)
        texts.append(Text(name, kind, rows))
    check_overlap(options, memory, texts)
    return texts


def check_overlap(options: argparse.Namespace, memory: RoutingMemory, texts: Sequence[Text]) -> None:
    """
    Says how much of each text the memory holds.

    Raises:
        ValueError: if nothing would be left of one of them.
    """
    for text in texts:
        _, overlap = without_overlap(memory, text.rows, options.allow_overlap)
        overlap.check_any_left(text.name)
        if overlap.checked:  # else the comparison warns
            notice(options, f"{text.name}: {overlap.sentence()}")


def attach_others(model: nn.Module, memory: RoutingMemory) -> tuple[str, ...]:
    """
    Attaches the memory in force a second time, for comparison, with another `recall`, by which it is named: `"both"`,
    or `"routing"` if it recalls next tokens itself. The memory that was in force stays in force.

    Returns:
        The name; nothing if the memory has no next tokens.
    """
    if memory.next_tokens is None:
        return ()
    other = "both" if memory.config.recall == "routing" else "routing"
    config = type(memory.config).from_dict(memory.config.saved() | {"recall": other})
    own = active_memory(model)
    attach_memory(model, replace(memory, config=config), other)
    set_memory(model, own)
    return (other,)


def compare_all(
    options: argparse.Namespace, model: nn.Module, texts: Sequence[Text], others: Sequence[str] = ()
) -> list[Result]:
    """Compares base and memory on each text, and memories that are attached under other names."""
    results = []
    for text in texts:
        by_name: dict[str, Comparison] = {}
        for name in (active_memory(model), *others):
            with use_memory(model, name):
                by_name[name] = compare(
                    model,
                    text.rows,
                    options.batch_size,
                    progress=progress(options, f"evaluating on {text.name}"),
                    allow_overlap=options.allow_overlap,
                )
        own = by_name.pop(active_memory(model))
        results.append(Result(text.name, text.kind, own, by_name))
    return results
