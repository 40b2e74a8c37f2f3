"""What a memory does on text is what a trace of the same text says."""

import pytest
import torch

from knnmoe_hf import attach_memory, trace_routing
from knnmoe_hf.evaluation.routing_measures import over_experts
from knnmoe_hf.explain.report.use import measure_use, recorded_use
from tests.memory.helpers import full_memory
from tests.support.domain import row
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def model():
    model = tiny_model("olmoe")
    attach_memory(model, full_memory(model))
    return model


def rows(lengths: list[int]) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(96, (length,), generator=generator).tolist() for length in lengths]
    return [row(one, example) for example, one in enumerate(ids)]


def test_it_is_what_a_trace_of_the_same_text_says(model):
    texts = rows([7, 12, 5])
    found = recorded_use(model, texts, batch_size=2)  # with padding
    with torch.no_grad(), trace_routing(model, log_probs=False) as trace:
        for one in texts:
            model(input_ids=torch.tensor([one["input_ids"]]))
    for layer, use in found.items():
        traced, experts = trace.layers[layer], model.config.num_experts
        assert len(use.confidence) == 24
        torch.testing.assert_close(use.confidence.sort().values, traced.confidence.sort().values)
        assert use.divergence == pytest.approx(traced.divergence.mean().item(), rel=1e-4)
        for mean, ids, weights in (
            (use.own, traced.own_experts, traced.own_weights),
            (use.mixed, traced.mixed_experts, traced.mixed_weights),
        ):
            torch.testing.assert_close(mean, over_experts(ids, weights, experts).mean(dim=0), rtol=1e-4, atol=1e-6)
        recalled = torch.zeros(40, dtype=torch.float64)
        share = (traced.weights * traced.confidence[:, None]).double()
        recalled.index_add_(0, traced.rows.flatten().long(), share.flatten())
        torch.testing.assert_close(use.recalled, recalled, rtol=1e-4, atol=1e-6)
        assert use.recalled.sum().item() == pytest.approx(use.confidence.sum().item(), rel=1e-4)
        scale = trace.memory.layers[layer].scale
        means = [one.mean(dim=1).sort().values for one in (use.distances, traced.distances / scale)]
        torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)


def test_measuring_compares_and_observes_and_changes_nothing(model):
    ids = torch.tensor([rows([9])[0]["input_ids"]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    domain, other = measure_use(model, [("a", True, rows([8, 8])), ("b", False, rows([10]))], batch_size=2)
    assert (domain.name, domain.is_domain, other.is_domain) == ("a", True, False)
    for text in (domain, other):
        means = {layer: use.confidence.mean().item() for layer, use in text.layers.items()}
        assert means == pytest.approx(text.comparison.confidence, rel=1e-5)
        assert text.observation.closed_nll == pytest.approx(text.comparison.base.mean_nll, rel=1e-5)
    assert len(other.observation.rise) == 9
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
