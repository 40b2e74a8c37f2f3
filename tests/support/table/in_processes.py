"""
Checks the cells of models that run in two processes:

    python -m tests.support.table.in_processes FOLDER

Each process writes what it found to FOLDER/INDEX.json, as `{"family, way": [error's class, message]}`.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from tests.support.table.cells import CELLS
from tests.support.table.check import check
from tests.support.table.ways import IN_PROCESSES
from tests.training.build_in_processes import free_port


def work(index: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    rank = dict(RANK=index, LOCAL_RANK=index, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in rank.items()} | {"MASTER_ADDR": "127.0.0.1"}
    distributed.init_process_group("gloo", timeout=timedelta(seconds=600))
    found = {}
    for number, (family, way) in enumerate(cell for cell in CELLS if cell[1] in IN_PROCESSES):
        try:
            check(family, IN_PROCESSES[way], folder / str(number))
            found[f"{family}, {way}"] = [None, ""]
        except Exception as error:
            found[f"{family}, {way}"] = [type(error).__name__, str(error)]
        distributed.barrier()
    (folder / f"{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    multiprocessing.start_processes(work, (free_port(), Path(sys.argv[1])), nprocs=2, start_method="fork")
