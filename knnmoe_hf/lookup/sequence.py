"""What a route may know of a forward's tokens: which are real, and what came before them in their sequence.

Knows tensors only, neither hooks nor models, so that other runtimes can use it as it is.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from knnmoe_hf import native
from knnmoe_hf.lookup.transforms_tmp import plain


class Recurrence:
    """
    `sum[t] = gain[t] * sum[t-1] + values[t]` along each row of (B, S).

    Args:
        gain: (B, S) float32; what it is where a row begins is of no account.
    """

    def __init__(self, gain: Tensor):
        self.gain = gain.contiguous()
        self._levels: list[tuple[int, Tensor]] | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """The sums of values (B, S) float32; gradients pass. `values` itself where a row is but one token."""
        if self.gain.shape[1] == 1:
            return values
        compiled = native.on(values.device)
        alike = values.shape == self.gain.shape and values.device == self.gain.device
        if compiled is None or not alike or not values.dtype == self.gain.dtype == torch.float32:
            return self._in_steps(values)
        if torch.compiler.is_compiling() or values.requires_grad or not plain(values, self.gain):
            return self._in_steps(values)
        values = values.contiguous()
        sums = torch.empty_like(values)
        compiled.running_sums(values.data_ptr(), self.gain.data_ptr(), *values.shape, sums.data_ptr())
        return sums

    def _in_steps(self, values: Tensor) -> Tensor:
        """In log2(S) steps on all tokens at once."""
        if self._levels is None:
            self._levels, shift, product = [], 1, self.gain
            while shift < _reach(self.gain.shape[1]):
                self._levels.append((shift, product))
                product, shift = product * _shifted(product, shift), 2 * shift
        for shift, product in self._levels:
            values = values + product * _shifted(values, shift)
        return values


def _reach(length: int) -> int:
    """How far back a row's tokens have to look."""
    if not torch.compiler.is_compiling():
        return length
    reach = 1  # else there would be a graph for every power of 2, and no more than eight are compiled
    while reach < length:
        reach *= 64
    return reach


def _shifted(values: Tensor, shift: int) -> Tensor:
    """(B, S) with each row moved to the right, zeros in front."""
    return F.pad(values, (shift, 0))[:, : values.shape[1]]


SumKey = tuple[int | None, float]
"""Names a decaying sum: the layer whose values it adds, None for their weights, and its half-life."""


class SequenceState(Protocol):
    """What was summed up before a forward, for sequences that go on in it."""

    def carried(self, series: SumKey) -> Tensor | None:
        """
        The sum that each sequence had reached.

        Returns:
            float32, on any device: (B, 1) for rows that go on with their first token; or (B, S), what each token finds
            before it besides its neighbour in the row, 0 where nothing. None if every sequence begins here.

        Raises:
            ValueError: if sequences go on whose sum is not known.
        """

    def carried_one(self, series: SumKey) -> float | None:
        """The same where the forward has but one token."""


class _Rates(NamedTuple):
    """What all layers share, on one device: each (B, S) but the last."""

    decay: Tensor  # what a token leaves of the sum before it: 1 for padding
    recurrence: Recurrence  # with the same for a gain, 0 where a sequence begins
    weights: Tensor  # sum of the weights of the tokens so far, positive
    warmup: Tensor  # (T,), see `Tokens.warmup`


