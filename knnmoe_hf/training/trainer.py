"""`KNNMoETrainer`: a `Trainer` that optimises routing logits of reference tokens and stores them as a memory."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from knnmoe_hf.calibration.background import BackgroundText, prepare_background
from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.data.batches import target_mask
from knnmoe_hf.distributed import Processes
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.manifest import CalibrationRecord
from knnmoe_hf.models.attach import attach_prepared, detach_memory, disable_memory
from knnmoe_hf.models.gates import Gate, find_gates, select_gates
from knnmoe_hf.models.hooks import RoutingHooks, hooked
from knnmoe_hf.models.logits_probe import probe_logits
from knnmoe_hf.models.modes import called_unquantised, frozen
from knnmoe_hf.models.offload import is_offloaded
from knnmoe_hf.models.precision import warn_if_slow
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.builders.base import Builder
from knnmoe_hf.training.builders.make import make_builder
from knnmoe_hf.training.checks import (
    check_background,
    check_disk,
    check_inputs,
    check_launch,
    check_one_pass,
    check_output,
    check_same_model,
    check_widths,
)
from knnmoe_hf.training.collators import checked_collator
from knnmoe_hf.training.dataloader import batch_loader
from knnmoe_hf.training.describing import card_data_of, repositories_of
from knnmoe_hf.training.evaluating import EvaluatesMemory
from knnmoe_hf.training.finish import FinishBuild, PrintVerdict, comes_last
from knnmoe_hf.training.progress import BatchMetrics
from knnmoe_hf.training.reading import check_solved, check_targets, prepare, reading_options, report_of
from knnmoe_hf.training.refine import refine
from knnmoe_hf.training.resuming import KeepsCheckpoints
from knnmoe_hf.training.saving import SavesMemory
from knnmoe_hf.training.starting import Start

logger = logging.getLogger(__name__)


class KNNMoETrainer(SavesMemory, KeepsCheckpoints, EvaluatesMemory, Trainer):
    """
    Builds a routing memory for a frozen MoE model.

    `train` makes one pass over `train_dataset`. For each batch it optimises the routing logits of all layers so that
    the true next tokens become likely, and stores them; at the end it attaches the memory to the model, and
    scores it on `eval_dataset`, if there is one, for the memory's card. `evaluate` reports `eval_loss` with the memory
    and `eval_base_loss` without, on the examples that do not overlap the references (see
    `knnmoe_hf.training.evaluating`). `save_model` and `push_to_hub` write the memory.
    The base model's weights are neither changed nor written.

    Rows are kept in unnamed temporary files in `args.output_dir`, so RAM does not limit their number. With n processes
    (`accelerate launch`, `torchrun`) each optimises every n-th batch, and `args.max_steps` counts the batches of one
    process. At the end all have the same memory, with the same bytes as from one process of as many threads; the first
    process saves it.

    Args:
        model: of a supported MoE family of transformers (docs/support.md), plain or PEFT-wrapped.
        args (`KNNMoETrainingArguments`): how to build.
        data_collator: `knnmoe_hf.data.batches.collate` by default, which pads on the right; any other is tried here
            and must give the same `input_ids`, `labels` and `attention_mask` as its rows, padded on either side.
        train_dataset, eval_dataset: rows in any of the forms of `knnmoe_hf.data.forms`, of which every column is used,
            is in `args.ignore_columns`, or is an error; labels of -100 are neither optimised nor stored. The id of an
            example is its integer `example_id` if there is such a column, otherwise its index.
        processing_class: the tokenizer, which is saved with the memory; not needed for rows with `input_ids`.
        callbacks, compute_metrics, ...: as in `Trainer`.
        config (`KNNMoEConfig`): options of the memory; the defaults if None.
        memory_name: the name to attach the memory under; a memory that has this name already is replaced.
        ordinary_dataset: background text, on which the memory should change nothing, for `confidence="calibrated"`: a
            dataset with rows in any of the forms, or a dict of such datasets by kind of text; 64 rows of each are
            used, evenly spaced. If None, text files on this machine (see `knnmoe_hf.calibration.background`).

    Attributes:
        memory (`RoutingMemory` or None): the memory after `train`; its `verdict` says whether it helps.
        calibration (`CalibrationRecord` or None): texts and results of the calibration with `confidence="calibrated"`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: KNNMoETrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *trainer_args,
        config: KNNMoEConfig | None = None,
        memory_name: str = "default",
        ordinary_dataset=None,
        **trainer_kwargs,
    ):
        args = args if args is not None else KNNMoETrainingArguments(output_dir="trainer_output")
        config = config if config is not None else KNNMoEConfig()
        check_inputs(model, args, config, trainer_kwargs.get("model_init"))
        gates = find_gates(model)
        self.gates: list[Gate] = select_gates(gates, config.layers)
        check_widths(args, config, self.gates)
        if train_dataset is not None and args.should_save:
            check_output(model, args, gates, processing_class, memory_name)
        self.memory_config = config
        self.memory_name = memory_name
        self.memory: RoutingMemory | None = None
        self.calibration: CalibrationRecord | None = None
        reading = reading_options(model, args)
        self._repositories = repositories_of(train_dataset)
        self._prepare = partial(prepare, tokenizer=processing_class, max_length=args.max_length, **reading)
        train_dataset = self._prepare(train_dataset, "train_dataset")
        self.ordinary_dataset = prepare_background(ordinary_dataset, processing_class, args.max_length, **reading)
        check_background(self.ordinary_dataset)
        self.background: dict[str, BackgroundText] = {}  # read at the beginning of `train`
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        with called_unquantised(model):
            super().__init__(
                model,
                args,
                checked_collator(data_collator, train_dataset, reading["vocab_size"]),
                train_dataset,
                self._prepare(eval_dataset, "eval_dataset"),
                processing_class,
                *trainer_args,
                **trainer_kwargs,
            )
        if is_offloaded(self.model):
            self.accelerator.device_placement = False  # else `prepare` moves the model
        check_launch(self)
        check_disk(self.train_dataset, self.args, config, self.gates)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch's own tokens, in every process
        self.add_callback(FinishBuild(self))
        self.add_callback(PrintVerdict(self))
        self.processes = Processes(self.args.process_index, self.args.world_size, self.args.ddp_timeout)
        if use_cache is not None:
            self.model.config.use_cache = use_cache  # Trainer turned it off, which would make generation slow
        self.args._n_gpu = min(self.args.n_gpu, 1)  # copies of the model by DataParallel would not share the hooks

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_offloaded(model):  # accelerate's hooks bring offloaded weights to where they run
            super()._move_model_to_device(model, device)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Builds the memory and attaches it to the model, in every process.

        Args:
            resume_from_checkpoint: a folder `checkpoint-N` of an interrupted build with the same data, model and
                options, or True for the last one in `args.output_dir`. The memory has the same bytes as one that was
                built without an interruption, also if the number of processes is another.

        Returns:
            `TrainOutput`, whose metrics include, over all processes: `nll_before` and `nll_after` (nats per reference
            token, with the gate's own and with the optimised routing), `experts_changed` (share of (token, layer)
            whose set of experts changed), `tokens_worse` (share of reference tokens whose NLL rose) and `rows`; and
            those of the memory's verdict (`knnmoe_hf.memory.verdict.Verdict.metrics`), which are about new text.

        Raises:
            ValueError: for a checkpoint that is not there, cannot be read or is of another build, more `max_steps`
                than batches, a dataset without targets, or processes with different models.
            OSError: if the disk is full; the last checkpoint stays as it is.
            UnsupportedModelError: if `recall` needs the model's logits, and they cannot be mixed.
            Exception: as a stream raises it, or a `BadRowError` for a row of it; the memory of what came before it is
                in `memory` then, and attached.
        """
        warn_if_slow(self.model)
        if hasattr(self.train_dataset, "__len__"):
            check_targets(self.train_dataset.report)
            self._start = Start()
            check_one_pass(self.args.max_steps, len(self.get_train_dataloader()), self.processes)
        try:
            with hooked(self.model):  # hooks are put on the model once for all that follows
                if self.memory_config.recall != "routing":
                    probe_logits(self.model)  # a model whose logits cannot be mixed is refused before the build
                output = self._optimize(resume_from_checkpoint, *args, **kwargs)
                self._attach()
                self._evaluate_for_card()
        finally:
            self._rows = self._prepared = None  # deletes the files of the rows, also after an error
        self.push_when_built()
        report = report_of(self._loader)
        summary = self._progress.summary(self.processes)
        loss = summary.pop("loss")
        metrics = output.metrics | {"train_loss": loss} | summary | report.metrics() | self.memory.verdict.metrics()
        return output._replace(training_loss=loss, metrics=metrics)

    def _optimize(self, resume_from_checkpoint: str | bool | None, *args, **kwargs):
        """Trainer's loop over the batches, on the frozen base model; leaves the rows in `self._rows`."""
        with disable_memory(self.model), frozen(self.model, self.args.gradient_checkpointing):
            check_same_model(self.processes, find_gates(self.model))
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self._begin(resume_from_checkpoint)
            self._builder = self.make_builder()
            self.callback_handler.callbacks.sort(key=comes_last)
            try:
                with self._kept_whatever_happens():
                    # Trainer is not told of the checkpoint, from which it would load weights
                    return super().train(None, *args, **kwargs)
            finally:
                self._builder.close()

    def get_train_dataloader(self) -> DataLoader:
        """A loader of this process's batches (see `knnmoe_hf.training.dataloader`)."""
        if self.train_dataset is None:
            raise ValueError("train_dataset=None is not allowed: pass the reference examples to KNNMoETrainer.")
        stop = partial(setattr, self.control, "should_training_stop", True)
        limit = self.args.max_steps * self.processes.count if self.args.max_steps > 0 and self._start.batches else None
        where = dict(first=self._start.batches, limit=limit)
        self._loader = batch_loader(self.train_dataset, self.data_collator, self.args, self.processes, stop, **where)
        return self._loader

    def make_builder(self) -> Builder:
        """The builder that `args` name; subclasses may return another one."""
        return make_builder(self.model, self.gates, self.args)

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, but the model is prepared for evaluation only."""
        super().create_accelerator_and_postprocess()
        # otherwise accelerate wraps it in DistributedDataParallel on CPUs, which refuses a model without gradients
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """A dummy optimizer, because Trainer's loop requires one; the builder has its own for each batch."""
        self.restore_state()  # Trainer has made a new state, and reads it next
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.args.learning_rate)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Optimises one batch and stores its rows; returns the targets' mean NLL with the optimised routing."""
        started, no_loss = time.perf_counter(), torch.zeros((), device=self.args.device)
        inputs = self._prepare_inputs(inputs)
        labels, example_ids = inputs.pop("labels"), inputs.pop("example_id")
        number = self.batch_number()
        if not len(labels):  # there are fewer batches than processes in the last step
            return no_loss
        if not bool(target_mask(labels, inputs.get("attention_mask")).any()):
            self._progress.batches.append(BatchMetrics(number, 0, time.perf_counter() - started, {}))
            return no_loss
        with self.compute_loss_context_manager():
            optimized = self._builder.optimize(inputs, labels, example_ids)
        self._rows.add(number, optimized, example_ids, inputs["input_ids"], labels, inputs.get("attention_mask"))
        self._progress.batches.append(BatchMetrics.of(number, optimized, time.perf_counter() - started))
        return optimized.nll_after.mean().to(self.args.device)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the metrics of the build since the last log, over all processes."""
        if "loss" in logs or "train_loss" in logs:  # these come from Trainer's loop, in every process
            metrics = self._progress.logs(self.processes)
            if "loss" in logs:
                logs["loss"] = metrics["loss"]
            else:
                logs["train_loss"] = self._progress.summary(self.processes).get("loss", 0.0)
            logs = logs | {name: round(value, 4) for name, value in metrics.items() if name != "loss"}
        super().log(logs, *args, **kwargs)

    def batch_metrics(self) -> list[BatchMetrics]:
        """Of the batches that this process has optimised so far."""
        return self._progress.batches

    def make_memory(self, when_encoded: Callable[[], None]) -> None:
        """Encodes the rows as a memory, refines and judges it; `FinishBuild` calls it after the last batch."""
        check_solved(self._loader, self._progress.summary(self.processes)["rows"])
        # set here already, so that the rows are not lost if refining fails
        self.memory = self._rows.build_memory(self.memory_config, self.model, self.processing_class, self.processes)
        card_data = card_data_of(self.args, self._repositories, self.memory.card_data)
        self.memory = replace(self.memory, card_data=card_data)
        when_encoded()
        prepared, self.calibration = refine(self.model, self.memory, self.args, self.background, self.processes)
        self.memory, self._prepared = prepared.memory, prepared

    def _attach(self) -> None:
        hooks = RoutingHooks.of(self.model)
        if hooks is not None and self.memory_name in hooks.named:
            detach_memory(self.model, self.memory_name)
        attach_prepared(self.model, self._prepared, self.memory_name)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As in `Trainer`; the examples' ids are not passed to the model."""
        inputs.pop("example_id", None)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "example_id" not in self._signature_columns:
            self._signature_columns.append("example_id")
