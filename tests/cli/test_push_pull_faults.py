"""`knnmoe push` and `pull` when something goes wrong: logins, names, connections, broken memories, interruption."""

import os
import signal
import subprocess
import sys
import time

import pytest
from huggingface_hub import constants

from knnmoe_hf.cli import main
from tests.cli.helpers import content, failed


@pytest.mark.parametrize("command", ["push", "pull", "info", "evaluate", "remove", "merge"])
def test_a_login_or_a_repository_that_does_not_do_is_one_line(
    hub, built, pushed, tmp_path, monkeypatch, capsys, command
):
    def words(repo: str, *more: str) -> list[str]:
        if command == "push":
            return ["push", str(built), repo, *more]
        if command == "pull":
            return ["pull", repo, str(tmp_path / "new"), *more]
        rest = {"evaluate": ["--dataset", str(built.parent / "reference.jsonl")], "remove": ["--example-ids", "0"]}
        first = [str(built), repo] if command == "merge" else [repo]
        where = ["--output", str(tmp_path / "new")] if command in ("merge", "remove") else []
        return [command, *first, *rest.get(command, []), *where, *more]

    monkeypatch.setenv("HF_TOKEN", hub.expired_token)
    assert "token is expired" in failed(words(pushed), capsys)
    if command == "push":
        monkeypatch.setenv("HF_TOKEN", hub.read_only_token)
        assert "may write" in failed(words(pushed), capsys)
        monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
        assert "may write" in failed(words(pushed), capsys)
        monkeypatch.delenv("HF_TOKEN")
        assert "needs a token: use hf auth login" in failed(words(pushed), capsys)
    else:
        monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
        assert "'me/missing'" in failed(words("me/missing"), capsys)
        revision = "--other-revision" if command == "merge" else "--revision"
        subfolder = "--other-subfolder" if command == "merge" else "--subfolder"
        assert "no revision 'v9'" in failed(words(pushed, revision, "v9"), capsys)
        assert "holds no memory in its folder 'x'" in failed(words(pushed, subfolder, "x"), capsys)
        assert "leads out" in failed(words(pushed, subfolder, "../x"), capsys)
        hub.repository(pushed).gated = True
        assert "is gated" in failed(words(pushed), capsys)
    assert not (tmp_path / "new").exists()


def test_what_fails_in_passing_is_tried_again_and_what_lasts_is_one_line(hub, built, tmp_path, capsys):
    hub.faults.fail("POST .*/preupload|POST .*/commit/|PUT", times=3)
    hub.faults.drop_upload(after=100)
    assert main(["push", str(built), "me/mem"]) == 0
    hub.faults.fail("GET", times=2)
    hub.faults.drop_download(after=100, times=2)
    assert main(["pull", "me/mem", str(tmp_path / "pulled")]) == 0
    assert content(tmp_path / "pulled") == hub.files("me/mem")
    hub.faults.fail("", status=503, times=-1)
    before = content(tmp_path / "pulled")
    assert "'me/mem' cannot be reached" in failed(["push", str(built), "me/mem"], capsys)
    constants.HF_HUB_CACHE, cache = str(tmp_path / "cache"), constants.HF_HUB_CACHE
    try:
        assert "'me/mem' cannot be reached" in failed(["pull", "me/mem", str(tmp_path / "pulled")], capsys)
    finally:
        constants.HF_HUB_CACHE = cache
    assert content(tmp_path / "pulled") == before


@pytest.mark.parametrize("what", ["a shard", "the configuration", "no memory", "another model"])
def test_a_memory_that_is_broken_on_the_hub_is_not_pulled(hub, pushed, tmp_path, capsys, what):
    shard = next(name for name in hub.files(pushed) if name.endswith(".safetensors"))
    data = bytearray(hub.files(pushed)[shard])
    data[-1] ^= 1
    changed = {
        "a shard": {shard: bytes(data)},
        "the configuration": {"config.json": "{"},
        "no memory": {name: None for name in hub.files(pushed)},
        "another model": {"config.json": '{"model_type": "olmoe"}'},
    }[what]
    assert main(["pull", pushed, str(tmp_path / "m")]) == 0
    before = content(tmp_path / "m")
    hub.commit(pushed, changed)
    assert failed(["pull", pushed, str(tmp_path / "m")], capsys)
    assert content(tmp_path / "m") == before
    assert failed(["pull", pushed, str(tmp_path / "new")], capsys)
    assert not (tmp_path / "new").exists()


# interruption, in processes of their own


def start(words: list[str], hub) -> subprocess.Popen:
    code = "import sys; from knnmoe_hf.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env=os.environ | hub.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def when(hub, request: str, then) -> None:
    """Calls `then` in the middle of the first request of this kind."""
    hub.faults.slow(200, pattern=request)
    hub.faults.before(request, then)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_an_upload_that_is_cut_off_changes_nothing_and_goes_on(hub, built, kind):
    processes = []
    when(hub, "PUT /lfs/", lambda: (time.sleep(0.3), processes[0].send_signal(kind)))
    processes.append(start(["push", str(built), "me/mem"], hub))
    _, said = processes[0].communicate(timeout=300)
    assert processes[0].returncode == (130 if kind == signal.SIGINT else -signal.SIGKILL)
    assert (said.splitlines()[-1] == "knnmoe: interrupted") == (kind == signal.SIGINT) and "Traceback" not in said
    assert not hub.files("me/mem")
    hub.faults.clear()
    # all is uploaded, but the connection goes before the commit is made: what is there is not sent again
    hub.faults.fail("POST .*/commit/", status=503, times=-1)
    again = start(["push", str(built), "me/mem"], hub)
    again.communicate(timeout=300)
    assert again.returncode == 1 and not hub.files("me/mem")
    hub.faults.clear()
    hub.requests.clear()
    third = start(["push", str(built), "me/mem"], hub)
    assert third.communicate(timeout=300) and third.returncode == 0
    assert not any(request.startswith("PUT /lfs/") for request in hub.requests)
    assert "config.json" in hub.files("me/mem")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_a_download_that_is_cut_off_changes_nothing_and_goes_on(hub, pushed, tmp_path, kind):
    folder = tmp_path / "pulled"
    processes = []
    when(hub, "GET /cdn/", lambda: (time.sleep(0.3), processes[0].send_signal(kind)))
    processes.append(start(["pull", pushed, str(folder)], hub))
    _, said = processes[0].communicate(timeout=300)
    assert processes[0].returncode == (130 if kind == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in said and not folder.exists()
    hub.faults.clear()
    again = start(["pull", pushed, str(folder)], hub)
    assert again.communicate(timeout=300) and again.returncode == 0
    assert content(folder) == hub.files(pushed)
