"""Next tokens that native code mixes into outputs: by the formula, as PyTorch does, and nothing unchecked."""

import pytest
import torch

from knnmoe_hf import native
from tests.native.helpers import KINDS, random

UNIT, SCALE, WEIGHT, VOTERS, ROWS = 0.7, 2.0, 0.6, 9, 20


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
@pytest.mark.parametrize("factor", [2.0**-17, 2.0**-10, 1.0, 2.0**12, 2.0**20])
def test_mixed_outputs_are_rounded_as_pytorch_rounds(factor, dtype, kernels):
    """Of a vocabulary of one token, an output x becomes `x - log(1 - w) / factor`: numbers of every size."""
    tokens = 20_000
    own = torch.tensor([0.0, -1.0, -300.0])[torch.arange(tokens) % 3, None]
    voters = torch.zeros(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int64)
    known = torch.zeros(1).int(), torch.linspace(1e-6, 1, tokens)
    exact, rounded = (
        mix_next_tokens(kernels, own.to(kind), voters, *known, 1, factor) for kind in (torch.float32, dtype)
    )
    wanted = own.double() - torch.log1p(-WEIGHT * known[1].double())[:, None] / factor
    torch.testing.assert_close(exact.double() * factor, wanted * factor, rtol=1e-6, atol=1e-6 + 1e-6 * factor)
    assert torch.equal(rounded, exact.to(dtype))


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
