"""Records survive being cut off at any byte."""

import pytest

from knnmoe_hf.comparison.record import Entry, Record, Spent


def entry(number: int) -> Entry:
    return Entry(f"key{number}", f"task/{number}", [-1.25 / 3 * number, True], Spent(1.0, seconds=0.1 * number))


def test_responses_come_back_to_the_bit(tmp_path):
    record = Record(tmp_path / "deep" / "r.jsonl", "a")
    record.add([entry(1), entry(2)])
    again = Record(tmp_path / "deep" / "r.jsonl", "a")
    assert [again[key] for key in again.keys()] == [entry(1), entry(2)]
    assert "key3" not in again and len(again) == 2


def test_responses_of_other_options_are_not_seen_and_stay(tmp_path):
    Record(tmp_path / "r.jsonl", "a").add([entry(1)])
    Record(tmp_path / "r.jsonl", "b").add([entry(2)])
    assert list(Record(tmp_path / "r.jsonl", "a").keys()) == ["key1"]
    assert list(Record(tmp_path / "r.jsonl", "b").keys()) == ["key2"]


@pytest.mark.parametrize("cut", [2, 40, 90])
def test_a_torn_line_is_lost_and_nothing_else(tmp_path, cut):
    path = tmp_path / "r.jsonl"
    Record(path, "a").add([entry(1), entry(2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    record = Record(path, "a")
    assert list(record.keys()) == ["key1"]
    record.add([entry(2), entry(3)])
    assert [Record(path, "a")[f"key{i}"] for i in (1, 2, 3)] == [entry(1), entry(2), entry(3)]


def test_a_file_that_is_no_record_is_an_empty_one(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b"\xff\xfe\n[1]\nnull\n{}\n")
    assert len(Record(tmp_path / "r.jsonl", "a")) == 0
