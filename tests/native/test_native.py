"""The native code by itself: as PyTorch computes, the same for a token alone and in a batch, nothing unchecked."""

import logging
import sys

import pytest
import torch
from torch.autograd import forward_ad

from knnmoe_hf import native
from tests.builds import BUILDS, use_build_for

KINDS = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=BUILDS)
def kernels(request, monkeypatch):
    """Each build in turn."""
    use_build_for(request.param, monkeypatch)
    return native.kernels


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


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


def mix_next_tokens(kernels, outputs, voters, next_tokens, confidence, width, factor=1.0, cap=0.0, fitted=False):
    mixed, (distances, rows) = outputs.clone(), voters
    kernels.mix_next_tokens(
        native.address(mixed, mixed.dtype),
        *mixed.shape,
        native.kinds()[mixed.dtype],
        width,
        factor,
        cap,
        native.address(distances, torch.float32),
        native.address(rows, torch.int64),
        rows.shape[1],
        native.address(confidence, torch.float32) if isinstance(confidence, torch.Tensor) else 0,
        0.0 if isinstance(confidence, torch.Tensor) else confidence,
        native.address(next_tokens, torch.int32),
        len(next_tokens),
        UNIT,
        SCALE,
        WEIGHT,
        fitted,
        torch.get_num_threads(),
    )
    return mixed


UNIT, SCALE, WEIGHT, VOTERS, ROWS = 0.7, 2.0, 0.6, 9, 20


def voters_of(tokens: int, width: int) -> tuple:
    """Neighbours, the tokens that follow the rows (few, so that some agree), and confidences, some of them 0."""
    distances = 4 * random(tokens, VOTERS, seed=1).abs().sort(-1).values
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(ROWS, (tokens, VOTERS), generator=generator)
    next_tokens = torch.randint(min(width, 7), (ROWS,), generator=generator).int()
    confidence = random(tokens, seed=3).sigmoid()
    confidence[::5] = 0
    return (distances, rows), next_tokens, confidence


def mixed_distribution(logits, voters, next_tokens, confidence, fitted):
    """Logarithms of the probabilities by the formula, in float64."""
    distances, rows = (table.double() for table in voters)
    votes = torch.softmax(-distances / UNIT, dim=-1)
    recalled = torch.zeros_like(logits).scatter_add(1, next_tokens[rows.long()].long(), votes)
    weight = WEIGHT * confidence.double()
    if fitted:
        entropy = torch.special.entr(recalled).sum(-1)
        trusted = confidence.double() * torch.exp(-(entropy + distances[:, 0] / SCALE) / 2)
        weight = WEIGHT * trusted / (WEIGHT * trusted + (1 - WEIGHT) * (1 - trusted))
    weight = weight[:, None]
    return ((1 - weight) * logits.softmax(-1) + weight * recalled).log()


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("factor, cap", [(1.0, 0.0), (0.3, 0.0), (1.0, 15.0), (3.0, 40.0)])
@pytest.mark.parametrize("width, columns", [(1, 1), (1, 7), (31, 40), (32, 32), (33, 33), (1003, 1024)])
def test_next_tokens_are_mixed_by_the_formula(width, columns, factor, cap, dtype, fitted, kernels, four_threads):
    outputs, (voters, *known) = (3 * random(93, columns)).to(dtype), voters_of(93, width)
    mixed = mix_next_tokens(kernels, outputs, voters, *known, width, factor, cap, fitted)

    def logits(table):
        logits = table[:, :width].double() * factor
        return torch.tanh(logits / cap) * cap if cap else logits

    wanted = mixed_distribution(logits(outputs), voters, *known, fitted)
    exact = max(2 * torch.finfo(dtype).eps * wanted.abs().max().item(), 2e-5)
    torch.testing.assert_close(logits(mixed).log_softmax(-1), wanted, atol=exact, rtol=0)
    untouched = torch.ones(93, columns, dtype=torch.bool).scatter(1, known[0][voters[1]].long(), False)
    untouched[known[1] == 0] = True
    assert torch.equal(mixed[untouched], outputs[untouched])
    each = zip(outputs.split(1), *(table.split(1) for table in (*voters, known[1])))
    alone = [
        mix_next_tokens(kernels, output, (distances, rows), known[0], confidence.item(), width, factor, cap, fitted)
        for output, distances, rows, confidence in each
    ]
    assert torch.equal(torch.cat(alone), mixed)


@pytest.mark.parametrize("width", [8, 100])
def test_next_tokens_are_mixed_into_outputs_that_are_not_finite_as_in_pytorch(width, kernels):
    outputs, lowest = random(6, width), torch.finfo(torch.float32).min
    outputs[0, 2], outputs[1, 3] = float("nan"), float("inf")
    outputs[2], outputs[3, 1:], outputs[4, 1:], outputs[5] = -float("inf"), -float("inf"), lowest, 3e4
    (distances, rows), next_tokens, _ = voters_of(6, width)
    confidence = torch.full((6,), 0.5)
    mixed = mix_next_tokens(kernels, outputs, (distances, rows), next_tokens, confidence, width)
    ids = next_tokens[rows].long()
    votes = torch.softmax(-distances / UNIT, dim=-1)
    recalled = torch.zeros_like(outputs).scatter_add(1, ids, votes).gather(1, ids)
    log_odds = torch.logit(WEIGHT * confidence)[:, None]
    new = torch.logaddexp(outputs.gather(1, ids), log_odds + recalled.log() + outputs.logsumexp(-1, keepdim=True))
    torch.testing.assert_close(mixed, outputs.scatter(1, ids, new), rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_mixed_outputs_are_rounded_to_the_nearest_as_pytorch_rounds(dtype, kernels):
    """With a weight of nearly 1 what is written is `own` plus nearly nothing: numbers of every size come back."""
    sizes = torch.cat([torch.logspace(-9, 4.8, 4000), torch.tensor([0.0, 65504.0, 6.1e-5, 5.96e-8])])
    outputs = torch.stack([torch.cat([sizes, -sizes]), torch.zeros(2 * len(sizes))], dim=1).to(dtype)
    outputs[:, 1] = -float("inf")
    tokens = len(outputs)
    voters = torch.zeros(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int64)
    mixed = mix_next_tokens(kernels, outputs, voters, torch.zeros(1).int(), torch.full((tokens,), 0.5), 2)
    own, odds = outputs[:, 0].float(), WEIGHT * 0.5
    wanted = torch.logaddexp(own, own + torch.logit(torch.tensor(odds))).to(dtype)
    torch.testing.assert_close(mixed[:, 0], wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("width", [0, 6])
def test_more_logits_than_outputs_are_refused(width, kernels):
    with pytest.raises(ValueError, match="width must be from 1 to the number of outputs"):
        mix_next_tokens(kernels, random(2, 5), *voters_of(2, 5), width)


@pytest.mark.parametrize("row, token", [(-1, 0), (ROWS, 0), (0, -1), (0, 5)])
def test_rows_and_next_tokens_out_of_range_are_refused(row, token, kernels):
    voters, next_tokens, confidence = voters_of(2, 5)
    voters[1][1, 3], next_tokens[0] = row, token
    with pytest.raises(IndexError, match="is not one of the"):
        mix_next_tokens(kernels, random(2, 5), voters, next_tokens, confidence, 5)
