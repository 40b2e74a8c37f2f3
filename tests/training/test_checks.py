"""What can be known before a build is found before it: nothing was tokenised, optimised or written then."""

import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, RoutingMemory
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.training import checks, row_files
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer
from tests.support.training import examples, trainer_for


@pytest.fixture
def olmoe():
    return tiny_model("olmoe")


class Untouched(list):
    """Examples that fail the test when one is read."""

    def __getitem__(self, index):
        pytest.fail("an example was read")


def refused(model, folder, *words, error=ValueError, **options) -> None:
    """Making the trainer fails in one sentence that has these words, before an example is read."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(error) as caught:
        trainer_for(model, folder, Untouched(examples()), **options)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    assert sorted(folder.rglob("*")) == before


# widths


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(num_candidates=9), ("num_candidates=9", "8 experts")),
        (dict(num_candidates=1), ("num_candidates=1", "top-k, 2")),
        (dict(num_layers=3), ("num_layers=3", "2 layers")),
        (dict(num_layers=2, config=dict(layers=[1])), ("num_layers=2", "1 layers")),
        (dict(config=dict(layers=[2])), ("[2] have no gate", "[0, 1]")),
        (dict(config=dict(value_space="assignment", routing_width=9)), ("routing_width=9", "8 experts")),
    ],
    ids=str,
)
def test_widths_that_the_model_does_not_have(model, tmp_path, options, words):
    refused(model, tmp_path, *words, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(num_candidates=8),
        dict(num_candidates=2),
        dict(num_layers=2),
        dict(config=dict(value_space="assignment", routing_width=8)),
        dict(config=dict(value_space="assignment", routing_width="union")),
        dict(config=dict(key_dim=1000, value_experts=1000)),  # cut to what there is, as KNNMoEConfig says
    ],
    ids=str,
)
def test_the_widest_that_the_model_has_is_allowed(olmoe, tmp_path, options):
    trainer_for(olmoe, tmp_path, **options)


# names


@pytest.mark.parametrize("name", ["me/my memory", "a/b/c", "-x", "über"])
def test_names_that_no_repository_has(olmoe, tmp_path, name):
    refused(olmoe, tmp_path, repr(name), "is not a name of a repository", hub_model_id=name)


def test_the_name_of_the_folder_is_checked_if_it_will_be_the_repository_s(olmoe, tmp_path):
    refused(olmoe, tmp_path, "'my memory'", "not a name of a repository", push_to_hub=True, output_dir="my memory")


@pytest.mark.parametrize("name", [None, 3, b"law"])
def test_a_memory_needs_a_name_of_text(olmoe, tmp_path, name):
    refused(olmoe, tmp_path, f"memory_name={name!r}", error=TypeError, trainer=dict(memory_name=name))


def test_a_push_that_will_fail_is_refused_before_the_build(olmoe, tmp_path):
    options = dict(push_to_hub=True, hub_model_id="me/memory")  # tests run without a login
    refused(olmoe, tmp_path, "'me/memory' cannot be", error=OSError, **options)


# the folder


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json"])
def test_a_save_that_would_be_refused_is_refused_before_the_build(tmp_path, name):
    olmoe = tiny_model("olmoe", vocab_size=260, max_position_embeddings=512)  # for the tokenizer's background text
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    options = dict(trainer=dict(processing_class=byte_tokenizer()))
    refused(olmoe, tmp_path, name, "overwrite=True", error=FileExistsError, **options)
    trainer = trainer_for(olmoe, tmp_path, overwrite=True, **options)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / name).read_text() != "mine"
    trainer_for(olmoe, tmp_path, **options)  # the memory's own now


def test_the_folder_of_another_model_a_memory_of_another_one_or_that_of_the_base_model(olmoe, tmp_path):
    other = tiny_model("olmoe", seed=5)
    other.save_pretrained(tmp_path / "out")
    refused(olmoe, tmp_path, "config.json", "of another model", error=FileExistsError)
    other.config.name_or_path = str(tmp_path / "out")
    refused(other, tmp_path, "the folder of the base model", overwrite=True)
    shutil.rmtree(tmp_path / "out")
    other.config.name_or_path = ""
    trainer = trainer_for(other, tmp_path)
    trainer.train()
    trainer.save_model()
    refused(olmoe, tmp_path, "memory of another base model", error=FileExistsError)
    trainer_for(other, tmp_path)


@pytest.mark.parametrize("place", ["out", "out/below"])
def test_a_file_in_place_of_the_folder(olmoe, tmp_path, place):
    (tmp_path / "out").write_text("mine")
    refused(olmoe, tmp_path, "is a file", error=FileExistsError, output_dir=str(tmp_path / place), overwrite=True)


@pytest.mark.skipif(sys.platform != "linux", reason="no file can be made in /proc, by root either")
def test_a_folder_that_cannot_be_written_to(olmoe, tmp_path):
    for place in ("/proc", "/proc/new/memory"):
        refused(olmoe, tmp_path, place, "cannot be written to", error=PermissionError, output_dir=place)


def test_a_trainer_that_builds_nothing_does_not_mind(olmoe, tmp_path):
    args = trainer_for(olmoe, tmp_path).args
    Path(args.output_dir).mkdir(exist_ok=True)
    (Path(args.output_dir) / "README.md").write_text("mine")
    trainer = KNNMoETrainer(model=olmoe, args=args, eval_dataset=examples())
    assert trainer.evaluate()["eval_loss"] > 0


# the tokenizer and the background text


class Sealed(type(byte_tokenizer())):
    """A tokenizer that cannot be saved."""

    def save_pretrained(self, *args, **kwargs):
        raise RuntimeError("first line\nsecond line")


def test_a_tokenizer_that_cannot_be_saved(olmoe, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.__class__ = Sealed
    for given in (tokenizer, object()):
        words = (type(given).__name__, "cannot be saved with a memory")
        refused(olmoe, tmp_path, *words, trainer=dict(processing_class=given))


def test_background_text_without_a_target(olmoe, tmp_path):
    one = {"input_ids": [3], "labels": [3]}
    for texts, words in (([one], "has no text"), ({"law": [one], "ok": examples()}, "'law'"), ({}, "no text")):
        with pytest.raises(ValueError, match=f"^ordinary_dataset.*{words}"):
            trainer_for(olmoe, tmp_path, trainer=dict(ordinary_dataset=texts))


# the disk


def with_free(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(free, 0, free))


def test_rows_that_do_not_fit_on_the_disk(olmoe, tmp_path, monkeypatch):
    rows = 5 * 8  # targets of `examples()`
    needed = checks.build_bytes(rows, KNNMoEConfig(key_codec="raw", key_dtype="float32"), find_gates(olmoe))
    with_free(monkeypatch, needed // 2)
    with pytest.raises(OSError, match="MB free where the build of 40 reference tokens needs .* MB") as caught:
        trainer_for(olmoe, tmp_path)
    assert "\n" not in str(caught.value) and "output_dir" in str(caught.value)
    trainer_for(olmoe, tmp_path, max_steps=1, save_strategy="no")  # two of the five examples
    with_free(monkeypatch, int(1.2 * needed))
    trainer_for(olmoe, tmp_path, save_strategy="no")
    with pytest.raises(OSError, match="MB free"):  # a checkpoint needs room for them once more
        trainer_for(olmoe, tmp_path)


def test_the_estimate_is_what_a_build_writes(olmoe, tmp_path, monkeypatch):
    written = []

    class Counted(row_files.RowFile):
        def append(self, rows):
            super().append(rows)
            written.append(rows.nbytes)

    monkeypatch.setattr("knnmoe_hf.training.rows.RowFile", Counted)
    trainer = trainer_for(olmoe, tmp_path, config=dict(confidence="rbf"))
    trainer.train()
    stored = sum(tensor.nbytes for rows in trainer.memory.layers.values() for tensor in rows.tensors().values())
    estimate = checks.build_bytes(40, trainer.memory_config, find_gates(olmoe))
    assert sum(written) + stored <= estimate <= 1.05 * (sum(written) + stored)


# what is saved and pushed


@pytest.fixture
def trained(olmoe, tmp_path):
    def train(**options):
        trainer = trainer_for(olmoe, tmp_path, overwrite=True, **options)
        trainer.train()
        return trainer

    return train


@pytest.mark.parametrize("level", ["text", "ids", "none"])
def test_a_trainer_saves_what_its_arguments_say_and_pushes_text_only_by_name(trained, tmp_path, hub, level):
    trainer = trained(save_provenance=level)
    trainer.save_model()
    assert level_of(RoutingMemory.from_pretrained(tmp_path / "out")) == level
    assert not hub.store.repositories
    for asked in (None, "text", "ids", "none"):
        commit = trainer.push_to_hub(provenance=asked)
        pushed = RoutingMemory.from_pretrained("me/out", revision=commit.oid)
        assert level_of(pushed) == (asked or ("none" if level == "none" else "ids"))
    assert trainer.memory.provenance.has_text


def test_saving_pushes_ids_as_well_if_the_arguments_say_so(trained, tmp_path, hub):
    trainer = trained(push_to_hub=True, hub_model_id="me/memory")
    trainer.save_model()
    assert level_of(RoutingMemory.from_pretrained("me/memory")) == "ids"
    assert level_of(RoutingMemory.from_pretrained(tmp_path / "out")) == "text"


def level_of(memory: RoutingMemory) -> str:
    if memory.provenance is None:
        return "none"
    return "text" if memory.provenance.has_text else "ids"


def test_a_tokenizer_of_another_model_is_told_before_its_background_text_runs(olmoe, tmp_path):
    trainer = trainer_for(olmoe, tmp_path, trainer=dict(processing_class=byte_tokenizer()))  # the model has 96 tokens
    with pytest.raises(ValueError, match="^row 0 of background text of this machine.*96"):
        trainer.train()


def test_processes_that_do_not_know_of_each_other_build_nothing(olmoe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as under torchrun without an accelerator
    with pytest.raises(ValueError, match="2 processes were launched, and the arguments know of 1.*use_cpu=True"):
        trainer_for(olmoe, tmp_path)
