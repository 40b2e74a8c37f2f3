"""`KNNMoETrainer`: a Trainer whose only trainable tensors are token logits, and whose product is a memory."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from os import PathLike

import torch
from datasets import DatasetDict
from torch import Tensor, nn
from transformers import Trainer

from knnmoe_hf.attach import attach_memory, detach_memory, disable_memory
from knnmoe_hf.calibration import Calibration
from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.data import collate, prepare_dataset, target_mask
from knnmoe_hf.errors import shown
from knnmoe_hf.fingerprint import tokenizer_fingerprint
from knnmoe_hf.hooks import RoutingHooks
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.building import build_memory
from knnmoe_hf.mixing import value_of
from knnmoe_hf.modes import frozen
from knnmoe_hf.ordinary import ordinary_rows, prepare_ordinary
from knnmoe_hf.routing import Gate, check_gates, find_gates, select_gates
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.builders import make_builder
from knnmoe_hf.training.refine import Rekeying, refine
from knnmoe_hf.training.rows import ReferenceRows
from knnmoe_hf.training.solver import SolvedBatch, Solver

logger = logging.getLogger(__name__)


class KNNMoETrainer(Trainer):
    """
    Builds a routing memory for a frozen MoE model.

    `train` goes over `train_dataset` once, solves each batch for the routing that makes its true next tokens likely,
    and attaches the finished memory to the model. `evaluate` reports `eval_loss` with the memory and `eval_base_loss`
    without. `save_model` and `push_to_hub` write the memory, never the base model's weights, which are not changed.

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
            None, what this machine carries (`knnmoe_hf.ordinary`).

    Attributes:
        memory (`RoutingMemory` or None): the memory, once `train` has run.
        calibration (`Calibration` or None): what `confidence="calibrated"` found.
        rekeying (`Rekeying` or None): what the second pass of `args.rekey` found.
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
        _check(model, args, config, trainer_kwargs.get("model_init"))
        self.gates: list[Gate] = select_gates(find_gates(model), config.layers)
        self.memory_config = config
        self.memory_name = memory_name
        self.memory: RoutingMemory | None = None
        self.calibration: Calibration | None = None
        self.rekeying: Rekeying | None = None
        self._metrics: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self._tokenizing = (processing_class, args.max_length)
        self.ordinary_dataset = prepare_ordinary(ordinary_dataset, *self._tokenizing)
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
        if use_cache is not None:
            self.model.config.use_cache = use_cache  # Trainer switched it off, and generation would stay slow
        self.args._n_gpu = min(self.args.n_gpu, 1)  # DataParallel would copy the hooks, not share them

    def _prepare(self, dataset):
        if isinstance(dataset, dict) and not isinstance(dataset, DatasetDict):
            return {name: self._prepare(part) for name, part in dataset.items()}
        return None if dataset is None else prepare_dataset(dataset, *self._tokenizing)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Builds the memory and attaches it.

        Returns:
            `TrainOutput`, whose metrics have `nll_before` and `nll_after` of the reference tokens (nats per token),
            `experts_changed` (share of token and layer pairs whose set of experts changed), `tokens_worse` (share of
            reference tokens whose NLL is higher than frozen) and `rows`.

        Raises:
            ValueError: if asked to resume, or if no row has a target.
        """
        if resume_from_checkpoint:
            asked = shown(resume_from_checkpoint)
            raise ValueError(f"resume_from_checkpoint={asked}: a build leaves no checkpoints, start anew.")
        self._check_one_pass()
        ordinary = self._ordinary() if self.memory_config.confidence == "calibrated" else {}
        with disable_memory(self.model), frozen(self.model, self.args.gradient_checkpointing):
            check_gates(self.model, find_gates(self.model))
            self._rows = ReferenceRows([gate.layer for gate in self.gates])
            self._solver = self.make_builder()
            try:
                output = super().train(*args, **kwargs)
            finally:
                self._solver.close()
        self._finish(ordinary)
        output.metrics.update(self._rows.summary())
        self._rows = None  # the memory has them now
        return output

    def _check_one_pass(self) -> None:
        batches = len(self.get_train_dataloader()) if hasattr(self.train_dataset, "__len__") else None
        if batches is not None and self.args.max_steps > batches:
            raise ValueError(
                f"max_steps={self.args.max_steps} is more than the {batches} batches of the data: an example is "
                "solved once, so leave max_steps out or use fewer."
            )

    def make_builder(self) -> Solver:
        """The builder of this run; override it to try another."""
        return make_builder(self.model, self.gates, self.args)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """An optimiser of nothing: the solver has its own for each batch, Trainer's loop needs one to step."""
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.args.learning_rate)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Solves one batch and keeps its rows; the loss is the targets' mean NLL with the optimised routing."""
        started = time.perf_counter()
        inputs = self._prepare_inputs(inputs)
        labels, example_ids = inputs.pop("labels"), inputs.pop("example_id", None)
        if example_ids is None:  # a collator of the user's own
            example_ids = torch.arange(len(labels)) + self._rows.examples
        if not bool(target_mask(labels, inputs.get("attention_mask")).any()):
            self._rows.skip(len(labels))
            return torch.zeros((), device=self.args.device)
        with self.compute_loss_context_manager():
            solved = self._solver.solve(inputs, labels, example_ids)
        values = {
            gate.layer: value_of(
                self.memory_config.value_space,
                solved.optimized[gate.layer],
                solved.logits[gate.layer],
                gate.rule,
                gate.top_k,
            )
            for gate in self.gates
        }
        self._rows.add(solved, values, example_ids, inputs["input_ids"], labels, inputs.get("attention_mask"))
        self._note(solved, time.perf_counter() - started)
        return solved.nll_after.mean().to(self.args.device)

    def _note(self, solved: SolvedBatch, seconds: float) -> None:
        rows = len(solved.example)
        self._metrics["nll_before"].append((solved.nll_before.mean().item(), rows))
        self._metrics["nll_after"].append((solved.nll_after.mean().item(), rows))
        self._metrics["experts_changed"].append((solved.experts_changed, rows))
        self._metrics["tokens_worse"].append((solved.tokens_worse, rows))
        self._metrics["seconds_per_row"].append((seconds / rows, rows))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the build's own metrics, averaged over the rows since the last time."""
        means = {
            name: sum(value * rows for value, rows in noted) / sum(rows for _, rows in noted)
            for name, noted in self._metrics.items()
        }
        self._metrics.clear()
        if "seconds_per_row" in means:
            means["rows_per_second"] = 1 / means.pop("seconds_per_row")
        super().log(logs | {name: round(value, 4) for name, value in means.items()}, *args, **kwargs)

    def _finish(self, ordinary: dict[str, Sequence[dict]]) -> None:
        tokenizer = self.processing_class
        keys, values, provenance = self._rows.collect()
        self.memory = build_memory(  # there already, should what follows fail
            self.memory_config,
            keys,
            values,
            self.model,
            provenance,
            tokenizer,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer) if tokenizer is not None else None,
            reference_set_hash=self._rows.digest(),
        )
        self.memory, self.rekeying, self.calibration = refine(self.model, self.memory, self.args, ordinary)
        hooks = RoutingHooks.of(self.model)
        if hooks is not None and self.memory_name in hooks.named:
            detach_memory(self.model, self.memory_name)
        attach_memory(self.model, self.memory, self.memory_name)

    def _ordinary(self) -> dict[str, Sequence[dict]]:
        if self.ordinary_dataset is not None:
            return self.ordinary_dataset
        if self.processing_class is None:
            logger.warning("without a processing_class there is no ordinary text: pass ordinary_dataset to calibrate")
            return {}
        return ordinary_rows(self.processing_class)

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
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        with disable_memory(self.model):
            base = super().evaluation_loop(
                dataloader, f"{description} (base)", *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        loss = f"{metric_key_prefix}_loss"
        extra = {f"{metric_key_prefix}_base_loss": base.metrics[loss]} if loss in base.metrics else {}
        return output._replace(metrics=output.metrics | extra)

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


def _check(model: nn.Module, args: KNNMoETrainingArguments, config: KNNMoEConfig, model_init: Callable | None) -> None:
    if not isinstance(args, KNNMoETrainingArguments):
        raise TypeError(f"args are {type(args).__name__}: KNNMoETrainer needs KNNMoETrainingArguments.")
    if args.world_size > 1:
        raise ValueError(f"a build on {args.world_size} processes is not supported: launch a single one.")
    if not isinstance(config, KNNMoEConfig):
        raise TypeError(f"config is {shown(config)}: KNNMoETrainer needs a KNNMoEConfig.")
    config.validate_retrieval()
    if not isinstance(model, nn.Module) or model_init is not None:
        given = "model_init" if model is None else shown(model)
        raise ValueError(f"{given} is not allowed: a memory belongs to one frozen model, so pass a loaded model.")
