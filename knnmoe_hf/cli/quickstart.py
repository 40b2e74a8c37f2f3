"""`knnmoe quickstart`: the main job on real input, from model to table."""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM

from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.data import default_test_split, load_examples, without
from knnmoe_hf.cli.loading import load_model
from knnmoe_hf.cli.report import table
from knnmoe_hf.evaluation import compare
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.models.attach import disable_memory, get_memory

EXAMPLE = (
    "knnmoe quickstart          or: knnmoe quickstart --model allenai/OLMoE-1B-7B-0924 --dataset medicine.jsonl "
    "--off-dataset wikipedia.jsonl"
)
_LAB = dict(model=str(LAB_MODELS["olmoe"]), dataset="lab:topics/reference")
_LAB_TESTS = {"test_dataset": "lab:topics/test", "off_dataset": "lab:python/test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; the defaults are the lab model and the documentation of Python's syntax."""
    shared.add_model(parser, default=_LAB["model"])
    shared.add_dataset(parser, default=_LAB["dataset"])
    parser.add_argument("--test-dataset", help="held-out text of the domain; default: every fifth row of --dataset")
    parser.add_argument("--test-split", help="split of --test-dataset; default: test, or all of a file")
    parser.add_argument("--off-dataset", help="text on which the memory should do nothing")
    parser.add_argument("--off-split", help="split of --off-dataset; default: train")
    parser.add_argument("--test-examples", type=shared.positive, default=64, help="examples of each test; default 64")
    parser.add_argument("--output", default="quickstart-out", help="folder of the memory; default quickstart-out")
    shared.add_build(parser, max_tokens=40000)
    shared.add_memory(parser)


def run(options: argparse.Namespace) -> None:
    """Loads, builds, saves, loads back, evaluates, generates, prints."""
    device = shared.check_build(options)
    model, tokenizer = load_model(options.model, options, device)
    references, tests = _texts(options, tokenizer)
    _say(f"building a memory of {sum(len(row['input_ids']) for row in references)} reference tokens")
    trainer = shared.make_trainer(options, model, tokenizer, references)
    trainer.train()
    trainer.save_model(options.output)
    _say(f"saved to {options.output}; loading it back")
    del model, trainer
    model, tokenizer = load_model(options.output, options, device)
    comparisons = {
        name: compare(model, rows, options.batch_size, progress=f"evaluating on {name}")
        for name, rows in tests.items()
    }
    _generate(model, tokenizer, next(iter(tests.values())))
    print(table(comparisons, get_memory(model).nbytes_per_layer))


def _texts(options: argparse.Namespace, tokenizer) -> tuple[list[dict], dict[str, list[dict]]]:
    """Reference examples, and test examples by name, none of which is a reference."""
    if options.dataset == _LAB["dataset"]:
        for name, text in _LAB_TESTS.items():
            setattr(options, name, getattr(options, name) or text)
    length, count = options.max_length, options.test_examples
    other = options.test_dataset or options.test_split
    own = dict(split=options.split, max_length=length)
    kept = load_examples(
        options.dataset, tokenizer, max_tokens=options.max_tokens, held_out=None if other else False, **own
    )
    if other:
        name = options.test_dataset or options.dataset
        split = options.test_split or default_test_split(name)
        test = load_examples(name, tokenizer, split=split, max_length=length, max_examples=count + len(kept))
    else:
        name = f"{options.dataset} (every fifth)"
        test = load_examples(options.dataset, tokenizer, max_examples=count, held_out=True, **own)
    tests = {name: without(test, kept)[:count]}
    if options.off_dataset:
        off = load_examples(
            options.off_dataset, tokenizer, split=options.off_split, max_length=length, max_examples=count
        )
        tests[options.off_dataset] = without(off, kept)
    if empty := [name for name, rows in tests.items() if not rows]:
        raise ValueError(f"no example of {empty[0]} is left that is not a reference: name other held-out text.")
    return kept, tests


@torch.no_grad()
def _generate(model: AutoModelForCausalLM, tokenizer, rows: list[dict], prompt: int = 32, new: int = 40) -> None:
    """Prints how the model goes on with a held-out text, without and with the memory."""
    ids = torch.tensor([rows[0]["input_ids"][:prompt]], device=model.get_input_embeddings().weight.device)
    call = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    with disable_memory(model):
        base = model.generate(ids, **call)
    memory = model.generate(ids, **call)
    for name, out in (("prompt", ids), ("base", base[:, prompt:]), ("memory", memory[:, prompt:])):
        print(f"[{name}] {' '.join(tokenizer.decode(out[0], skip_special_tokens=True).split())}")
    print()


def _say(text: str) -> None:
    print(text, file=sys.stderr)
