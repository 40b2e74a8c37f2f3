"""The limits of an audit: which figures of a layer an honest memory does not have, and which rows cause them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.memory.audit import keys, values
from knnmoe_hf.memory.data import MemoryData

_ATTRACTED = 0.25  # share of queries; in memories of the lab models no row attracts more than 0.1
_TIMES_EXPECTED = 8.0  # and so many times a row's fair share, which is large where there are few rows
_RESIDUAL = 4.5  # times the median row's; at most 3.7 there
_CROWDED = 0.3  # share of queries; at most 0.18 there
_SHARPEST, _SHARP = 2.0, 1.6  # at most 1.5 there; where one row is above the first, all above the second are meant
_CONTRARY = 0.035  # share of rows; at most 0.013 there
_NORM = 4.0  # times the median distance from the mean key; at most 2 there
_REPEATED, _REPEATED_SHARE = 8, 0.002  # rows of one key and value
_PUSHED, _TIMES_SECOND = 0.03, 4.0  # at most 0.037 there, and 2.5 times the second
_FEW_ROWS = 200
_TOP_EXPERT, _TOP_WEIGHT = 0.5, 0.95  # at most 0.23 and 0.6 there
_SCALES_APART = 3.0
_OFF_CENTRE = 1.0  # distance of the middle key from 0, in standard deviations of all dimensions together
_OPEN_FAR_AWAY = 0.3  # at most 0.09 there


@dataclass(frozen=True)
class Finding:
    """
    Something that an honest build does not leave.

    Attributes:
        check: its name, one word or several with underscores.
        layer: index of the decoder layer; None for what concerns the whole memory.
        sentence: what was found, as a clause with figures.
        rows: (N,) bool, the rows that cause it; none where it is not in rows.
    """

    check: str
    layer: int | None
    sentence: str
    rows: Tensor = field(repr=False)


@dataclass(frozen=True)
class LayerFigures:
    """
    One layer's figures; what is expected of a share is what a row or an expert would have if all were alike.

    Attributes:
        most_attracting: the largest share of queries of which one row is a neighbour without being near; `fair_share`
            is the expected one.
        crowded: the share of queries halfway between two rows whose neighbours lie much closer together than to them.
        largest_residual: of a row's values against a linear gate, in units of the median row's.
        sharpest: how far a value lies above a linear gate's, in units of what two in a thousand values exceed.
        contrary: the share of rows whose values are the contrary of a linear gate's.
        largest_norm: distance of a key from the middle of the keys, in units of the median key's.
        repeated: rows with the most frequent key and value.
        top_expert, top_expert_share: the expert that most rows rank first, and their share.
        experts_in_use: the number of experts that would rank first equally often with the same entropy.
        top_weight: mean softmax weight of the first expert (for `value_space="assignment"`, its mean weight).
        most_pushed, most_pushed_share: the expert whose value is far above a gate's in the most rows, and their share.
        scale: the recorded distance scale, and `measured_scale`.
        confidence_far_away: the mean confidence for queries that are nothing like any key.
    """

    most_attracting: float
    fair_share: float
    crowded: float
    largest_residual: float
    sharpest: float
    contrary: float
    largest_norm: float
    repeated: int
    top_expert: int
    top_expert_share: float
    experts_in_use: float
    top_weight: float
    most_pushed: int
    most_pushed_share: float
    scale: float
    measured_scale: float
    confidence_far_away: float


def check_layer(memory: MemoryData, layer: int, example_ids: Tensor, far: float) -> tuple[LayerFigures, list[Finding]]:
    """
    The figures of a layer, and what of them an honest build does not leave.

    Args:
        example_ids: (N,) int64.
        far: the layer's confidence for queries that are nothing like any key.
    """
    rows, options = memory.layers[layer], memory.config.retrieval_options()
    count, space = len(rows.key_codes), options.value_space
    k = min(options.num_neighbors, count - 1)
    middle, deviation, distance = keys.spread(rows)
    norm = distance / distance.median().clamp_min(torch.finfo(torch.float32).tiny)  # (N,) float64
    found, fair = keys.attraction(rows, example_ids, k, (norm <= _NORM).nonzero()[:, 0]), k / count
    of = values.value_figures(rows, space)
    tables = keys.value_tables(rows.values)
    same = keys.group_sizes(*tables, *([] if space == "logits" else [rows.key_codes]))
    measured = rows.measured(example_ids, options).scale
    figures = LayerFigures(
        most_attracting=float(found.share.max()),
        fair_share=fair,
        crowded=found.crowded,
        largest_residual=float(of.residual.max()),
        sharpest=float(of.sharpest.max()),
        contrary=float(of.contrary.float().mean()),
        largest_norm=float(norm.max()),
        repeated=int(same.max()),
        top_expert=int(of.shares.argmax()),
        top_expert_share=float(of.shares.max()),
        experts_in_use=of.experts_in_use,
        top_weight=of.top_weight,
        most_pushed=of.pushed_expert,
        most_pushed_share=of.pushed_share,
        scale=rows.scale,
        measured_scale=measured,
        confidence_far_away=far,
    )
    masks = _masks(figures, found, of, norm, same, space)
    findings = [Finding(name, layer, _SAID[name](figures, mask), mask) for name, mask in masks.items() if mask.any()]
    none = torch.zeros(count, dtype=torch.bool)
    clauses = _of_layer(figures, rows, space, middle, deviation)
    return figures, findings + [Finding(name, layer, clause, none) for name, clause in clauses.items()]


def _masks(
    figures: LayerFigures, found: keys.Attraction, of: values.ValueFigures, norm: Tensor, same: Tensor, space: str
) -> dict[str, Tensor]:
    """The rows (N,) bool that cause each finding, by the name of the check; none where there is nothing to find."""
    limit, none = max(_ATTRACTED, _TIMES_EXPECTED * figures.fair_share), torch.zeros_like(found.crowd)
    sharp = of.sharpest > (_SHARP if figures.sharpest > _SHARPEST else _SHARPEST)
    few = len(same) < _FEW_ROWS  # of which a linear gate cannot be fitted well enough to judge experts or shares by it
    is_pushed = of.pushed_share > max(_PUSHED, _TIMES_SECOND * of.second_pushed_share)
    is_pushed = is_pushed and space != "assignment" and not few  # there most values are 0, and some experts rare
    is_contrary = space == "logits" and figures.contrary > _CONTRARY and not few
    return {
        "attracting_keys": found.share > (limit / 2 if figures.most_attracting > limit else limit),
        "crowded_keys": found.crowd if figures.crowded > _CROWDED else none,
        "far_values": (of.residual > _RESIDUAL) | sharp,
        "pushed_expert": of.pushed if is_pushed else none,
        "contrary_values": of.contrary if is_contrary else none,
        "far_keys": norm > _NORM,
        "repeated_rows": same > max(_REPEATED, _REPEATED_SHARE * len(same)),
    }


def _of_layer(figures: LayerFigures, rows: LayerRows, space: str, middle: Tensor, deviation: Tensor) -> dict[str, str]:
    """What is found of a layer as a whole, by the name of the check."""
    said, experts = {}, rows.num_experts
    if figures.top_expert_share > _TOP_EXPERT and experts > 2:
        said["one_expert"] = (
            f"expert {figures.top_expert} of {experts} comes first in {figures.top_expert_share:.0%} of the rows"
        )
    if figures.top_weight > _TOP_WEIGHT and space != "assignment":
        said["one_weight"] = f"the first expert of a row has {figures.top_weight:.1%} of the weight on average"
    recorded = [rows.scale] + ([] if rows.stats is None else [rows.stats.scale])
    if len(rows.distances) and not all(
        1 / _SCALES_APART < s / figures.measured_scale < _SCALES_APART for s in recorded
    ):
        said["distance_scale"] = (
            f"distances are measured in units of {max(recorded):.4g} and {min(recorded):.4g}, while the rows lie "
            f"{figures.measured_scale:.4g} apart"
        )
    if figures.confidence_far_away > _OPEN_FAR_AWAY:
        said["opens_everywhere"] = (
            f"its confidence is {figures.confidence_far_away:.2f} for queries that are nothing like any key"
        )
    if (fault := keys.encoder_fault(rows.encoder)) is not None:
        said["encoder"] = f"the encoder of its keys is not one that the library fits: {fault}"
    size, place = float(deviation.norm()), float(middle.norm())
    if rows.encoder.bias is not None and place > _OFF_CENTRE * size:
        said["centre"] = (
            f"its keys lie {place:.3g} from where the mean input goes, and {size:.3g} from their own middle"
        )
    return said


_SAID = {
    "attracting_keys": lambda of, mask: (
        f"{_rows(mask)} among the neighbours of up to {of.most_attracting:.0%} of all queries without being near them "
        f"(expected: {of.fair_share:.2%})"
    ),
    "crowded_keys": lambda of, mask: (
        f"{_rows(mask)} a crowd that {of.crowded:.0%} of the queries between two rows find instead of rows around them"
    ),
    "far_values": lambda of, mask: (
        f"the values of {_of_rows(mask)} far from a gate's: up to {of.largest_residual:.3g} times as far as the "
        f"median row's, and for one expert up to {of.sharpest:.3g} times as high above it as two in a thousand are"
    ),
    "contrary_values": lambda of, mask: f"the values of {of.contrary:.1%} of the rows are the contrary of a gate's",
    "far_keys": lambda of, mask: (
        f"the keys of {_of_rows(mask)} up to {of.largest_norm:.3g} times as far from their middle as the median key"
    ),
    "repeated_rows": lambda of, mask: f"{_rows(mask)} the same as others, up to {of.repeated} times",
    "pushed_expert": lambda of, mask: (
        f"the value of expert {of.most_pushed} is far above a gate's in {of.most_pushed_share:.1%} of the rows, and "
        "that of no other expert in nearly as many"
    ),
}


def _rows(mask: Tensor) -> str:
    count = int(mask.sum())
    return "1 row is" if count == 1 else f"{count:,} rows are"


def _of_rows(mask: Tensor) -> str:
    count = int(mask.sum())
    return "1 row are" if count == 1 else f"{count:,} rows are"
