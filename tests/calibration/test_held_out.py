"""`hold_out`: the last examples, with a gap before them; their targets are the tokens that the memory has rows for."""

from dataclasses import replace

import pytest
import torch

from knnmoe_hf.calibration.held_out import IGNORED, HeldOut, hold_out, without_copies
from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.memory.provenance import Provenance
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


def with_texts(memory, texts: list[list[int]]):
    """The memory with other texts for its examples, in their order; rows stay at tokens 0 to 9."""
    source, ids = memory.provenance, memory.provenance.examples.tolist()
    tokens = {id: torch.tensor(text) for id, text in zip(ids, texts)}
    columns = (source.example_ids, source.positions, source.nll_before, source.nll_after)
    return replace(memory, provenance=Provenance.build(*columns, tokens))


def texts(count: int, length: int = 40, seed: int = 2) -> list[list[int]]:
    return torch.randint(5000, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def test_copies_of_held_out_examples_are_not_in_the_rest(olmoe):
    memory = full_memory(olmoe, examples=tuple(range(32)))
    twice = texts(16) * 2
    found = hold_out(with_texts(memory, twice))
    assert [row["example_id"] for row in found.rows] == [28, 29, 30, 31]
    assert memory.provenance.example_ids[found.rest].unique().tolist() == [*range(12), *range(16, 26)]


def test_a_part_of_a_held_out_example_in_another_chunk_is_not_in_the_rest():
    own = texts(4, length=60)
    own[1] = own[1][:30] + own[3][30:]
    ids, nothing = torch.arange(4).repeat_interleave(59), torch.zeros(4 * 59)
    tokens = {id: torch.tensor(text) for id, text in enumerate(own)}
    source = Provenance.build(ids, torch.arange(59).repeat(4), nothing, nothing, tokens)
    held = HeldOut(prepare_dataset([{"input_ids": own[3], "example_id": 3}], None, None), ids < 3)
    found = without_copies(held, source)
    assert list(found.rows) == list(held.rows) and ids[found.rest].unique().tolist() == [0, 2]


def test_a_held_out_example_that_is_a_small_part_of_a_long_reference_is_not_scored(olmoe):
    memory = full_memory(olmoe, examples=tuple(range(16)))
    own = texts(16)
    own[3] = texts(1, length=4000, seed=3)[0] + own[15]
    found = hold_out(with_texts(memory, own))
    assert [row["example_id"] for row in found.rows] == [14]
    assert memory.provenance.example_ids[found.rest].unique().tolist() == [*range(12)]


def test_where_nothing_overlaps_nothing_changes(olmoe):
    memory = with_texts(full_memory(olmoe, examples=tuple(range(16))), texts(16))
    found = hold_out(memory)
    held = HeldOut(found.rows, found.rest)
    assert without_copies(held, memory.provenance) is held
    assert int(found.rest.sum()) == 120 and len(found.rows) == 2


def test_nothing_is_held_out_of_copies_of_a_single_text(olmoe):
    memory = full_memory(olmoe, examples=tuple(range(40)))
    assert hold_out(with_texts(memory, texts(1) * 40)) is None
