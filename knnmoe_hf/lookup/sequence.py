"""What is known of a call's tokens: which are real, and running means over the sequence that each belongs to.

Tensors only: B sequences (rows) of S tokens, T = B * S. Where states of earlier calls are kept is the host's business
(`SequenceState`).
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from knnmoe_hf.lookup.next_tokens import RecalledTokens

SumKey = tuple[int | None, float]
"""Names a decaying sum: the layer whose values it adds (None for the sum of the weights), and its half-life."""

_CPU = torch.device("cpu")


class SequenceState(Protocol):
    """The decaying sums that sequences had reached before this call."""

    def carried(self, key: SumKey) -> Tensor | None:
        """
        One sum of each sequence.

        Returns:
            float32, on any device: (B, 1) for rows whose sequence goes on with their first token; or (B, S), what each
            token finds before this call, 0 for those that go on from a token of this call or from nothing. None if
            every sequence is new.

        Raises:
            ValueError: if sequences go on whose sum is not known.
        """


class Links(NamedTuple):
    """
    Which token each token goes on from. By default its neighbour in the row, on the left.

    Attributes:
        restarts: (B, S) or (1, S) bool, tokens that go on from nothing; None if there are none.
        before: (B, S) int64, for each token the place in its row of the token that it goes on from, which lies to the
            left; its own place if it goes on from none of this call. None if all go on from their neighbours.
    """

    restarts: Tensor | None = None
    before: Tensor | None = None


class _Rates(NamedTuple):
    """What the running means of one half-life share: tensors (B, S) on one device, or floats for a single token."""

    decay: Tensor | float  # what a token leaves of the sum before it: 1 for padding
    gain: Tensor | float  # the same, but 0 for tokens that do not go on from one of this call
    weights: Tensor | float  # sum of the weights of the tokens so far, positive
    warmup: Tensor | float  # (T,), see `Tokens.warmup`
    recurrence: "Recurrence | None"  # with `gain`; None for a single token


class Tokens:
    """
    The tokens of one call of the model.

    Args:
        batch, length: B and S.
        real: (T,) bool, False for padding; None if all are real.
        links: which token each goes on from; all from their neighbours if None.
        state: sums of the sequences that go on in this call; None if all begin with it.

    Attributes:
        running_sums: the decaying sums (B, S) float32 after each token, or a float for a single token, of every
            running mean that was asked for: what a host must keep for the sequences to go on.
        layer_evidence: `{layer: evidence}`, what the confidence of a layer leaves for later layers.
        recalled: what the last layer with rows leaves for the output embeddings; None if no next tokens are recalled.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        real: Tensor | None = None,
        links: Links | None = None,
        state: SequenceState | None = None,
    ):
        self.shape = (batch, length)
        self.real, self.state = real, state
        self.running_sums: dict[SumKey, Tensor | float] = {}
        self.layer_evidence: dict[int, tuple] = {}
        self.recalled: RecalledTokens | None = None
        self._links = links or Links()
        self._rates: dict[tuple[float, torch.device | None], _Rates] = {}
        self._is_one: bool | None = None

    def links(self) -> Links:
        """Which token each token goes on from."""
        return self._links

    @property
    def is_one(self) -> bool:
        """Whether this is a single real token, whose running means may be computed with floats."""
        if self._is_one is None:
            self._is_one = self.shape == (1, 1) and (self.real is None or bool(self.real.all()))
        return self._is_one

    def running_mean(self, layer: int, values: Tensor | float, half_life: float) -> Tensor | float:
        """
        For each token, the mean of `values` over the real tokens of its sequence up to and including itself.

        Args:
            layer: the decoder layer that asks, once per call; each layer has a mean of its own.
            values: (T,) of any float dtype; a float if `is_one`.
            half_life: a token that lies n real tokens back weighs `0.5 ** (n / half_life)`; positive.

        Returns:
            (T,) float32 through which gradients pass, meaningless for padding; a float for a float.

        Raises:
            ValueError: if sequences go on of which this mean is not known.
        """
        rates = self._rates_of(half_life, like=values)
        if isinstance(values, Tensor):
            values = values.float().view(self.shape)
            if self.real is not None:
                values = torch.where(self.real.view(self.shape).to(values.device), values, 0.0)
        mean = self._sum_up((layer, half_life), values, rates) / rates.weights
        return mean.flatten() if isinstance(mean, Tensor) else mean

    def warmup(self, half_life: float, like: Tensor | float) -> Tensor | float:
        """
        The share of a running mean's full weight that each token's sequence has yet to gather.

        Args:
            half_life: of the running mean.
            like: a tensor on the wanted device, or a float if `is_one`.

        Returns:
            (T,) float32, `0.5 ** (n / half_life)` for the n-th real token of a sequence; a float for a float.

        Raises:
            ValueError: as `running_mean`.
        """
        return self._rates_of(half_life, like).warmup

    def stacked(self) -> Tensor:
        """All `running_sums`, (n, B, S) float32, on the device of the first."""
        sums = list(self.running_sums.values())
        first = next((one for one in sums if isinstance(one, Tensor)), None)
        if first is None:
            return torch.tensor(sums, dtype=torch.float32, device=_CPU).view(-1, 1, 1)
        return torch.stack([torch.as_tensor(one, device=first.device).view(self.shape) for one in sums])

    def _rates_of(self, half_life: float, like: Tensor | float) -> _Rates:
        device = like.device if isinstance(like, Tensor) else None
        rates = self._rates.get((half_life, device))
        if rates is None:
            if device is None:  # numbers of a single token
                *parts, _ = self._rates_of(half_life, torch.empty(0, device=_CPU))
                rates = _Rates(*(part.item() for part in parts), recurrence=None)
            else:
                rates = self._new_rates(half_life, device)
            self._rates[half_life, device] = rates
        return rates

    def _new_rates(self, half_life: float, device: torch.device) -> _Rates:
        step, links = 0.5 ** (1 / half_life), self.links()
        ones = torch.ones(self.shape, dtype=torch.float32, device=device)
        decay = ones * step
        if self.real is not None:
            real = self.real.view(self.shape).to(device)
            ones, decay = real.float(), decay.masked_fill(~real, 1.0)
        gain = decay if links.restarts is None else decay.masked_fill(links.restarts.to(device), 0.0)
        if links.before is None:
            recurrence = Recurrence(gain)
        else:
            before = links.before.to(device)
            gain = gain.masked_fill(before == torch.arange(self.shape[1], device=device), 0.0)
            recurrence = BranchingRecurrence(gain, before)
        rates = _Rates(decay, gain, ones, ones, recurrence)
        weights = self._sum_up((None, half_life), ones, rates)
        warmup = 1 - weights.flatten() * (1 - step)
        return rates._replace(weights=weights.clamp_min(torch.finfo(torch.float32).tiny), warmup=warmup)

    def _sum_up(self, key: SumKey, values: Tensor | float, rates: _Rates) -> Tensor | float:
        """The decaying sums of values (B, S), or of a single one, with what was carried into this call."""
        carried = None if self.state is None else self.state.carried(key)
        if carried is not None:
            carried = carried.to(values.device) if isinstance(values, Tensor) else carried.item()
            if self.shape[1] == 1:  # a step of decoding
                values = values + rates.gain * carried
            else:
                known = carried.shape[1]
                entering = (rates.gain if known == 1 else rates.decay)[:, :known] * carried
                values = values + F.pad(entering, (0, self.shape[1] - known))
        sums = values if rates.recurrence is None else rates.recurrence(values)
        # weights are the same on every device: the first is enough
        self.running_sums.setdefault(key, sums.detach() if isinstance(sums, Tensor) and sums.requires_grad else sums)
        return sums


