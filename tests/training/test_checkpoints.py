"""Checkpoints of a build: where they are written, what goes on from them, and what is refused."""

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
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from knnmoe_hf import detach_memory
from knnmoe_hf.errors import MemoryFileError
from knnmoe_hf.training.checkpoints import CHECKPOINT_FILE, checkpoints_of, read_checkpoint
from knnmoe_hf.training.starting import Identity, take_up
from tests.support.models import tiny_model
from tests.support.training import examples, trainer_for

ROOT = Path(__file__).parents[2]
ROWS = [*examples(5), {"input_ids": [1, 2, 3, 4], "labels": [-100] * 4}, {"input_ids": [5]}, *examples(4, seed=5)]
"""Six batches of two, of which the fourth begins with examples without a target."""


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class At(TrainerCallback):
    """Raises an error at the end of a step, or where something is logged."""

    def __init__(self, step: int | None = None, log: str = "", error: BaseException | None = None):
        self.step, self.log, self.error = step, log, error if error is not None else KeyboardInterrupt()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.log and self.log in (logs or {}):
            raise self.error


def new_trainer(folder: Path, rows=None, callbacks=(), trainer: dict | None = None, **arguments):
    options = dict(save_steps=2) | arguments
    if isinstance(rows, Stream):
        options.setdefault("max_steps", 9)
    rows = ROWS if rows is None else rows
    return trainer_for(
        tiny_model("olmoe"), folder, rows, trainer=dict(callbacks=list(callbacks)) | (trainer or {}), **options
    )


def contents(trainer, folder: Path) -> dict[str, bytes]:
    trainer.save_model(folder / "memory")
    detach_memory(trainer.model)
    return {path.name: path.read_bytes() for path in sorted((folder / "memory").iterdir())}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())


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


@pytest.fixture
def interrupted(tmp_path) -> Path:
    """A folder in which a build was interrupted after five of its six batches."""
    with pytest.raises(KeyboardInterrupt):
        new_trainer(tmp_path, callbacks=[At(5)]).train()
    return tmp_path


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


OTHER = {
    "is of other data": dict(rows=[*ROWS[:3], *examples(1, seed=9), *ROWS[4:]]),
    "its 5 batches are not the first": dict(rows=ROWS[:8]),
    "with builder='candidates', and this build has 'search'": dict(builder="search"),
    "with builder_steps=4, and this build has 5": dict(builder_steps=5),
    "with per_device_train_batch_size=2, and this build has 3": dict(per_device_train_batch_size=3),
    "has 5 batches where max_steps allows 4": dict(max_steps=4),
}


@pytest.mark.parametrize("said", OTHER)
def test_a_checkpoint_of_another_build_is_refused_and_stays(interrupted, said):
    before = names(interrupted)
    with pytest.raises(ValueError, match=said) as error:
        new_trainer(interrupted, **OTHER[said]).train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert names(interrupted) == before


def test_a_checkpoint_of_other_weights_or_layers_is_refused(interrupted):
    trainer = new_trainer(interrupted)
    with torch.no_grad():
        trainer.model.model.layers[1].self_attn.q_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="is of a model with other weights, dtypes or adapters"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is of other layers than this build"):
        trainer_for(tiny_model("olmoe"), interrupted, ROWS, dict(layers=[1])).train(resume_from_checkpoint=True)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)  # of another trainer
    for given, said in (
        (True, "has no checkpoint of a build"),
        (tmp_path / "out" / "checkpoint-7", "is no checkpoint of a build"),
        ("nowhere", "'nowhere' is no folder"),
    ):
        with pytest.raises(ValueError, match=said):
            new_trainer(tmp_path).train(resume_from_checkpoint=given)
    new_trainer(tmp_path, save_total_limit=1).train()
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-7"]


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


def edit(path: Path, **changes) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | changes))


