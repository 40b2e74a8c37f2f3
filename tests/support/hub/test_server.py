"""The loopback Hub answers the real client as the Hub does, and goes wrong as it is told to."""

import os

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    errors,
    hf_hub_download,
    snapshot_download,
)


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi()


def add(**files: bytes) -> list[CommitOperationAdd]:
    return [
        CommitOperationAdd(name.replace("__", "/").replace("_dot_", "."), content) for name, content in files.items()
    ]


def test_one_commit_of_files_is_downloaded_as_it_was(hub, api, tmp_path):
    assert api.whoami()["name"] == "me"
    assert api.create_repo("mem", private=True).repo_id == "me/mem" == api.create_repo("mem", exist_ok=True).repo_id
    large = os.urandom(300_000)
    made = api.create_commit("me/mem", add(a_dot_txt=b"one", sub__b_dot_safetensors=large), commit_message="first")
    assert [c.oid for c in hub.commits("me/mem")][0] == made.oid and hub.commits("me/mem")[0].title == "first"
    assert hub.files("me/mem") == {"a.txt": b"one", "sub/b.safetensors": large}
    folder = snapshot_download("me/mem")
    assert os.path.basename(folder) == made.oid
    with open(f"{folder}/sub/b.safetensors", "rb") as file:
        assert file.read() == large
    info = api.model_info("me/mem", files_metadata=True)
    assert info.sha == made.oid and info.private and len(info.siblings) == 3
    assert len(list(api.list_repo_tree("me/mem", recursive=True))) == 4  # with the folder
    (file,) = api.get_paths_info("me/mem", ["sub/b.safetensors"])
    assert file.lfs.size == 300_000
    assert api.list_repo_commits("me/mem")[0].commit_id == made.oid


def test_files_of_several_pages_and_parts(hub, api):
    hub.create("me/mem")
    hub.part_size, hub.page_size = 100_000, 2
    large = os.urandom(250_000)
    api.create_commit("me/mem", add(b_dot_bin=large, c=b"3", d=b"4", e=b"5"), commit_message="large")
    assert hub.files("me/mem")["b.bin"] == large and sum("/lfs/part/" in line for line in hub.requests) == 3
    assert len(list(api.list_repo_tree("me/mem"))) == 5


def test_branches_tags_and_pull_requests(hub, api):
    api.create_repo("me/mem")
    api.create_branch("me/mem", branch="a/b")
    api.create_commit("me/mem", add(x=b"1"), commit_message="on a branch", revision="a/b")
    assert hub.files("me/mem") == {} and hub.files("me/mem", "a/b") == {"x": b"1"}
    api.create_tag("me/mem", tag="v1", revision="a/b")
    with pytest.raises(errors.HfHubHTTPError):
        api.create_branch("me/mem", branch="a/b")
    assert api.revision_exists("me/mem", "v1") and not api.revision_exists("me/mem", "v2")
    pr = api.create_commit("me/mem", add(y=b"2"), commit_message="please", create_pr=True, token=hub.stranger_token)
    assert pr.pr_num == 1 and hub.files("me/mem", "refs/pr/1") == {"y": b"2"}
    refs = api.list_repo_refs("me/mem", include_pull_requests=True)
    assert {b.name for b in refs.branches} == {"main", "a/b"} and [r.ref for r in refs.pull_requests] == ["refs/pr/1"]
    api.merge_pull_request("me/mem", 1)
    assert hub.files("me/mem") == {"y": b"2"}
    api.create_commit("me/mem", [CommitOperationDelete("y")], commit_message="delete")
    assert hub.files("me/mem") == {}
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        parent = hub.commits("me/mem")[1].oid
        api.create_commit("me/mem", add(z=b"3"), commit_message="late", parent_commit=parent)


@pytest.mark.parametrize("token, status", [("expired", 401), ("unknown", 401), ("read_only", 403), ("stranger", 403)])
def test_tokens_that_may_not_write(hub, api, token, status):
    hub.create("me/mem")
    token = getattr(hub, f"{token}_token", token)
    with pytest.raises(errors.HfHubHTTPError) as caught:
        api.create_commit("me/mem", add(x=b"1"), commit_message="no", token=token)
    assert caught.value.response.status_code == status and hub.files("me/mem") == {}


def test_who_may_read(hub, api):
    hub.create("me/hidden", private=True)
    hub.create("me/gated", gated=True)
    hub.commit("me/gated", {"x": "1"})
    for token in (hub.stranger_token, False):
        with pytest.raises(errors.RepositoryNotFoundError):
            api.model_info("me/hidden", token=token)
        with pytest.raises(errors.GatedRepoError):
            hf_hub_download("me/gated", "x", token=token)
    hub.repository("me/gated").readers.add("stranger")
    assert hf_hub_download("me/gated", "x", token=hub.stranger_token)
    with pytest.raises(errors.RevisionNotFoundError):
        hf_hub_download("me/gated", "x", revision="v9")
    with pytest.raises(errors.EntryNotFoundError):
        hf_hub_download("me/gated", "y")


def test_a_download_goes_on_where_it_was_cut(hub):
    hub.create("me/mem")
    content = os.urandom(200_000)
    hub.commit("me/mem", {"x.bin": content})
    hub.faults.drop_download(after=50_000, times=2)
    with open(hf_hub_download("me/mem", "x.bin"), "rb") as file:
        assert file.read() == content
    assert len([line for line in hub.requests if line.startswith("GET /cdn/")]) == 3


def test_an_upload_that_was_cut_is_tried_again(hub, api):
    hub.create("me/mem")
    hub.faults.drop_upload(after=50_000, times=2)
    content = os.urandom(200_000)
    api.create_commit("me/mem", add(x_dot_bin=content), commit_message="cut")
    assert hub.files("me/mem") == {"x.bin": content}


def test_answers_that_get_lost_and_servers_that_fail(hub, api):
    hub.create("me/mem")
    hub.faults.fail("GET /api/models", status=503)
    with pytest.raises(errors.HfHubHTTPError, match="503"):
        api.model_info("me/mem")
    assert api.model_info("me/mem").id == "me/mem"
    hub.faults.drop_answer("POST .*/commit/")
    with pytest.raises(httpx2.RemoteProtocolError):
        api.create_commit("me/mem", add(x=b"1"), commit_message="lost")
    assert hub.files("me/mem") == {"x": b"1"}