class Recurrence:
    """
    `sum[t] = gain[t] * sum[t-1] + values[t]` along each row of (B, S), in log2(S) steps on all tokens at once.

    Args:
        gain: (B, S) float32; its first column has no effect.
    """

    def __init__(self, gain: Tensor):
        self.gain = gain
        self._steps: list[tuple[object, Tensor]] | None = None  # where each step looks, and the gain from there

    def __call__(self, values: Tensor) -> Tensor:
        """The sums of values (B, S) float32; gradients pass."""
        if self.gain.shape[1] == 1:
            return values
        if self._steps is None:
            self._steps = self._find_steps()
        for where, product in self._steps:
            values = values + product * self._looked_up(values, where)
        return values

    def _find_steps(self) -> list[tuple[object, Tensor]]:
        steps, shift, product, longest = [], 1, self.gain, _longest_shift(self.gain.shape[1])
        while shift < longest:
            steps.append((shift, product))
            product, shift = product * self._looked_up(product, shift), 2 * shift
        return steps

    def _looked_up(self, values: Tensor, shift: int) -> Tensor:
        """(B, S) with each row moved to the right, zeros in front."""
        return F.pad(values, (shift, 0))[:, : values.shape[1]]


class BranchingRecurrence(Recurrence):
    """
    `sum[t] = gain[t] * sum[before[t]] + values[t]`, as `Recurrence`: each step looks twice as far back.

    Args:
        gain: (B, S) float32, 0 where `before[t]` is t.
        before: (B, S) int64, at most t.
    """

    def __init__(self, gain: Tensor, before: Tensor):
        super().__init__(gain)
        self.before = before

    def _find_steps(self) -> list[tuple[object, Tensor]]:
        steps, reach, where, product, longest = [], 1, self.before, self.gain, _longest_shift(self.gain.shape[1])
        while reach < longest:
            steps.append((where, product))
            product, where, reach = product * product.gather(1, where), where.gather(1, where), 2 * reach
        return steps

    def _looked_up(self, values: Tensor, where: Tensor) -> Tensor:
        return values.gather(1, where)


def _longest_shift(length: int) -> int:
    """How far back the tokens of a row must look."""
    if not torch.compiler.is_compiling():
        return length
    longest = 1  # powers of 64: with powers of 2, eight prompt lengths would use up the compiler's recompile limit
    while longest < length:
        longest *= 64
    return longest
