"""`knnmoe evaluate`: base against memory on text that the memory has not stored."""

import argparse
import json
from pathlib import Path
from typing import Any

from knnmoe_hf.cli import hub, paths, values
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.fields import add
from knnmoe_hf.cli.parser import Parser
from knnmoe_hf.version import __version__

EXAMPLE = "knnmoe evaluate my-memory --dataset medicine-test.jsonl --off-dataset other.jsonl --gamma 0.5"
_MODEL = "The base model, if it is not where it was when the memory was built"


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    parser.add_argument("memory", type=paths.name, help="Folder or repository of a memory")
    hub.add_source(parser)
    shared.add_dataset(parser, "Held-out text of the domain, may be repeated", action="append", default=[])
    help = "Other text, on which the memory should do nothing; may be repeated"
    parser.add_argument("--off-dataset", type=shared.dataset, action="append", default=[], help=help)
    parser.add_argument("--off-split", type=values.text, help="Split of each --off-dataset; default train")
    add(parser, "max_examples", values.whole(1), 64, "Examples of each data set; default 64.")
    add(parser, "batch_size", values.whole(1), 8, "Examples per batch; default 8.")
    parser.add_argument("--json", action="store_true", help="Print JSON and nothing else on stdout")
    parser.add_argument("--output", type=paths.name, metavar="FILE", help="Write the results to this file, as JSON")
    help = "Write over a file of --output that holds something else."
    add(parser, "overwrite", None, False, help)
    shared.add_model(parser, _MODEL)
    shared.add_data(parser)
    shared.add_overlap(parser)
    shared.add_query_options(parser)
    parser.checks.append(_check_usage)


def _check_usage(options: argparse.Namespace) -> None:
    texts = options.dataset + options.off_dataset
    if not texts:
        raise ValueError("there is nothing to evaluate on: name text with --dataset or --off-dataset")
    if twice := [name for name in texts if texts.count(name) > 1]:
        raise ValueError(f"{twice[0]} is named twice: name each data set once")
    if options.overwrite and options.output is None:
        raise ValueError("--overwrite is not allowed without --output: leave it out")


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_there(options.memory, "one that a memory was saved to")
    if options.model is not None:
        paths.check_there(options.model, "a folder of the base model, or its repository on the Hub")
    paths.check_results(options.output, options.overwrite)
    paths.check_data(options)


def run(options: argparse.Namespace) -> None:
    """Evaluates, prints and writes."""
    from knnmoe_hf.cli.comparing import compare_all, read_texts
    from knnmoe_hf.cli.loading import base_of, load_with_memory, tokenizer_of, vocabulary_of
    from knnmoe_hf.cli.tables import as_json, table, width
    from knnmoe_hf.memory import RoutingMemory

    given = shared.memory_options(options)
    memory = RoutingMemory.from_pretrained(options.memory, **hub.source_of(options), **given)
    texts = read_texts(options, memory, tokenizer_of(memory, options), vocabulary_of(*base_of(memory, options)))
    model = load_with_memory(memory, options)
    results = compare_all(options, model, texts)
    found = _as_json(options, memory, given, [as_json(result) for result in results])
    if options.output is not None:
        Path(options.output).write_text(found + "\n", encoding="utf-8")
    print(found if options.json else table(results, memory, width()))


def _as_json(options: argparse.Namespace, memory, given: dict[str, Any], results: list[dict[str, Any]]) -> str:
    content = {
        "written_by": f"knnmoe evaluate {__version__}",
        "memory": options.memory,
        "base_model": options.model or memory.config.base_model_name_or_path,
        "dtype": options.dtype,
        "max_length": options.max_length,
        "options_given": given,
        "options": memory.config.options(),
        "bytes": memory.nbytes,
        "results": results,
    }
    return json.dumps(content, indent=1, allow_nan=False)
