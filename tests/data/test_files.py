"""From a name to rows: files, folders, patterns, saved data sets and the Hub."""

import os
import shutil
import time
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi

from knnmoe_hf.data.files import Files, looks_like_path
from knnmoe_hf.data.sources import Table, open_source, split_of_tests
from tests.data.helpers import COMPRESSIONS, TABLES, jsonl, write


def texts(name, split: str | None = None) -> list[str]:
    return [row.columns["text"] for row in open_source(str(name), split)]


def refused(name, split: str | None = None, **options) -> str:
    with pytest.raises(ValueError) as error:
        list(open_source(str(name), split, **options))
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message.replace("... ", " ")
    return message


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """The working and the home folder, as error messages shorten long paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    return tmp_path


NAMES = [
    "notes.txt",
    "notes 1.txt",
    " notes.txt",
    "notes[1].txt",
    "[ab].txt",
    "notes*.txt",
    "what?.txt",
    "~notes.txt",
    "no~tes.txt",
    "drôle 三.txt",
    "a'b\"c.txt",
    "back\\slash.txt",
    "new\nline.txt",
    "-notes.txt",
    ".hidden.txt",
    "owner",
    "a{b}.txt",
    "$HOME.txt",
    "lab:x.txt",
    "x#y%20z.txt",
    "folder[1]/notes.txt",
    "folder */a.txt",
]


@pytest.mark.parametrize("name", NAMES)
def test_what_exists_is_taken_literally(name, here):
    write(here / name, "right")
    write(here / "notes1.txt", "wrong")
    write(here / "a.txt", "wrong")
    for given in (name, f"./{name}", str(here / name), f"~/{name}"):
        assert texts(given) == ["right"]
    (row,) = open_source(name)
    assert "\n" not in row.place


def test_a_name_on_disk_is_never_asked_of_the_hub(here, monkeypatch):
    monkeypatch.setattr(HfApi, "dataset_info", lambda *args, **kwargs: pytest.fail("asked"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    write(here / "stanfordnlp/imdb/a.txt", "a")
    write(here / "squad", "b")
    assert texts("stanfordnlp/imdb") == ["a"] and texts("squad") == ["b"]
    for name in (
        "no.txt",
        "./no",
        "/no/such",
        "~/no",
        "a/b/c",
        "no/",
        "a\\b",
        "*.txt",
        "x[1]",
        "no.JSONL.gz",
        "no.pdf",
    ):
        assert looks_like_path(name) and ("does not exist" in refused(name) or "matches no file" in refused(name))


def test_a_name_that_does_not_exist_is_told_at_once_with_the_one_that_may_be_meant(here):
    write(here / "medicine.jsonl", jsonl([{"text": "a"}]))
    started = time.monotonic()
    assert "perhaps 'medicine.jsonl' is meant" in refused("medicin.jsonl")
    assert "perhaps 'medicine.jsonl' is meant" in refused("medicine")
    assert "there is no folder 'data'" in refused("data/medicine.jsonl")
    assert "is neither on disk nor in the cache" in refused("me/nope") and "(offline mode is on)" in refused("me/nope")
    assert "lab:KIND/SPLIT" in refused("nope") and "lab:KIND/SPLIT" in refused("json")
    for name in ("", "a b", "a//b", "--x", "x" * 300, "a\0b", "me/nope:default"):
        assert "does not exist" in refused(name) or "neither on disk" in refused(name)
    assert "address" in refused("https://example.com/a.jsonl") and "address" in refused("hf://datasets/me/data")
    assert time.monotonic() - started < 20  # without network, the Hub used to be tried for 23 seconds each


@pytest.mark.parametrize("is_offline", [True, False])
def test_without_the_hub_the_cache_is_used(is_offline, here, monkeypatch):
    def unreachable(self, name, timeout):
        asked.append(name)
        raise OSError("no network. at all")

    asked = []
    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", is_offline)
    write(here / "a.jsonl", jsonl([{"text": "a"}, {"text": "b"}]))
    loaded = datasets.load_dataset("json", data_files="a.jsonl", split="train")
    folder = Path(loaded.cache_files[0]["filename"]).parent
    cached = here / ".cache" / "me___data" / "default" / "0.0.0" / folder.name
    shutil.copytree(folder, cached)
    (cached / "json-train.arrow").rename(cached / "data-train.arrow")
    assert texts("me/data") == ["a", "b"] and texts("me/data", "train[:1]") == ["a"]
    assert "'me/data' cannot be loaded" in refused("me/data", "test") and "test" in refused("me/data", "test")
    reason = "offline mode is on" if is_offline else "no network; at all"
    assert f"the Hub cannot be asked ({reason})" in refused("me/nope")
    assert datasets.config.HF_HUB_OFFLINE is is_offline and ("me/nope" in asked) is not is_offline


def folder_of_texts(here: Path) -> Path:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.TXT", "a/e.txt"):
        write(here / "texts" / name, name)
    for hidden in (".git/x.txt", ".DS_Store", "sub/.hidden.txt", "__MACOSX/y.txt"):
        write(here / "texts" / hidden, b"\0\1")
    return here / "texts"


def test_a_folder_and_a_pattern_give_all_files_sorted(here):
    folder_of_texts(here)
    expected = sorted(["b.txt", "a.txt", "sub/c.txt", "sub/deep/d.TXT", "a/e.txt"])
    for name in ("texts", "texts/", "./texts", "~/texts", "texts/**", "texts/*", "t?xts", "texts/**/*", "~/t*"):
        assert texts(name) == expected
    assert texts("texts/*.txt") == ["a.txt", "b.txt"] and texts("texts/*/c.txt") == ["sub/c.txt"]
    assert texts("texts/**/*.txt") == [name for name in expected if name.endswith(".txt")]
    assert [row.document for row in open_source("texts")] == [0, 1, 2, 3, 4]


def test_a_pattern_below_a_folder_whose_name_looks_like_one(here):
    write(here / "run[1] *" / "a1.txt", "right")
    write(here / "run[1] *" / "sub" / "a2.txt", "too")
    write(here / "run1 x" / "a1.txt", "wrong")
    assert texts("run[1] */a[1-3].txt") == ["right"] and texts("run[1] */**/*.txt") == ["right", "too"]


def test_links_are_followed_once(here):
    write(here / "other" / "a.txt", "a")
    (here / "texts").mkdir()
    (here / "texts" / "link").symlink_to(here / "other")
    (here / "other" / "back").symlink_to(here / "texts")
    assert texts("texts") == ["a"]
    (here / "texts" / "broken.txt").symlink_to("nowhere.txt")
    assert "broken.txt' is a link to 'nowhere.txt', which does not exist" in refused("texts")
    assert "is a link to" in refused("texts/broken.txt")


def test_a_pipe_is_refused_before_it_is_opened(here):
    os.mkfifo(here / "pipe.txt")
    write(here / "a.txt", "a")
    assert "pipe.txt' is a pipe" in refused("pipe.txt") and "pipe.txt' is a pipe" in refused("*.txt")
    assert "is a pipe or device" in refused("/dev/null")


@pytest.mark.parametrize(
    "files, named",
    [
        ({}, "'data' is a folder without files"),
        ({".hidden": "x"}, "without files"),
        ({"a.txt": "x", "b.pdf": "%PDF"}, "'data/b.pdf' is a PDF, which is not read"),
        ({"a.txt": "x", "b.pdf": "%PDF"}, "'data/**/*.txt'"),
        ({"a.jsonl.gz": COMPRESSIONS[".gz"](b"{}"), "sub/b.PNG": b"\x89PNG"}, "'data/**/*.jsonl.gz'"),
        ({"a.txt": "x", "b.bin": b"\0\1\2"}, "'data/b.bin'"),
        ({"a.txt": "x", "weights": b"\0\1\2\3" * 9}, "'data/weights' is binary"),
        ({"a.jsonl": "{}", "README.md": "x"}, "rows, as 'data/a.jsonl', and text, as 'data/README.md'"),
        ({"a.jsonl": "{}", "README.md": "x"}, "'data/**/*.jsonl'"),
        ({"a.txt.gz": b"x"}, "'data/a.txt.gz' is not compressed with gzip"),
    ],
)
def test_a_folder_of_which_a_file_cannot_be_used_is_refused_by_that_files_name(files, named, here):
    (here / "data").mkdir()
    for name, content in files.items():
        write(here / "data" / name, content)
    assert named in refused("data")


def test_tables_of_several_kinds_may_be_in_one_folder(here):
    for number, (ending, make) in enumerate(sorted(TABLES.items())):
        write(here / "data" / f"{number}{ending}", make([{"text": f"{number} a"}, {"text": f"{number} b"}]))
    expected = [f"{number} {letter}" for number in range(len(TABLES)) for letter in "ab"]
    assert texts("data") == expected and [row.document for row in open_source("data")] == list(range(len(expected)))


def test_a_broken_file_in_a_folder_does_not_cost_the_others(here):
    write(here / "data" / "a.txt", "a")
    write(here / "data" / "b.txt", "")
    write(here / "data" / "c.txt", b"\xff\xff\xff")
    write(here / "data" / "d.txt", "d")
    rows = list(open_source("data"))
    assert [row.columns and row.columns["text"] for row in rows] == ["a", None, None, "d"]
    assert [row.document for row in rows] == [0, 1, 2, 3]
    assert rows[1].place == "'data/b.txt'" and "is empty" in rows[1].problem and "--encoding" in rows[2].problem


LAYOUTS = [
    ["train.jsonl", "test.jsonl"],
    ["train/x.jsonl", "test/y.jsonl"],
    ["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"],
    ["Train.JSONL", "TEST.jsonl"],
    ["train_0.jsonl.gz", "test_0.jsonl.gz"],
    ["training.jsonl", "eval.jsonl"],
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_splits_gives_the_one_that_is_asked_for(layout, here):
    for path, text in zip(layout, ("a", "b")):
        content = jsonl([{"text": text}])
        write(here / "data" / path, COMPRESSIONS[".gz"](content) if path.endswith("gz") else content)
    assert texts("data") == ["a"] == texts("data", "train") and texts("data", "test") == ["b"]
    assert texts("data", "train+test") == sorted(["a", "b"], key=lambda text: layout["ab".index(text)])
    assert split_of_tests("data") == "test"
    for split in ("validation", "nope", "train[:1]"):
        assert "named after" in refused("data", split) and "train" in refused("data", split)


def test_a_folder_of_other_names_has_no_splits(here):
    for name in ("train.jsonl", "test.jsonl", "more.jsonl"):
        write(here / "data" / name, jsonl([{"text": name}]))
    assert len(texts("data")) == 3 and split_of_tests("data") is None
    for name in ("data", "data/train.jsonl", "data/*.jsonl"):
        assert "files have no splits" in refused(name, "test") and texts(name, "train") == texts(name)
    (here / "data" / "more.jsonl").unlink()
    (here / "data" / "train.jsonl").unlink()
    assert texts("data") == ["test.jsonl"] and "named after test" in refused("data", "train")  # the only one there is


def test_documents_named_like_splits_in_part_are_no_splits(here):
    for name in ("test-results.txt", "training for a marathon.txt", "value.txt", "1.txt"):
        write(here / "data" / name, name)
    assert len(texts("data")) == 4


def test_saved_data_sets(here):
    train, test = Dataset.from_dict({"text": list("abcd")}), Dataset.from_dict({"text": ["x"]})
    train.save_to_disk("one")
    DatasetDict(train=train, test=test).save_to_disk("several")
    train.with_format("torch").save_to_disk("formatted")
    for name in ("one", "several", "~/one", "./several/", "formatted"):
        assert texts(name) == list("abcd")
    assert texts("several", "test") == ["x"] and texts("several", "train[1:3]") == ["b", "c"]
    assert texts("several", "train[:50%]+test") == ["a", "b", "x"] and texts("several", "all") == [*"abcd", "x"]
    assert texts("one", "train[-1:]") == ["d"]
    assert [row.place for row in open_source("several", "test")] == ["'several', row 1"]
    assert split_of_tests("several") == "test" and split_of_tests("one") is None
    for split in ("nope", "train[", "train[:200%]"):
        assert "whose splits are train, test" in refused("several", split)
    assert "whose splits are train" in refused("one", "test")
    next(Path("one").glob("*.arrow")).unlink()
    assert "'one' cannot be read as a saved data set" in refused("one")
    assert isinstance(open_source("several"), Table) and isinstance(Files("several/train/*.arrow", None), Files)


def test_an_encoding_for_what_has_none_is_refused(here):
    Dataset.from_dict({"text": ["a"]}).save_to_disk("saved")
    write(here / "a.parquet", TABLES[".parquet"]([{"text": "a"}]))
    for name in ("saved", "a.parquet", "me/data"):
        assert "encoding='cp1252' is not allowed" in refused(name, encoding="cp1252")


@pytest.mark.parametrize("name, split", [("lab:topics/test", None), ("a.jsonl", None), ("no/such/x.jsonl", None)])
def test_the_split_of_tests_of_files_is_none_and_of_the_hub_test(name, split, here):
    assert split_of_tests(name) is split and split_of_tests("owner/name") == split_of_tests("squad") == "test"


def test_documents_are_counted_without_reading_texts(here):
    for number in range(5):
        write(here / "texts" / f"{number}.txt", b"\xff")
    source = open_source("texts")
    assert source.has_documents(5) and not source.has_documents(6)
    write(here / "a.jsonl", jsonl([{"text": "a"}] * 5) + b"{bad\n")
    assert open_source("a.jsonl").has_documents(6) and not open_source("a.jsonl").has_documents(7)


def test_a_row_of_a_data_set_that_cannot_be_decoded_is_named(here):
    dataset = Dataset.from_dict({"image": [{"path": None, "bytes": b"no image"}], "text": ["a"]})
    dataset = dataset.cast_column("image", datasets.Image())
    dataset.save_to_disk("saved")
    assert "'saved', row 1 cannot be read" in refused("saved")
