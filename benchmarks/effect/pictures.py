"""The three pictures of the page `effect.md`: gain against harm, bytes, and the number of reference tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")  # which measures texts, for the labels

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.effect.figures import (
    Cells,
    Point,
    compared_kinds,
    entries_of,
    front,
    grid_points,
    measured_everywhere,
    points,
    ranked,
)
from benchmarks.effect.labels import Label, place
from benchmarks.effect.settings import (
    BOTH,
    COMPETITORS,
    COUNTS,
    DEFAULT,
    GRID_KIND,
    GRID_LAB,
    LABS,
    LORA_RATES,
    OPEN,
    PLAIN,
    PLAIN_RAW,
    REFERENCE_COUNTS,
    SEEDS,
    TOKENS,
    WEIGHED,
    WEIGHTS,
)

_STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Series(NamedTuple):
    """
    Settings that belong together, in the order of what changes between them, and the label of each (None for none).
    """

    labels: dict[str, str | None]
    colour: str
    marker: str
    size: float = 4.5


# colours that colour-blind readers can tell apart (Okabe and Ito)
_BLACK, _ORANGE, _BLUE, _GREEN, _PURPLE, _GREY = "#000000", "#D55E00", "#0072B2", "#007A5A", "#B0578D", "#6F6F6F"


def _named(settings: Sequence, *labels: str | None) -> dict[str, str | None]:
    return dict(zip((setting.name for setting in settings), labels, strict=True))


SERIES = (
    Series(_named(WEIGHED, *[None] * len(WEIGHED)), _BLACK, "o", 3),
    Series(_named(OPEN[::-1], None, None, "routing, wide open"), _BLUE, "o", 3),
    Series(_named(PLAIN, None, None, "kNN-LM"), _PURPLE, "v", 4),
    Series(_named(PLAIN_RAW, None, "kNN-LM, raw keys"), _PURPLE, "^", 4),
    Series(_named(LORA_RATES, *(f"LoRA {setting.rate:g}" for setting in LORA_RATES)), _ORANGE, "s"),
    Series({"full fine-tuning": "full fine-tuning"}, _ORANGE, "D"),
    Series({"router-only": "router-only"}, _GREY, "P", 6),
    Series({DEFAULT.name: "memory: routing"}, _BLUE, "*", 11),
    Series({TOKENS.name: "memory: next tokens"}, _GREEN, "*", 11),
    Series({BOTH.name: "memory: both"}, _BLACK, "*", 11),
)
"""What the picture of gain and harm shows."""
_METHODS = {
    BOTH.name: ("memory: both", _BLACK, "*"),
    DEFAULT.name: ("memory: routing", _BLUE, "*"),
    "LoRA": ("LoRA", _ORANGE, "s"),
    "router-only": ("router-only", _GREY, "P"),
}


def write_pictures(results: Path, cells: Cells) -> None:
    """Writes `effect-{harm,bytes,references}.svg`."""
    with pyplot.rc_context({"svg.hashsalt": "effect"}):  # the same bytes from the same figures
        for name, figure in pictures(cells).items():
            figure.savefig(results / f"effect-{name}.svg", metadata={"Date": None})
            pyplot.close(figure)


def pictures(cells: Cells) -> dict[str, Figure]:
    """The three figures, by name; what was not measured is left out of them."""
    labs = [lab for lab in LABS if any(key[0] == lab for key in cells)]
    with pyplot.rc_context(_STYLE):
        return {"harm": _harm(cells, labs), "bytes": _bytes(cells), "references": _references(cells, labs)}


def _harm(cells: Cells, labs: Sequence[str]) -> Figure:
    kinds = compared_kinds(cells, labs)
    found = {lab: measured_everywhere(points(cells, lab, kinds, SEEDS[:1])) for lab in labs}
    figure, axes = _panels(labs, 4.6, 4.7)
    shown = [found[lab][name] for lab in labs for one in SERIES for name in one.labels if name in found[lab]]
    left = min([-0.01, *(1.3 * point.harm for point in shown)])
    right = max([0.1, *(2.0 * point.harm for point in shown)])
    ticks = [value for value in (-0.1, -0.01, 0, 0.01, 0.1, 1, 10) if left <= value <= right]
    for axis in axes:
        axis.set_xscale("symlog", linthresh=0.01, linscale=0.8)
        axis.set_xlim(left, right)
        axis.set_ylim(*_around([point.gain for point in shown]))
        _ticks(axis, ticks, "{:g}".format)
        axis.axvline(0, color=_BLACK, lw=0.8, zorder=1)
        axis.set_xlabel("harm: loss off-domain, nats per token")
    for axis, lab in zip(axes, labs):
        labels = []
        for series in SERIES:
            some = [found[lab][name] for name in series.labels if name in found[lab]]
            at = [point.harm for point in some], [point.gain for point in some]
            axis.plot(*at, color=series.colour, marker=series.marker, ms=series.size, mew=0, lw=1, label=series.colour)
            texts = ((series.labels[point.name], point) for point in some)
            labels += [Label(text, one.harm, one.gain, series.colour) for text, one in texts if text is not None]
        place(axis, labels[::-1])
    return figure


def _bytes(cells: Cells) -> Figure:
    found = [point for point in grid_points(cells, GRID_LAB) if point.group != REFERENCE_COUNTS]
    figure, (axis,) = _panels([GRID_LAB], 7.4, 4.4)
    memories = [one for one in ranked(found) if one.group != WEIGHTS and one.name != TOKENS.name]
    rivals = [point for point in found if point.group == COMPETITORS and point.name in _RIVALS]
    best = front(memories, "nbytes")
    axis.set_xscale("log")
    shown = [*memories, *rivals]
    sizes = [point.nbytes for point in shown] or [1e6]
    axis.set_xlim(min(sizes) / 2, max(sizes) * 4)
    axis.set_ylim(*_around([point.gain for point in shown]))
    _ticks(axis, [10.0**n for n in range(13) if min(sizes) / 2 < 10**n < max(sizes) * 4], _megabytes)
    axis.set_xlabel("bytes shipped beside the model")
    for some, colour, marker in ((memories, _BLUE, "o"), (best, _BLACK, "o"), (rivals, _ORANGE, "s")):
        at = [point.nbytes for point in some], [point.gain for point in some]
        axis.plot(*at, color=colour, marker=marker, ms=4, mew=0, lw=0, label=colour)
    named = [*best, *rivals, *(point for point in memories if point.name in (DEFAULT.name, BOTH.name))]
    named = {point.name: Label(point.name, point.nbytes, point.gain, _BLACK) for point in named}
    place(axis, list(named.values()), 7.5)
    return figure


_COUNT_TICKS = tuple(1000 * 4**n for n in range(8))
_RIVALS = ("router-only", "full fine-tuning", *(setting.name for setting in LORA_RATES))


def _megabytes(value: float) -> str:
    return f"{value / 1e6:g} MB"


def _thousands(value: float) -> str:
    return f"{value / 1000:.0f} k"


def _references(cells: Cells, labs: Sequence[str]) -> Figure:
    figure, axes = _panels(labs, 4.6, 4.2)
    found = {lab: _by_count(cells, lab) for lab in labs}
    shown = [point for lab in labs for some in found[lab].values() for _, point in some]
    counts = [count for lab in labs for some in found[lab].values() for count, _ in some] or [4096, 65536]
    bounds = [-bound for point in shown for bound in (point.nll.low, point.nll.high) if bound is not None]
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlim(0.75 * min(counts), 4 * max(counts))
        axis.set_ylim(*_around(bounds))
        _ticks(axis, [count for count in _COUNT_TICKS if count < 1.5 * max(counts)], _thousands)
        axis.set_xlabel("reference tokens")
    for axis, lab in zip(axes, labs):
        labels = []
        for method, (label, colour, marker) in _METHODS.items():
            at, some = zip(*found[lab][method]) if found[lab][method] else ((), ())
            size = 9 if marker == "*" else 5
            axis.plot(at, [p.gain for p in some], color=colour, marker=marker, ms=size, mew=0, lw=1, label=label)
            known = [(x, -p.nll.high, -p.nll.low) for x, p in zip(at, some) if p.nll.high is not None]
            if known:
                axis.fill_between(*zip(*known), color=colour, alpha=0.12, lw=0)
            labels += [Label(label, at[-1], some[-1].gain, colour)] if some else []
        place(axis, labels)
    return figure


def _by_count(cells: Cells, lab: str) -> dict[str, list[tuple[int, Point]]]:
    """By method, the points by their number of reference tokens."""
    entries = entries_of(cells.get((lab, GRID_KIND, SEEDS[0]), {"base": {}, "settings": {}}))
    points_of, found = {point.name: point for point in grid_points(cells, lab)}, {}
    for method in _METHODS:
        names = [name for name in (method, *(f"{method}, {n} windows" for n in COUNTS)) if name in points_of]
        some = [(entries[name]["reference_tokens"], points_of[name]) for name in names]
        found[method] = sorted(some, key=lambda pair: pair[0])
    return found


def _panels(labs: Sequence[str], width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    """A panel for each lab beside the others, the same height for all; the layout is final."""
    count = max(1, len(labs))
    figure, axes = pyplot.subplots(
        1, count, figsize=(width * count + 0.4, height), squeeze=False, sharex=True, sharey=True
    )
    whole = width * count + 0.4
    figure.subplots_adjust(0.65 / whole, 0.5 / height, 1 - 0.12 / whole, 1 - 0.3 / height, 0.06)
    for axis, lab in zip(axes[0], labs):
        axis.set_title(LABS[lab], fontsize=10)
        axis.axhline(0, color=_BLACK, lw=0.8, zorder=1)
    axes[0][0].set_ylabel("gain in-domain, nats per token")
    return figure, axes[0]


def _ticks(axis: Axes, at: Sequence[float], text: Callable[[float], str]) -> None:
    axis.xaxis.set_major_locator(FixedLocator(at))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_ticklabels([text(value) for value in at])


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that shows all of these and 0, with room for labels."""
    low, high = min([0.0, *values]), max([0.1, *values])
    return low - 0.06 * (high - low), high + 0.08 * (high - low)
