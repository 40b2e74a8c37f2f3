"""The trainer of a build that the options of a command ask for, and the data sets that it reads."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_utils import SaveStrategy

from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, KNNMoETrainingArguments
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.data import load_examples, public_name
from knnmoe_hf.cli.inherited import INHERITED
from knnmoe_hf.cli.messages import notice
from knnmoe_hf.memory.card_data import why_no_repository
from knnmoe_hf.memory.measurements import printable
from knnmoe_hf.memory.size import gates_of
from knnmoe_hf.models.gates import select_gates
from knnmoe_hf.training.checkpoints import checkpoints_of, clean, remove
from knnmoe_hf.training.checks import check_widths
from knnmoe_hf.training.finish import PrintVerdict

SECONDS_LOST = 120
"""Age of the last checkpoint at which another one is written."""
BACKGROUND_EXAMPLES = 1024
"""Examples that are read of each background text; a calibration uses 64 of them, evenly over the whole."""


def training_arguments(options: argparse.Namespace) -> KNNMoETrainingArguments:
    """
    The arguments of the build that the options ask for.

    Raises:
        ValueError: for a value that this machine does not allow, as bf16 on a GPU without it.
    """
    given = _named_data(options) | shared.build_options(options)
    for name, one in INHERITED.items():
        value = getattr(options, name, None)
        given[name] = one.default if value is None else value
    # without it, TrainingArguments knows of one process only where there is no accelerator, and each would save
    given["use_cpu"] |= not torch.accelerator.is_available()
    return KNNMoETrainingArguments(
        output_dir=options.output,
        disable_tqdm=options.quiet,
        save_total_limit=1,
        dataloader_pin_memory=torch.cuda.is_available() and not options.use_cpu,
        **given,
    )


def _named_data(options: argparse.Namespace) -> dict[str, Any]:
    """What the card calls the references if the user does not say it: never with the folders of a path."""
    if getattr(options, "task", None) is not None:
        return {"dataset_name": options.task}
    if options.dataset is None:
        return {}
    name, repository = public_name(options.dataset)
    on_hub = repository is not None and why_no_repository(repository) is None
    return {"dataset_name": name and printable(name), "dataset_tags": [repository] if on_hub else None}


def memory_config(options: argparse.Namespace) -> KNNMoEConfig:
    """The configuration that the options ask for."""
    revision = getattr(options, "base_model_revision", None)
    return KNNMoEConfig(**shared.memory_options(options), base_model_revision=revision)


def check_model(options: argparse.Namespace, args: KNNMoETrainingArguments) -> None:
    """
    Checks the options against what is installed and the model's sizes, before data is read and weights are loaded.

    Raises:
        ValueError, UnsupportedModelError: if the model is none for a memory, or an option does not fit it.
    """
    missing = set(options.report_to or ()) - {"none", "all", *get_available_reporting_integrations()}
    if missing:
        raise ValueError(f"--report-to {min(missing)} is not possible: its package is not installed; install it.")
    try:
        config = AutoConfig.from_pretrained(options.model, revision=options.base_model_revision)
    except (OSError, ValueError):  # an adapter, or what loading the model explains better
        return
    wanted = memory_config(options)
    check_widths(args, wanted, select_gates(gates_of(config, options.model), wanted.layers))


class _Bar(ProgressCallback):
    """A progress bar without the logged figures, as the commands print their own."""

    def on_log(self, *args, **kwargs):
        """Nothing."""


class _Clock(TrainerCallback):
    """Asks for a checkpoint when the last one is two minutes old; the first process has the clock."""

    def __init__(self, trainer: KNNMoETrainer):
        self._trainer, self._last = trainer, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        """Asks for it, in all processes."""
        if args.save_strategy == SaveStrategy.STEPS:
            late = time.monotonic() - self._last > SECONDS_LOST
            control.should_save |= self._trainer.processes.gather(late)[0]

    def on_save(self, *args, **kwargs):
        """Begins anew."""
        self._last = time.monotonic()

    on_train_begin = on_save


def make_trainer(
    options: argparse.Namespace, args: KNNMoETrainingArguments, model, tokenizer, rows, background=None
) -> KNNMoETrainer:
    """The trainer of the build that the options ask for."""
    trainer = KNNMoETrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        config=memory_config(options),
        ordinary_dataset=background,
    )
    trainer.add_callback(_Clock(trainer))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(PrintVerdict)  # the command prints it where it belongs
    if not options.quiet:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Bar)
    return trainer


def train(trainer: KNNMoETrainer, options: argparse.Namespace) -> None:
    """Builds; with `--resume` from the last checkpoint if there is one, and otherwise without those that are there."""
    resume, found = getattr(options, "resume", False), checkpoints_of(options.output)
    if not resume and trainer.args.should_save:
        remove_checkpoints(options.output)
    going_on = trainer.processes.gather(bool(resume and found))[0]
    if resume and not going_on:
        notice(options, f"there is no checkpoint in {options.output}: building from the beginning")
    trainer.train(resume_from_checkpoint=going_on)


def remove_checkpoints(folder: str) -> None:
    """Removes the checkpoints of a build, which hold the text of the references, and what a killed one left."""
    for path in checkpoints_of(folder):
        remove(path)
    clean(Path(folder))


def read_data(options: argparse.Namespace, name: str, tokenizer, vocab_size: int | None = None, **limits: Any):
    """
    The examples of a data set, with a notice of what was cut or left out.

    Args:
        options: with those of `add_data`.
        name: of the data set.
        tokenizer: of the base model.
        vocab_size: token ids must be smaller.
        limits: as `load_examples` takes them.
    """
    rows = load_examples(
        name,
        tokenizer,
        max_length=options.max_length,
        encoding=options.encoding,
        text_field=options.dataset_text_field,
        ignore_columns=options.ignore_columns or (),
        skip_bad_rows=options.skip_bad_rows,
        vocab_size=vocab_size,
        **limits,
    )
    for sentence in rows.report.sentences():
        notice(options, f"{name}: {sentence}")
    return rows


def read_background(options: argparse.Namespace, tokenizer, vocab_size: int | None = None) -> dict[str, Any] | None:
    """The examples of each `--ordinary-dataset`, None if there is none."""
    texts: dict[str, Any] = {}
    for name in options.ordinary_dataset or ():
        kind = known = public_name(name)[0] or "given"  # the memory keeps it, so it must not be a path
        while kind in texts:
            kind = f"{known} ({sum(other.startswith(known) for other in texts) + 1})"
        texts[kind] = read_data(options, name, tokenizer, vocab_size, max_examples=BACKGROUND_EXAMPLES)
    return texts or None
