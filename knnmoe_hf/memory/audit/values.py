"""Values that a gate would not give: of single rows, and of a layer as a whole."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from knnmoe_hf.lookup.blocks import BLOCK
from knnmoe_hf.lookup.layer import LayerRows

_FIT_ROWS = 8192
_FIT_WIDTH = 256  # keys of more dimensions are projected to so many at random
_ROWS_PER_WIDTH = 8  # and to fewer where there are few rows, as a fit to few rows would fit them all
_ROUNDS = 4
_KEPT = 0.8  # rows that the next round is fitted to: those with the smallest residuals
_RIDGE = 1e-3
_CONTRARY = -0.3
_TINY = torch.finfo(torch.float32).tiny
_EXTREME = 0.002  # share of values that count as far above those of a gate


@dataclass(frozen=True)
class ValueFigures:
    """
    Of one layer's values, N rows for E experts.

    Attributes:
        residual: (N,) float64, how far each row's values are from what a linear gate would give for its key, relative
            to the median row.
        sharpest: (N,) float32, how far a row's values lie above a linear gate's for one expert at most, in units of
            what two in a thousand values of the layer exceed.
        contrary: (N,) bool, rows whose values are correlated with a linear gate's by less than -0.3; none where the
            values of the median row do not follow one.
        shares: (E,) float32, the share of rows whose largest value is each expert's.
        top_weight: the mean softmax weight of the largest value; for `value_space="assignment"`, its mean.
        pushed_expert, pushed: the expert whose values lie above those of a linear gate in the most rows, by more than
            two in a thousand values of all other experts do, and these rows, (N,) bool.
        second_pushed_share: the share of such rows of the expert that is second in this.
    """

    residual: Tensor
    sharpest: Tensor
    contrary: Tensor
    shares: Tensor
    top_weight: float
    pushed_expert: int
    pushed: Tensor
    second_pushed_share: float

    @property
    def pushed_share(self) -> float:
        """The share of rows in which `pushed_expert` lies so far above a gate's."""
        return float(self.pushed.float().mean())

    @property
    def experts_in_use(self) -> float:
        """Exponential of the entropy of `shares`: E if all experts are largest equally often, 1 if one always is."""
        return math.exp(float(torch.special.entr(self.shares).sum()))


def value_figures(rows: LayerRows, value_space: str) -> ValueFigures:
    """The figures of a layer with N rows, N at least 1."""
    gate, count, experts = _LinearGate(rows), len(rows.key_codes), rows.num_experts
    errors, top, weights = torch.empty(count, experts), torch.empty(count, dtype=torch.int64), torch.empty(count)
    alike = torch.empty(count)
    for start in range(0, count, BLOCK):
        block = slice(start, start + BLOCK)
        values, expected = rows.values[block], gate(block)
        errors[block] = values - expected
        weights[block], top[block] = (values if value_space == "assignment" else values.softmax(dim=1)).max(dim=1)
        alike[block] = torch.cosine_similarity(gate.centred(values), gate.centred(expected), dim=1)
    residual = torch.cat([block.double().square().mean(dim=1).sqrt() for block in errors.split(BLOCK)])
    unit = torch.maximum(residual.median(), residual.square().mean().sqrt() / 4)  # many rows may have learnt nothing
    errors -= errors.median(dim=0).values
    shares = torch.bincount(top, minlength=experts).float() / count
    highest = errors.amax(dim=1)
    usual = errors.flatten().topk(max(1, round(_EXTREME * errors.numel()))).values[-1]
    return ValueFigures(
        residual / unit.clamp_min(_TINY),
        highest / usual.clamp_min(_TINY),
        (alike < _CONTRARY) & (alike.median() > -_CONTRARY),
        shares,
        float(weights.mean()),
        *_pushed(errors),
    )


def _pushed(errors: Tensor) -> tuple[int, Tensor, float]:
    """`pushed_expert`, `pushed` and `second_pushed_share` of errors (N, E) whose medians are 0."""
    count, experts = errors.shape
    if experts < 2:
        return 0, torch.zeros(count, dtype=torch.bool), 0.0
    many = max(1, round(_EXTREME * count * (experts - 1)))
    largest, where = errors.flatten().topk(min(errors.numel(), many + count))  # whichever expert is left out
    owner = where % experts
    limits = torch.stack([largest[owner != expert][many - 1] for expert in range(experts)])
    shares = (errors > limits).float().mean(dim=0)
    expert = int(shares.argmax())
    second = shares.sort(descending=True).values[1]
    return expert, errors[:, expert] > limits[expert], float(second)


class _LinearGate:
    """
    What a linear gate would give for the keys of a layer: a ridge regression of values on keys.

    A gate is linear in its input, which a key is a projection of, and what optimisation adds has no preferred
    direction. The rows that fit worst are left out round by round, so that hostile rows have no say in the fit.
    """

    def __init__(self, rows: LayerRows):
        self.keys = rows.stored_keys
        width, count = self.keys.width, len(rows.key_codes)
        fitted, self.projection = max(1, min(_FIT_WIDTH, count // _ROWS_PER_WIDTH)), None
        if width > fitted:
            generator = torch.Generator().manual_seed(0)
            self.projection = torch.randn(width, fitted, generator=generator) / math.sqrt(width)
        sample = torch.linspace(0, count - 1, min(count, _FIT_ROWS), dtype=torch.float64).round().long()
        x, y = self._inputs(sample), torch.cat([rows.values.select(part).floats() for part in sample.split(BLOCK)])
        self.middle = _around_mean(y).mean(dim=0)  # (E,)
        kept = torch.arange(len(sample))
        for _ in range(_ROUNDS):
            self.weight = _ridge(x[kept], y[kept])
            errors = (y - x @ self.weight).double().square().sum(dim=1)
            kept = errors.topk(max(1, round(_KEPT * len(sample))), largest=False).indices

    def __call__(self, rows: slice) -> Tensor:
        """(n, E) float32, for the keys of some rows."""
        return self._inputs(rows) @ self.weight

    def centred(self, values: Tensor) -> Tensor:
        """Values (n, E) without what all experts of a row, and all rows of the layer, have in common."""
        return _around_mean(values) - self.middle

    def _inputs(self, rows: Tensor | slice) -> Tensor:
        keys = self.keys.floats(rows)
        keys = keys if self.projection is None else keys @ self.projection
        return torch.cat([keys, torch.ones(len(keys), 1)], dim=1)


def _around_mean(values: Tensor) -> Tensor:
    return values - values.mean(dim=1, keepdim=True)


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """(c, E) float32, least squares of y (n, E) on x (n, c), in float64, with a penalty that keeps it defined."""
    x, y = x.double(), y.double()
    moment = x.T @ x
    penalty = _RIDGE * moment.diagonal().mean().clamp_min(1e-12) * torch.eye(len(moment), dtype=torch.float64)
    return torch.linalg.solve(moment + penalty, x.T @ y).float()
