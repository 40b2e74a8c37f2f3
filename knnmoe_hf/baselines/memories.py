"""The memory of this library as a method: of routing (kNN-MoE), of next tokens (kNN-LM), and of both."""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import ClassVar

from torch import nn
from transformers import PrinterCallback

from knnmoe_hf.baselines.base import Method, constant, with_trainer
from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import shown
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.attach import active_memory, detach_memory, prepare, set_memory
from knnmoe_hf.models.hooks import using_overrides
from knnmoe_hf.models.offload import input_device
from knnmoe_hf.tasks.items import Item, Prompt, rows_of
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.finish import PrintVerdict
from knnmoe_hf.training.trainer import KNNMoETrainer

OF_USE = (
    "confidence",
    "context_threshold",
    "context_width",
    "recall",
    "next_token_weight",
    "next_token_temperature",
    "next_token_neighbors",
)
"""Options that may differ from those of a memory's build: neither its rows nor its calibration depend on them."""

_numbers = itertools.count()


@dataclass
class KNNMoE(Method):
    """
    kNN-MoE: each token's routing is mixed with that of its nearest reference tokens; every reference token is a row.

    One build serves all methods of this module that store and calibrate rows alike (`fit_key`). Without a tokenizer
    there is no text to calibrate on, and the confidence is `"context"`.

    Attributes:
        memory: what was built or loaded.
    """

    source: ClassVar[str] = "arXiv 2601.02144"
    recall: ClassVar[str] = "routing"

    config: dict = constant({}, "Options of KNNMoEConfig other than the defaults.", ours=True)
    build: dict = constant({}, "Options of KNNMoETrainingArguments other than the defaults.", ours=True)

    def __post_init__(self):
        super().__post_init__()
        self.memory: RoutingMemory | None = None
        self._check()

    def _check(self) -> None:
        """Refuses bad options before a fit takes hours, and those that would have no effect."""
        if given := [name for name in self._decided() if name in self.config]:
            raise ValueError(
                f"{given[0]}={shown(self.config[given[0]])} has no effect in the config of {type(self).__name__}, "
                "which decides it: leave it out, or use another of the methods knn_moe, knn_moe_both and knn_lm."
            )
        KNNMoEConfig(**self.config | self._decided())

    def fit(self, model: nn.Module, references: Sequence[Item], seed: int = 0, tokenizer=None) -> None:
        """
        Builds and calibrates the memory.

        Raises:
            ValueError: without references, or for options that do not fit the model.
        """
        if not references:
            raise ValueError("a memory needs at least one reference, and there is none: give references.")
        name, before = f"build {next(_numbers)}", active_memory(model)
        with with_trainer(model), tempfile.TemporaryDirectory() as folder:
            trainer = KNNMoETrainer(
                model=model,
                args=self._arguments(folder, seed=seed, use_cpu=input_device(model).type == "cpu"),
                train_dataset=rows_of(references),
                processing_class=tokenizer,
                config=KNNMoEConfig(**self._built_with(), recall="both"),
                memory_name=name,
            )
            for callback in (PrinterCallback, PrintVerdict):
                trainer.remove_callback(callback)
            trainer.train()
        detach_memory(model, name)
        if before is not None:
            set_memory(model, before)
        self.memory = self._opened(trainer.memory)

    @contextmanager
    def apply(self, model: nn.Module, prompt: Prompt | None = None) -> Iterator[nn.Module]:
        """
        The model with the memory, instead of whatever is attached to it otherwise.

        Raises:
            ValueError: before a fit.
        """
        if self.memory is None:
            raise ValueError(f"{type(self).__name__} has not been fitted: call fit or load first.")
        with using_overrides(model, prepare(model, self.memory)):
            yield model

    @property
    def fit_passes(self) -> float:
        """The builder's steps, and a calibration on half of the references and as much other text."""
        return self._arguments("unused").builder_steps + 4.0

    @property
    def fit_key(self) -> str:
        """The options that decide what is stored and fitted."""
        return repr(("memory", sorted(self._built_with().items()), sorted(self.build.items())))

    def save(self, folder: str | PathLike) -> None:
        """The memory's folder, with the text of the references."""
        self.memory.save_pretrained(folder, provenance="text")

    def load(self, model: nn.Module, references: Sequence[Item], folder: str | PathLike) -> None:
        """Opens the folder of a memory that any method with the same `fit_key` saved."""
        self.memory = self._opened(RoutingMemory.from_pretrained(folder))

    @property
    def nbytes(self) -> int:
        """Of keys and values, and of next tokens where they are recalled."""
        return self.memory.nbytes + (0 if self.recall == "routing" else self.memory.next_tokens.nbytes)

    def _arguments(self, folder: str, **more) -> KNNMoETrainingArguments:
        quiet = dict(report_to="none", logging_strategy="no", disable_tqdm=True, save_strategy="no")
        quiet |= dict(dataloader_pin_memory=False)
        return KNNMoETrainingArguments(**quiet | more | self.build | {"output_dir": folder})

    def _built_with(self) -> dict:
        options = KNNMoEConfig(**self.config).options()
        return {name: value for name, value in options.items() if name not in OF_USE}

    def _decided(self) -> dict:
        """Options of its memory that no `config` changes."""
        return {"recall": self.recall}

    def _used_with(self) -> dict:
        """Options that differ from what the memory was built with."""
        return {name: value for name, value in self.config.items() if name in OF_USE} | self._decided()

    def _opened(self, memory: RoutingMemory) -> RoutingMemory:
        return replace(memory, config=KNNMoEConfig.from_dict(memory.config.saved() | self._used_with()))


@dataclass
class KNNMoEBoth(KNNMoE):
    """kNN-MoE whose memory recalls next tokens too, which is ours; its calibration may leave the routing as it is."""

    acts_on: ClassVar[tuple[str, ...]] = ("routing", "logits")
    recall: ClassVar[str] = "both"


@dataclass
class KNNLM(KNNMoE):
    """
    kNN-LM: the tokens that followed a token's nearest reference tokens are mixed into the model's distribution.

    Keys are the inputs of the last MoE layer's gate, which is the input of the last feed-forward layer as in the
    source; they are stored, and 64 neighbours vote with a temperature, as this library does by default (ours; the
    source has raw keys and 1,024 neighbours).
    """

    source: ClassVar[str] = "arXiv 1911.00172"
    acts_on: ClassVar[tuple[str, ...]] = ("logits",)
    recall: ClassVar[str] = "next_tokens"

    weight: float | None = constant(
        0.25, "Share of the recalled tokens, the same for every token; None lets the calibration decide."
    )

    @property
    def nbytes(self) -> int:
        """Of the last layer's keys and the next tokens, which is all that is used."""
        last = self.memory.layers[max(self.memory.layers)].tensors()
        keys = sum(tensor.nbytes for name, tensor in last.items() if not name.startswith("values."))
        return keys + self.memory.next_tokens.nbytes

    def _decided(self) -> dict:
        # with gamma 0 the confidence is 1 for every token
        constant_weight = {"confidence": "rbf", "gamma": 0.0, "next_token_weight": self.weight}
        return super()._decided() | ({} if self.weight is None else constant_weight)
