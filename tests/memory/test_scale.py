"""The distance scale against a plain loop."""

import pytest
import torch

from knnmoe_hf.memory.scale import SAMPLE, fit_scale

BYTES = 2**26


def _keys(rows, width=6, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def _plain(keys, examples, k) -> float:
    """The lower median over all rows of the distances to the k nearest rows of other examples."""
    found = []
    for i in range(len(keys)):
        others = [j for j in range(len(keys)) if examples[j] != examples[i]]
        found += sorted(((keys[i].double() - keys[j].double()) ** 2).sum().item() for j in others)[:k]
    return sorted(found)[(len(found) - 1) // 2]


@pytest.mark.parametrize("k", [1, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_is_the_median_distance_to_rows_of_other_examples(k, dtype):
    keys, examples = _keys(60).to(dtype), torch.arange(60) // 7
    assert fit_scale(keys, examples, k, BYTES) == pytest.approx(_plain(keys, examples.tolist(), k), rel=1e-5)


def test_rows_of_one_example_do_not_make_each_other_seem_near():
    examples = torch.arange(12).repeat_interleave(5)
    keys = _keys(12).repeat_interleave(5, dim=0) + 1e-3 * _keys(60, seed=1)
    scale = fit_scale(keys, examples, 3, BYTES)
    assert scale > 0.1 and scale == pytest.approx(_plain(keys, examples.tolist(), 3), rel=1e-4)
    assert fit_scale(keys, torch.arange(60), 3, BYTES) < 1e-4


def test_a_single_example_measures_against_its_own_other_rows():
    keys = _keys(20)
    assert fit_scale(keys, torch.full((20,), 9), 4, BYTES) == pytest.approx(_plain(keys, range(20), 4), rel=1e-5)


def test_an_offset_common_to_all_keys_changes_little():
    keys, examples = _keys(50), torch.arange(50)
    assert fit_scale(keys + 300, examples, 4, BYTES) == pytest.approx(fit_scale(keys, examples, 4, BYTES), rel=1e-3)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_have_scale_one(rows):
    assert fit_scale(_keys(rows), torch.arange(rows), 4, BYTES) == 1.0


@pytest.mark.parametrize("offset", [0.0, 100.3])
def test_coinciding_keys_have_scale_one(offset):
    assert fit_scale(_keys(1).repeat(30, 1) + offset, torch.arange(30), 4, BYTES) == 1.0


def test_where_most_keys_coincide_the_others_tell():
    keys = torch.cat([torch.zeros(40, 6), 5 * _keys(5)])
    scale = fit_scale(keys, torch.arange(45), 2, BYTES)
    assert scale > 5


@pytest.mark.parametrize("max_bytes", [1, 2**10, 2**14, 2**30])
def test_the_bound_of_memory_changes_nothing(max_bytes):
    keys, examples = _keys(700, 16) + 5, torch.arange(700) // 9
    assert fit_scale(keys, examples, 8, max_bytes) == fit_scale(keys, examples, 8, BYTES)


def test_no_product_is_larger_than_the_bound(monkeypatch):
    sizes, addmm = [], torch.addmm

    def recorded(*args, **kwargs):
        out = addmm(*args, **kwargs)
        sizes.append(out.nbytes)
        return out

    monkeypatch.setattr(torch, "addmm", recorded)
    fit_scale(_keys(3000), torch.arange(3000), 4, 2**16)
    assert sizes and max(sizes) <= 2**16


@pytest.mark.parametrize("half", [0, 1])
def test_large_memories_are_sampled_evenly(half):
    rows = 2 * SAMPLE
    keys = _keys(rows, 4)
    keys[half * SAMPLE : (half + 1) * SAMPLE] *= 100
    distances = torch.cdist(keys, keys).square().fill_diagonal_(float("inf"))
    near, far = distances.min(dim=-1).values.sort().values[[rows // 4, 3 * rows // 4]].tolist()
    assert near < fit_scale(keys, torch.arange(rows), 1, BYTES) < far
