"""`knnmoe quickstart` from model to table, on a tiny model and its own files."""

import pytest

from knnmoe_hf import RoutingMemory
from knnmoe_hf.cli import main
from tests.cli.helpers import HELD_OUT, QUICK, TEXTS, cells, examples, one_error, texts

OFF = ["0123456789", "def f(): pass"]


@pytest.fixture
def words(base, tmp_path) -> list[str]:
    """A quickstart on `TEXTS`; what to test on is to be added."""
    dataset = texts(tmp_path / "reference.jsonl", TEXTS)
    output = ["--output", str(tmp_path / "memory")]
    return ["quickstart", "--model", str(base), "--dataset", dataset, *output, *QUICK, "--gamma", "0.2"]


def windows(lines: list[str]) -> list[str]:
    """Examples of 16 bytes, as `QUICK` cuts them."""
    return [line[i : i + 16] for line in lines for i in range(0, len(line), 16)]


def targets(lines: list[str]) -> str:
    return str(sum(len(window) - 1 for window in windows(lines)))


def test_quickstart_goes_from_model_to_table(words, tmp_path, capsys):
    test, off = texts(tmp_path / "test.jsonl", HELD_OUT), texts(tmp_path / "off.jsonl", OFF)
    assert main([*words, "--test-dataset", test, "--off-dataset", off]) == 0
    captured = capsys.readouterr()
    assert cells(captured.out, "tokens") == [targets(HELD_OUT), targets(OFF)]
    assert all(name in captured.out for name in (test, off))
    assert cells(captured.out, "NLL base") != cells(captured.out, "NLL memory")
    on, away = map(float, cells(captured.out, "confidence, layer 1"))
    assert on > away
    said = dict(line.split("] ", 1) for line in captured.out.splitlines() if line.startswith("["))
    assert said["[prompt"] == HELD_OUT[0][:16].strip() and {"[base", "[memory"} <= set(said)
    memory = RoutingMemory.from_pretrained(tmp_path / "memory")
    assert examples(memory) == windows(TEXTS)
    assert f"building a memory of {sum(map(len, TEXTS))} reference tokens" in captured.err
    page = tmp_path / "memory-report.html"
    assert captured.out.splitlines()[-1] == f"The page on memory is {page}: open it in a browser."
    shown = page.read_text()
    assert "To measure it:" not in shown and "Rows that test.jsonl recalls most" in shown
    assert not (tmp_path / "memory" / page.name).exists()


def test_a_file_in_the_place_of_the_page_is_named_before_anything_is_built(words, tmp_path, capsys):
    (tmp_path / "memory-report.html").write_text("mine")
    assert main(words) == 1 and "holds something else" in one_error(capsys.readouterr(), "quickstart")
    assert not (tmp_path / "memory").exists()


def test_test_examples_that_are_references_are_dropped(words, tmp_path, capsys):
    seen = [TEXTS[0][:16], HELD_OUT[0][:16]]
    test, off = texts(tmp_path / "test.jsonl", seen), texts(tmp_path / "off.jsonl", [TEXTS[1][:16], OFF[0]])
    assert main([*words, "--test-dataset", test, "--off-dataset", off]) == 0
    assert cells(capsys.readouterr().out, "tokens") == [targets(seen[1:]), targets(OFF[:1])]


def test_a_test_of_references_alone_is_refused(words, tmp_path, capsys):
    test = texts(tmp_path / "test.jsonl", TEXTS)
    assert main([*words, "--test-dataset", test]) == 1
    assert f"no example of {test} is left that is not a reference" in one_error(capsys.readouterr(), "quickstart")
    assert not list((tmp_path / "memory").glob("*"))


def test_without_a_test_every_fifth_text_is_held_out(words, base, tmp_path, capsys):
    lines = [f"line {i} of the text" for i in "abcdefghij"]
    words[words.index("--dataset") + 1] = texts(tmp_path / "ten.jsonl", lines)
    words[words.index("--max-length") + 1] = "32"
    assert main(words) == 0
    assert cells(capsys.readouterr().out, "tokens") == [str(2 * (len(lines[0]) - 1))]
    assert examples(RoutingMemory.from_pretrained(tmp_path / "memory")) == lines[:4] + lines[5:9]


def test_limits_bound_references_and_tests(words, tmp_path, capsys):
    test = texts(tmp_path / "test.jsonl", HELD_OUT)
    assert main([*words, "--test-dataset", test, "--max-tokens", "20", "--test-examples", "1"]) == 0
    assert cells(capsys.readouterr().out, "tokens") == ["15"]
    assert examples(RoutingMemory.from_pretrained(tmp_path / "memory")) == [TEXTS[0][:16]]
