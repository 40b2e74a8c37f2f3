"""Builds and saves a memory of a given number of examples; prints the bytes of its rows and the peak RAM used."""

import json
import sys
import threading
import time
from pathlib import Path

import torch

from tests.support.models import tiny_model
from tests.support.training import PLAIN, examples, trainer_for

LENGTH = 102  # two tokens of each example have no row
CONFIG = PLAIN | dict(search_max_bytes=2**20)


class Watch(threading.Thread):
    """Peak of this process's anonymous memory (Linux): without pages of files, which the system can drop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.first, self.most, self.ended = self.bytes(), 0, threading.Event()

    def bytes(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    def run(self) -> None:
        while not self.ended.is_set():
            self.most = max(self.most, self.bytes())
            time.sleep(1e-3)


def main(folder: Path, count: int, options: dict) -> None:
    torch.set_num_threads(1)
    model = tiny_model("olmoe", hidden_size=1024)
    settings = dict(builder="search", builder_steps=1, per_device_train_batch_size=8, use_cpu=True)
    trainer = trainer_for(model, folder, examples(count, LENGTH), CONFIG | options, **settings)
    watch = Watch()
    watch.start()
    trainer.train()
    trainer.save_model(folder / "memory")
    watch.ended.set()
    watch.join()
    rows = sum(len(trainer.memory) * 4 * (gate.hidden_size + gate.num_experts) for gate in trainer.gates)
    print(json.dumps({"rows": rows, "taken": watch.most - watch.first}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
