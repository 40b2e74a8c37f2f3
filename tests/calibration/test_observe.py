"""What a memory sees and does on text, against forward passes of the model with and without the memory."""

import pytest
import torch
from torch.nn import functional as F

from knnmoe_hf.calibration.observe import Observation, observe
from knnmoe_hf.distributed import ALONE
from knnmoe_hf.models.attach import prepare, watch_lookups
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


def test_the_open_memory_is_compared_with_the_closed_one(olmoe, memory):
    found = observe(olmoe, prepare(olmoe, memory), TEXTS, 2, ALONE)
    assert list(found) == ["long", "other"]  # the other kinds have no target
    for kind, observation in found.items():
        base = [distributions(olmoe, one) for one in TEXTS[kind]]
        with attached(olmoe, memory):
            changed = [distributions(olmoe, one)[0] for one in TEXTS[kind]]
        closed, opened = torch.cat([one for one, _ in base]), torch.cat(changed)
        targets = torch.cat([target for _, target in base])
        before, after = (F.nll_loss(one, targets, reduction="none") for one in (closed, opened))
        torch.testing.assert_close(observation.rise, after - before, atol=1e-4, rtol=1e-3)
        assert observation.closed_nll == pytest.approx(before.mean().item(), abs=1e-5)
        divergence = F.kl_div(opened, closed, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(observation.divergence, divergence, atol=1e-4, rtol=1e-3)
        assert bool((divergence > 1e-3).all())


def test_means_warmup_and_shifts_are_those_of_the_sequence(olmoe, memory):
    (found,) = observe(olmoe, prepare(olmoe, memory), {"long": TEXTS["long"][:1]}, 1, ALONE).values()
    keep = 0.5 ** (1 / memory.config.half_life)
    torch.testing.assert_close(found.warmup, keep ** torch.arange(1.0, 12))
    seen = {}
    ids = torch.tensor([TEXTS["long"][0]["input_ids"]])
    with attached(olmoe, memory), watch_lookups(olmoe, lambda event: seen.update({event.layer: event.confidence})):
        olmoe(input_ids=ids)
    similar = seen[0][:-1]  # the first layer sees the same whether the memory is open or closed
    weights = keep ** (torch.arange(11.0)[:, None] - torch.arange(11.0)).clamp_min(0)
    weights = weights.tril()
    torch.testing.assert_close(found.means[0], (weights @ similar) / weights.sum(-1), atol=1e-5, rtol=1e-4)
    assert found.open_shifts[0] == 0.0 != found.open_shifts[1]


def test_the_model_and_its_memory_are_left_as_they_were(olmoe, memory):
    prepared = prepare(olmoe, memory)
    confidences = {layer: lookup.confidence for layer, lookup in prepared.items()}
    olmoe.train()
    observe(olmoe, prepared, TEXTS, 2, ALONE)
    assert olmoe.training and not hooks_of(olmoe)
    olmoe.eval()
    assert {layer: lookup.confidence for layer, lookup in prepared.items()} == confidences


@pytest.mark.parametrize(
    "rise, change",
    [([0.4, 0.2], 0.1), ([3.0, 1.0], 0.1), ([0.1, 0.3], 0.05), ([-0.5, 0.1], -0.25)],
)
def test_the_expected_change_is_the_smaller_of_two_estimates(rise, change):
    """The mean of opening * rise; and of opening * divergence, scaled to the mean rise but not beyond itself."""
    observation = Observation({}, torch.zeros(2), {}, 1.0, torch.tensor(rise), torch.tensor([0.2, 0.4]), torch.ones(2))
    assert observation.change(torch.tensor([1.0, 0.0])) == pytest.approx(change, abs=1e-6)
