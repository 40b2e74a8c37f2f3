"""Recalled next tokens: the mixed distribution is that of the formula, and little memory is needed for it."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from knnmoe_hf import native
from knnmoe_hf.lookup import parts
from knnmoe_hf.lookup.logits import LogitsTransform, mix_next_tokens
from knnmoe_hf.lookup.next_tokens import RecalledTokens, Voting
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.search import Neighbors
from tests.builds import BUILDS, use_build_for

T, V, K, N = 12, 40, 6, 50
SCALE = 2.0
TRANSFORMS = {
    "as they are": LogitsTransform(V),
    "scaled": LogitsTransform(V, factor=0.25),
    "capped": LogitsTransform(V, cap=15.0),
    "scaled and capped": LogitsTransform(V, factor=3.0, cap=20.0),
    "of fewer tokens": LogitsTransform(V - 5, factor=0.5, left_out=5),
}


def tables(tokens=T, vocabulary=V, width=V):
    """Output of output embeddings (T, V), and recalled tokens, of which one in three has no weight."""
    generator = torch.Generator().manual_seed(0)
    output = 3 * torch.randn(tokens, vocabulary, generator=generator)
    distances = 4 * torch.rand(tokens, K, generator=generator).sort(-1).values
    neighbors = Neighbors(distances, torch.randint(N, (tokens, K), generator=generator))
    confidence = torch.rand(tokens, generator=generator)
    confidence[::3] = 0
    ids = torch.randint(min(width, 9), (N,), generator=generator).int()  # few, so that neighbours agree
    return output, RecalledTokens(Voting(ids, 0.6, 0.7, K), neighbors, confidence, SCALE)


def probabilities(output, recalled, transform):
    """`(1 - m c) p_model + m c p_recalled`, over the whole vocabulary."""
    logits = transform(output.float()[:, : transform.width])
    votes = torch.softmax(-recalled.voters.distances / (0.7 * SCALE), dim=-1)
    ids = recalled.voting.next_tokens[recalled.voters.rows].long()
    chances = torch.zeros_like(logits).scatter_add(1, ids, votes)
    weight = 0.6 * recalled.confidence[:, None]
    return (1 - weight) * logits.softmax(-1) + weight * chances


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_logits_are_those_of_the_mixed_distribution(name):
    transform = TRANSFORMS[name]
    output, recalled = tables(width=transform.width)
    mixed = mix_next_tokens(output.clone(), recalled, transform)
    wanted = probabilities(output, recalled, transform).log()
    found = transform(mixed[:, : transform.width]).log_softmax(-1)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    changed = mixed != output
    assert torch.equal(changed.any(-1), recalled.confidence > 0)
    ids = recalled.voting.next_tokens[recalled.voters.rows].long()
    assert not changed.scatter(1, ids, False).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_half_precision_loses_no_more_than_the_rounding_of_the_logits(name, dtype):
    transform = TRANSFORMS[name]
    output, recalled = tables(width=transform.width)
    output = output.to(dtype)
    wanted = probabilities(output, recalled, transform).log()
    mixed = mix_next_tokens(output.clone(), recalled, transform)
    assert mixed.dtype == dtype and torch.equal(mixed[::3], output[::3])
    found = transform(mixed.float()[:, : transform.width]).log_softmax(-1)
    largest = wanted.abs().max() + transform(output.float()).abs().max()
    assert (found - wanted).abs().max() < 2 * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_native_code_mixes_as_pytorch_does(name, dtype, build, monkeypatch):
    use_build_for(build, monkeypatch)
    output, recalled = tables(width=TRANSFORMS[name].width)
    output = output.to(dtype)
    found = mix_next_tokens(output.clone(), recalled, TRANSFORMS[name])
    turned = mix_next_tokens(output.T.contiguous().T, recalled, TRANSFORMS[name])  # which native code does not read
    monkeypatch.setattr(native, "kernels", None)
    wanted = mix_next_tokens(output.clone(), recalled, TRANSFORMS[name])
    exact = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for one in (found, turned):
        torch.testing.assert_close(one, wanted, rtol=exact, atol=1e-5)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_outputs_and_distances_that_are_not_finite_are_mixed_as_in_pytorch(name, dtype, build, monkeypatch):
    use_build_for(build, monkeypatch)
    output, recalled = tables(width=TRANSFORMS[name].width)
    nan, inf = float("nan"), float("inf")
    recalled = recalled._replace(confidence=torch.full((T,), 0.5).index_fill(0, torch.tensor([11]), nan))
    output[0], output[1, 2], output[2], output[3, 1], output[4] = nan, nan, -inf, inf, inf
    output[5], output[6], output[6, 9], output[6, 8] = -inf, -inf, nan, 1.0
    output[7], output[7, 30] = -inf, nan
    output[8, 1], output[8, 30] = inf, nan
    recalled.voters.distances[9, 3], recalled.voters.distances[10] = nan, inf
    output = output.to(dtype)
    found = mix_next_tokens(output.clone(), recalled, TRANSFORMS[name])
    assert found[0].isnan().all() and torch.equal(found[9:], output[9:])
    monkeypatch.setattr(native, "kernels", None)
    wanted = mix_next_tokens(output.clone(), recalled, TRANSFORMS[name])
    exact = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, rtol=exact, atol=1e-5, equal_nan=True)


def test_a_token_alone_is_mixed_as_it_is_among_others():
    output, recalled = tables()
    together = mix_next_tokens(output.clone(), recalled, TRANSFORMS["as they are"])
    for place in range(T):
        alone = recalled.at(torch.tensor([place]))._replace(confidence=float(recalled.confidence[place]))
        one = mix_next_tokens(output[place : place + 1].clone(), alone, TRANSFORMS["as they are"])
        assert torch.equal(one[0], together[place])
    places = torch.tensor([7, 7, 1])
    assert torch.equal(
        mix_next_tokens(output[places], recalled.at(places), TRANSFORMS["as they are"]), together[places]
    )


@pytest.mark.parametrize("in_graph", [False, True])
def test_logits_stay_finite_with_a_weight_that_float32_rounds_to_1(in_graph):
    output, recalled = tables()
    options = RetrievalOptions(recall="next_tokens", next_token_weight=1 - 1e-12, next_token_neighbors=K)
    recalled = recalled._replace(voting=Voting.of(recalled.voting.next_tokens, options), confidence=torch.ones(T))
    mixed = mix_next_tokens(output.requires_grad_(in_graph) * 1, recalled, TRANSFORMS["as they are"])
    assert mixed.isfinite().all()


def test_tokens_that_the_model_rules_out_stay_ruled_out_unless_they_are_recalled():
    output, recalled = tables()
    output[:, 20:] = float("-inf")  # padding of the vocabulary
    output[:, 3] = float("-inf")
    mixed = mix_next_tokens(output.clone(), recalled, TRANSFORMS["as they are"])
    assert (mixed[:, 20:] == float("-inf")).all()
    wanted = probabilities(output, recalled, TRANSFORMS["as they are"])
    torch.testing.assert_close(mixed.softmax(-1), wanted)
    assert (wanted[:, 3] > 0).any()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_are_those_of_the_formula(name):
    transform = TRANSFORMS[name]
    output, recalled = tables(width=transform.width)
    targets = torch.arange(T) % 9
    leaf = output.clone().requires_grad_()
    mixed = mix_next_tokens(leaf * 1, recalled, transform)
    loss = F.cross_entropy(transform(mixed[:, : transform.width]), targets)
    plain = output.clone().requires_grad_()
    wanted = F.nll_loss(probabilities(plain, recalled, transform).log(), targets)
    torch.testing.assert_close(loss, wanted)
    for found, right in zip(torch.autograd.grad(loss, leaf), torch.autograd.grad(wanted, plain)):
        torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-4)


def test_gradients_are_finite_where_logits_and_weights_are_not():
    output, recalled = tables()
    output[:, 3:5], recalled.voters.distances[:, 1:] = float("-inf"), float("inf")
    leaf = output.requires_grad_()
    mixed = mix_next_tokens(leaf * 1, recalled, TRANSFORMS["as they are"])
    (gradient,) = torch.autograd.grad(mixed.softmax(-1)[:, 0].sum(), leaf)
    assert gradient.isfinite().all() and gradient.any()


def test_a_graph_of_gradients_keeps_the_model_s_output_and_nothing_else_does():
    output, recalled = tables()
    needed = output.clone().requires_grad_() * 1
    assert mix_next_tokens(needed, recalled, TRANSFORMS["as they are"]).data_ptr() != needed.data_ptr()
    with torch.no_grad():
        free = output.clone()
        assert mix_next_tokens(free, recalled, TRANSFORMS["as they are"]).data_ptr() == free.data_ptr()


def test_a_share_above_what_a_soft_cap_allows_becomes_the_largest_below_it():
    transform = TRANSFORMS["capped"]
    output, recalled = tables()
    output += 40  # the model's own logits are all at the cap
    leaf = output.requires_grad_()
    mixed = mix_next_tokens(leaf * 1, recalled, transform)
    assert mixed.isfinite().all() and (transform(mixed) <= 15).all()
    (gradient,) = torch.autograd.grad(transform(mixed).log_softmax(-1)[:, 0].sum(), leaf)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_and_its_inverse_cancel(name):
    transform = TRANSFORMS[name]
    numbers = torch.linspace(-12, 12, 50)
    torch.testing.assert_close(transform.inverse(transform(numbers)), numbers, atol=1e-3, rtol=1e-3)


class Largest(TorchDispatchMode):
    """Notes the most values that an operator returned in memory of its own."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in given:
                own = one.untyped_storage().nbytes() // one.element_size()
                self.values = max(self.values, own)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_torch", [False, True])
