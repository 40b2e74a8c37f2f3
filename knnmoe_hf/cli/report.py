"""`knnmoe report`: a page on a memory itself, and its plots for papers."""

import argparse
from pathlib import Path

from knnmoe_hf.cli import hub, paths, values
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.fields import add
from knnmoe_hf.cli.parser import Parser

EXAMPLE = (
    "knnmoe report my-memory --dataset medicine-test.jsonl --ordinary-dataset wikipedia.jsonl --output report.html"
)
_MODEL = "The base model, if it is not where it was when the memory was built"
_OUTPUT, _FORMATS = "report.html", ("pdf", "png", "svg")


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    parser.add_argument("memory", type=paths.name, help="Folder or repository of a memory")
    hub.add_source(parser)
    help = f"Page to write; default {_OUTPUT}"
    parser.add_argument("--output", type=paths.name, default=_OUTPUT, metavar="FILE", help=help)
    add(parser, "overwrite", None, False, "Write over a file of --output that is not a page of this library.")
    add(parser, "map_layer", values.whole(0), None, "Layer whose keys are shown on a map; default: the last one.")
    parser.add_argument("--plots", type=paths.name, metavar="FOLDER", help="Draw the plots for papers too, here")
    help = "Of --plots; default pdf"
    parser.add_argument("--format", type=values.one_of(_FORMATS), metavar=f"{{{','.join(_FORMATS)}}}", help=help)
    shared.add_dataset(parser, "Held-out text of the domain, on which the model is run with the memory")
    help = "Other text, on which the memory should do nothing"
    add(parser, "ordinary_dataset", shared.dataset, None, help, many=True)
    add(parser, "max_examples", values.whole(1), 64, "Examples of each data set; default 64.")
    add(parser, "batch_size", values.whole(1), 8, "Examples per batch; default 8.")
    shared.add_model(parser, _MODEL)
    shared.add_data(parser)
    shared.add_overlap(parser)
    shared.add_query_options(parser)
    parser.checks.append(_check_usage)


def _check_usage(options: argparse.Namespace) -> None:
    if options.format is not None and options.plots is None:
        raise ValueError("--format is of --plots: leave it out, or name a folder with --plots")


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_there(options.memory, "one that a memory was saved to")
    if options.model is not None:
        paths.check_there(options.model, "a folder of the base model, or its repository on the Hub")
    paths.check_page(options.output, options.overwrite)
    paths.check_data(options)
    if options.plots is not None:
        from knnmoe_hf.explain.report.plots import need_matplotlib

        paths.check_folder(options.plots, "--plots ")
        need_matplotlib()


def run(options: argparse.Namespace) -> None:
    """Measures what there is text for, writes the page and the plots, and says where they are."""
    from knnmoe_hf.cli.reporting import write_page
    from knnmoe_hf.explain.report.page import Report
    from knnmoe_hf.explain.report.plots import write_plots
    from knnmoe_hf.memory import RoutingMemory

    memory = RoutingMemory.from_pretrained(options.memory, **hub.source_of(options), **shared.memory_options(options))
    name = Path(options.memory).name if Path(options.memory).is_dir() else options.memory
    texts = _measured(options, memory)
    report = Report(memory, name, texts, options.map_layer)
    print(write_page(report, options.output))
    if options.plots is not None:
        made = write_plots(report, Path(options.plots), options.format or _FORMATS[0])
        print(f"{len(made)} plots are in {options.plots}.")


def _measured(options: argparse.Namespace, memory) -> list:
    """What the memory does on the texts that are named; none without text, for which no model is loaded."""
    if not options.dataset and not options.ordinary_dataset:
        return []
    from knnmoe_hf.cli.building import read_data
    from knnmoe_hf.cli.data import public_name
    from knnmoe_hf.cli.loading import base_of, load_with_memory, tokenizer_of, vocabulary_of
    from knnmoe_hf.cli.messages import progress
    from knnmoe_hf.explain.report.use import measure_use

    tokenizer, vocabulary = tokenizer_of(memory, options), vocabulary_of(*base_of(memory, options))
    texts = []
    for name in [*([options.dataset] if options.dataset else []), *(options.ordinary_dataset or ())]:
        is_domain = name == options.dataset and not texts
        split = {"split": options.split} if is_domain else {}
        rows = read_data(options, name, tokenizer, vocabulary, max_examples=options.max_examples, **split)
        texts.append((public_name(name)[0] or "a text", is_domain, rows))
    model = load_with_memory(memory, options)
    bar = progress(options, "reading")
    return measure_use(model, texts, options.batch_size, bar, options.allow_overlap)
