"""
Builds, saves and evaluates memories of a tiny model, in one process and in two:

    python -m tests.training.build_in_processes FOLDER CASE...

The two are forked, so that everything is imported once, and find each other as `torchrun` tells its processes to.
"""

import json
import math
import os
import socket
import sys
from pathlib import Path

import torch
from torch import multiprocessing
from torch.utils.data import IterableDataset

from knnmoe_hf import active_memory, detach_memory
from tests.support.domain import domain, own_text
from tests.support.models import tiny_model
from tests.support.training import trainer_for

ENCODED = dict(key_codec="pca", key_dim=12, key_dtype="int8", value_dtype="int8", value_experts=4)
NO_TARGET = {"input_ids": [1, 2, 3], "labels": [-100] * 3}
CASES = {
    "calibrated": dict(rows=domain(21, 5), config=ENCODED | dict(num_neighbors=4, gamma=0.1, half_life=4.0)),
    "refined": dict(
        rows=domain(21, 6),
        config=dict(confidence="rbf", gamma=0.1),
        stream=True,
        builder="search",
        max_rows=300,
        num_layers=1,
    ),
    "unlike": dict(  # in their lengths; with batches without a target, and a last batch for process 0 alone
        rows=[*domain(3, 7, length=30), *[NO_TARGET] * 3, *domain(3, 8, length=9)],
        config=dict(confidence="context", value_space="delta"),
    ),
    "alone": dict(rows=domain(1, 9), config=dict(confidence="rbf")),
}


class Stream(IterableDataset):
    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def _unlike(count: int) -> list[dict]:
    """Rows of several lengths, so that batches of one step differ in theirs."""
    ids = [row["input_ids"] for row in domain(count, 6)]
    return [{"input_ids": row[: 8 + 5 * (place % 4)]} for place, row in enumerate(ids)]


def run(name: str, folder: Path, rows: list[dict], config: dict, stream: bool = False, **arguments) -> None:
    """Builds one of the cases, and writes the results of this process to a file."""
    rows = [row | {"example_id": 3 * index} for index, row in enumerate(rows)]
    if stream:
        rows, arguments["max_steps"] = Stream(rows), math.ceil(len(rows) / 2 / int(os.environ.get("WORLD_SIZE", 1)))
    model = tiny_model("olmoe")
    ordinary = {"one": own_text(model, 9, 1), "two": own_text(model, 6, 2)}
    trainer = trainer_for(
        model,
        folder / name,
        rows,
        config=config,
        trainer={"ordinary_dataset": ordinary},
        use_cpu=True,
        logging_steps=2,
        allow_overlap=True,
        **arguments,
    )
    output = trainer.train()
    index = trainer.args.process_index
    trainer.save_model(folder / name / f"by-{index}")
    trainer.memory.save_pretrained(folder / name / f"of-{index}")
    found = dict(
        metrics=output.metrics,
        loss=output.training_loss,
        evaluated={str(rows): trainer.evaluate(domain(rows, 6)) for rows in (5, 8, 19)},
        streamed={str(rows): trainer.evaluate(Stream(_unlike(rows))) for rows in (1, 5, 8, 19)},
        predicted=trainer.predict(Stream(_unlike(5))).predictions[:, :8].sum((1, 2)).tolist(),
        active=active_memory(model),
        calibration=repr(trainer.calibration),
        logs=trainer.state.log_history,
    )
    (folder / name / f"found-{index}.json").write_text(json.dumps(found))
    detach_memory(model)


def work(index: int, count: int, port: int, folder: Path, cases: list[str]) -> None:
    """One of `count` processes builds all cases."""
    torch.set_num_threads(1)
    if count > 1:
        rank = dict(RANK=index, LOCAL_RANK=index, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
        os.environ |= {name: str(value) for name, value in rank.items()}
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for name in cases:
        run(name, folder / f"from-{count}", **CASES[name])


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


if __name__ == "__main__":
    for count in (1, 2):
        arguments = (count, free_port(), Path(sys.argv[1]), sys.argv[2:])
        multiprocessing.start_processes(work, arguments, nprocs=count, start_method="fork")
