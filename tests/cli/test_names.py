"""What the command line calls data sets where others read it: in a memory and on its card."""

import argparse
import json
from pathlib import Path

import pytest

from knnmoe_hf.cli.building import read_background
from knnmoe_hf.cli.data import public_name
from tests.support.tokenizers import byte_tokenizer


@pytest.mark.parametrize(
    "name, called, repository",
    [
        ("lab:topics/reference", "lab:topics/reference", None),
        ("me/notes", "me/notes", "me/notes"),
        ("me/notes:de", "me/notes:de", "me/notes"),
        ("/home/somebody/secret/notes.jsonl", "notes.jsonl", None),
        ("~/secret/notes.jsonl", "notes.jsonl", None),
        ("./notes.jsonl.gz", "notes.jsonl.gz", None),
        ("/home/somebody/secret/notes/", "notes", None),
        ("/home/somebody/notes/*.txt", "notes", None),
        ("/home/somebody/notes/*/*.txt", "notes", None),
        ("*.txt", None, None),
        ("~/*.txt", None, None),
        (f"{Path.home()}/*.txt", None, None),
        (str(Path.home()), None, None),
        (".", None, None),
        ("..", None, None),
        ("~", None, None),
        ("/", None, None),
    ],
)
def test_a_name_has_no_folders(name, called, repository):
    assert public_name(name) == (called, repository)


def test_a_file_whose_name_could_be_a_pattern_is_called_by_it(tmp_path):
    """Not by the folder that it lies in."""
    (tmp_path / "notes [a].txt").write_text("A note.")
    assert public_name(str(tmp_path / "notes [a].txt")) == ("notes [a].txt", None)


def test_a_folder_on_disk_is_no_repository(tmp_path, monkeypatch):
    (tmp_path / "me" / "notes").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("me/notes") == ("notes", None)


def test_kinds_of_background_text_have_names_without_folders(tmp_path):
    names = []
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "law.jsonl").write_text(json.dumps({"text": f"The law of {folder}."}))
        names.append(str(tmp_path / folder / "law.jsonl"))
    options = argparse.Namespace(ordinary_dataset=names, max_length=64, encoding=None, dataset_text_field="text")
    options = argparse.Namespace(**vars(options), ignore_columns=None, skip_bad_rows=False, quiet=True, verbose=False)
    found = read_background(options, byte_tokenizer())
    assert list(found) == ["law.jsonl", "law.jsonl (2)", "law.jsonl (3)"]
    assert all(len(rows) == 1 for rows in found.values())
