"""
Builds from streams that end with an error, in one process and in two:

    python -m tests.training.interrupted_in_processes FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import multiprocessing
from torch.utils.data import IterableDataset

from knnmoe_hf import detach_memory
from tests.support.models import tiny_model
from tests.support.training import examples, trainer_for
from tests.training.build_in_processes import free_port

BAD = {"input_ids": [1, 2, 96]}  # the last id is outside of the vocabulary


class Failing(IterableDataset):
    """Fails in the last process alone, in the middle of its third batch."""

    def __iter__(self):
        yield from examples(5)
        if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            raise ConnectionError("the network is gone")
        yield from examples(20, seed=5)


class BadRow(IterableDataset):
    def __iter__(self):
        yield from [*examples(5), BAD, *examples(5, seed=5)]


CASES = {"row": BadRow, "error of one": Failing}


def run(case: str, file: Path) -> None:
    model = tiny_model("olmoe")
    trainer = trainer_for(model, file.parent, CASES[case](), dict(confidence="rbf"), max_steps=20, use_cpu=True)
    error = None
    try:
        trainer.train()
    except Exception as found:
        error = f"{type(found).__name__}: {found}"
    values = {layer: rows.decoded_values.sum().item() for layer, rows in trainer.memory.layers.items()}
    file.write_text(json.dumps(dict(error=error, ids=trainer.memory.provenance.example_ids.tolist(), values=values)))
    detach_memory(model)


def work(index: int, count: int, port: int, folder: Path) -> None:
    """One of `count` processes."""
    torch.set_num_threads(1)
    if count > 1:
        rank = dict(RANK=index, LOCAL_RANK=index, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
        os.environ |= {name: str(value) for name, value in rank.items()}
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for case in CASES:
        run(case, folder / f"{case}-{count}-{index}.json")


if __name__ == "__main__":
    for count in (1, 2):
        multiprocessing.start_processes(
            work, (count, free_port(), Path(sys.argv[1])), nprocs=count, start_method="fork"
        )
