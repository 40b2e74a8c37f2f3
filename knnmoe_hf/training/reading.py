"""What a build does about the rows that it reads: options, reports, and errors in the middle of the data."""

import logging
from functools import partial
from typing import Any

from datasets import DatasetDict, IterableDatasetDict
from torch import distributed as dist
from torch import nn

from knnmoe_hf.data.examples import ExampleStream, prepare_dataset
from knnmoe_hf.data.reading import ReadingReport
from knnmoe_hf.errors import BadRowError
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.dataloader import OnePassLoader

logger = logging.getLogger(__name__)
_SPLITS = (DatasetDict, IterableDatasetDict)


def reading_options(model: nn.Module, args: KNNMoETrainingArguments) -> dict[str, Any]:
    """How `prepare_dataset` reads rows for this model."""
    return {
        "text_field": args.dataset_text_field,
        "ignore_columns": args.ignore_columns,
        "skip_bad_rows": args.skip_bad_rows,
        "vocab_size": model.get_input_embeddings().weight.shape[0],  # may be more than the tokenizer's tokens
    }


def log_report(report: ReadingReport, name: str) -> None:
    """Logs what became of a data set's rows, as a warning if something was lost."""
    first = not dist.is_initialized() or dist.get_rank() == 0  # all processes read the same rows
    if first and report.rows:
        level = logging.WARNING if report.is_serious else logging.INFO
        logger.log(level, "%s: %s", name, " ".join(report.sentences()))


def prepare(dataset, name: str, tokenizer, max_length: int | None, **reading):
    """
    `prepare_dataset` of a data set, or of each in a dict of them to evaluate on; None for None.

    What became of the rows is logged, for a stream when it is read; `report_of` does that for a stream to train on.

    Args:
        dataset, tokenizer, max_length, reading: see `prepare_dataset`.
        name: of the data set, for errors and the log.
    """
    if name == "eval_dataset" and isinstance(dataset, dict) and not isinstance(dataset, _SPLITS):
        parts = {part: f"{name}[{part!r}]" for part in dataset}
        return {part: prepare(dataset[part], parts[part], tokenizer, max_length, **reading) for part in dataset}
    if dataset is None:
        return None
    prepared = prepare_dataset(dataset, tokenizer, max_length, name=name, **reading)
    log_report(prepared.report, name)
    if name != "train_dataset" and isinstance(prepared, ExampleStream):
        prepared.when_read = partial(log_report, name=name)
    return prepared


def check_targets(report: ReadingReport) -> None:
    """
    Checks that there is something to store.

    Raises:
        ValueError: if no example has a target.
    """
    if report.examples == report.without_target:
        raise ValueError(report.no_target())


def check_solved(loader: OnePassLoader, rows: int) -> None:
    """
    Checks that a pass gave targets.

    Args:
        loader: has ended.
        rows: targets that were optimised, in all processes.

    Raises:
        Exception: what ended the data, if nothing was optimised before it.
        ValueError: if no example of a stream has a target.
    """
    if loader.failure is not None and not rows:
        raise loader.failure
    if loader.report is not None and not rows:
        raise ValueError(loader.report.no_target())


def report_of(loader: OnePassLoader) -> ReadingReport:
    """
    What became of the rows of a pass, when its memory is made; that of a stream is logged.

    Raises:
        Exception: what ended the data too early.
    """
    if loader.report is not None:
        log_report(loader.report, "train_dataset")
    if loader.failure is not None:
        raise _interrupted(loader.failure)
    return loader.report if loader.report is not None else loader.dataset.report


def _interrupted(failure: Exception) -> Exception:
    """The error to raise after an error has ended the data, once the memory of what came before it is there."""
    told = (
        "the memory of the examples before it is in trainer.memory and attached to the model, so save it with "
        "trainer.save_model(), or correct the data and build anew"
    )
    if isinstance(failure, BadRowError):
        error = BadRowError(f"{str(failure).removesuffix('.')}; {told}.")
        error.__cause__ = failure
        return error
    failure.add_note(told)
    logger.error("reading train_dataset ended with an error (%s); %s.", failure, told)
    return failure
