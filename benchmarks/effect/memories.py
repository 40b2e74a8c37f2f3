"""The memories of one cell: settings that differ only in how rows are stored or used share a build."""

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import PrinterCallback

from benchmarks.builds import RAW, training_arguments
from benchmarks.effect.settings import Setting
from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, RoutingMemory, calibrate, detach_memory
from knnmoe_hf.baselines.memories import OF_USE
from knnmoe_hf.calibration.background import machine_background
from knnmoe_hf.training.finish import PrintVerdict

_OF_USE = ("layers", *OF_USE)
"""`OF_USE`, and the layers: neither rows nor calibration depend on them."""


class Made(NamedTuple):
    """A memory, and the CPU seconds that it takes to make it if nothing is shared."""

    memory: RoutingMemory
    seconds: float


class Memories:
    """
    Makes the memories of settings, each step once for all settings that need the same.

    Rows are built once as they are found, in float32 without any rounding. A setting's memory has the same rows stored
    as its options say (`RoutingMemory.recoded`, which encodes as a build does) and calibrated, if they ask for that.

    Args:
        model: the frozen model, without a memory.
        tokenizer: of the model.
        references: of the cell, prepared; a setting may ask for the first of them.
        seed: of the builder.
        folder: built rows are kept there for other runs, which must be of the same model, references and seed; None
            keeps none.
    """

    def __init__(self, model: nn.Module, tokenizer, references: list[dict], seed: int, folder: Path | None = None):
        self.model, self.tokenizer, self.references, self.seed = model, tokenizer, references, seed
        self.folder = folder
        self._made: dict[str, Made] = {}

    def of(self, setting: Setting) -> Made:
        """The memory of a setting, with all of its options."""
        config = KNNMoEConfig(**setting.config)
        built = self._once(self._built, setting.build, setting.references, config.value_space)
        stored = {name: value for name, value in config.options().items() if name not in _OF_USE}
        made = self._once(self._store, built, stored)
        if config.confidence == "calibrated":
            made = self._once(self._calibrate, made, setting.background)
        return made._replace(memory=replace(made.memory, config=_with_options(made.memory, config.options())))

    def _once(self, make: Callable[..., RoutingMemory | Made], *given) -> Made:
        key = repr((make.__name__, [id(one.memory) if isinstance(one, Made) else one for one in given]))
        if key not in self._made:
            began = time.process_time()
            made = make(*given)
            before = sum(one.seconds for one in given if isinstance(one, Made))
            seconds = before + time.process_time() - began
            self._made[key] = made if isinstance(made, Made) else Made(made, seconds)
        return self._made[key]

    def _built(self, build: dict, references: int, value_space: str) -> RoutingMemory | Made:
        """From the folder, with the seconds that it took then, or anew."""
        if self.folder is None:
            return self._build(build, references, value_space)
        wanted = repr((sorted(build.items()), references, value_space))
        folder = self.folder / hashlib.sha256(wanted.encode()).hexdigest()[:16]
        if not (folder / "seconds.txt").exists():
            began = time.process_time()
            self._build(build, references, value_space).save_pretrained(folder, provenance="text", overwrite=True)
            (folder / "seconds.txt").write_text(f"{time.process_time() - began}")
        return Made(RoutingMemory.from_pretrained(folder), float((folder / "seconds.txt").read_text()))

    def _build(self, build: dict, references: int, value_space: str) -> RoutingMemory:
        with tempfile.TemporaryDirectory() as folder:
            trainer = KNNMoETrainer(
                model=self.model,
                args=training_arguments(build | {"seed": self.seed}, folder),
                train_dataset=self.references[:references],
                processing_class=self.tokenizer,
                config=KNNMoEConfig(**RAW, value_space=value_space, confidence="rbf"),
                ordinary_dataset=self.references[:1],  # for a verdict that nobody reads
            )
            for callback in (PrinterCallback, PrintVerdict):
                trainer.remove_callback(callback)
            trainer.train()
            detach_memory(self.model)
        return trainer.memory

    def _store(self, built: Made, options: dict) -> RoutingMemory:
        return built.memory.recoded(self.model, **options, layers=list(built.memory.layers))

    def _calibrate(self, stored: Made, kinds: tuple[str, ...] | None) -> RoutingMemory:
        background = machine_background(self.tokenizer)
        memory = replace(stored.memory, config=_with_options(stored.memory, {"confidence": "calibrated"}))
        return calibrate(self.model, memory, {kind: background[kind] for kind in kinds or background})[0]


def _with_options(memory: RoutingMemory, options: dict) -> KNNMoEConfig:
    """The memory's own configuration with other options; its layers stay what they are."""
    return KNNMoEConfig.from_dict(memory.config.saved() | options | {"layers": list(memory.layers)})
