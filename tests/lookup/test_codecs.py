"""Keys and values as they are stored: what is lost, by how much, and that nothing else is."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.lookup import codecs
from knnmoe_hf.lookup.codecs import KeyEncoder, fit_keys
from knnmoe_hf.lookup.layer import LayerRows, specification
from knnmoe_hf.lookup.options import VALUE_SPACES
from knnmoe_hf.lookup.values import ValueTable, store_values
from knnmoe_hf.models.gates import find_gates, gate_logits
from knnmoe_hf.search import build_engine
from tests.support.models import PLAIN, random_memory, tiny_model

N, D, E = 400, 24, 10
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DTYPES = [torch.float32, torch.float16, torch.int8]


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int = N, width: int = D) -> torch.Tensor:
    """Off the origin, stretched unlike in directions that are no axes."""
    turned = torch.linalg.qr(_random(width, width, seed=5)).Q
    return 3 + (_random(rows, width) * torch.logspace(1, -1, width)) @ turned


@pytest.fixture
def x():
    return inputs()


@pytest.fixture
def logits():
    return 2 * _random(N, E, seed=1) + torch.arange(E)


def fit(x, logits, codec="raw", dim=48, whitening=0.0, dtype=torch.float32) -> KeyEncoder:
    return fit_keys(x, logits, codec, dim, whitening, dtype)


def apart(keys) -> torch.Tensor:
    """Squared distances between all of them, in float64."""
    return (keys.double()[:, None] - keys.double()).square().sum(-1)


# keys


def test_raw_keys_are_the_inputs_to_the_bit(x, logits):
    encoder = fit(x, logits)
    assert encoder.tensors() == {} and encoder.nbytes == 0
    codes = encoder.encode(x, logits, torch.float32)
    for keys in (codes, encoder.query(x, logits), encoder.floats(codes), encoder.inputs(codes)):
        assert keys.dtype == torch.float32 and torch.equal(keys, x)
    for dtype in (torch.bfloat16, torch.float16):
        codes = encoder.encode(x, logits, dtype)
        assert codes.dtype == dtype and torch.equal(encoder.floats(codes), x.to(dtype).float())


def test_all_axes_unwhitened_keep_every_distance(x, logits):
    encoder = fit(x, logits, "pca", D)
    keys = encoder.encode(x, logits, torch.float32)
    torch.testing.assert_close(apart(keys), apart(x), rtol=1e-2, atol=1e-3)  # to the rounding of the axes
    torch.testing.assert_close(encoder.inputs(keys), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [1, 5, D])
def test_main_axes_are_those_of_the_covariance(x, logits, dim):
    encoder = fit(x, logits, "pca", dim)
    centred = (x - x.mean(0)).double()
    variances, axes = torch.linalg.eigh(centred.T @ centred / N)
    kept = axes.flip(1)[:, :dim].T  # the largest first
    assert encoder.weight.shape == (dim, D)
    torch.testing.assert_close((encoder.weight.double() @ kept.T).abs(), torch.eye(dim).double(), rtol=0, atol=5e-3)
    keys = encoder.query(x, logits)
    torch.testing.assert_close(keys.mean(0), torch.zeros(dim), rtol=0, atol=1e-4)
    torch.testing.assert_close(keys.double().var(0, correction=0), variances.flip(0)[:dim], rtol=1e-2, atol=1e-6)
    assert (encoder.weight.gather(1, encoder.weight.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_whitening_makes_the_axes_as_alike_as_it_says(x, logits, whitening):
    plain = fit(x, logits, "pca", 8).query(x, logits).var(0, correction=0)
    found = fit(x, logits, "pca", 8, whitening).query(x, logits).var(0, correction=0)
    torch.testing.assert_close(found, plain[0] * (plain / plain[0]) ** (1 - whitening), rtol=1e-2, atol=1e-6)


def test_an_axis_of_next_to_no_variance_is_not_blown_up(logits):
    x = torch.cat([_random(N, 4), 1e-6 * _random(N, D - 4, seed=3)], dim=1)
    keys = fit(x, logits, "pca", D, 1.0).query(x, logits)
    assert keys[:, 4:].abs().max() < 1e-3 and keys[:, :4].std() > 0.5


def test_keys_that_went_through_fewer_axes_stay_what_they_are(x, logits):
    encoder = fit(x, logits, "pca", 6, 0.5)
    keys = encoder.encode(x, logits, torch.float32)
    back = encoder.inputs(keys)
    torch.testing.assert_close(encoder.encode(back, logits, torch.float32), keys, rtol=1e-3, atol=1e-4)


def test_logits_as_keys_are_centred_and_look_at_no_input(x, logits):
    encoder = fit(x, logits, "logits")
    keys = encoder.query(torch.full_like(x, torch.nan), logits)
    torch.testing.assert_close(keys, logits - logits.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(encoder.inputs(keys), logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(apart(keys), apart(logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_as_keys_are_the_gate_s_own(family, dtype):
    model = tiny_model(family).to(dtype)
    for name, parameter in model.named_parameters():  # GPT-OSS gates have a bias
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    memory = random_memory(model, key_codec="logits")
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.05, atol=0.1)
    for gate in find_gates(model):
        x = _random(30, 32, seed=2).to(dtype)
        own, rows = gate.module(x)[0].detach(), memory.layers[gate.layer]
        torch.testing.assert_close(gate_logits(gate, x), own.float(), **tolerance)
        mean = -rows.encoder.bias
        torch.testing.assert_close(rows.encoder.query(x, own), own.float() - mean)
        torch.testing.assert_close(rows.decoded_keys.mean(0), torch.zeros(8), rtol=0, atol=1e-4)


@pytest.mark.parametrize("codec", ["raw", "pca", "logits"])
def test_int8_keys_are_off_by_half_a_step_in_each_dimension_at_most(x, logits, codec):
    encoder = fit(x, logits, codec, 12, 0.5, torch.int8)
    codes = encoder.encode(x, logits, torch.int8)
    query = encoder.query(x, logits)
    assert codes.dtype == torch.int8 and codes.abs().max() == 127
    torch.testing.assert_close(encoder.step, query.abs().amax(0) / 127)
    assert ((encoder.floats(codes) - query).abs() <= encoder.step * 0.5001).all()
    if codec == "pca":  # dimensions of their own steps: with one for all the small ones would be lost
        assert encoder.step[0] / encoder.step[-1] > 2


def test_an_outlier_is_clipped_and_costs_the_others_nothing(logits):
    x = _random(20_000, 6)
    gated = logits[:1].expand(20_000, -1)
    plain = fit(x, gated, dtype=torch.int8).step
    x[1234, 2], x[77, 2] = 1e4, -1e4
    encoder = fit(x, gated, dtype=torch.int8)
    torch.testing.assert_close(encoder.step, plain, rtol=0.3, atol=0)
    codes = encoder.encode(x, gated, torch.int8)
    assert codes[1234, 2] == 127 and codes[77, 2] == -127
    assert ((encoder.floats(codes) - x).abs() > encoder.step).sum() <= 6 * 4 + 2  # 4 of 20,000 may be cut off


@pytest.mark.parametrize("rows", [2, 5, 100])
def test_of_few_rows_none_is_clipped(rows):
    x = 10.0 ** -torch.arange(rows)[:, None] * torch.tensor([1.0, -2.0])
    encoder = fit(x, x, dtype=torch.int8)
    codes = encoder.encode(x, x, torch.int8)
    torch.testing.assert_close(encoder.floats(codes)[0], x[0])


@pytest.mark.parametrize("codec", ["raw", "pca", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_rows_are_encoded_in_blocks_as_at_once(monkeypatch, x, logits, codec, dtype):
    whole = fit(x, logits, codec, 7, 0.5)
    monkeypatch.setattr(codecs, "_FIT_ROWS", 30)
    encoder = fit(x, logits, codec, 7, 0.5, dtype)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(encoder.tensors()[name], tensor, rtol=1e-4, atol=1e-4)
    codes = encoder.encode(x, logits, dtype)
    monkeypatch.undo()
    assert torch.equal(codes, encoder.encode(x, logits, dtype)) and len(codes) == N


@pytest.mark.parametrize("codec", ["raw", "pca", "logits"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("case", ["none", "one", "alike", "wide"])
def test_odd_sets_of_rows_are_stored_as_described_and_found_again(codec, dtype, case):
    x = {"none": inputs(0), "one": inputs(1), "alike": inputs(1).repeat(9, 1), "wide": inputs(30)}[case]
    logits = _random(len(x), E) if case != "alike" else _random(1, E).repeat(9, 1)
    config = KNNMoEConfig(key_codec=codec, key_dtype=dtype, key_dim=100, num_neighbors=2, value_experts=E + 5)
    rows = LayerRows.encoded(x, logits, _random(len(x), E), torch.arange(len(x)), config)
    expected = specification(len(x), D, E, tuple(rows.distances.shape), config.options())
    assert {name: (tuple(t.shape), t.dtype) for name, t in rows.tensors().items()} == expected
    assert rows.values.experts is None  # as many as there are: dense
    assert all(t.isfinite().all() for t in rows.tensors().values()) and rows.decoded_keys.isfinite().all()
    assert rows.decoded_keys.shape == (len(x), E if codec == "logits" else D)  # no more axes than the hidden size
    assert rows.scale > 0
    if len(x):
        found = build_engine(rows.stored_keys, config).search(rows.encoder.query(x, logits), 1)
        assert found.distances.isfinite().all()
        close = {"float32": 1e-3, "int8": 1.0}.get(dtype, 0.5)
        assert found.distances.max() <= close
        if case == "wide":
            assert found.rows[:, 0].tolist() == list(range(30))


@pytest.mark.parametrize("codec", ["raw", "pca", "logits"])
def test_autocast_changes_no_query(x, logits, codec):
    encoder = fit(x, logits, codec, 12, 0.5)
    expected = encoder.query(x.bfloat16(), logits.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.query(x.bfloat16(), logits.bfloat16()), expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_codecs_move_as_a_whole(x, logits, device):
    encoder = fit(x, logits, "pca", 12, 0.5, torch.int8)
    moved = encoder.to(torch.device(device))
    assert {t.device.type for t in moved.tensors().values()} == {device} and len(moved.tensors()) == 4
    assert encoder.nbytes == moved.nbytes == (12 * D + 2 * 12 + D) * 4
    torch.testing.assert_close(moved.query(x.to(device), logits.to(device)).cpu(), encoder.query(x, logits))


# values


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


def test_a_layer_s_stored_form_is_as_small_as_it_says():
    model = tiny_model("olmoe")
    sizes = {}
    for name, options in {"plain": PLAIN, "small": dict(key_dim=8, value_experts=2, num_neighbors=1)}.items():
        tables = [{0: _random(500, width, seed=width)} for width in (32, 8)]
        memory = RoutingMemory.from_rows(KNNMoEConfig(**options), *tables, model)
        rows = memory.layers[0]
        sizes[name] = rows.nbytes - rows.distances.nbytes
        assert rows.nbytes == sum(tensor.nbytes for tensor in rows.tensors().values())
    assert sizes["plain"] == 500 * 40 * 4
    assert sizes["small"] == 500 * (8 + 2 + 2 + 2) + (8 * 32 + 8 + 8 + 32) * 4 + 8  # rows; codecs


@pytest.mark.parametrize("dtype, most", [(torch.float32, 11), (torch.float16, 9), (torch.int8, 6)], ids=str)
def test_rows_are_sparse_only_where_that_takes_fewer_bytes(dtype, most):
    values = _random(50, 15)
    for experts in range(1, 20):
        table = store_values(values, "logits", dtype, experts)
        dense = store_values(values, "logits", dtype, None)
        per_row = sum(tensor.nbytes for name, tensor in table.tensors().items() if len(tensor) == 50) / 50
        assert (table.experts is not None) == (experts <= most), experts
        assert per_row < dense.codes.nbytes / 50 if experts <= most else per_row == dense.codes.nbytes / 50


def test_what_a_pca_codec_gives_back_lies_around_the_mean_of_the_inputs():
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) + 7.0
    encoder = fit_keys(x, x[:, :8], "pca", 4, 0.5, torch.float32)
    back = encoder.inputs(encoder.encode(x, x[:, :8], torch.float32))
    assert (back.mean(dim=0) - x.mean(dim=0)).abs().max() < 1e-3
