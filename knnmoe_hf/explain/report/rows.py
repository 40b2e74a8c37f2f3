"""What a memory alone tells of itself: sizes, the references' NLL, values, distances, and a map of keys."""

import math

import torch
from torch import Tensor

from knnmoe_hf.explain.pieces import Pieces, shown
from knnmoe_hf.explain.references import Reference, ReferenceTexts
from knnmoe_hf.lookup.blocks import blocks
from knnmoe_hf.lookup.confidence import rbf_rate
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.pages.axes import Axis
from knnmoe_hf.pages.document import Cell, Column, Table
from knnmoe_hf.pages.figures import Cloud, Curves, Dot, Heat, Line
from knnmoe_hf.pages.numbers import amount, plain, size

BINS = 30
_DOTS = 500  # of a map
_BROKEN = "\ufffd"  # what a decoder writes for bytes that are not a letter
_MEANS = {
    "assignment": ("mean stored weight of each expert, less an equal share", "weight"),
    "logits": ("mean stored logit of each expert, less the mean of all", "logits"),
    "delta": ("mean change of each expert's logit", "logits"),
}
_COLOUR = "The colour is by how much the NLL of the row's target fell when it was optimised. "
_NLL, _TOKENS = Axis("NLL of a reference's target, nats"), Axis("share of the rows")


def sizes(memory: RoutingMemory) -> Table:
    """Rows and bytes of each layer."""
    numbers = ("experts", "keys", "dimensions of a key", "values", "all")
    columns = [Column("layer", False), *map(Column, numbers)]
    lines = [
        [
            Cell(str(layer)),
            Cell(str(rows.num_experts)),
            size(rows.key_codes.nbytes),
            Cell(str(rows.key_codes.shape[1])),
            size(rows.values.nbytes),
            size(rows.nbytes),
        ]
        for layer, rows in memory.layers.items()
    ]
    note = "All holds the codecs and a sample of distances too; the references' text and a search index are apart."
    return Table(f"{len(memory):,} rows in each layer, {size(memory.nbytes).text} in all", columns, lines, note)


def reference_nll(memory: RoutingMemory) -> tuple[Table, Curves] | None:
    """NLL of the references' targets before and after optimisation; None where the memory does not know it."""
    source = memory.provenance
    if source is None or not bool((source.nll_before != 0).any()):
        return None
    before, after = source.nll_before.double(), source.nll_after.double()
    lines = [
        [Cell(name), *map(amount, (of.mean().item(), quantile(of, 0.5), quantile(of, 0.9)))]
        for name, of in (("frozen routing", before), ("stored routing", after), ("change", after - before))
    ]
    columns = [Column("routing", False), *(Column(name) for name in ("mean", "median", "9 of 10 are below"))]
    better = (after < before).double().mean().item()
    note = (
        f"The NLL fell for {100 * better:.1f} % of the rows. The stored routing was optimised for just these targets, "
        "so that this says what a perfect recall would be worth, and not what the memory gains on other text."
    )
    top = max(quantile(before, 0.99), quantile(after, 0.99), 1e-6)
    drawn = [
        Line("frozen routing", "trained", histogram(before, top), style="area"),
        Line("stored routing", "memory", histogram(after, top), style="area"),
    ]
    said = f"Each bin has {plain(top / BINS)} nats; the last one holds all above."
    curves = Curves("How hard the references are", _NLL, _TOKENS, drawn, note=said)
    return Table("NLL in nats", columns, lines, note), curves


def histogram(values: Tensor, top: float) -> list[tuple[float, float]]:
    """`(middle of the bin, share)` of values from 0 to `top`; what is larger is in the last bin."""
    places = (values.double() / top * BINS).floor().clamp(0, BINS - 1).long()
    shares = places.bincount(minlength=BINS).double() / max(len(values), 1)
    return [((place + 0.5) * top / BINS, share) for place, share in enumerate(shares.tolist())]


