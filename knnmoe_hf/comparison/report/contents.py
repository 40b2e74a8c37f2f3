"""From the results of a comparison to a report: what is said, and in which order."""

from knnmoe_hf.comparison.report import plots, tables
from knnmoe_hf.comparison.report.results import Results, cost_of, value_of
from knnmoe_hf.pages import numbers
from knnmoe_hf.pages.document import Charts, Document, Folded, Part, Points, Section, Text

WITHOUT_RETRIEVAL = ("constant_bias", "dsmoe")
"""Methods that give every token the same logits: what they gain is not gained by retrieval."""

_COUNTED = {"count": "references", "tokens": "tokens"}


def document_of(results: Results) -> Document:
    """The report of a comparison, finished or not."""
    content, tasks = results.content, results.tasks
    warnings = []
    if not content.get("complete", False):
        warnings.append("This comparison is not finished: run the same command again to go on.")
    sections = [Section("In short", _in_short(results))]
    sections += [Section(task["name"], _task_parts(results, task)) for task in tasks]
    sections.append(Section("Methods", [tables.method_table(results)]))
    if content.get("published"):
        sections.append(Section("Published figures", [tables.published_table(content["published"])]))
    sections.append(Section("Settings", [Points(_settings(results))]))
    title = f"Comparison {content.get('name') or ''}".strip()
    return Document(title, _lead(results), sections, f"Written by {content.get('written_by', 'knnmoe')}.", warnings)


def _lead(results: Results) -> str:
    model = results.content.get("model") or {}
    names = ", ".join(task["name"] for task in results.tasks) or "no task"
    return f"{len(results.methods)} methods on {names}, with the model {model.get('name', 'of no name')}."


def _in_short(results: Results) -> list[Part]:
    sentences = [sentence for task in results.tasks for sentence in _sentences(results, task)]
    return [Points(sentences)] if sentences else [Text("There are no results yet.")]


def _sentences(results: Results, task: dict) -> list[str]:
    """What the table of a task says of the questions that a comparison is made for."""
    name = task["name"]
    metric = next(iter(results.metrics(name, name)), "")
    rows = {label: row for label, row in results.done(name, name) if value_of(row, metric) is not None}
    said = [_best(results, name, metric, rows)] if rows else []
    if results.memory in rows:
        others = [label for label in rows if label != results.memory]
        better = [label for label in others if _is_better(results, rows[label], metric)]
        said.append(f"{name}: better than {results.memory}, outside the interval: {', '.join(better) or 'no method'}.")
    said += _as_good_and_as_cheap(results, name, metric, rows)
    said += _without_retrieval(results, name, metric, rows)
    for status in ("broken", "failed"):
        found = [label for label in results.methods if results.row(name, name, label)["status"] == status]
        if found:
            what = "changed nothing where it acts and is reported as broken" if status == "broken" else "failed"
            said.append(f"{name}: {', '.join(found)} {what}.")
    return said


def _best(results: Results, name: str, metric: str, rows: dict[str, dict]) -> str:
    highest = max(value_of(row, metric) for row in rows.values())
    equal = [label for label, row in rows.items() if value_of(row, metric) == highest]
    shown = f"{numbers.metric_name(metric)} {numbers.score(highest, metric).text}{_percent(metric)}"
    are_best = f"{' and '.join(equal)} {'is' if len(equal) == 1 else 'are'} best"
    said = f"{name}: of {len(rows)} methods, {are_best}, with {shown}"
    if len(rows) == 1:
        return f"{name}: {equal[0]}, the only method with results yet, has {shown}."
    frozen = results.frozen
    if frozen not in rows or frozen in equal:
        return f"{said}."
    change = numbers.change(results.change(rows[equal[0]], frozen, metric), metric).text
    own = numbers.score(value_of(rows[frozen], metric), metric).text
    return f"{said}, where the frozen model has {own}{_percent(metric)}: a change of {change} points."


def _is_better(results: Results, row: dict, metric: str) -> bool:
    """Whether the interval of its change against the memory is above 0."""
    change = results.change(row, results.memory, metric) or {}
    return change.get("low") is not None and change["low"] > 0


def _as_good_and_as_cheap(results: Results, name: str, metric: str, rows: dict[str, dict]) -> list[str]:
    """Methods that keep the weights and beat or equal the best setting of the memory in both."""
    memories = [label for label in rows if results.kind(label) == "memory"]
    if not memories:
        return []
    best = max(memories, key=lambda label: value_of(rows[label], metric))
    found = [
        label
        for label, row in rows.items()
        if results.kind(label) in ("fixed", "frozen")
        and value_of(row, metric) >= value_of(rows[best], metric)
        and _is_as_cheap(results, row, rows[best])
    ]
    return [
        f"{name}: of the methods that keep the weights, at least as good and at least as cheap per item as "
        f"{best}, the best setting of the memory: {', '.join(found) or 'no method'}."
    ]


def _is_as_cheap(results: Results, row: dict, other: dict) -> bool:
    """By the seconds that were measured in turns with the frozen model's, where both were."""
    for mine, theirs in (
        (results.times_frozen(row), results.times_frozen(other)),
        (cost_of(row, "seconds"), cost_of(other, "seconds")),
    ):
        if mine is not None and theirs is not None:
            return mine <= theirs
    return False


def _without_retrieval(results: Results, name: str, metric: str, rows: dict[str, dict]) -> list[str]:
    said = []
    for label in (label for method in WITHOUT_RETRIEVAL for label in results.named(method) if label in rows):
        others = [other for other in (results.frozen, results.memory) if other in rows]
        own, *more = (numbers.change(results.change(rows[label], other, metric), metric).text for other in others)
        against = "".join(f"; against {results.memory} that is {one}" for one in more)
        said.append(f"{name}: {label}, which retrieves nothing, changes the frozen model by {own} points{against}.")
    return said


def _percent(metric: str) -> str:
    return " %" if numbers.is_share(metric) else ""


def _task_parts(results: Results, task: dict) -> list[Part]:
    parts: list[Part] = [Text(task["note"])] if task.get("note") else []
    parts.append(tables.result_table(results, task))
    if charts := plots.cost_plots(results, task) + plots.harm_plots(results, task):
        parts.append(Charts(charts))
    if task.get("off"):
        parts.append(tables.off_table(results, task))
    parts += tables.subject_tables(results, task)
    parts.append(Folded("Cost in parts", [tables.cost_table(results, task)]))
    effects = tables.effect_table(results, task)
    if effects.rows:
        parts.append(Folded("What each method changed", [effects]))
    if references := task.get("references"):
        parts.append(Folded("References", [Points(_references(references))]))
    return parts


def _references(references: dict) -> list[str]:
    counted = [f"{references[name]:,} {what}" for name, what in _COUNTED.items() if references.get(name) is not None]
    said = [f"{', '.join(counted)}."] if counted else []
    if text := references.get("removed_text"):
        said.append(str(text))
    elif references.get("removed") is not None:
        said.append(f"{references['removed']:,} references equal or nearly equal a test item and were removed.")
    if digest := references.get("digest"):
        said.append(f"Digest: {digest}.")
    return said


def _settings(results: Results) -> list[str]:
    said = []
    for name in ("model", "settings", "machine"):
        values = results.content.get(name) or {}
        listed = ", ".join(f"{key} {'none' if value is None else value}" for key, value in values.items())
        if listed:
            said.append(f"{name}: {listed}")
    return said
