"""Ctrl-C at any moment of `knnmoe compare`, also several times: the same command goes on, to the same results."""

import json
from pathlib import Path

import pytest

from knnmoe_hf.cli import main
from tests.comparison.helpers import timeless
from tests.support.interrupts import interrupted
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer

METHODS = [
    {"method": "constant_bias", "epochs": 1, "learning_rates": [0.3]},
    {"method": "lora", "epochs": 1, "learning_rates": [0.01]},
    {"method": "in_context_fixed", "examples": 7},  # of 6 references: it fails
    {"method": "rewiring", "steps": 1},
]
TASKS = [{"name": "lab_topics", "off_tasks": ["lab_python"]}, {"name": "lab_headers", "off_tasks": []}]
PLACES = {
    "in a fit": ["_step", "counted"],
    "while it is saved": ["Method.save"],
    "in a fit by Trainer, and while that cleans up": ["_NextTokenTrainer.compute_loss:2", "with_trainer"],
    "while routes are compared": ["effect_on_routing"],
    "in the answers": ["MethodLM._answer:2"],
    "while answers are written": ["Record.add:2"],
    "in an adaptation to a prompt": ["Adaptation._step"],
    "in the scores": ["Suite.score:2"],
    "between two tasks": ["Comparison._compare:6"],
    "while a failure is told": ["fail_row"],
    "while the results are written": ["write_json:9"],
    "in the report": ["write_report:2", "claimed"],
    "while it says how to go on": ["to_html", "close_progress_bars"],
}

AGAIN_AND_AGAIN = [
    "_step",
    "Method.save",
    "Record.add:3",
    "_NextTokenTrainer.compute_loss",
    "Adaptation._step",
    "to_html:7",
]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """The command without its folder."""
    folder = tmp_path_factory.mktemp("compared")
    tiny_model("olmoe", vocab_size=260, max_position_embeddings=1024).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    plan = {"model": str(folder / "base"), "dtype": "float32", "methods": METHODS, "tasks": TASKS}
    plan["settings"] = {"references": 6, "limit": 2}
    (folder / "plan.yaml").write_text(json.dumps(plan))
    return ["compare", "--config", str(folder / "plan.yaml"), "--quiet", "--output"]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory) -> dict:
    """The results of a comparison that was not interrupted."""
    output = tmp_path_factory.mktemp("whole") / "output"
    assert main([*words, str(output)]) == 0
    return results_of(output)


def results_of(output: Path) -> dict:
    return timeless(json.loads((output / "results.json").read_text()))


@pytest.fixture
def output(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)  # so that its name is short enough to be shown whole
    return Path("output")


def assert_interrupted(words: list[str], output: Path, places: list[str], capsys) -> None:
    capsys.readouterr()
    with interrupted(*places) as reached:
        assert main([*words, str(output)]) == 130
    assert reached == [place.partition(":")[0] for place in places]
    said = capsys.readouterr()
    way = "knnmoe: what is done is in 'output': the same command resumes it\n"
    assert (said.out, said.err) == ("", f"{way}knnmoe: interrupted\n")


@pytest.mark.parametrize("where", [w if w == "in a fit" else pytest.param(w, marks=pytest.mark.slow) for w in PLACES])
def test_the_same_command_goes_on(where, words, whole, output, capsys):
    assert_interrupted(words, output, PLACES[where], capsys)
    assert main([*words, str(output)]) == 0
    assert results_of(output) == whole
    left = [path.name for path in output.rglob(".*")]
    assert left == [".lock"]


@pytest.mark.slow
def test_it_may_be_interrupted_again_and_again(words, whole, output, capsys):
    for place in AGAIN_AND_AGAIN:
        assert_interrupted(words, output, [place], capsys)
    assert main([*words, str(output)]) == 0
    assert results_of(output) == whole


def test_before_the_folder_is_there_an_interrupt_names_none(words, output, capsys):
    with interrupted("load_base"):
        assert main([*words, str(output)]) == 130
    assert capsys.readouterr().err == "knnmoe: interrupted\n"
    assert not output.exists()
