"""The plots of a comparison."""

from collections.abc import Callable
from dataclasses import replace

from knnmoe_hf.comparison.report.results import Results, cost_of, passes_of, value_of
from knnmoe_hf.pages import numbers
from knnmoe_hf.pages.axes import Axis
from knnmoe_hf.pages.charts import Mark, scatter
from knnmoe_hf.pages.document import Chart

_LEGEND = {
    "memory": "routing memory",
    "frozen": "frozen model",
    "fixed": "weights kept",
    "trained": "weights trained",
}


def cost_plots(results: Results, task: dict) -> list[Chart]:
    """Accuracy against time, and against passes, per item."""
    by: list[tuple[str, Callable[[dict], float | None]]] = [
        ("seconds, times frozen", results.times_frozen),
        ("passes per item", passes_of),
    ]
    if any(results.times_frozen(row) is None for _, row in results.done(task["name"], task["name"])):
        by[0] = ("seconds per item", lambda row: cost_of(row, "seconds"))
    metrics = results.metrics(task["name"], task["name"])
    if not metrics:
        return []
    metric, scale = metrics[0], 100 if numbers.is_share(metrics[0]) else 1
    name = f"{numbers.metric_name(metric)}{', %' if scale == 100 else ''}"
    charts = []
    for cost_name, cost in by:
        marks, level = [], []
        for label, row in results.done(task["name"], task["name"]):
            x, y = cost(row), value_of(row, metric)
            if x is not None and y is not None:
                marks.append(Mark(label, x, scale * y, results.kind(label)))
                level += [scale * y] if results.kind(label) == "frozen" else []
        if len(marks) > 1:
            axes = Axis(cost_name, is_log=True, shown=numbers.plain), Axis(name)
            title = f"{task['name']}: {numbers.metric_name(metric)} against {cost_name}"
            note = f"{_left_out(results, task['name'], task['name'], marks)} The dashed line is the frozen model."
            charts.append(_with_legend(scatter(title, marks, *axes, ((), level[:1]), note.strip())))
    return charts


def harm_plots(results: Results, task: dict) -> list[Chart]:
    """What methods gain on the task that they were fitted on, against what they change on each other task."""
    charts, own = [], results.metrics(task["name"], task["name"])
    for off in task["off"]:
        marks, metrics = [], [*own[:1], *results.metrics(task["name"], off)[:1]]
        for label, row in results.done(task["name"], task["name"]) if len(metrics) == 2 else ():
            other = results.row(task["name"], off, label)
            gain, harm = (results.change(one, results.frozen, name) for one, name in zip((row, other), metrics))
            if results.kind(label) != "frozen" and gain and harm:
                scales = [100 if numbers.is_share(metric) else 1 for metric in metrics]
                gained, harmed = (_scaled(one, scale) for one, scale in zip((gain, harm), scales))
                ranges = _range(harmed), _range(gained)
                marks.append(Mark(label, harmed["mean"], gained["mean"], results.kind(label), *ranges))
        if marks:
            axes = Axis(f"change on {off}, points"), Axis(f"change on {task['name']}, points")
            title = f"Gain on {task['name']} against change on {off}"
            note = f"{_left_out(results, task['name'], off, marks)} Lines are 95 % intervals; dashed is no change."
            charts.append(_with_legend(scatter(title, marks, *axes, ((0.0,), (0.0,)), note.strip())))
    return charts


def _scaled(change: dict, scale: float) -> dict:
    return {name: None if change.get(name) is None else scale * change[name] for name in ("mean", "low", "high")}


def _range(change: dict) -> tuple[float, float] | None:
    return None if change["low"] is None or change["high"] is None else (change["low"], change["high"])


def _left_out(results: Results, fitted_on: str, task: str, marks: list[Mark]) -> str:
    """A sentence about methods that have no results to show."""
    drawn = {mark.label for mark in marks}
    without = [
        label
        for label in results.methods
        if label not in drawn and results.row(fitted_on, task, label)["status"] != "done"
    ]
    return f"Without results: {', '.join(without)}." if without else ""


def _with_legend(chart: Chart) -> Chart:
    return replace(chart, legend=list(_LEGEND.items()))
