"""Rows that cannot be used, and data that end with an error: what was solved before them is kept."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset

from knnmoe_hf import RoutingMemory, active_memory
from knnmoe_hf.errors import BadRowError
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer
from tests.support.training import build, examples, trainer_for

ROOT = Path(__file__).parents[2]
ROWS = examples(7)
BAD = {"input_ids": [1, 2, 96]}  # the last id is outside of the vocabulary


class Stream(IterableDataset):
    """Rows, and then an error."""

    def __init__(self, rows: list[dict], error: BaseException | None = None):
        self.rows, self.error = rows, error

    def __iter__(self):
        yield from self.rows
        if self.error is not None:
            raise self.error


class Dying(IterableDataset):
    """Rows, and then the end of the process that reads them."""

    def __iter__(self):
        yield from ROWS[:5]
        os._exit(3)


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def same(one: RoutingMemory, other: RoutingMemory) -> bool:
    return all(
        torch.equal(one.layers[layer].decoded_keys, other.layers[layer].decoded_keys)
        and torch.equal(one.layers[layer].decoded_values, other.layers[layer].decoded_values)
        for layer in one.layers
    ) and torch.equal(one.provenance.example_ids, other.provenance.example_ids)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("before", [1, 4, 5])  # in the middle of a batch, at its end
@pytest.mark.parametrize("kind", ["row", "error"])
def test_an_error_in_a_stream_keeps_what_was_solved_before_it(kind, before, workers, tmp_path):
    good = ROWS[:before]
    if kind == "row":
        rows, raised, told = Stream([*good, BAD, *ROWS[before:]]), BadRowError, f"^row {before} of train_dataset: "
    else:
        rows, raised, told = Stream(good, ConnectionError("the network is gone")), ConnectionError, "network is gone"
    model = tiny_model("olmoe")
    trainer = trainer_for(model, tmp_path, rows, max_steps=50, dataloader_num_workers=workers)
    with pytest.raises(raised, match=told) as found:
        trainer.train()
    assert "trainer.save_model()" in "".join([str(found.value), *getattr(found.value, "__notes__", [])])
    assert active_memory(model) == "default"
    assert same(trainer.memory, build(tiny_model("olmoe"), tmp_path, rows=good))
    trainer.save_model(tmp_path / "saved")
    assert len(RoutingMemory.from_pretrained(tmp_path / "saved")) == 8 * before


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_before_anything_was_solved_is_a_plain_one(workers, tmp_path):
    options = dict(max_steps=5, dataloader_num_workers=workers)
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, Stream([BAD, *ROWS]), **options)
    with pytest.raises(BadRowError, match=r"^row 0 of train_dataset: [^;]*\(--skip-bad-rows\)\.$"):
        trainer.train()
    assert trainer.memory is None and active_memory(trainer.model) is None
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, Stream([], OSError("no such host")), **options)
    with pytest.raises(OSError, match="no such host"):
        trainer.train()


def test_streams_of_the_library_datasets_are_kept_too(tmp_path):
    def rows():
        yield from ROWS[:3]
        raise ConnectionError("the network is gone")

    stream = datasets.IterableDataset.from_generator(rows)
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, stream, max_steps=5)
    with pytest.raises(Exception, match="network is gone"):
        trainer.train()
    assert trainer.memory.provenance.example_ids.unique().tolist() == [0, 1, 2]


def test_an_error_that_cannot_be_sent_by_a_worker_is_told_by_its_name(tmp_path):
    stream = Stream(ROWS[:3], Unpicklable("this", "that"))
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, stream, max_steps=5, dataloader_num_workers=1)
    with pytest.raises(RuntimeError, match="Unpicklable: this and that"):
        trainer.train()
    assert len(trainer.memory) == 3 * 8


def test_a_worker_that_dies_costs_nothing_that_was_solved(tmp_path):
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, Dying(), max_steps=5, dataloader_num_workers=1)
    with pytest.raises(RuntimeError, match="worker"):
        trainer.train()
    assert trainer.memory is None or len(trainer.memory) in (16, 32)  # what the worker had sent before


def test_an_id_that_comes_twice_in_a_stream_costs_nothing_either(tmp_path):
    rows = [row | {"example_id": one} for row, one in zip(ROWS, (5, 3, 8, 3))]
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, Stream(rows), max_steps=5)
    with pytest.raises(BadRowError, match="^row 3 of train_dataset: example_id 3 comes twice"):
        trainer.train()
    assert trainer.memory.provenance.example_ids.unique().tolist() == [3, 5, 8]


def test_a_stream_to_evaluate_on_tells_once_what_it_skipped(tmp_path, caplog):
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, ROWS, skip_bad_rows=True)
    trainer.train()
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        metrics = trainer.evaluate(Stream([*examples(3, seed=9), BAD]))
    (told,) = [one.getMessage() for one in caplog.records if "skipped" in one.getMessage()]
    assert told.startswith("eval_dataset: 4 rows gave 3 examples. 1 row was skipped") and metrics["eval_loss"] > 0


def test_a_dict_is_nothing_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="^train_dataset of type dict is not allowed"):
        trainer_for(tiny_model("olmoe"), tmp_path, {"one": ROWS})


def test_a_stream_that_ends_before_max_steps_is_read_once(tmp_path):
    memory = build(tiny_model("olmoe"), tmp_path, rows=Stream(ROWS), max_steps=50)
    assert same(memory, build(tiny_model("olmoe"), tmp_path, rows=ROWS))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_skipped_rows_are_counted_logged_once_and_in_the_metrics(stream, workers, tmp_path, caplog):
    rows = [*ROWS[:2], BAD, *ROWS[2:5], {"input_ids": []}]
    options = dict(skip_bad_rows=True, dataloader_num_workers=workers) | (dict(max_steps=50) if stream else {})
    with caplog.at_level(logging.INFO, "knnmoe_hf"):
        trainer = trainer_for(tiny_model("olmoe"), tmp_path, Stream(rows) if stream else rows, **options)
        metrics = trainer.train().metrics
    assert (metrics["data_rows"], metrics["data_examples"], metrics["data_skipped"]) == (7, 5, 2)
    (told,) = [one for one in caplog.records if "rows were skipped" in one.getMessage()]
    assert told.levelno == logging.WARNING and "train_dataset" in told.getMessage()
    assert trainer.memory.provenance.example_ids.unique().tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("stream", [False, True])
def test_completions_that_max_length_cuts_off_are_told_and_none_left_is_an_error(stream, tmp_path, caplog):
    rows = [{"input_ids": list(range(length)), "completion_mask": [0] * 4 + [1] * (length - 4)} for length in (6, 9)]
    options = dict(max_steps=5) if stream else {}
    kind = Stream if stream else list
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        metrics = trainer_for(tiny_model("olmoe"), tmp_path, kind(rows), max_length=6, **options).train().metrics
    assert (metrics["data_completions_cut"], metrics["data_completions_lost"]) == (1, 0)
    assert "lost targets to max_length=6" in caplog.text
    with pytest.raises(ValueError, match="no example has a target token: max_length=4 leaves none of 2 examples"):
        trainer_for(tiny_model("olmoe"), tmp_path, kind(rows), max_length=4, **options).train()


def test_a_packed_row_gives_the_memory_of_its_documents(family, tmp_path):
    ids = torch.randint(96, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [12, 7, 11]
    parts = [ids[:12], ids[12:19], ids[19:]]
    apart = build(tiny_model(family), tmp_path, rows=[{"input_ids": part} for part in parts])
    for columns in (
        {"seq_lengths": lengths},
        {"position_ids": [*range(12), *range(7), *range(11)]},
        {"cu_seq_lens": [0, 12, 19, 30]},
    ):
        packed = build(tiny_model(family), tmp_path, rows=[{"input_ids": ids} | columns])
        assert len(packed) == 30 - 3 and same(packed, apart)
        assert [packed.provenance.tokens()[index].tolist() for index in range(3)] == parts


def test_the_trainers_arguments_reach_every_dataset(tmp_path):
    rows = [{"body": "abcdefgh", "topic": index} for index in range(3)]
    arguments = dict(dataset_text_field="body", ignore_columns=["topic"])
    model = tiny_model("olmoe", vocab_size=300)
    extra = dict(processing_class=byte_tokenizer(), eval_dataset={"one": rows}, ordinary_dataset={"two": rows})
    options = arguments | {"allow_overlap": True}
    trainer = trainer_for(model, tmp_path, rows, trainer=extra, config={"confidence": "rbf"}, **options)
    trainer.train()
    assert len(trainer.memory) == 3 * 7
    assert "eval_loss" in trainer.evaluate(rows) and "test_loss" in trainer.predict(rows).metrics
    for name, place in (
        ("eval_dataset", r"eval_dataset\['one'\]"),
        ("ordinary_dataset", r"ordinary_dataset\['one'\]"),
    ):
        bad = extra | {name: {"one": [*rows, {"body": ""}]}}
        with pytest.raises(BadRowError, match=rf"^row 3 of {place}: column 'body' is empty"):
            trainer_for(model, tmp_path, rows, trainer=bad, **arguments)
    with pytest.raises(BadRowError, match="^row 0 of train_dataset: column 'topic' would not be used"):
        trainer_for(model, tmp_path, rows, trainer=extra, dataset_text_field="body")


def test_two_processes_stop_at_the_same_step_and_keep_the_same_memory(tmp_path):
    words = [sys.executable, "-m", "tests.training.interrupted_in_processes", str(tmp_path)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    alone, first, second = (found[f"row-{name}"] for name in ("1-0", "2-0", "2-1"))
    assert all(one["error"].startswith("BadRowError: row 5 of train_dataset") for one in (alone, first, second))
    for name in ("ids", "values"):
        assert first[name] == second[name] == alone[name]
    first, second = found["error of one-2-0"], found["error of one-2-1"]
    assert "ConnectionError: the network is gone" in second["error"]
    assert "process 1 could not read its data any more (the network is gone)" in first["error"]
    assert (first["ids"], first["values"]) == (second["ids"], second["values"])
    assert set(first["ids"]) == {0, 1, 2, 3, 4, 5}  # the first process had a whole batch in that step
