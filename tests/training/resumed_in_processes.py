"""
Builds that lose a process and are gone on with in other numbers of processes, in one process, two and three:

    python -m tests.training.resumed_in_processes FOLDER
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import multiprocessing
from transformers import TrainerCallback

from tests.support.domain import domain
from tests.support.models import tiny_model
from tests.support.training import trainer_for
from tests.training.build_in_processes import Stream, free_port

TIMEOUT = 20  # seconds after which a process stops waiting for another one


class Signals(TrainerCallback):
    """Sends a process a signal at the beginning of a step: SIGKILL as if it were lost, SIGINT as Ctrl-C."""

    def __init__(self, step: int, index: int, number: int = signal.SIGKILL):
        self.step, self.index, self.number = step, index, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == self.index:
            os.kill(os.getpid(), self.number)


def build(folder: Path, stream: bool, callbacks: list, resume: bool) -> None:
    """Builds 23 examples in batches of two and saves the memory."""
    rows, count = domain(23, 5), int(os.environ.get("WORLD_SIZE", 1))
    interrupted = any(one.number == signal.SIGINT for one in callbacks)
    options = dict(save_steps=100 if interrupted else 1, use_cpu=True, ddp_timeout=TIMEOUT)
    if stream:
        rows, options["max_steps"] = Stream(rows), -(-12 // count)
    trainer = trainer_for(
        tiny_model("olmoe"), folder, rows, dict(confidence="rbf"), dict(callbacks=callbacks), **options
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(folder / "memory")


def work(index: int, count: int, port: int, folder: Path, stream: bool, dies: tuple | None, resume: bool) -> None:
    """One of `count` processes."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores Ctrl-C
    if count > 1:
        rank = dict(RANK=index, LOCAL_RANK=index, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
        os.environ |= {name: str(value) for name, value in rank.items()}
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    build(folder, stream, [Signals(*dies)] if dies else [], resume)


def launch(count: int, folder: Path, stream: bool, dies: tuple | None = None, resume: bool = False) -> bool:
    """Whether all processes ended well; one that waits for a lost one must not wait longer than `TIMEOUT`."""
    arguments = (count, free_port(), folder, stream, dies, resume)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(index, *arguments)) for index in range(count)]
    for process in processes:
        process.start()
    until = time.monotonic() + 150
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    assert not any(process.is_alive() for process in processes), "a process waits for a lost one"
    return all(process.exitcode == 0 for process in processes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "memory").iterdir())}


def main(folder: Path) -> None:
    assert launch(1, folder / "whole", False)
    wanted = contents(folder / "whole")
    for stream, counts in ((False, (3, 2, 1)), (True, (2, 3)), (False, (1, 3))):
        place = folder / "-".join(map(str, (stream, *counts)))
        for round, count in enumerate(counts[:-1]):
            assert not launch(count, place, stream, (2 + round, count - 1), resume=round > 0)
        assert launch(counts[-1], place, stream, resume=True)
        assert contents(place) == wanted, place
    place = folder / "interrupted"
    assert not launch(2, place, False, (2, 1, signal.SIGINT))
    assert [path.name for path in (place / "out").iterdir()] == ["checkpoint-3"]  # with the batch of the interrupt
    assert launch(2, place, False, resume=True)
    assert contents(place) == wanted


if __name__ == "__main__":
    main(Path(sys.argv[1]))
