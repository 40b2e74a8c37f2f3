"""`EvaluatesMemory`: the trainer's evaluation, with and without the memory, on text that the memory does not hold."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.trainer_utils import has_length

from knnmoe_hf.data.batches import IGNORED
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.evaluation.overlap import Overlap, counts, without_overlap
from knnmoe_hf.evaluation.references import References
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.attach import active_memory, disable_memory, get_memory
from knnmoe_hf.models.hooks import fixed
from knnmoe_hf.training.describing import evaluate_for_card
from knnmoe_hf.training.streamed import StreamedBatches

logger = logging.getLogger(__name__)


class EvaluatesMemory:
    """
    Evaluation for a `Trainer` whose model has a memory.

    Examples of `evaluate` that overlap the references of the memory in force are left out, unless
    `args.allow_overlap`; those of `predict` stay, as its predictions are by row, and a warning says how many they are.
    Both add the metrics `{prefix}_base_loss` (without the memory), `{prefix}_windows` (examples that were scored),
    `{prefix}_windows_left_out`, and `{prefix}_overlap_share` (of the runs of 8 tokens, how many the references have)
    if the memory keeps what it takes to say that.
    """

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """
        As in `Trainer`; the rows of a dataset passed to `evaluate` may have any of the forms that `train` takes.

        Raises:
            ValueError: if the memory holds every example, as after a build with the same text, and
                `args.allow_overlap` is not set. For a stream, `evaluate` raises it at the end.
        """
        what = "eval_dataset"
        if isinstance(eval_dataset, str):
            what, eval_dataset = f"eval_dataset[{eval_dataset!r}]", self.eval_dataset[eval_dataset]
        elif eval_dataset is None:
            eval_dataset = self.eval_dataset
        else:
            eval_dataset = self._prepare(eval_dataset, what)
        getattr(self, "_eval_dataloaders", {}).clear()  # kept for persistent workers, maybe of another memory
        return self._checked(super().get_eval_dataloader, eval_dataset, what, self.args.allow_overlap)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        """As in `Trainer`; the rows of a dataset passed to `predict` may have any of the forms that `train` takes."""
        return self._checked(
            super().get_test_dataloader, self._prepare(test_dataset, "test_dataset"), "test_dataset", True
        )

    def _checked(self, make, dataset, what: str, allowed: bool) -> DataLoader:
        """The loader that `make` makes of a dataset without overlap; `evaluation_loop` finds there what was found."""
        memory = memory_in_force(self.model)
        if memory is None or dataset is None or isinstance(dataset, dict):
            return make(dataset)
        if has_length(dataset):
            dataset, overlap = without_overlap(memory, dataset, allowed)
            overlap.check_any_left(what)
            found = KnownOverlap(overlap)
        else:
            dataset = found = NewText(dataset, memory, allowed, self.args.dataloader_num_workers)
        loader = make(dataset)
        loader.overlap = (found, what)
        return loader

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluates with and without the memory; metrics are with it, but for `{prefix}_base_loss`."""
        with fixed(self.model):
            return self._evaluate(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    def _evaluate(self, dataloader, description, *args, metric_key_prefix: str, **kwargs):
        def run(description: str):
            self._evaluated_batches = itertools.count()
            self._eval_examples = len(dataloader.dataset) if has_length(dataloader.dataset) else None
            if isinstance(dataloader, StreamedBatches):  # `Trainer` puts its own back afterwards
                self.gather_function = partial(dataloader.gather, accelerator=self.accelerator)
            return super(EvaluatesMemory, self).evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )

        found, what = getattr(dataloader, "overlap", (None, ""))
        if self.processes.count > 1 and isinstance(dataloader, DataLoaderDispatcher):
            dataloader = StreamedBatches(dataloader, self.processes)
        try:
            output = run(description)
        except (TypeError, ValueError):  # of accelerate, for a stream of which nothing is left
            if isinstance(found, NewText) and found.has_ended:
                found.overlap(ALONE).check_any_left(what)
            raise
        extra = {} if found is None else self._overlap_metrics(found.overlap(self.processes), what, metric_key_prefix)
        with disable_memory(self.model):
            base = run(f"{description} (base)")
        loss = f"{metric_key_prefix}_loss"
        extra |= {f"{metric_key_prefix}_base_loss": base.metrics[loss]} if loss in base.metrics else {}
        return output._replace(metrics=output.metrics | extra)

    def _overlap_metrics(self, overlap: Overlap, what: str, prefix: str) -> dict[str, float]:
        overlap.check_any_left(what)
        if self.is_world_process_zero():
            level = logging.INFO if overlap.checked and not overlap.overlapping else logging.WARNING
            logger.log(level, "%s: %s", what, overlap.sentence())
        found = {"windows": overlap.scored, "windows_left_out": overlap.left_out}
        if overlap.checked:
            found["overlap_share"] = overlap.share
        return {f"{prefix}_{name}": value for name, value in found.items()}

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As in `Trainer`; examples repeated to give all processes equal batches get labels of -100."""
        number = next(self._evaluated_batches) * self.processes.count + self.processes.index
        if self._eval_examples is not None and inputs.get("labels") is not None:
            first_copy = max(self._eval_examples - number * self.args.eval_batch_size, 0)
            inputs["labels"] = inputs["labels"].clone()
            inputs["labels"][first_copy:] = IGNORED
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _evaluate_for_card(self) -> None:
        """How the memory does on `eval_dataset`, which its card tells beside its verdict."""
        if self.eval_dataset is None:
            return
        how = (self.args.eval_batch_size, self.args.allow_overlap, self.processes)
        found = evaluate_for_card(self.model, self.memory, self.eval_dataset, *how)
        measured = replace(self.memory.card_data.measured, evaluations=found)
        self.memory = replace(self.memory, card_data=replace(self.memory.card_data, measured=measured))
        self._prepared.memory = self.memory


def memory_in_force(model) -> RoutingMemory | None:
    """The memory that the model uses now; None if there is none."""
    if active_memory(model) is None:
        return None
    try:
        return get_memory(model)
    except ValueError:  # another routing override
        return None


class KnownOverlap:
    """Of a dataset that was looked through before."""

    def __init__(self, overlap: Overlap):
        self._overlap = overlap

    def overlap(self, processes: Processes) -> Overlap:
        """What was found, in every process."""
        return self._overlap


class NewText(IterableDataset):
    """
    The rows of a stream that do not overlap the references of a memory.

    Args:
        rows: a stream of rows as `prepare_dataset` gives them.
        memory: whose references are looked up.
        allowed: give all rows, and only count.
        workers: of the data loader, each of which counts for itself.
    """

    def __init__(self, rows, memory: RoutingMemory, allowed: bool, workers: int):
        self.rows, self.allowed = rows, allowed
        self.references = References.of(memory.provenance)
        self._counts: Tensor = torch.zeros(workers + 1, 5, dtype=torch.int64).share_memory_()
        self._ended = torch.zeros(workers + 1, dtype=torch.bool).share_memory_()

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        worker = get_worker_info()
        slot = 0 if worker is None else worker.id + 1
        self._counts[slot], self._ended[slot] = 0, False
        for row in self.rows:
            looked_up = self.references.look_up([row])
            self._counts[slot] += counts(looked_up)
            if self.allowed or not looked_up.overlaps:
                yield row
        self._ended[slot] = True

    @property
    def has_ended(self) -> bool:
        """Whether this process has read the stream to its end."""
        return bool(self._ended.any())

    def set_epoch(self, epoch: int) -> None:
        """As of the stream."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def overlap(self, processes: Processes) -> Overlap:
        """What was found in the last pass; a process that got its rows from another one asks that."""
        found: Sequence[Tensor] = processes.gather(self._counts.sum(0))
        return Overlap.of_counts(max(found, key=lambda of_process: int(of_process[0])), self.references, self.allowed)
