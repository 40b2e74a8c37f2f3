"""Small builds on tiny models."""

import copy
import functools
import tempfile
from pathlib import Path

import torch

from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, KNNMoETrainingArguments, RoutingMemory, detach_memory
from tests.support.models import tiny_model

PLAIN = {"key_codec": "raw", "key_dtype": "float32", "value_dtype": "float32"}
"""Rows as the builder found them."""


def examples(count: int = 5, length: int = 10, seed: int = 3) -> list[dict]:
    """Tokenised rows; the first two tokens of each are not targets."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(96, (count, length), generator=generator).tolist()
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in rows]


def trainer_for(model, folder, rows=None, config: dict | None = None, trainer: dict | None = None, **arguments):
    """
    A trainer with few steps.

    Args:
        model: to build for.
        folder: where its output folder is made.
        rows: the training rows, by default `examples()`.
        config, trainer, arguments: options of KNNMoEConfig, KNNMoETrainer and KNNMoETrainingArguments.
    """
    options = dict(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=2,
        builder_steps=4,
        learning_rate=0.3,
        report_to="none",
        disable_tqdm=True,
    )
    args = KNNMoETrainingArguments(**(options | arguments))
    rows = examples() if rows is None else rows
    return KNNMoETrainer(
        model=model, args=args, train_dataset=rows, config=KNNMoEConfig(**(PLAIN | (config or {}))), **(trainer or {})
    )


def build(model, folder, *args, **kwargs) -> RoutingMemory:
    """The memory of a small build, detached from the model; arguments as of `trainer_for`."""
    trainer = trainer_for(model, folder, *args, **kwargs)
    trainer.train()
    detach_memory(model)
    return trainer.memory


@functools.cache
def _built(family: str, builder: str) -> RoutingMemory:
    with tempfile.TemporaryDirectory() as folder:
        return build(tiny_model(family), Path(folder), builder=builder)


def built(family: str, builder: str = "candidates") -> RoutingMemory:
    """What `build(tiny_model(family), folder, builder=builder)` gives, built once in a process."""
    return copy.deepcopy(_built(family, builder))
