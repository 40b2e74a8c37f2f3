"""The sweep of the ways to vote mixes as the library does, and keeps within its bounds."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from benchmarks.sweeps import next_tokens
from benchmarks.sweeps.next_tokens import at_equal_harm, evaluate, observe, report
from benchmarks.sweeps.voting import RULES, Seen, Votes, linear, odds
from knnmoe_hf import attach_memory, detach_memory
from tests.support.models import random_memory, tiny_model
from tests.support.stats import with_stats


def seen(shift: float, count: int = 40) -> Seen:
    """A text whose neighbours know the target of some tokens."""
    generator = torch.Generator().manual_seed(int(100 * shift))
    target = torch.randint(5, (count,), generator=generator)
    tokens = torch.where(torch.rand(count, 4, generator=generator) < shift, target[:, None], target[:, None] + 7)
    distances = torch.rand(count, 4, generator=generator).sort().values
    own = torch.full((count,), 0.4).log()
    return Seen(target, own, own.exp(), -own, torch.full((count,), 0.9), distances, tokens, (distances, tokens))


def test_a_way_is_what_the_library_mixes():
    model = tiny_model("olmoe")
    memory = with_stats(random_memory(model, recall="both", confidence="calibrated", num_neighbors=4))
    windows = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))
    found = observe(model, memory, "both", windows)
    votes = Votes.of(found.distances, found.tokens, found.target, 8, 0.5)
    mixing, strength = RULES["constant weight"]
    weight = mixing(strength(found, votes), 0.3)
    expected = -((1 - weight) * found.own.exp() + weight * votes.target).log()
    options = {"next_token_weight": 0.3, "next_token_temperature": 0.5, "next_token_neighbors": 8}
    config = type(memory.config).from_dict(memory.config.saved() | options)
    attach_memory(model, replace(memory, config=config))
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].flatten(0, 1)
    detach_memory(model)
    torch.testing.assert_close(F.cross_entropy(logits, found.target, reduction="none"), expected, atol=1e-5, rtol=0)
    assert bool((weight > 0).any())


def test_equal_tokens_share_their_mass():
    distances, tokens = torch.zeros(1, 4), torch.tensor([[3, 5, 3, 9]])
    votes = Votes.of(distances, tokens, torch.tensor([3]), 4, 1.0)
    assert votes.masses.tolist() == [[0.5, 0.25, 0.5, 0.25]] and votes.target.item() == 0.5
    assert votes.entropy.item() == pytest.approx(1.5 * torch.tensor(2.0).log().item())


def test_strengths_are_weights_and_odds_keep_them_apart():
    text = {"in": seen(0.6)}
    votes = Votes.of(text["in"].distances, text["in"].tokens, text["in"].target, 4, 0.25)
    for name, (mixing, strength) in RULES.items():
        trust = strength(text["in"], votes)
        assert bool(((trust >= 0) & (trust <= 1)).all()), name
        assert bool((mixing(trust, 0.7) >= mixing(trust, 0.2)).all()), name
    assert torch.allclose(odds(torch.tensor([0.2, 0.9]), 0.5), torch.tensor([0.2, 0.9]))
    assert torch.allclose(linear(torch.tensor([0.2, 0.9]), 0.5), torch.tensor([0.1, 0.45]))


def test_the_gain_is_the_largest_within_the_bounds_of_harm():
    texts = {"in": seen(0.8), "off: a": seen(0.01), "off: b": seen(0.02)}
    base = {kind: text.own for kind, text in texts.items()}
    (found,) = evaluate(texts, base, ["constant weight"], 4, 0.25).values()
    assert found["in"] == 0 and found["m"] == 0  # every m harms, as the neighbours of other text know nothing
    far = {kind: replace(text, confidence=text.confidence * (kind == "in")) for kind, text in texts.items()}
    (open_to_one,) = evaluate(far, base, ["constant weight"], 4, 0.25).values()
    assert open_to_one["in"] < -0.1 and open_to_one["off"] == open_to_one["worst"] == 0
    recalled = {kind: Votes.of(t.distances, t.tokens, t.target, 4, 0.25).target for kind, t in far.items()}
    within = {kind: (far[kind], recalled[kind], partial(linear, far[kind].confidence)) for kind in far}
    assert at_equal_harm(within, base) == open_to_one


@pytest.mark.slow
def test_the_sweep_runs(tmp_path, monkeypatch):
    names = ("constant weight", "agreement and nearness")
    monkeypatch.setattr(next_tokens, "_NEIGHBORS", (16,))
    monkeypatch.setattr(next_tokens, "_TEMPERATURES", (0.5,))
    monkeypatch.setattr(next_tokens, "_KEY_DIMS", (24,))
    next_tokens.main(["--labs", "olmoe", "--windows", "2", "--references", "12", "--results", str(tmp_path)])
    (found,) = json.loads((tmp_path / "next_tokens.json").read_text()).values()
    assert set(names) <= set(RULES) <= set(found["next_tokens"])
    assert set(found["next_tokens"]) - set(found["both"]) == {"agreement and nearness, keys of 24 axes"}
    page = (tmp_path / "next_tokens.md").read_text()
    assert page == report({name: found for name in json.loads((tmp_path / "next_tokens.json").read_text())}) + "\n"
