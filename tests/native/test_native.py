"""The native code by itself: as PyTorch computes, the same for a token alone and in a batch, nothing unchecked."""

import logging
import sys

import pytest
import torch
from torch.autograd import forward_ad

from knnmoe_hf import native
from tests.native.helpers import KINDS, random


def encode(encoder, x: torch.Tensor, width: int) -> torch.Tensor:
    queries = torch.full((len(x), width), float("nan"))
    source, kind = native.address(x, x.dtype), native.kinds()[x.dtype]
    encoder.encode(source, len(x), kind, native.address(queries, torch.float32), torch.get_num_threads())
    return queries


ENCODERS = {
    "float32": (random(13, 38, seed=1), random(13, seed=2)),
    "bfloat16": (random(13, 38, seed=1).bfloat16(), random(13, seed=2)),
    "no bias": (random(13, 38, seed=1), None),
    "bias alone": (None, random(38, seed=2)),
    "identity": (None, None),
}


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gives_w_x_plus_b(name, dtype, kernels, four_threads):
    weight, bias = ENCODERS[name]
    width = 38 if weight is None else 13
    encoder, x = kernels.Encoder(weight, bias, width, 38), random(93, 38).to(dtype)
    wanted = x.double() if weight is None else x.double() @ weight.double().T
    queries = encode(encoder, x, width)
    torch.testing.assert_close(queries.double(), wanted + (0 if bias is None else bias.double()), rtol=1e-5, atol=1e-5)
    alone = torch.cat([encode(encoder, token, width) for token in x.split(1)])
    assert torch.equal(alone, queries)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_two_bytes_is_read_as_pytorch_reads_it(dtype, kernels):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(4096, 16)
    read = encode(kernels.Encoder(None, None, 16, 16), x, 16)
    assert torch.equal(read.nan_to_num(nan=7.0, posinf=8.0), x.float().nan_to_num(nan=7.0, posinf=8.0))


