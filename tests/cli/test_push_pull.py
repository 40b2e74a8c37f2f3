"""`knnmoe push` and `pull`, and repositories in the other commands, with a Hub on loopback and the real client."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from knnmoe_hf import RoutingMemory
from knnmoe_hf.cli import main
from knnmoe_hf.cli.inside import level_of
from tests.cli.helpers import HELD_OUT, QUICK, assert_same_rows, content, examples, failed, texts

# there and back


def test_a_memory_goes_to_the_hub_in_one_commit_and_comes_back_whole(hub, built, tmp_path, capsys):
    assert main(["push", str(built), "me/mem"]) == 0
    said = capsys.readouterr().out.splitlines()
    commit, *_, first = hub.commits("me/mem")
    assert len(hub.commits("me/mem")) == 2 and commit.parent == first.oid
    memory = RoutingMemory.from_pretrained(built)
    assert said[0] == f"{memory!r} uploaded with provenance ids: {hub.endpoint}/me/mem/commit/{commit.oid}"
    assert "The text of the references is not inside" in said[1] and said[-1] == "Next: knnmoe info me/mem"
    assert main(["pull", "me/mem", str(tmp_path / "pulled")]) == 0
    assert content(tmp_path / "pulled") == hub.files("me/mem")
    found = RoutingMemory.from_pretrained(tmp_path / "pulled")
    assert_same_rows(found, memory)
    assert level_of(found) == "ids" and found.config.gamma == memory.config.gamma
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{found!r} of me/mem at commit {commit.oid} saved to {tmp_path / 'pulled'}"
    assert said[-1].startswith(f"Next: knnmoe evaluate {tmp_path / 'pulled'} --dataset")


@pytest.mark.parametrize(
    "words, level", [([], "ids"), (["--push-provenance", "text"], "text"), (["--push-provenance", "none"], "none")]
)
def test_the_text_is_uploaded_only_if_it_is_asked_for(hub, built, tmp_path, capsys, words, level):
    assert main(["push", str(built), "me/mem", *words]) == 0
    assert level_of(RoutingMemory.from_pretrained("me/mem")) == level
    captured = capsys.readouterr()
    assert f"uploaded with provenance {level}" in captured.out
    assert ("warning" in captured.err) == (level == "text")


def test_where_and_how_it_is_uploaded(hub, built, capsys):
    words = ["push", str(built), "me/mem", "--path-in-repo", "memories/one", "--revision", "v1", "--private"]
    assert main([*words, "--commit-message", "The first"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == "Next: knnmoe info me/mem --revision v1 --subfolder memories/one"
    )
    assert hub.repository("me/mem").private and not hub.files("me/mem")
    assert hub.commits("me/mem", "v1")[0].title == "The first"
    assert "memories/one/config.json" in hub.files("me/mem", "v1")


def test_a_pull_request_is_opened_and_nothing_else_changes(hub, built, tmp_path, capsys):
    assert main(["push", str(built), "me/mem"]) == 0
    before = hub.files("me/mem")
    capsys.readouterr()
    assert main(["push", str(built), "me/mem", "--create-pr", "--push-provenance", "text", "--quiet"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "/discussions/1" in said[0] and "once the pull request is merged" in said[-1]
    assert hub.files("me/mem") == before
    assert main(["pull", "me/mem", str(tmp_path / "of-pr"), "--revision", "refs/pr/1"]) == 0
    assert level_of(RoutingMemory.from_pretrained(tmp_path / "of-pr")) == "text"


def test_a_repository_is_pushed_on_to_another_one(hub, built, capsys):
    assert main(["push", str(built), "me/mem"]) == 0
    assert main(["push", "me/mem", "me/again", "--push-provenance", "none"]) == 0
    assert_same_rows(RoutingMemory.from_pretrained("me/again"), RoutingMemory.from_pretrained(built))


# what is the user's


def test_a_card_that_was_edited_is_uploaded_as_it_is(hub, built, tmp_path, capsys):
    folder = shutil.copytree(built, tmp_path / "memory")
    card = (folder / "README.md").read_text() + "\nMy own words, été.\n"
    (folder / "README.md").write_text(card)
    assert main(["push", str(folder), "me/mem"]) == 0
    assert "README.md was edited since it was saved, and is uploaded as it is" in capsys.readouterr().err
    assert hub.files("me/mem")["README.md"].decode() == card
    assert main(["push", str(folder), "me/mem"]) == 0  # it is the same again
    assert main(["pull", "me/mem", str(tmp_path / "pulled")]) == 0
    assert (tmp_path / "pulled" / "README.md").read_text() == card
    hub.commit("me/mem", {"README.md": "of somebody else"})
    assert "README.md" in failed(["push", str(folder), "me/mem"], capsys)
    assert hub.files("me/mem")["README.md"] == b"of somebody else"
    assert main(["push", str(folder), "me/mem", "--overwrite"]) == 0
    assert hub.files("me/mem")["README.md"].decode() == card


def test_a_card_that_is_a_link_to_another_file_is_not_uploaded(hub, built, tmp_path, capsys):
    folder, private = tmp_path / "memory", tmp_path / "private.txt"
    replace(RoutingMemory.from_pretrained(built), tokenizer=None).save_pretrained(folder)
    private.write_text("a password")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(private)
    assert "README.md is not usable: it is a symbolic link" in failed(["push", str(folder), "me/mem"], capsys)


def test_the_base_model_is_named_if_the_memory_was_built_from_a_folder(hub, base, built, capsys):
    assert main(["push", str(built), "me/mem"]) == 0
    assert "name the model's repository with --model" in capsys.readouterr().err
    assert RoutingMemory.from_pretrained("me/mem").config.base_model_name_or_path is None
    assert str(base).encode() not in b"".join(hub.files("me/mem").values())
    assert main(["push", str(built), "me/mem", "--model", "lab/base", "--base-model-revision", "v1"]) == 0
    assert "--model" not in capsys.readouterr().err
    config = RoutingMemory.from_pretrained("me/mem").config
    assert (config.base_model_name_or_path, config.base_model_revision) == ("lab/base", "v1")


def test_what_the_card_states_can_be_stated_when_it_is_uploaded(hub, built, tmp_path, capsys):
    words = ["--license", "cc-by-4.0", "--language", "en", "--dataset-name", "Guidelines", "--model-name", "Medicine"]
    assert main(["push", str(built), "me/mem", *words]) == 0
    card = ModelCard(hub.files("me/mem")["README.md"].decode())
    assert card.data.license == "cc-by-4.0" and card.data.language == ["en"]
    assert "# Medicine" in card.text and "Guidelines" in card.text
    folder = shutil.copytree(built, tmp_path / "memory")
    (folder / "README.md").write_text("mine")
    said = failed(["push", str(folder), "me/mem", *words[:2]], capsys)
    assert "--license would change README.md, which was edited since it was saved" in said
    for broken in (b"\xff\xfe no text", b"---\nlicense: [\n---\n", b"---\n- a list\n---\n"):
        (folder / "README.md").write_bytes(broken)
        assert "is not a model card" in failed(["push", str(folder), "me/mem"], capsys)
    (folder / "README.md").unlink()
    assert main(["push", str(folder), "me/mem", *words[:2]]) == 0
    assert "--private, but the repository 'me/mem'" in failed(["push", str(folder), "me/mem", "--private"], capsys)
    assert "--path-in-repo '../x' leads out" in failed(
        ["push", str(folder), "me/mem", "--path-in-repo", "../x"], capsys
    )


def test_a_pull_writes_over_nothing_that_is_not_a_memorys(hub, pushed, built, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("mine too")
    before = content(folder)
    assert "README.md" in failed(["pull", pushed, str(folder)], capsys)
    assert content(folder) == before
    assert main(["pull", pushed, str(folder), "--overwrite"]) == 0
    assert content(folder) == hub.files(pushed) | {"notes.txt": b"mine too"}
    assert main(["pull", pushed, str(folder)]) == 0  # a memory is replaced
    assert main(["push", str(built), "me/fewer", "--push-provenance", "none"]) == 0
    assert main(["pull", "me/fewer", str(folder)]) == 0
    assert content(folder) == hub.files("me/fewer") | {"notes.txt": b"mine too"}


def test_what_lies_beside_the_memory_is_not_pulled(hub, built, tmp_path):
    hub.create("me/model")
    hub.commit("me/model", {"model.safetensors": "weights", "config.json": "{}", "memory/notes.txt": "notes"})
    assert main(["push", str(built), "me/model", "--path-in-repo", "memory"]) == 0
    assert hub.files("me/model")["model.safetensors"] == b"weights"
    assert main(["pull", "me/model", str(tmp_path / "m"), "--subfolder", "memory"]) == 0
    there = {name.removeprefix("memory/"): data for name, data in hub.files("me/model").items() if "memory/" in name}
    del there["notes.txt"]
    assert content(tmp_path / "m") == there


def test_a_pull_means_the_repository_also_where_a_folder_has_its_name(hub, pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / pushed).mkdir(parents=True)
    assert main(["pull", pushed, "pulled"]) == 0
    assert content(tmp_path / "pulled") == hub.files(pushed)


def test_what_was_pulled_is_pulled_again_offline(hub, pushed, tmp_path, monkeypatch, capsys):
    assert main(["pull", pushed, str(tmp_path / "one")]) == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert main(["pull", pushed, str(tmp_path / "two")]) == 0
    assert content(tmp_path / "two") == content(tmp_path / "one") and not hub.requests
    assert "me/other" in failed(["pull", "me/other", str(tmp_path / "three")], capsys)
    assert not (tmp_path / "three").exists()


# repositories in the other commands


def test_every_command_that_reads_a_memory_reads_it_from_a_repository(hub, base, built, tmp_path, capsys):
    place = ["--path-in-repo", "deep/down", "--revision", "v1"]
    assert main(["push", str(built), "me/mem", "--push-provenance", "text", *place]) == 0
    source, model = ["me/mem", "--revision", "v1", "--subfolder", "deep/down"], ["--model", str(base)]
    capsys.readouterr()
    assert main(["info", *source, "--json"]) == 0
    found, commit = json.loads(capsys.readouterr().out), hub.commits("me/mem", "v1")[0].oid
    assert found["rows"] == len(RoutingMemory.from_pretrained(built)) and found["commit"] == commit
    assert main(["info", *source]) == 0
    assert capsys.readouterr().out.startswith(f"me/mem at commit {commit}: {found['folder']}\n")
    held_out = texts(tmp_path / "test.jsonl", HELD_OUT)
    assert main(["evaluate", *source, "--dataset", held_out, *model]) == 0
    assert "NLL memory" in capsys.readouterr().out
    assert main(["remove", *source, "--example-ids", "0", "--output", str(tmp_path / "fewer")]) == 0
    fewer = RoutingMemory.from_pretrained(tmp_path / "fewer")
    assert len(fewer) < len(RoutingMemory.from_pretrained(built))
    assert main(["merge", str(tmp_path / "fewer"), "me/mem", "--output", str(tmp_path / "both")]) == 1  # main is empty
    other = ["--other-revision", "v1", "--other-subfolder", "deep/down"]
    assert main(["merge", str(tmp_path / "fewer"), "me/mem", *other, "--output", str(tmp_path / "both")]) == 0
    assert examples(RoutingMemory.from_pretrained(tmp_path / "both"))
    ordinary = texts(tmp_path / "ordinary.jsonl", ["other text of numbers"])
    words = ["calibrate", *source, *model, "--ordinary-dataset", ordinary, "--output", str(tmp_path / "calibrated")]
    assert main(words) in (0, 1)  # a memory for random weights may help on any text
    assert "me/mem could not be calibrated" in capsys.readouterr().err or (tmp_path / "calibrated").exists()


def test_a_build_uploads_what_push_uploads(hub, base, built, tmp_path, capsys):
    reference = Path(built).parent / "reference.jsonl"
    words = ["build", "--model", str(base), "--dataset", str(reference), "--output", str(tmp_path / "memory"), *QUICK]
    assert main([*words, "--gamma", "0.2", "--push-to-hub", "me/built", "--hub-private-repo"]) == 0
    assert "uploaded with provenance ids" in capsys.readouterr().out and hub.repository("me/built").private
    assert main(["push", str(tmp_path / "memory"), "me/pushed"]) == 0
    one, other = hub.files("me/built"), hub.files("me/pushed")
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name.endswith(".safetensors"))


# the token


def test_a_token_of_the_command_line_is_used_warned_of_and_forgotten(hub, built, tmp_path, monkeypatch, capsys):
    hub.create("stranger/mem", private=True)
    assert main(["push", str(built), "stranger/mem", "--token", hub.stranger_token]) == 0
    captured = capsys.readouterr()
    assert "--token leaves the token in the shell's history" in captured.err
    assert hub.stranger_token not in captured.err + captured.out
    assert os.environ["HF_TOKEN"] == hub.token
    monkeypatch.delenv("HF_TOKEN")
    assert "stranger/mem" in failed(["pull", "stranger/mem", str(tmp_path / "m")], capsys)
    (tmp_path / "options.yaml").write_text(f"token: {hub.stranger_token}\n")
    assert main(["pull", "stranger/mem", str(tmp_path / "m"), "--config", str(tmp_path / "options.yaml")]) == 0
    assert "HF_TOKEN" not in os.environ and "shell" not in capsys.readouterr().err
