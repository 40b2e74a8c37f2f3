"""`KNNMoETrainer`: a Trainer whose only trainable tensors are token logits, and whose product is a memory."""

import itertools
import logging
import time
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from datasets import DatasetDict
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import has_length

from knnmoe_hf.calibration.background import BackgroundText, machine_background, prepare_background
from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.distributed import Processes
from knnmoe_hf.errors import shown
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.manifest import CalibrationRecord
from knnmoe_hf.models.attach import attach_prepared, detach_memory, disable_memory
from knnmoe_hf.models.gates import Gate, find_gates, select_gates
from knnmoe_hf.models.hooks import RoutingHooks
from knnmoe_hf.models.modes import frozen
from knnmoe_hf.models.precision import warn_if_slow
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.builders.base import Builder
from knnmoe_hf.training.builders.make import make_builder
from knnmoe_hf.training.checks import check_inputs, check_one_pass, check_same_model, check_whole
from knnmoe_hf.training.data import IGNORED, collate, prepare_dataset, target_mask
from knnmoe_hf.training.dataloader import batch_loader
from knnmoe_hf.training.progress import BatchNote, Progress
from knnmoe_hf.training.refine import refine
from knnmoe_hf.training.row_files import on_disk
from knnmoe_hf.training.rows import ReferenceRows

logger = logging.getLogger(__name__)


