"""Next tokens on the command line: built, kept or left out, said, compared, refused where there are none."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from knnmoe_hf import RoutingMemory
from knnmoe_hf.cli import main
from knnmoe_hf.cli.inside import level_of
from tests.cli.helpers import HELD_OUT, QUICK, TEXTS, cells, one_error, texts
from tests.support.models import random_memory

WEIGHT = ["--next-token-weight", "0.5"]


@pytest.fixture
def words(base, tmp_path) -> list[str]:
    """A build on `TEXTS`."""
    dataset = texts(tmp_path / "reference.jsonl", TEXTS)
    return ["build", "--model", str(base), "--dataset", dataset, "--output", str(tmp_path / "memory"), *QUICK]


@pytest.fixture(scope="module")
def stored(built, tmp_path_factory):
    """`built` without the text of its references, but with the tokens that follow its rows."""
    folder = tmp_path_factory.mktemp("stored")
    RoutingMemory.from_pretrained(built).save_pretrained(folder, provenance="ids", next_tokens=True)
    return folder


@pytest.fixture(scope="module")
def poor(built, tmp_path_factory):
    """`built` with neither."""
    folder = tmp_path_factory.mktemp("poor")
    RoutingMemory.from_pretrained(built).save_pretrained(folder, provenance="none")
    return folder


def usage_error(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit):
        main(words)
    return one_error(capsys.readouterr(), words[0])


# build


def test_a_built_memory_keeps_its_recall(words, tmp_path, capsys):
    assert main([*words, "--recall", "both", "--save-provenance", "ids", "--save-next-tokens", *WEIGHT]) == 0
    memory = RoutingMemory.from_pretrained(tmp_path / "memory")
    assert (memory.config.recall, memory.config.next_token_weight) == ("both", 0.5)
    assert level_of(memory) == "ids" and len(memory.stored_next_tokens) == len(memory)
    lines = capsys.readouterr().out.splitlines()
    text = "The tokens that follow the rows are inside, which in their order are the text of the references; ids of 6"
    assert any(line.startswith(text) for line in lines)
    assert "To leave the next tokens out, use --no-save-next-tokens with the same command." in lines


@pytest.mark.parametrize("level", ["ids", "none"])
def test_a_build_that_would_leave_out_what_it_needs_is_refused_at_once(words, capsys, level):
    said = usage_error([*words, "--recall", "both", "--save-provenance", level], capsys)
    assert f"--recall 'both' is not allowed with --save-provenance '{level}'" in said
    assert "set --save-next-tokens, --save-provenance 'text' or --recall 'routing'" in said


@pytest.mark.parametrize("asked", [["--push-next-tokens"], ["--push-provenance", "text"], []])
def test_an_upload_of_a_memory_that_needs_them_has_them_or_is_refused_at_once(words, capsys, hub, asked):
    words = [*words, "--recall", "both", "--push-to-hub", "me/gates", *asked]
    if not asked:
        said = usage_error(words, capsys)
        assert "--push-next-tokens or --push-provenance text" in said and not hub.store.repositories
        return
    assert main(words) == 0
    found = RoutingMemory.from_pretrained("me/gates")
    assert found.next_tokens is not None and found.provenance.has_text == ("text" in asked)


def test_what_does_nothing_is_refused(words, built, capsys):
    for command in (words, ["evaluate", str(built), "--dataset", words[4]]):
        for option, value in (("weight", "0.5"), ("temperature", "0.5"), ("neighbors", "3")):
            said = usage_error([*command, "--recall", "routing", f"--next-token-{option}", value], capsys)
            assert f"--next-token-{option} {value} does nothing with --recall routing" in said
    said = usage_error([*words, "--push-next-tokens"], capsys)
    assert "--push-next-tokens is not allowed without --push-to-hub" in said


# evaluate


def evaluated(memory, tmp_path, capsys, *more: str) -> dict:
    dataset = texts(tmp_path / "test.jsonl", HELD_OUT)
    words = ["evaluate", str(memory), "--dataset", dataset, "--dtype", "float32", "--json", "--quiet", *more]
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)


def test_an_evaluation_tries_another_recall(built, stored, tmp_path, capsys):
    found = {
        recall: evaluated(built, tmp_path, capsys, "--recall", recall, *more)
        for recall, more in {"routing": [], "next_tokens": WEIGHT, "both": WEIGHT}.items()
    }
    nll = {recall: result["results"][0]["memory"]["nll"] for recall, result in found.items()}
    assert len(set(nll.values())) == 3
    assert all(result["options"]["recall"] == recall for recall, result in found.items())
    assert len({result["results"][0]["base"]["nll"] for result in found.values()}) == 1
    assert evaluated(built, tmp_path, capsys)["results"][0]["memory"]["nll"] == nll["routing"]
    without_text = evaluated(stored, tmp_path, capsys, "--recall", "both", *WEIGHT)
    assert without_text["results"][0]["memory"]["nll"] == pytest.approx(nll["both"])


def test_the_table_says_which_recall_was_compared(stored, tmp_path, capsys):
    dataset = texts(tmp_path / "test.jsonl", HELD_OUT)
    assert main(["evaluate", str(stored), "--dataset", dataset, "--recall", "next_tokens"]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("bytes in 2 layers; recall next_tokens") and "confidence in next tokens" in shown


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_a_memory_without_next_tokens_is_refused_in_one_line(poor, tmp_path, capsys, command):
    words = [command, str(poor), "--recall", "both"]
    dataset = texts(tmp_path / "test.jsonl", HELD_OUT)
    words += ["--dataset", dataset] if command == "evaluate" else ["--output", str(tmp_path / "out")]
    assert main(words) == 1
    said = one_error(capsys.readouterr(), command)
    assert "recall='both' is not possible" in said and "next_tokens=True" in said


# edits


def test_edits_keep_next_tokens_unless_they_are_told_not_to(stored, tmp_path):
    whole = RoutingMemory.from_pretrained(stored)
    words = ["remove", str(stored), "--example-ids", "1", "--output"]
    assert main([*words, str(tmp_path / "default")]) == 0
    left = RoutingMemory.from_pretrained(tmp_path / "default")
    assert torch.equal(left.next_tokens, whole.next_tokens[whole.provenance.example_ids != 1])
    for name, more in (("no", ["--no-save-next-tokens"]), ("ids", ["--save-provenance", "ids"])):
        assert main([*words, str(tmp_path / name), *more]) == 0
        assert RoutingMemory.from_pretrained(tmp_path / name).next_tokens is None
    more = ["--save-provenance", "none", "--save-next-tokens"]
    assert main([*words, str(tmp_path / "yes"), *more]) == 0
    assert torch.equal(RoutingMemory.from_pretrained(tmp_path / "yes").next_tokens, left.next_tokens)


def test_what_a_memory_has_not_cannot_be_kept(base, tmp_path, capsys):
    random_memory(AutoModelForCausalLM.from_pretrained(base), rows=7).save_pretrained(tmp_path / "rows")
    words = ["remove", str(tmp_path / "rows"), "--example-ids", "1", "--output", str(tmp_path / "out")]
    assert main([*words, "--save-next-tokens"]) == 1
    assert "--save-next-tokens is not possible" in one_error(capsys.readouterr(), "remove")
    assert not (tmp_path / "out").exists()


def test_an_edit_that_would_leave_out_what_the_memory_needs_is_refused(built, tmp_path, capsys):
    RoutingMemory.from_pretrained(built, recall="both").save_pretrained(tmp_path / "both")
    words = ["remove", str(tmp_path / "both"), "--example-ids", "1", "--output", str(tmp_path / "out")]
    assert main([*words, "--save-provenance", "ids"]) == 1
    said = one_error(capsys.readouterr(), "remove")
    assert "save it with --save-next-tokens or --save-provenance text" in said and not (tmp_path / "out").exists()
    assert main([*words, "--save-provenance", "ids", "--save-next-tokens"]) == 0
    assert RoutingMemory.from_pretrained(tmp_path / "out").config.recall == "both"


# info


def test_info_says_whether_they_are_inside_and_what_they_take(built, stored, poor, capsys):
    count = len(RoutingMemory.from_pretrained(built))
    possible = "Recall next_tokens and both are possible: the tokens that follow the rows"
    said = {
        built: (True, 0, f"{possible} are in the text of the references."),
        stored: (True, 4 * count, f"{possible} take {4 * count} bytes."),
        poor: (
            False,
            0,
            "The tokens that follow the rows are not inside, so that recall next_tokens and both are not",
        ),
    }
    for folder, (there, size, text) in said.items():
        assert main(["info", str(folder)]) == 0
        shown = capsys.readouterr().out
        assert text in shown and "bytes; recall routing\n" in shown and "  next_token_weight = None\n" in shown
        assert main(["info", str(folder), "--json"]) == 0
        inside = json.loads(capsys.readouterr().out)["inside"]
        assert (inside["next_tokens"], inside["next_token_bytes"]) == (there, size)


def test_a_plan_says_what_next_tokens_would_take(base, capsys):
    assert main(["info", "--plan", str(base), "--tokens", "10"]) == 0
    assert "next tokens, if they are saved without the text: 40 bytes more" in capsys.readouterr().out


# quickstart


@pytest.mark.parametrize("recall", ["routing", "both"])
def test_a_quickstart_compares_routing_and_both_on_the_same_text(base, tmp_path, capsys, recall):
    reference, test = texts(tmp_path / "reference.jsonl", TEXTS), texts(tmp_path / "test.jsonl", HELD_OUT)
    more = WEIGHT if recall == "both" else []
    words = ["quickstart", "--model", str(base), "--dataset", reference, "--test-dataset", test, *QUICK, *more]
    assert main([*words, "--recall", recall, "--output", str(tmp_path / "memory")]) == 0
    shown = capsys.readouterr().out
    other = "both" if recall == "routing" else "routing"
    nll = [float(cells(shown, name)[0]) for name in ("NLL base", "NLL memory", f"NLL memory, recall {other}")]
    assert len(set(nll)) == 3
    for number, of in ((1, recall), (2, other)):
        again = evaluated(tmp_path / "memory", tmp_path, capsys, "--recall", of, "--max-length", "16")
        assert again["results"][0]["memory"]["nll"] == pytest.approx(nll[number], abs=1e-4)
    for name in ("perplexity memory", "accuracy memory", "time memory"):
        assert any(line.startswith(f"{name}, recall {other}") for line in shown.splitlines())
    assert f"[memory, recall {other}] " in shown and "[memory] " in shown
    assert RoutingMemory.from_pretrained(tmp_path / "memory").config.recall == recall


def test_a_quickstart_that_saves_neither_compares_routing_alone(base, tmp_path, capsys):
    reference, test = texts(tmp_path / "reference.jsonl", TEXTS), texts(tmp_path / "test.jsonl", HELD_OUT)
    words = ["quickstart", "--model", str(base), "--dataset", reference, "--test-dataset", test, *QUICK]
    assert main([*words, "--output", str(tmp_path / "memory"), "--save-provenance", "none"]) == 0
    assert "both  " not in capsys.readouterr().out
