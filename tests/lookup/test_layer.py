"""Distances to rows of other examples and the scale made of them, against a plain loop."""

import pytest
import torch

from knnmoe_hf.lookup.layer import SAMPLE, distance_scale, neighbor_distances
from knnmoe_hf.search import StoredKeys

BYTES = 2**26


def _keys(rows, width=6, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def _distances(keys, examples, k, max_bytes=BYTES):
    keys = keys if isinstance(keys, StoredKeys) else StoredKeys(keys)
    return neighbor_distances(keys, torch.as_tensor(examples), k, max_bytes)


def _scale(keys, examples, k, max_bytes=BYTES) -> float:
    return distance_scale(_distances(keys, examples, k, max_bytes))


def _plain(keys, examples: list[int], k) -> list[list[float]]:
    """Of every row the distances to its nearest rows of other examples, but for a 32nd of them before and after."""
    order = {name: place for place, name in enumerate(dict.fromkeys(examples))}
    places, gap = [order[name] for name in examples], len(order) // 32
    apart = (keys.double()[:, None] - keys.double()).square().sum(-1).tolist()
    found = [
        sorted(d for d, there in zip(row, places) if abs(there - here) > gap)[:k] for row, here in zip(apart, places)
    ]
    width = max(map(len, found))
    return [row for row in found if len(row) == width]


def _assert_as_plain(keys, examples: list[int], k) -> None:
    expected = torch.tensor(_plain(keys, examples, k))
    torch.testing.assert_close(_distances(keys, examples, k), expected, rtol=1e-5, atol=1e-6)


def _plain_scale(keys, examples, k) -> float:
    """The lower median of them."""
    known = sorted(sum(_plain(keys, examples, k), []))
    return known[(len(known) - 1) // 2]


@pytest.mark.parametrize("k", [1, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_is_the_median_distance_to_rows_of_other_examples(k, dtype):
    keys, examples = _keys(60).to(dtype), torch.arange(60) // 7
    _assert_as_plain(keys, examples.tolist(), k)
    assert _scale(keys, examples, k) == pytest.approx(_plain_scale(keys, examples.tolist(), k), rel=1e-5)


def test_codes_of_int8_are_as_far_apart_as_what_they_stand_for():
    codes = torch.randint(-127, 128, (50, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    step = torch.tensor([0.1, 1.0, 0.01, 2.0, 0.5, 0.3])
    found = _distances(StoredKeys(codes, step), torch.arange(50) // 5, 4)
    assert torch.equal(found, _distances(codes * step, torch.arange(50) // 5, 4))


@pytest.mark.parametrize("order", ["as they come", "reversed", "large and negative"])
@pytest.mark.parametrize("examples, gap", [(31, 0), (32, 1), (64, 2), (100, 3)])
def test_the_examples_just_before_and_after_do_not_count(examples, gap, order):
    """A key that moves by 1 with every example: the nearest that count are `gap + 1` away."""
    names = {"as they come": 1, "reversed": -1, "large and negative": -(2**40)}[order] * torch.arange(examples)
    keys = torch.arange(examples).float().repeat_interleave(2)[:, None]
    found = _distances(keys, names.repeat_interleave(2), 4)
    nearest = torch.tensor([gap + 1.0] * 4).square()
    assert torch.equal(found[examples], nearest)  # in the middle, with two on each side
    assert found.min() == (gap + 1) ** 2 and found.shape == (2 * examples, 4)
    # at an end there are neighbours on one side only
    assert found[0].sqrt().tolist() == [gap + 1, gap + 1, gap + 2, gap + 2]
    _assert_as_plain(keys, names.repeat_interleave(2).tolist(), 4)


def test_rows_of_an_example_that_comes_back_later_are_still_its_own():
    keys = torch.cat([_keys(5), _keys(5) + 1e-4, _keys(40, seed=1)])
    examples = [0] * 5 + [1] * 5 + [0] * 5 + [2] * 35
    _assert_as_plain(keys, examples, 1)


def test_samples_with_too_few_others_are_left_out():
    examples = [0] * 9 + [1] * 2  # rows of 0 have two others, rows of 1 have nine
    found = _distances(_keys(11), examples, 4)
    assert found.shape == (2, 4)
    _assert_as_plain(_keys(11), examples, 4)
    assert _distances(_keys(11), examples, 2).shape == (11, 2)
    assert (found.diff(dim=1) >= 0).all()


def test_rows_of_one_example_do_not_make_each_other_seem_near():
    examples = torch.arange(12).repeat_interleave(5)
    keys = _keys(12).repeat_interleave(5, dim=0) + 1e-3 * _keys(60, seed=1)
    scale = _scale(keys, examples, 3)
    assert scale > 0.1 and scale == pytest.approx(_plain_scale(keys, examples.tolist(), 3), rel=1e-4)
    assert _scale(keys, torch.arange(60) % 5, 3) < 1e-4


def test_a_single_example_measures_against_its_own_other_rows():
    keys = _keys(20)
    assert _scale(keys, [9] * 20, 4) == pytest.approx(_plain_scale(keys, list(range(20)), 4), rel=1e-5)
    near = torch.arange(100).float()[:, None]
    assert _distances(near, [9] * 100, 1).max() == 1  # those just before and after count here


def test_an_offset_common_to_all_keys_changes_little():
    keys, examples = _keys(50), torch.arange(50)
    assert _scale(keys + 300, examples, 4) == pytest.approx(_scale(keys, examples, 4), rel=1e-3)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_have_scale_one(rows):
    assert _scale(_keys(rows), torch.arange(rows), 4) == 1.0
    assert _distances(_keys(rows), torch.arange(rows), 4).shape == (0, 4)


@pytest.mark.parametrize("offset", [0.0, 100.3])
def test_coinciding_keys_have_scale_one(offset):
    assert _scale(_keys(1).repeat(30, 1) + offset, torch.arange(30), 4) == 1.0


def test_where_most_keys_coincide_the_others_tell():
    keys = torch.cat([torch.zeros(40, 6), 5 * _keys(5)])
    assert _scale(keys, torch.arange(45), 2) > 5


@pytest.mark.parametrize("max_bytes", [1, 2**10, 2**14, 2**30])
def test_the_bound_of_memory_changes_nothing(max_bytes):
    keys, examples = _keys(700, 16) + 5, torch.arange(700) // 9
    assert torch.equal(_distances(keys, examples, 8, max_bytes), _distances(keys, examples, 8))


def test_no_product_is_larger_than_the_bound(monkeypatch):
    sizes, mm = [], torch.mm

    def recorded(*args, **kwargs):
        out = mm(*args, **kwargs)
        sizes.append(out.nbytes)
        return out

    monkeypatch.setattr(torch, "mm", recorded)
    _distances(_keys(3000), torch.arange(3000), 4, 2**16)
    assert sizes and max(sizes) <= 2**16


@pytest.mark.parametrize("half", [0, 1])
def test_large_memories_are_sampled_evenly(half):
    rows = 2 * SAMPLE
    keys = _keys(rows, 4)
    keys[half * SAMPLE : (half + 1) * SAMPLE] *= 100
    distances = torch.cdist(keys, keys).square().fill_diagonal_(float("inf"))
    near, far = distances.min(dim=-1).values.sort().values[[rows // 4, 3 * rows // 4]].tolist()
    found = _distances(keys, torch.arange(rows), 1)
    assert len(found) == SAMPLE and near < distance_scale(found) < far
