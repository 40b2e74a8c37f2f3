"""Keys sorted into lists."""

import pytest
import torch

from knnmoe_hf.search import StoredKeys
from knnmoe_hf.search.lists import (
    Lists,
    _earlier_copies,
    check_row_count,
    one_list_per_key,
    read_scan,
    scan_tensor,
    sort_into_lists,
)
from tests.search.helpers import DTYPES, clustered, random, stored_as


def test_the_same_keys_give_the_same_lists_and_each_row_is_in_the_one_of_its_nearest_centroid():
    keys = clustered(3000, 24)[0]
    lists, again = (sort_into_lists(StoredKeys(keys)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(lists, again))
    assert torch.equal(lists.rows.sort().values, torch.arange(3000).int()) and bool((lists.sizes > 0).all())
    own = torch.repeat_interleave(torch.arange(len(lists.sizes)), lists.sizes)
    nearest = torch.cdist(keys[lists.rows.long()].double(), (lists.centroids * lists.step).double()).argmin(dim=-1)
    assert (nearest == own).double().mean() > 0.999


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_earlier_copies_of_each_key_are_counted(dtype):
    keys = random(3, 8)[[0, 1, 0, 0, 1, 2]]
    assert _earlier_copies(stored_as(keys, dtype)).tolist() == [0, 0, 1, 2, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_list_per_key_has_the_keys_as_centroids(dtype):
    stored = stored_as(random(50, 8), dtype)
    lists = one_list_per_key(stored)
    torch.testing.assert_close(lists.centroids * lists.step, stored.floats(slice(None)), atol=0.02, rtol=0)
    assert torch.equal(lists.rows, torch.arange(50).int()) and bool((lists.sizes == 1).all())


def test_more_rows_than_an_int32_counts_are_refused_with_the_way_out(monkeypatch):
    check_row_count(2**31 - 1)
    many = StoredKeys(torch.empty(2**31, 4, dtype=torch.int8, device="meta"), torch.ones(4, device="meta"))
    monkeypatch.setattr(torch, "randperm", None)  # which would take 16 GiB
    for sort in (sort_into_lists, one_list_per_key):
        with pytest.raises(ValueError, match="2,147,483,648 rows in a layer are too many for lists.*'torch'"):
            sort(many)


FAULTS = {
    "a row twice": lambda t: t["rows"].__setitem__(0, t["rows"][1]),
    "a row beyond": lambda t: t["rows"].__setitem__(0, 3000),
    "a gap": lambda t: t["starts"].__setitem__(-1, 2999),
    "order": lambda t: t["starts"].__setitem__(2, 3000),
    "differences that overflow": lambda t: t["starts"].__setitem__(slice(1, 3), torch.tensor([2**31 - 1, -2])),
    "no lists": lambda t: t.update(starts=t["starts"][:0]),
    "NaN": lambda t: t["step"].mul_(torch.nan),
    "dtype": lambda t: t.update(starts=t["starts"].long()),
    "missing": lambda t: t.pop("step"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_lists_that_do_not_fit_are_refused(fault):
    keys = StoredKeys(clustered(3000, 8)[0])
    tensors = {name: tensor.clone() for name, tensor in sort_into_lists(keys)._asdict().items()}
    assert Lists.from_tensors(tensors, keys) is not None
    FAULTS[fault](tensors)
    with pytest.raises(ValueError, match="build them anew"):
        Lists.from_tensors(tensors, keys)


def test_lists_of_other_keys_are_refused():
    keys = clustered(3000, 8)[0]
    tensors = sort_into_lists(StoredKeys(keys))._asdict()
    for other in (keys[:2000], keys[:, :7]):
        with pytest.raises(ValueError, match="build them anew"):
            Lists.from_tensors(tensors, StoredKeys(other))


@pytest.mark.parametrize(
    "scan",
    [(2**62, 5, 3000), (3001, 5, 3000), (-1, 5, 3000), (0, 0, 3000), (9, 10, 3000), (9, 0, 3000), (9, 9, 2999), (9,)],
)
def test_a_scan_that_cannot_be_is_refused(scan):
    assert read_scan({"scan": scan_tensor(9, 5, 3000)}, 3000) == (9, 5)
    for tensors in ({"scan": torch.tensor(scan)}, {"scan": torch.tensor(scan).float()}, {}):
        with pytest.raises(ValueError, match="build the index anew"):
            read_scan(tensors, 3000)
