"""`hold_out`: the last examples, with a gap before them; their targets are the tokens that the memory has rows for."""

from dataclasses import replace

import pytest
import torch

from knnmoe_hf.calibration.held_out import IGNORED, hold_out
from tests.conftest import random_memory, tiny_model
from tests.memory.helpers import full_memory
from tests.support.training import build, examples


@pytest.fixture(scope="module")
def olmoe():
    return tiny_model("olmoe")


@pytest.mark.parametrize("count, held, gap", [(8, 1, 1), (15, 1, 1), (16, 2, 2), (100, 12, 2), (140, 16, 2)])
def test_the_last_eighth_of_at_most_sixteen_is_held_out_with_a_gap_of_two(olmoe, count, held, gap):
    ids = [1000 - 7 * i for i in range(count)]  # descending: the order of the examples counts, not their ids
    memory = full_memory(olmoe, examples=tuple(ids))
    found = hold_out(memory)
    assert [row["example_id"] for row in found.rows] == ids[-held:]
    assert memory.provenance.example_ids[found.rest].unique_consecutive().tolist() == ids[: -held - gap]
    assert found.rest.dtype == torch.bool and int(found.rest.sum()) == 10 * (count - held - gap)
    tokens = memory.provenance.tokens()
    for row in found.rows:
        assert row["input_ids"] == tokens[row["example_id"]].tolist() and row["attention_mask"] == [1] * 11
        assert row["labels"] == [IGNORED] + row["input_ids"][1:]  # rows are at tokens 0 to 9


def test_only_tokens_that_have_a_row_are_targets(olmoe):
    memory = full_memory(olmoe, examples=tuple(range(8)))
    keep = torch.ones(80, dtype=torch.bool)
    keep[[70, 73, 79]] = False  # of the last example, at tokens 0, 3 and 9
    (row,) = hold_out(memory.take(keep)).rows
    wanted = list(row["input_ids"])
    for place in (0, 1, 4, 10):
        wanted[place] = IGNORED
    assert row["labels"] == wanted


def test_targets_of_a_build_are_the_targets_that_are_held_out(olmoe, tmp_path):
    rows = examples(count=9)
    memory = build(olmoe, tmp_path, rows, dict(confidence="context"))
    (held,) = hold_out(memory).rows
    assert held["input_ids"] == rows[-1]["input_ids"] and held["labels"] == rows[-1]["labels"]


def test_nothing_is_held_out_without_provenance_or_with_few_examples(olmoe):
    assert hold_out(full_memory(olmoe, examples=tuple(range(7)))) is None
    assert hold_out(random_memory(olmoe, rows=40)) is None  # no provenance: tokens are unknown
    bare = full_memory(olmoe, examples=tuple(range(8)))
    assert hold_out(bare) is not None
    assert hold_out(replace(bare, provenance=None)) is None
