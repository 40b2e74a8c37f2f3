"""Derivatives by `torch.func` and in forward mode are those of backward, however it is searched and compiled."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jvp, vjp, vmap
from transformers import DynamicCache

from knnmoe_hf import attach_memory, disable_memory, native
from knnmoe_hf.lookup.sequence import Recurrence
from tests.conftest import random_memory, tiny_model

GATE = "model.layers.0.mlp.gate.weight"
TOKENS = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(2))


class Loss:
    """Of a model with a memory, as a function of its first gate; a step of decoding goes on after eight tokens."""

    def __init__(self, backend: str, confidence: str, space: str = "logits", step: bool = False):
        self.model = tiny_model("olmoe", attn_implementation="eager").requires_grad_(False)
        self.model.set_experts_implementation("batched_mm")  # the only one that forward mode goes through
        attach_memory(
            self.model, random_memory(self.model, search_backend=backend, confidence=confidence, value_space=space)
        )
        self.gate, self.step = self.model.get_parameter(GATE).detach(), step
        self.direction = torch.randn(self.gate.shape, generator=torch.Generator().manual_seed(1))

    def __call__(self, gate: torch.Tensor) -> torch.Tensor:
        call = dict(input_ids=TOKENS)
        if self.step:
            cache = DynamicCache(config=self.model.config)
            self.model(input_ids=TOKENS[:1, :5], past_key_values=cache)
            for token in TOKENS[:1, 5:8].split(1, dim=1):
                self.model(input_ids=token, past_key_values=cache)
            call = dict(input_ids=TOKENS[:1, 8:], past_key_values=cache)
        return functional_call(self.model, {GATE: gate}, (), call).logits.square().mean()

    def gradient(self) -> torch.Tensor:
        gate = self.gate.clone().requires_grad_()
        return torch.autograd.grad(self(gate), gate)[0]


class LossOnOuterCache(Loss):
    """The cache is filled before any transform begins."""

    def __init__(self, *asked):
        super().__init__(*asked)
        self.caches = []
        for _ in range(3):
            cache = DynamicCache(config=self.model.config)
            for tokens in TOKENS[:, :7].split([5, 1, 1], dim=1):
                self.model(input_ids=tokens, past_key_values=cache)
            self.caches.append(cache)

    def __call__(self, gate: torch.Tensor) -> torch.Tensor:
        call = dict(input_ids=TOKENS[:, 7:8], past_key_values=self.caches.pop())
        return functional_call(self.model, {GATE: gate}, (), call).logits.square().mean()


def assert_derivatives_agree(loss: Loss) -> None:
    wanted = loss.gradient()
    assert wanted.abs().max() > 0
    along = (wanted * loss.direction).sum()
    found = grad(loss)(loss.gate)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(jvp(loss, (loss.gate,), (loss.direction,))[1], along, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [False, True], ids=["batch", "step"])
@pytest.mark.parametrize("space", ["logits", "delta", "assignment"])
@pytest.mark.parametrize("confidence", ["rbf", "context"])
@pytest.mark.parametrize("backend", ["torch", "ivf", "hnsw"])
def test_derivatives_by_transforms_are_those_of_backward(backend, confidence, space, step):
    assert_derivatives_agree(Loss(backend, confidence, space, step))


@pytest.mark.parametrize("confidence", ["rbf", "context"])
def test_a_cache_from_outside_may_be_gone_on_with(confidence):
    assert_derivatives_agree(LossOnOuterCache("ivf", confidence))


def test_transforms_nest():
    loss = Loss("ivf", "context")
    wanted = (loss.gradient() * loss.direction).sum()
    along = jacfwd(lambda size: loss(loss.gate + size * loss.direction))(torch.zeros(()))
    torch.testing.assert_close(along, wanted, rtol=1e-4, atol=1e-6)
    _, back = vjp(grad(loss), loss.gate)
    _, forward = jvp(grad(loss), (loss.gate,), (loss.direction,))
    torch.testing.assert_close(back(loss.direction)[0], forward, rtol=1e-3, atol=1e-5)  # a Hessian is symmetric


@pytest.mark.parametrize("step", [False, True], ids=["batch", "step"])
@pytest.mark.parametrize("confidence", ["rbf", "context"])
@pytest.mark.parametrize("backend", ["torch", "ivf", "hnsw"])
def test_tangents_of_forward_mode_are_kept(backend, confidence, step):
    loss = Loss(backend, confidence, step=step)
    wanted = (loss.gradient() * loss.direction).sum()
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(loss(forward_ad.make_dual(loss.gate, loss.direction))).tangent
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernels", [native.kernels, None], ids=["compiled", "plain"])
@pytest.mark.parametrize("backend", ["torch", "ivf", "hnsw"])
def test_what_is_searched_for_cannot_be_mapped_over(backend, kernels, monkeypatch):
    monkeypatch.setattr(native, "kernels", kernels)
    loss = Loss(backend, "context")
    gates = torch.stack([loss.gate, loss.gate + loss.direction])
    with pytest.raises(NotImplementedError, match="torch.func.vmap over what a memory's rows are searched for"):
        vmap(loss)(gates)
    with disable_memory(loss.model):
        torch.testing.assert_close(vmap(loss)(gates), torch.stack([loss(gate) for gate in gates]))


def test_sums_carry_tangents_and_are_mapped_over():
    recurrence = Recurrence(torch.full((2, 6), 0.5))
    values = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    sums = recurrence(values)  # linear in the values
    torch.testing.assert_close(jvp(recurrence, (values,), (values,))[1], sums)
    torch.testing.assert_close(vmap(recurrence)(torch.stack([values, -values])), torch.stack([sums, -sums]))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(values, values)
        torch.testing.assert_close(forward_ad.unpack_dual(recurrence(dual)).tangent, sums)
