"""
The page `effect.html`: gain against harm, to be read by pointing, and the methods side by side.

It has the settings that were measured after references of every kind; means over fewer kinds stand in `effect.md`.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.effect.figures import Cells, Point, compared_kinds, measured_everywhere, points, ranked
from benchmarks.effect.settings import BOTH, COMPETITORS, DEFAULT, KNN_LM, LABS, MAIN, SEEDS, TOKENS
from benchmarks.texts import REFERENCES, WINDOW
from knnmoe_hf.evaluation import Change
from knnmoe_hf.files import replacing
from knnmoe_hf.pages.axes import Axis
from knnmoe_hf.pages.charts import bar
from knnmoe_hf.pages.document import Cell, Charts, Column, Document, Section, Table
from knnmoe_hf.pages.drawings import chart_of
from knnmoe_hf.pages.figures import Curves, Line
from knnmoe_hf.pages.numbers import change, plain, size
from knnmoe_hf.pages.page import to_html

_LEAD = (
    f"Changes of the NLL against the frozen model, in nats per token, on the same windows of {WINDOW} tokens, after "
    f"{REFERENCES} windows of reference text. effect.md has every table, and says how all was measured."
)
_HARM, _GAIN = Axis("harm on other text, nats per token"), Axis("gain in the domain, nats per token")
_OWN = {DEFAULT.name: "memory", TOKENS.name: "fixed", BOTH.name: "frozen"}  # and the colours of their rings


def write_page(results: Path, cells: Cells) -> None:
    """Writes `effect.html`."""
    page = to_html(document_of(cells))
    with replacing(results / "effect.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def document_of(cells: Cells) -> Document:
    """The page; labs of which nothing was measured are left out."""
    labs = [lab for lab in LABS if any(key[0] == lab for key in cells)]
    kinds = compared_kinds(cells, labs)
    sections = [_of_lab(lab, measured_everywhere(points(cells, lab, kinds, SEEDS[:1]))) for lab in labs]
    footer = f"References are of {', '.join(kinds)}, seed {SEEDS[0]}. Written by python -m benchmarks.effect.report."
    return Document("What a routing memory gains and costs, beside other methods", _LEAD, sections, footer)


def _of_lab(lab: str, by_name: dict[str, Point]) -> Section:
    found = list(by_name.values())
    groups = {
        "memories": ("memory", ranked(found)),
        "kNN-LM": ("fixed", [point for point in found if point.group == KNN_LM]),
        "fine-tuning and LoRA": ("trained", [point for point in found if point.group == COMPETITORS]),
    }
    lines = [_line(name, kind, some) for name, (kind, some) in groups.items()]
    lines += [_line(name, kind, [by_name[name]], "ring") for name, kind in _OWN.items() if name in by_name]
    note = (
        "Each marker is a setting. The rings are the memory as it is used by default, and with recalled next tokens."
    )
    figure = Curves(f"{LABS[lab]}: gain against harm", _HARM, _GAIN, lines, ((0.0,), (0.0,)), note)
    return Section(LABS[lab], [Charts([chart_of(figure)]), _table(lab, by_name)])


def _line(name: str, kind: str, some: Sequence[Point], style: str = "point") -> Line:
    told = [
        f"{p.name}: gain {plain(p.gain)} nats per token, harm {plain(p.harm)}, {size(p.nbytes).text}" for p in some
    ]
    return Line(name, kind, [(point.harm, point.gain) for point in some], told, style)


def _table(lab: str, found: dict[str, Point]) -> Table:
    shown = [found[setting.name] for setting in MAIN if setting.name in found]
    extent = max((abs(point.gain) for point in shown), default=0.0) or 1.0
    columns = [Column("method", False), Column("change in the domain"), Column("gain", is_picture=True)]
    columns += [
        Column("change on other text"),
        Column("shipped"),
        Column("seconds to make"),
        Column("removable", False),
    ]
    rows = [
        [
            Cell(point.name),
            _changed(point.nll),
            Cell("", picture=bar(point.gain, *_bounds(point.nll), extent)),
            _changed(point.off_nll),
            size(point.nbytes),
            Cell(f"{point.seconds:.0f}", point.seconds),
            Cell("yes" if point.keeps else "no"),
        ]
        for point in shown
    ]
    return Table(f"{LABS[lab]}: the methods side by side", columns, rows, "Below 0 helps; with a 95 % interval.")


def _changed(of: Change) -> Cell:
    return change({"mean": of.mean, "low": of.low, "high": of.high}, "loglikelihood", higher_is_better=False)


def _bounds(of: Change) -> tuple[float | None, float | None]:
    return (None, None) if of.low is None else (-of.high, -of.low)
