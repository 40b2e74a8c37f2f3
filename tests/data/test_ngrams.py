"""Hashes of runs of tokens: the same for the same run anywhere, and as good as random otherwise."""

import subprocess
import sys

import pytest
import torch

from knnmoe_hf.data.ngrams import NGRAM, example_hashes, is_kept, kept_hashes, ngram_hashes


def random_ids(count: int, vocabulary: int = 50000, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def test_hashes_are_a_fixed_part_of_the_format():
    assert NGRAM == 8
    assert ngram_hashes(torch.arange(10)).tolist() == [
        -2457579190029195073,
        -1437804658330466257,
        -8845344785359708100,
    ]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 300])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_there_is_one_hash_for_each_run(count, dtype):
    hashes = ngram_hashes(random_ids(count).to(dtype))
    assert hashes.dtype == torch.int64 and hashes.shape == (max(count - NGRAM + 1, 0),)


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_a_hash_depends_on_the_run_alone_wherever_it_is(length):
    ids = random_ids(200)
    whole = ngram_hashes(ids, length)
    for start in (0, 1, 13, 150):
        assert torch.equal(ngram_hashes(ids[start : start + 40], length), whole[start : start + 40 - length + 1])


def test_a_run_that_differs_at_any_place_in_order_or_in_length_has_another_hash():
    run = torch.tensor([5, 6, 7, 8, 9, 10, 11, 12])
    others = [run.roll(1), run.flip(0), *(run + (torch.arange(8) == place) for place in range(8))]
    hashes = {ngram_hashes(other).item() for other in [run, *others]}
    assert len(hashes) == 11
    zeros = torch.zeros(8, dtype=torch.int64)
    assert len({ngram_hashes(zeros[:length], length).item() for length in range(1, 9)}) == 8


def test_hashes_of_similar_runs_do_not_collide_and_a_quarter_is_kept():
    grid = torch.cartesian_prod(torch.arange(500), torch.arange(500))[::7]  # runs that differ in two tokens alone
    runs = torch.cat([torch.arange(1, 7).expand(len(grid), 6), grid], dim=1)
    hashes, _ = example_hashes(runs.flatten().int(), torch.arange(len(runs) + 1) * 8)
    assert len(hashes.unique()) == len(hashes) > 30000
    assert torch.equal(kept_hashes(hashes), hashes[is_kept(hashes)])
    assert is_kept(hashes).double().mean().item() == pytest.approx(0.25, abs=0.01)
    bits = torch.stack([(hashes >> bit) & 1 for bit in range(64)]).double().mean(1)
    assert (bits - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("length", [3, 8])
def test_hashes_of_many_examples_are_those_of_each(length):
    sizes = [0, 12, 3, 8, 7, 0, 40, 2]
    parts = [random_ids(size, seed=size) for size in sizes]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    hashes, bounds = example_hashes(torch.cat(parts).int(), offsets, length)
    assert bounds[-1] == len(hashes)
    for part, start, end in zip(parts, bounds[:-1], bounds[1:]):
        assert torch.equal(hashes[start:end], ngram_hashes(part, length))


def test_no_examples_have_no_hashes():
    hashes, bounds = example_hashes(torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    assert len(hashes) == 0 and bounds.tolist() == [0]


def test_neither_transformers_nor_datasets_is_imported():
    code = "import sys, knnmoe_hf.data.ngrams; print([m for m in ('transformers', 'datasets') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
