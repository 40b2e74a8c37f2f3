"""Text files of this machine: which files, in which order and split, without passages that several files share."""

import hashlib
import importlib.metadata
import re
from pathlib import Path

import pytest

from knnmoe_hf.calibration import machine_text
from knnmoe_hf.calibration.machine_text import SPLITS, documents, files

INSTALLED = ("headers", "notices")


def paragraphs(documents: list[str]) -> set[str]:
    """The paragraphs that are longer than a phrase, without indentation."""
    parts = (part.strip() for text in documents for part in re.split(r"\n\s*\n", text))
    return {part for part in parts if len(part) >= 60}


def phrases(documents: list[str]) -> set[tuple[str, ...]]:
    """All runs of eight words."""
    split = (text.split() for text in documents)
    return {tuple(words[i : i + 8]) for words in split for i in range(len(words) - 7)}


@pytest.fixture
def packages(monkeypatch):
    """A few of the installed packages, in place of all of them."""
    few = [importlib.metadata.distribution(name) for name in ("pytest", "numpy", "safetensors", "packaging", "pluggy")]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: iter(few))
    return few


@pytest.fixture(scope="module")
def installed() -> dict[tuple[str, str], list[str]]:
    return {(kind, split): documents(kind, split) for kind in INSTALLED for split in SPLITS[kind]}


def test_python_is_the_standard_library_without_tests_by_path():
    names = [name for name, _ in files("python", "train")]
    test = [name for name, _ in files("python", "test")]
    assert {"argparse.py", "json/decoder.py"} <= {*names, *test}
    assert len(names) > 10 * len(test) > 0 and not {*names} & {*test}
    left_out = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "encodings"}
    assert not [name for name in names + test if left_out & set(Path(name).parts)]
    assert names == sorted(names, key=lambda name: name.split("/"))


def test_documents_are_the_texts_of_files(packages):
    for split in SPLITS["notices"]:
        named = files("notices", split)
        assert named and documents("notices", split) == [text for _, text in named]
        assert all(".dist-info/" in name for name, _ in named)


def test_the_order_of_packages_and_one_that_is_found_twice_change_nothing(packages):
    once = {split: files("notices", split) for split in SPLITS["notices"]}
    packages.reverse()
    assert {split: files("notices", split) for split in SPLITS["notices"]} == once
    packages += packages[:2]  # as where a folder is on sys.path under two names
    assert {split: files("notices", split) for split in SPLITS["notices"]} == once


def test_a_paragraph_of_two_files_is_in_neither_split(monkeypatch):
    licences = [" ".join(f"word{i}of{licence}" for i in range(40)) for licence in range(5)]  # of two files each
    licences += [licence.replace("word20", "word20\n    ") for licence in licences]
    own = [(f"{i}.txt", f"only file number {i} says so") for i in range(10)]
    given = [(name, f"{licence}\n\n{text}") for (name, text), licence in zip(own, licences)]
    monkeypatch.setattr(machine_text, "_notices", lambda: iter(given))
    mixed = sorted(own, key=lambda file: hashlib.sha256(file[0].encode()).digest())
    assert files("notices", "reference") == mixed[:6] and files("notices", "test") == mixed[6:]


def test_text_does_not_depend_on_the_hashes_of_phrases(packages, monkeypatch):
    """Python's hash of a string differs between processes; the chosen text must not."""
    hashed = documents("notices", "reference")

    def exact(paragraph: str) -> set[tuple[str, ...]]:
        return phrases([paragraph]) or {tuple(paragraph.split())}

    monkeypatch.setattr(machine_text, "_phrases", exact)
    assert documents("notices", "reference") == hashed


@pytest.mark.parametrize("kind, split", [("poems", "train"), ("headers", "train"), ("python", ""), ("python", "all")])
def test_an_unknown_kind_or_split_is_refused_with_the_known_ones(kind, split):
    with pytest.raises(ValueError, match=f"text '{kind}/{split}': choose one of python/train, .*notices/test"):
        files(kind, split)


@pytest.mark.slow
@pytest.mark.parametrize("kind", INSTALLED)
def test_installed_text_shares_nothing_between_its_splits(installed, kind):
    reference, test = (installed[kind, split] for split in ("reference", "test"))
    assert len(reference) > 50 and len(test) > 40 and min(sum(map(len, side)) for side in (reference, test)) > 300_000
    assert not paragraphs(reference) & paragraphs(test)
    known = phrases(reference)
    repeated = [phrase in known for phrase in phrases(test)]
    assert sum(repeated) <= 0.01 * len(repeated)  # a licence is the same text, however its lines are broken


@pytest.mark.slow
@pytest.mark.parametrize("kind", INSTALLED)
def test_installed_text_has_nothing_of_the_standard_library(installed, kind):
    library = documents("python", "train")
    known = paragraphs(library)
    parts = paragraphs(installed[kind, "reference"] + installed[kind, "test"])
    assert not [part for part in parts & known if len(part) > 200]
    known = phrases(library)
    repeated = [phrase in known for phrase in phrases(installed[kind, "test"])]
    assert sum(repeated) <= 0.01 * len(repeated)


@pytest.mark.slow
def test_headers_are_code_and_notices_are_english(installed):
    assert sum("#include" in text or "namespace" in text for text in installed["headers", "test"]) > 200
    english = [
        sum(word in ("the", "of", "and", "to", "is") for word in text.split()) / max(1, len(text.split()))
        for text in installed["notices", "test"]
    ]
    assert sorted(english)[len(english) // 2] > 0.05
