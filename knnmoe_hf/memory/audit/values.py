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


@dataclass(frozen=True)
class ValueFigures:
    """
    Of one layer's values, N rows for E experts.

    Attributes:
        residual: (N,) float32, how far each row's values are from what a linear gate would give for its key, relative
            to the median row.
        peak: (N,) float32, by how many standard deviations of a row's values its largest one is above their mean; at
            most `sqrt(E - 1)`, where all other experts have the same value.
        shares: (E,) float32, the share of rows whose largest value is each expert's.
        top_weight: the mean softmax weight of the largest value; for `value_space="assignment"`, its mean.
    """

    residual: Tensor
    peak: Tensor
    shares: Tensor
    top_weight: float

    @property
    def experts_in_use(self) -> float:
        """The exponential of the entropy of `shares`: E if all experts are largest equally often, 1 if one always is."""
        return math.exp(float(torch.special.entr(self.shares).sum()))


def value_figures(rows: LayerRows, value_space: str) -> ValueFigures:
    """The figures of a layer with N rows, N at least 1."""
    gate = _LinearGate(rows)
    errors, peaks, top, weights = [], [], [], []
    for start in range(0, len(rows.key_codes), BLOCK):
        block = slice(start, start + BLOCK)
        values = rows.values[block]
        errors.append((values - gate(block)).square().mean(dim=1).sqrt())
        spread = values.std(dim=1, correction=0).clamp_min(torch.finfo(torch.float32).tiny)
        largest, expert = values.max(dim=1)
        peaks.append((largest - values.mean(dim=1)) / spread)
        top.append(expert)
        weights.append(largest if value_space == "assignment" else values.softmax(dim=1).amax(dim=1))
    residual, experts = torch.cat(errors), rows.num_experts
    shares = torch.bincount(torch.cat(top), minlength=experts).float() / len(residual)
    middle = residual.median().clamp_min(torch.finfo(torch.float32).tiny)
    return ValueFigures(residual / middle, torch.cat(peaks), shares, float(torch.cat(weights).mean()))


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
        kept = torch.arange(len(sample))
        for _ in range(_ROUNDS):
            self.weight = _ridge(x[kept], y[kept])
            errors = (y - x @ self.weight).square().sum(dim=1)
            kept = errors.topk(max(1, round(_KEPT * len(sample))), largest=False).indices

    def __call__(self, rows: slice) -> Tensor:
        """(n, E) float32, for the keys of some rows."""
        return self._inputs(rows) @ self.weight

    def _inputs(self, rows: Tensor | slice) -> Tensor:
        keys = self.keys.floats(rows)
        keys = keys if self.projection is None else keys @ self.projection
        return torch.cat([keys, torch.ones(len(keys), 1)], dim=1)


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """(c, E) float32, least squares of y (n, E) on x (n, c), in float64, with a penalty that keeps it defined."""
    x, y = x.double(), y.double()
    moment = x.T @ x
    penalty = _RIDGE * moment.diagonal().mean().clamp_min(1e-12) * torch.eye(len(moment), dtype=torch.float64)
    return torch.linalg.solve(moment + penalty, x.T @ y).float()
