"""Pushes over real HTTP: one commit that replaces an earlier memory and nothing else; checks before a build."""

import re

import pytest
from huggingface_hub import CommitInfo, HfApi, snapshot_download

from knnmoe_hf import RoutingMemory
from knnmoe_hf.memory import hub as pushing
from knnmoe_hf.memory.levels import at_level
from tests.memory.helpers import assert_same, full_memory, tiny_tokenizer
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def memory():
    return full_memory(tiny_model("olmoe"), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("place", ["", "sub", "a/b"])
def test_a_memory_is_pushed_again_and_again_by_one_commit_each(memory, hub, place):
    first = memory.push_to_hub("memory", path_in_repo=place, private=True, commit_message="the first")
    assert isinstance(first, CommitInfo) and hub.repository("me/memory").private
    fewer = memory.remove_examples([0])
    second = fewer.push_to_hub("me/memory", path_in_repo=f"/{place}/")
    commits = hub.commits("me/memory")
    assert [c.oid for c in commits[:2]] == [second.oid, first.oid] and len(commits) == 3  # with the Hub's own first
    assert [c.title for c in commits[:2]] == ["Upload routing memory", "the first"]
    for commit, whole in [(first, memory), (second, fewer)]:
        pulled = RoutingMemory.from_pretrained("me/memory", subfolder=place, revision=commit.oid)
        assert_same(pulled, at_level(whole, "ids"))
        shards = [name for name in hub.files("me/memory", commit.oid) if name.endswith(".safetensors")]
        assert len(shards) == 1  # that of the earlier memory is gone in the same commit


def test_a_push_of_the_same_memory_makes_no_commit(memory, hub):
    first = memory.push_to_hub("memory")
    assert memory.push_to_hub("memory").oid == first.oid
    assert len(hub.commits("me/memory")) == 2


def test_files_of_an_earlier_memory_go_with_it_and_others_stay(hub):
    model = tiny_model("olmoe")
    full_memory(model, tokenizer=tiny_tokenizer()).push_to_hub("memory", max_shard_size="4KB", path_in_repo="m")
    assert "m/tokenizer.json" in hub.files("me/memory") and "m/memory.safetensors.index.json" in hub.files("me/memory")
    hub.commit("me/memory", {"LICENSE": "mine", "m/notes.md": "mine", "other/config.json": "{}"})
    full_memory(model).push_to_hub("memory", path_in_repo="m")
    names = {re.sub("[0-9a-f]{16}", "*", name) for name in hub.files("me/memory")}
    assert {
        "LICENSE",
        "m/notes.md",
        "other/config.json",
        "m/config.json",
        "m/README.md",
        "m/memory-*.safetensors",
    } <= names
    assert not {name for name in names if "token" in name or "index" in name}


def test_a_branch_is_made_where_there_is_none(memory, hub):
    memory.push_to_hub("memory")
    memory.remove_examples([0]).push_to_hub("memory", revision="fewer/rows")
    assert len(RoutingMemory.from_pretrained("me/memory", revision="fewer/rows")) == 30
    assert len(RoutingMemory.from_pretrained("me/memory")) == 40


def test_a_pull_request_to_somebody_else_s_repository(memory, hub):
    hub.create("stranger/memory")
    commit = memory.push_to_hub("stranger/memory", create_pr=True)
    assert commit.pr_num == 1 and hub.files("stranger/memory") == {}
    assert_same(RoutingMemory.from_pretrained("stranger/memory", revision="refs/pr/1"), at_level(memory, "ids"))
    with pytest.raises(PermissionError, match="'stranger/memory' cannot be written to"):
        memory.push_to_hub("stranger/memory")


def test_a_pull_request_is_pushed_to_again(memory, hub):
    memory.push_to_hub("memory", create_pr=True)
    memory.remove_examples([0]).push_to_hub("memory", revision="refs/pr/1")
    assert len(RoutingMemory.from_pretrained("me/memory", revision="refs/pr/1")) == 30
    with pytest.raises(FileNotFoundError, match="has no revision 'refs/pr/2'"):
        memory.push_to_hub("memory", revision="refs/pr/2")


def test_a_gitignore_of_the_repository_takes_nothing_from_a_memory(memory, hub):
    hub.create("me/memory")
    hub.commit("me/memory", {".gitignore": "*.safetensors\n*.json\n"})
    memory.push_to_hub("memory")
    assert_same(RoutingMemory.from_pretrained("me/memory"), at_level(memory, "ids"))


def test_a_large_memory_is_sent_in_parts(memory, hub):
    hub.part_size = 5_000
    memory.push_to_hub("memory")
    assert sum("/lfs/part/" in line for line in hub.requests) > 2
    assert_same(RoutingMemory.from_pretrained("me/memory"), at_level(memory, "ids"))


def test_bars_show_the_files_on_their_way(memory, hub, capfd, monkeypatch):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # else the client shows them on a terminal alone
    memory.push_to_hub("memory")
    (shard,) = (name for name in hub.files("me/memory") if name.endswith(".safetensors"))
    assert f"{shard}: 100%" in capfd.readouterr().err
    RoutingMemory.from_pretrained("me/memory")
    assert f"{shard}: 100%" in capfd.readouterr().err


def test_a_repository_that_is_to_be_private_and_is_public_gets_nothing(memory, hub):
    hub.create("me/memory")
    for call in (memory.push_to_hub, pushing.check_push):
        with pytest.raises(
            ValueError, match="private=True, but the repository 'me/memory' is there already and public"
        ):
            call("memory", private=True)
    assert hub.files("me/memory") == {}


@pytest.mark.parametrize("place", ["../up", "a/../../b", "..", "a\\b"])
def test_places_outside_of_the_repository_are_refused(memory, hub, place):
    with pytest.raises(ValueError, match="path_in_repo=.* leads out of the folder"):
        memory.push_to_hub("memory", path_in_repo=place)
    with pytest.raises(ValueError, match="subfolder=.* leads out of the folder"):
        RoutingMemory.from_pretrained("me/memory", subfolder=place)


@pytest.mark.parametrize("place", ["a\nb", "a\0b", "x" * 300, "C:/x", "a\u202eb"])
def test_places_that_no_folder_is_called_are_refused_at_once(memory, hub, place):
    with pytest.raises(ValueError, match="path_in_repo=.* is not a folder: use letters"):
        memory.push_to_hub("memory", path_in_repo=place)
    with pytest.raises(ValueError, match="subfolder=.* is not a folder: use letters"):
        RoutingMemory.from_pretrained("me/memory", subfolder=place)
    assert not hub.requests


@pytest.mark.parametrize("place", [".git", "a/.git/b", ".cache/huggingface"])
def test_places_that_the_hub_does_not_take_are_refused_at_once(memory, hub, place):
    with pytest.raises(ValueError, match="does not take: name another"):
        memory.push_to_hub("memory", path_in_repo=place)
    assert not hub.requests


@pytest.mark.parametrize("revision", ["", " ", "main\n", "a\0b", 3, b"main"])
def test_what_no_revision_is_called_is_refused_at_once(memory, hub, revision):
    with pytest.raises(ValueError, match="is not a revision: name a branch, a tag or a commit"):
        RoutingMemory.from_pretrained("me/memory", revision=revision)
    with pytest.raises(ValueError, match="is not a name of a branch"):
        memory.push_to_hub("memory", revision=revision)
    assert not hub.requests


def test_a_model_s_own_repository_names_the_folders_of_its_memories(memory, hub):
    hub.create("me/model")
    hub.commit("me/model", {"config.json": '{"model_type": "olmoe"}', "model.safetensors": b"\0" * 16})
    with pytest.raises(FileExistsError, match="config.json .* a folder of this one with path_in_repo="):
        memory.push_to_hub("me/model")
    for place in ("memories/a", "memories/b"):
        memory.push_to_hub("me/model", path_in_repo=place)
    for subfolder in ("", "memories"):
        with pytest.raises(FileNotFoundError, match="subfolder='memories/a', subfolder='memories/b'") as caught:
            RoutingMemory.from_pretrained("me/model", subfolder=subfolder)
        assert "no subfolder" not in str(caught.value)


def test_a_commit_is_no_place_to_push_to(memory, hub):
    oid = memory.push_to_hub("memory").oid
    with pytest.raises(ValueError, match="is a commit, which cannot be changed: name a branch"):
        memory.push_to_hub("memory", revision=oid)


def test_whoever_clones_gets_a_folder_that_opens(memory, hub, tmp_path):
    memory.push_to_hub("memory")
    folder = snapshot_download("me/memory", local_dir=tmp_path)
    assert_same(RoutingMemory.from_pretrained(folder), at_level(memory, "ids"))


@pytest.mark.parametrize(
    "name", ["a b", "-x", "a..b", "", "a/", "/a", "a~1", "a:b", "x.lock", "a//b", "a\n", "a/.b", "."]
)
def test_names_that_no_branch_has_are_refused_at_once(memory, name):
    for call in (memory.push_to_hub, pushing.check_push):
        with pytest.raises(ValueError, match="is not a name of a branch"):
            call("memory", revision=name)


# files of others


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "config.json", "adapter_config.json"])
@pytest.mark.parametrize("place", ["", "sub/"])
def test_files_of_a_repository_that_are_not_a_memory_s_are_not_written_over(memory, hub, name, place):
    hub.create("me/memory")
    hub.commit("me/memory", {place + name: "{}"})
    with pytest.raises(FileExistsError, match=f"in the repository 'me/memory', {name}.*overwrite=True") as caught:
        memory.push_to_hub("memory", path_in_repo=place)
    assert "\n" not in str(caught.value) and "/tmp" not in str(caught.value)
    assert hub.files("me/memory") == {place + name: b"{}"}
    memory.push_to_hub("memory", path_in_repo=place, create_pr=True)  # nothing is written over before it is merged
    memory.push_to_hub("memory", path_in_repo=place, overwrite=True)
    assert hub.files("me/memory", "refs/pr/1") == hub.files("me/memory")


