"""What became of a data set's rows: skipped, cut, without a target."""

import pytest

from knnmoe_hf.data.reading import RowReader
from knnmoe_hf.errors import BadRowError
from tests.support.tokenizers import MARKED, byte_tokenizer


def report_of(rows: list, max_length: int | None = 6, chat: str | None = None, **options):
    reader = RowReader(byte_tokenizer(chat), max_length, **options)
    for index, row in enumerate(rows):
        reader.read(row, f"row {index}")
    return reader.report


def test_bad_rows_are_counted_and_the_first_are_told():
    rows = [{"text": "good"}, {"text": ""}, {"text": None}, {"text": 5}, "no dict", {"text": "good too"}]
    report = report_of(rows, skip_bad_rows=True)
    assert (report.rows, report.examples, report.skipped, report.is_serious) == (6, 2, 4, True)
    assert report.problems[0] == "row 1: column 'text' is empty" and len(report.problems) == 3
    assert "6 rows gave 2 examples." in report.sentences()[0]
    assert "4 rows were skipped" in report.sentences()[1] and "row 1: column 'text' is empty" in report.sentences()[1]


def test_a_bad_row_is_an_error_that_names_it_and_the_way_out():
    with pytest.raises(
        BadRowError, match=r"^row 1: column 'text' is empty: .*skip_bad_rows=True \(--skip-bad-rows\)\.$"
    ):
        report_of([{"text": "good"}, {"text": ""}])


def test_what_max_length_takes_is_counted():
    chat = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    rows = [
        {"text": "long text"},
        {"text": "short"},
        {"prompt": "2+2=", "completion": "4"},  # six tokens with the end
        {"prompt": "2+2+2=", "completion": "6"},
        {"prompt": "2+2=", "completion": "five"},
        {"messages": chat},
        {"input_ids": [1] * 8, "labels": [-100] * 7 + [1]},
        {"input_ids": [1] * 8, "labels": [1] * 3 + [-100] * 5},
        {"input_ids": [1] * 4, "labels": [-100] * 4},
        {"input_ids": [1] * 4, "labels": [1, -100, -100, -100]},  # a first token is never predicted
    ]
    report = report_of(rows, chat=MARKED)
    assert (report.texts_cut, report.completions_cut, report.completions_lost, report.without_target) == (1, 1, 3, 5)
    told = " ".join(report.sentences())
    assert (
        "1 text was cut to max_length=6" in told and "4 examples lost targets to max_length=6, 3 of them all" in told
    )
    assert "2 examples were without a target" in told
    assert report.metrics()["data_completions_lost"] == 3 and report.metrics()["data_rows"] == 10


def test_nothing_is_cut_without_a_max_length_and_nothing_is_said():
    report = report_of([{"text": "long text"}, {"prompt": "2+2+2=", "completion": "6"}], None)
    assert report.sentences() == ["2 rows gave 2 examples."] and not report.is_serious


def test_documents_of_a_packed_row_are_cut_one_by_one():
    row = {"input_ids": list(range(12)), "seq_lengths": [5, 7]}
    reader = RowReader(None, 6)
    assert [len(example["input_ids"]) for example in reader.read(row, "row 0")] == [5, 6]
    assert (reader.report.rows, reader.report.examples, reader.report.texts_cut) == (1, 2, 1)


@pytest.mark.parametrize("given", ["7", 7.0, True, [7], 2**70])
def test_an_example_id_is_an_integer(given):
    reader = RowReader(None, None)
    with pytest.raises(BadRowError, match="^row 0: column 'example_id' is"):
        reader.read({"input_ids": [1, 2], "example_id": given}, "row 0")


def test_one_example_id_cannot_name_two_documents():
    reader = RowReader(None, None)
    packed = {"input_ids": [1, 2, 3, 4], "seq_lengths": [2, 2], "example_id": 4}
    with pytest.raises(BadRowError, match="one example_id cannot name the 2 documents"):
        reader.read(packed, "row 0")
    assert reader.read(packed | {"seq_lengths": [4]}, "row 0")[0]["example_id"] == 4
    assert "example_id" not in RowReader(None, None, ignore_columns=["example_id"]).read(packed, "row 0")[0]


def test_a_name_in_place_of_a_list_of_columns_is_refused():
    with pytest.raises(ValueError, match="ignore_columns='id' is not allowed: use a list of names"):
        RowReader(None, None, ignore_columns="id")
