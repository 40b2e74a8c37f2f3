"""Fine-tuning with the usual tools, for comparison: LoRA by PEFT, and every weight, both by transformers' Trainer."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from knnmoe_hf.baselines.base import constant, with_trainer
from knnmoe_hf.baselines.tuning import RATES, Tuned, with_weights
from knnmoe_hf.data.batches import collate
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.models.offload import input_device
from knnmoe_hf.tasks.items import Item, rows_of


class _SeededOrder(Sampler):
    """Another order in each epoch, all of them by one seed, as `tuning.descend` has them."""

    def __init__(self, count: int, seed: int):
        self.count, self.generator = count, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count, generator=self.generator).tolist())

    def __len__(self) -> int:
        return self.count


class _NextTokenTrainer(Trainer):
    """Trainer with that order, and with the model's own loss, the mean over the targets of each batch."""

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return _SeededOrder(len(self.train_dataset), self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def _batch(rows: list[dict]) -> dict[str, Tensor]:
    batch = collate(rows)
    batch.pop("example_id")
    return batch


class _ByTrainer(Tuned):
    """What LoRA and full fine-tuning share: all parameters that have gradients are trained by Trainer."""

    def _run(self, model: nn.Module, items: Sequence[Item], seed: int, rate: float) -> None:
        with with_trainer(model), tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=self.examples_per_step,
                learning_rate=rate,
                num_train_epochs=self.epochs,
                lr_scheduler_type="constant",
                optim="adamw_torch",
                weight_decay=0.0,
                max_grad_norm=1.0,
                seed=seed,
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=input_device(model).type == "cpu",
            )
            rows = rows_of(items, self.answer_only)
            trainer = _NextTokenTrainer(model, arguments, data_collator=_batch, train_dataset=rows)
            trainer.model_accepts_loss_kwargs = False  # the loss is a mean already
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        model.requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = None


@dataclass
class LoRA(_ByTrainer):
    """PEFT's low-rank updates of the attention and of every expert."""

    source: ClassVar[str] = "arXiv 2106.09685; PEFT"
    acts_on: ClassVar[tuple[str, ...]] = ("weights",)

    learning_rates: Sequence[float] = constant([3e-4, 1e-3, 3e-3], RATES, ours=True)
    rank: int = constant(8, "Of each update.", ours=True)
    alpha: int = constant(16, "The updates are multiplied by alpha / rank.", ours=True)
    target_modules: Sequence[str] = constant(
        ["q_proj", "k_proj", "v_proj", "o_proj"], "Names of modules that get an update.", ours=True
    )
    target_parameters: Sequence[str] = constant(
        ["experts.gate_up_proj", "experts.down_proj"], "Names of parameters that get one for each expert.", ours=True
    )

    def _train(self, model: nn.Module, items: Sequence[Item], seed: int, rate: float) -> dict[str, Tensor]:
        with self._adapted(model, seed) as adapted:
            self._run(adapted, items, seed, rate)
            return {name: one.detach().clone() for name, one in _adapter(adapted).items()}

    @contextmanager
    def _with(self, model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        with self._adapted(model, seed=0) as adapted:
            adapted.requires_grad_(False)
            with with_weights(_adapter(adapted), state):
                yield adapted

    @contextmanager
    def _adapted(self, model: nn.Module, seed: int) -> Iterator[PeftModel]:
        """Inside this context the model has a new adapter, initialised by the seed, and afterwards its own modules."""
        if isinstance(model, PeftModel):
            raise UnsupportedModelError(
                "the model has an adapter of PEFT already, which a second one would replace: merge it with "
                "merge_and_unload before comparing with LoRA."
            )
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.target_modules),
            target_parameters=list(self.target_parameters),
        )
        trainable = {name for name, one in model.named_parameters() if one.requires_grad}
        order = {module: list(module._parameters) for module in model.modules()}
        with ExitStack() as stack:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                adapted = get_peft_model(model, config)
            stack.callback(_unload, adapted, model, trainable, order)
            adapted.train(model.training)
            yield adapted


def _adapter(adapted: PeftModel) -> dict[str, nn.Parameter]:
    return {name: one for name, one in adapted.named_parameters() if "lora_" in name}


def _unload(adapted: PeftModel, model: nn.Module, trainable: set[str], order: Mapping[nn.Module, list[str]]) -> None:
    adapted.unload()
    for module, names in order.items():  # PEFT registers the experts' parameters anew, after all others
        found = dict(module._parameters)
        module._parameters.clear()
        module._parameters.update({name: found[name] for name in names})
    for name, one in model.named_parameters():
        one.requires_grad_(name in trainable)


@dataclass
class FullFineTuning(_ByTrainer):
    """Every weight."""

    source: ClassVar[str] = "common practice; transformers' Trainer"
    acts_on: ClassVar[tuple[str, ...]] = ("weights",)
    keeps_weights: ClassVar[bool] = False

    learning_rates: Sequence[float] = constant([3e-4], RATES, ours=True)

    def _train(self, model: nn.Module, items: Sequence[Item], seed: int, rate: float) -> dict[str, Tensor]:
        weights = dict(model.named_parameters())
        values = {name: weight.detach().clone() for name, weight in weights.items()}
        with with_weights(weights, values):
            model.requires_grad_(True)
            self._run(model, items, seed, rate)
        return values

    @contextmanager
    def _with(self, model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        with with_weights(dict(model.named_parameters()), state):
            yield model
