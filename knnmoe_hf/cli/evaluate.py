"""`knnmoe evaluate`: base against memory on text that the memory has not stored."""

import argparse
import sys

from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.data import load_examples, without
from knnmoe_hf.cli.loading import add_loading, load_model
from knnmoe_hf.cli.report import table
from knnmoe_hf.evaluation import compare
from knnmoe_hf.models.attach import get_memory

EXAMPLE = "knnmoe evaluate my-memory --dataset medicine-test.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("memory", help="folder or repository of a memory")
    shared.add_dataset(parser, required=True)
    add_loading(parser)
    parser.add_argument("--max-examples", type=shared.positive, default=64, help="default 64")
    parser.add_argument("--max-length", type=shared.positive, default=256, help="tokens per example; default 256")
    parser.add_argument("--batch-size", type=shared.positive, default=8, help="default 8")


def run(options: argparse.Namespace) -> None:
    """Evaluates and prints the table."""
    model, tokenizer = load_model(options.memory, options)
    limits = dict(max_length=options.max_length, max_examples=options.max_examples)
    rows = load_examples(options.dataset, tokenizer, split=options.split, **limits)
    memory = get_memory(model)
    if memory.provenance is not None:
        kept = without(rows, [{"input_ids": ids.tolist()} for ids in memory.provenance.tokens().values()])
        if not kept:
            raise ValueError(f"the memory holds every example of {options.dataset}: name held-out text.")
        if len(kept) < len(rows):
            print(f"{len(rows) - len(kept)} examples are left out, as the memory holds them", file=sys.stderr)
        rows = kept
    comparison = compare(model, rows, options.batch_size, progress=options.dataset)
    print(table({options.dataset: comparison}, memory.nbytes_per_layer))
