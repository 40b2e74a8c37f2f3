"""`knnmoe quickstart`: the main job on real input, from model to table and page."""

import argparse
from pathlib import Path

from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli import paths, values
from knnmoe_hf.cli.fields import add
from knnmoe_hf.cli.parser import Parser
from knnmoe_hf.lab import LAB_MODELS

EXAMPLE = (
    "knnmoe quickstart          or: knnmoe quickstart --model allenai/OLMoE-1B-7B-0924 --dataset medicine.jsonl "
    "--off-dataset wikipedia.jsonl"
)
_LAB_DATASET = "lab:topics/reference"
_LOOKED_AT = 16  # examples of each test whose routing is on the page
_LAB_TESTS = {"test_dataset": "lab:topics/test", "off_dataset": "lab:python/test"}


def add_arguments(parser: Parser) -> None:
    """The command's arguments; the defaults are the lab model and the documentation of Python's syntax."""
    shared.add_model(parser, default=str(LAB_MODELS["olmoe"]))
    shared.add_dataset(parser, "Reference text", default=_LAB_DATASET)
    help = "Held-out text of the domain; default: every fifth row of --dataset"
    parser.add_argument("--test-dataset", type=shared.dataset, help=help)
    help = "Split of --test-dataset; default: test, or all of a file"
    parser.add_argument("--test-split", type=values.text, help=help)
    help = "Text on which the memory should do nothing"
    parser.add_argument("--off-dataset", type=shared.dataset, help=help)
    parser.add_argument("--off-split", type=values.text, help="Split of --off-dataset; default train")
    add(parser, "test_examples", values.whole(1), 64, "Examples of each test; default 64.")
    default = "quickstart-out"
    parser.add_argument("--output", type=paths.name, default=default, help=f"Folder of the memory; default {default}")
    shared.add_background(parser)
    shared.add_data(parser)
    shared.add_saving(parser)
    shared.add_overlap(parser)
    shared.add_build(parser, max_tokens=40000)
    parser.set_defaults(save_strategy="no")  # it is quicker begun anew
    shared.add_memory(parser)


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_there(options.model, "a folder of a model, or a repository of the Hub")
    paths.check_folder(options.output)
    paths.check_data(options)
    if (page := _page(options)).exists():
        paths.check_page(str(page), options.overwrite, "the page that this command ends with, ")
    if options.dataset == _LAB_DATASET:
        for name, text in _LAB_TESTS.items():
            setattr(options, name, getattr(options, name) or text)


def run(options: argparse.Namespace) -> None:
    """Loads, builds, saves, loads back, evaluates, generates, prints, and writes the page on the memory."""
    from knnmoe_hf.cli.building import check_model, make_trainer, read_background, training_arguments
    from knnmoe_hf.cli.comparing import attach_others, compare_all
    from knnmoe_hf.cli.inside import save
    from knnmoe_hf.cli.loading import load_base, load_tokenizer, load_with_memory, vocabulary_of
    from knnmoe_hf.cli.messages import notice
    from knnmoe_hf.cli.quickstart_texts import continuations, texts_of
    from knnmoe_hf.cli.reporting import uses_of, write_page
    from knnmoe_hf.cli.tables import table, width
    from knnmoe_hf.explain.report.page import Report
    from knnmoe_hf.memory import RoutingMemory

    args = training_arguments(options)
    check_model(options, args)
    tokenizer = load_tokenizer(options.model, options.base_model_revision)
    vocabulary = vocabulary_of(options.model, options.base_model_revision)
    references, texts = texts_of(options, tokenizer, vocabulary)
    background = read_background(options, tokenizer, vocabulary)
    model = load_base(options, args.device)
    count = sum(len(row["input_ids"]) for row in references)
    notice(options, f"building a memory of {count} reference tokens")
    trainer = make_trainer(options, args, model, tokenizer, references, background)
    trainer.train()
    if not args.should_save:  # of several processes the first one goes on
        return
    saved = save(trainer.memory, options)
    notice(options, f"saved to {options.output}; loading it back")
    del model, trainer
    memory = RoutingMemory.from_pretrained(options.output)
    model = load_with_memory(memory, options, args.device)
    options.batch_size = options.per_device_train_batch_size
    others = attach_others(model, memory)
    results = compare_all(options, model, texts, others)
    print(continuations(model, tokenizer, texts[0].rows, others))
    print(f"\n{table(results, memory, width())}\n")
    print(saved)
    uses = uses_of(model, texts, results, options.batch_size, _LOOKED_AT)
    print(write_page(Report(memory, Path(options.output).name, uses, tokenizer=tokenizer), str(_page(options))))


def _page(options: argparse.Namespace) -> Path:
    """The page on the memory, beside its folder, whose files are the memory's own."""
    folder = Path(options.output)
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    return folder.with_name(f"{folder.name}-report.html")
