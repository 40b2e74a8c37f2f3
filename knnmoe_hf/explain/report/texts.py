"""What a memory does on text, as figures: experts that changed, distances, gain against harm, recalled rows."""

from collections.abc import Sequence

import torch

from knnmoe_hf.calibration.sweep import open_sweep, sweep
from knnmoe_hf.explain.pieces import Pieces
from knnmoe_hf.explain.references import ReferenceTexts
from knnmoe_hf.explain.report.rows import BINS, histogram, own_distances, passage, quantile, similarity_line
from knnmoe_hf.explain.report.use import LayerUse, TextUse
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.measurements import ConfidenceBin
from knnmoe_hf.memory.sweep import SweepPoint
from knnmoe_hf.pages.axes import Axis
from knnmoe_hf.pages.document import Cell, Column, Table
from knnmoe_hf.pages.figures import Curves, Heat, Line
from knnmoe_hf.pages.numbers import NOT_MEASURED, amount, plain

_MOST_ROWS = 15  # that are listed
_FEWEST = 5  # tokens of which a mean is shown
_LEAST = 1e-9  # of confidence times weight: rows below were not recalled
_SHARES = [place / 20 for place in range(21)]
_DISTANCE = Axis("squared distance to a neighbour, d / s")
_SHARE = Axis("areas: neighbours; lines: confidence")
_HARM, _GAIN = Axis("harm on other text, nats per token"), Axis("gain, nats per token")
_CONFIDENCE = Axis("mean confidence of a token's layers")


def expert_map(texts: Sequence[TextUse], is_domain: bool) -> Heat | None:
    """By how much each expert's mean weight changed; None without text of this kind."""
    by_layer = _joined(texts, is_domain)
    if not by_layer:
        return None
    changes = [(use.mixed - use.own).tolist() for use in by_layer.values()]
    of = "text of the domain" if is_domain else "other text"
    note = f"On {_names(texts, is_domain)}: the mean weight that the memory routes with, less that of the gate's own."
    return Heat(
        f"Experts that gain or lose weight on {of}", "layer", "expert", list(by_layer), changes, "weight", note
    )


def layer_table(memory: RoutingMemory, texts: Sequence[TextUse]) -> Table | None:
    """How far each layer opens and how much it changes; None where nothing is known."""
    inside, outside = _joined(texts, True), _joined(texts, False)
    measured = memory.card_data.measured
    built = {one.layer: one for one in (measured.layers if measured is not None else ())}
    if not (inside or outside or built):
        return None
    groups: list[tuple[str, dict[int, Cell]]] = []
    if built:
        groups.append(("confidence when built, on held-out references", _cells(built, "references")))
        groups.append(("on background text", _cells(built, "background")))
    for name, by_layer in (("on text of the domain", inside), ("on other text", outside)):
        if by_layer:
            means = {layer: amount(use.confidence.double().mean().item()) for layer, use in by_layer.items()}
            changes = {layer: amount(use.divergence) for layer, use in by_layer.items()}
            groups += [(f"confidence {name}", means), (f"divergence {name}", changes)]
    columns = [Column("layer", False), *(Column(name) for name, _ in groups)]
    lines = [[Cell(str(layer)), *(cells.get(layer, NOT_MEASURED) for _, cells in groups)] for layer in memory.layers]
    note = "Confidence and divergence are means over tokens. "
    note += "Divergence is that of Jensen and Shannon between the weights before and after, in nats, 0 to 0.693."
    return Table("How far each layer opens, and how much it changes", columns, lines, note)


def _cells(built: dict, name: str) -> dict[int, Cell]:
    return {layer: amount(getattr(one, name)) for layer, one in built.items()}


def distance_figure(memory: RoutingMemory, layer: int, texts: Sequence[TextUse]) -> Curves:
    """Distances in a layer, of references and of texts, and the confidence that there is at each."""
    groups = {"references to one another": ("fixed", own_distances(memory, layer))}
    uses: list[tuple[str, str, LayerUse]] = []
    for name, kind, is_domain in (("text of the domain", "memory", True), ("other text", "trained", False)):
        if (use := _joined(texts, is_domain).get(layer)) is not None:
            groups[name] = (kind, use.distances.flatten())
            uses.append((name, kind, use))
    finite = [of[of.isfinite()] for _, of in groups.values()]
    top = max([1e-6, *(quantile(of, 0.99) for of in finite if len(of))])
    lines = []
    for (name, (kind, _)), of in zip(groups.items(), finite):
        if len(of):
            bins = histogram(of, top)
            highest = max(share for _, share in bins)
            lines.append(Line(name, kind, [(x, share / highest) for x, share in bins], style="area"))
    lines.append(similarity_line(memory, layer, top))
    lines += [_confidences(name, kind, use, top) for name, kind, use in uses]
    note = "s is the layer's median distance. Areas are scaled to the same height. " + (
        "Markers are the mean confidence of the tokens, five or more, whose neighbours are about that far away."
        if uses
        else "The confidence that is used is the similarity, times how far the layer opens."
    )
    return Curves(f"Layer {layer}", _DISTANCE, _SHARE, lines, note=note)


