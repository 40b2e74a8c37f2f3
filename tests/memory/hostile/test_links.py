"""Links, pipes and leftovers in a stranger's memory: nothing outside of its folder is read, moved or deleted."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from knnmoe_hf import RoutingMemory
from knnmoe_hf.files import file_digest
from tests.memory.helpers import edit_config, refused
from tests.memory.hostile.helpers import CONFIG, FILES, place

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and alarms")
READ_BY_SOME_TOKENIZERS = ["vocab.txt", "spiece.model", "added_tokens.json", "additional_chat_templates/a.jinja"]


# not regular files


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_in_place_of_a_file_is_refused(folder, name, relative):
    path = place(folder, name)
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to("../elsewhere" if relative else folder.parent / "elsewhere")
    refused(folder, path.name, "symbolic link")


@pytest.mark.parametrize("name", [*FILES, *READ_BY_SOME_TOKENIZERS])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(folder, name):
    path = place(folder, name)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    refused(folder, path.name, "not a regular file")


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_refused(folder, name):
    path = place(folder, name)
    path.unlink()
    path.mkdir()
    refused(folder, path.name)


@pytest.mark.parametrize("name", READ_BY_SOME_TOKENIZERS)
def test_a_link_that_a_tokenizer_may_follow_is_refused(folder, victim, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(victim)
    refused(folder, name, "symbolic link")


def test_a_folder_of_templates_that_is_a_link_is_refused(folder, tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "a.jinja").write_text("x")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    refused(folder, "additional_chat_templates", "symbolic link")


def test_a_device_that_never_ends_is_refused(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/dev/zero")
    refused(folder, CONFIG)


# a snapshot in the cache of huggingface_hub


def as_snapshot(folder: Path, cache: Path, subfolder: str = "") -> Path:
    """The memory as `snapshot_download` leaves it."""
    storage = cache / "models--me--memory"
    snapshot, blobs = storage / "snapshots" / ("0" * 40), storage / "blobs"
    (snapshot / subfolder).mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        link = snapshot / subfolder / path.name
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot / subfolder


@pytest.mark.parametrize("subfolder", ["", "memories", "memories/medicine"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_snapshot_s_links_into_its_blobs_are_followed(folder, tmp_path, subfolder, linked):
    snapshot = as_snapshot(folder, tmp_path / "hub", subfolder)
    if linked:  # a cache on another disk
        (tmp_path / "home").symlink_to(tmp_path / "hub")
        snapshot = tmp_path / "home" / snapshot.relative_to(tmp_path / "hub")
    opened = RoutingMemory.from_pretrained(snapshot)
    assert len(opened) == 40 and opened.tokenizer is not None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("target", ["outside", "another repository", "a link among the blobs", "above the blobs"])
def test_a_snapshot_s_other_links_are_refused(folder, tmp_path, name, target):
    snapshot = as_snapshot(folder, tmp_path / "hub")
    link, storage = place(snapshot, name), tmp_path / "hub" / "models--me--memory"
    targets = {
        "outside": tmp_path / "elsewhere",
        "another repository": tmp_path / "hub" / "models--me--other" / "blobs" / "x",
        "a link among the blobs": storage / "blobs" / "x",
        "above the blobs": storage / "x",
    }
    content = link.read_bytes()
    link.unlink()
    targets[target].parent.mkdir(parents=True, exist_ok=True)
    if target == "a link among the blobs":
        (tmp_path / "elsewhere").write_bytes(content)
        targets[target].symlink_to(tmp_path / "elsewhere")
    else:
        targets[target].write_bytes(content)
    link.symlink_to(os.path.relpath(targets[target], link.parent))
    refused(snapshot, link.name, "symbolic link")


# what an interrupted save leaves, which moves and deletes files when a memory is opened


def leave(folder: Path, gone, files=("README.md",)) -> Path:
    committed = folder / ".knnmoe-committed"
    committed.mkdir()
    for name in files:
        shutil.copy(folder / name, committed / name)
    (committed / ".gone.json").write_text(json.dumps(gone))
    return committed


@pytest.mark.parametrize("gone", [["../victim"], ["x/../../victim"], "absolute", [3], {"a": 1}, 3, None, [["x"]]])
def test_a_leftover_deletes_nothing_outside_of_the_folder(folder, victim, gone):
    leave(folder, [str(victim)] if gone == "absolute" else gone)
    refused(folder, ".knnmoe-committed", "delete it")


def test_a_leftover_deletes_nothing_through_a_linked_folder(folder, victim):
    (folder / "x").symlink_to(victim.parent)
    leave(folder, ["x/victim"])
    refused(folder, ".knnmoe-committed", "symbolic link")


def test_a_leftover_writes_nothing_through_a_linked_folder(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (folder / "x").symlink_to(tmp_path / "other")
    committed = leave(folder, [])
    (committed / "x").mkdir()
    (committed / "x" / "new").write_text("")
    refused(folder, ".knnmoe-committed", "symbolic link")
    assert not list((tmp_path / "other").iterdir())


def test_a_leftover_that_is_a_link_moves_nothing(folder, tmp_path, victim):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ".gone.json").write_text("[]")
    (tmp_path / "work" / "thesis.txt").write_text("")
    (folder / ".knnmoe-committed").symlink_to(tmp_path / "work")
    refused(folder, ".knnmoe-committed")
    assert (tmp_path / "work" / "thesis.txt").exists()


@pytest.mark.parametrize("name", [".gone.json", "README.md"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_leftover_of_other_than_files_is_refused_at_once(folder, victim, name, kind):
    path = leave(folder, []) / name
    path.unlink()
    path.symlink_to(victim) if kind == "link" else os.mkfifo(path)
    refused(folder, ".knnmoe-committed", "neither a file nor a folder")


def test_a_leftover_whose_deletion_was_interrupted_is_no_error(folder):
    (folder / ".knnmoe-committed" / "x").mkdir(parents=True)
    RoutingMemory.from_pretrained(folder)
    assert not (folder / ".knnmoe-committed").exists()


def test_a_later_save_deletes_nothing_that_a_manifest_names_outside(memory, folder, victim):
    digests = {"../victim": file_digest(victim)}
    edit_config(folder, lambda config: config["memory"]["digests"].update(digests))
    refused(folder, CONFIG, "digests")
    memory.save_pretrained(folder, overwrite=True)