def quantile(values: Tensor, share: float) -> float:
    """Of values (n,), n at least 1; of a million of them where there are more."""
    return values[:: max(1, len(values) // 10**6)].double().quantile(share).item()


def value_map(memory: RoutingMemory) -> Heat:
    """The mean value of each expert in each layer."""
    space = memory.origin.options["value_space"]
    name, unit = _MEANS[space]
    means = [_mean_value(rows.values, space) for rows in memory.layers.values()]
    note = f"The values of this memory are of value_space={space!r}: {name}, in the mean of the layer's rows."
    return Heat(f"Values: {name}", "layer", "expert", list(memory.layers), means, unit, note)


def _mean_value(values, space: str) -> list[float]:
    mean = sum(block.double().sum(dim=0) for block in blocks(values)) / max(len(values), 1)
    return (mean if space == "delta" else mean - mean.mean()).tolist()


def own_distances(memory: RoutingMemory, layer: int) -> Tensor:
    """(S * K,) from rows to their nearest rows of other examples, in units of the layer's scale."""
    rows = memory.layers[layer]
    return rows.distances.flatten() / rows.scale


def similarity_line(memory: RoutingMemory, layer: int, top: float) -> Line:
    """The similarity of one neighbour at each distance, in units of the layer's scale."""
    options, scale = memory.config.retrieval_options(), memory.layers[layer].scale
    rate = rbf_rate(scale, options.gamma) * scale
    points = [(place * top / 60, math.exp(-rate * place * top / 60)) for place in range(61)]
    return Line("similarity of a neighbour, exp(-gamma d / s)", "frozen", points)


def key_map(memory: RoutingMemory, layer: int, tokenizer=None) -> Cloud:
    """Some keys of a layer on their two principal axes, each with its reference's text."""
    keys, source = memory.layers[layer].stored_keys, memory.provenance
    sample = torch.linspace(0, len(keys) - 1, min(len(keys), _DOTS), dtype=torch.float64).round().long()
    table = keys.floats(sample).double()
    centred = table - table.mean(dim=0)
    _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
    flat = centred @ axes[:2].T
    if flat.shape[1] < 2:
        flat = torch.nn.functional.pad(flat, (0, 2 - flat.shape[1]))
    kept = (lengths[:2].square().sum() / lengths.square().sum().clamp_min(1e-30)).item()
    texts = ReferenceTexts(memory, tokenizer)
    pieces = Pieces(texts.tokenizer)
    gains = torch.zeros(len(memory)) if source is None else source.nll_before - source.nll_after
    dots = [
        Dot(*place, gains[row].item(), _told(texts.of(row), gains[row].item(), pieces))
        for row, place in zip(sample.tolist(), flat.tolist())
    ]
    of = f"{len(dots):,} of {len(memory):,} keys, evenly spread" if len(dots) < len(memory) else "All keys"
    note = (
        f"{of}, on the two axes along which they differ most, which have {100 * kept:.0f} % of their variance. "
        f"{_COLOUR if bool((gains != 0).any()) else ''}"
    )
    return Cloud(f"Keys of layer {layer} in two dimensions", dots, "nats", f"{note}{texts.sentence()}")


def _told(reference: Reference, gain: float, pieces: Pieces) -> str:
    known = f"; its target's NLL fell by {plain(gain)} nats" if gain else ""
    return f"{place_of(reference)}{known}: {passage(reference, pieces)}"


def place_of(reference: Reference) -> str:
    """Where a row comes from, as far as that is known."""
    said = f"row {reference.row}"
    if reference.example is not None:
        said += f", example {reference.example}"
    return said if reference.position is None else f"{said}, position {reference.position}"


def passage(reference: Reference, pieces: Pieces) -> str:
    """
    The text around a row's token, which is in brackets, and in bytes where it is a part of a letter. Where there is no
    text, the token's id, or a word that there is none.
    """
    if reference.token is None:
        return "no text" if reference.token_id is None else f"token {reference.token_id}"
    token = pieces.of(reference.token_id).text if _BROKEN in reference.token else reference.token
    before, after = (part.strip(_BROKEN) for part in (reference.before, reference.after))  # the rest of the letter
    return shown(f"{before}⟦{token}⟧{after}").replace("\n", "↵")
