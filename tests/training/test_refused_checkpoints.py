"""Checkpoints of another build or trainer, broken or hostile ones: each is refused in one sentence and stays."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from knnmoe_hf.errors import MemoryFileError
from knnmoe_hf.training.checkpoints import CHECKPOINT_FILE, checkpoints_of, read_checkpoint
from knnmoe_hf.training.starting import Identity, take_up
from tests.support.models import tiny_model
from tests.support.training import examples, trainer_for
from tests.training.checkpoints import ROWS, At, names, new_trainer

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
        (tmp_path / "out" / "checkpoint-7", "is not a checkpoint of a build"),
        ("nowhere", "'nowhere' is not a folder"),
    ):
        with pytest.raises(ValueError, match=said):
            new_trainer(tmp_path).train(resume_from_checkpoint=given)
    new_trainer(tmp_path, save_total_limit=1).train()
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-7"]


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
    with pytest.raises(FileExistsError, match="has checkpoint-2, which is not a checkpoint of a memory's build"):
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
