"""What a memory sees and does on text, against forward passes of the model with and without the memory."""

import pytest
import torch
from torch.nn import functional as F

from knnmoe_hf.calibration.observe import Observation, observe
from knnmoe_hf.distributed import ALONE
from knnmoe_hf.lookup.confidence import Rbf
from knnmoe_hf.models.attach import prepare, watch_lookups
from knnmoe_hf.models.calls import Overrides
from knnmoe_hf.models.hooks import hooked, using_overrides
from tests.support.attaching import attached, hooks_of
from tests.support.domain import row
from tests.support.models import random_memory, tiny_model

TEXTS = {
    "long": [row(list(range(10, 22)), 0), row(list(range(50, 57)), 1) | {"labels": [-100] * 3 + [53, 54, -100, 56]}],
    "other": [row([5, 6, 7], 0)],
    "no target": [row([5], 0)],
    "empty": [],
}


@pytest.fixture(scope="module")
def olmoe():
    return tiny_model("olmoe")


@pytest.fixture(scope="module")
def memory(olmoe):
    return random_memory(olmoe)  # its confidence is the similarity itself, by which `observe` opens a memory


def distributions(model, one: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a row's targets: log-probabilities (n, V) of the next token, and the targets (n,)."""
    labels = torch.tensor(one["labels"][1:])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([one["input_ids"]])).logits[0, :-1]
    return logits[labels != -100].log_softmax(-1), labels[labels != -100]


class Half(Rbf):
    """The confidence of a memory that is half open."""

    def __call__(self, similar, tokens):
        return 0.5 * similar


def nll(model, one: dict, overrides: Overrides) -> torch.Tensor:
    """NLL (n,) of a row's targets."""
    with hooked(model), using_overrides(model, overrides):
        found, targets = distributions(model, one)
    return F.nll_loss(found, targets, reduction="none")


def test_the_memory_is_observed_closed_half_open_and_open(olmoe, memory):
    prepared = prepare(olmoe, memory)
    half = prepared.with_confidences({i: Half(one.rows.scale, memory.config.gamma) for i, one in prepared.items()})
    found = observe(olmoe, prepared, TEXTS, 2, ALONE)
    assert list(found) == ["long", "other"]  # the other kinds have no target
    for kind, observation in found.items():
        closed, halfway, opened = (
            torch.cat([nll(olmoe, one, overrides) for one in TEXTS[kind]])
            for overrides in (Overrides({}), half, prepared)
        )
        torch.testing.assert_close(observation.nll, closed, atol=1e-4, rtol=1e-3)
        assert observation.closed_nll == pytest.approx(closed.mean().item(), abs=1e-5)
        torch.testing.assert_close(observation.rise, opened - closed, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(observation.half_rise, halfway - closed, atol=1e-4, rtol=1e-3)
        assert bool(((opened - halfway).abs() > 1e-4).all() and ((halfway - closed).abs() > 1e-4).all())


def test_means_warmup_and_shifts_are_those_of_the_sequence(olmoe, memory):
    (found,) = observe(olmoe, prepare(olmoe, memory), {"long": TEXTS["long"][:1]}, 1, ALONE).values()
    keep = 0.5 ** (1 / memory.config.half_life)
    torch.testing.assert_close(found.warmup, keep ** torch.arange(1.0, 12))
    seen = {}
    ids = torch.tensor([TEXTS["long"][0]["input_ids"]])
    with attached(olmoe, memory), watch_lookups(olmoe, lambda event: seen.update({event.layer: event.confidence})):
        olmoe(input_ids=ids)
    weights = keep ** (torch.arange(11.0)[:, None] - torch.arange(11.0)).clamp_min(0)
    weights = weights.tril()
    for layer, similar in seen.items():
        wanted = (weights @ similar[:-1]) / weights.sum(-1)
        torch.testing.assert_close(found.open_means[layer], wanted, atol=1e-5, rtol=1e-4)
    # the first layer sees the same whether the memory is open or closed
    torch.testing.assert_close(found.means[0], found.open_means[0], atol=1e-5, rtol=1e-4)
    assert (found.means[1] - found.open_means[1]).abs().max() > 1e-3
    assert found.open_shifts[0] == 0.0 != found.open_shifts[1]


def test_the_model_and_its_memory_are_left_as_they_were(olmoe, memory):
    prepared = prepare(olmoe, memory)
    confidences = {layer: lookup.confidence for layer, lookup in prepared.items()}
    olmoe.train()
    observe(olmoe, prepared, TEXTS, 2, ALONE)
    assert olmoe.training and not hooks_of(olmoe)
    olmoe.eval()
    assert {layer: lookup.confidence for layer, lookup in prepared.items()} == confidences


@pytest.mark.parametrize("opening", [0.0, 0.25, 0.5, 1.0])
def test_the_expected_change_is_a_parabola_through_closed_half_open_and_open(opening):
    """a f + b f^2 with a / 2 + b / 4 = 0.1 and a + b = 0.8, so a = -0.4 and b = 1.2; and twice that."""
    rise, half_rise = torch.tensor([0.8, 1.6]), torch.tensor([0.1, 0.2])
    observation = Observation({}, {}, torch.zeros(2), {}, 1.0, rise, half_rise, torch.ones(2))
    wanted = opening * -0.4 + opening**2 * 1.2
    assert observation.changes(opening).tolist() == pytest.approx([wanted, 2 * wanted], abs=1e-6)
    assert observation.change(torch.tensor([opening, 0.0])) == pytest.approx(wanted / 2, abs=1e-6)
