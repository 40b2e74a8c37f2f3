"""The mixing weight of recalled next tokens, where a calibration has fitted it."""

import math
from dataclasses import replace

import pytest
import torch

from knnmoe_hf.lookup.confidence import CalibrationStats, InContext
from knnmoe_hf.lookup.next_tokens import Voting, fitted_weight, summed_by_token, trust
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.lookup.sequence import Tokens


def test_votes_are_trusted_as_far_as_they_agree_and_lie_near():
    """Entropies: ln 2 of two tokens with half the votes each, 0 of one; distances 0 and 3 of the nearest."""
    votes = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
    ids = torch.tensor([[7, 7, 8], [7, 7, 8], [9, 9, 9]])
    found = trust(votes, summed_by_token(ids, votes), torch.tensor([0.0, 3.0, 0.0]))
    assert found.tolist() == pytest.approx([0.5**0.5, 0.5**0.5 * math.exp(-1.5), 1.0])


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.5, 0.9])
def test_a_fitted_weight_adds_its_log_odds(weight):
    trusted = torch.tensor([0.0, 0.1, 0.7, 1.0])
    found = fitted_weight(weight, trusted)
    assert found[0] == 0 and bool((found < 1).all())
    if weight == 0:
        assert not found[:3].any()
    else:
        torch.testing.assert_close(found[1:3].logit(), trusted[1:3].logit() + math.log(weight / (1 - weight)))


def test_only_a_fitted_weight_depends_on_the_neighbours():
    fit = RecallFit(0.5, 0.2, 0.4, 0.3, 64, 1.0, {})
    ids, options = torch.arange(4, dtype=torch.int32), RetrievalOptions(recall="both")
    confidence, trusted = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.2])
    fitted, constant = (
        Voting.of(ids, options, fit),
        Voting.of(ids, replace(options, next_token_weight=0.4), fit),
    )
    assert (fitted.weight, fitted.temperature, fitted.fit) == (0.4, 0.3, fit) and constant.temperature == 0.3
    assert constant.mixing_weight(confidence, trusted).tolist() == pytest.approx([0.2, 0.2])
    torch.testing.assert_close(fitted.mixing_weight(confidence, trusted), fitted_weight(0.4, torch.tensor([0.5, 0.1])))


@pytest.mark.parametrize("one", [True, False], ids=["a single token", "several"])
def test_votes_open_by_themselves_as_a_layer_with_that_threshold_would(one):
    """The second layer, whose evidence includes that of the first."""
    stats = CalibrationStats(0.6, 0.2, 1.5, 0.9, 0.1, 1.0, 1.0, 4.0, 4.0)
    layers = InContext(0, stats, None), InContext(1, stats, 0)
    other = InContext(1, replace(stats, threshold=0.4, width=0.3), 0)
    similar = 0.45 if one else torch.tensor([0.45, 0.3, 0.6])
    tokens, again = (Tokens(1, 1 if one else 3) for _ in range(2))
    for each in (tokens, again):
        layers[0](similar, each)
    layers[1](similar, tokens)
    found = layers[1].reopened(similar, tokens, 0.4, 0.3)
    assert torch.as_tensor(found).tolist() == pytest.approx(torch.as_tensor(other(similar, again)).tolist())
