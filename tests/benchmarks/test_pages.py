"""What every page says about its run."""

import pytest
import torch

from benchmarks.pages import parser, provenance, shown_provenance, table, write


def test_a_page_names_the_command_the_commit_and_the_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["overhead.py", "--rows", "5"])
    made = provenance("benchmarks.speed.overhead", None)
    assert made["command"] == "python -m benchmarks.speed.overhead --rows 5"
    assert provenance("m", ["--rows", "6"])["command"] == "python -m m --rows 6"
    text = shown_provenance(made)
    assert all(part in text for part in (made["command"], f"commit {made['commit']}", f"torch {torch.__version__}"))


def test_a_run_without_git_says_that_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance("m", [])["commit"] == "unknown"


def test_a_table_and_the_files(tmp_path):
    text = table(["a", "b"], [["1", "2"]])
    assert text == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    write(tmp_path / "new", "page", {"x": 1}, text)
    assert (tmp_path / "new" / "page.md").read_text() == text + "\n"
    assert (tmp_path / "new" / "page.json").read_text() == '{\n "x": 1\n}\n'


def test_the_help_is_the_documentation(capsys):
    with pytest.raises(SystemExit):
        parser("What it measures.").parse_args(["--help"])
    assert "What it measures." in capsys.readouterr().out