def _confidences(name: str, kind: str, use: LayerUse, top: float) -> Line:
    near = use.distances.mean(dim=1)
    places = (near / top * BINS / 2).nan_to_num(nan=BINS, posinf=BINS).floor().clamp(0, BINS // 2 - 1).long()
    points, told = [], []
    for place in places.unique().tolist():
        here = places == place
        if int(here.sum()) < _FEWEST:
            continue
        mean, x = use.confidence[here].double().mean().item(), (place + 0.5) * top / (BINS // 2)
        points.append((x, mean))
        told.append(f"{name}: {int(here.sum()):,} tokens at distance about {plain(x)} s, confidence {plain(mean)}")
    return Line(f"confidence on {name}", kind, points, told, "marks")


def sweep_figure(memory: RoutingMemory, texts: Sequence[TextUse]) -> Curves | None:
    """Gain against harm for a sweep of the confidence, and where the memory is; None if nothing is known."""
    options = memory.config.retrieval_options()
    stats = {layer: rows.stats for layer, rows in memory.layers.items() if rows.stats is not None}
    is_calibrated = bool(stats) and options.confidence == "calibrated"
    record, lines = memory.calibration, []
    routes = options.recall != "next_tokens"  # otherwise the threshold of the routing changes nothing
    if routes and record is not None and record.sweep:
        lines.append(_swept("expected when it was calibrated", "fixed", record.sweep))
        lines += _marked("its threshold", "fixed", record.sweep, record.threshold)
    domain, kinds = _observations(texts)
    if domain is not None and kinds:
        if routes and is_calibrated:
            points = sweep(stats, domain, kinds)
            lines.append(_swept("expected on the texts of this page", "memory", points))
            lines += _marked("its threshold on these texts", "memory", points, next(iter(stats.values())).threshold)
        elif routes:
            lines.append(_opened("open to a share of its similarity", open_sweep(domain, kinds, _SHARES)))
    if {text.is_domain for text in texts} == {True, False}:
        lines.append(_measured(texts))
    if not lines:
        return None
    note = (
        "Each marker is one setting of the confidence, and says which: where the dashed lines cross the memory is "
        "closed, and along the curve it opens. Gain and harm are expected from passes with the memory closed, half "
        "open and open"
    )
    note += " in the routing, apart from recalled next tokens." if options.recall == "both" else "."
    return Curves("Gain against harm for a sweep of the confidence", _HARM, _GAIN, lines, ((0.0,), (0.0,)), note)


def _swept(name: str, kind: str, points: Sequence[SweepPoint]) -> Line:
    told = [_of_threshold(point) for point in points]
    return Line(name, kind, [(point.harm, point.gain) for point in points], told, "marks")


def _of_threshold(point: SweepPoint) -> str:
    said = f"threshold {point.threshold:g}: gain {plain(point.gain)} nats per token on text of the domain"
    return f"{said}, harm {plain(point.harm)} on other text"


def _marked(name: str, kind: str, points: Sequence[SweepPoint], threshold: float | None) -> list[Line]:
    """The point of a threshold that may lie between those of the sweep."""
    if threshold is None:
        return []
    found = _between(points, threshold)
    return [Line(name, kind, [(found.harm, found.gain)], [f"{name}, {_of_threshold(found)}"], "ring")]


def _between(points: Sequence[SweepPoint], threshold: float) -> SweepPoint:
    after = next((one for one in points if one.threshold >= threshold), points[-1])
    before = next((one for one in reversed(points) if one.threshold <= threshold), points[0])
    span = after.threshold - before.threshold
    share = (threshold - before.threshold) / span if span > 0 else 0.0
    gain = before.gain + share * (after.gain - before.gain)
    return SweepPoint(float(threshold), gain, before.harm + share * (after.harm - before.harm))


def _opened(name: str, points: Sequence[tuple[float, float, float]]) -> Line:
    told = [
        f"open to {share:.2f} of its similarity: gain {plain(gain)} nats per token, harm {plain(harm)}"
        for share, gain, harm in points
    ]
    return Line(name, "memory", [(harm, gain) for _, gain, harm in points], told, "marks")


def _measured(texts: Sequence[TextUse]) -> Line:
    """Where the memory is as it was measured, with all of its options."""
    gains = [-text.comparison.change().mean for text in texts if text.is_domain]
    harms = [text.comparison.change().mean for text in texts if not text.is_domain]
    spot = (sum(harms) / len(harms), sum(gains) / len(gains))
    said = f"measured with the memory as it is: gain {plain(spot[1])} nats per token, harm {plain(spot[0])}"
    return Line("measured with the memory as it is", "trained", [spot], [said], "point")


def _observations(texts: Sequence[TextUse]) -> tuple:
    domain = [text.observation for text in texts if text.is_domain and text.observation is not None]
    kinds = {text.name: text.observation for text in texts if not text.is_domain and text.observation is not None}
    return (domain[0] if domain else None), kinds


def bins_figure(memory: RoutingMemory) -> Curves | None:
    """What the memory gains on tokens of which it is more or less confident, as measured when it was built."""
    measured = memory.card_data.measured
    named = {"held-out references": ("memory", "references"), "background text": ("trained", "background")}
    lines = [
        _bins(name, kind, getattr(measured, field))
        for name, (kind, field) in named.items()
        if measured is not None and getattr(measured, field)
    ]
    if not lines:
        return None
    note = "Measured when the memory was built; above 0 it helps."
    return Curves("Gain on tokens of rising confidence", _CONFIDENCE, _GAIN, lines, ((), (0.0,)), note)


def _bins(name: str, kind: str, bins: Sequence[ConfidenceBin]) -> Line:
    told = [
        f"{name}: {one.tokens:,} tokens of confidence {plain(one.confidence)}, gain {plain(-one.change)} nats a token"
        for one in bins
    ]
    return Line(name, kind, [(one.confidence, -one.change) for one in bins], told, "marks")


def recalled_table(memory: RoutingMemory, texts: Sequence[TextUse], tokenizer=None) -> tuple[Table, str] | None:
    """The rows that text of the domain recalls most, and a sentence on those that it never does; None without it."""
    by_layer = _joined(texts, True)
    if not by_layer:
        return None
    total = sum(use.recalled for use in by_layer.values())
    tokens = sum(len(use.confidence) for use in by_layer.values())
    most = total.argsort(descending=True, stable=True)[:_MOST_ROWS]
    references = ReferenceTexts(memory, tokenizer)
    pieces, lines = Pieces(references.tokenizer), []
    for row in (one for one in most.tolist() if total[one] > _LEAST):
        known = references.of(row)
        example = "n/a" if known.example is None else str(known.example)
        share = total[row].item() / tokens
        lines.append(
            [Cell(str(row)), Cell(example), Cell(f"{100 * share:.3f} %", share), Cell(passage(known, pieces))]
        )
    columns = [Column("row", False), Column("example"), Column("share of the routing"), Column("reference", False)]
    note = "The share is the row's weight times the confidence, in the mean over tokens and layers."
    never = int((total <= _LEAST).sum())
    said = (
        f"{never:,} of {len(total):,} rows ({100 * never / len(total):.1f} %) are never recalled by the "
        f"{tokens // len(by_layer):,} tokens of {_names(texts, True)}; another text may need them."
    )
    return Table(f"Rows that {_names(texts, True)} recalls most", columns, lines, note), said


def _names(texts: Sequence[TextUse], is_domain: bool) -> str:
    return ", ".join(text.name for text in texts if text.is_domain == is_domain)


def _joined(texts: Sequence[TextUse], is_domain: bool) -> dict[int, LayerUse]:
    """What the memory did on all texts of a kind, by layer."""
    found: dict[int, list[LayerUse]] = {}
    for text in texts:
        for layer, use in text.layers.items() if text.is_domain == is_domain else ():
            found.setdefault(layer, []).append(use)
    return {layer: _of_all(uses) for layer, uses in sorted(found.items())}


def _of_all(uses: Sequence[LayerUse]) -> LayerUse:
    if len(uses) == 1:
        return uses[0]
    counts = torch.tensor([len(use.confidence) for use in uses], dtype=torch.float64)
    shares = (counts / counts.sum()).tolist()
    return LayerUse(
        torch.cat([use.distances for use in uses]),
        torch.cat([use.confidence for use in uses]),
        sum(share * use.own for share, use in zip(shares, uses)),
        sum(share * use.mixed for share, use in zip(shares, uses)),
        sum(share * use.divergence for share, use in zip(shares, uses)),
        sum(use.recalled for use in uses),
    )
