"""The tables of a comparison."""

from collections.abc import Callable, Sequence

from knnmoe_hf.comparison.report.results import Results, cost_of, passes_of, status_text, value_of
from knnmoe_hf.pages import numbers
from knnmoe_hf.pages.charts import bar
from knnmoe_hf.pages.document import Cell, Column, Folded, Table
from knnmoe_hf.pages.svg import shortened

_TURNS = "seconds are compared with the frozen model's in turns, so that the machine's load affects both."
_OPTION = 60  # letters of a constant
_INTERVAL = "Intervals are 95 %, by paired bootstrap over items; a coloured change is one whose interval excludes 0."


def result_table(results: Results, task: dict) -> Table:
    """Scores of all methods on the task whose references they were fitted on, what they gain, and what they cost."""
    names = results.metrics(task["name"], task["name"])
    metric = names[0] if names else "acc"
    against = [label for label in (results.frozen, results.memory) if label is not None]
    columns = [Column("method", is_number=False), Column(_titled(metric))]
    columns += [Column(f"change against {label}, {_points(metric)}") for label in against]
    costs = ("passes per item", "seconds per item", "seconds, times frozen", "extra bytes")
    columns += [Column(name) for name in (*costs, *map(_titled, names[1:]))]

    def cells(label: str, row: dict) -> list[Cell]:
        changes = [_change(results, row, other, metric) for other in against]
        scores = [numbers.score(value_of(row, name), name) for name in names]
        costs = [numbers.amount(passes_of(row)), numbers.amount(cost_of(row, "seconds")), _times(results, row)]
        return [scores[0], *changes, *costs, numbers.size(cost_of(row, "bytes")), *scores[1:]]

    rows = _rows(results, task["name"], task["name"], len(columns), cells)
    items = f"{task['items']:,} items. " if task.get("items") else ""
    note = f"{items}{_INTERVAL} Passes are forward and backward passes of the model, scoring included; {_TURNS}"
    return Table(f"Results on {task['name']}", columns, rows, note)


def cost_table(results: Results, task: dict) -> Table:
    """What methods cost per item, and what fitting them cost once."""
    parts: list[tuple[str, str, Callable[[float | None], Cell]]] = [
        ("forward passes per item", "forward", numbers.amount),
        ("backward passes per item", "backward", numbers.amount),
        ("tokens per item", "tokens", numbers.amount),
        ("tokens put before each prompt", "prompt_tokens", numbers.amount),
        ("seconds per item", "seconds", numbers.amount),
        ("seconds, times frozen", "times_frozen", numbers.amount),
        ("extra bytes", "bytes", numbers.size),
        ("fit: seconds", "fit_seconds", numbers.amount),
        ("fit: forward passes", "fit_forward", numbers.amount),
        ("fit: backward passes", "fit_backward", numbers.amount),
    ]
    columns = [Column("method", is_number=False), *(Column(name) for name, _, _ in parts)]

    def cells(label: str, row: dict) -> list[Cell]:
        cost = {key: shown(cost_of(row, key)) for _, key, shown in parts} | {"times_frozen": _times(results, row)}
        return list(cost.values())

    rows = _rows(results, task["name"], task["name"], len(columns), cells)
    note = "What fitting costs is paid once, for all items."
    return Table(f"Cost on {task['name']}", columns, rows, note)


def effect_table(results: Results, task: dict) -> Table:
    """Whether methods changed anything at all: the routing, the prompts or the responses."""
    columns = [Column("method", is_number=False), Column("compared", is_number=False), Column("items checked")]
    columns += [Column("items changed"), Column("tokens changed, %")]
    rows = []
    for label in results.methods:
        row = results.row(task["name"], task["name"], label)
        effect = row.get("effect")
        if row["status"] in ("done", "broken") and effect:
            cells = [numbers.amount(effect.get(name)) for name in ("items_checked", "items_changed")]
            share = numbers.score(effect.get("share"), "acc")
            rows.append([Cell(label), Cell(str(effect.get("on") or "n/a")), *cells, share])
    note = "Routing is compared where the blocks read it, after all hooks. A method that changes nothing is broken."
    return Table(f"Effect on {task['name']}", columns, rows, note)


def off_table(results: Results, task: dict) -> Table:
    """What methods that were fitted on one task change on others."""
    columns = [Column("method", is_number=False)]
    metrics = {}
    for off in task["off"]:
        metrics[off] = next(iter(results.metrics(task["name"], off)), "acc")
        columns.append(Column(f"{off}: {_titled(metrics[off])}"))
        columns.append(Column(f"{off}: change against frozen, {_points(metrics[off])}"))
    rows = []
    for label in results.methods:
        cells = [Cell(label)]
        for off in task["off"]:
            row, metric = results.row(task["name"], off, label), metrics[off]
            if row["status"] == "done" and row.get("metrics"):
                cells += [numbers.score(value_of(row, metric), metric), _change(results, row, results.frozen, metric)]
            else:
                cells.append(_status(row, 2))
        rows.append(cells)
    note = f"A negative change is harm to other text. {_INTERVAL}"
    return Table(f"Other tasks, with what was fitted on {task['name']}", columns, rows, note)


