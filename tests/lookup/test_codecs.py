"""Keys as they are stored: what is lost, by how much, and that nothing else is; and the size of a stored layer."""

import pytest
import torch

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.lookup import codecs
from knnmoe_hf.lookup.codecs import KeyEncoder, fit_keys
from knnmoe_hf.lookup.layer import LayerRows, specification
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


def test_what_a_pca_codec_gives_back_lies_around_the_mean_of_the_inputs():
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) + 7.0
    encoder = fit_keys(x, x[:, :8], "pca", 4, 0.5, torch.float32)
    back = encoder.inputs(encoder.encode(x, x[:, :8], torch.float32))
    assert (back.mean(dim=0) - x.mean(dim=0)).abs().max() < 1e-3
