"""4-bit residual codes: few of the scanned keys are compared exactly, and hardly a neighbour is lost."""

import pytest
import torch

from knnmoe_hf.search import SearchOptions, StoredKeys
from knnmoe_hf.search.exact import TorchSearch
from knnmoe_hf.search.lists import Lists, scan_tensor, sort_into_lists
from knnmoe_hf.search.native_ivf import NativeIvfSearch
from knnmoe_hf.search.residual_codes import residual_codes
from tests.builds import BUILDS, use_build_for
from tests.search.helpers import K, clustered, found_share, in_parts, random, same, stored_as

OPTIONS = SearchOptions(search_backend="ivf")


@pytest.fixture(autouse=True)
def codes_for_all_lengths(monkeypatch):
    monkeypatch.setattr("knnmoe_hf.search.native_ivf._CODED", 1)


def with_lists(stored: StoredKeys, lists: Lists, codes, max_scan: int, max_rerank: int) -> NativeIvfSearch:
    tensors = lists._asdict() | (codes._asdict() if codes else {})
    return NativeIvfSearch.from_tensors(
        stored, OPTIONS, tensors | {"scan": scan_tensor(max_scan, max_rerank, len(stored))}
    )


def unpacked(codes, rows: int, width: int) -> torch.Tensor:
    """(N, c) of -8 to 7, in the order of the lists."""
    table = codes.codes.view(len(codes.codes), -1, 16).transpose(1, 2).reshape(-1, codes.codes.shape[1] // 16)
    return torch.stack([table & 15, table >> 4], dim=-1).flatten(1)[:rows, :width].double() - 8


SIZES = [("AVX2", torch.float32, 3), ("AVX2", torch.int8, 23), ("AVX2", torch.int8, 48), ("DEFAULT", torch.int8, 23)]


@pytest.mark.parametrize("build, dtype, width", SIZES, ids=str)
def test_few_of_the_scanned_keys_are_compared_exactly(build, dtype, width, monkeypatch):
    use_build_for(build, monkeypatch)
    keys, queries = clustered(8000, width, clusters=20 if width < 24 else 60)
    built = NativeIvfSearch(stored_as(keys, dtype), OPTIONS)
    assert built.residual_codes is not None and built.max_rerank <= built.max_scan // 4
    whole = with_lists(built.keys, built.lists, None, built.max_scan, built.max_scan)
    assert found_share(built.search(queries, K), whole.search(queries, K)) >= 0.99


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("width", [5, 48])
def test_those_are_compared_that_are_the_nearest_by_their_codes(build, width, monkeypatch):
    use_build_for(build, monkeypatch)
    keys, queries = clustered(3001, width, clusters=10)
    keys[:, 0] *= 40  # beyond the range of four bits, so that it matters which are compared
    stored = StoredKeys(keys)
    lists = sort_into_lists(stored)
    codes = residual_codes(stored, lists)
    found = with_lists(stored, lists, codes, 3001, 100).search(queries, K)
    own = torch.repeat_interleave(torch.arange(len(lists.centroids)), lists.sizes)
    decoded = unpacked(codes, 3001, width) * codes.units[own, None] + (lists.centroids * lists.step)[own]
    order = torch.cdist(queries.double(), decoded).argsort(dim=-1)
    for count, compare in ((100, torch.le), (130, torch.ge)):  # all of the first 100, none beyond the first 130
        rows = lists.rows[order[:, :count]].long()
        nearest = (queries[:, None] - keys[rows]).square().sum(dim=-1).sort(dim=-1).values[:, :K]
        assert bool(compare(found.distances, nearest + (1e-4 if count == 100 else -1e-4) * nearest).all())


def test_each_list_has_a_unit_of_its_own():
    keys = torch.cat([random(300, 24), 1000 + 1e-2 * random(300, 24, seed=1)])
    stored = StoredKeys(keys[torch.randperm(600, generator=torch.Generator().manual_seed(0))])
    far = (stored.codes[:, 0] > 500).int()
    centroids = torch.stack([keys[:300].mean(dim=0), keys[300:].mean(dim=0)])
    step = centroids.abs().amax(dim=0) / 127
    lists = Lists(
        (centroids / step).round().to(torch.int8), step, torch.tensor([0, 300, 600]).int(), far.argsort().int()
    )
    codes = residual_codes(stored, lists)
    own = torch.repeat_interleave(torch.arange(2), lists.sizes)
    residuals = stored.codes[lists.rows.long()] - (lists.centroids * lists.step)[own]
    wrong = (unpacked(codes, 600, 24) * codes.units[own, None] - residuals).abs()
    within = residuals.abs() <= 7 * codes.units[own, None]
    assert bool((wrong <= 0.501 * codes.units[own, None])[within].all()) and within.double().mean() > 0.9


def test_more_keys_are_compared_exactly_where_codes_mislead(monkeypatch):
    monkeypatch.setattr("knnmoe_hf.search.residual_codes._UNIT", 1e-4)  # so that codes say next to nothing
    keys, queries = clustered(20_000, width=8)
    stored = StoredKeys(keys)
    built = NativeIvfSearch(stored, OPTIONS)
    assert built.max_rerank > 96
    assert found_share(built.search(queries, K), TorchSearch(stored, OPTIONS).search(queries, K)) >= 0.98
    again = NativeIvfSearch.from_tensors(stored, OPTIONS, built.tensors())
    assert same(again.search(queries, K), built.search(queries, K))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_keys_with_equal_codes_are_all_compared(dtype):
    keys, _ = clustered(8000, clusters=100)
    keys[3000:3400] = keys[3000].clone()
    keys[3400:3420] = keys[3000] + 0.05 * random(20, 64)
    stored = stored_as(keys, dtype)
    lists = sort_into_lists(stored)
    built = with_lists(stored, lists, residual_codes(stored, lists), 1024, 64)
    found = built.search(stored.floats(slice(3400, 3420)), K)
    assert torch.equal(found.rows[:, 0], torch.arange(3400, 3420))


@pytest.mark.parametrize("build", BUILDS)
def test_a_query_gets_the_same_in_any_batch_also_beside_one_that_is_not_finite(build, monkeypatch):
    use_build_for(build, monkeypatch)
    keys, queries = clustered(8000, 23, clusters=60)
    built = NativeIvfSearch(stored_as(keys, torch.int8), OPTIONS)
    assert built.residual_codes is not None
    whole = built.search(queries, K)
    for size in (1, 2, 3, 7):
        assert same(in_parts(built, queries, K, size), whole)
    for value in (float("nan"), float("inf"), 3e38):
        asked, others = queries.clone(), torch.arange(300) != 3
        asked[3, 5] = value
        found = built.search(asked, K)
        assert torch.equal(found.rows[others], whole.rows[others]) and len(found.rows[3].unique()) == K
        assert torch.equal(built.search(asked[3:4], K).rows[0], found.rows[3])


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("width", [1, 7, 2**15])
def test_integer_sums_do_not_overflow(build, width, monkeypatch):
    use_build_for(build, monkeypatch)
    keys = random(60, width).sign() * (1 + 1e-3 * random(60, width, seed=1))
    stored, centroid = StoredKeys(keys), torch.zeros(1, width, dtype=torch.int8)
    lists = Lists(centroid, torch.ones(width), torch.tensor([0, 60]).int(), torch.arange(60).int())
    built = with_lists(stored, lists, residual_codes(stored, lists), 60, 10)
    assert width < 8 or bool((built.search(keys, 1).distances == 0).all())
    assert bool((built.search(keys, 10).distances[:, 0] < 1e-2 * width).all())


@pytest.mark.parametrize("build", BUILDS)
def test_lists_may_end_anywhere_in_a_block(build, monkeypatch):
    use_build_for(build, monkeypatch)
    keys, queries = clustered(16 * 12 + 5, width=9, spread=2.0)
    stored, sizes = StoredKeys(keys), torch.tensor([1, 15, 16, 17, 2, 3, 1, 1, 1, 40, 31, 69])
    starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    step = keys.abs().amax(dim=0) / 127
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(1)).int()
    centroids = (keys[order[starts[:-1].long()].long()] / step).round().to(torch.int8)
    lists = Lists(centroids, step, starts, order)
    codes = residual_codes(stored, lists)
    exact = TorchSearch(stored, OPTIONS).search(queries, 4)
    assert found_share(with_lists(stored, lists, codes, len(keys), 100).search(queries, 4), exact) >= 0.98
    for max_scan in range(64, 160, 7):  # the last list is cut
        some = with_lists(stored, lists, codes, max_scan, 32).search(queries, 4)
        whole = with_lists(stored, lists, None, max_scan, max_scan).search(queries, 4)
        assert found_share(some, whole) >= 0.9 and bool((some.distances >= whole.distances * (1 - 1e-5)).all())


