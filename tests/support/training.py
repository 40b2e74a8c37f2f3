"""Small builds on tiny models."""

import torch

from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, KNNMoETrainingArguments, detach_memory


def examples(count: int = 5, length: int = 10, seed: int = 3) -> list[dict]:
    """Tokenised rows; the first two tokens of each are no targets."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(96, (count, length), generator=generator).tolist()
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in rows]


PLAIN = {"key_codec": "raw", "key_dtype": "float32", "value_dtype": "float32"}
"""What a build found, as it found it."""


def trainer_for(model, tmp_path, rows=None, config: dict | None = None, trainer: dict | None = None, **arguments):
    """A trainer with few steps; `arguments` are of KNNMoETrainingArguments."""
    options = dict(
        per_device_train_batch_size=2, builder_steps=4, learning_rate=0.3, report_to="none", disable_tqdm=True
    )
    args = KNNMoETrainingArguments(output_dir=str(tmp_path / "out"), **(options | arguments))
    rows = examples() if rows is None else rows
    return KNNMoETrainer(
        model=model, args=args, train_dataset=rows, config=KNNMoEConfig(**(PLAIN | (config or {}))), **(trainer or {})
    )


def build(model, tmp_path, *args, **kwargs):
    """The memory of a small build, detached from the model."""
    trainer = trainer_for(model, tmp_path, *args, **kwargs)
    trainer.train()
    detach_memory(model)
    return trainer.memory
