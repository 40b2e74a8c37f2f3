"""The origin of rows: kept together with their examples' tokens, whatever happens to the rows."""

import pytest
import torch

from knnmoe_hf.memory.provenance import Provenance

TOKENS = {7: torch.tensor([1, 2, 3]), 3: torch.tensor([4, 5])}


@pytest.fixture
def source() -> Provenance:
    """Two rows of example 7, then one of example 3."""
    before = torch.tensor([3.0, 2.0, 1.0])
    return Provenance.build(torch.tensor([7, 7, 3]), torch.tensor([0, 1, 0]), before, before / 2, TOKENS)


def tokens_of(provenance: Provenance) -> dict[int, list[int]]:
    return {example: ids.tolist() for example, ids in provenance.tokens().items()}


def test_tokens_are_those_of_each_example(source):
    assert tokens_of(source) == {7: [1, 2, 3], 3: [4, 5]}
    assert source.offsets.tolist() == [0, 3, 5]


def test_of_rows_alone_everything_else_is_unknown():
    bare = Provenance.of_rows(torch.tensor([5, 2], dtype=torch.int32))
    assert bare.example_ids.tolist() == [5, 2] and bare.positions.tolist() == [-1, -1]
    assert not bare.nll_before.any() and not bare.nll_after.any() and bare.tokens() == {}


def test_selected_rows_keep_the_tokens_of_their_examples_only(source):
    kept = source.select(torch.tensor([False, True, False]))
    assert (kept.example_ids.tolist(), kept.positions.tolist()) == ([7], [1])
    assert (kept.nll_before.tolist(), kept.nll_after.tolist()) == ([2.0], [1.0])
    assert tokens_of(kept) == {7: [1, 2, 3]}
    none = source.select(torch.zeros(3, dtype=torch.bool))
    assert len(none.example_ids) == 0 and none.tokens() == {} and none.offsets.tolist() == [0]


def test_joined_rows_come_one_after_the_other_with_the_tokens_of_both(source):
    other = source.renumbered({7: 8, 3: 9}).select(torch.tensor([True, False, True]))
    both = source.joined(other)
    assert both.example_ids.tolist() == [7, 7, 3, 8, 9] and both.nll_after.tolist() == [1.5, 1.0, 0.5, 1.5, 0.5]
    assert tokens_of(both) == {7: [1, 2, 3], 3: [4, 5], 8: [1, 2, 3], 9: [4, 5]}


def test_renumbering_changes_the_given_examples_in_rows_and_tokens(source):
    other = source.renumbered({7: 3, 3: 7})  # swapped
    assert other.example_ids.tolist() == [3, 3, 7] and tokens_of(other) == {3: [1, 2, 3], 7: [4, 5]}
    assert source.renumbered({3: 0}).examples.tolist() == [7, 0] and source.examples.tolist() == [7, 3]


def test_the_specification_is_of_the_tensors_that_are_stored(source):
    for provenance, sizes in ((source, (3, 2, 5, 0)), (Provenance.of_rows(torch.arange(4)), (4, 0, 0, 0))):
        stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in provenance.tensors().items()}
        assert stored == Provenance.specification(*sizes)
