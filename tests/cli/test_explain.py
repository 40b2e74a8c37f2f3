"""`knnmoe explain` on a memory that the command line built."""

import pytest

from knnmoe_hf.cli import main
from tests.explain.pages import data_of, numbers


@pytest.mark.parametrize("given", ["text", "file"])
def test_a_text_is_explained(built, tmp_path, capsys, given):
    text, page = "the gate routes <b>a token</b>", tmp_path / "page.html"
    (tmp_path / "text.txt").write_text(text)
    words = ["--text", text] if given == "text" else ["--file", str(tmp_path / "text.txt")]
    assert main(["explain", str(built), *words, "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    assert f"The page is {page}" in printed and "mean confidence" in printed
    data = data_of(page.read_text())
    shown = "".join(data["vocabulary"][place][0] for place in numbers(data["tokens"], "<i4"))
    assert text in shown and data["references"]["passages"]


def test_a_generation_is_explained(built, tmp_path):
    page = tmp_path / "page.html"
    words = ["explain", str(built), "--prompt", "the gate", "--generate", "5", "--output", str(page)]
    assert main(words) == 0
    first = page.read_text()
    assert len(numbers(data_of(first)["ids"], "<i4")) == len("the gate") + 5
    assert main(words) == 0 and page.read_text() == first  # a page of ours is replaced


def test_what_does_not_fit_is_said(built, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["explain", str(built), "--text", "abcdefgh", "--max-tokens", "3", "--output", str(page)]) == 0
    assert "the first 3 of 8 tokens" in capsys.readouterr().err
    assert len(numbers(data_of(page.read_text())["ids"], "<i4")) == 3


@pytest.mark.parametrize(
    "words, said",
    [
        (["--prompt", "a"], "--prompt and --generate belong together"),
        (["--text", "a", "--generate", "2"], "--prompt and --generate belong together"),
        ([], "one of the arguments --text --file --prompt is required"),
    ],
)
def test_wrong_usage_is_one_line(built, capsys, words, said):
    with pytest.raises(SystemExit) as exit:
        main(["explain", str(built), *words])
    assert exit.value.code == 2 and said in capsys.readouterr().err


def test_files_that_are_not_pages_of_ours_are_not_written_over(built, tmp_path, capsys):
    mine = tmp_path / "mine.html"
    mine.write_text("<!DOCTYPE html><p>mine")
    words = ["explain", str(built), "--text", "a gate", "--output", str(mine)]
    assert main(words) == 1 and "holds something else" in capsys.readouterr().err
    assert mine.read_text().endswith("mine")
    assert main([*words, "--overwrite"]) == 0


def test_files_that_cannot_be_read_are_named(built, tmp_path, capsys):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name, said in (("nothing", "is not a file"), ("latin", "not UTF-8")):
        assert main(["explain", str(built), "--file", str(tmp_path / name), "--output", str(tmp_path / "p.html")]) == 1
        assert said in capsys.readouterr().err