def subject_tables(results: Results, task: dict) -> list[Folded]:
    """For each method, its change on each of several subjects, the largest first; the memory's is first and open."""
    found = {}
    for label, row in results.done(task["name"], task["name"]):
        metric = results.metrics(task["name"], task["name"])[0]
        groups = [(name, one) for name, one in (row.get("groups") or {}).items() if one.get("change") is not None]
        if len(groups) < 2 or results.kind(label) == "frozen":
            continue
        groups.sort(key=lambda pair: -pair[1]["change"])
        numbers_shown = [abs(one[key]) for _, one in groups for key in ("change", "low", "high") if one.get(key)]
        extent = max(numbers_shown, default=1.0)
        edge = f"{numbers.change({'mean': extent}, metric).text.split()[0]}"
        columns = [Column("subject", is_number=False), Column("items"), Column(_titled(metric))]
        columns += [Column(f"change against frozen, {_points(metric)}")]
        bars = f"the same as a bar, from {edge.replace('+', '-')} to {edge}"
        columns += [Column(bars, is_number=False, is_picture=True)]
        rows = []
        for name, one in groups:
            bounds = {"mean": one["change"], "low": one.get("low"), "high": one.get("high")}
            change = numbers.change(bounds, metric)
            picture = bar(one["change"], bounds["low"], bounds["high"], extent)
            scores = [numbers.amount(one.get("items"), 9), numbers.score(one.get(metric), metric)]
            rows.append([Cell(name), *scores, change, Cell("", picture=picture)])
        note = "A pale bar is a change whose interval includes 0, or that has none for lack of items."
        table = Table(f"{label}: change by subject on {task['name']}", columns, rows, note)
        found[label] = Folded(f"{label}, by subject", [table], is_open=label == results.memory)
    first = [found.pop(results.memory)] if results.memory in found else []
    return [*first, *([Folded("Other methods, by subject", list(found.values()))] if found else [])]


def method_table(results: Results) -> Table:
    """What the methods are, and their constants."""
    columns = [Column(name, is_number=False) for name in ("method", "what it is", "acts on", "weights", "constants")]
    rows = []
    for label, method in results.methods.items():
        ours = set(method.get("ours", ()))
        options = [
            shortened(f"{name}={value}", _OPTION) + (" *" if name in ours else "")
            for name, value in method.get("options", {}).items()
        ]
        name = method.get("method", label)
        source = method.get("source") or "no source"
        what = source if name == label else f"{name}: {source}"
        weights = "kept" if method.get("keeps_weights", True) else "trained"
        constants = ", ".join(options) or "none"
        rows.append([Cell(label), *(Cell(text) for text in (what, method.get("acts_on", ""), weights, constants))])
    return Table("Methods", columns, rows, "* The source gives no value: this one is our choice.")


def published_table(published: Sequence[dict]) -> Table:
    """Figures that others have published, with the name that they give their model."""
    columns = [Column("task", is_number=False), Column("method", is_number=False), Column("model", is_number=False)]
    columns += [Column("metric", is_number=False), Column("base"), Column("with the method")]
    columns += [Column("source", is_number=False)]
    rows = []
    for one in published:
        figures = [numbers.amount(one.get(name), 4) for name in ("base", "value")]
        texts = [Cell(str(one.get(name) or "")) for name in ("task", "method", "model", "metric")]
        rows.append([*texts, *figures, Cell(str(one.get("source") or ""))])
    note = "Other runs, with other prompts and often other models: these figures do not compare with the rows above."
    return Table("Published figures", columns, rows, note)


def _rows(
    results: Results, fitted_on: str, task: str, width: int, cells: Callable[[str, dict], list[Cell]]
) -> list[list[Cell]]:
    rows = []
    for label in results.methods:
        row = results.row(fitted_on, task, label)
        is_done = row["status"] == "done" and row.get("metrics")
        rows.append([Cell(label), *(cells(label, row) if is_done else [_status(row, width - 1)])])
    return rows


def _status(row: dict, span: int) -> Cell:
    tone = "quiet" if row["status"] in ("pending", "done") else "broken"
    return Cell(status_text(row), tone=tone, span=span)


def _times(results: Results, row: dict) -> Cell:
    itself = row["method"] == results.frozen
    return Cell("itself", tone="quiet") if itself else numbers.amount(results.times_frozen(row))


def _change(results: Results, row: dict, against: str | None, metric: str) -> Cell:
    if row["method"] == against:
        return Cell("itself", tone="quiet")
    return numbers.change(results.change(row, against, metric), metric)


def _titled(metric: str) -> str:
    unit = numbers.unit(metric)
    return f"{numbers.metric_name(metric)}, {unit}" if unit else numbers.metric_name(metric)


def _points(metric: str) -> str:
    return "points" if numbers.is_share(metric) else numbers.unit(metric) or metric
