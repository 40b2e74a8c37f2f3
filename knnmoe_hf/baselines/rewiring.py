"""
Rewiring Experts on the Fly (arXiv 2510.14853): the routing of one request, adapted to its own text.

A vector (E,) for each layer is added to the gate's logits of every token. It is 0 at the beginning of a request and
falls along the gradient of the next-token loss of the text so far: of the prompt, and while a single sequence is
generated, of everything after each further `every` tokens. Keys and values in the cache stay as they were computed
(ours).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knnmoe_hf.baselines.base import Cost, Method, constant, overriding, rerouted
from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.gates import Gate, find_decoder, find_gates
from knnmoe_hf.models.modes import frozen
from knnmoe_hf.models.offload import input_device
from knnmoe_hf.models.predecessors import cached_length, named_arguments
from knnmoe_hf.tasks.items import Item, Prompt


class Shift:
    """
    A `RoutingOverride`: adds a vector to the logits of every token and routes by the family's rule.

    Args:
        gate: of the layer.

    Attributes:
        delta: (E,) float32, what is added.
        moves: whether it may be adapted.
        undecided: () float32, the source's C of the tokens that were last adapted to: the mean of -log p over the
            experts that the gate chose, where p is the softmax of its logits. The larger, the less decisive.
    """

    def __init__(self, gate: Gate):
        self.gate, self.moves = gate, True
        self.delta = torch.zeros(gate.num_experts)
        self.undecided = torch.zeros(())

    def __call__(self, x: Tensor, output: GateOutput, tokens: Tokens) -> GateOutput:
        logits = output[0].float()
        if self.delta.requires_grad:
            self.undecided = -logits.detach().log_softmax(-1).gather(1, output[2]).mean().cpu()
        return rerouted(self.gate, output, logits + self.delta.to(logits.device))


@dataclass
class Rewiring(Method):
    """
    One vector of logits for each layer, adapted to the text of each request; references teach it nothing.

    Only a share of the layers is adapted, chosen by C of the prompt (`Shift.undecided`). The source's formula keeps
    the largest C, and its text the most confident routers, which is the opposite; `decisive` chooses.
    """

    source: ClassVar[str] = "arXiv 2510.14853"
    per_item: ClassVar[bool] = True

    steps: int = constant(5, "Gradient steps at each adaptation.")
    rate: float = constant(0.05, "Learning rate; of Adam, as the source names no optimiser.")
    share: float = constant(0.5, "Share of the layers that are adapted.", ours=True)
    decisive: bool = constant(False, "Adapt the layers of the most decisive gates, not of the least.", ours=True)
    every: int = constant(128, "Generated tokens after which it is adapted again.")

    def fit(self, model: nn.Module, references: Sequence[Item], seed: int = 0, tokenizer=None) -> None:
        """Learns nothing."""

    @contextmanager
    def apply(self, model: nn.Module, prompt: Prompt | None = None) -> Iterator[nn.Module]:
        """
        The model adapted to the prompt. A single sequence that is generated inside is adapted to again; several at
        once keep what the prompt gave.

        Raises:
            ValueError: without a prompt.
        """
        if prompt is None:
            raise ValueError("Rewiring adapts to each request, and was given none: pass the prompt.")
        gates = find_gates(model)
        shifts = {gate.layer: Shift(gate) for gate in gates}
        adaptation = Adaptation(self, model, list(shifts.values()))
        with overriding(model, shifts):
            adaptation.adapt(prompt.tokens)
            growth = Growth(adaptation, len(prompt.tokens))
            # before the hooks of the overrides, so that no forward runs inside another one's
            handle = find_decoder(model, gates).register_forward_pre_hook(growth, prepend=True, with_kwargs=True)
            try:
                yield model
            finally:
                handle.remove()

    @property
    def cost(self) -> Cost:
        """Of the prompt; generating costs as much again for each `every` tokens."""
        return Cost(forward=self.steps, backward=self.steps)


class Adaptation:
    """
    The vectors of one request.

    Args:
        method: its constants.
        model: with the shifts in force.
        shifts: one for each layer; their vectors are changed here.
    """

    def __init__(self, method: Rewiring, model: nn.Module, shifts: list[Shift]):
        self.method, self.model, self.shifts = method, model, shifts
        self.is_running = self.has_chosen = False

    def adapt(self, tokens: Sequence[int]) -> None:
        """Some steps on the next-token loss of a text, from the vectors as they are."""
        if len(tokens) < 2:
            return
        ids = torch.tensor([list(tokens)], device=input_device(self.model))
        deltas = [shift.delta.clone().requires_grad_() for shift in self.shifts]
        optimizer = torch.optim.Adam(deltas, lr=self.method.rate)
        for shift, delta in zip(self.shifts, deltas):
            shift.delta = delta
        self.is_running = True
        try:
            with frozen(self.model, checkpointing=False):
                for _ in range(self.method.steps):
                    self._step(ids, deltas, optimizer)
        finally:
            self.is_running = False
            for shift, delta in zip(self.shifts, deltas):
                shift.delta = delta.detach()

    def _step(self, ids: Tensor, deltas: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        with torch.enable_grad():
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            gradients = torch.autograd.grad(F.cross_entropy(logits, ids[0, 1:].to(logits.device)), deltas)
        if not self.has_chosen:
            self._choose_layers()
        for shift, delta, gradient in zip(self.shifts, deltas, gradients):
            delta.grad = gradient if shift.moves else None
        optimizer.step()

    def _choose_layers(self) -> None:
        """Of the prompt, in the first step; they stay the same for the whole request."""
        order = sorted(self.shifts, key=lambda shift: shift.undecided.item(), reverse=not self.method.decisive)
        for place, shift in enumerate(order):
            shift.moves = place < max(1, math.floor(self.method.share * len(order)))
        self.has_chosen = True


class Growth:
    """
    Pre-hook of the decoder: adapts to the whole text again whenever a single sequence has grown by `every` tokens.

    Args:
        adaptation: to the prompt. A sequence that begins anew begins with what the prompt gave.
        prompt: tokens of the prompt.
    """

    def __init__(self, adaptation: Adaptation, prompt: int):
        self.adaptation, self.prompt = adaptation, prompt
        self.at_first = [shift.delta for shift in adaptation.shifts]
        self.text: list[int] | None = None
        self.due = 0

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.adaptation.is_running:
            return
        call = named_arguments(args, kwargs)
        ids, past = call.get("input_ids"), int(cached_length(call.get("past_key_values")))
        if past == 0:
            for shift, delta in zip(self.adaptation.shifts, self.at_first):
                shift.delta = delta
            self.due = self.prompt + self.adaptation.method.every
            self.text = []
        if ids is None or len(ids) != 1 or self.text is None or len(self.text) != past:
            self.text = None  # several sequences, or one whose text is not known
            return
        self.text += ids[0].tolist()
        if past and len(self.text) >= self.due:
            self.due = len(self.text) + self.adaptation.method.every
            self.adaptation.adapt(self.text)