class KNNMoETrainer(Trainer):
    """
    Builds a routing memory for a frozen MoE model.

    `train` goes over `train_dataset` once, solves each batch for the routing that makes its true next tokens likely,
    and attaches the finished memory to the model. `evaluate` reports `eval_loss` with the memory and `eval_base_loss`
    without. `save_model` and `push_to_hub` write the memory, never the base model's weights, which are not changed.

    Rows go to disk as they come in, to files without a name under `args.output_dir`, as does what they are stored as:
    more references take no more memory. Several processes, of `accelerate launch` or `torchrun`, take turns at whole
    batches; each has the same memory in the end, the same bytes as from one process (of as many threads), and the
    first one saves it. `args.max_steps` counts the batches of each.

    Args:
        model: an OLMoE, Qwen3-MoE or GPT-OSS of transformers, plain or PEFT-wrapped.
        args (`KNNMoETrainingArguments`): how to build.
        data_collator: as in `Trainer`; the default pads to the right.
        train_dataset, eval_dataset: rows of `{"text"}`, `{"input_ids", "labels"}`, `{"prompt", "completion"}` or
            `{"messages"}`; labels of -100 are neither optimised nor stored. An integer column `example_id` names the
            examples, otherwise their index does.
        processing_class: the tokenizer; saved beside the memory. Tokenised rows need none.
        callbacks, compute_metrics, ...: as in `Trainer`.
        config (`KNNMoEConfig`): retrieval, mixing and keys of the memory; the defaults if None.
        memory_name: the name under which the memory is attached; one that is already there under it is replaced.
        ordinary_dataset: text on which the memory should do nothing, for `confidence="calibrated"`: rows in any of the
            four forms, or several such data sets by kind; 64 rows of each kind are read, evenly over the whole. If
            None, what this machine carries (`knnmoe_hf.calibration.background`).

    Attributes:
        memory (`RoutingMemory` or None): the memory, once `train` has run.
        calibration (`CalibrationRecord` or None): what `confidence="calibrated"` read and found.
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
        self.gates: list[Gate] = select_gates(find_gates(model), config.layers)
        self.memory_config = config
        self.memory_name = memory_name
        self.memory: RoutingMemory | None = None
        self.calibration: CalibrationRecord | None = None
        self._tokenizing = (processing_class, args.max_length)
        self.ordinary_dataset = prepare_background(ordinary_dataset, *self._tokenizing)
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(
            model,
            args,
            data_collator if data_collator is not None else collate,
            self._prepare(train_dataset),
            self._prepare(eval_dataset),
            processing_class,
            *trainer_args,
            **trainer_kwargs,
        )
        check_whole(self)
        self._evaluated, self._to_evaluate = itertools.count(), None
        self.model_accepts_loss_kwargs = False  # the loss of a batch is a mean of its own tokens, in every process
        self.processes = Processes(self.args.process_index, self.args.world_size, self.args.ddp_timeout)
        if use_cache is not None:
            self.model.config.use_cache = use_cache  # Trainer switched it off, and generation would stay slow
        self.args._n_gpu = min(self.args.n_gpu, 1)  # DataParallel would copy the hooks, not share them

    def _prepare(self, dataset):
        if isinstance(dataset, dict) and not isinstance(dataset, DatasetDict):
            return {name: self._prepare(part) for name, part in dataset.items()}
        return None if dataset is None else prepare_dataset(dataset, *self._tokenizing)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Builds the memory and attaches it; in each of several processes, which have the same memory then.

        Returns:
            `TrainOutput`, whose metrics have `nll_before` and `nll_after` of the reference tokens (nats per token),
            `experts_changed` (share of token and layer pairs whose set of experts changed), `tokens_worse` (share of
            reference tokens whose NLL is higher than frozen) and `rows`; they are of all processes.

        Raises:
            ValueError: if asked to resume, if no row has a target, or if processes have different models.
        """
        if resume_from_checkpoint:
            asked = shown(resume_from_checkpoint)
            raise ValueError(f"resume_from_checkpoint={asked}: a build leaves no checkpoints, start anew.")
        warn_if_slow(self.model)
        if hasattr(self.train_dataset, "__len__"):
            check_one_pass(self.args.max_steps, len(self.get_train_dataloader()), self.processes)
        background = self._background() if self.memory_config.confidence == "calibrated" else {}
        try:
            output = self._solve(*args, **kwargs)
            self._finish(background)
        finally:
            self._rows = None  # the memory has them now, or nobody
        found = self._progress.summary(self.processes)
        loss = found.pop("loss")
        metrics = output.metrics | {"train_loss": loss} | found
        return output._replace(training_loss=loss, metrics=metrics)

    def _solve(self, *args, **kwargs):
        with disable_memory(self.model), frozen(self.model, self.args.gradient_checkpointing):
            check_same_model(self.processes, find_gates(self.model))
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self._rows = ReferenceRows(self.gates, self.memory_config.value_space, Path(self.args.output_dir))
            self._progress = Progress()
            self._builder = self.make_builder()
            try:
                return super().train(*args, **kwargs)
            finally:
                self._builder.close()

    def get_train_dataloader(self) -> DataLoader:
        """Of the batches that are this process's (see `knnmoe_hf.training.dealing`)."""
        if self.train_dataset is None:
            raise ValueError("there is no train_dataset: pass the reference examples.")
        return batch_loader(self.train_dataset, self.data_collator, self.args, self.processes)

    def make_builder(self) -> Builder:
        """The builder of this run; override it to try another."""
        return make_builder(self.model, self.gates, self.args)

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; the model is prepared as one whose weights are only read."""
        super().create_accelerator_and_postprocess()
        # on CPUs accelerate would wrap it in DistributedDataParallel, which refuses a model without a gradient
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Dummy optimizer: Trainer's loop requires one, the builder has its own for each batch."""
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.args.learning_rate)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Solves one batch and keeps its rows; the loss is the targets' mean NLL with the optimised routing."""
        started, nothing = time.perf_counter(), torch.zeros((), device=self.args.device)
        inputs = self._prepare_inputs(inputs)
        labels, example_ids = inputs.pop("labels"), inputs.pop("example_id", None)
        number = self.state.global_step * self.processes.count + self.processes.index
        if not len(labels):  # the other processes have the last batches
            return nothing
        if example_ids is None:  # a collator of the user's own
            example_ids = torch.arange(len(labels)) + number * self.args.per_device_train_batch_size
        if not bool(target_mask(labels, inputs.get("attention_mask")).any()):
            self._progress.notes.append(BatchNote(number, 0, time.perf_counter() - started, {}))
            return nothing
        with self.compute_loss_context_manager():
            solved = self._builder.optimize(inputs, labels, example_ids)
        self._rows.add(number, solved, example_ids, inputs["input_ids"], labels, inputs.get("attention_mask"))
        self._progress.notes.append(BatchNote.of(number, solved, time.perf_counter() - started))
        return solved.nll_after.mean().to(self.args.device)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the build's own metrics since the last time, of all processes."""
        if "loss" in logs or "train_loss" in logs:  # Trainer's own, which every process logs
            found = self._progress.logs(self.processes)
            if "loss" in logs:
                logs["loss"] = found["loss"]
            else:
                logs["train_loss"] = self._progress.summary(self.processes).get("loss", 0.0)
            logs = logs | {name: round(value, 4) for name, value in found.items() if name != "loss"}
        super().log(logs, *args, **kwargs)

    def _finish(self, background: dict[str, BackgroundText]) -> None:
        rows = self._rows.collect(self.processes)
        self.memory = RoutingMemory.build(  # there already, should what follows fail
            self.memory_config,
            rows.keys,
            rows.values,
            self.model,
            rows.provenance,
            self.processing_class,
            rows.digest,
            self.processes,
            on_disk(self._rows.folder),
        )
        prepared, self.calibration = refine(self.model, self.memory, self.args, background, self.processes)
        self.memory = prepared.memory
        hooks = RoutingHooks.of(self.model)
        if hooks is not None and self.memory_name in hooks.named:
            detach_memory(self.model, self.memory_name)
        attach_prepared(self.model, prepared, self.memory_name)

    def _background(self) -> dict[str, BackgroundText]:
        if self.ordinary_dataset is not None:
            return self.ordinary_dataset
        if self.processing_class is None:
            logger.warning(
                "without a processing_class there is no background text: pass ordinary_dataset to calibrate"
            )
            return {}
        return machine_background(self.processing_class, self.processes)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As in `Trainer`; the examples' ids are not for the model."""
        inputs.pop("example_id", None)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        """As in `Trainer`; a dataset given to `evaluate` may have any of the four forms."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As in `Trainer`; `predict` takes any of the four forms."""
        return super().get_test_dataloader(self._prepare(test_dataset))

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """Runs twice: the metrics are with the memory, `{prefix}_base_loss` is the loss without."""

        def run(description: str):
            self._evaluated = itertools.count()
            self._to_evaluate = len(dataloader.dataset) if has_length(dataloader.dataset) else None
            return super(KNNMoETrainer, self).evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )

        output = run(description)
        with disable_memory(self.model):
            base = run(f"{description} (base)")
        loss = f"{metric_key_prefix}_loss"
        extra = {f"{metric_key_prefix}_base_loss": base.metrics[loss]} if loss in base.metrics else {}
        return output._replace(metrics=output.metrics | extra)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As in `Trainer`; examples that are repeated so that each of several processes has as many do not count."""
        number = next(self._evaluated) * self.processes.count + self.processes.index
        if self._to_evaluate is not None and inputs.get("labels") is not None:
            own = max(self._to_evaluate - number * self.args.eval_batch_size, 0)
            inputs["labels"] = inputs["labels"].clone()
            inputs["labels"][own:] = IGNORED
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "example_id" not in self._signature_columns:
            self._signature_columns.append("example_id")

    def _built(self) -> RoutingMemory:
        if self.memory is None:
            raise ValueError("there is no memory yet: call train first.")
        return self.memory

    def save_model(self, output_dir: str | PathLike | None = None, _internal_call: bool = False) -> None:
        """
        Writes the memory's folder (see `RoutingMemory.save_pretrained`).

        Raises:
            ValueError: before `train` has run.
        """
        if self.args.should_save:
            folder = output_dir if output_dir is not None else self.args.output_dir
            self._built().save_pretrained(folder, provenance=self.args.save_provenance)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: `save_model` writes the memory's own card."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ):
        """
        Uploads the memory to `args.hub_model_id`, by default the name of `args.output_dir`; always blocking.

        Raises:
            ValueError: before `train` has run.
        """
        name = self.args.hub_model_id or str(self.args.output_dir).rstrip("/").rpartition("/")[2]
        return self._built().push_to_hub(
            name,
            revision=revision if revision is not None else self.args.hub_revision,
            private=private if private is not None else self.args.hub_private_repo,
            token=token if token is not None else self.args.hub_token,
            commit_message=commit_message,
            provenance=self.args.save_provenance,
        )
