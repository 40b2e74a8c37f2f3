"""Values as they are stored: what is lost, by how much, and that a combination is the sum of what is stored."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from knnmoe_hf.lookup.options import VALUE_SPACES
from knnmoe_hf.lookup.rules import ExpertGroups, Router, RoutingRule
from knnmoe_hf.lookup.values import ValueTable, joined_values, store_values

E = 10
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DTYPES = [torch.float32, torch.float16, torch.int8]


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values_for(space: str, rows: int = 60, experts: int = E, seed: int = 2) -> torch.Tensor:
    values = 3 * _random(rows, experts, seed=seed)
    return values.softmax(-1) if space == "assignment" else values


def by_hand(table: ValueTable) -> list[list[float]]:
    """What the stored numbers stand for, expert by expert, in Python."""
    found = []
    for n in range(len(table)):
        row = [0.0 if table.default_value is None else table.default_value[n].item()] * table.num_experts
        for place, code in enumerate(table.codes[n].tolist()):
            expert = place if table.experts is None else table.experts[n, place].item()
            if table.step is not None:
                at = place if table.experts is None else 0
                code = code * table.step[at].item() + table.offset[at].item()
            row[expert] = code + (0.0 if table.default_value is None else table.default_value[n].item())
        found.append(row)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("experts", [None, 1, 3, E, E + 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("space", VALUE_SPACES)
def test_combine_is_the_weighted_sum_of_what_is_stored(space, dtype, experts, device):
    table = store_values(values_for(space), space, dtype, experts)
    known = torch.tensor(by_hand(table), dtype=torch.float64)
    rows = torch.randint(60, (25, 4), generator=torch.Generator().manual_seed(3))
    weights = _random(25, 4, seed=4).softmax(-1)
    expected = (weights.double()[..., None] * known[rows]).sum(1)
    moved = table.to(torch.device(device))
    combined = moved.combine(rows.to(device), weights.to(device)).cpu()
    assert combined.dtype == torch.float32 and combined.shape == (25, E)
    torch.testing.assert_close(combined.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(moved.combine(rows.to(device), weights.to(device)).cpu(), combined)
    torch.testing.assert_close(table.floats().double(), known, rtol=1e-5, atol=1e-5)
    assert torch.equal(table.floats(rows[0]), table.floats()[rows[0]])
    assert table.combine(rows[:0], weights[:0]).shape == (0, E)
    sparse = experts in (1, 3)
    assert (table.experts is not None) == sparse and (table.default_value is not None) == (
        sparse and space == "logits"
    )


@pytest.mark.parametrize("experts", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_no_combination(dtype, experts):
    table = store_values(values_for("logits"), "logits", dtype, experts)
    rows, weights = torch.arange(40).view(10, 4), _random(10, 4).softmax(-1)
    expected = table.combine(rows, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = table.combine(rows, weights)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


class Operators(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("experts", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("space", VALUE_SPACES)
def test_no_value_is_added_by_a_scatter_whose_order_a_gpu_leaves_open(space, dtype, experts):
    table = store_values(values_for(space), space, dtype, experts)
    with Operators() as called:
        table.combine(torch.arange(40).view(10, 4), torch.full((10, 4), 0.25))
    adding = {"scatter_add", "scatter_reduce", "index_add", "index_reduce", "index_put", "put", "bincount", "cumsum"}
    assert called.names and not {name.strip("_") for name in called.names} & adding


@pytest.mark.parametrize("experts", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_combined_in_blocks_as_at_once(monkeypatch, dtype, experts):
    table = store_values(values_for("logits"), "logits", dtype, experts)
    rows = torch.randint(60, (25, 4), generator=torch.Generator().manual_seed(3))
    weights = _random(25, 4, seed=4).softmax(-1)
    expected = table.combine(rows, weights)
    for size in (1, 7 * 4 * E):
        monkeypatch.setattr("knnmoe_hf.lookup.values._BLOCK_VALUES", size)
        assert torch.equal(table.combine(rows, weights), expected)


@pytest.mark.parametrize("space", VALUE_SPACES)
def test_all_values_are_kept_as_far_as_their_dtype_goes(space):
    values = values_for(space) * torch.logspace(-2, 1, E)
    assert torch.equal(store_values(values, space, torch.float32, None).floats(), values)
    assert torch.equal(store_values(values, space, torch.float16, None).floats(), values.half().float())
    table = store_values(values, space, torch.int8, None)
    step = (values.amax(0) - values.amin(0)) / 254
    torch.testing.assert_close(table.step, step)
    assert ((table.floats() - values).abs() <= 0.5001 * step + 1e-6).all()
    torch.testing.assert_close(table.floats().amax(0), values.amax(0))  # both ends are met
    torch.testing.assert_close(table.floats().amin(0), values.amin(0))


def test_values_all_alike_are_kept_by_int8():
    values = torch.tensor([[0.25, -3.0, 0.0]]).repeat(7, 1)
    assert torch.equal(store_values(values, "delta", torch.int8, None).floats(), values)
    assert torch.equal(store_values(values[:1], "delta", torch.int8, None).floats(), values[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_assignment_to_as_many_experts_as_are_stored_loses_nothing_but_digits(dtype):
    values = torch.zeros(60, E).scatter(1, _random(60, E).topk(3).indices, _random(60, 3, seed=1).softmax(-1))
    table = store_values(values, "assignment", dtype, 3)
    assert table.codes.shape == (60, 3) and table.default_value is None
    assert torch.equal(table.floats() > 0, values > 0) or dtype == torch.int8
    if dtype == torch.float32:
        assert torch.equal(table.floats(), values)
    torch.testing.assert_close(table.floats(), values, rtol=0, atol=1 / 254 + 1e-3)


def test_a_sparse_row_keeps_the_largest_logits_and_the_furthest_deltas():
    values = torch.tensor([[1.0, -5.0, 3.0, -0.5], [0.1, 0.2, -0.3, 0.4]])
    deltas = store_values(values, "delta", torch.float32, 2)
    assert deltas.floats().tolist() == torch.tensor([[0.0, -5.0, 3.0, 0.0], [0.0, 0.0, -0.3, 0.4]]).tolist()
    logits = store_values(values, "logits", torch.float32, 2)
    assert logits.experts.tolist() == [[0, 2], [1, 3]]
    torch.testing.assert_close(logits.floats().gather(1, logits.experts.long()), values[[[0], [1]], [[0, 2], [1, 3]]])


@pytest.mark.parametrize("experts", [1, 3, 7])
def test_sparse_logits_keep_every_kept_expert_s_share_of_the_softmax(experts):
    values = values_for("logits")
    table = store_values(values, "logits", torch.float32, experts)
    kept, others = table.experts.long(), values.clone()
    shares, found = values.softmax(-1), table.floats().softmax(-1)
    torch.testing.assert_close(found.gather(1, kept), shares.gather(1, kept), rtol=3e-3, atol=1e-5)
    others.scatter_(1, kept, -math.inf)
    mass = table.floats().scatter(1, kept, -math.inf).exp().sum(-1)
    torch.testing.assert_close(mass, others.exp().sum(-1), rtol=5e-3, atol=1e-5)
    apart = table.floats().scatter(1, kept, torch.nan)
    for row in apart:  # the others are all at one level
        assert len(set(row[~row.isnan()].tolist())) == 1


@pytest.mark.parametrize(
    "count, dtype", [(255, torch.uint8), (256, torch.uint8), (257, torch.int16), (700, torch.int16)]
)
@pytest.mark.parametrize("space", VALUE_SPACES)
def test_experts_are_numbered_in_as_few_bytes_as_hold_them(count, dtype, space):
    values = values_for(space, rows=20, experts=count)
    values[torch.arange(20), count - 1 - torch.arange(20)] += 50  # the last ones are the largest
    table = store_values(values, space, torch.float32, 4)
    assert table.experts.dtype == dtype
    rows, weights = torch.arange(20).view(10, 2), torch.full((10, 2), 0.5)
    known = torch.tensor(by_hand(table))
    torch.testing.assert_close(table.combine(rows, weights), known.view(10, 2, count).mean(1), rtol=1e-4, atol=1e-4)
    assert table.floats().argmax(-1).tolist() == list(range(count - 1, count - 21, -1))


@pytest.mark.parametrize("experts", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_some_rows_of_a_table_are_those_rows(dtype, experts):
    table = store_values(values_for("logits"), "logits", dtype, experts)
    keep = _random(60) > 0
    for some_rows in (keep, keep.nonzero().squeeze(-1)):
        some = table.select(some_rows)
        assert len(some) == int(keep.sum()) and torch.equal(some.floats(), table.floats()[keep])
    assert len(table) == 60 and table.nbytes == sum(t.nbytes for t in table.tensors().values())


@pytest.mark.parametrize("dtype, most", [(torch.float32, 11), (torch.float16, 9), (torch.int8, 6)], ids=str)
def test_rows_are_sparse_only_where_that_takes_fewer_bytes(dtype, most):
    values = _random(50, 15)
    for experts in range(1, 20):
        table = store_values(values, "logits", dtype, experts)
        dense = store_values(values, "logits", dtype, None)
        per_row = sum(tensor.nbytes for name, tensor in table.tensors().items() if len(tensor) == 50) / 50
        assert (table.experts is not None) == (experts <= most), experts
        assert per_row < dense.codes.nbytes / 50 if experts <= most else per_row == dense.codes.nbytes / 50


def deepseek_v3(experts: int, seed: int, open_groups: int | None = None) -> RoutingRule:
    groups = None if open_groups is None else ExpertGroups(experts // 4, open_groups)
    return RoutingRule("sigmoid", renormalized=True, groups=groups, bias=0.4 * _random(experts, seed=seed))


@pytest.mark.parametrize("open_groups", [None, 2])
@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_a_sparse_row_of_logits_chooses_the_experts_of_the_whole_row(scores, open_groups):
    experts, kept, top_k = 32, 12, 4
    rule = replace(deepseek_v3(experts, 5, open_groups), scores=scores)
    if scores == "softmax":
        rule = replace(rule, bias=rule.bias / 10)
    values = 2 * _random(400, experts, seed=6)
    weights, ids = rule(values, top_k)
    table = store_values(values, "logits", torch.float32, kept, router=Router(rule, top_k))
    found_weights, found_ids = rule(table.floats(), top_k)
    same = (ids.sort(-1).values == found_ids.sort(-1).values).all(-1)
    plain = store_values(values, "logits", torch.float32, kept).floats()
    assert (ids.sort(-1).values == rule(plain, top_k)[1].sort(-1).values).all(-1).float().mean() < 0.97
    if open_groups is None:
        assert same.all()
    else:  # the default value takes part in the comparison of groups
        assert same.float().mean() > 0.9
    if scores == "sigmoid":  # each weight is its expert's own
        torch.testing.assert_close(found_weights[same].sort(-1).values, weights[same].sort(-1).values)


def test_a_rule_that_takes_the_largest_logits_stores_what_a_softmax_does():
    values = 3 * _random(50, E)
    for rule in (RoutingRule(), RoutingRule("sigmoid", renormalized=True), RoutingRule(of_chosen=True)):
        mine = store_values(values, "logits", torch.int8, 3, router=Router(rule, 4))
        plain = store_values(values, "logits", torch.int8, 3)
        assert all(torch.equal(tensor, plain.tensors()[name]) for name, tensor in mine.tensors().items())


@pytest.mark.parametrize("experts", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("space", VALUE_SPACES)
def test_joined_tables_have_the_rows_of_both(space, dtype, experts):
    sides = [store_values(scale * values_for(space, seed=s), space, dtype, experts) for s, scale in ((1, 1), (2, 3))]
    joined = joined_values(*sides)
    assert {n: t.dtype for n, t in joined.tensors().items()} == {n: t.dtype for n, t in sides[0].tensors().items()}
    wanted = torch.cat([side.floats() for side in sides])
    step = 0.0 if dtype != torch.int8 else joined.step.max().item()
    torch.testing.assert_close(joined.floats(), wanted, rtol=1e-3, atol=1e-6 + step)
    if experts is not None:
        assert torch.equal(joined.experts, torch.cat([side.experts for side in sides]))
