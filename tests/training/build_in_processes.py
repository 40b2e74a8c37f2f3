"""Builds and saves a memory of a tiny model; run by a launcher, in one process or in several."""

import json
import sys
from pathlib import Path

import torch

from knnmoe_hf import disable_memory
from tests.conftest import tiny_model
from tests.domain import domain, own_text
from tests.training.builds import trainer_for


def main(folder: Path, case: str) -> None:
    torch.set_num_threads(1)
    model = tiny_model("olmoe")
    case = json.loads(case)
    rows = domain(21, 5)
    trainer = trainer_for(
        model,
        folder,
        rows,
        config=case.pop("config", {}),
        trainer={"ordinary_dataset": {"one": own_text(model, 9, 1), "two": own_text(model, 6, 2)}},
        use_cpu=True, **case,
    )
    output = trainer.train()
    trainer.save_model(folder / "memory")
    evaluated = trainer.evaluate(domain(7, 6))
    print(trainer.args.process_index, output.metrics, evaluated, trainer.calibration)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
