"""A running mean over a sequence: what it is, and how a runtime carries it from one forward to the next."""

import pytest
import torch

from knnmoe_hf import native
from knnmoe_hf.lookup.sequence import Tokens
from tests.support.caches import running_mean_by_hand


@pytest.fixture(params=["native", "torch"])
def each_implementation(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", None)


@pytest.mark.usefixtures("each_implementation")
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
            4, length, None if given is everything else given.flatten(), None if begins is nothing else begins
        )
        found = tokens.running_mean(0, values.flatten(), half_life).view(4, length)
        assert found.dtype == torch.float32
        wanted = running_mean_by_hand(values, given, begins, half_life)
        torch.testing.assert_close(found[given].double(), wanted[given])
        values.nan_to_num_()


@pytest.mark.usefixtures("each_implementation")
@pytest.mark.parametrize("half_life", [0.5, 8.0, 1e4])
def test_warmup_halves_with_each_half_life_of_real_tokens(half_life):
    generator = torch.Generator().manual_seed(3)
    real, restarts = (torch.rand(4, 37, generator=generator) < share for share in (0.7, 0.1))
    found = Tokens(4, 37, real.flatten(), restarts).warmup(half_life, torch.device("cpu")).view(4, 37)
    for row in range(4):
        count = 0
        for t in range(37):
            count = (0 if restarts[row, t] else count) + int(real[row, t])
            if real[row, t]:
                assert found[row, t].item() == pytest.approx(0.5 ** (count / half_life), abs=1e-5)


@pytest.mark.usefixtures("each_implementation")
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
    """The `SequenceState` that a runtime without a cache of transformers would keep after a forward."""

    def __init__(self, tokens):
        self.sums = {key: sums[:, -1:] for key, sums in tokens.noted.items()}

    def carried(self, key):
        return self.sums[key]


def test_any_runtime_can_carry_the_sums_from_one_forward_to_the_next():
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
