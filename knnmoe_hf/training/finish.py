"""What follows the last batch of a build, inside of Trainer's loop, so that its time, logs and bar cover it."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from knnmoe_hf.calibration.background import machine_background
from knnmoe_hf.memory.verdict import HELD_OUT_SHARE, MOST_WINDOWS

if TYPE_CHECKING:
    from knnmoe_hf.training.trainer import KNNMoETrainer

# how long things take, in forward passes of the model alone; only the bar depends on them
_STEP = {"candidates": 3.0, "topk": 3.0, "search": 1.0}  # of a builder: with or without a backward pass
_WITH_MEMORY = 1.3
_ENCODING = 3.0  # of all references, to encode and index their rows
# of background text: observing the memory closed, half open and open; two thresholds and a weight that are tried
_CALIBRATION, _CALIBRATION_CALLS = 1 + 5 * _WITH_MEMORY, 4


class FinishBuild(TrainerCallback):
    """
    Reads background text before the first batch, makes the memory after the last one, and logs its verdict.

    To Trainer's progress bar, if there is one, this is as many further batches as would take as long.
    """

    def __init__(self, trainer: "KNNMoETrainer"):
        self.trainer = trainer
        self._bar = _Bar([], 0)

    def on_train_begin(self, args, state, control, **kwargs):
        """Reads the background text: what was given, or else this machine's, for which there must be a tokenizer."""
        given, tokenizer = self.trainer.ordinary_dataset, self.trainer.processing_class
        if given is None:
            vocabulary = self.trainer.model.get_input_embeddings().weight.shape[0]
            known = tokenizer is not None
            given = machine_background(tokenizer, self.trainer.processes, vocabulary) if known else {}
        self.trainer.background = given
        self.trainer.check_data()
        self.trainer.stop_if_asked(in_steps=True)
        self._bar = _Bar(self.trainer.callback_handler.callbacks, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        """Foresees what is left; the first batches say how long the examples are."""
        self.trainer.count_epoch()
        self.trainer.stop_if_asked(in_steps=True)
        self._bar.foresee(_follows(self.trainer), state.max_steps)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Makes the memory. There is no second pass over the examples, even if `max_steps` allows more batches."""
        self.trainer.stop_if_asked(in_steps=False)
        should_log = control.should_log  # logging the verdict would reset it
        if args.save_strategy != SaveStrategy.NO:  # before what follows can fail
            self.trainer.save_last_checkpoint()
            control.should_save = False
        follows = _follows(self.trainer)
        self._bar.foresee(follows, state.global_step)
        self.trainer.processes.on_item = lambda: self._bar.add(follows.item)
        try:
            self.trainer.make_memory(lambda: self._bar.add(follows.encoding))
        finally:
            self.trainer.processes.on_item = None
        self.trainer.log(self.trainer.memory.verdict.metrics())
        self._bar.complete()
        control.should_log, control.should_training_stop = should_log, True

    def on_train_end(self, args, state, control, **kwargs):
        """Forgets the bar, which is closed now."""
        self._bar = _Bar([], 0)


class PrintVerdict(TrainerCallback):
    """Prints the three sentences of a build's verdict at its end; it may be removed, as any callback."""

    def __init__(self, trainer: "KNNMoETrainer"):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        """Prints them, in the first process."""
        if state.is_world_process_zero and self.trainer.memory is not None and self.trainer.memory.verdict is not None:
            print(*self.trainer.memory.verdict.sentences(), sep="\n", flush=True)


def comes_last(callback: TrainerCallback) -> bool:
    """Whether a callback is one of these two, which need that the progress bars of all others are open, or closed."""
    return isinstance(callback, (FinishBuild, PrintVerdict))


class Follows(NamedTuple):
    """
    What follows the last batch, as a number of batches of the build that take as long.

    Attributes:
        encoding: encoding the rows.
        item: one of the batches of text that are then scored, in this process.
        items: their number.
    """

    encoding: float
    item: float
    items: int

    @property
    def total(self) -> int:
        """All of it, in whole batches."""
        return math.ceil(self.encoding + self.item * self.items)


def _follows(trainer: "KNNMoETrainer") -> Follows:
    """What follows, as far as the batches so far tell the length of the examples."""
    args, processes = trainer.args, trainer.processes
    size = args.per_device_train_batch_size
    examples = trainer.state.max_steps * size * processes.count
    rows = [batch.rows for batch in trainer.batch_metrics()]
    tokens = max(sum(rows), 1) / max(len(rows), 1) / size  # of an example
    held = min(MOST_WINDOWS, examples // HELD_OUT_SHARE)
    jobs = [_Job(held, tokens, 1 + 2 * _WITH_MEMORY, 3)]
    background = trainer.background
    jobs += [_Job(*_size(text.unread), 1 + _WITH_MEMORY, 2) for text in background.values()]
    if trainer.memory_config.confidence == "calibrated":
        jobs += [_Job(*_size(text.rows), _CALIBRATION, _CALIBRATION_CALLS) for text in background.values()]
    if args.num_layers is not None:
        layers = len(trainer.gates)
        jobs.append(_Job(min(16, held), tokens, 1 + layers * _WITH_MEMORY, 1 + layers))
    work = sum(job.rows * job.tokens * job.passes for job in jobs)
    items = max(1, sum(job.calls * math.ceil(job.rows / size) for job in jobs) // processes.count)
    batch = size * tokens * (1 + args.builder_steps * _STEP.get(args.builder, 1.0))
    encoding, scoring = (passes / batch / processes.count for passes in (_ENCODING * examples * tokens, work))
    return Follows(encoding, scoring / items, items)


class _Job(NamedTuple):
    """So many rows of so many tokens, scored in several calls that take as long as so many passes."""

    rows: int
    tokens: float
    passes: float
    calls: int


def _size(rows: Sequence[Mapping]) -> tuple[int, float]:
    """Number of rows, and of tokens in the mean."""
    return len(rows), sum(len(row["input_ids"]) for row in rows) / max(len(rows), 1)


class _Bar:
    """Trainer's progress bars, in whole batches."""

    def __init__(self, callbacks: Sequence[TrainerCallback], steps: int):
        self._callbacks, self._steps, self._more, self._done = callbacks, steps, 0, 0.0

    @property
    def _bars(self) -> list:
        # looked up each time: a callback that was added later makes its bar later
        bars = (callback.training_bar for callback in self._callbacks if isinstance(callback, ProgressCallback))
        return [bar for bar in bars if bar is not None]

    def foresee(self, follows: Follows, steps: int) -> None:
        """There will be so many steps of the build, and what follows."""
        self._steps, self._more = steps, follows.total
        for bar in self._bars:
            bar.total = steps + self._more
            bar.refresh()

    def add(self, batches: float) -> None:
        """So much of what follows is done; the last batch is done only when all is."""
        self._done += batches
        self._show(min(int(self._done), self._more - 1))

    def complete(self) -> None:
        """All is done."""
        self._show(self._more)

    def _show(self, more: int) -> None:
        for bar in self._bars:
            bar.update(max(self._steps + more - bar.n, 0))
