"""`knnmoe evaluate` on several data sets, with settings that need no build, as a table and as JSON."""

import json
import shutil

import pytest

from knnmoe_hf import RoutingMemory
from knnmoe_hf.cli import main
from tests.cli.helpers import HELD_OUT, OTHERS, TEXTS, cells, one_error, texts

OFF = ["0123456789", "def f(): pass", "import this", "x = [1, 2, 3]", "while True: break"]


@pytest.fixture
def words(built, tmp_path) -> list[str]:
    """An evaluation on two texts of the domain and one other, as JSON."""
    names = [texts(tmp_path / f"{i}.jsonl", lines) for i, lines in enumerate((HELD_OUT, [*HELD_OUT, *OTHERS], OFF))]
    more = ["--dataset", names[0], "--dataset", names[1], "--off-dataset", names[2]]
    return ["evaluate", str(built), *more, "--dtype", "float32", "--json", "--quiet"]


def evaluated(words: list[str], capsys) -> dict:
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_every_data_set_is_a_result_with_its_kind_and_few_windows_have_no_interval(words, capsys):
    found = evaluated(words, capsys)["results"]
    assert [result["kind"] for result in found] == ["in-domain", "in-domain", "off-domain"]
    assert [result["dataset"] for result in found] == words[3:8:2]
    assert [result["windows"] for result in found] == [2, 5, 5]
    assert found[0]["nll_change"]["low"] is None and found[0]["accuracy_change"]["high"] is None
    for result in found[1:]:
        change = result["nll_change"]
        assert change["low"] < change["mean"] < change["high"]
    for result in found:
        difference = result["memory"]["nll"] - result["base"]["nll"]
        assert result["nll_change"]["mean"] == pytest.approx(difference)
        assert set(result["confidence"]) == {"0", "1"} and result["overlap"]["left_out"] == 0


def test_settings_are_tried_without_a_build(words, built, capsys):
    saved = evaluated(words, capsys)
    tried = evaluated(
        [*words, "--gamma", "50", "--num-neighbors", "1", "--layers", "1", "--confidence", "rbf"], capsys
    )
    assert saved["options_given"] == {}
    given = {"gamma": 50, "num_neighbors": 1, "layers": [1], "confidence": "rbf"}
    assert tried["options_given"] == given and given.items() <= tried["options"].items()
    assert [set(result["confidence"]) for result in tried["results"]] == [{"1"}] * 3
    for before, after in zip(saved["results"], tried["results"]):
        assert before["base"]["nll"] == after["base"]["nll"] and before["memory"]["nll"] != after["memory"]["nll"]
    assert RoutingMemory.from_pretrained(built).config.gamma == 0.2  # the memory itself is as it was
    assert main([*words, "--layers", "7"]) == 1
    assert "[7] have no rows here" in one_error(capsys.readouterr(), "evaluate")


def test_the_results_are_written_to_a_file_that_is_its_own(words, tmp_path, capsys):
    output = tmp_path / "results.json"
    for gamma in ("1", "2"):  # the second time over the first
        found = evaluated([*words, "--gamma", gamma, "--output", str(output)], capsys)
        assert json.loads(output.read_text()) == found
    output.write_text("my notes")
    assert main([*words, "--output", str(output)]) == 1
    assert "holds something else" in one_error(capsys.readouterr(), "evaluate") and output.read_text() == "my notes"
    evaluated([*words, "--output", str(output), "--overwrite"], capsys)
    assert json.loads(output.read_text())["results"]


def test_the_table_has_a_column_for_each(words, tmp_path, capsys):
    words = [word for word in words if word != "--json"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(name in shown.splitlines()[0] for name in words[3:8:2])  # whole, however long
    assert shown.splitlines()[1].split() == ["in-domain", "in-domain", "off-domain"]
    assert cells(shown, "windows") == ["2", "5", "5"] and shown.count("[n/a]") == 2


def test_text_that_the_memory_holds_is_left_out_or_asked_for(built, tmp_path, capsys):
    words = ["evaluate", str(built), "--max-length", "16", "--json", "--dataset"]
    assert main([*words, texts(tmp_path / "test.jsonl", [TEXTS[0][:16], HELD_OUT[0][:16]])]) == 0
    captured = capsys.readouterr()
    (result,) = json.loads(captured.out)["results"]
    assert (result["windows"], result["overlap"]["windows"], result["overlap"]["left_out"]) == (1, 2, 1)
    assert "1 of the 2 windows of test text overlap the references and are left out" in captured.err
    seen = texts(tmp_path / "seen.jsonl", TEXTS)
    assert main([*words, seen]) == 1
    error = one_error(capsys.readouterr(), "evaluate")
    assert "the memory holds all 6 windows" in error and "--allow-overlap" in error
    assert main([*words, seen, "--allow-overlap"]) == 0
    captured = capsys.readouterr()
    (result,) = json.loads(captured.out)["results"]
    assert (result["windows"], result["overlap"]["left_out"]) == (6, 0) and "are scored all the same" in captured.err


def test_a_base_model_that_has_moved_is_named(words, built, base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "moved")
    shutil.copytree(built, tmp_path / "memory")
    config = json.loads((tmp_path / "memory" / "config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "memory" / "config.json").write_text(json.dumps(config))
    words[1] = str(tmp_path / "memory")
    assert main(words) == 1
    assert "if it is elsewhere, name it with --model" in one_error(capsys.readouterr(), "evaluate")
    found = evaluated([*words, "--model", str(tmp_path / "moved")], capsys)
    assert found["base_model"] == str(tmp_path / "moved") and len(found["results"]) == 3


def test_data_is_read_as_the_options_say(built, tmp_path, capsys):
    path = tmp_path / "other.csv"
    path.write_bytes("body,topic\nthe gate was sch\u00f6n,1\n".encode("cp1252"))
    words = ["evaluate", str(built), "--dataset", str(path), "--json"]
    assert main(words) == 1
    one_error(capsys.readouterr(), "evaluate")
    more = ["--encoding", "cp1252", "--text-column", "body", "--ignore-columns", "topic"]
    assert main([*words, *more]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["windows"] == 1
