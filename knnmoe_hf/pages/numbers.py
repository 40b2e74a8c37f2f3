"""Numbers as tables show them: rounded, with the unrounded one beside them."""

import math
import re

from knnmoe_hf.pages.document import Cell, Tone

LIKELIHOOD = "loglikelihood"  # of the right choice: the one metric that is not the harness's
NOT_MEASURED = Cell("n/a", tone="quiet")
_NAMES = {
    "acc": "accuracy",
    "acc_norm": "accuracy, length-normalised",
    "acc_bytes": "accuracy, normalised by bytes",
    "exact_match": "exact match",
    "pass_at_1": "pass@1",
    "pass@1": "pass@1",
}
_SMALL = 1e-4  # numbers below are shown with a power of ten
_SHARES = ("acc", "exact", "pass", "em", "f1", "no")  # first words of metrics that are shares of items


def metric_name(metric: str) -> str:
    """A metric's name for people, with the harness's own where that differs."""
    if metric == LIKELIHOOD:
        return "log-likelihood of the right choice"
    known = _NAMES.get(metric)
    return metric if known is None or known == metric else f"{known} ({metric})"


def is_share(metric: str) -> bool:
    """Whether a metric of the harness is a share of items, which is shown in percent."""
    return re.split(r"[,_@]", metric)[0] in _SHARES


def unit(metric: str) -> str:
    """What a metric is measured in."""
    return "%" if is_share(metric) else "nats" if metric == LIKELIHOOD else ""


def score(value: float | None, metric: str) -> Cell:
    """A metric's value."""
    return NOT_MEASURED if value is None else Cell(_scaled(value, metric, ""), value)


def change(found: dict | None, metric: str, higher_is_better: bool = True) -> Cell:
    """
    A change with its interval.

    Args:
        found: `{"mean", "low", "high"}`; the bounds are None if there are too few items.
        metric: that changed.
        higher_is_better: what of it is an improvement.
    """
    if not found or found.get("mean") is None:
        return NOT_MEASURED
    mean, low, high = found["mean"], found.get("low"), found.get("high")
    if low is None or high is None:
        return Cell(f"{_scaled(mean, metric, '+')} [too few items]", mean)
    tone: Tone = ""
    if low > 0 or high < 0:
        tone = "good" if (low > 0) == higher_is_better else "bad"
    bounds = ", ".join(_scaled(bound, metric, "+") for bound in (low, high))
    return Cell(f"{_scaled(mean, metric, '+')} [{bounds}]", mean, tone)


def amount(value: float | None, digits: int = 3) -> Cell:
    """A number with so many digits that say something, and all of its whole ones."""
    return NOT_MEASURED if value is None else Cell(plain(value, digits), value)


def plain(value: float, digits: int = 3) -> str:
    """As `amount` shows it."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < _SMALL:
        return f"{value:.{digits}g}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    shown = f"{value:,.{max(0, places)}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def size(value: float | None) -> Cell:
    """A number of bytes."""
    if value is None:
        return NOT_MEASURED
    for power, name in ((3, "GB"), (2, "MB"), (1, "kB")):
        if value >= 1000**power:
            return Cell(f"{plain(value / 1000**power)} {name}", value)
    return Cell(f"{value:g} B", value)


def _scaled(value: float, metric: str, sign: str) -> str:
    value += 0.0  # which makes 0 of -0
    if is_share(metric):
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.3f}" if abs(value) < 1000 else f"{value:{sign}.4g}"
