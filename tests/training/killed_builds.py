"""
Builds that are killed at random moments and gone on with until they end:

    python -m tests.training.killed_builds FOLDER SEED KILLS

Everything is imported once; each attempt is a fork. Two of three kills strike when the build is about to touch a file
of its folder, so that many of them fall into a checkpoint, its removal or the saving of the memory; the others strike
at any time.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from tests.support.domain import own_text
from tests.support.models import tiny_model
from tests.support.training import examples, trainer_for

ENCODED = dict(key_codec="pca", key_dim=12, key_dtype="int8", value_dtype="int8", value_experts=4, num_neighbors=4)


def build(folder: Path, resume: bool) -> None:
    """Builds, saves, and removes the checkpoints, as `knnmoe build` does."""
    from knnmoe_hf.training.checkpoints import checkpoints_of, clean, remove

    model = tiny_model("olmoe")
    background = {"one": own_text(model, 9, 1)}
    options = dict(save_steps=1, save_total_limit=2, use_cpu=True)
    trainer = trainer_for(
        model, folder, examples(17), config=ENCODED, trainer=dict(ordinary_dataset=background), **options
    )
    found = checkpoints_of(folder / "out")
    trainer.train(resume_from_checkpoint=bool(resume and found))
    trainer.save_model(folder / "memory")
    for path in checkpoints_of(folder / "out"):
        remove(path)
    clean(folder / "out")


def attempt(folder: Path, resume: bool, at_event: int | None = None, after: float | None = None) -> int:
    """Builds in a process of its own, which is killed before its `at_event`-th touch of a file or `after` seconds."""
    child = os.fork()
    if child == 0:
        quiet = os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        torch.set_num_threads(1)
        seen = 0

        def touched(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "tempfile.mkdtemp"):
                if str(folder) in "".join(map(str, arguments)):
                    seen += 1
                    if seen == at_event:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(touched)
        code = 1
        try:
            build(folder, resume)
            (folder / "events.json").write_text(json.dumps(seen))
            code = 0
        except BaseException:
            traceback.print_exc()  # nobody else does, as the process ends below
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, seed: int, kills: int) -> None:
    rng, wanted = random.Random(seed), folder / "whole"
    wanted.mkdir()
    began = time.monotonic()
    assert attempt(wanted, False) == 0
    seconds, events = time.monotonic() - began, json.loads((wanted / "events.json").read_text())
    expected = {path.name: path.read_bytes() for path in (wanted / "memory").iterdir()}
    struck, number = 0, 0
    while struck < kills:
        number += 1
        killed = folder / f"killed-{number}"
        killed.mkdir()
        code = -signal.SIGKILL
        while code == -signal.SIGKILL and struck < kills:
            at_file = dict(at_event=rng.randint(1, events))
            code = attempt(killed, True, **rng.choice([at_file, at_file, dict(after=rng.uniform(0, seconds))]))
            struck += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), "an attempt failed; see log.txt"
        if code:
            assert attempt(killed, True) == 0, "the last attempt failed; see log.txt"
        found = {path.name: path.read_bytes() for path in (killed / "memory").iterdir()}
        assert found == expected, f"the memory of {killed} has other bytes"
        assert not list((killed / "out").iterdir()), "something was left in the folder of the build"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
