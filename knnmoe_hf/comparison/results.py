"""From recorded responses to `results.json`: metrics, their changes with intervals, and costs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from knnmoe_hf.comparison.effect import Effect
from knnmoe_hf.comparison.fits import Fit
from knnmoe_hf.comparison.plan import FROZEN
from knnmoe_hf.comparison.record import Record
from knnmoe_hf.comparison.suite import Scored
from knnmoe_hf.errors import in_one_line
from knnmoe_hf.evaluation.scores import mean_change

RESAMPLES = 2000


def new_row(fitted_on: str, task: str, method: str, items: int) -> dict[str, Any]:
    """The row of a method on a task before anything is known."""
    return {
        "fitted_on": fitted_on,
        "task": task,
        "off": task != fitted_on,
        "method": method,
        "status": "pending",
        "reason": None,
        "items": items,
        "metric": None,
        "metrics": None,
        "changes": {},
        "groups": {},
        "cost": None,
        "effect": None,
    }


def fill_row(
    row: dict[str, Any],
    scored: Scored,
    others: Mapping[str, Scored],
    main: str | None,
    cost: Mapping[str, float | None],
    effect: Effect | None,
) -> None:
    """
    Fills the row of a method that has answered.

    Args:
        row: as `new_row` makes it.
        scored: the method's scores.
        others: those of the methods that it is compared with, by label.
        main: the metric that is reported for each group; None reports none.
        cost: as `cost_of` gives it.
        effect: None for the frozen model.
    """
    row |= {"status": "done", "cost": dict(cost), "metric": main}
    row["effect"] = None if effect is None else asdict(effect)
    row["metrics"] = {metric: sum(values) / len(values) for metric, values in scored.metrics.items()}
    row["changes"] = {label: changes(other, scored) for label, other in others.items()}
    if main is not None:
        row["groups"] = _groups(scored, others.get(FROZEN), main)


def break_row(row: dict[str, Any], effect: Effect) -> None:
    """Fills the row of a method without an effect."""
    what = {"routing": "route", "prompts": "prompt", "responses": "response"}[effect.on]
    reason = f"it changed no {what} on any of {effect.items_checked} items, so its scores would say nothing about it."
    row |= {"status": "broken", "reason": reason, "effect": asdict(effect)}


def fail_row(row: dict[str, Any], error: Exception) -> None:
    """Fills the row of a method that raised an error, unless it has been filled before."""
    if row["status"] == "pending":
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        row |= {"status": "failed", "reason": f"{kind}{in_one_line(error)}" or "ValueError"}


def changes(base: Scored, changed: Scored) -> dict[str, dict[str, float | None]]:
    """
    `{metric: {"mean", "low", "high"}}` of `changed` against `base`, paired by item, with a 95 % bootstrap interval.

    Raises:
        ValueError: for scores of other items.
    """
    if base.items != changed.items:
        raise ValueError("scores of different items do not pair: score the same items of the same task twice.")
    found = {}
    for metric, values in changed.metrics.items():
        if metric in base.metrics:
            found[metric] = _change(base.metrics[metric], values)
    return found


def cost_of(record: Record, keys: Mapping[str, Sequence[str]], fit: Fit, nbytes: int) -> dict[str, float | None]:
    """
    The cost of a method.

    Args:
        record: of its responses.
        keys: `{item: keys of its requests}`.
        fit: of the method.
        nbytes: what would be shipped beside the base model.

    Returns:
        Means for each item, `times_frozen` of the seconds (None if they were not measured in turns), and totals of the
        fit.
    """
    spent = [record[key].spent for of_item in keys.values() for key in of_item]
    names = ("forward", "backward", "tokens", "seconds", "prompt_tokens")
    cost: dict[str, float | None] = {n: sum(getattr(one, n) for one in spent) / len(keys) for n in names}
    timed = [one for one in spent if one.frozen_seconds is not None]
    frozen = sum(one.frozen_seconds for one in timed)
    cost["times_frozen"] = sum(one.seconds for one in timed) / frozen if frozen else None
    both = [of_item for of_item in keys.values() if record[of_item[0]].spent.frozen_seconds is not None]
    cost["timed_items"] = len(both)
    fitted = {"fit_seconds": fit.seconds, "fit_forward": fit.forward, "fit_backward": fit.backward}
    return cost | {"bytes": nbytes} | fitted


def _change(before: Sequence[float], after: Sequence[float]) -> dict[str, float | None]:
    pair = (torch.tensor(values, dtype=torch.float64) for values in (before, after))
    change = mean_change(*pair, resamples=RESAMPLES)
    return {"mean": change.mean, "low": change.low, "high": change.high}


def _groups(scored: Scored, frozen: Scored | None, metric: str) -> dict[str, dict[str, float | None]]:
    """`{group: {"items", metric, "change", "low", "high"}}`, the change against the frozen model."""
    found = {}
    for group in dict.fromkeys(scored.groups):
        places = [i for i, name in enumerate(scored.groups) if name == group]
        own = [scored.metrics[metric][i] for i in places]
        found[group] = {"items": len(places), metric: sum(own) / len(own), "change": None, "low": None, "high": None}
        if frozen is not None:
            change = _change([frozen.metrics[metric][i] for i in places], own)
            found[group] |= {"change": change["mean"], "low": change["low"], "high": change["high"]}
    return found
