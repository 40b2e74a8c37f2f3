"""`knnmoe build`: a memory from a model and reference text."""

import argparse
from dataclasses import replace

from knnmoe_hf.cli import hub, paths
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.parser import Parser
from knnmoe_hf.cli.tasks import add_task, read_task

EXAMPLE = "knnmoe build --model allenai/OLMoE-1B-7B-0924 --dataset medicine.jsonl --output my-memory"


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    shared.add_model(parser, required=True)
    shared.add_dataset(parser, "Reference text")
    add_task(parser)
    parser.add_argument("--output", type=paths.name, required=True, help="Folder to save the memory in")
    help = "Go on with the build that was interrupted in --output; give the same options and data"
    parser.add_argument("--resume", action="store_true", help=help)
    shared.add_background(parser)
    shared.add_data(parser)
    shared.add_saving(parser)
    hub.add_upload(parser)
    shared.add_build(parser)
    shared.add_memory(parser)
    parser.refused["--allow-overlap"] = "a build does not evaluate; knnmoe evaluate does"


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_there(options.model, "a folder of a model, or a repository of the Hub")
    paths.check_folder(options.output)
    if not (options.resume or options.overwrite):
        paths.check_unfinished(options.output)
    paths.check_data(options)
    if options.push_to_hub is not None:
        hub.check_upload(f"--push-to-hub {options.push_to_hub}")


def run(options: argparse.Namespace) -> None:
    """Builds, saves and reports."""
    from knnmoe_hf.cli.building import (
        check_model,
        make_trainer,
        read_background,
        remove_checkpoints,
        train,
        training_arguments,
    )
    from knnmoe_hf.cli.inside import save
    from knnmoe_hf.cli.loading import load_base, load_tokenizer, vocabulary_of
    from knnmoe_hf.memory.hub import check_push
    from knnmoe_hf.models.fingerprint import fingerprint
    from knnmoe_hf.models.gates import find_gates

    args = training_arguments(options)
    check_model(options, args)
    upload = options.push_to_hub is not None and args.should_save
    where = dict(revision=options.hub_revision, private=options.hub_private_repo)
    if upload:
        check_push(options.push_to_hub, **where)
    tokenizer = load_tokenizer(options.model, options.base_model_revision)
    vocabulary = vocabulary_of(options.model, options.base_model_revision)
    rows, record = _references(options, args, tokenizer, vocabulary)
    background = read_background(options, tokenizer, vocabulary)
    model = load_base(options, args.device)
    if upload:  # what is there is the user's, or a memory of this model that may be replaced
        gates = find_gates(model)
        check_push(options.push_to_hub, fingerprint=lambda: fingerprint(gates), overwrite=options.overwrite, **where)
    trainer = make_trainer(options, args, model, tokenizer, rows, background)
    train(trainer, options)
    if not args.should_save:  # of several processes the first one saves and speaks
        return
    memory = replace(trainer.memory, task_record=record)
    print(save(memory, options))
    remove_checkpoints(options.output)
    if upload:
        level = options.push_provenance or ("none" if options.save_provenance == "none" else "ids")
        where |= dict(provenance=level, next_tokens=options.push_next_tokens, overwrite=options.overwrite)
        place = memory.push_to_hub(options.push_to_hub, **where)
        print(f"uploaded with provenance {level}: {place}")


def _references(options: argparse.Namespace, args, tokenizer, vocabulary: int | None):
    """The rows to build from, and the record of the benchmark that they are of."""
    from knnmoe_hf.cli.building import read_data
    from knnmoe_hf.tasks.items import rows_of

    if options.task is None:
        limits = dict(split=options.split, max_tokens=options.max_tokens)
        return read_data(options, options.dataset, tokenizer, vocabulary, **limits), None
    found = read_task(options, tokenizer)
    args.max_length = max(len(item.tokens) for item in found.items)  # no prompt is cut
    if args.should_save:
        print(f"{options.task}: {found.report.sentence()}")
    return rows_of(found.items), found.record
