"""Examples by name: windows of texts, what is held out, limits, and bad rows."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from knnmoe_hf.cli.data import default_test_split, load_examples
from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.errors import BadRowError
from tests.data.helpers import COMPRESSIONS, jsonl, write
from tests.support.tokenizers import MARKED, byte_tokenizer

TOKENIZER = byte_tokenizer(MARKED)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(name: str, max_length: int = 24, **options) -> list[str]:
    examples = load_examples(name, TOKENIZER, max_length=max_length, **options)
    assert [row["example_id"] for row in examples] == list(range(len(examples))) and len(examples) > 0
    assert all(row["labels"] == row["input_ids"] for row in examples)
    return [TOKENIZER.decode(row["input_ids"]) for row in examples]


def document(number: int, paragraphs: int = 3) -> str:
    return "".join(f"document {number:02}, part {part}\n\n" for part in range(paragraphs))


def parts(numbers, paragraphs: int = 3) -> list[str]:
    """The windows of 24 bytes of such documents: a part has 22 or 23 bytes with its blank line."""
    return [f"document {number:02}, part {part}\n\n" for number in numbers for part in range(paragraphs)]


def test_the_same_windows_from_a_file_a_folder_a_pattern_and_a_table(here):
    content = document(0) + document(1, 1)
    write(here / "a.txt", content)
    write(here / "folder" / "sub" / "a.md", content.replace("\n", "\r\n").encode("utf-16"))
    write(here / "folder.jsonl.gz", COMPRESSIONS[".gz"](jsonl([{"text": content}])))
    write(here / "table.csv", 'text\n"' + content + '"\n')
    Dataset.from_dict({"text": [content]}).save_to_disk("saved")
    expected = parts([0]) + parts([1], 1)
    for name in ("a.txt", "folder", "folder/**", "folder/*/*.md", "folder.jsonl.gz", "table.csv", "saved"):
        assert texts(name) == expected
        assert texts(name, held_out=False) == expected  # the fifth window would be held out


@pytest.mark.parametrize("as_files", [True, False])
def test_of_many_documents_every_fifth_is_held_out_as_a_whole(as_files, here):
    if as_files:
        for number in range(21):
            write(here / "data" / f"{number:02}.txt", document(number))
    else:
        write(here / "data" / "a.jsonl", jsonl([{"text": document(number)} for number in range(12)]))
        write(here / "data" / "b.jsonl", jsonl([{"text": document(number)} for number in range(12, 21)]))
    assert texts("data", held_out=True) == parts([4, 9, 14, 19])
    assert texts("data", held_out=False) == parts(number for number in range(21) if number % 5 != 4)
    assert texts("data") == parts(range(21))


@pytest.mark.parametrize("layout", ["one file", "files", "rows"])
def test_of_few_documents_every_fifth_window_is_held_out(layout, here):
    if layout == "one file":
        write(here / "data.txt", "".join(document(number) for number in range(19)))
    elif layout == "files":
        for number in range(19):
            write(here / "data.txt" / f"{number:02}.txt", document(number))
    else:
        write(here / "data.txt" / "a.jsonl", jsonl([{"text": document(number)} for number in range(19)]))
    every = parts(range(19))
    assert texts("data.txt", held_out=True) == every[4::5]
    assert texts("data.txt", held_out=False) == [part for place, part in enumerate(every) if place % 5 != 4]


def test_what_is_held_out_does_not_depend_on_limits(here):
    write(here / "a.txt", "".join(document(number) for number in range(30)))
    every = parts(range(30))
    assert texts("a.txt", held_out=True, max_examples=3) == every[4:15:5]
    assert texts("a.txt", held_out=False, max_tokens=2 * len(every[0])) == every[:2]


def test_too_few_windows_to_hold_one_out(here):
    write(here / "a.txt", document(0))
    with pytest.raises(ValueError, match=r"'a.txt' gives no example: every fifth window .* has 3, so give more text"):
        load_examples("a.txt", TOKENIZER, max_length=24, held_out=True)


def test_limits_keep_the_first_and_read_no_further(here):
    write(here / "a.jsonl", jsonl([{"text": "12345678"}, {"text": "abcdefgh"}]) + b"{bad\n")
    assert texts("a.jsonl", max_examples=2) == ["12345678", "abcdefgh"]
    assert texts("a.jsonl", max_tokens=15) == ["12345678"]
    assert load_examples("a.jsonl", TOKENIZER, max_examples=1).report.examples == 1
    with pytest.raises(ValueError, match="'a.jsonl' gives no example: .*max_tokens=7"):
        load_examples("a.jsonl", TOKENIZER, max_tokens=7)


def test_a_bad_row_names_file_row_and_column_or_is_skipped_and_counted(here):
    for content, place, what in (
        ("text,n\nfirst,1\n,2\n", "'a.csv', row 2 (line 3)", "column 'text'"),
        ("text,n\nfirst,1\n\nsecond\n", "'a.csv', row 2 (line 4)", "has 1 fields"),
    ):
        write(here / "a.csv", content)
        with pytest.raises(BadRowError) as error:
            load_examples("a.csv", TOKENIZER, ignore_columns=["n"])
        assert str(error.value).startswith(place) and what in str(error.value)
        assert "--skip-bad-rows" in str(error.value)
    write(here / "a.csv", "text,n\nfirst,1\n,2\nthird,3\nfourth\n")
    examples = load_examples("a.csv", TOKENIZER, ignore_columns=["n"], skip_bad_rows=True)
    assert [TOKENIZER.decode(row["input_ids"]) for row in examples] == ["first", "third"]
    report = examples.report
    assert (report.rows, report.examples, report.skipped) == (4, 2, 2)
    assert all(problem.startswith("'a.csv', row") for problem in report.problems)
    assert any("2 rows were skipped" in sentence for sentence in report.sentences())


def test_files_that_cannot_be_read_are_skipped_and_counted_too(here):
    write(here / "data" / "a.txt", "a text")
    write(here / "data" / "b.txt", "")
    write(here / "data" / "c.txt", b"\xe9t\xe9")
    with pytest.raises(BadRowError, match=r"^'data/b.txt' is empty"):
        load_examples("data", TOKENIZER)
    examples = load_examples("data", TOKENIZER, skip_bad_rows=True)
    assert len(examples) == 1 and examples.report.skipped == 2 and "--encoding" in examples.report.problems[1]
    assert texts("data", skip_bad_rows=True, encoding="cp1252") == ["a text", "été"]
    write(here / "data" / "a.txt", "")
    with pytest.raises(ValueError, match="all 3 texts were skipped, the first because 'data/a.txt' is empty"):
        load_examples("data", TOKENIZER, skip_bad_rows=True)


def test_the_column_of_the_text_and_rows_of_other_forms(here):
    write(here / "a.jsonl", jsonl([{"body": "a text", "id": 1}]))
    assert texts("a.jsonl", text_field="body", ignore_columns=["id"]) == ["a text"]
    write(here / "b", "body\tid\na text\t1\n")  # known by its column
    assert texts("b", text_field="body", ignore_columns=["id"]) == ["a text"]
    write(here / "c.txt", "a text")
    assert texts("c.txt", text_field="body") == ["a text"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write(here / "d.json", json.dumps({"messages": messages}))
    (row,) = load_examples("d.json", TOKENIZER)
    assert [token for token in row["labels"] if token != -100] == TOKENIZER("b;")["input_ids"]
    write(here / "e.jsonl", jsonl([{"prompt": "a" * 30, "completion": "b"}, {"prompt": "a", "completion": "b"}]))
    assert load_examples("e.jsonl", TOKENIZER, max_length=24).report.completions_lost == 1
    write(here / "f.jsonl", jsonl([{"input_ids": [1, 2, 300]}]))
    with pytest.raises(BadRowError, match="^'f.jsonl', line 1: .*input_ids.* 300"):
        load_examples("f.jsonl", TOKENIZER, vocab_size=260)


def test_texts_are_counted_as_texts_whatever_their_windows_and_blocks_are(here):
    write(here / "data" / "a.txt", "a line of the text\n\n" * 16_000)  # more than two blocks
    write(here / "data" / "b.md", document(0))
    examples = load_examples("data", TOKENIZER)
    assert len(examples) > 3 and examples.report.rows == 2
    assert examples.report.sentences() == [f"2 texts gave {len(examples):,} examples."]
    again = prepare_dataset(examples, TOKENIZER, 256)
    assert again.report.sentences() == examples.report.sentences()
    write(here / "data" / "c.txt", "")
    told = load_examples("data", TOKENIZER, skip_bad_rows=True).report.sentences()
    assert told[0].startswith("3 texts gave") and told[1].startswith("1 text was skipped, the first of them: 'data/c")
    with pytest.raises(ValueError, match=r"^'data/c.txt' gives no example: its only row was skipped, because"):
        load_examples("data/c.txt", TOKENIZER, skip_bad_rows=True)


def test_a_text_in_windows_cannot_have_one_example_id(here):
    write(here / "a.jsonl", jsonl([{"text": "short", "example_id": 7}, {"text": document(0), "example_id": 9}]))
    with pytest.raises(BadRowError, match=r"line 2: one example_id cannot name the 3 windows of at most 24 tokens"):
        load_examples("a.jsonl", TOKENIZER, max_length=24)
    assert [row["example_id"] for row in load_examples("a.jsonl", TOKENIZER, max_length=256)] == [7, 9]
    assert len(texts("a.jsonl", ignore_columns=["example_id"])) == 4  # the way out that the error names


def test_a_byte_that_cannot_be_decoded_costs_its_row_alone(here):
    write(here / "a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n{"text": "two"}\n')
    with pytest.raises(BadRowError, match=r"^'a.jsonl', line 2 is not text in its encoding \(byte 0xff\)"):
        load_examples("a.jsonl", TOKENIZER)
    assert texts("a.jsonl", skip_bad_rows=True) == ["one", "two"]
    write(here / "first.json", b'{"text": "\xe9"}\n{"text": "b"}\n')
    assert texts("first.json", skip_bad_rows=True) == ["b"]


def test_lab_text_stays(here):
    examples = load_examples("lab:topics/test", TOKENIZER, max_length=64, max_examples=12)
    held, others = (
        load_examples("lab:topics/test", TOKENIZER, max_length=64, max_examples=count, held_out=held_out)
        for count, held_out in ((2, True), (8, False))
    )
    ids = [row["input_ids"] for row in examples]
    assert [row["input_ids"] for row in held] == ids[4:10:5] and all(len(row) == 64 for row in ids)
    assert [row["input_ids"] for row in others] == [*ids[:4], *ids[5:9]]
    assert default_test_split("lab:topics/test") is None and default_test_split("me/data") == "test"
    with pytest.raises(ValueError, match="lab|poems"):
        load_examples("lab:poems/test", TOKENIZER)
