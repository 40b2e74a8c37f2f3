"""Arguments of a build: those of `TrainingArguments` that make sense for one, and the solver's own."""

import math
from dataclasses import dataclass, field
from enum import Enum

from transformers import TrainingArguments

from knnmoe_hf.errors import shown

BUILDERS = {"candidates": 10, "topk": 10, "search": 20}
"""The builders, and each one's `builder_steps` if none are asked for."""


@dataclass
class KNNMoETrainingArguments(TrainingArguments):
    r"""
    Arguments of `KNNMoETrainer`.

    A build goes over the reference examples once. Each batch is solved to completion: its token logits are optimised,
    the rows are stored, and nothing is carried to the next batch. Everything of `TrainingArguments` that presumes
    weights, several epochs or a schedule is refused. The constants of the builders were chosen on validation text by
    `benchmarks/sweep_builders.py`.

    Args:
        builder (`str`, defaults to `"candidates"`):
            `"candidates"` opens the `num_candidates` widest experts in the first `candidate_steps` steps, then the
            model's own top-k; `"topk"` is the paper's gradient descent through the hard top-k alone; `"search"` draws
            routes at random around the best so far, and needs no backward pass.
        builder_steps (`int`, *optional*):
            Steps over each batch: of a forward and a backward pass (10 by default), or of a forward pass alone with
            `"search"` (20 by default).
        num_candidates (`int`, *optional*):
            With `"candidates"`: experts open at first, twice the model's own top-k if `None`.
        candidate_steps (`int`, *optional*):
            With `"candidates"`: steps with the candidates open, half of `builder_steps` if `None`.
        max_rows (`int`, *optional*):
            Rows that the memory may have, those that optimisation gained most on; all if `None`.
        min_gain (`float`, *optional*):
            Nats by which a row's NLL must have fallen for it to be kept.
        num_layers (`int`, *optional*):
            Layers that keep their rows, those that alone gain most on held-out references; all if `None`.
        save_provenance (`bool`, defaults to `True`):
            `False` makes `save_model` and `push_to_hub` leave out which examples the rows came from, and their tokens.
        learning_rate (`float`, defaults to 0.3):
            Adam's, in units of logits; `adam_beta1` and `adam_beta2` are Adam's too. `"search"` uses none of them.
        adam_epsilon (`float`, defaults to 1e-4):
            Adam's, relative to a token's largest gradient in the first step: gradients below are next to nothing.
        max_length (`int`, *optional*, defaults to 1024):
            Longer examples are cut to their first so many tokens; `None` cuts none.

    Raises:
        ValueError: for an argument that has no meaning in a build.
    """

    builder: str = field(default="candidates", metadata={"help": f"How logits are optimised: {', '.join(BUILDERS)}."})
    builder_steps: int | None = field(
        default=None, metadata={"help": "Steps on the logits of each batch; by default 10, and 20 of search."}
    )
    num_candidates: int | None = field(default=None, metadata={"help": "Experts open at first; 2 x top-k by default."})
    candidate_steps: int | None = field(
        default=None, metadata={"help": "Steps with candidates open; half by default."}
    )
    max_length: int | None = field(default=1024, metadata={"help": "Longer examples are cut to so many tokens."})
    max_rows: int | None = field(default=None, metadata={"help": "Keep the rows with the largest gains."})
    min_gain: float | None = field(default=None, metadata={"help": "Drop rows that gained fewer nats."})
    num_layers: int | None = field(default=None, metadata={"help": "Keep the layers with the largest gains."})
    save_provenance: bool = field(default=True, metadata={"help": "False: rows do not say which text they came from."})
    learning_rate: float = field(default=0.3, metadata={"help": "Adam's learning rate on the logits."})
    adam_epsilon: float = field(default=1e-4, metadata={"help": "Adam's epsilon, relative to a token's gradient."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "One: every example is solved once."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Constant: each batch starts anew."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: gradients of independent tokens are not clipped."})
    save_strategy: str = field(default="no", metadata={"help": "no: save the finished memory with save_model."})
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "Rows come in the dataset's order."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many batches."})

    def __post_init__(self):
        super().__post_init__()
        if self.builder not in BUILDERS:
            raise ValueError(f"builder={shown(self.builder)} is not allowed: choose one of {', '.join(BUILDERS)}.")
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name}={shown(value)} is not allowed: use an integer of at least {least}.")
        self._check_selection()
        if self.builder_steps is None:
            self.builder_steps = BUILDERS[self.builder]
        self._check_candidates()
        if not isinstance(self.learning_rate, (int, float)) or not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={shown(self.learning_rate)} is not allowed: use a number of at least 0.")
        for name, (allowed, reason) in _FIXED.items():
            value = getattr(self, name)
            value = value.value if isinstance(value, Enum) else value
            if value != allowed:
                raise ValueError(f"{name}={shown(value)} makes no sense here: {reason}; leave it at {allowed!r}.")
        self._check_machinery()

    def _check_machinery(self) -> None:
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"accelerator_config with {name}=True makes no sense here: each process solves whole batches that "
                    "it reads itself, so leave it out."
                )
        if not self.accelerator_config.even_batches:
            raise ValueError(
                "accelerator_config with even_batches=False makes no sense here: a build repeats no example in any "
                "case, and evaluate would wait for processes that have no batch left; leave it out."
            )
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs with use_reentrant=True is not allowed: it loses the gradient of "
                "logits, which no layer is given as its input, so leave it out."
            )

    def _check_selection(self) -> None:
        gain = self.min_gain
        number = isinstance(gain, (int, float)) and not isinstance(gain, bool)
        if gain is not None and not (number and math.isfinite(gain)):
            raise ValueError(f"min_gain={shown(gain)} is not allowed: use a finite number, or None.")

    def _check_candidates(self) -> None:
        for name in ("num_candidates", "candidate_steps"):
            if self.builder != "candidates" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no meaning for builder={self.builder!r}: leave it out, or use "
                    "builder='candidates'."
                )
        if self.candidate_steps is not None and self.candidate_steps >= self.builder_steps:
            raise ValueError(
                f"candidate_steps={self.candidate_steps} leaves no step of builder_steps={self.builder_steps} under "
                "the model's own rule: use fewer."
            )


