"""`knnmoe calibrate`: how far a memory is trusted, fitted anew."""

import argparse

from knnmoe_hf.cli import hub, paths, values
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.fields import add
from knnmoe_hf.cli.parser import Parser

EXAMPLE = "knnmoe calibrate my-memory --ordinary-dataset other.jsonl --output calibrated-memory"
_MODEL = "The base model, if it is not where it was when the memory was built"


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    help = "Folder or repository of a memory, with the text of its references"
    parser.add_argument("memory", type=paths.name, help=help)
    hub.add_source(parser)
    shared.add_background(parser)
    add(parser, "batch_size", values.whole(1), 8, "Examples per batch; default 8.")
    shared.add_output(parser)
    shared.add_model(parser, _MODEL)
    shared.add_data(parser)
    shared.add_query_options(parser)


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_edit(options, "memory")
    paths.check_data(options)
    if options.model is not None:
        paths.check_there(options.model, "a folder of the base model, or its repository on the Hub")


def run(options: argparse.Namespace) -> None:
    """Calibrates, saves and reports."""
    from knnmoe_hf.calibration.background import machine_background
    from knnmoe_hf.calibration.calibrate import calibrate
    from knnmoe_hf.cli.building import read_background
    from knnmoe_hf.cli.inside import level_of, save
    from knnmoe_hf.cli.loading import base_of, load_base_of, tokenizer_of, vocabulary_of
    from knnmoe_hf.memory import RoutingMemory

    given = {"confidence": "calibrated"} | shared.memory_options(options)
    memory = RoutingMemory.from_pretrained(options.memory, **hub.source_of(options), **given)
    if level_of(memory) != "text":
        raise ValueError(f"{options.memory} has no text of its references to calibrate by: build it anew.")
    tokenizer = tokenizer_of(memory, options)
    vocabulary = vocabulary_of(*base_of(memory, options))
    background = read_background(options, tokenizer, vocabulary) or machine_background(tokenizer)
    model = load_base_of(memory, options)
    fitted, record = calibrate(model, memory, background, options.batch_size)
    if record is None:
        raise ValueError(f"{options.memory} could not be calibrated, and nothing was saved: the reason is said above.")
    print(save(fitted, options))
