"""Every line of code in the README, `docs/` and `examples/` runs; a Hub on loopback has a small base model."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import datasets
import pytest

from knnmoe_hf.cli import main
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer

ROOT = Path(__file__).parent.parent
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", *(pytest.param(name, marks=pytest.mark.slow) for name in DOCS)]
BASE = "allenai/OLMoE-1B-7B-0924"
WORDS = "the patient was given a dose of the drug and then slept well for the night while it rained".split()


@pytest.fixture
def workplace(tmp_path, monkeypatch, hub):
    """The current folder, with the files that the documents name; the base model is on the Hub too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    tiny_model("olmoe", vocab_size=260, max_position_embeddings=512).save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    for seed, name in enumerate(("medicine", "medicine-test", "other")):
        rows = [{"text": " ".join(WORDS[(i * (seed + 3) + j * j) % len(WORDS)] for j in range(12))} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hub.create(BASE)
    hub.commit_folder(BASE, tmp_path / "base")
    return tmp_path


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def command_lines(page: str, *programs: str) -> list[list[str]]:
    """The words of each command line in a page's blocks of bash; of these programs, or of all."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    lines = [words[1:] if words and re.match(r"\w+=", words[0]) else words for words in lines]  # X=1 command
    return [words for words in lines if words and (not programs or words[0] in programs)]


def run_command(words: list[str], capsys) -> None:
    code, said = main(words[1:]), capsys.readouterr().err
    # a memory for random weights helps on any text, which leaves nothing to calibrate by
    assert code == 0 or words[1] == "calibrate" and "the memory helps on all background text" in said, said


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, workplace, capsys):
    if page != "README.md":  # whose first block builds it
        run_command(shlex.split(f"knnmoe build --model {BASE} --dataset medicine.jsonl --output my-memory"), capsys)
    names: dict = {}
    for block in blocks(page, "python"):
        # a reader may start with any block of the README
        exec(compile(block, page, "exec"), {} if page == "README.md" else names)
    assert (workplace / "my-memory" / "config.json").exists()


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, workplace, capsys):
    commands = command_lines(page, "knnmoe")
    commands.sort(key=lambda words: words[1] != "build")  # the others read what it writes
    for words in commands:
        if words[1:] != ["quickstart"]:  # of the lab model: `make quickstart` in CI
            run_command(words, capsys)


def test_every_command_is_shown_somewhere():
    shown = {words[1] for page in ["README.md", *DOCS] for words in command_lines(page, "knnmoe")}
    assert shown >= {"build", "evaluate", "info", "quickstart"}


@pytest.mark.parametrize("page", ["README.md", *DOCS])
def test_what_a_page_makes_or_runs_with_python_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for program, *rest in command_lines(page):
        if program == "make":
            assert set(rest) <= targets
        elif program == "python" and rest[0] != "-c":
            assert (ROOT / (rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0])).is_file()
        else:
            assert program in ("knnmoe", "pip", "python", "accelerate", "torchrun", "git", "cd")


@pytest.mark.parametrize("page", ["README.md", *DOCS])
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


EXAMPLES = {
    "adapt_a_model.py": "base medicine.jsonl",
    "with_peft.py": "",
    "router_only_baseline.py": (
        "--model base --dataset medicine.jsonl --test-dataset medicine-test.jsonl --off-dataset other.jsonl"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(workplace, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [name, *EXAMPLES[name].split()])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert capsys.readouterr().out


def test_every_example_is_run_here():
    assert set(EXAMPLES) == {path.name for path in (ROOT / "examples").glob("*.py")}
