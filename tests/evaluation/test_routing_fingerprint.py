"""A fingerprint of routing tells models apart that have the same gates."""

import copy
import dataclasses
import math

import pytest
import torch

from knnmoe_hf.evaluation.routing_fingerprint import RoutingFingerprint, check_routing
from knnmoe_hf.models.gates import find_gates
from tests.support.models import FAMILIES, tiny_model
from tests.support.training import build, examples

ROWS = examples(count=4, length=12)


def other_attention(model):
    """The same gates, and other hidden states to route."""
    changed = copy.deepcopy(model)
    for name, parameter in changed.named_parameters():
        if "self_attn" in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    return changed


def test_scores_and_preferences_equal_those_by_hand():
    gates = [dataclasses.replace(find_gates(tiny_model("olmoe"))[0], layer=0, top_k=1, num_experts=4)]
    texts = [{0: torch.tensor([[4.0, 0, 0, 0], [2.0, 0, 6, 0]])}, {0: torch.tensor([[0.0, 0, 4, 0], [0, 4, 0, 0]])}]
    found = RoutingFingerprint.of_logits(gates, texts)
    assert found.scores[0].tolist() == [6 - 5, 4 - 5, 10 - 5, 0 - 5]
    assert found.preferences[0].tolist() == [[0.25, 0], [0, 0.25], [0.25, 0.25], [0, 0]]
    assert found.similarity(found) == pytest.approx(1.0)
    swapped = RoutingFingerprint({0: -found.scores[0]}, {0: found.preferences[0].flip(1)})
    # half of the choices lie where the other has them, so the divergence is half a bit, and the scores are opposite
    assert found.similarity(swapped) == pytest.approx((0 + 0.5) / 2)
    nothing = RoutingFingerprint({0: -found.scores[0]}, {0: torch.tensor([[0, 0], [0, 0], [0, 0], [0.5, 0.5]])})
    assert found.similarity(nothing) == pytest.approx(0.0, abs=1e-6)
    assert math.isclose(found.similarity(nothing), nothing.similarity(found), abs_tol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_fits_its_model_and_not_one_with_other_attention(family, tmp_path):
    model = tiny_model(family)
    memory = build(model, tmp_path, ROWS)
    check = check_routing(memory, model)
    assert check.similarity > 0.99 and check.fits and check.examples == 4
    assert check.sentence().startswith("The memory fits: the model routes 4 of its references as they were routed")
    other = check_routing(memory, other_attention(model), examples=3)
    assert not other.fits and other.examples == 3
    assert "may not fit" in other.sentence() and other.sentence().endswith("so build it anew for this model.")


def test_fingerprints_of_other_rows_and_memories_without_text_are_refused(tmp_path):
    model = tiny_model("olmoe")
    found = RoutingFingerprint.of(model, ROWS)
    assert found.similarity(RoutingFingerprint.of(model, ROWS)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="of other layers, experts or texts"):
        found.similarity(RoutingFingerprint.of(model, ROWS[:3]))
    memory = build(model, tmp_path, ROWS)
    silent = dataclasses.replace(memory, provenance=memory.provenance.without_text())
    with pytest.raises(ValueError, match="does not keep its references' text"):
        check_routing(silent, model)
