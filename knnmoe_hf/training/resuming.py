"""The part of `KNNMoETrainer` that writes checkpoints, and goes on from one where a build was interrupted."""

import copy
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from knnmoe_hf.distributed import Processes
from knnmoe_hf.errors import MemoryFileError, in_one_line
from knnmoe_hf.files import told_of_full_disks
from knnmoe_hf.training import checkpoints
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.checkpoints import Checkpoint, SegmentEntry
from knnmoe_hf.training.dataloader import OnePassLoader
from knnmoe_hf.training.identity import model_digests, row_options
from knnmoe_hf.training.progress import BatchMetrics, Progress
from knnmoe_hf.training.rows import BatchFacts, ReferenceRows
from knnmoe_hf.training.saved_batches import tensors_of
from knnmoe_hf.training.segments import KEY_DTYPES, Segment, SegmentSizes, write_segment
from knnmoe_hf.training.starting import Identity, Start, refuse_foreign, take_up

logger = logging.getLogger(__name__)
T = TypeVar("T")
WAY_ON = "go on with train(resume_from_checkpoint=True), on the command line with --resume"


class KeepsCheckpoints:
    """Writes checkpoints as `args.save_strategy` says, and resumes from them."""

    args: KNNMoETrainingArguments
    processes: Processes
    state: TrainerState
    _rows: ReferenceRows
    _progress: Progress
    _loader: OnePassLoader
    _identity: Identity
    _start = Start()
    _stored = 0  # number of batches that it holds
    _checkpoint: Path | None = None  # the last one that was written, or resumed from

    def _begin(self, resume_from_checkpoint: str | os.PathLike | bool | None) -> None:
        """Makes the files of the rows; takes over those of a checkpoint, in the first process."""
        folder = Path(self.args.output_dir)
        self._start, self._checkpoint = Start(), None
        self._rows = ReferenceRows(self.gates, self.memory_config.value_space, folder)
        self._progress = Progress()
        layers = {str(gate.layer): (gate.hidden_size, gate.num_experts) for gate in self.gates}
        self._identity = Identity(model_digests(self.model, self.gates), row_options(self), layers)
        if resume_from_checkpoint:
            self._start = self.processes.gather(self._agreed(lambda: self._take_up(resume_from_checkpoint, folder)))[0]
            self._checkpoint = Path(self._start.folder)
        if self.args.save_strategy != SaveStrategy.NO:
            self._agreed(lambda: refuse_foreign(folder))
        self._stored = self._start.batches
        if self.processes.index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.clean(folder)

    def _agreed(self, work: Callable[[], T]) -> T | None:
        """What `work` returns in the first process, which alone runs it, else None; its error is raised in all."""
        found, error = None, None
        try:
            found = work() if self.processes.index == 0 else None
        except Exception as raised:
            if self.processes.count == 1:
                raise
            error = raised
        told = self.processes.gather(None if error is None else (type(error), str(error)))[0]
        if error is not None:
            raise error
        if told is not None:
            kind, text = told
            raise kind(text) if kind in (ValueError, OSError, FileExistsError, MemoryFileError) else RuntimeError(text)
        return found

    def _take_up(self, given: str | os.PathLike | bool, folder: Path) -> Start:
        """Takes over the rows of a checkpoint, in the first process."""
        most = self.args.max_steps * self.processes.count
        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        solved = take_up(given, folder, self._identity, most, vocab_size)
        self._rows.restore(solved.segments, solved.facts)
        self._progress.restore(solved.metrics)
        logger.info("going on from %s, after its %d batches.", solved.start.folder, solved.start.batches)
        return solved.start

    def check_data(self) -> None:
        """
        Reads the examples that were solved before, and refuses others; `FinishBuild` calls it before the first batch.

        Raises:
            ValueError: in every process, if they are not those of the checkpoint.
        """
        start, said = self._start, None
        if not start.batches:
            return
        try:
            if self._loader.skip(start.batches) != start.data:
                said = (
                    f"{start.folder} is of other data: its {start.batches} batches are not the first of "
                    "train_dataset, so give the same examples in the same order, or build anew without "
                    "resume_from_checkpoint (--overwrite in place of --resume)."
                )
        except Exception as error:
            if self.processes.count == 1:
                raise
            said = f"train_dataset could not be read up to where {start.folder} ends ({in_one_line(error)})."
        if told := [one for one in self.processes.gather(said) if one is not None]:
            raise ValueError(told[0])

    def batch_number(self) -> int:
        """Index in the data of the batch that this process solves in the present step."""
        done = (self.state.global_step - self._start.step) * self.processes.count
        return self._start.batches + done + self.processes.index

    def set_initial_training_values(self, args, dataloader, *others):
        """As in `Trainer`; a build that goes on counts its steps on, and makes only those that are left."""
        if not self._start.batches:
            return super().set_initial_training_values(args, dataloader, *others)
        total = self.get_total_train_batch_size(args)
        if hasattr(self.train_dataset, "__len__"):
            left, examples = len(dataloader), len(self.train_dataset)
        else:
            batches = max(0, args.max_steps * self.processes.count - self._start.batches)
            left = math.ceil(batches / self.processes.count)
            examples = args.max_steps * total
        return 1, left, examples, examples, total, left, self._start.step + left

    def restore_state(self) -> None:
        """Trainer's state as it was when the checkpoint was written; to be called when Trainer has made a new one."""
        for name, value in (self._start.state or {}).items():
            setattr(self.state, name, value)

    def count_epoch(self) -> None:
        """The share of the data that is solved, which Trainer counts from where it began."""
        if self._start.batches:
            self.state.epoch = self.state.global_step / max(self.state.max_steps, 1)

    def _save_checkpoint(self, model=None, trial=None) -> None:
        """Writes what was solved to `checkpoint-N` in `args.output_dir`, and uploads it if the arguments say so."""
        self.store_flos()
        before = self._checkpoint
        self._store()
        if self.args.push_to_hub and self._checkpoint != before:
            self._push_from_checkpoint(str(self._checkpoint))

    def save_last_checkpoint(self) -> None:
        """Writes what was solved before the memory is made, unless the last step did."""
        before = self._checkpoint
        self._save_checkpoint()
        if self._checkpoint != before:
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _store(self) -> None:
        """Writes what was solved, from all processes, in the first one; to be called in all."""
        processes, folder = self.processes, Path(self.args.output_dir)
        parts = processes.gather([batch for batch in self._progress.batches if batch.number >= self._stored])
        new = sorted((batch for part in parts for batch in part), key=lambda batch: batch.number)
        solved = self._stored + len(new)
        stop = min(processes.gather(self._loader.whole_batches(solved)))
        here = self._checkpoint is not None and self._checkpoint.parent.absolute() == folder.absolute()
        if stop == self._stored and (here or not stop):
            return
        facts, tables = self._rows.gather_new(self._stored, stop, processes) or ([], {})
        new = new[: stop - self._stored]
        path, segment = self._agreed(lambda: self._write(new, facts, tables, stop)) or (None, None)
        self._checkpoint = processes.gather(path)[0]
        if stop == solved:  # else the rows of a batch that an error cut short go into the memory from where they are
            self._rows.stored(segment, facts)
            self._stored = stop

    def _write(self, new: list[BatchMetrics], facts: list[BatchFacts], tables: dict, stop: int) -> tuple:
        """The path of a new checkpoint, and its new segment."""
        steps = math.ceil((stop - self._start.batches) / self.processes.count)
        step, name = self._start.step + steps, f"batches-{self._stored:08d}-{stop:08d}.safetensors"
        tensors, layers = tensors_of(new, facts) | tables, {gate.layer: gate for gate in self.gates}
        for layer, gate in layers.items() if not tables else ():
            dtype = gate.weight.dtype if gate.weight.dtype in KEY_DTYPES.values() else torch.float32
            tensors[f"keys.{layer}"] = torch.empty(0, gate.hidden_size, dtype=dtype)
            tensors[f"values.{layer}"] = torch.empty(0, gate.num_experts)
        counts = [len(tensors[name]) for name in ("rows.example_ids", "examples.ids", "examples.input_ids")]
        keys = {layer: (gate.hidden_size, tensors[f"keys.{layer}"].dtype) for layer, gate in layers.items()}
        values = {layer: gate.num_experts for layer, gate in layers.items()}
        sizes = SegmentSizes(len(new), *counts, keys, values)
        entries = [SegmentEntry.of(one.path.name, one.sizes, one.sha256) for one in self._rows.segments]

        def fill(scratch: Path) -> Checkpoint:
            if new:
                entries.append(SegmentEntry.of(name, sizes, write_segment(scratch / name, sizes, tensors)))
            return Checkpoint(step, stop, self._loader.digest(stop), **self._identity._asdict(), segments=entries)

        state = copy.copy(self.state)
        state.global_step = step
        folder = Path(self.args.output_dir)
        with self._told_of_full_disks():
            path = checkpoints.write_checkpoint(
                folder, fill, self._rows.segments, lambda scratch: state.save_to_json(scratch / TRAINER_STATE_NAME)
            )
        checkpoints.rotate(folder, self.args.save_total_limit)
        return path, Segment(path / name, sizes, entries[-1].sha256) if new else None

    @contextmanager
    def _kept_whatever_happens(self) -> Iterator[None]:
        """Inside this context Trainer's loop runs; what is solved is kept whatever ends it, in one process."""
        with self._told_of_full_disks(), self._kept_on_errors():
            with self._interrupted_together(), self._silent_if_solved():
                yield

    @contextmanager
    def _interrupted_together(self) -> Iterator[None]:
        """Inside this context Ctrl-C lets each of several processes end its batch, and then all write a checkpoint."""
        self._asked = self._in_steps = False
        if self.processes.count == 1 or threading.current_thread() is not threading.main_thread():
            yield  # one process writes a checkpoint at once; elsewhere signals cannot be handled
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked or not self._in_steps or self.args.save_strategy == SaveStrategy.NO:
                raise KeyboardInterrupt
            self._asked = True

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)

    def stop_if_asked(self, in_steps: bool) -> None:
        """
        Ends the build in all processes if Ctrl-C came to one of them; called between steps.

        Args:
            in_steps: whether another step follows, at whose end this is called again.
        """
        self._in_steps = in_steps
        if self.processes.count > 1 and any(self.processes.gather(self._asked)):
            self._store()
            raise KeyboardInterrupt

    @contextmanager
    def _silent_if_solved(self) -> Iterator[None]:
        """Inside this context Trainer does not warn that a build which goes on has no batch left."""
        trainer = logging.getLogger("transformers.trainer")

        def is_wanted(record: logging.LogRecord) -> bool:
            return not (self._start.batches and str(record.msg).startswith("There seems not to be a single sample"))

        trainer.addFilter(is_wanted)
        try:
            yield
        finally:
            trainer.removeFilter(is_wanted)

    @contextmanager
    def _told_of_full_disks(self) -> Iterator[None]:
        """Inside this context a full disk is an error of one sentence, which names the last checkpoint."""

        def way_on() -> str:
            return f"and {WAY_ON}, as {self._checkpoint} is whole" if self._checkpoint else "and build anew"

        with told_of_full_disks(self.args.output_dir, way_on):
            yield

    @contextmanager
    def _kept_on_errors(self) -> Iterator[None]:
        """Inside this context an error or Ctrl-C leaves a checkpoint of what was solved before, in one process."""
        try:
            yield
        except BaseException as error:
            if self.args.save_strategy != SaveStrategy.NO and self.processes.index == 0:
                if self.processes.count == 1 and not isinstance(error, OSError):  # as of a full disk
                    try:
                        self._store()
                    except Exception as second:  # what is raised is the error that ended the build
                        logger.warning("what was solved since could not be written (%s).", in_one_line(second))
                if self._checkpoint is not None:
                    logger.warning(
                        "%s has the %d batches that were solved: %s.", self._checkpoint, self._stored, WAY_ON
                    )
            raise
