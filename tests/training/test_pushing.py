"""What a trainer uploads and when, with each `hub_strategy`, to the Hub on loopback."""

import logging
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from transformers import TrainerCallback

from knnmoe_hf import RoutingMemory
from tests.memory.helpers import assert_same
from tests.support.models import tiny_model
from tests.support.training import trainer_for


class Checkpoints(TrainerCallback):
    """Writes a folder at each batch, and hands it to the trainer as a build's checkpoints are."""

    def __init__(self, place: Path):
        self.place, self.trainer, self.between = place, None, lambda: None

    def on_step_end(self, args, state, control, **kwargs):
        folder = self.place / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True)
        for step in range(1, state.global_step + 1):
            (folder / f"batches-{step}.safetensors").write_bytes(b"%d" % step * 1000)
        for name in ("trainer_state.json", "knnmoe_checkpoint.json"):
            (folder / name).write_text(str(state.global_step))
        self.trainer._push_from_checkpoint(str(folder))
        for path in folder.iterdir():  # as `save_total_limit` may
            path.unlink()
        self.between()


@pytest.fixture
def trained(tmp_path, hub):
    def train(during=lambda: None, **options):
        callback = Checkpoints(tmp_path / "checkpoints")
        options = dict(push_to_hub=True, hub_model_id="me/memory", save_strategy="no") | options
        trainer = trainer_for(tiny_model("olmoe"), tmp_path, trainer={"callbacks": [callback]}, **options)
        callback.trainer, callback.between = trainer, during
        trainer.train()
        return trainer

    return train


def titles(hub) -> list[str]:
    return [commit.title for commit in reversed(hub.commits("me/memory"))][1:]


def folders(hub) -> set[str]:
    return {name.partition("/")[0] for name in hub.files("me/memory") if "/" in name}


def test_end_uploads_when_it_is_saved(trained, hub):
    trainer = trained(hub_strategy="end")
    assert hub.files("me/memory") == {}
    trainer.save_model()
    assert titles(hub) == ["Model save"] and len(RoutingMemory.from_pretrained("me/memory")) == len(trainer.memory)


def test_every_save_uploads_the_memory_when_it_is_built(trained, hub, caplog):
    trainer = trained(hub_private_repo=True)
    assert titles(hub) == ["End of training"] and folders(hub) == set() and hub.repository("me/memory").private
    assert len(RoutingMemory.from_pretrained("me/memory")) == len(trainer.memory)
    assert "uploads checkpoints" not in caplog.text
    trainer.save_model()
    trainer.push_to_hub()
    assert titles(hub) == ["End of training"]  # nothing has changed


def test_checkpoint_keeps_the_last_one_in_one_folder(trained, hub, caplog):
    trained(hub_strategy="checkpoint", hub_always_push=True)
    steps = [f"Training in progress, step {step}, checkpoint" for step in (1, 2, 3)]
    assert titles(hub) == [*steps, "End of training"] and folders(hub) == {"last-checkpoint"}
    first, last = (hub.files("me/memory", hub.commits("me/memory")[at].oid) for at in (-2, 0))
    assert {name for name in first if name.endswith(".safetensors")} == {"last-checkpoint/batches-1.safetensors"}
    assert last["last-checkpoint/trainer_state.json"] == b"3"
    assert sum("batches" in name for name in last) == 3
    assert sum(line.startswith("PUT /lfs/") for line in hub.requests) == 4  # three segments, each once, and the memory
    (said,) = [record.getMessage() for record in caplog.records if "uploads checkpoints" in record.getMessage()]
    assert "text of the references" in said and "me/memory" in said


class Uploads(TrainerCallback):
    """Counts what a trainer begins to upload."""

    begun = 0

    def on_push_begin(self, args, state, control, **kwargs):
        self.begun += 1


def test_the_last_checkpoint_is_uploaded_once(tmp_path, hub):
    uploads = Uploads()
    options = dict(push_to_hub=True, hub_model_id="me/memory", hub_strategy="all_checkpoints", hub_always_push=True)
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, trainer={"callbacks": [uploads]}, save_steps=1, **options)
    trainer.train()
    assert uploads.begun == len(folders(hub)) + 1  # and the memory


def test_a_build_goes_on_from_a_checkpoint_that_was_uploaded(tmp_path, hub):
    options = dict(push_to_hub=True, hub_model_id="me/memory", hub_strategy="checkpoint", hub_always_push=True)
    whole = trainer_for(tiny_model("olmoe"), tmp_path / "whole", save_steps=1, **options)
    whole.train()
    second = next(c.oid for c in hub.commits("me/memory") if c.title == "Training in progress, step 2, checkpoint")
    place = dict(revision=second, allow_patterns="last-checkpoint/*", local_dir=tmp_path / "pulled")
    folder = Path(snapshot_download("me/memory", **place)) / "last-checkpoint"
    resumed = trainer_for(tiny_model("olmoe"), tmp_path / "resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder))
    assert_same(resumed.memory, whole.memory)


def test_a_folder_of_others_is_not_made_a_checkpoint(trained, hub, caplog):
    hub.create("me/memory")
    hub.commit("me/memory", {"last-checkpoint/model.safetensors": "theirs"})
    trained(hub_strategy="checkpoint")
    assert "last-checkpoint in the repository 'me/memory' is not a checkpoint of a build" in caplog.text
    assert hub.files("me/memory")["last-checkpoint/model.safetensors"] == b"theirs"


def test_all_checkpoints_stay(trained, hub):
    trained(hub_strategy="all_checkpoints", hub_always_push=True)
    assert folders(hub) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_a_checkpoint_is_left_out_while_another_is_on_its_way(trained, hub):
    built = threading.Event()
    hub.faults.before("POST .*/commit/", built.wait)
    steps = iter(range(3))
    trained(during=lambda: built.set() if next(steps) == 2 else None, hub_strategy="all_checkpoints")
    assert folders(hub) == {"checkpoint-1"} and titles(hub)[-1] == "End of training"


def test_a_failed_upload_loses_neither_the_build_nor_the_memory(trained, hub, caplog):
    with caplog.at_level(logging.ERROR):
        trainer = trained(during=hub.expire, hub_strategy="checkpoint", hub_always_push=True)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert any("a checkpoint was not uploaded: the Hub does not accept the login" in text for text in told)
    assert any("the memory is built but not uploaded: the Hub does not accept the login" in text for text in told)
    with pytest.raises(PermissionError, match="expired"):
        trainer.push_to_hub()
    hub.store.tokens[hub.token].expired = False
    trainer.push_to_hub()
    assert len(RoutingMemory.from_pretrained("me/memory")) == len(trainer.memory)
    assert not list(Path(trainer.args.output_dir).glob(".uploading-*"))


def test_a_push_need_not_be_waited_for(trained, hub):
    trainer = trained(hub_strategy="end")
    upload = trainer.push_to_hub(blocking=False, commit_message="later")
    assert isinstance(upload, Future) and upload.result().oid == hub.commits("me/memory")[0].oid
    assert titles(hub) == ["later"]


def test_a_push_states_more_for_the_card(trained, hub):
    trainer = trained(hub_strategy="end")
    trainer.push_to_hub(license="cc-by-4.0")
    assert "cc-by-4.0" in hub.files("me/memory")["README.md"].decode()


def test_a_login_that_may_not_write_is_told_before_the_build(tmp_path, hub):
    options = dict(push_to_hub=True, hub_model_id="me/memory", hub_token=hub.read_only_token)
    with pytest.raises(PermissionError, match="'me/memory' cannot be written to"):
        trainer_for(tiny_model("olmoe"), tmp_path, **options)
