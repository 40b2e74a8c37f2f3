"""A page on a memory: what it holds, what it does, and whether to trust it, as a document of `knnmoe_hf.pages`."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from knnmoe_hf.explain.report import rows, texts
from knnmoe_hf.explain.report.use import TextUse
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.audit import Audit, audit
from knnmoe_hf.memory.card.base_name import published
from knnmoe_hf.memory.card.measured import texts as measured_texts
from knnmoe_hf.memory.verdict import NllChange
from knnmoe_hf.pages.charts import bar
from knnmoe_hf.pages.document import Cell, Charts, Column, Document, Folded, Part, Points, Section, Table, Text
from knnmoe_hf.pages.drawings import chart_of
from knnmoe_hf.pages.figures import Figure
from knnmoe_hf.pages.numbers import change, size
from knnmoe_hf.version import __version__


@dataclass(frozen=True)
class Report:
    """
    What is known of a memory.

    Attributes:
        memory: that the page is on.
        name: of the memory, which the page and the commands on it show; no path.
        texts: what it does on text; of text of its domain, and of other text, there may be none.
        map_layer: whose keys are shown on a map; the last layer if None.
        tokenizer: in place of the memory's own.
    """

    memory: RoutingMemory
    name: str
    texts: Sequence[TextUse] = field(default=())
    map_layer: int | None = None
    tokenizer: object = None

    @property
    def layer(self) -> int:
        """The layer of the map, and of the first plot of distances."""
        return max(self.memory.layers) if self.map_layer is None else self.map_layer

    @property
    def domain(self) -> list[TextUse]:
        """Those on which the memory should help."""
        return [text for text in self.texts if text.is_domain]

    @property
    def other(self) -> list[TextUse]:
        """Those on which it should do nothing."""
        return [text for text in self.texts if not text.is_domain]

    def figures(self) -> dict[str, Figure]:
        """The figures that there is data for, by a name for a file."""
        memory, found = self.memory, self.texts
        known = rows.reference_nll(memory)
        by_name: dict[str, Figure | None] = {
            "sweep": texts.sweep_figure(memory, found),
            "confidence": texts.bins_figure(memory),
            "experts": texts.expert_map(found, True),
            "experts-other": texts.expert_map(found, False),
            "values": rows.value_map(memory),
            "references": None if known is None else known[1],
            "keys": rows.key_map(memory, self.layer, self.tokenizer),
        }
        by_name |= {f"distances-{layer}": texts.distance_figure(memory, layer, found) for layer in memory.layers}
        return {name: figure for name, figure in by_name.items() if figure is not None}


def document_of(report: Report) -> Document:
    """
    The page.

    Raises:
        ValueError: for a memory without rows, or a `map_layer` that it does not have.
    """
    memory = report.memory
    if not len(memory):
        raise ValueError("this memory has no rows, so that there is nothing to report on: build it anew.")
    if report.layer not in memory.layers:
        raise ValueError(f"layer {report.layer} is not in this memory: choose one of {list(memory.layers)}.")
    figures, audited = report.figures(), audit(memory)
    sections = [
        Section("Does it help?", list(_help(report))),
        Section("Gain against harm", list(_gain(report, figures))),
        Section("Layers and experts that changed most", list(_changes(report, figures))),
        Section("Distance and confidence", list(_distances(report, figures))),
        Section("Rows and bytes", [rows.sizes(memory)]),
        Section("References before and after", list(_references(report, figures))),
        Section("A map of the keys", [Charts([chart_of(figures["keys"])])]),
        Section("Rows recalled most, and never", list(_recalled(report))),
        Section("Audit", list(_audit(report, audited))),
    ]
    warnings = [_suspicious(audited)] if audited.findings else []
    return Document(
        f"The memory {report.name}", _lead(memory), sections, f"Made by knnmoe_hf {__version__}.", warnings
    )


def _lead(memory: RoutingMemory) -> str:
    base = published(memory).config.base_model_name_or_path  # never a path of the machine
    references = 0 if memory.provenance is None else len(memory.provenance.example_ids.unique())
    said = f"{len(memory):,} rows in each of {len(memory.layers)} layers, {size(memory.nbytes).text}"
    said += f", of {references:,} references" if references else ""
    return said + (f", for {base}." if base else ".")


def _missing(report: Report, what: str, *options: str) -> Text:
    """What a panel lacks, and the command that gives it beside what there is."""
    there = {"--dataset TEXT": report.domain, "--ordinary-dataset OTHER-TEXT": report.other}
    words = [given for given, texts in there.items() if texts or given.split()[0] in options]
    command = " ".join(["knnmoe report", shlex.quote(report.name), *words])
    return Text(f"{what}. To measure it:", "quiet", command)


def _help(report: Report) -> Iterator[Part]:
    memory = report.memory
    if memory.verdict is None:
        yield Text("Whether this memory helps was not measured when it was built, or not with its present options.")
    else:
        yield Points(memory.verdict.sentences())
    found = [(name.replace("`", ""), kind, base, of) for name, kind, base, of in measured_texts(memory)]
    now = [(text.name, "domain" if text.is_domain else "background", *_nll(text)) for text in report.texts]
    if found or now:
        yield _text_table(found, now)
    if not report.domain:
        yield _missing(report, "What it does on another text of its domain is not on this page", "--dataset")


def _nll(text: TextUse) -> tuple[float, NllChange]:
    of = text.comparison.change()
    return text.comparison.base.mean_nll, NllChange(of.mean, of.low, of.high, of.windows)


def _text_table(found: list, now: list) -> Table:
    both = [*found, *now]
    extent = max(abs(end) for *_, of in both for end in (of.mean, of.low, of.high) if end is not None) or 1.0
    columns = [Column("text", False), Column("measured", False), Column("windows"), Column("NLL without")]
    columns += [Column("change by the memory [95 %]"), Column("gain", is_picture=True)]
    lines = []
    for place, (name, _, base, of) in enumerate(both):
        shown = change({"mean": of.mean, "low": of.low, "high": of.high}, "loglikelihood", higher_is_better=False)
        bounds = (None, None) if of.low is None else (-of.high, -of.low)
        nll = Cell("n/a", tone="quiet") if base is None else Cell(f"{base:.3f}", base)
        when = "when built" if place < len(found) else "for this page"
        picture = Cell("", picture=bar(-of.mean, *bounds, extent))
        lines.append([Cell(name), Cell(when), Cell(f"{of.windows:,}", of.windows), nll, shown, picture])
    note = "NLL in nats per token; a change below 0 helps. The bar to the right is a gain, with its interval."
    return Table("NLL with the memory and without it", columns, lines, note)


def _gain(report: Report, figures: dict[str, Figure]) -> Iterator[Part]:
    found = [figures[name] for name in ("sweep", "confidence") if name in figures]
    if found:
        yield Charts([chart_of(one) for one in found])
    layers, is_calibrated = report.memory.layers.values(), report.memory.config.confidence == "calibrated"
    if "sweep" in figures and is_calibrated and all(one.stats is not None for one in layers):
        yield Text(
            "To set the confidence to a point of the curve, with its threshold as T:",
            command=_command(report, "adjust", "--threshold T"),
        )
    missing = "what the memory gains and costs at each confidence"
    if not (report.domain and report.other):
        known = "on other text than that of its calibration" if "sweep" in figures else "is not known"
        options = [] if report.domain else ["--dataset"]
        options += [] if report.other else ["--ordinary-dataset"]
        yield _missing(report, f"{missing[0].upper()}{missing[1:]} {known}", *options)


def _changes(report: Report, figures: dict[str, Figure]) -> Iterator[Part]:
    table = texts.layer_table(report.memory, report.texts)
    maps = [figures[name] for name in ("experts", "experts-other") if name in figures]
    if maps:
        yield Charts([chart_of(one) for one in maps])
    if table is not None:
        yield table
    if len(report.memory.layers) > 1:
        layers = " ".join(map(str, list(report.memory.layers)[-2:]))
        yield Text(
            "To keep only the layers that pay; these two are an example:",
            command=_command(report, "select", f"--layers {layers}"),
        )
    if not report.domain:
        yield _missing(report, "Which experts gain and lose weight is not known without text", "--dataset")
    yield Folded("What the rows store, by layer and expert", [Charts([chart_of(figures["values"])])], is_open=not maps)


def _distances(report: Report, figures: dict[str, Figure]) -> Iterator[Part]:
    layers = [report.layer, *(layer for layer in report.memory.layers if layer != report.layer)]
    charts = {layer: chart_of(figures[f"distances-{layer}"]) for layer in layers}
    yield Charts([charts[report.layer]])
    if len(layers) > 1:
        yield Folded("The other layers", [Charts([charts[layer] for layer in layers[1:]])])
    options = [] if report.domain else ["--dataset"]
    options += [] if report.other else ["--ordinary-dataset"]
    if options:
        kinds = {2: "of text of the domain and of other text", 1: "of text of the domain"}
        of = kinds[len(options)] if "--dataset" in options else "of other text"
        yield _missing(report, f"Distances {of} are not known", *options)


def _references(report: Report, figures: dict[str, Figure]) -> Iterator[Part]:
    known = rows.reference_nll(report.memory)
    if known is None:
        yield Text(
            "The NLL of the references is not in this memory: a memory that is built or saved with --save-provenance "
            "text has it.",
            "quiet",
        )
    else:
        yield Charts([chart_of(figures["references"])])
        yield known[0]


def _recalled(report: Report) -> Iterator[Part]:
    found = texts.recalled_table(report.memory, report.texts, report.tokenizer)
    if found is None:
        yield _missing(report, "Which rows are recalled is not known without text", "--dataset")
    else:
        yield from (Text(found[1]), found[0])


def _suspicious(audited: Audit) -> str:
    return (
        f"Suspicious: {audited.suspicious:,} of {audited.rows:,} rows, or numbers beside them, are not what an honest "
        "build leaves; see the audit at the end of this page."
    )


def _audit(report: Report, audited: Audit) -> Iterator[Part]:
    if not audited.findings:
        yield Text(f"Nothing suspicious in {audited.rows:,} rows.", "good")
        yield Text("What only the base model can tell is not seen here: a gain and a harm are measured on text.")
        return
    places = ["" if one.layer is None else f"layer {one.layer}: " for one in audited.findings]
    yield Points([f"{place}{one.sentence} ({one.check})" for place, one in zip(places, audited.findings)])
    if any(not bool(one.rows.any()) for one in audited.findings):
        yield Text(
            "This is not in single rows, so that removing some does not mend it: do not attach this memory.", "bad"
        )
    elif audited.examples:
        of = f"{len(audited.examples):,} of its references have such rows"
        yield Text(f"{of}. To take them out:", command=_command(report, "remove", "--suspicious"))
    else:
        yield Text("Which references the rows came from was left out: do not attach this memory.", "bad")


def _command(report: Report, name: str, option: str) -> str:
    """A command that makes another memory of this one."""
    output = shlex.quote(f"{report.name.rpartition('/')[2]}-{name}")
    return f"knnmoe {name} {shlex.quote(report.name)} {option} --output {output}"
