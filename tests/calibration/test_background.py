"""Background text: which rows of the user's are used, and what is read of this machine's files."""

import hashlib
import struct

import datasets
import pytest

from knnmoe_hf.calibration.background import KINDS, BackgroundText, machine_background, prepare_background
from tests.support.domain import domain
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer
from tests.support.training import trainer_for


def test_64_evenly_spaced_rows_of_each_kind_are_used():
    rows = [{"text": "a" * (2 + index)} for index in range(200)]
    prepared = prepare_background({"few": rows[:5], "many": rows}, byte_tokenizer(), None)
    lengths = {kind: [len(one["input_ids"]) for one in found.rows] for kind, found in prepared.items()}
    assert lengths["few"] == [2, 3, 4, 5, 6]
    assert len(lengths["many"]) == 64 and lengths["many"][:2] == [2, 5] and lengths["many"][-1] > 195
    assert prepare_background(None, None, None) is None


def test_background_text_of_unknown_length_is_refused_before_the_build(tmp_path):
    model, rows = tiny_model("olmoe"), [{"text": "the gate routes a token"}]
    endless = datasets.Dataset.from_list(rows).to_iterable_dataset()
    for given in (endless, {"web": endless}, iter(rows)):
        with pytest.raises(ValueError, match="has no length: pass a list or a Dataset"):
            trainer_for(model, tmp_path, domain(8, 0), {}, dict(ordinary_dataset=given))


def test_text_of_this_machine_is_16_windows_of_each_kind_from_as_many_files():
    tokenizer = byte_tokenizer()
    texts = machine_background(tokenizer)
    assert set(texts) == set(KINDS) and all(len(text.rows) == len(set(text.files)) == 16 for text in texts.values())
    for text in texts.values():
        ids = [tuple(one["input_ids"]) for one in text.rows]
        assert {len(one) for one in ids} == {256} and len(set(ids)) == 16
        assert [one["example_id"] for one in text.rows] == list(range(16)) and text.source == "this machine"
    records = {kind: text.record() for kind, text in texts.items()}
    again = machine_background(tokenizer)
    assert {kind: text.record() for kind, text in again.items()} == records
    rows = list(again["notices"].rows)
    rows[3]["input_ids"][5] += 1
    assert BackgroundText(rows).record()["sha256"] != records["notices"]["sha256"]


def test_kinds_that_are_prepared_already_stay_as_they_are():
    ready = BackgroundText([{"input_ids": [1, 2]}], "this machine", ["a.py"])
    prepared = prepare_background({"ready": ready, "new": [{"input_ids": [3, 4, 5]}]}, None, 2)
    assert prepared["ready"] is ready and prepared["new"].source == "given" and not prepared["new"].files
    assert [list(row["input_ids"]) for row in prepared["new"].rows] == [[3, 4]]
    assert list(prepare_background([{"input_ids": [3, 4, 5]}], None, None)) == ["given"]


def test_a_record_counts_what_was_read():
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}]
    record = BackgroundText(rows, "this machine", ["a.py", "b.py"]).record()
    assert (record["source"], record["files"]) == ("this machine", ["a.py", "b.py"])
    assert (record["examples"], record["tokens"]) == (2, 4)
    assert record["sha256"] == hashlib.sha256(struct.pack("<4q", 1, 2, 3, 4)).hexdigest()