def affine(codes: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 0.1 + random(columns, seed=3).abs(), random(columns, seed=4)


def value_table(form: str, dtype: torch.dtype, num_experts: int = 9, rows: int = 50):
    """Constructor arguments, and the table (N, E) float64 that they stand for."""
    stored = num_experts if form == "dense" else 4
    numbers = 3 * random(rows, stored)
    codes = (20 * numbers).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else numbers.to(dtype)
    step, offset = affine(codes, num_experts if form == "dense" else 1) if dtype == torch.int8 else (None, None)
    values = codes.double() if step is None else codes.double() * step + offset
    if form == "dense":
        return (codes, None, None, step, offset, num_experts), values
    generator = torch.Generator().manual_seed(5)
    experts = torch.rand(rows, num_experts, generator=generator).topk(stored, dim=-1).indices
    dense = torch.zeros(rows, num_experts, dtype=torch.float64).scatter_(1, experts, values)
    default = random(rows, seed=6).half() if form == "default" else None
    dense = dense if default is None else dense + default.double()[:, None]
    experts = experts.to(torch.uint8 if num_experts <= 256 else torch.int16)
    return (codes, experts, default, step, offset, num_experts), dense


def combine(table, rows: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    values = torch.full((len(rows), num_experts), float("nan"))
    tables = native.address(rows, torch.int64), native.address(weights, torch.float32)
    table.combine(*tables, *rows.shape, native.address(values, torch.float32), torch.get_num_threads())
    return values


@pytest.mark.parametrize("num_experts", [9, 300])
@pytest.mark.parametrize("form", ["dense", "sparse", "default"])
@pytest.mark.parametrize("dtype", [*KINDS, torch.int8], ids=str)
def test_a_value_table_gives_weighted_sums(dtype, form, num_experts, kernels, four_threads):
    arguments, dense = value_table(form, dtype, num_experts)
    table = kernels.ValueTable(*arguments)
    rows = torch.randint(50, (93, 5), generator=torch.Generator().manual_seed(7))
    weights = random(93, 5, seed=8).softmax(dim=-1)
    values = combine(table, rows, weights, num_experts)
    wanted = (weights.double()[..., None] * dense[rows]).sum(dim=1)
    torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)
    alone = [combine(table, *one, num_experts) for one in zip(rows.split(1), weights.split(1))]
    assert torch.equal(torch.cat(alone), values)


def test_a_row_or_an_expert_that_is_not_there_is_an_error(kernels, four_threads):
    arguments, _ = value_table("sparse", torch.int8)
    table = kernels.ValueTable(*arguments)
    for row in (-1, 50):
        for count in (1, 200):
            rows = torch.zeros(count, 3, dtype=torch.int64)
            rows[-1, 1] = row
            with pytest.raises(IndexError, match=f"row {row} is not one of the table's 50"):
                combine(table, rows, torch.full((count, 3), 1 / 3), 9)
    arguments[1].fill_(200)
    for count in (1, 200):
        with pytest.raises(IndexError, match="expert 200, but there are only 9"):
            combine(table, torch.zeros(count, 3, dtype=torch.int64), torch.full((count, 3), 1 / 3), 9)


CODES, STEP = random(50, 6), torch.ones(6)
CENTROIDS, STARTS = torch.zeros(2, 6, dtype=torch.int8), torch.tensor([0, 20, 50], dtype=torch.int32)
ROWS, RESIDUALS, UNITS = torch.arange(50, dtype=torch.int32), torch.zeros(4, 48, dtype=torch.uint8), torch.ones(2)
LISTS = (CENTROIDS, STEP, STARTS, ROWS, RESIDUALS, UNITS)


def test_keys_that_native_code_cannot_read_are_refused(kernels):
    for wrong in (CODES.double(), CODES.T, CODES.to("meta"), CODES[0], CODES[:, :0]):
        with pytest.raises(ValueError, match="codes of dtype|at least one dimension"):
            kernels.Index(wrong)
    for step in (torch.ones(5), torch.ones(6).double(), torch.ones(1, 6)):
        with pytest.raises(ValueError, match="one step for each|step of dtype"):
            kernels.Index(CODES, step)


@pytest.mark.parametrize("place", range(6))
def test_lists_of_other_sizes_or_dtypes_are_refused(place, kernels):
    index = kernels.Index(CODES)
    index.set_lists(*LISTS)
    right = LISTS[place]
    wrongs = [right[:-1], torch.cat([right, right]), right.double(), right[None], None]
    if place in (4, 5):
        assert index.set_lists(*LISTS[:4], None, None) is None
    for wrong in wrongs:
        with pytest.raises(ValueError, match="not of these keys|not of these lists|is not allowed"):
            index.set_lists(*LISTS[:place], wrong, *LISTS[place + 1 :])


def test_a_search_for_too_many_or_in_no_lists_is_refused(kernels):
    index = kernels.Index(CODES)
    for k in (0, 51):
        with pytest.raises(ValueError, match=f"{k} neighbours cannot be searched for among 50 keys"):
            index.search(0, 1, k, 0, 0, 1)
    with pytest.raises(ValueError, match="call set_lists first"):
        index.set_scan(5, 5, 16)
    index.set_lists(*LISTS)
    for scan in ((0, 5, 16), (5, 0, 16), (5, 5, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            index.set_scan(*scan)


def test_encoders_of_other_sizes_or_dtypes_are_refused(kernels):
    weight, bias = random(13, 38), random(13)
    for wrong in (
        (weight, bias, 12, 38),
        (weight, bias, 13, 37),
        (weight, bias[1:], 13, 38),
        (weight.half(), bias, 13, 38),
        (weight, bias.double(), 13, 38),
        (weight.T, bias, 38, 13),
        (None, None, 13, 38),
        (None, None, 0, 0),
    ):
        with pytest.raises(ValueError, match="must be|is not allowed"):
            kernels.Encoder(*wrong)


def test_value_tables_of_other_sizes_or_dtypes_are_refused(kernels):
    names = ("codes", "experts", "default_value", "step", "offset", "num_experts")
    sparse, dense = (dict(zip(names, value_table(form, torch.int8)[0])) for form in ("default", "dense"))
    kernels.ValueTable(**sparse), kernels.ValueTable(**dense)
    wrongs = [
        (right, {name: right[name].double()}) for right in (sparse, dense) for name in ("codes", "step", "offset")
    ]
    wrongs += [(right, {name: None}) for right in (sparse, dense) for name in ("codes", "step", "offset")]
    wrongs += [(sparse, {name: sparse[name][:-1]}) for name in names[:5]]
    wrongs += [(dense, {name: dense[name][:-1]}) for name in ("step", "offset")]
    wrongs += [(sparse, {"experts": None}), (sparse, {"experts": sparse["experts"][:, :3].contiguous()})]
    wrongs += [(dense, {"default_value": sparse["default_value"]}), (dense, {"num_experts": 10})]
    for right, wrong in wrongs:
        with pytest.raises(ValueError, match="must|is not allowed"):
            kernels.ValueTable(**(right | wrong))


def test_an_address_is_given_of_what_native_code_can_read_only():
    table = random(4, 6)
    assert native.address(table, torch.float32) == table.data_ptr()
    for wrong, dtype in ((table, torch.int64), (table.T, torch.float32), (table.to("meta"), torch.float32)):
        with pytest.raises(TypeError, match="native code cannot read a .*contiguous .* tensor on"):
            native.address(wrong, dtype)


def test_plain_tensors_are_told_from_others():
    table, plain = random(3, 2), []
    assert native.is_plain() and native.is_plain(table, table.half())
    assert not native.is_plain(table, torch.nn.Parameter(table))
    torch.func.vmap(lambda row: plain.append(native.is_plain(row)) or row)(table)
    torch.func.grad(lambda row: plain.append(native.is_plain(table)) or row.sum())(table)
    with forward_ad.dual_level():
        plain.append(native.is_plain(table))
    assert plain == [False] * 3 and native.is_plain(table)


def test_the_build_is_that_of_the_processor_and_the_portable_one_stands_in(monkeypatch, caplog):
    assert native.load("AVX512") is native.load("AVX2") and native.load("AVX2").__name__.endswith("x86_64_v3")
    assert native.load("DEFAULT").__name__ == native.load("SVE256").__name__ == "knnmoe_hf.native._portable"
    monkeypatch.setitem(sys.modules, "knnmoe_hf.native._x86_64_v3", None)  # importing it fails
    assert native.load("AVX2").__name__.endswith("_portable") and not caplog.text
    monkeypatch.setitem(sys.modules, "knnmoe_hf.native._portable", None)
    caplog.set_level(logging.WARNING)
    assert native.load("AVX2") is None and "without its native code" in caplog.text


def test_native_code_is_for_the_cpu():
    assert native.on(torch.device("cpu")) is native.kernels and native.on(torch.device("cuda")) is None
    assert set(native.kinds()) == set(KINDS)
