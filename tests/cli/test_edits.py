"""`knnmoe merge`, `remove` and `calibrate`: memories from memories, saved with what is inside said."""

import os

import pytest

from knnmoe_hf import RoutingMemory
from knnmoe_hf.cli import main
from knnmoe_hf.cli.inside import level_of
from knnmoe_hf.memory.audit import audit
from tests.cli.helpers import HELD_OUT, QUICK, TEXTS, examples, one_error, texts
from tests.memory.helpers import full_memory
from tests.support.models import tiny_model
from tests.support.stats import with_stats


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
    assert "[99] are not examples of this memory" in one_error(capsys.readouterr(), "remove")
    assert main([*words, "0", "1", "2", "3", "4", "5"]) == 1
    assert "no example" in one_error(capsys.readouterr(), "remove")


def test_layers_and_rows_are_kept(built, tmp_path, capsys):
    memory = RoutingMemory.from_pretrained(built)
    words = ["select", str(built), "--output", str(tmp_path / "fewer"), "--overwrite"]
    assert main([*words, "--layers", "1", "--max-rows", "9"]) == 0
    kept = RoutingMemory.from_pretrained(tmp_path / "fewer")
    assert list(kept.layers) == [1] and len(kept) == 9
    assert kept.card_data.history == [
        "layers [1] of 2 layers were kept",
        f"rows that gained most: 9 of {len(memory)} rows were kept",
    ]
    capsys.readouterr()
    assert main(["info", str(tmp_path / "fewer")]) == 0
    assert "since it was built:\n  layers [1] of 2 layers were kept\n" in capsys.readouterr().out
    assert main([*words, "--layers", "5"]) == 1
    assert "layers=[5] is not allowed" in one_error(capsys.readouterr(), "select")
    assert main([*words, "--min-gain", "1000"]) == 1
    assert "no row of" in one_error(capsys.readouterr(), "select")


def test_the_confidence_is_set(built, tmp_path, capsys):
    words = ["adjust", str(built), "--output", str(tmp_path / "other"), "--overwrite"]
    assert main([*words, "--confidence", "rbf", "--gamma", "0.4"]) == 0
    other = RoutingMemory.from_pretrained(tmp_path / "other")
    assert (other.config.confidence, other.config.gamma) == ("rbf", 0.4) and other.verdict is None
    assert other.card_data.history == ["options were changed: gamma 0.2 -> 0.4, confidence context -> rbf"]
    capsys.readouterr()
    assert main([*words, "--threshold", "0.4"]) == 1
    assert "set context_threshold, or use confidence='calibrated'" in one_error(capsys.readouterr(), "adjust")
    memory = with_stats(RoutingMemory.from_pretrained(built, confidence="calibrated"))
    memory.save_pretrained(tmp_path / "calibrated")
    words[1] = str(tmp_path / "calibrated")
    assert main([*words, "--threshold", "-0.4", "--num-neighbors", "4"]) == 0
    other = RoutingMemory.from_pretrained(tmp_path / "other")
    assert {rows.stats.threshold for rows in other.layers.values()} == {-0.4}
    assert other.card_data.history[-1] == "its confidence was set by hand: threshold 0.5 -> -0.4"


def test_what_the_audit_names_is_taken_out(built, tmp_path, capsys):
    words = ["--output", str(tmp_path / "cleaned"), "--overwrite"]
    memory = full_memory(tiny_model("olmoe"), examples=range(40))
    values = {layer: rows.decoded_values.clone() for layer, rows in memory.layers.items()}
    keys = {layer: rows.decoded_keys.clone() for layer, rows in memory.layers.items()}
    for table in values.values():
        table[30:40] *= 1000  # the rows of example 3
    poisoned = RoutingMemory.build(memory.config, keys, values, tiny_model("olmoe"), memory.provenance)
    poisoned.save_pretrained(tmp_path / "poisoned")
    found = audit(poisoned)
    assert list(found.examples) == [3]
    assert main(["remove", str(tmp_path / "poisoned"), "--suspicious", *words]) == 0
    cleaned = RoutingMemory.from_pretrained(tmp_path / "cleaned")
    assert len(cleaned) == 390 and 3 not in cleaned.provenance.example_ids
    capsys.readouterr()
    assert main(["select", str(built), "--max-rows", "1", "--output", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    assert main(["remove", str(tmp_path / "one"), "--suspicious", "--output", str(tmp_path / "again")]) == 1
    assert "nothing suspicious" in one_error(capsys.readouterr(), "remove")


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
