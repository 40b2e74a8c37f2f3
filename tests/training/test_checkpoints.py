"""Checkpoints of a build: where they are written, and what goes on from them."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import TrainerCallback

from knnmoe_hf.training.checkpoints import checkpoints_of
from tests.support.models import tiny_model
from tests.support.training import trainer_for
from tests.training.checkpoints import ROWS, At, Stream, contents, names, new_trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of memories that were built without an interruption, by the builder."""
    found = {}
    for builder in ("candidates", "search"):
        folder = tmp_path_factory.mktemp(builder)
        trainer = new_trainer(folder, builder=builder, save_strategy="no")
        trainer.train()
        found[builder] = contents(trainer, folder)
    return found


@pytest.mark.parametrize("builder", ["candidates", "search"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [(3, 4), (6,)])
def test_an_interrupted_build_goes_on_to_the_bytes_of_a_whole_one(whole, tmp_path, builder, stream, steps):
    rows, resume = Stream() if stream else None, None
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            new_trainer(tmp_path, rows, [At(step)], builder=builder).train(resume_from_checkpoint=resume)
        resume = True
    trainer = new_trainer(tmp_path, rows, builder=builder)
    trainer.train(resume_from_checkpoint=True)
    assert contents(trainer, tmp_path) == whole[builder]
    assert not [name for name in names(tmp_path) if not name.startswith("checkpoint-")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_broke_off_in_the_middle_of_a_batch_goes_on_when_it_is_whole_again(whole, tmp_path, workers):
    class Broken(Stream):
        def __iter__(self):
            yield from ROWS[:3]
            raise ConnectionError("the network is gone")

    with pytest.raises(ConnectionError):
        new_trainer(tmp_path, Broken(), dataloader_num_workers=workers, save_steps=100).train()
    assert names(tmp_path) == ["checkpoint-1"]
    trainer = new_trainer(tmp_path, Stream(), dataloader_num_workers=workers)
    trainer.train(resume_from_checkpoint=True)
    assert contents(trainer, tmp_path) == whole["candidates"]


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(save_strategy="no"), []),
        (dict(save_strategy="epoch"), ["checkpoint-6"]),
        (dict(save_strategy="steps", save_steps=500), ["checkpoint-6"]),
        (dict(save_steps=4), ["checkpoint-4", "checkpoint-6"]),
        (dict(save_steps=0.5), ["checkpoint-3", "checkpoint-6"]),
        (dict(save_steps=1, save_total_limit=2), ["checkpoint-5", "checkpoint-6"]),
        (dict(save_steps=2, max_steps=3), ["checkpoint-2", "checkpoint-3"]),
    ],
)
def test_checkpoints_are_where_users_of_trainer_expect_them(tmp_path, options, expected):
    class Saves(TrainerCallback):
        seen = []

        def on_save(self, args, state, control, **kwargs):
            self.seen.append(state.global_step)

    Saves.seen = []
    new_trainer(tmp_path, callbacks=[Saves()], **options).train()
    assert names(tmp_path) == expected
    assert [f"checkpoint-{step}" for step in Saves.seen][-len(expected) or None :] == expected
    for path in checkpoints_of(tmp_path / "out"):
        assert json.loads((path / "trainer_state.json").read_text())["global_step"] == int(path.name.split("-")[1])


def test_checkpoints_share_the_rows_that_both_have_and_any_reader_of_safetensors_opens_them(tmp_path):
    new_trainer(tmp_path).train()
    first, last = tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-6"
    (name,) = [path.name for path in first.glob("*.safetensors")]
    assert (first / name).samefile(last / name) and len(list(last.glob("*.safetensors"))) == 3
    with safe_open(first / name, "pt") as file:
        assert file.get_tensor("keys.1").shape[0] == file.get_tensor("rows.example_ids").shape[0] == 4 * 8
        assert file.get_tensor("batches.rows").tolist() == [16, 16]


def test_what_is_reported_goes_on_too(interrupted, tmp_path_factory):
    trainer, one = new_trainer(interrupted, logging_steps=2), tmp_path_factory.mktemp("one")
    found = trainer.train(resume_from_checkpoint=True)
    wanted = new_trainer(one, logging_steps=2).train()
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
    assert {k: v for k, v in found.metrics.items() if k not in timed} == pytest.approx(
        {k: v for k, v in wanted.metrics.items() if k not in timed}
    )
    assert trainer.state.global_step == trainer.state.max_steps == 6 and trainer.state.epoch == 1


def test_an_interrupt_says_how_to_go_on_and_so_does_an_error(tmp_path, caplog):
    for folder, error in (("one", KeyboardInterrupt()), ("two", RuntimeError("out of memory"))):
        caplog.clear()
        with pytest.raises(type(error)):
            new_trainer(tmp_path / folder, callbacks=[At(3, error=error)], save_steps=500).train()
        (said,) = [record.getMessage() for record in caplog.records if "checkpoint-" in record.getMessage()]
        assert "checkpoint-3 has the 3 batches that were solved" in said and "resume_from_checkpoint=True" in said


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_failure_after_the_last_batch_loses_nothing(whole, tmp_path, strategy):
    failing = At(log="verdict_gain", error=RuntimeError("no luck"))
    with pytest.raises(RuntimeError, match="no luck"):
        new_trainer(tmp_path, callbacks=[failing], save_strategy=strategy).train()
    trainer = new_trainer(tmp_path)
    assert trainer.train(resume_from_checkpoint=True).global_step == 6
    assert trainer._initial_global_step == 6  # no batch was solved again
    assert contents(trainer, tmp_path) == whole["candidates"]


def test_how_rows_are_stored_and_calibrated_may_change(interrupted):
    trainer = trainer_for(tiny_model("olmoe"), interrupted, ROWS, config=dict(key_dtype="float16", confidence="rbf"))
    trainer.train(resume_from_checkpoint=str(interrupted / "out" / "checkpoint-5"))
    assert trainer.memory.layers[0].key_codes.dtype == torch.float16


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(whole, tmp_path, monkeypatch):
    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                monkeypatch.setattr(os, "fsync", full)

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="no space left for .*checkpoint-2 is whole") as error:
        new_trainer(tmp_path, callbacks=[Full()]).train()
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["checkpoint-2"]
    monkeypatch.undo()
    trainer = new_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert contents(trainer, tmp_path) == whole["candidates"]


def test_without_hard_links_checkpoints_are_copies(whole, tmp_path, monkeypatch):
    def no_links(*args, **kwargs):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(KeyboardInterrupt):
        new_trainer(tmp_path, callbacks=[At(5)], save_total_limit=1).train()
    shutil.move(tmp_path / "out" / "checkpoint-5", tmp_path / "moved")
    trainer = new_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert names(tmp_path) == ["checkpoint-6"]
    assert contents(trainer, tmp_path) == whole["candidates"]


@pytest.mark.slow
def test_a_build_that_is_killed_at_random_moments_ends_with_the_same_bytes(tmp_path):
    words = [sys.executable, "-m", "tests.training.killed_builds", str(tmp_path), "3", "24"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_a_build_that_lost_a_process_goes_on_in_any_number_of_processes(tmp_path):
    words = [sys.executable, "-m", "tests.training.resumed_in_processes", str(tmp_path)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
