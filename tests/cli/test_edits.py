"""`knnmoe merge`, `remove` and `calibrate`: memories from memories, saved with what is inside said."""

import os

import pytest

from knnmoe_hf import RoutingMemory
from knnmoe_hf.cli import main
from knnmoe_hf.cli.inside import level_of
from tests.cli.helpers import HELD_OUT, QUICK, TEXTS, examples, one_error, texts


@pytest.fixture(scope="module")
def other(base, tmp_path_factory) -> str:
    """A memory of `HELD_OUT`, whose example ids are also those of the first."""
    folder = tmp_path_factory.mktemp("other")
    dataset = texts(folder / "x.jsonl", HELD_OUT)
    words = ["build", "--model", str(base), "--dataset", dataset, "--output", str(folder / "memory"), *QUICK]
    assert main([*words, "--gamma", "0.2"]) == 0
    return str(folder / "memory")


def windows(lines: list[str]) -> list[str]:
    return [line[i : i + 16] for line in lines for i in range(0, len(line), 16)]


@pytest.mark.parametrize("level", [None, "ids", "none"])
def test_two_memories_become_one(level, built, other, tmp_path, capsys):
    words = ["merge", str(built), other, "--output", str(tmp_path / "both")]
    assert main([*words, *(["--save-provenance", level] if level else [])]) == 0
    shown = capsys.readouterr().out
    memory = RoutingMemory.from_pretrained(tmp_path / "both")
    assert len(memory) == sum(len(RoutingMemory.from_pretrained(side)) for side in (built, other))
    assert level_of(memory) == (level or "text")
    if level is None:
        assert examples(memory) == windows(TEXTS) + windows(HELD_OUT)
    assert shown.startswith(f"{memory!r} saved to {tmp_path / 'both'}\n") and "Keys of " in shown
    assert "was not measured" in shown and f"knnmoe evaluate {tmp_path / 'both'}" in shown


def test_examples_are_taken_out(built, tmp_path, capsys):
    words = ["remove", str(built), "--output", str(tmp_path / "fewer"), "--example-ids"]
    assert main([*words, "0", "3"]) == 0
    kept = [text for i, text in enumerate(windows(TEXTS)) if i not in (0, 3)]
    assert examples(RoutingMemory.from_pretrained(tmp_path / "fewer")) == kept
    capsys.readouterr()
    assert main([*words, "99"]) == 1
    assert "[99] are no examples of this memory" in one_error(capsys.readouterr(), "remove")
    assert main([*words, "0", "1", "2", "3", "4", "5"]) == 1
    assert "no example" in one_error(capsys.readouterr(), "remove")


def test_nothing_is_written_over_without_being_asked_to(built, other, tmp_path, capsys):
    before = sorted(os.listdir(built))
    for words in (["merge", str(built), other], ["remove", str(built), "--example-ids", "1"], ["calibrate", other]):
        target = words[1]
        assert main([*words, "--output", target]) == 1
        assert "is the memory that is read" in one_error(capsys.readouterr(), words[0])
    assert sorted(os.listdir(built)) == before
    (tmp_path / "README.md").write_text("mine")
    assert main(["merge", str(built), other, "--output", str(tmp_path)]) == 1
    assert "README.md" in one_error(capsys.readouterr(), "merge")
    assert main(["merge", str(built), other, "--output", str(tmp_path), "--overwrite"]) == 0
    assert (tmp_path / "README.md").read_text() != "mine"


def test_a_memory_that_helps_on_all_background_text_is_not_saved(base, tmp_path, capsys):
    dataset = texts(tmp_path / "x.jsonl", [f"the gate routes token {n} to an expert" for n in range(12)])
    ordinary = texts(tmp_path / "ordinary.jsonl", [f"{n} is other text, of numbers" for n in range(8)])
    words = ["build", "--model", str(base), "--dataset", dataset, "--output", str(tmp_path / "memory"), *QUICK]
    assert main([*words, "--max-length", "64"]) == 0
    capsys.readouterr()
    output = tmp_path / "calibrated"
    words = ["calibrate", str(tmp_path / "memory"), "--ordinary-dataset", ordinary, "--output", str(output)]
    assert main([*words, "--gamma", "0.5"]) == 1
    captured = capsys.readouterr()
    assert "could not be calibrated" in one_error(captured, "calibrate") and not output.exists()
    assert "warning: the memory helps on all background text (" in captured.err


def test_a_memory_without_text_cannot_be_calibrated(built, other, tmp_path, capsys):
    assert main(["merge", str(built), other, "--output", str(tmp_path / "ids"), "--save-provenance", "ids"]) == 0
    capsys.readouterr()
    assert main(["calibrate", str(tmp_path / "ids"), "--output", str(tmp_path / "o")]) == 1
    assert "has no text of its references to calibrate by" in one_error(capsys.readouterr(), "calibrate")
