"""Where a build begins: with the first batch, or after those of a checkpoint of the same build."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from knnmoe_hf.errors import shown
from knnmoe_hf.training import checkpoints
from knnmoe_hf.training.batch_sources import NO_DATA
from knnmoe_hf.training.checkpoints import Checkpoint
from knnmoe_hf.training.progress import BatchMetrics
from knnmoe_hf.training.rows import BatchFacts
from knnmoe_hf.training.saved_batches import batches_of
from knnmoe_hf.training.segments import Segment

_WAY_OUT = "use the same, or build anew without resume_from_checkpoint (--overwrite in place of --resume)"


@dataclass(frozen=True)
class Start:
    """
    Where a build begins.

    Attributes:
        batches: number of batches that were solved before.
        step: number of steps that Trainer had made.
        data: digest of the examples of those batches.
        state: Trainer's state then; None at the beginning.
        folder: name of the checkpoint, for errors.
    """

    batches: int = 0
    step: int = 0
    data: str = NO_DATA
    state: dict[str, Any] | None = None
    folder: str = ""


class Identity(NamedTuple):
    """
    What the rows of a build depend on beside its data.

    Attributes:
        model: digests of the model's gates and weights.
        options: by the names of the arguments.
        layers: `{layer: (width of gate inputs, number of experts)}`.
    """

    model: dict[str, str]
    options: dict[str, Any]
    layers: dict[str, tuple[int, int]]

    def check(self, found: Checkpoint, path: Path) -> None:
        """
        Checks that this build would have made the rows of a checkpoint.

        Raises:
            ValueError: naming what differs.
        """
        if found.layers != self.layers:
            raise ValueError(f"{path} is of other layers than this build: {_WAY_OUT}.")
        for name, what in (("gates", "another model"), ("weights", "a model with other weights, dtypes or adapters")):
            if found.model.get(name) != self.model[name]:
                raise ValueError(f"{path} is of {what}: {_WAY_OUT}.")
        for name in (*self.options, *(name for name in found.options if name not in self.options)):
            had, has = found.options.get(name), self.options.get(name)
            if had != has:
                was = f"{path} was built with {name}={shown(had)}"
                raise ValueError(f"{was}, and this build has {shown(has)}: {_WAY_OUT}.")


class Solved(NamedTuple):
    """What a checkpoint has: where a build goes on, the segments, and what is known of their batches."""

    start: Start
    segments: list[Segment]
    metrics: list[BatchMetrics]
    facts: list[BatchFacts]


def take_up(given: str | os.PathLike | bool, folder: Path, identity: Identity, most: int, vocab_size: int) -> Solved:
    """
    Opens and checks a checkpoint.

    Args:
        given: its folder, or True for the last one in `folder`.
        folder: the `output_dir` of the build.
        identity: of the build.
        most: number of batches that the build may have, or less than 1 for all.
        vocab_size: of the model; token ids must be smaller.

    Raises:
        MemoryFileError: for a checkpoint that cannot be used.
        ValueError: if there is none, or it is of another build.
    """
    path = _named(given, folder)
    found = checkpoints.read_checkpoint(path)
    identity.check(found, path)
    if 0 < most < found.batches:
        raise ValueError(
            f"{path} has {found.batches} batches where max_steps allows {most}: use more steps, or build "
            "anew without resume_from_checkpoint."
        )
    segments, metrics, facts = found.open(path), [], []
    for segment in segments:
        solved, known = batches_of(segment, len(metrics), vocab_size)
        metrics, facts = metrics + solved, facts + known
    state = _read_state(path / TRAINER_STATE_NAME, found.step)
    return Solved(Start(found.batches, found.step, found.data, state, str(path)), segments, metrics, facts)


def refuse_foreign(folder: Path) -> None:
    """
    Refuses a folder in which a checkpoint would take the place of something else, such as another trainer's.

    Raises:
        FileExistsError: naming it.
    """
    ours = checkpoints.checkpoints_of(folder)
    for path in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        is_empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
        if path.name.rpartition("-")[2].isdecimal() and path not in ours and not is_empty:
            raise FileExistsError(
                f"{shown(str(folder))} has {path.name}, which is not a checkpoint of a memory's build and would be "
                "written over: name another folder as output_dir, or move it away."
            )


def _named(given: str | os.PathLike | bool, folder: Path) -> Path:
    if given is not True:
        if not Path(given).is_dir():
            raise ValueError(
                f"resume_from_checkpoint={shown(str(given))} is not a folder: name a checkpoint of a build."
            )
        return Path(given)
    last = checkpoints.checkpoints_of(folder)[-1:]
    if not last:
        raise ValueError(
            f"resume_from_checkpoint=True is not possible, as {shown(str(folder))} has no checkpoint of a build: "
            "leave it out to build anew."
        )
    return last[0]


def _read_state(path: Path, step: int) -> dict[str, Any]:
    """What a build takes over of Trainer's state."""
    content = checkpoints.read_state(path)
    numbers = {name: content.get(name) for name in ("epoch", "total_flos", "num_input_tokens_seen")}
    logs = content.get("log_history")
    good = all(type(value) in (int, float) and math.isfinite(value) for value in numbers.values())
    if not good or not isinstance(logs, list) or not all(isinstance(log, dict) for log in logs):
        raise checkpoints.broken(path, "it is not the state of a trainer")
    return numbers | {"global_step": step, "log_history": logs}
