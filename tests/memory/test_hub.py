"""Uploads write over nothing that is not the memory's own, and what would stop one is known before a build."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from knnmoe_hf import RoutingMemory
from knnmoe_hf.memory import hub
from knnmoe_hf.memory.levels import at_level
from tests.memory.helpers import assert_same, full_memory, tiny_tokenizer
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def memory():
    return full_memory(tiny_model("olmoe"), tokenizer=tiny_tokenizer())


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository of the Hub as a folder: downloads read it, uploads write to it."""
    place = tmp_path / "repository"
    place.mkdir()

    def download(repo_id, *, allow_patterns, local_dir, **_):
        for name in allow_patterns:
            if (place / name).is_file():
                (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(place / name, Path(local_dir) / name)
        return local_dir

    def upload(self, *, folder_path, path_in_repo, **_):
        shutil.copytree(folder_path, place / path_in_repo, dirs_exist_ok=True)
        return "commit"

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(HfApi, "whoami", lambda self, token=None: {"name": "me"})
    monkeypatch.setattr(HfApi, "auth_check", lambda self, repo_id, **_: None)
    return place


@pytest.mark.parametrize("place", ["", "sub"])
def test_a_memory_is_pushed_again_and_again(memory, repository, place):
    memory.push_to_hub("memory", path_in_repo=place)
    fewer = memory.remove_examples([0])
    assert fewer.push_to_hub("memory", path_in_repo=place) == "commit"
    assert_same(RoutingMemory.from_pretrained(repository / place), at_level(fewer, "ids"))


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "config.json", "adapter_config.json"])
def test_files_of_a_repository_that_are_not_a_memory_s_are_not_written_over(memory, repository, name):
    (repository / name).write_text("{}")
    with pytest.raises(FileExistsError, match=f"in the repository 'me/memory', {name}.*overwrite=True") as caught:
        memory.push_to_hub("memory")
    assert "\n" not in str(caught.value) and "/tmp" not in str(caught.value)
    assert [path.name for path in repository.iterdir()] == [name]
    assert memory.push_to_hub("memory", create_pr=True) == "commit"  # nothing is written over before it is merged
    assert memory.push_to_hub("memory", overwrite=True) == "commit"


def test_a_card_that_was_edited_on_the_hub_is_the_user_s(memory, repository):
    memory.push_to_hub("memory")
    card = repository / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    with pytest.raises(FileExistsError, match="README.md"):
        memory.push_to_hub("memory")
    assert "My own words." in card.read_text()


def test_a_memory_of_another_model_in_the_repository_is_not_replaced(memory, repository):
    full_memory(tiny_model("olmoe", seed=3), tokenizer=tiny_tokenizer()).push_to_hub("memory")
    with pytest.raises(FileExistsError, match="in the repository 'me/memory', .*memory of another base model"):
        memory.push_to_hub("memory")


def test_a_repository_that_cannot_be_read_is_not_written_to(memory, repository, monkeypatch):
    def fail(*args, **kwargs):
        raise failure(HfHubHTTPError, 503)

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ConnectionError, match="what an upload would write over is not known"):
        memory.push_to_hub("memory")
    assert list(repository.iterdir()) == []


# before a build


@pytest.mark.parametrize("name", ["", "a/b/c", "me/my memory", "-x", "x--y", "a" * 97, "me/", "x.git", None, "über"])
def test_names_that_no_repository_has_are_refused_at_once(memory, repository, name):
    for call in (hub.check_repository_name, hub.check_push, memory.push_to_hub):
        with pytest.raises(ValueError, match="is no name of a repository: use name or owner/name") as caught:
            call(name)
        assert "\n" not in str(caught.value)


def test_a_push_that_will_work_is_found_so(memory, repository):
    assert hub.check_push("memory", fingerprint=lambda: memory.origin.base_model_fingerprint) == "me/memory"
    memory.push_to_hub("memory")


def failure(kind: type, status: int) -> Exception:
    response = httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/api"))
    return kind("first line\nsecond line", response=response)


@pytest.mark.parametrize(
    "step, error, kind, words",
    [
        ("whoami", LocalTokenNotFoundError("no token"), PermissionError, "log in first, with `hf auth login`"),
        ("whoami", failure(HfHubHTTPError, 401), PermissionError, "check the name, your login"),
        ("create_repo", failure(HfHubHTTPError, 403), PermissionError, "its token may write there"),
        ("auth_check", failure(RepositoryNotFoundError, 404), PermissionError, "its token may write there"),
        ("auth_check", failure(HfHubHTTPError, 503), ConnectionError, "the Hub failed"),
        ("whoami", httpx2.ConnectError("first\nsecond"), ConnectionError, "check the network"),
    ],
    ids=["no login", "bad login", "not creatable", "not writable", "hub down", "no network"],
)
def test_what_stops_a_push_is_said_before_a_build(memory, repository, monkeypatch, step, error, kind, words):
    def fail(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(HfApi, step, fail)
    calls = [hub.check_push] if step in ("whoami", "auth_check") else [hub.check_push, memory.push_to_hub]
    for call in calls:
        with pytest.raises(kind, match=words) as caught:
            call("memory")
        assert "\n" not in str(caught.value) and "'memory'" in str(caught.value)


def test_without_a_network_it_is_said_so():
    with pytest.raises((ConnectionError, PermissionError)) as caught:  # tests run offline, and without a login
        hub.check_push("me/memory")
    assert "\n" not in str(caught.value)


def test_what_the_repository_holds_is_looked_at_before_a_build(memory, repository):
    (repository / "README.md").write_text("mine")
    known = dict(fingerprint=lambda: memory.origin.base_model_fingerprint)
    with pytest.raises(FileExistsError, match="README.md"):
        hub.check_push("memory", **known)
    assert hub.check_push("memory", overwrite=True, **known) == "me/memory"


@pytest.mark.parametrize("exists", [True, False])
def test_the_branch_that_is_looked_at_is_the_one_to_push_to(memory, repository, monkeypatch, exists):
    """A branch that is not there yet will begin as the main one."""
    seen = []
    download = hub.snapshot_download
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **o: seen.append(o["revision"]) or download(*a, **o))
    monkeypatch.setattr(HfApi, "revision_exists", lambda self, repo, revision, token=None: exists)
    hub.check_push("memory", revision="v2", fingerprint=lambda: memory.origin.base_model_fingerprint)
    assert seen == ["v2" if exists else None]