def overwrite(checkpoint: Path, tensor: str, value: float) -> None:
    """Puts a value into the first row of a tensor of the first segment, and the right digest into the JSON."""
    import hashlib

    content = json.loads((checkpoint / CHECKPOINT_FILE).read_text())
    path = checkpoint / content["segments"][0]["name"]
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + length])[tensor]
    dtype = dict(F32=torch.float32, I64=torch.int64, I32=torch.int32, F64=torch.float64)[about["dtype"]]
    place = 8 + length + about["data_offsets"][0]
    data[place : place + dtype.itemsize] = torch.tensor([value]).to(dtype).view(torch.uint8).numpy().tobytes()
    path.unlink()
    path.write_bytes(data)
    content["segments"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    (checkpoint / CHECKPOINT_FILE).write_text(json.dumps(content))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def first_segment(checkpoint: Path) -> Path:
    return sorted(checkpoint.glob("*.safetensors"))[0]


def of_segment(checkpoint: Path, **changes) -> None:
    content = json.loads((checkpoint / CHECKPOINT_FILE).read_text())
    content["segments"][0] |= changes
    (checkpoint / CHECKPOINT_FILE).write_text(json.dumps(content))


BREAKS = {
    "no JSON": lambda c: (c / CHECKPOINT_FILE).write_text("{"),
    "another format": lambda c: edit(c / CHECKPOINT_FILE, format=2),
    "an unknown entry": lambda c: edit(c / CHECKPOINT_FILE, more=1),
    "more batches than in its segments": lambda c: edit(c / CHECKPOINT_FILE, batches=99),
    "a step that is none": lambda c: edit(c / CHECKPOINT_FILE, step=-1),
    "layers that are none": lambda c: edit(c / CHECKPOINT_FILE, layers={"0": [2**62, 1]}),
    "no segments": lambda c: edit(c / CHECKPOINT_FILE, segments={}),
    "a path out of the folder": lambda c: of_segment(c, name="../batches-0-2.safetensors"),
    "a huge count": lambda c: of_segment(c, rows=2**47),
    "a negative count": lambda c: of_segment(c, tokens=-1),
    "a wrong digest": lambda c: of_segment(c, sha256="0" * 64),
    "a dtype that is none": lambda c: of_segment(c, key_dtype={"0": "I8", "1": "I8"}),
    "a truncated segment": lambda c: os.truncate(first_segment(c), 999),
    "an overlong segment": lambda c: os.truncate(first_segment(c), 99999),
    "a missing segment": lambda c: first_segment(c).unlink(),
    "a pipe": lambda c: fifo(first_segment(c)),
    "a pipe as JSON": lambda c: fifo(c / CHECKPOINT_FILE),
    "a symbolic link": lambda c: linked(first_segment(c)),
    "a key that is not a number": lambda c: overwrite(c, "keys.0", float("nan")),
    "a value that is infinite": lambda c: overwrite(c, "values.1", float("inf")),
    "an NLL that is not a number": lambda c: overwrite(c, "rows.nll_before", float("nan")),
    "a row of another example": lambda c: overwrite(c, "rows.example_ids", 77),
    "a position outside of the example": lambda c: overwrite(c, "rows.positions", 9),
    "a negative count of rows": lambda c: overwrite(c, "batches.rows", -1),
    "too many rows of a batch": lambda c: overwrite(c, "batches.rows", 2**62),
    "examples without tokens": lambda c: overwrite(c, "examples.lengths", 0),
    "a token that the model has not": lambda c: overwrite(c, "examples.input_ids", 96),
    "a label that the model has not": lambda c: overwrite(c, "examples.labels", -7),
    "no state of a trainer": lambda c: (c / "trainer_state.json").write_text("[]"),
    "a state without numbers": lambda c: edit(c / "trainer_state.json", epoch="one"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    with pytest.raises(KeyboardInterrupt):
        new_trainer(folder, callbacks=[At(5)]).train()
    return folder / "out" / "checkpoint-5"


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_or_hostile_checkpoint_is_refused_in_one_sentence(good, tmp_path, what):
    checkpoint = tmp_path / "out" / "checkpoint-5"
    shutil.copytree(good, checkpoint)
    BREAKS[what](checkpoint)
    known = read_checkpoint(good)
    with pytest.raises(MemoryFileError) as error:
        take_up(checkpoint, tmp_path, Identity(known.model, known.options, known.layers), -1, 96)
    assert "\n" not in str(error.value) and str(error.value).endswith("."), error.value


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


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_the_checkpoint_of_another_trainer_is_not_written_over(tmp_path, what):
    place, kept = tmp_path / "out" / "checkpoint-2", tmp_path / "kept"
    place.parent.mkdir()
    kept.mkdir()
    if what == "file":
        place.write_text("mine")
    else:
        place.mkdir() if what == "folder" else place.symlink_to(kept)
        (place / "model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="has checkpoint-2, which is no checkpoint of a memory's build"):
        new_trainer(tmp_path).train()
    assert (place if what == "file" else place / "model.safetensors").read_text() == "mine"
    new_trainer(tmp_path, save_strategy="no").train()


@pytest.mark.parametrize("name", ["segment", "trainer_state.json", "knnmoe_checkpoint.json"])
def test_a_checkpoint_that_lacks_a_file_says_what_to_do_about_checkpoints(interrupted, name):
    path = checkpoints_of(interrupted / "out")[-1]
    path = next(path.glob("*.safetensors")) if name == "segment" else path / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError) as error:
        new_trainer(interrupted).train(resume_from_checkpoint=path.parent)
    assert "the memory again" not in str(error.value) and str(error.value).endswith(".")
