"""`knnmoe report` on a memory that the command line built."""

import sys

import pytest

from knnmoe_hf.cli import main
from tests.cli.helpers import HELD_OUT, OTHERS, texts


def test_a_memory_alone_has_a_page(built, tmp_path, capsys):
    page = tmp_path / "page.html"
    words = ["report", str(built), "--output", str(page)]
    assert main(words) == 0
    assert f"The page on memory is {page}" in capsys.readouterr().out
    first = page.read_text()
    assert "<h1>The memory memory</h1>" in first and "<code>knnmoe report memory --dataset TEXT</code>" in first
    assert str(built) not in first and str(built.parent) not in first
    assert main(words) == 0 and page.read_text() == first  # a page of ours is replaced
    page.write_text("<p>mine")
    assert main(words) == 1 and "holds something else" in capsys.readouterr().err and page.read_text() == "<p>mine"


def test_text_is_measured(built, tmp_path, capsys):
    page = tmp_path / "page.html"
    domain, other = texts(tmp_path / "test.jsonl", HELD_OUT), texts(tmp_path / "other.jsonl", OTHERS)
    words = ["report", str(built), "--output", str(page), "--max-length", "16", "--map-layer", "0", "--gamma", "0.1"]
    assert main([*words, "--dataset", domain, "--ordinary-dataset", other]) == 0
    shown = page.read_text()
    assert "To measure it:" not in shown and "for this page" in shown
    assert "Keys of layer 0 in two dimensions" in shown and "Rows that test.jsonl recalls most" in shown
    assert str(tmp_path) not in shown
    assert main([*words, "--ordinary-dataset", other]) == 0
    assert "--dataset TEXT --ordinary-dataset OTHER-TEXT</code>" in page.read_text()


def test_plots_for_papers_are_drawn(built, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["report", str(built), "--output", str(tmp_path / "page.html"), "--plots", str(tmp_path / "plots")]
    assert main([*words, "--format", "svg"]) == 0
    made = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert "keys.svg" in made and "distances-0.svg" in made
    assert f"{len(made)} plots are in {tmp_path / 'plots'}" in capsys.readouterr().out


def test_without_matplotlib_plots_are_refused_at_once(built, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = tmp_path / "page.html"
    assert main(["report", str(built), "--output", str(page), "--plots", str(tmp_path / "plots")]) == 1
    assert "pip install 'knnmoe_hf[plots]'" in capsys.readouterr().err and not page.exists()


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--format", "svg"], 2, "--format is of --plots"),
        (["--plots", "p", "--format", "gif"], 2, "gif"),
        (["--map-layer", "7"], 1, "layer 7 is not in this memory: choose one of [0, 1]"),
        (["--split", "test"], 2, "--split is not allowed without --dataset"),
    ],
)
def test_wrong_usage_is_one_line(built, tmp_path, capsys, words, code, said):
    try:
        found = main(["report", str(built), "--output", str(tmp_path / "page.html"), *words])
    except SystemExit as exit:
        found = exit.code
    assert found == code and said in capsys.readouterr().err
