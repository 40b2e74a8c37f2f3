"""Arguments that several commands share, and the configuration and trainer that they ask for."""

import argparse
from pathlib import Path

import torch
from transformers import ProgressCallback

from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, KNNMoETrainingArguments
from knnmoe_hf.cli.data import HELP
from knnmoe_hf.cli.loading import add_loading
from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.options import CHOICES
from knnmoe_hf.memory.ownership import refuse_foreign_config
from knnmoe_hf.training.options import BUILDERS


def positive(text: str) -> int:
    """An argument that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed: use a positive integer")
    return number


_MEMORY_OPTIONS = {name: dict(choices=allowed) for name, allowed in CHOICES.items()} | {
    "num_neighbors": dict(type=positive),
    "temperature": dict(type=float),
    "gamma": dict(type=float),
    "half_life": dict(type=float, metavar="TOKENS"),
    "context_threshold": dict(type=float),
    "routing_width": dict(type=lambda text: text if text == "union" else positive(text), metavar="N or union"),
    "layers": dict(type=int, nargs="+"),
    "key_dim": dict(type=positive),
    "value_experts": dict(type=lambda text: text if text == "all" else positive(text), metavar="N or all"),
}


def add_model(parser: argparse.ArgumentParser, **default) -> None:
    """`--model`, `--dtype`, `--device-map`."""
    parser.add_argument("--model", help="a folder or a repository of the Hub", **default)
    add_loading(parser)


def add_memory(parser: argparse.ArgumentParser) -> None:
    """The options of `KNNMoEConfig` that a user may want to change."""
    group = parser.add_argument_group("memory (defaults: KNNMoEConfig)")
    for name, options in _MEMORY_OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", default=None, **options)


def add_build(parser: argparse.ArgumentParser, max_tokens: int | None = None) -> None:
    """What a build needs beside model and memory."""
    group = parser.add_argument_group("build")
    group.add_argument("--builder", choices=BUILDERS, default="candidates", help="default: candidates")
    group.add_argument(
        "--builder-steps",
        type=positive,
        help="steps on each batch; default 10; 20 with --builder search",
    )
    group.add_argument(
        "--max-tokens",
        type=positive,
        default=max_tokens,
        help=f"reference tokens at most; default {max_tokens or 'all'}",
    )
    group.add_argument("--max-length", type=positive, default=256, help="tokens per example; default 256")
    group.add_argument("--batch-size", type=positive, default=8, help="examples per batch; default 8")
    group.add_argument("--seed", type=int, default=42, help="default 42")


def add_dataset(parser: argparse.ArgumentParser, **default) -> None:
    """`--dataset` and `--split`."""
    parser.add_argument("--dataset", help=HELP, **default)
    parser.add_argument("--split", help="split of the data set; default train")


def memory_config(options: argparse.Namespace) -> KNNMoEConfig:
    """The configuration that the options ask for."""
    given = {name: getattr(options, name) for name in _MEMORY_OPTIONS}
    return KNNMoEConfig(
        **{name: None if value == "all" else value for name, value in given.items() if value is not None}
    )


def training_arguments(options: argparse.Namespace, output_dir: str) -> KNNMoETrainingArguments:
    """The arguments of the build that the options ask for."""
    return KNNMoETrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=options.batch_size,
        builder=options.builder,
        builder_steps=options.builder_steps,
        max_length=options.max_length,
        seed=options.seed,
        report_to="none",
        logging_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class _Bar(ProgressCallback):
    """A progress bar without the logged figures, as the commands print their own."""

    def on_log(self, *args, **kwargs):
        """Nothing."""


def make_trainer(options: argparse.Namespace, model, tokenizer, rows: list[dict], background=None) -> KNNMoETrainer:
    """The trainer of the build that the options ask for."""
    trainer = KNNMoETrainer(
        model=model,
        args=training_arguments(options, options.output),
        train_dataset=rows,
        processing_class=tokenizer,
        config=memory_config(options),
        ordinary_dataset=background,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar)
    return trainer


def check_build(options: argparse.Namespace) -> torch.device:
    """
    Checks the options of a build, as far as possible before a model is loaded.

    Returns:
        The device on which it will run.
    """
    if Path(options.output).is_file():
        raise ValueError(f"--output {shown(options.output)} is a file: name a folder.")
    refuse_foreign_config(Path(options.output))
    memory_config(options)
    return training_arguments(options, options.output).device
