"""`knnmoe build`: a memory from a model and reference text."""

import argparse

from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.data import load_examples
from knnmoe_hf.cli.loading import load_model

EXAMPLE = "knnmoe build --model allenai/OLMoE-1B-7B-0924 --dataset medicine.jsonl --output my-memory"

_BACKGROUND_EXAMPLES = 1024  # read of each data set; a calibration uses 64 of them, evenly over the whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    shared.add_model(parser, required=True)
    shared.add_dataset(parser, required=True)
    parser.add_argument("--output", required=True, help="folder to save the memory in")
    parser.add_argument(
        "--ordinary-dataset",
        nargs="+",
        metavar="DATASET",
        help="background text, on which the memory should do nothing: --confidence calibrated compares the references "
        "with it; default: files of this machine (Python sources, C++ headers, notices of packages)",
    )
    parser.add_argument("--no-provenance", action="store_true", help="do not save where rows came from, which is text")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the memory to this repository as well")
    shared.add_build(parser)
    shared.add_memory(parser)


def run(options: argparse.Namespace) -> None:
    """Builds, saves and reports."""
    device = shared.check_build(options)
    model, tokenizer = load_model(options.model, options, device)
    rows = load_examples(options.dataset, options.split, tokenizer, options.max_length, options.max_tokens)
    background = {
        name: load_examples(name, None, tokenizer, options.max_length, max_examples=_BACKGROUND_EXAMPLES)
        for name in options.ordinary_dataset or ()
    }
    trainer = shared.make_trainer(options, model, tokenizer, rows, background or None)
    metrics = trainer.train().metrics
    if not trainer.args.should_save:  # of several processes the first one saves
        return
    trainer.memory.save_pretrained(options.output, provenance="none" if options.no_provenance else None)
    print(f"{trainer.memory} saved to {options.output}")
    print(
        f"reference NLL {metrics['nll_before']:.3f} -> {metrics['nll_after']:.3f} nats per token, "
        f"{100 * metrics['experts_changed']:.1f} % of expert sets changed, "
        f"{metrics['rows'] / metrics['train_runtime']:.0f} rows per second"
    )
    if options.push_to_hub:
        print(trainer.memory.push_to_hub(options.push_to_hub, provenance="none" if options.no_provenance else "ids"))
