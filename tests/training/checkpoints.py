"""A small build that is interrupted where a test wants it, and what it leaves."""

from pathlib import Path

from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from knnmoe_hf import detach_memory
from tests.support.models import tiny_model
from tests.support.training import examples, trainer_for

ROWS = [*examples(5), {"input_ids": [1, 2, 3, 4], "labels": [-100] * 4}, {"input_ids": [5]}, *examples(4, seed=5)]
"""Six batches of two, of which the fourth begins with examples without a target."""


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class At(TrainerCallback):
    """Raises an error at the end of a step, or where something is logged."""

    def __init__(self, step: int | None = None, log: str = "", error: BaseException | None = None):
        self.step, self.log, self.error = step, log, error if error is not None else KeyboardInterrupt()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.log and self.log in (logs or {}):
            raise self.error


def new_trainer(folder: Path, rows=None, callbacks=(), trainer: dict | None = None, **arguments):
    options = dict(save_steps=2) | arguments
    if isinstance(rows, Stream):
        options.setdefault("max_steps", 9)
    rows = ROWS if rows is None else rows
    return trainer_for(
        tiny_model("olmoe"), folder, rows, trainer=dict(callbacks=list(callbacks)) | (trainer or {}), **options
    )


def contents(trainer, folder: Path) -> dict[str, bytes]:
    trainer.save_model(folder / "memory")
    detach_memory(trainer.model)
    return {path.name: path.read_bytes() for path in sorted((folder / "memory").iterdir())}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())
