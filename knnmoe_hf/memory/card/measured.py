"""What was measured, for a card: a table of texts, a table of layers, and the results as the Hub reads them."""

import math

from huggingface_hub import EvalResult

from knnmoe_hf.memory.card.words import change, code, perplexity, size
from knnmoe_hf.memory.data import MemoryData
from knnmoe_hf.memory.measurements import Measurements, one_line
from knnmoe_hf.memory.verdict import NllChange

REFERENCES = "held-out references"
_SOURCES = {"given": "given by its maker", "this machine": "found on its maker's machine"}
_TEXTS = """\
| text | windows | perplexity without | with the memory | change of the NLL, nats per token [95 % interval] |
|---|---|---|---|---|
"""
_TABLE_SAYS = """\

NLL is the mean of -log p(token), perplexity is exp(NLL); a change below 0 helps. {references}{elsewhere}{evaluations}\
An interval is a bootstrap over windows of text."""
_REFERENCES_SAY = """\
The held-out references are of the same data set, but neither they nor their neighbours in it were in the memory when
they were scored. """
_ELSEWHERE_SAYS = "Background text is what the memory should leave alone; the calibration has not read these windows. "
_EVALUATIONS_SAY = "Windows that overlap the references were left out of evaluation text ({left_out}). "


def texts(memory: MemoryData) -> list[tuple[str, str, float | None, NllChange]]:
    """Each text that was scored: its name in words, its kind, the mean NLL without the memory, and the change."""
    found, measured = memory.verdict, memory.card_data.measured or Measurements()
    if found is None:
        return []
    rows = [(code(one.name), "evaluation", one.base_nll, one.change) for one in measured.evaluations]
    if found.gain is not None:
        rows.append((REFERENCES, "references", measured.base_nll, found.gain))
    for kind, cost in sorted(found.elsewhere.items()):
        name = f"background text: {code(kind)}, {_SOURCES[cost.source]}"
        rows.append((name, "background", measured.elsewhere_nll.get(kind), cost))
    return rows


def evaluation(memory: MemoryData) -> str:
    """The table of all texts, and what its rows are; nothing if none was scored."""
    rows = texts(memory)
    if not rows:
        return ""
    table = _TEXTS + "\n".join(
        f"| {name} | {of.windows:,} | {perplexity(base)} | {perplexity(_after(base, of))} | {change(of)} |"
        for name, _, base, of in rows
    )
    kinds = {kind for _, kind, _, _ in rows}
    evaluations = memory.card_data.measured.evaluations if memory.card_data.measured else []
    left_out = ", ".join(f"{code(one.name)}: {one.left_out:,}{_overlap(one.overlap)}" for one in evaluations)
    said = _TABLE_SAYS.format(
        references=_REFERENCES_SAY if "references" in kinds else "",
        elsewhere=_ELSEWHERE_SAYS if "background" in kinds else "",
        evaluations=_EVALUATIONS_SAY.format(left_out=left_out) if evaluations else "",
    )
    return f"{table}\n{said}"


def _overlap(share: float | None) -> str:
    return "" if share is None else f"; of its runs of 8 tokens the references have {100 * share:.1f} %"


def _after(base: float | None, of: NllChange) -> float | None:
    return None if base is None else base + of.mean


def layers(memory: MemoryData) -> str:
    """The table of the layers: their size, and how far they open if that was measured."""
    measured = memory.card_data.measured
    known = {one.layer: (one.references, one.background) for one in (measured.layers if measured is not None else ())}
    columns = ["layer", "experts", "keys and values"]
    columns += ["confidence on held-out references", "on background text"] if known else []
    lines = [columns, ["---"] * len(columns)]
    for layer, rows in memory.layers.items():
        means = known.get(layer, (None, None)) if known else ()
        shown = ["n/a" if mean is None else f"{mean:.3f}" for mean in means]
        lines.append([str(layer), str(rows.num_experts), size(rows.nbytes), *shown])
    said = "How far each layer opens was not measured with these rows and options."
    if known:
        said = "The mean confidence over tokens: at 0 the layer is closed, at 1 wide open."
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", said])


def results(memory: MemoryData) -> list[EvalResult]:
    """The results of `model-index`: of each text, perplexity without and with the memory, and the NLL's change."""
    found, tags = [], memory.card_data.dataset_tags
    for name, kind, base, of in texts(memory):
        of_references = kind == "references" and len(tags) == 1
        text = dict(
            task_type="text-generation",
            dataset_name=(plain := one_line(name.replace("`", ""))),
            dataset_config=plain,  # results of one type and configuration would be taken for those of one text
            dataset_type=tags[0] if of_references else "custom",
        )
        if base is not None:
            numbers = {"without the memory": base, "with the memory": base + of.mean}
            for how, nll in numbers.items():
                value = round(math.exp(min(nll, 99)), 4)
                found.append(
                    EvalResult(**text, metric_type="perplexity", metric_name=f"Perplexity {how}", metric_value=value)
                )
        bounds = "" if of.low is None else f", 95 % interval {of.low:+.4f} to {of.high:+.4f}"
        what = f"Change of the NLL by the memory, nats per token{bounds}, {of.windows} windows"
        found.append(EvalResult(**text, metric_type="nll", metric_name=what, metric_value=round(of.mean, 6)))
    return found
