"""Every line of code in the README and in `examples/` runs, with small local models in place of those on the Hub."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import HfApi

from knnmoe_hf.cli import main
from tests.conftest import tiny_model
from tests.support.tokenizers import byte_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BASE = "allenai/OLMoE-1B-7B-0924"
WORDS = "the patient was given a dose of the drug and then slept well for the night while it rained".split()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the README's files, from which its commands are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    tiny_model("olmoe", vocab_size=260, max_position_embeddings=512).save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    for seed, name in enumerate(("medicine", "medicine-test", "other")):
        rows = [{"text": " ".join(WORDS[(i * (seed + 3) + j * j) % len(WORDS)] for j in range(12))} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id})())
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: kwargs["repo_id"])
    return tmp_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_readmes_python_runs_from_top_to_bottom(workplace):
    for block in blocks("python"):
        exec(compile(block.replace(BASE, str(workplace / "base")), "README.md", "exec"), {})
    assert (workplace / "my-memory" / "config.json").exists()


def test_the_readmes_commands_run(workplace, capsys):
    lines = [line.split(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("knnmoe ")]
    commands.sort(key=lambda line: " build " not in line)  # the others read what it writes
    assert {shlex.split(line)[1] for line in commands} == {"build", "evaluate", "info", "quickstart"}
    for line in commands:
        named = line if "--plan" in line else line.replace(BASE, str(workplace / "base"))
        assert main(shlex.split(named)[1:]) == 0, capsys.readouterr().err


def test_every_other_command_of_the_readme_exists():
    lines = [line.split(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in filter(None, lines):
        program, *rest = shlex.split(line)
        if program == "make":
            assert set(rest) <= targets
        elif program == "python":
            assert (ROOT / (rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0])).is_file()
        else:
            assert program in ("knnmoe", "pip")


def test_the_readmes_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("adapt_a_model.py", ["base", "medicine.jsonl"]),
        ("with_peft.py", []),
        (
            "router_only_baseline.py",
            "--model base --dataset medicine.jsonl --test-dataset medicine-test.jsonl".split(),
        ),
    ],
)
def test_the_example_runs(workplace, monkeypatch, capsys, name, arguments):
    if name == "router_only_baseline.py":
        arguments = [*arguments, "--off-dataset", "other.jsonl"]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert capsys.readouterr().out


def test_every_example_is_run_here():
    run = {mark.args[1][i][0] for mark in test_the_example_runs.pytestmark for i in range(len(mark.args[1]))}
    assert run == {path.name for path in (ROOT / "examples").glob("*.py")}