_COUNTS = {  # least value
    "builder_steps": 1,
    "num_candidates": 1,
    "candidate_steps": 0,
    "max_length": 2,
    "max_rows": 1,
    "num_layers": 1,
}
_FIXED = {
    "gradient_accumulation_steps": (1, "each batch is solved to completion and shares no gradient with the next"),
    "num_train_epochs": (1, "an example is solved once and its rows do not change afterwards"),
    "max_grad_norm": (0, "clipping would make a token's logits depend on the other tokens of its batch"),
    "weight_decay": (0, "decay would pull logits towards uniform routing and not towards the gate's own"),
    "label_smoothing_factor": (0, "values are optimised for the likelihood of the true next token"),
    "lr_scheduler_type": ("constant", "the steps of a batch are all that an optimiser sees"),
    "lr_scheduler_kwargs": (None, "the steps of a batch are all that an optimiser sees"),
    "optim": (TrainingArguments.optim, "logits are optimised by the solver's own Adam"),
    "optim_args": (None, "logits are optimised by the solver's own Adam"),
    "optim_target_modules": (None, "no module is optimised"),
    "warmup_steps": (0, "the steps of a batch are all that an optimiser sees"),
    "fp16": (False, "loss scaling acts on weights' gradients; load the model in the dtype to build in, or use bf16"),
    "fp16_full_eval": (False, "it would change the frozen model's dtype for good; load the model in that dtype"),
    "bf16_full_eval": (False, "it would change the frozen model's dtype for good; load the model in that dtype"),
    "save_strategy": ("no", "a memory is whole when all rows are in; call save_model after train"),
    "eval_strategy": ("no", "a memory is whole when all rows are in; call evaluate after train"),
    "eval_on_start": (False, "there is no memory before the build; call evaluate after train"),
    "load_best_model_at_end": (False, "one build gives one memory"),
    "neftune_noise_alpha": (None, "keys must be the gate inputs of the frozen model"),
    "dataloader_drop_last": (False, "the examples of the last batch would be missing from the memory"),
    "dataloader_in_order": (True, "the rows of a memory are in the order of the examples"),
    "train_sampling_strategy": ("sequential", "the rows of a memory are in the order of the examples"),
    "torch_compile": (False, "the hooks of a build change from step to step, and would be compiled each time"),
    "auto_find_batch_size": (False, "it would start the build over; set per_device_train_batch_size"),
}
