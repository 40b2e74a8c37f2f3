"""A save writes over no file but its own, and deletes none of the user's, unless it is told to."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from knnmoe_hf import RoutingMemory
from tests.memory.helpers import assert_same, contents, edit_config, full_memory, shards, tiny_tokenizer
from tests.memory.manifest.helpers import as_version_3
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def memory():
    return full_memory(tiny_model("olmoe"), tokenizer=tiny_tokenizer())


@pytest.fixture
def folder(memory, tmp_path) -> Path:
    memory.save_pretrained(tmp_path / "memory")
    return tmp_path / "memory"


def refused(memory, folder, *words) -> None:
    """The save fails in one sentence with the way out, and nothing in the folder changes."""
    before = contents(folder) if folder.is_dir() else folder.read_bytes()
    with pytest.raises(FileExistsError) as caught:
        memory.save_pretrained(folder)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    assert (contents(folder) if folder.is_dir() else folder.read_bytes()) == before
    assert not list(folder.glob(".knnmoe*")) if folder.is_dir() else True


OVERWRITE = ("overwrite=True", "--overwrite")


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_was_there_before_is_not_written_over(memory, tmp_path, name):
    (tmp_path / name).write_text("mine")
    refused(memory, tmp_path, name, *OVERWRITE)
    assert contents(tmp_path).keys() == {name}
    memory.save_pretrained(tmp_path, overwrite=True)
    assert_same(RoutingMemory.from_pretrained(tmp_path), memory)
    assert (tmp_path / name).read_text() != "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json", "added_tokens.json"])
def test_a_part_of_another_tokenizer_that_the_memory_would_read_is_refused(memory, tmp_path, name, overwrite):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} in .* part of the memory's tokenizer: name another folder"):
        memory.save_pretrained(tmp_path, overwrite=overwrite)
    assert contents(tmp_path).keys() == {name}
    replace(memory, tokenizer=None).save_pretrained(tmp_path)  # nothing reads it then


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json"])
def test_an_own_file_that_was_edited_since_is_the_user_s(memory, folder, name):
    (folder / name).write_text((folder / name).read_text() + "\n")
    refused(memory, folder, name, *OVERWRITE)
    memory.save_pretrained(folder, overwrite=True)
    memory.save_pretrained(folder)  # it is its own again


def test_a_file_of_the_same_bytes_is_no_loss(memory, tmp_path):
    memory.tokenizer.save_pretrained(tmp_path)
    memory.save_pretrained(tmp_path)
    assert_same(RoutingMemory.from_pretrained(tmp_path), memory)


def test_a_memory_of_the_same_model_is_replaced(memory, folder):
    other = full_memory(tiny_model("olmoe"), examples=(7, 8), seed=4, tokenizer=tiny_tokenizer("other words"))
    other.save_pretrained(folder)
    assert_same(RoutingMemory.from_pretrained(folder), other)
    assert len(shards(folder)) == 1


def test_a_memory_of_another_base_model_is_not_replaced(memory, folder):
    for other in (tiny_model("olmoe", seed=9), tiny_model("gpt_oss")):
        refused(full_memory(other), folder, "memory of another base model", *OVERWRITE)
    full_memory(other).save_pretrained(folder, overwrite=True)
    assert RoutingMemory.from_pretrained(folder).origin.base_model_class == type(other).__name__
    assert len(shards(folder)) == 1


def test_the_base_model_in_another_dtype_is_the_same_model(memory, folder):
    full_memory(tiny_model("olmoe").bfloat16().float()).save_pretrained(folder)


def test_the_folder_of_a_model_is_refused_and_that_of_the_base_model_always(tmp_path):
    base, other = tiny_model("olmoe"), tiny_model("olmoe", seed=2)
    for name, model in (("base", base), ("other", other)):
        model.save_pretrained(tmp_path / name)
    base.config.name_or_path = str(tmp_path / "base")
    memory = full_memory(base)
    refused(memory, tmp_path / "other", "config.json", "of another model", *OVERWRITE)
    memory.save_pretrained(tmp_path / "other", overwrite=True)
    assert_same(RoutingMemory.from_pretrained(tmp_path / "other"), memory)
    (tmp_path / "link").symlink_to(tmp_path / "base")
    before = contents(tmp_path / "base")
    for place in ("base", "link", "base/../base"):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="the folder of the base model, which the memory needs"):
                memory.save_pretrained(tmp_path / place, overwrite=overwrite)
    assert contents(tmp_path / "base") == before


def test_the_folder_of_an_adapter_is_refused(memory, tmp_path):
    get_peft_model(tiny_model("olmoe"), LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink(missing_ok=True)  # without which no file would be written over
    refused(memory, tmp_path, "adapter_config.json", *OVERWRITE)


@pytest.mark.parametrize("text", ["{broken", "[]", '{"model_type": "knn_moe"}', '{"model_type": "bert"}', ""])
def test_a_config_that_cannot_be_known_is_not_replaced(memory, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refused(memory, tmp_path, "config.json", *OVERWRITE)


def test_a_memory_of_an_older_version_recorded_no_digests_and_is_asked_about(memory, folder):
    edit_config(folder, as_version_3)
    memory.save_pretrained(folder)  # the same bytes
    edit_config(folder, as_version_3)
    smaller = memory.remove_examples([0])
    refused(smaller, folder, "README.md", *OVERWRITE)
    smaller.save_pretrained(folder, overwrite=True)
    memory.save_pretrained(folder)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["file", "file/below", "broken link"])
def test_a_file_in_place_of_the_folder_is_never_replaced(memory, tmp_path, place, overwrite):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="is a file where a folder is needed: name another") as caught:
        memory.save_pretrained(tmp_path / place, overwrite=overwrite)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "broken link").is_symlink()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_place_of_a_file_is_never_replaced(memory, tmp_path, overwrite):
    (tmp_path / "README.md").mkdir()
    with pytest.raises(FileExistsError, match="README.md in .* is a folder where a file is needed"):
        memory.save_pretrained(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_file_in_place_of_a_folder_of_the_tokenizer_is_never_replaced(memory, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    (tmp_path / "additional_chat_templates").write_text("mine")
    with pytest.raises(FileExistsError, match="additional_chat_templates in .* is a file where a folder is needed"):
        replace(memory, tokenizer=tokenizer).save_pretrained(tmp_path, overwrite=True)
    assert (tmp_path / "additional_chat_templates").read_text() == "mine"


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "config.json"])
def test_what_a_link_leads_to_is_not_touched(memory, folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    refused(memory, folder, name, *OVERWRITE)
    memory.remove_examples([0]).save_pretrained(folder, overwrite=True)
    assert (tmp_path / "elsewhere").read_bytes() == before and not (folder / name).is_symlink()


def test_a_folder_behind_a_link_is_a_folder(memory, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for _ in range(2):
        memory.save_pretrained(tmp_path / "link")
    assert_same(RoutingMemory.from_pretrained(tmp_path / "disk"), memory)


def test_the_user_s_files_are_never_deleted(memory, folder):
    """Neither files beside the memory, nor its own files that were edited, nor what looks like one of its shards."""
    bare = replace(memory, tokenizer=None)
    shard = "memory-0123456789abcdef.safetensors"
    mine = ["notes.txt", "tokenizer.json", shard, "memory.safetensors.index.json"]
    for name in mine:
        (folder / name).write_text("mine")
    bare.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir() if path.read_bytes() == b"mine") == sorted(mine)
    assert not (folder / "tokenizer_config.json").exists()  # its own


def test_an_index_of_the_user_s_is_not_written_over(memory, tmp_path):
    (tmp_path / "memory.safetensors.index.json").write_text("mine")
    with pytest.raises(FileExistsError, match="memory.safetensors.index.json"):
        memory.save_pretrained(tmp_path, max_shard_size=3000)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.safetensors.index.json"]
    memory.save_pretrained(tmp_path, max_shard_size=3000, overwrite=True)
    memory.save_pretrained(tmp_path)  # the index is its own now, and not needed any more
    assert not (tmp_path / "memory.safetensors.index.json").exists()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(memory, tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError):
        memory.save_pretrained(tmp_path / "out")