class Tokens:
    """
    The tokens of one forward.

    Args:
        batch, length: B rows of S tokens, T = B * S.
        real: (T,) bool, False for padding; None if all are real.
        restarts: (B, S) or (1, S) bool, tokens with which another sequence begins; None if none does.
        state: sums of the sequences that go on in this forward; None if all begin with it.

    Attributes:
        noted: the decaying sums (B, S) float32 after each token, of all that was asked for, or of one token numbers;
            what a state needs to carry the sequences on.
        shared: by layer, what a route leaves for those of later layers, each (T,) or, of one
            token, a number.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        real: Tensor | None = None,
        restarts: Tensor | None = None,
        state: SequenceState | None = None,
    ):
        self.shape = (batch, length)
        self.real, self.state = real, state
        self.noted: dict[SumKey, Tensor | float] = {}
        self.shared: dict[int, tuple[Tensor | float, ...]] = {}
        self._restarts = restarts
        self._rates: dict[tuple[float, torch.device], _Rates] = {}
        self._single: dict[float, tuple[float, float, float]] = {}
        self._one: bool | None = None

    def restarts(self) -> Tensor | None:
        """(B, S) or (1, S) bool, tokens with which another sequence begins; None if none does."""
        return self._restarts

    def running_mean(self, layer: int, values: Tensor, half_life: float) -> Tensor:
        """
        For each token the mean of `values` over the real tokens of its sequence so far, itself included.

        Args:
            layer: the decoder layer that asks, once in a forward; each has a mean of its own.
            values: (T,), any float dtype.
            half_life: a token that lies n real tokens back weighs `0.5 ** (n / half_life)`; positive.

        Returns:
            (T,) float32, what it says of padding being of no account; gradients pass.

        Raises:
            ValueError: if sequences go on of which this mean is not known.
        """
        rates = self._rates_of(half_life, values.device)
        values = values.float().view(self.shape)
        if self.real is not None:
            values = torch.where(self.real.view(self.shape).to(values.device), values, 0.0)
        sums = self._sum_up((layer, half_life), values, rates.decay, rates.recurrence)
        return (sums / rates.weights).flatten()

    def running_mean_of_one(self, layer: int, value: float, half_life: float) -> tuple[float, float]:
        """`running_mean` and `warmup` where there is but one token, which is real and on the CPU."""
        known = self._single.get(half_life)
        if known is None:
            rates = self._rates_of(half_life, torch.device("cpu"))
            known = self._single[half_life] = rates.recurrence.gain.item(), rates.weights.item(), rates.warmup.item()
        gain, weights, warmup = known
        carried = None if self.state is None else self.state.carried_one((layer, half_life))
        if carried is not None:
            value += gain * carried
        self.noted[layer, half_life] = value
        return value / weights, warmup

    def stacked(self) -> Tensor:
        """All that is `noted`, (n, B, S) float32, on the device of the first."""
        found = list(self.noted.values())
        if not any(isinstance(sums, float) for sums in found):
            return torch.stack([sums.to(found[0].device) for sums in found])
        return torch.tensor([float(sums) for sums in found], dtype=torch.float32, device="cpu").view(-1, 1, 1)

    @property
    def is_one(self) -> bool:
        """Whether there is but one token, a real one."""
        if self._one is None:
            self._one = self.shape == (1, 1) and (self.real is None or bool(self.real.all()))
        return self._one

    def warmup(self, half_life: float, device: torch.device) -> Tensor:
        """
        The share of a running mean's full weight that each token's sequence has yet to gather.

        Returns:
            (T,) float32, `0.5 ** (n / half_life)` for the n-th real token of a sequence.

        Raises:
            ValueError: as `running_mean`.
        """
        return self._rates_of(half_life, device).warmup

    def _rates_of(self, half_life: float, device: torch.device) -> _Rates:
        known = self._rates.get((half_life, device))
        if known is not None:
            return known
        step, restarts = 0.5 ** (1 / half_life), self.restarts()
        ones = torch.ones(self.shape, dtype=torch.float32, device=device)
        decay = ones * step
        if self.real is not None:
            real = self.real.view(self.shape).to(device)
            ones, decay = real.float(), decay.masked_fill(~real, 1.0)
        gain = decay if restarts is None else decay.masked_fill(restarts.to(device), 0.0)
        recurrence = Recurrence(gain)
        weights = self._sum_up((None, half_life), ones, decay, recurrence)
        positive, warmup = weights.clamp_min(torch.finfo(torch.float32).tiny), 1 - weights.flatten() * (1 - step)
        self._rates[half_life, device] = rates = _Rates(decay, recurrence, positive, warmup)
        return rates

    def _sum_up(self, series: SumKey, values: Tensor, decay: Tensor, recurrence: Recurrence) -> Tensor:
        """The decaying sums of values (B, S), with what came before them."""
        carried = None if self.state is None else self.state.carried(series)
        if carried is not None and self.shape[1] == carried.shape[1] == 1:  # a step of decoding
            values = torch.addcmul(values, recurrence.gain, carried.to(values.device))
        elif carried is not None:
            known = carried.shape[1]
            entering = (recurrence.gain if known == 1 else decay)[:, :known] * carried.to(values.device)
            values = values + F.pad(entering, (0, self.shape[1] - known))
        sums = recurrence(values)
        # weights are the same on every device: once is enough
        self.noted.setdefault(series, sums.detach() if sums.requires_grad else sums)
        return sums
