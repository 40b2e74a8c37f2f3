"""Pushes and pulls while the network, the Hub or the login fail: whole or not at all, and a sentence that says why."""

import errno
import itertools
import threading
from functools import partial

import pytest
from huggingface_hub import constants

from knnmoe_hf import RoutingMemory
from knnmoe_hf.memory import hub as pushing
from knnmoe_hf.memory.levels import at_level
from tests.memory.helpers import assert_same, full_memory, tiny_tokenizer
from tests.support.models import tiny_model

PUSH_REQUESTS = [
    "POST /api/repos/create",
    "GET /api/models/me/memory$",
    "GET .*/tree/",
    "POST .*/preupload/",
    "POST .*/objects/batch",
    "PUT /lfs/",
    "POST .*/verify",
    "POST /api/validate-yaml",
    "POST .*/commit/",
]
"""Every request of a first push."""


@pytest.fixture(scope="module")
def memory():
    return full_memory(tiny_model("olmoe"), tokenizer=tiny_tokenizer())


def said(kind: type, *words: str, call) -> str:
    """The call fails with one sentence that has these words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and "/tmp" not in message
    for word in words:
        assert word in message, message
    return message


def pull(**options) -> RoutingMemory:
    return RoutingMemory.from_pretrained("me/memory", **options)


def assert_pushed_once(hub, memory) -> None:
    assert [commit.title for commit in hub.commits("me/memory")] == ["Upload routing memory", "initial commit"]
    assert_same(pull(), at_level(memory, "ids"))


# pushes


@pytest.mark.parametrize("request_, status", zip(PUSH_REQUESTS, itertools.cycle([500, 503, 429])))
def test_a_hub_that_fails_in_passing_is_asked_again(memory, hub, request_, status):
    hub.faults.fail(request_, status=status, times=2)
    memory.push_to_hub("memory")
    assert hub.faults.left == 0  # it did fail
    assert_pushed_once(hub, memory)


@pytest.mark.parametrize("request_", PUSH_REQUESTS)
def test_an_answer_that_gets_lost_makes_no_second_commit(memory, hub, request_):
    hub.faults.drop_answer(request_, times=2)
    memory.push_to_hub("memory")
    assert_pushed_once(hub, memory)


def test_a_proxy_s_page_in_place_of_an_answer(memory, hub):
    hub.faults.fail("POST /api/validate-yaml", status=502, body="<html>Bad gateway</html>")
    memory.push_to_hub("memory")
    assert_pushed_once(hub, memory)


@pytest.mark.parametrize("part_size", [1 << 24, 9_000], ids=["whole", "parts"])
def test_an_upload_that_breaks_off_is_tried_again(memory, hub, part_size):
    hub.part_size = part_size
    hub.faults.drop_upload(after=3_000, times=3)
    memory.push_to_hub("memory")
    assert_pushed_once(hub, memory)


def test_a_push_that_failed_left_nothing_and_the_next_sends_no_file_twice(memory, hub):
    memory.push_to_hub("memory", path_in_repo="other")
    before = hub.files("me/memory")
    more = full_memory(tiny_model("olmoe"), seed=5, tokenizer=tiny_tokenizer())
    hub.faults.fail("POST .*/commit/", times=-1)
    said(ConnectionError, "'me/memory' cannot be reached: the Hub failed", call=lambda: more.push_to_hub("memory"))
    assert hub.files("me/memory") == before
    assert sum(line.startswith("PUT /lfs/") for line in hub.requests) == 2
    hub.faults.clear()
    more.push_to_hub("memory")
    assert sum(line.startswith("PUT /lfs/") for line in hub.requests) == 2
    assert_same(pull(), at_level(more, "ids"))


def test_a_branch_that_others_move_meanwhile_is_pushed_to_all_the_same(memory, hub):
    hub.create("me/memory")
    for number in range(2):
        hub.faults.before(
            "POST .*/commit/", lambda n=number: hub.commit("me/memory", {f"{n}.txt": "theirs"}), skip=number
        )
    memory.push_to_hub("memory")
    files = hub.files("me/memory")
    assert files["0.txt"] == files["1.txt"] == b"theirs"
    assert_same(pull(), at_level(memory, "ids"))


def test_two_pushes_at_a_time_leave_one_whole_memory(memory, hub):
    """Each of several memories is pushed to the same place; files of two are never mixed."""
    several = [memory] + [memory.remove_examples([example]) for example in (0, 1)]
    memory.push_to_hub("memory")
    threads = [threading.Thread(target=one.push_to_hub, args=("memory",)) for one in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for commit in hub.commits("me/memory")[:-1]:
        assert len(pull(revision=commit.oid)) in (30, 40)


def test_what_others_put_there_meanwhile_is_not_written_over(memory, hub):
    hub.create("me/memory")
    hub.faults.before("POST .*/commit/", lambda: hub.commit("me/memory", {"README.md": "theirs"}))
    said(FileExistsError, "README.md", call=lambda: memory.push_to_hub("memory"))
    assert hub.files("me/memory") == {"README.md": b"theirs"}


def test_a_repository_that_cannot_be_read_is_not_written_to(memory, hub):
    hub.create("me/memory")
    hub.commit("me/memory", {"README.md": "mine"})
    hub.faults.fail("HEAD .*/resolve/", status=503, times=-1)
    said(ConnectionError, "'me/memory' cannot be reached", call=lambda: memory.push_to_hub("memory"))
    assert hub.files("me/memory") == {"README.md": b"mine"}


@pytest.mark.parametrize("moment", PUSH_REQUESTS)
def test_a_token_that_expires_in_the_middle(memory, hub, moment):
    if moment.startswith("PUT"):
        moment = "POST .*/verify"  # signed addresses need no token
    hub.faults.before(moment, hub.expire)
    said(PermissionError, "does not accept the login", "expired", call=lambda: memory.push_to_hub("memory"))
    assert all(len(repo.commits) == 1 for repo in hub.store.repositories.values())


def test_a_slow_hub_is_waited_for(memory, hub):
    hub.faults.delay(0.05)
    hub.faults.slow(200_000)
    hub.faults.slow(200_000, pattern="PUT /lfs/")
    memory.push_to_hub("memory")
    assert_pushed_once(hub, memory)


CANNOT_WRITE = {
    "expired_token": (PermissionError, "does not accept the login that was used for 'me/memory'"),
    "unknown": (PermissionError, "does not accept the login"),
    "read_only_token": (PermissionError, "'me/memory' cannot be written to: check the name, your login"),
    "stranger_token": (PermissionError, "'me/memory' cannot be written to"),
    False: (PermissionError, "'me/memory' cannot be written to: token=False"),
}


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("token", CANNOT_WRITE)
def test_who_may_not_push_is_told_why(memory, hub, token, exists):
    kind, words = CANNOT_WRITE[token]
    if exists:
        hub.create("me/memory")
    given = getattr(hub, str(token), token)
    for call in (memory.push_to_hub, pushing.check_push):
        said(kind, words, call=partial(call, "me/memory", token=given))


def test_a_missing_login_is_said(memory, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    said(PermissionError, "log in first, with `hf auth login`", call=lambda: pushing.check_push("memory"))
    said(PermissionError, "cannot be written to", "`hf auth", call=lambda: memory.push_to_hub("memory"))


@pytest.mark.parametrize("body", ["{}", "[1]"])
@pytest.mark.parametrize(
    "request_", ["POST /api/repos/create", "GET /api/models/", "POST .*/preupload/", "POST .*/commit/"]
)
def test_what_answers_is_not_the_hub(memory, hub, request_, body):
    hub.faults.fail(request_, status=200, body=body, times=-1)
    said(ConnectionError, "what answers is not the Hub", call=lambda: memory.push_to_hub("memory"))


def test_what_the_hub_does_not_take_is_said(memory, hub):
    card = "---\ntags: [a\n---\nA card."
    call = partial(memory.push_to_hub, "memory", card=card)
    said(ValueError, "the Hub does not take what is uploaded to 'me/memory': Invalid metadata in README.md", call=call)
    hub.faults.fail("POST .*/commit/", status=413, message="too large")
    said(ValueError, "does not take what is uploaded", "too large", call=lambda: memory.push_to_hub("memory"))


def test_a_login_that_cannot_be_sent_is_not_shown(memory, hub):
    for call in (partial(memory.push_to_hub, "memory"), pull):
        for secret in ("hf_secret\n", "hf_secr\u00e9t", "hf secret", ""):
            assert "secr" not in said(ValueError, "token= is none of the Hub's", call=partial(call, token=secret))


def test_offline_nothing_is_pushed(memory, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said(ConnectionError, "cannot be written to: HF_HUB_OFFLINE is set", call=lambda: memory.push_to_hub("memory"))
    assert not hub.requests


def test_a_full_disk_is_said(memory, hub, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("knnmoe_hf.memory.storage.save_file", full)
    with pytest.raises(OSError, match="no space left for .*, or name another disk in TMPDIR, and push again"):
        memory.push_to_hub("memory")
    assert hub.files("me/memory") == {}


# pulls


PULL_REQUESTS = ["GET /api/models/me/memory$", "HEAD .*/resolve/", "GET .*/resolve/", "/cdn/"]


@pytest.mark.parametrize("request_, status", zip(PULL_REQUESTS, itertools.cycle([500, 503, 429])))
def test_a_hub_that_fails_in_passing_is_asked_again_for_a_file(memory, hub, request_, status):
    memory.push_to_hub("memory")
    hub.faults.fail(request_, status=status, times=2)
    assert_same(pull(), at_level(memory, "ids"))
    assert hub.faults.left == 0


@pytest.mark.parametrize("request_", PULL_REQUESTS)
def test_connections_that_are_dropped(memory, hub, request_):
    memory.push_to_hub("memory")
    hub.faults.drop_answer(request_, times=2)
    hub.faults.drop_download(after=2_000, times=3, pattern="GET /cdn/")
    assert_same(pull(), at_level(memory, "ids"))


def test_all_files_are_of_one_commit_though_the_branch_moves(memory, hub):
    memory.push_to_hub("memory")
    fewer = memory.remove_examples([0])
    for skip in range(3):
        hub.faults.before("GET .*(/resolve/|/cdn/)", lambda: fewer.push_to_hub("memory", token=hub.token), skip=skip)
    assert_same(pull(), at_level(memory, "ids"))
    assert_same(pull(), at_level(fewer, "ids"))


def test_a_pull_that_broke_off_goes_on_and_is_never_half(memory, hub, monkeypatch):
    memory.push_to_hub("memory", max_shard_size="4KB")
    hub.faults.fail("/cdn/", status=500, times=-1, skip=2)
    said(ConnectionError, "'me/memory' cannot be reached", call=pull)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said(FileNotFoundError, "'me/memory' is not in the cache, or not whole", call=pull)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.faults.clear()
    done = sum(line.startswith("GET /cdn/") for line in hub.requests)
    assert_same(pull(), at_level(memory, "ids"))
    shards = sum(name.endswith(".safetensors") for name in hub.files("me/memory"))
    assert sum(line.startswith("GET /cdn/") for line in hub.requests) - done < shards  # some were there


def test_from_the_cache_without_a_network(memory, hub, monkeypatch):
    commit = memory.push_to_hub("memory", path_in_repo="sub").oid
    pull(subfolder="sub")
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for options in ({}, {"revision": "main"}, {"revision": commit}, {"local_files_only": True}):
        assert_same(pull(subfolder="sub", **options), at_level(memory, "ids"))
    said(FileNotFoundError, "not in the cache", "'v2'", call=lambda: pull(subfolder="sub", revision="v2"))
    said(FileNotFoundError, "not in the cache", call=lambda: RoutingMemory.from_pretrained("me/never"))
    said(FileNotFoundError, "not in the cache", call=lambda: pull(subfolder="never"))
    assert len(hub.requests) == asked


def test_a_hub_that_is_gone_leaves_the_cache(memory, hub, monkeypatch, caplog):
    memory.push_to_hub("memory")
    pull()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert_same(pull(), at_level(memory, "ids"))
    said(ConnectionError, "'me/never' cannot be reached", call=lambda: RoutingMemory.from_pretrained("me/never"))


def test_why_a_repository_cannot_be_read(memory, hub, monkeypatch, tmp_path):
    memory.push_to_hub("memory", path_in_repo="sub")
    hub.create("stranger/hidden", private=True)
    hub.create("stranger/gated", gated=True)
    memory.save_pretrained(tmp_path)
    hub.commit_folder("stranger/gated", tmp_path)
    opened = RoutingMemory.from_pretrained
    seen = "neither a folder nor a repository that your login may see: check the name"
    said(FileNotFoundError, "'me/gone'", seen, call=lambda: opened("me/gone"))
    said(FileNotFoundError, "'stranger/hidden'", seen, call=lambda: opened("stranger/hidden"))
    said(PermissionError, "'stranger/gated' is gated: ask for access", call=lambda: opened("stranger/gated"))
    said(FileNotFoundError, "'me/memory' has no revision 'v9'", call=lambda: pull(subfolder="sub", revision="v9"))
    said(FileNotFoundError, "has no revision", call=lambda: pull(subfolder="sub", revision="0" * 40))
    said(FileNotFoundError, "holds no memory at its top", "subfolder='sub'", call=pull)
    said(FileNotFoundError, "no memory in its folder 'no'", "subfolder='sub'", call=lambda: pull(subfolder="no"))
    said(FileNotFoundError, "'me/a b' is neither a folder nor a name of a repository", call=lambda: opened("me/a b"))
    for token in (hub.expired_token, "hf_nobody"):
        said(PermissionError, "does not accept the login", call=partial(pull, subfolder="sub", token=token))
    public = "that is public: check the name, and log in"
    said(FileNotFoundError, "'me/gone'", public, call=lambda: opened("me/gone", token=False))
    said(PermissionError, "is gated", call=lambda: opened("stranger/gated", token=False))
    monkeypatch.delenv("HF_TOKEN")
    said(PermissionError, "log in first", call=lambda: pull(subfolder="sub", token=True))
    hub.repository("stranger/gated").readers.add("me")
    assert_same(opened("stranger/gated", token=hub.token), memory)