def test_a_card_that_was_edited_on_the_hub_is_the_user_s(memory, hub):
    memory.push_to_hub("memory")
    edited = hub.files("me/memory")["README.md"].decode() + "\nMy own words.\n"
    hub.commit("me/memory", {"README.md": edited})
    with pytest.raises(FileExistsError, match="README.md"):
        memory.push_to_hub("memory")
    assert hub.files("me/memory")["README.md"].decode() == edited


def test_a_memory_of_another_model_in_the_repository_is_not_replaced(memory, hub):
    full_memory(tiny_model("olmoe", seed=3), tokenizer=tiny_tokenizer()).push_to_hub("memory")
    with pytest.raises(FileExistsError, match="in the repository 'me/memory', .*memory of another base model"):
        memory.push_to_hub("memory")


def test_a_memory_beside_its_model(memory, hub):
    hub.create("me/model")
    hub.commit("me/model", {"config.json": '{"model_type": "olmoe"}', "model.safetensors": b"weights" * 100})
    memory.push_to_hub("me/model", path_in_repo="memory")
    hub.requests.clear()
    assert_same(RoutingMemory.from_pretrained("me/model", subfolder="memory"), at_level(memory, "ids"))
    assert not [line for line in hub.requests if "model.safetensors" in line]
    with pytest.raises(FileExistsError, match="config.json.* is of another model"):
        memory.push_to_hub("me/model")