def test_more_neighbours_than_are_compared_are_found_too():
    keys, queries = clustered(8000, clusters=100)
    built = NativeIvfSearch(stored_as(keys, torch.int8), OPTIONS)
    assert built.residual_codes is not None
    found, exact = built.search(queries, 300), TorchSearch(built.keys, OPTIONS).search(queries, 300)
    assert found.rows.shape == (300, 300) and bool((found.rows.sort(dim=-1).values.diff(dim=-1) > 0).all())
    assert bool((found.distances >= exact.distances * (1 - 1e-5)).all())


def test_they_take_half_a_byte_for_each_number_and_are_refused_where_they_do_not_fit():
    built = NativeIvfSearch(stored_as(clustered(8000, width=48, clusters=100)[0], torch.int8), OPTIONS)
    tensors, lists = built.tensors(), sum(tensor.nbytes for tensor in built.lists)
    assert built.nbytes - built.index.bytes - lists == 24 * 8000 + 4 * len(built.lists.centroids)
    for wrong in (
        {"codes": tensors["codes"][1:]},
        {"codes": tensors["codes"][:, 1:]},
        {"codes": tensors["codes"].float()},
        {"units": tensors["units"][1:]},
        {"units": tensors["units"] * torch.nan},
        {"units": 0 * tensors["units"]},
        {"scan": torch.tensor([512, 512, 8000])},
    ):
        with pytest.raises(ValueError, match="anew"):
            NativeIvfSearch.from_tensors(built.keys, OPTIONS, tensors | wrong)
    for missing in ({"units"}, {"codes"}, {"codes", "units"}):
        with pytest.raises(ValueError, match="anew"):
            some = {name: tensor for name, tensor in tensors.items() if name not in missing}
            NativeIvfSearch.from_tensors(built.keys, OPTIONS, some)


def test_where_many_neighbours_are_wanted_all_scanned_keys_are_compared():
    built = NativeIvfSearch(stored_as(clustered(8000, clusters=100)[0], torch.int8), SearchOptions(num_neighbors=200))
    assert built.lists is not None and built.residual_codes is None and built.max_rerank == built.max_scan
    assert built.tensors().keys().isdisjoint({"codes", "units"})


def test_short_memories_have_none(monkeypatch):
    monkeypatch.setattr("knnmoe_hf.search.native_ivf._CODED", 8001)
    built = NativeIvfSearch(stored_as(clustered(8000, clusters=100)[0], torch.int8), OPTIONS)
    assert built.lists is not None and built.residual_codes is None
