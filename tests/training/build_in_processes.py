"""Builds, saves and evaluates memories of a tiny model; run as a module by a launcher, in one process or several."""

import json
import math
import sys
from pathlib import Path

import torch
from torch.utils.data import IterableDataset

from knnmoe_hf import active_memory, detach_memory
from tests.conftest import tiny_model
from tests.support.domain import domain, own_text
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
        rekey=True,
        max_rows=300,
        num_layers=1,
    ),
    "unlike": dict(  # lengths, batches without a target, and the last batch is process 0's alone
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


def run(name: str, folder: Path, model, rows: list[dict], config: dict, stream: bool = False, **arguments) -> dict:
    """Builds one of the cases; what this process found."""
    rows = [row | {"example_id": 3 * index} for index, row in enumerate(rows)]
    if stream:
        steps = math.ceil(len(rows) / 2 / torch.distributed.get_world_size()) if in_processes() else -(-len(rows) // 2)
        rows, arguments["max_steps"] = Stream(rows), steps
    ordinary = {"one": own_text(model, 9, 1), "two": own_text(model, 6, 2)}
    trainer = trainer_for(
        model,
        folder / name,
        rows,
        config=config,
        trainer={"ordinary_dataset": ordinary},
        use_cpu=True,
        logging_steps=2,
        **arguments,
    )
    output = trainer.train()
    index = trainer.args.process_index
    trainer.save_model(folder / name / f"by-{index}")
    trainer.memory.save_pretrained(folder / name / f"of-{index}")
    evaluated = {str(rows): trainer.evaluate(domain(rows, 6)) for rows in (5, 8, 19)}
    found = dict(
        metrics=output.metrics,
        loss=output.training_loss,
        evaluated=evaluated,
        active=active_memory(model),
        calibration=repr(trainer.calibration),
        rekeying=repr(trainer.rekeying),
        logs=trainer.state.log_history,
    )
    (folder / name / f"found-{index}.json").write_text(json.dumps(found))
    detach_memory(model)


def in_processes() -> bool:
    return torch.distributed.is_initialized()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case, options in CASES.items():
        run(case, Path(sys.argv[1]), tiny_model("olmoe"), **options)