# before a build


@pytest.mark.parametrize("name", ["", "a/b/c", "me/my memory", "-x", "x--y", "a" * 97, "me/", "x.git", None, "über"])
def test_names_that_no_repository_has_are_refused_at_once(memory, name):
    for call in (pushing.check_repository_name, pushing.check_push, memory.push_to_hub):
        with pytest.raises(ValueError, match="is not a name of a repository: use name or owner/name") as caught:
            call(name)
        assert "\n" not in str(caught.value)


def test_a_push_that_will_work_is_found_so(memory, hub):
    known = dict(fingerprint=lambda: memory.origin.base_model_fingerprint)
    assert pushing.check_push("memory", **known) == "me/memory"
    memory.push_to_hub("memory")
    assert pushing.check_push("memory", **known) == "me/memory"
    assert pushing.check_push("memory", revision="not/yet", **known) == "me/memory"


def test_without_a_network_it_is_said_so():
    with pytest.raises((ConnectionError, PermissionError, FileNotFoundError)) as caught:  # offline, without a login
        pushing.check_push("me/memory")
    assert "\n" not in str(caught.value)


def test_what_the_repository_holds_is_looked_at_before_a_build(memory, hub):
    hub.create("me/memory")
    hub.commit("me/memory", {"README.md": "mine"}, revision="v2")
    known = dict(fingerprint=lambda: memory.origin.base_model_fingerprint)
    assert pushing.check_push("memory", **known) == pushing.check_push("memory", revision="v3", **known) == "me/memory"
    with pytest.raises(FileExistsError, match="README.md"):
        pushing.check_push("memory", revision="v2", **known)
    assert pushing.check_push("memory", revision="v2", overwrite=True, **known) == "me/memory"
    assert not HfApi().revision_exists("me/memory", "v3")  # looking makes no branch