def test_no_copy_of_the_table_is_made(in_torch, dtype, monkeypatch):
    if in_torch:
        monkeypatch.setattr(native, "kernels", None)
    output, recalled = tables(tokens=600, vocabulary=5000)
    output = output.to(dtype)
    with Largest() as seen:
        mix_next_tokens(output, recalled, LogitsTransform(5000))
    assert seen.values <= parts._AT_ONCE["cpu"] < output.numel() / 10
    assert (seen.values >= 600 * K) == in_torch


def test_what_is_computed_in_parts_is_what_is_computed_at_once(monkeypatch):
    output, recalled = tables()
    leaf = output.requires_grad_()

    def mixed():
        result = mix_next_tokens(leaf * 1, recalled, TRANSFORMS["as they are"])
        return result, *torch.autograd.grad(result.softmax(-1)[:, :5].sum(), leaf)

    whole = mixed()
    monkeypatch.setattr(parts, "_AT_ONCE", {"cpu": 3 * V})
    for one, other in zip(mixed(), whole):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gradients", [False, True])
def test_nothing_is_read_back_from_a_device(gradients):
    output, recalled = tables()
    far = output.to("meta").requires_grad_(gradients) * 1  # a value of such a tensor cannot be read
    assert mix_next_tokens(far, recalled, TRANSFORMS["capped"]).device.type == "meta"  # the layer is elsewhere
    voting = replace(recalled.voting, next_tokens=recalled.voting.next_tokens.to("meta"))
    neighbors = Neighbors(*(table.to("meta") for table in recalled.voters))
    recalled = RecalledTokens(voting, neighbors, recalled.confidence.to("meta"), SCALE).at(torch.arange(T))
    assert mix_next_tokens(far, recalled, TRANSFORMS["capped"]).shape == (T, V)
