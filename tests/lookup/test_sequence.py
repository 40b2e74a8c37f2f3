"""A running mean over a sequence: what it is, and how a runtime carries it from one call to the next."""

import pytest
import torch

from knnmoe_hf.lookup.sequence import Links, Tokens
from tests.support.caches import running_mean_by_hand


@pytest.mark.parametrize("length", [1, 2, 3, 8, 37])
@pytest.mark.parametrize("half_life", [0.5, 8.0, 1e4])
def test_a_running_mean_equals_a_loop_over_the_tokens(length, half_life):
    generator = torch.Generator().manual_seed(length)
    values = torch.randn(4, length, generator=generator)
    real = torch.rand(4, length, generator=generator) < 0.7
    restarts = torch.rand(4, length, generator=generator) < 0.1
    everything, nothing = torch.ones_like(real), torch.zeros_like(real)
    for given, begins in ((real, restarts), (real, nothing), (everything, restarts), (everything, nothing)):
        values[~given] = torch.nan  # values of padding do not count
        tokens = Tokens(
            4, length, None if given is everything else given.flatten(), Links(None if begins is nothing else begins)
        )
        found = tokens.running_mean(0, values.flatten(), half_life).view(4, length)
        assert found.dtype == torch.float32
        wanted = running_mean_by_hand(values, given, begins, half_life)
        torch.testing.assert_close(found[given].double(), wanted[given])
        values.nan_to_num_()


@pytest.mark.parametrize("half_life", [0.5, 8.0, 1e4])
def test_warmup_halves_with_each_half_life_of_real_tokens(half_life):
    generator = torch.Generator().manual_seed(3)
    real, restarts = (torch.rand(4, 37, generator=generator) < share for share in (0.7, 0.1))
    found = Tokens(4, 37, real.flatten(), Links(restarts)).warmup(half_life, like=torch.empty(0)).view(4, 37)
    for row in range(4):
        count = 0
        for t in range(37):
            count = (0 if restarts[row, t] else count) + int(real[row, t])
            if real[row, t]:
                assert found[row, t].item() == pytest.approx(0.5 ** (count / half_life), abs=1e-5)


def test_rounding_errors_stay_small_over_a_long_sequence():
    values = 1 + torch.rand(1, 4096, generator=torch.Generator().manual_seed(0))
    everything, nothing = torch.ones(1, 4096, dtype=torch.bool), torch.zeros(1, 4096, dtype=torch.bool)
    for half_life in (8.0, 500.0, 1e6):
        found = Tokens(1, 4096).running_mean(0, values.flatten(), half_life)
        wanted = running_mean_by_hand(values, everything, nothing, half_life)[0]
        assert ((found.double() - wanted) / wanted).abs().max() < 2e-6


def test_gradients_pass_and_half_precision_gives_float32():
    values = torch.randn(6, dtype=torch.bfloat16).requires_grad_()
    mean = Tokens(2, 3).running_mean(0, values, 1.0)
    assert mean.dtype == torch.float32
    mean[4].backward()
    torch.testing.assert_close(values.grad.float(), torch.tensor([0, 0, 0, 1 / 3, 2 / 3, 0]), atol=1e-2, rtol=0)


class LastSums:
    """The `SequenceState` that a runtime without a cache of transformers would keep after a call."""

    def __init__(self, tokens):
        self.sums = dict(zip(tokens.running_sums, tokens.stacked()[:, :, -1:]))

    def carried(self, key):
        return self.sums[key]


def test_any_runtime_can_carry_the_sums_from_one_call_to_the_next():
    values, real = torch.randn(2, 9), torch.rand(2, 9) < 0.6
    wanted = [Tokens(2, 9, real.flatten()).running_mean(layer, (values + layer).flatten(), 3.0) for layer in (0, 1)]
    state, parts = None, ([], [])
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        width = part.stop - part.start
        tokens = Tokens(2, width, real[:, part].flatten(), state=state)
        for layer in (0, 1):
            found = tokens.running_mean(layer, (values + layer)[:, part].flatten(), 3.0)
            parts[layer].append(found.view(2, width))
        state = LastSums(tokens)
    for layer in (0, 1):
        torch.testing.assert_close(torch.cat(parts[layer], 1)[real], wanted[layer].view(2, 9)[real])


def test_a_single_token_as_a_number_has_the_mean_that_it_has_as_a_tensor():
    state = [None, None]
    for value in (0.5, -2.0, 1.5):
        forms = [Tokens(1, 1, state=one) for one in state]
        number, tensor = (tokens.running_mean(0, x, 3.0) for tokens, x in zip(forms, (value, torch.tensor([value]))))
        assert isinstance(number, float) and number == pytest.approx(tensor.item(), rel=1e-6)
        warmup = [tokens.warmup(3.0, like=x) for tokens, x in zip(forms, (value, tensor))]
        assert isinstance(warmup[0], float) and warmup[0] == pytest.approx(warmup[1].item(), rel=1e-6)
        torch.testing.assert_close(forms[0].stacked(), forms[1].stacked())
        state = [LastSums(tokens) for tokens in forms]


def test_only_one_real_token_counts_as_one():
    assert Tokens(1, 1).is_one and Tokens(1, 1, torch.tensor([True])).is_one
    assert not any(tokens.is_one for tokens in (Tokens(1, 1, torch.tensor([False])), Tokens(2, 1), Tokens(1, 2)))


@pytest.mark.parametrize("length", [1, 2, 5, 70])
def test_a_token_may_go_on_from_any_other_to_its_left_and_gradients_pass(length):
    generator = torch.Generator().manual_seed(length)
    before = torch.stack([(torch.rand(3, generator=generator) * (t + 1)).long() for t in range(length)], dim=1)
    values = torch.randn(3, length, generator=generator).requires_grad_()
    found = Tokens(3, length, links=Links(before=before)).running_mean(0, values.flatten(), 2.0).view(3, length)
    decay = 0.5 ** (1 / 2.0)
    for row in range(3):
        sums = []
        for t, place in enumerate(before[row].tolist()):
            total, weight = sums[place] if place < t else (0.0, 0.0)
            sums.append((total * decay + values[row, t].item(), weight * decay + 1))
            assert found[row, t].item() == pytest.approx(sums[-1][0] / sums[-1][1], abs=1e-5)
    found[0, -1].backward()
    path, place = {length - 1}, length - 1
    while before[0, place] < place:
        place = int(before[0, place])
        path.add(place)
    assert set(values.grad[0].nonzero().flatten().tolist()) == path and not values.grad[1:].any()
