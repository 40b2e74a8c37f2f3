"""Every line of code in the README, `docs/` and `examples/` runs; a Hub on loopback has a small base model."""

import ast
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
    "adapt_to_documentation.py": ("base docs", "NLL of held-out paragraphs: .* with it"),
    "share_a_memory.py": (BASE, "the same logits as the one that was built: True"),
    "two_memories.py": ("base", "headers .*no memory .*documentation .*headers "),
    "beside_a_lora.py": ("base", "adapter and memory: .*adapter alone: .*neither: "),
    "explain_an_answer.py": ("", r"' when' +confidence 0\.\d\d, recalled '.*\[.*answer\.html shows"),
    "router_only_baseline.py": (
        "--model base --dataset medicine.jsonl --test-dataset medicine-test.jsonl --off-dataset other.jsonl",
        "router-only .*memory ",
    ),
}
"""Arguments of each script, most of them a random model, and what it says; without arguments it takes the lab's."""


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(workplace, monkeypatch, capsys, name):
    arguments, said = EXAMPLES[name]
    (workplace / "docs").mkdir()
    paragraphs = [" ".join(WORDS[(i * 3 + j * j) % len(WORDS)] for j in range(60)) for i in range(20)]
    (workplace / "docs" / "notes.md").write_text("\n\n".join(paragraphs))
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert re.search(said, capsys.readouterr().out, re.DOTALL)


def test_every_example_is_run_here():
    # the reader with NumPy alone has its own test
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")} - {"read_memory_with_numpy.py"}
    assert set(EXAMPLES) == scripts


NOTEBOOKS = sorted(path.name for path in (ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_without_outputs_and_its_links_lead_somewhere(name):
    notebook = json.loads((ROOT / "examples" / name).read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["cell_type"] in ("markdown", "code")
        assert cell["cell_type"] == "markdown" or cell["outputs"] == [] and cell["execution_count"] is None
        for target in re.findall(r"\]\(([^)#:]+)\)", "".join(cell["source"])):
            assert (ROOT / "examples" / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_cells_of_a_notebook_run_from_top_to_bottom(workplace, capsys, name):
    names, shown = {}, []
    for cell in json.loads((ROOT / "examples" / name).read_text())["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, name, "exec"), names)
            if last is not None:
                shown.append(eval(compile(ast.Expression(last.value), name, "eval"), names))
    pages = [one._repr_html_() for one in shown if hasattr(one, "_repr_html_")]
    assert any(page.startswith("<iframe") for page in pages)  # the trace shows itself
    said = capsys.readouterr().out
    assert "experts before:" in said and "options were changed: context_threshold 0.88 -> 0.95" in said
